"""Values that guide sampling: probabilities of tokens put in other proportions, and answers chosen among several.

Which token next: `reweighted` by `value_ratio` or `value_tilt`; `shifted_logits`. Which answer of many: `pick`,
`partition` and `vote`. Which beginnings to go on with: `kept_beams`. How far that leads from the policy: `*_kl`.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

Answer = TypeVar("Answer")


def value_ratio(
    before: Float[Tensor, "B"],
    after: Float[Tensor, "B K"],
    *,
    lam: float = 1.0,
    scale: Literal["logit", "probability"] = "logit",
) -> Float[Tensor, "B K"]:
    """How much likelier success becomes by each candidate, as a log-weight for `reweighted`.

        lam · (log P(success | s, a) - log P(success | s)),    P = σ(V) or V

    Bayes' rule for the policy given success, if P is right and lam = 1. CriticControl: Kim et al. 2022,
    arXiv:2212.10938, which takes σ of values that were learned without it.

    Args:
        before: V(s) of each row.
        after: V(s, a) of each candidate.
        lam: 0 leaves the policy as it is.
        scale: what a value is: a `logit` of success (any number), or its `probability`.

    Raises:
        ValueError: a probability outside [0, 1].

    >>> value_ratio(torch.tensor([0.]), torch.tensor([[-1., 1., 0.]])).exp()
    tensor([[0.5379, 1.4621, 1.0000]])
    """
    logs: list[Tensor] = []
    for values in (before[:, None], after):
        if scale == "logit":
            logs.append(functional.logsigmoid(values))
            continue
        if ((values < 0) | (values > 1)).any():
            wrong = values[(values < 0) | (values > 1)][0].item()
            raise ValueError(
                f"a value is {wrong:.4g}, and as a probability of success it is in [0, 1]; take a critic that says "
                'probabilities (bernoulli), scale "logit", or value_tilt'
            )
        # A probability may round to 0, and 0 / 0 says nothing.
        logs.append(values.clamp_min(torch.finfo(values.dtype).tiny).log())
    return lam * (logs[1] - logs[0])


def value_tilt(after: Float[Tensor, "B K"], *, lam: float = 1.0) -> Float[Tensor, "B K"]:
    """The value of each candidate, as a log-weight for `reweighted`: lam · V(s, a).

    The policy that has the largest lam · E[V] - KL(· ‖ π) at this token. Controlled Decoding: Mudgal et al. 2023,
    arXiv:2310.17022.

    Args:
        after: V(s, a), any unit.
        lam: 1 / unit of value; 0 leaves the policy as it is.
    """
    return lam * after


def reweighted(
    probs: Float[Tensor, "B V"],
    candidates: Int[Tensor, "B K"],
    log_weights: Float[Tensor, "B K"],
    *,
    others: Literal["zero", "keep"] = "zero",
) -> Float[Tensor, "B V"]:
    """The policy with other proportions among the candidates.

        p'(a) = p(a) · exp(w(a)) / Z over candidates;    elsewhere 0, or p(a) / Z

    Args:
        probs: p, rows sum to 1.
        candidates: distinct token ids of each row, the likeliest ones as a rule.
        log_weights: w.
        others: `zero`: only candidates may be drawn, and a constant in w cancels. `keep`, as in CriticControl's own
            program: tokens that nobody valued stay as likely as a candidate of weight 0.

    Returns:
        p', rows sum to 1.

    >>> p, all_three = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0, 1, 2]])
    >>> reweighted(p, all_three, value_tilt(torch.tensor([[0.2, 0.6, 0.9]])))
    tensor([[0.3703, 0.3314, 0.2983]])
    """
    logits = probs.gather(1, candidates).log() + log_weights
    if others == "zero":
        return torch.zeros_like(probs).scatter_(1, candidates, logits.softmax(dim=1))
    return probs.log().scatter(1, candidates, logits).softmax(dim=1)


def shifted_logits(
    base: Float[Tensor, "B V"],
    pairs: Sequence[tuple[Float[Tensor, "B T"], Float[Tensor, "B R"]]],
    *,
    lam: float = 1.0,
) -> Float[Tensor, "B V"]:
    """What reinforcement learning changed in small models, put on a large one that it never saw.

        l = l_base + lam · Σ_pairs (l_tuned - l_reference),    -∞ for tokens that some model does not have

    RAST: arXiv:2506.15710. Logits as they are: a constant of a row cancels in the softmax. Vocabularies that were
    padded to different widths agree in their first tokens, and the rest is never drawn.

    Args:
        base: logits of the large model.
        pairs: logits of a tuned model and of the one it was tuned from, at the same state; widths may differ.
        lam: 0: the large model as it is, on the tokens that all have.

    >>> base, tuned, reference = (torch.tensor([x]) for x in ([2., 1., 0.], [1., 2., 0.], [1., 1., 0.]))
    >>> shifted_logits(base, [(tuned, reference)], lam=0.5)
    tensor([[2.0000, 1.5000, 0.0000]])
    """
    width = min(logits.shape[1] for logits in (base, *(one for pair in pairs for one in pair)))
    shifted = base[:, :width]
    for tuned, reference in pairs:
        shifted = shifted + lam * (tuned[:, :width] - reference[:, :width])
    return functional.pad(shifted, (0, base.shape[1] - width), value=-math.inf)


def pick(values: Float[Tensor, "N"], finished: Bool[Tensor, "N"]) -> int:
    """Which of several responses: the finished one worth most; the one worth most if none is finished.

    A response cut at the length limit may be worth much to somebody who goes on with it, and here nobody does.

    Args:
        values: of the responses.
        finished: ended by the policy.

    Returns:
        The first of the best.

    >>> pick(torch.tensor([0.2, 0.9, 0.7]), torch.tensor([True, False, True]))
    2
    """
    if finished.any():
        values = values.masked_fill(~finished, -math.inf)
    return int(values.argmax())


def partition(items: Sequence[Answer], same: Callable[[Answer, Answer], bool]) -> list[int]:
    """Groups of answers that are the same, as an equivalence relation has them.

    Whoever compares answers may find a = b and b = c and not a = c (numbers rounded, formulas not recognised). Groups
    are joined along every equality found (union-find), so that each answer is in one group whatever the order.

    Args:
        items: answers. Equal ones, if they can be hashed, are compared with others once.
        same: symmetric.

    Returns:
        The group of each item; groups are numbered in the order in which they appear.

    >>> partition([1.0, 2.0, 1.4, 1.8], lambda a, b: abs(a - b) < 0.5)
    [0, 0, 0, 0]
    >>> partition(["7", "8", "7"], str.__eq__)
    [0, 1, 0]
    """
    firsts: dict[Hashable, int] = {}
    parents = list(range(len(items)))
    for place, item in enumerate(items):
        if isinstance(item, Hashable):
            parents[place] = firsts.setdefault(item, place)

    def root(place: int) -> int:
        while parents[place] != place:
            parents[place] = parents[parents[place]]
            place = parents[place]
        return place

    distinct = [place for place in range(len(items)) if parents[place] == place]
    for index, one in enumerate(distinct):
        for other in distinct[:index]:
            if root(one) != root(other) and same(items[other], items[one]):
                parents[max(root(one), root(other))] = min(root(one), root(other))
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(place), len(numbers)) for place in range(len(items))]


def vote(groups: Sequence[int], weights: Sequence[float]) -> int:
    """The group whose members weigh most together; of equal ones the larger, then the first.

    With values as weights, the weighted majority vote; with ones, the majority.

    Args:
        groups: of each voter, from `partition`; at least one.
        weights: of each voter.

    >>> vote([0, 0, 1, 2], [0.3, 0.2, 0.6, 0.1]), vote([0, 0, 1, 2], [1.0, 1.0, 1.0, 1.0])
    (1, 0)
    """
    totals = {
        group: (math.fsum(w for g, w in zip(groups, weights, strict=True) if g == group), size)
        for group, size in ((group, list(groups).count(group)) for group in groups)
    }
    return max(totals, key=lambda group: totals[group])


def kept_beams(values: Sequence[float], frozen: Sequence[bool], *, width: int) -> list[int]:
    """Which beginnings of a tree to go on with: those that are frozen, and of the others the ones worth most.

    A beam that was kept when it was finished is frozen: it keeps its place and takes it from the others.

    Args:
        values: of all beams.
        frozen: those kept earlier that have nothing to be gone on with.
        width: beams to keep, the frozen ones among them.

    Returns:
        Their indices in order; of equal values the earlier.

    >>> kept_beams([0.1, 0.9, 0.5, 0.7], [True, False, False, False], width=2)
    [0, 1]
    """
    others = [place for place, is_frozen in enumerate(frozen) if not is_frozen]
    others.sort(key=lambda place: -values[place])
    places = [place for place, is_frozen in enumerate(frozen) if is_frozen]
    return sorted(places + others[: max(width - len(places), 0)])


def best_of_n_kl(n: int) -> float:
    """How far the best of n responses can be from the policy at most, nats: ln n - (n - 1) / n.

    Beirami et al. 2024, arXiv:2401.01879.

    >>> round(best_of_n_kl(4), 5)
    0.63629
    """
    return math.log(n) - (n - 1) / n


def blockwise_kl(candidates: int, *, block_tokens: int, tokens: int) -> float:
    """The same where the best of several blocks is taken again and again: `best_of_n_kl` times the number of blocks.

    Mudgal et al. 2023, arXiv:2310.17022.

    >>> round(blockwise_kl(4, block_tokens=32, tokens=128), 5)
    2.54518
    """
    return best_of_n_kl(candidates) * tokens / block_tokens
