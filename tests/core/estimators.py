"""Exact bias, noise and cost of an advantage estimator, in two worlds where everything is known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from types import SimpleNamespace

import torch
from torch import Tensor

from .exact_world import ExactWorld

SYMBOLS, HORIZON, STOP = 3, 6, 0
TWOS_NEEDED = (2, 4)  # two prompts: an easy one and a hard one


def succeeds(needed: int) -> Callable[[tuple[int, ...]], float]:
    def reward(tokens: tuple[int, ...]) -> float:
        finished = len(tokens) == HORIZON or tokens[-1] == STOP
        return float(finished and tokens.count(2) >= needed)

    return reward


class Place:
    """One prompt: the policy's world, the sampler's, and every response with what is known of it."""

    def __init__(self, prompt: int, *, staleness: float = 0.0) -> None:
        random = torch.Generator().manual_seed(prompt)
        states = sum((SYMBOLS - 1) ** depth for depth in range(HORIZON))
        shape = states, SYMBOLS
        logits = torch.randn(shape, generator=random, dtype=torch.float64)
        logits[:, STOP] -= 1.5  # so that most responses are long
        moved = logits + staleness * torch.randn(shape, generator=random, dtype=torch.float64)
        kind = {"symbols": SYMBOLS, "horizon": HORIZON, "stop": STOP}
        self.world = ExactWorld(**kind, reward=succeeds(TWOS_NEEDED[prompt]), logits=logits)
        sampler = ExactWorld(**kind, reward=succeeds(TWOS_NEEDED[prompt]), logits=moved)
        tokens_left = ExactWorld(**kind, reward=lambda tokens: 1.0, logits=logits)

        every: SimpleNamespace = self.world.responses()
        self.mask, self.rewards = every.mask, every.rewards
        self.values, self.bootstrap = every.values, every.bootstrap
        self.logprobs = every.logprobs.detach()
        self.sampler_logprobs = sampler.responses().logprobs.detach()
        self.chance = self.sampler_logprobs.sum(dim=1).exp()
        self.tokens_left = tokens_left.responses().values
        self.state = torch.where(self.mask, every.decision // SYMBOLS, 0)
        self.decision = every.decision.clamp(min=0)
        self.ratio = (self.logprobs - self.sampler_logprobs).exp()
        self.outcome = self.rewards.sum(dim=1)
        self.success = float((self.chance * self.outcome).sum())
        self.exact = self._per_decision(self.ratio * every.advantages)
        # ∇ log π(a_t|s_t) over the logits: one row of one-hot minus probabilities
        actions = torch.nn.functional.one_hot(self.decision % SYMBOLS, SYMBOLS)
        self.score = actions - logits.softmax(dim=1)[self.state]
        truth = (every.logprobs.sum(dim=1).exp() * every.rewards.sum(dim=1)).sum()
        self.gradient = self.world.gradient(truth).flatten()

    def per_decision(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E[x_t | s_t, a_t] and how often each decision is met, [states · symbols]."""
        weight = (self.chance[:, None] * self.mask).flatten()
        total = torch.zeros(len(self.world.states) * SYMBOLS, dtype=torch.float64)
        met = total.index_add(0, self.decision.flatten(), weight)
        return total.index_add(0, self.decision.flatten(), weight * x.flatten()) / met, met

    def _per_decision(self, x: Tensor) -> Tensor:
        return self.per_decision(x)[0]

    def without_baseline(self, x: Tensor) -> Tensor:
        """Take from E[x | s, a] what does not depend on a: no gradient feels it."""
        ratio = self._per_decision(self.ratio).view(-1, SYMBOLS)
        met = self.per_decision(self.ratio)[1].view(-1, SYMBOLS)
        chance = met / met.sum(dim=1, keepdim=True)
        x = x.view(-1, SYMBOLS)
        return (x - ratio * (chance * x).sum(dim=1, keepdim=True)).flatten()

    def scores(self, x: Tensor) -> Tensor:
        """Σ_t x_t ∇ log π(a_t|s_t) of each response, [..., B, logits]."""
        flat = torch.zeros(*x.shape[:-1], len(self.world.states), SYMBOLS, dtype=torch.float64)
        weighed = (x * self.mask)[..., None] * self.score
        index = self.state[..., None].expand(weighed.shape)
        return flat.scatter_add(-2, index, weighed).flatten(-2)


@dataclass(frozen=True, kw_only=True)
class Said:
    """What an estimator says of every response of a place, in each case that may occur.

    Cases are what is random besides the response: rewards of siblings, values by Monte Carlo.
    """

    advantages: Tensor
    """[cases, B, T]"""
    chances: Tensor
    """[cases], adding up to 1"""
    tokens: float
    """Sampled for each response, itself included."""
    siblings: int = 1
    """Responses of the prompt that share the cases, and so are not independent."""
    together: Tensor | None = None
    """E[Â_i Â_j | r_i, r_j] of two siblings, [2, 2], for outcomes 0 and 1."""


Estimator = Callable[[Place], Said]


@dataclass(frozen=True, kw_only=True)
class Quality:
    bias: float
    """Root mean square, over decisions, of E[Â] - A up to a baseline; unit of reward."""
    noise: float
    """Root mean square of Â around its mean at each decision; unit of reward."""
    gradient_error: float
    """|E[gradient] - gradient| / |gradient|"""
    angle: float
    """Between the expected and the true gradient, degrees."""
    gradient_noise: float
    """Responses until the noise of their mean gradient is as large as the gradient."""
    tokens: float
    """Sampled for each response."""

    @property
    def tokens_needed(self) -> float:
        return self.gradient_noise * self.tokens


def judge(estimator: Estimator, places: Sequence[Place]) -> Quality:
    """Everything by enumeration; prompts weigh the same."""
    squared_bias, variance, error, dot, length, truth, spread, tokens = [0.0] * 8
    for place in places:
        said = estimator(place)
        mean = (said.chances[:, None, None] * said.advantages).sum(dim=0)
        square = (said.chances[:, None, None] * said.advantages.square()).sum(dim=0)
        expected, met = place.per_decision(mean)
        share = met / met.sum() / len(places)
        away = place.without_baseline(expected) - place.exact
        squared_bias += float((share * away.square()).sum())
        variance += float((share * (place.per_decision(square)[0] - expected.square())).sum())

        gradient = expected_gradient(place, said)
        error += float((gradient - place.gradient).square().sum())
        dot += float(gradient @ place.gradient)
        length += float(gradient @ gradient)
        truth += float(place.gradient @ place.gradient)
        spread += gradient_variance(place, said)
        tokens += said.tokens / len(places)
    cosine = dot / (length * truth) ** 0.5
    return Quality(
        bias=squared_bias**0.5,
        noise=max(variance, 0.0) ** 0.5,
        gradient_error=(error / truth) ** 0.5,
        angle=float(torch.tensor(min(cosine, 1.0), dtype=torch.float64).arccos().rad2deg()),
        gradient_noise=spread / length,
        tokens=tokens,
    )


def expected_gradient(place: Place, said: Said) -> Tensor:
    """E[Σ_t Â_t ∇ log π(a_t|s_t)]."""
    mean = (said.chances[:, None, None] * said.advantages).sum(dim=0)
    return place.chance @ place.scores(mean)


def gradient_variance(place: Place, said: Said) -> float:
    """n · Var[mean gradient of n siblings]: of one response, if each is on its own."""
    square = torch.zeros((), dtype=torch.float64)
    for chance, advantages in zip(said.chances, said.advantages, strict=True):
        square += chance * (place.chance @ place.scores(advantages).square().sum(dim=1))
    gradient = expected_gradient(place, said)
    pairs = 0.0
    if said.together is not None:
        ones = place.scores(torch.ones_like(place.rewards))
        parts = torch.stack([(place.chance * (place.outcome == r)) @ ones for r in (0.0, 1.0)])
        pairs = float((said.together * (parts @ parts.T)).sum())
    n = said.siblings
    return float(square) + (n - 1) * pairs - n * float(gradient @ gradient)


def binomial(n: int, p: float) -> Tensor:
    """Chances of 0 ... n successes."""
    return torch.tensor(
        [comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)], dtype=torch.float64
    )
