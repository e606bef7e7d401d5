"""Numbers that tell whether training is healthy: explained variance, the sampler's gap, pass@k."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.losses import MAX_LOG_RATIO
from llmac.core.masking import masked_mean, masked_var
from llmac.core.measures import Last, Max, Mean, Measure
from llmac.core.types import AllSum, CriticTargets, Values, identity


def explained_variance(
    values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    sum_across: AllSum = identity,
) -> Float[Tensor, ""]:
    """Share of the variance of the returns that the critic foresaw.

        EV = 1 - Var(G - V) / Var(G)

    1 = perfect, 0 = no better than a constant, negative = worse than a constant. Variances are
    taken over all ranks and the whole step: a mean of per-micro-batch ratios is another number. So
    report it as `Last`, not `Mean`.

    Args:
        values: V(s_t).
        returns: G_t.
        mask: True = counts.
        sum_across: sums over ranks.

    Returns:
        At most 1; 0 if the returns do not vary beyond rounding, since there is nothing to explain.

    >>> values, returns = torch.tensor([[.5, 1.]]), torch.tensor([[0., 1.]])
    >>> explained_variance(values, returns, torch.tensor([[True, True]]))
    tensor(0.7500)
    """
    unexplained = masked_var(returns - values, mask, unbiased=False, sum_across=sum_across)
    variance = masked_var(returns, mask, unbiased=False, sum_across=sum_across)
    size = masked_mean(returns.square() + values.square(), mask, sum_across=sum_across)
    varies = variance > (64 * torch.finfo(returns.dtype).eps) ** 2 * size
    return torch.where(varies, 1.0 - unexplained / variance.where(varies, 1.0), 0.0)


def sampler_gap(
    old_logprobs: Float[Tensor, "B T"],
    sampler_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
) -> dict[str, Measure]:
    """How far the engine that sampled is from the policy that is trained.

    With d = log π_old - log μ, clamped to ±20:

        actor/sampler_kl                 mean of e^d - 1 - d: KL(μ ‖ π_old), nats, never negative
        actor/sampler_logprob_diff_mean  mean of |d|, nats
        actor/sampler_logprob_diff_max   max of |d|, nats
        actor/sampler_ratio_mean         mean of e^d

    The last is 1 in expectation when both have full support; a lasting value below 1 is the mass
    that μ's truncation (top-p, top-k) kept.

    Args:
        old_logprobs: π_old.
        sampler_logprobs: μ.
        mask: True = sampled by the policy.

    Returns:
        Metrics that add up over micro-batches and ranks.

    >>> trainer, engine = torch.tensor([[-1., -2.]]), torch.tensor([[-1., -1.5]])
    >>> gap = sampler_gap(trainer, engine, torch.tensor([[True, True]]))
    >>> gap["actor/sampler_logprob_diff_max"].value
    0.5
    """
    difference = (
        (old_logprobs - sampler_logprobs).detach()[mask].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    )
    count = float(difference.numel())
    size = difference.abs()
    return {
        "actor/sampler_kl": Mean((torch.expm1(difference) - difference).sum(), count),
        "actor/sampler_logprob_diff_mean": Mean(size.sum(), count),
        "actor/sampler_logprob_diff_max": Max(size.max() if count else 0.0),
        "actor/sampler_ratio_mean": Mean(difference.exp().sum(), count),
    }


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of `k` responses is right, drawn from `n` of which `c` are.

        pass@k = 1 - C(n-c, k) / C(n, k)

    Unbiased for the chance that k fresh samples contain a right one. Chen et al. 2021,
    arXiv:2107.03374, eq. 1.

    Args:
        n: responses sampled.
        c: of them right.
        k: responses drawn, at most `n`.

    Returns:
        A probability.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(
            f"pass@k needs 0 <= c <= n and 1 <= k <= n; found n = {n}, c = {c}, k = {k}"
        )
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def advantage_by_outcome(
    advantages: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    outcomes: Float[Tensor, "B"],
    *,
    threshold: float = 0.5,
) -> dict[str, Measure]:
    """Mean advantage of the tokens of good and of bad responses, apart.

    Far apart: credit follows the outcome. Equal: the advantages say nothing about it. A critic that
    sees mistakes coming has both near 0 late in the response.

    Args:
        advantages: Â.
        mask: tokens that enter the policy loss.
        outcomes: outcome reward of each response.
        threshold: a response is good if its outcome is above, unit of reward.

    Returns:
        `critic/advantages/good/mean` and `critic/advantages/bad/mean`, means over tokens.

    >>> advantages = torch.tensor([[1., 3.], [-1., 9.]])
    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> split = advantage_by_outcome(advantages, mask, torch.tensor([1., 0.]))
    >>> split["critic/advantages/good/mean"].value, split["critic/advantages/bad/mean"].value
    (2.0, -1.0)
    """
    good = mask & (outcomes > threshold)[:, None]
    return {
        f"critic/advantages/{name}/mean": Mean(advantages.where(part, 0.0).sum(), float(part.sum()))
        for name, part in (("good", good), ("bad", mask & ~good))
    }


def critic_health(
    values: Values,
    targets: CriticTargets,
    outcomes: Float[Tensor, "B"],
    *,
    threshold: float = 0.5,
    sum_across: AllSum = identity,
) -> dict[str, Measure]:
    """Whether the critic over-estimates, and in which part of a response it knows something.

    Over the states that have a target, with G the target, r the outcome of the response, and
    A = r - V the advantage at λ = 1:

        critic/value_bias               mean V - mean G, unit of reward; positive = over-estimates
        critic/advantage_asymmetry      (|mean A of failures| / mean A of successes) / odds
        critic/vf_explained_var/first   explained variance of the first third of the positions of
                                        each response; also /middle and /last

    odds = states of successes / states of failures. For a calibrated critic and γ = 1,
    P(fail)·E[V|fail] = E[V(1-V)] = P(succ)·E[1-V|succ]: the two means relate as the odds, not as
    1, and the asymmetry is 1; above 1, the critic over-estimates. Absent when one outcome is missing
    or the successes have no positive advantage: then it is undefined, not 0.

    Args:
        values: what the critic said before the update.
        targets: what it should have said, and where.
        outcomes: outcome reward of each response.
        threshold: a response is a success if its outcome is above, unit of reward.
        sum_across: sums over ranks; every rank calls.

    Returns:
        Metrics of the whole step; the same names on every rank.

    >>> mask = torch.tensor([[True]] * 4)
    >>> outcomes = torch.tensor([1., 0., 0., 0.])
    >>> values = Values(at=torch.full((4, 1), .5), starts=mask, bootstrap=torch.zeros(4))
    >>> targets = CriticTargets(returns=outcomes[:, None], value_mask=mask, old_values=values.at)
    >>> health = critic_health(values, targets, outcomes)
    >>> health["critic/value_bias"].value, health["critic/advantage_asymmetry"].value
    (0.25, 3.0)
    """
    mask, said = targets.value_mask, values.at
    errors = (said - targets.returns).where(mask, 0.0)
    metrics: dict[str, Measure] = {"critic/value_bias": Mean(errors.sum(), float(mask.sum()))}

    good = mask & (outcomes > threshold)[:, None]
    bad = mask & ~good
    advantages = (outcomes[:, None] - said).double()
    sums = [advantages.where(good, 0.0).sum(), advantages.where(bad, 0.0).sum()]
    counts = [good.sum().double(), bad.sum().double()]
    won, lost, wins, losses = (float(x) for x in sum_across(torch.stack([*sums, *counts])))
    if wins and losses and won > 0:
        # The counts of the two means are those of the odds, and cancel.
        metrics["critic/advantage_asymmetry"] = Last(abs(lost) / won)

    for name, part in zip(("first", "middle", "last"), _thirds(mask), strict=True):
        explained = explained_variance(said, targets.returns, part, sum_across=sum_across)
        metrics[f"critic/vf_explained_var/{name}"] = Last(explained)
    return metrics


def _thirds(mask: Bool[Tensor, "B T"]) -> list[Bool[Tensor, "B T"]]:
    """The counted positions of each row, cut into three parts as equal as can be."""
    before = mask.cumsum(dim=1) - mask.long()
    third = 3 * before // mask.sum(dim=1, keepdim=True).clamp(min=1)
    return [mask & (third == index) for index in range(3)]
