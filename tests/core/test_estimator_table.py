"""Every estimator against the exact advantage; docs/estimators.md shows what is found.

After a change that is meant: `python -m tests.core.test_estimator_table` rewrites the page's table.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmac.core.baselines import group_relative, leave_one_out
from llmac.core.returns import segment_gae
from llmac.core.segments import every_n, low_probability
from llmac.core.traces import doubt_lam, length_lam
from llmac.core.vtrace import segment_ratios, vtrace

from .estimators import (
    Estimator,
    Place,
    Quality,
    Said,
    binomial,
    expected_gradient,
    gradient_variance,
    judge,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "estimators.md"
FRESH = [Place(0), Place(1)]
STALE = [Place(0, staleness=0.5), Place(1, staleness=0.5)]
SUCCESS = [place.success for place in FRESH]
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Row:
    """An estimator, and what must be true of it."""

    name: str
    values: str
    estimator: Estimator
    advantage_exact: bool
    """Whether E[Â | s, a] is the exact advantage, up to a baseline."""
    direction_exact: bool
    """Whether the expected gradient points where the true one does."""
    stale: bool = False

    @property
    def places(self) -> list[Place]:
        return STALE if self.stale else FRESH


def critic(place: Place, kind: str) -> Tensor:
    """V at every state: the true one, one number for all, or the true one with an error."""
    if kind == "exact":
        return place.values
    if kind == "constant":
        return torch.full_like(place.values, sum(SUCCESS) / len(SUCCESS))
    random = torch.Generator().manual_seed(7)
    error = 0.2 * torch.randn(len(place.world.states), generator=random, dtype=torch.float64)
    return place.values + error[place.state]


def one_case(place: Place, advantages: Tensor) -> Said:
    tokens = float((place.chance[:, None] * place.mask).sum())
    certain = torch.ones(1, dtype=torch.float64)
    return Said(advantages=advantages[None], chances=certain, tokens=tokens)


def gae(kind: str, lam: float | Callable[[Place], Tensor]) -> Estimator:
    def estimate(place: Place) -> Said:
        decay = lam if isinstance(lam, float) else lam(place)
        known = critic(place, kind), place.mask, place.bootstrap
        return one_case(place, segment_gae(place.rewards, *known, gamma=1.0, lam=decay))

    return estimate


def by_length(place: Place) -> Tensor:
    return length_lam(place.mask, alpha=0.5)


def by_doubt(place: Place) -> Tensor:
    return doubt_lam(place.logprobs, place.mask, lam=0.5, threshold=0.3)


def compared(advantage: Callable[[Tensor, Tensor], Tensor], *, siblings: int, others: int = 0):
    """Outcomes compared with those of siblings, and perhaps of `others` to the other prompt.

    Rewards are 0 or 1, so all that matters of the rest is how many succeeded.
    """
    size = siblings + others

    def credit(*own: int, successes: int) -> Tensor:
        rest = size - len(own)
        outcomes = [*own, *[1] * successes, *[0] * (rest - successes)]
        return advantage(torch.tensor(outcomes).double(), torch.zeros(size, dtype=torch.int64))

    def estimate(place: Place) -> Said:
        elsewhere = binomial(others, sum(SUCCESS) - place.success)

        def successes_among(rest: int) -> Tensor:
            """Chances of 0 ... successes of `rest` siblings and all others."""
            total = torch.zeros(rest + others + 1, dtype=torch.float64)
            for k, chance in enumerate(binomial(rest, place.success)):
                total[k : k + others + 1] += chance * elsewhere
            return total

        of_one = [
            [credit(own, successes=m)[0] for own in (0, 1)] for m in range(size)
        ]  # [cases, outcome]
        together = torch.zeros(2, 2, dtype=torch.float64)
        for m, chance in enumerate(successes_among(siblings - 2)):
            for i, j in itertools.product((0, 1), repeat=2):
                both = credit(i, j, successes=m)
                together[i, j] += chance * both[0] * both[1]
        per_response = torch.tensor(of_one, dtype=torch.float64)[:, place.outcome.long()]
        return Said(
            advantages=per_response[:, :, None] * place.mask,
            chances=successes_among(siblings - 1),
            tokens=one_case(place, place.rewards).tokens,
            siblings=siblings,
            together=together,
        )

    return estimate


def without_std(rewards: Tensor, group: Tensor) -> Tensor:
    return group_relative(rewards, group, scale="none")


def with_std(rewards: Tensor, group: Tensor) -> Tensor:
    return group_relative(rewards, group, scale="group")


def by_two(place: Place) -> Tensor:
    return every_n(place.mask, 2)


def at_doubt(place: Place) -> Tensor:
    return low_probability(place.logprobs, place.mask, threshold=0.3)


def as_spo_chain(place: Place) -> Tensor:
    doubt = {"threshold": 0.9, "interval": 2, "first": False}
    return low_probability(place.logprobs, place.mask, **doubt)


def all_tokens(place: Place) -> Tensor:
    return place.mask


def below_certain(place: Place) -> Tensor:
    return place.mask & (place.logprobs.exp() < 0.9)


def segments(
    cut: Callable[[Place], Tensor],
    samples: int | None,
    trained: Callable[[Place], Tensor] = all_tokens,
) -> Estimator:
    """λ = 0 between cuts; V at a cut is exact, or the mean outcome of `samples` continuations.

    Such a V enters linearly, so its mean and variance say all: it is one of two equally likely
    values, V ± √(V (1 - V) / K). Tokens that are not trained have advantage 0.
    """

    def estimate(place: Place) -> Said:
        starts = cut(place)

        def advantages(values: Tensor) -> Tensor:
            known = values, starts, place.bootstrap
            found = segment_gae(place.rewards, *known, gamma=1.0, lam=0.0)
            return found.where(trained(place), 0.0)

        if samples is None:
            return one_case(place, advantages(place.values))
        deviation = (place.values * (1 - place.values) / samples).clamp(min=0).sqrt()
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=place.mask.shape[1])))
        cases = [advantages(place.values + sign * deviation) for sign in signs.double()]
        asked = (place.tokens_left * starts).sum(dim=1)
        return Said(
            advantages=torch.stack(cases),
            chances=torch.full((len(cases),), 1 / len(cases), dtype=torch.float64),
            tokens=float(place.chance @ (place.mask.sum(dim=1) + samples * asked)),
        )

    return estimate


def corrected(kind: str, bound: float) -> Estimator:
    def estimate(place: Place) -> Said:
        ratios = segment_ratios(place.logprobs, place.sampler_logprobs, place.mask, place.mask)
        known = critic(place, kind), ratios, place.mask, place.bootstrap
        rates = {"gamma": 1.0, "lam": 1.0, "rho_max": bound, "c_max": bound}
        return one_case(place, vtrace(place.rewards, *known, **rates)[0])

    return estimate


def row(name: str, values: str, estimator: Estimator, exact: bool | tuple[bool, bool], **kind):
    advantage, direction = exact if isinstance(exact, tuple) else (exact, exact)
    return Row(
        name=name,
        values=values,
        estimator=estimator,
        advantage_exact=advantage,
        direction_exact=direction,
        **kind,
    )


SHRUNK = (False, True)  # too small by a constant factor, in the right direction
LOCAL = (True, False)  # right at every state, but states are met as often as the sampler meets them
ROWS = (
    *(row(f"GAE, λ = {lam:g}", "exact", gae("exact", lam), True) for lam in (0.0, 0.5, 0.95, 1.0)),
    *(
        row(f"GAE, λ = {lam:g}", kind, gae(kind, lam), lam == 1)
        for kind in ("wrong", "constant")
        for lam in (0.0, 0.5, 0.95, 1.0)
    ),
    row("GAE, λ by length (α = .5)", "exact", gae("exact", by_length), False),
    row("GAE, λ by length (α = .5)", "wrong", gae("wrong", by_length), False),
    row("GAE, λ by doubt (.5 if p < .3)", "exact", gae("exact", by_doubt), False),
    row("GAE, λ by doubt (.5 if p < .3)", "wrong", gae("wrong", by_doubt), False),
    row(f"batch mean of {BATCH}", "-", compared(without_std, siblings=32, others=32), SHRUNK),
    row("group mean, G = 4", "-", compared(without_std, siblings=4), SHRUNK),
    row("group mean, G = 8", "-", compared(without_std, siblings=8), SHRUNK),
    row("group mean and std, G = 8", "-", compared(with_std, siblings=8), False),
    row("leave-one-out, G = 4", "-", compared(leave_one_out, siblings=4), True),
    row("leave-one-out, G = 8", "-", compared(leave_one_out, siblings=8), True),
    *(
        row("segments of 2 tokens", f"Monte Carlo, K = {k}", segments(by_two, k), True)
        for k in (1, 4, 9)
    ),
    row("segments of 2 tokens", "exact", segments(by_two, None), True),
    *(
        row("segments cut where p < .3", f"Monte Carlo, K = {k}", segments(at_doubt, k), False)
        for k in (1, 4, 9)
    ),
    row("segments cut where p < .3", "exact", segments(at_doubt, None), False),
    *(
        row(
            "cut at every second p < .9",
            f"Monte Carlo, K = {k}",
            segments(as_spo_chain, k),
            False,
        )
        for k in (1, 4, 9)
    ),
    row("cut at every second p < .9", "exact", segments(as_spo_chain, None), False),
    row(
        "the same, p < .9 trained",
        "Monte Carlo, K = 9",
        segments(as_spo_chain, 9, below_certain),
        False,
    ),
    row("the same, p < .9 trained", "exact", segments(as_spo_chain, None, below_certain), False),
    row("stale: GAE, λ = 1", "exact", gae("exact", 1.0), False, stale=True),
    row("stale: V-trace, bounds 1", "exact", corrected("exact", 1.0), False, stale=True),
    row("stale: V-trace, bounds 1", "wrong", corrected("wrong", 1.0), False, stale=True),
    row("stale: V-trace, no bounds", "exact", corrected("exact", torch.inf), LOCAL, stale=True),
    row("stale: V-trace, no bounds", "wrong", corrected("wrong", torch.inf), LOCAL, stale=True),
)
every_row = pytest.mark.parametrize("row", ROWS, ids=[f"{r.name}; {r.values}" for r in ROWS])


@cache
def quality(row: Row) -> Quality:
    return judge(row.estimator, row.places)


@every_row
def test_who_is_biased(row):
    bias = quality(row).bias
    assert bias < 1e-9 if row.advantage_exact else bias > 1e-3


@every_row
def test_whose_gradient_points_elsewhere(row):
    angle = quality(row).angle
    assert angle < 1e-4 if row.direction_exact else angle > 0.1


def test_an_exact_critic_and_lambda_zero_leave_no_noise_but_the_choice_itself():
    assert quality(ROWS[0]).noise < 1e-7
    assert quality(ROWS[0]).gradient_noise > 1


def of(name: str, values: str) -> Quality:
    return next(quality(row) for row in ROWS if (row.name, row.values) == (name, values))


@pytest.mark.parametrize("kind", ["exact", "wrong"])
def test_noise_grows_with_lambda_and_the_bias_of_a_wrong_critic_falls(kind):
    lams = [of(f"GAE, λ = {lam}", kind) for lam in ("0", "0.5", "0.95", "1")]
    for lower, higher in itertools.pairwise(lams):
        assert lower.noise < higher.noise
        assert higher.bias < lower.bias or kind == "exact"


@pytest.mark.parametrize("size", [4, 8])
def test_the_group_mean_is_short_by_one_part_in_g_and_no_noisier_for_it(size):
    mean, rest = of(f"group mean, G = {size}", "-"), of(f"leave-one-out, G = {size}", "-")
    assert mean.gradient_error == pytest.approx(1 / size)
    assert mean.noise == pytest.approx(rest.noise * (size - 1) / size)
    assert mean.gradient_noise == pytest.approx(rest.gradient_noise)


def test_noise_of_monte_carlo_values_falls_as_one_over_their_number():
    exact = of("segments of 2 tokens", "exact").noise ** 2
    one, four, nine = (
        of("segments of 2 tokens", f"Monte Carlo, K = {k}").noise ** 2 - exact for k in (1, 4, 9)
    )
    assert one == pytest.approx(4 * four)
    assert one == pytest.approx(9 * nine)


def distance(place: Place, said: Said, samples: Tensor, siblings: int) -> tuple[float, float]:
    """Of the sampled from the listed: of the variance, in standard errors; of the mean, in the
    squared length that n samples leave on average. `samples` are means over siblings, [n, logits].
    """
    expected, spread = expected_gradient(place, said), gradient_variance(place, said)
    squares = siblings * (samples - samples.mean(dim=0)).square().sum(dim=1)
    standard_error = squares.std() / len(squares) ** 0.5
    off = (samples.mean(dim=0) - expected).square().sum() * siblings * len(samples) / spread
    return float((squares.mean() - spread).abs() / standard_error), float(off)


def test_what_is_listed_is_what_sampling_finds_for_siblings():
    place, random = FRESH[0], torch.Generator().manual_seed(0)
    rows = place.chance.multinomial(4 * 5000, replacement=True, generator=random)
    group = torch.arange(5000).repeat_interleave(4)
    advantages = leave_one_out(place.outcome[rows], group)[:, None]
    of_response = place.scores(torch.ones_like(place.rewards))[rows] * advantages
    samples = of_response.view(5000, 4, -1).mean(dim=1)
    said = compared(leave_one_out, siblings=4)(place)
    variance, mean = distance(place, said, samples, siblings=4)
    assert variance < 4
    assert 0.3 < mean < 2


@pytest.mark.parametrize("samples", [1, 4])
def test_what_is_listed_is_what_sampling_finds_for_monte_carlo_values(samples):
    place, random = FRESH[0], torch.Generator().manual_seed(1)
    rows = place.chance.multinomial(20_000, replacement=True, generator=random)
    chance = place.values[rows].clamp(0, 1)
    tries = torch.rand(samples, *chance.shape, generator=random, dtype=torch.float64) < chance
    advantages = segment_gae(
        place.rewards[rows],
        tries.double().mean(dim=0),
        by_two(place)[rows],
        place.bootstrap[rows],
        gamma=1.0,
        lam=0.0,
    )
    flat = torch.zeros(len(rows), len(place.world.states) * 3, dtype=torch.float64)
    weighed = advantages[..., None] * place.mask[rows][..., None] * place.score[rows]
    index = (3 * place.state[rows])[..., None] + torch.arange(3)
    flat.scatter_add_(1, index.flatten(1), weighed.flatten(1))
    variance, mean = distance(place, segments(by_two, samples)(place), flat, siblings=1)
    assert variance < 4
    assert 0.3 < mean < 2


def test_the_page_shows_what_is_found():
    """To accept a change: python -m tests.core.test_estimator_table."""
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page)


def table() -> str:
    head = (
        "| estimator | values | bias | noise | gradient off by | angle | responses needed "
        "| tokens a response | tokens needed |",
        "|---|---|---|---|---|---|---|---|---|",
    )
    lines = []
    for row in ROWS:
        q = quality(row)
        cells = (
            row.name,
            row.values,
            _short(q.bias),
            f"{q.noise:.3f}",
            _short(q.gradient_error),
            f"{q.angle:.1f}°",
            f"{q.gradient_noise:.1f}",
            f"{q.tokens:.1f}",
            f"{q.tokens_needed:.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*head, *lines])


def with_table(page: str) -> str:
    """The page, its table replaced."""
    return re.sub(r"(?m)^\| estimator .*\n(\|.*\n)*", lambda _: table() + "\n", page, count=1)


def _short(x: float) -> str:
    return "0" if x < 1e-9 else f"{x:.3f}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
