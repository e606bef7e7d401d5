"""Value heads that predict how likely each return is: a softmax over atoms, its mean the value.

They differ in the distribution they are taught. As long as rewards come at the end and lam = 1, the
return is known when the critic learns, and its distribution from a state is what many responses
show together: the mean of the targets' means, hence the value, is unbiased for each of them.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmac.core.distributions import (
    bin_centers,
    bin_edges,
    expectation,
    gaussian_density,
    gaussian_mass,
    lambda_distributions,
    open_with_mean,
    two_hot,
)
from llmac.core.value_heads import OUTSIDE, Learned, Lesson, inside
from llmac.core.value_losses import cross_entropy


@dataclass(frozen=True, slots=True, kw_only=True)
class HLGauss:
    """A normal distribution around the return, cut into bins: "stop regressing".

        l = -Σ_k q_k · log softmax(z)_k,    q = `gaussian_mass` or `gaussian_density`

    The defaults are HL-Gauss PPO's for rewards in [0, 1] (arXiv:2608.02181): a margin of a tenth on
    either side, because near the end of a support the mean of q is not the return.
    """

    kind: ClassVar[str] = "hl_gauss"
    foretells: ClassVar[tuple[str, ...]] = ("low", "high", "bins")

    low: float = -0.1
    high: float = 1.1
    bins: int = 101
    sigma: float = 0.024
    """Unit of reward."""
    target: Literal["cdf", "density"] = "cdf"

    @property
    def outputs(self) -> int:
        """A logit a bin."""
        return self.bins

    def decode(self, raw: Float[Tensor, "*shape K"]) -> Float[Tensor, "*shape"]:
        """Mean over the bins' centres."""
        return expectation(raw, bin_centers(self.low, self.high, self.bins))

    def start(self, mean: float) -> Float[Tensor, "K"]:
        """Even, as far as the mean allows."""
        return open_with_mean(mean, bin_centers(self.low, self.high, self.bins))

    def distribution(self, returns: Float[Tensor, "B T"]) -> Float[Tensor, "B T K"]:
        """q, for returns inside the support."""
        if self.target == "density":
            centers = bin_centers(self.low, self.high, self.bins)
            return gaussian_density(returns, centers, sigma=self.sigma)
        return gaussian_mass(returns, bin_edges(self.low, self.high, self.bins), sigma=self.sigma)

    def learn(self, raw: Float[Tensor, "B S K"], lesson: Lesson) -> Learned:
        """Cross-entropy; at best the entropy of q, about 2.1 nats with the defaults."""
        returns, outside = inside(lesson.returns, self.low, self.high)
        loss = cross_entropy(raw[:, :-1], self.distribution(returns))
        return Learned(per_token=loss, shares={OUTSIDE: outside})


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoHot:
    """The two atoms around the return, weighted so that their mean is the return: no bias, no smoothing."""

    kind: ClassVar[str] = "two_hot"
    foretells: ClassVar[tuple[str, ...]] = ("low", "high", "bins")

    low: float = 0.0
    high: float = 1.0
    bins: int = 101
    """Atoms, ends included."""

    @property
    def outputs(self) -> int:
        """A logit an atom."""
        return self.bins

    @property
    def atoms(self) -> Float[Tensor, "K"]:
        """Evenly from end to end."""
        return torch.linspace(self.low, self.high, self.bins)

    def decode(self, raw: Float[Tensor, "*shape K"]) -> Float[Tensor, "*shape"]:
        """Mean over the atoms."""
        return expectation(raw, self.atoms)

    def start(self, mean: float) -> Float[Tensor, "K"]:
        """Even, as far as the mean allows."""
        return open_with_mean(mean, self.atoms)

    def learn(self, raw: Float[Tensor, "B S K"], lesson: Lesson) -> Learned:
        """Cross-entropy."""
        return learn_nearest(raw, lesson, self.atoms)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeClasses:
    """How likely each outcome is, each worth a known reward: CodeRL's four test outcomes, say.

        V = Σ_k p_k · r_k

    CodeRL (Le et al. 2022, arXiv:2207.01780) classifies whole programs by the largest logit over
    their tokens; here each state has a loss of its own, so that each has a value. A return between
    two rewards, as lam < 1 makes them, counts as a mixture of both.
    """

    kind: ClassVar[str] = "outcome_classes"
    foretells: ClassVar[tuple[str, ...]] = ("rewards",)

    rewards: tuple[float, ...] = (-1.0, -0.6, -0.3, 1.0)
    """Of the classes, ascending: does not compile, crashes, fails a test, passes."""

    @property
    def outputs(self) -> int:
        """A logit a class."""
        return len(self.rewards)

    def decode(self, raw: Float[Tensor, "*shape K"]) -> Float[Tensor, "*shape"]:
        """Mean over the classes' rewards."""
        return expectation(raw, torch.tensor(self.rewards))

    def start(self, mean: float) -> Float[Tensor, "K"]:
        """Even, as far as the mean allows."""
        return open_with_mean(mean, torch.tensor(self.rewards))

    def learn(self, raw: Float[Tensor, "B S K"], lesson: Lesson) -> Learned:
        """Cross-entropy."""
        return learn_nearest(raw, lesson, torch.tensor(self.rewards))


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledOutcomes(OutcomeClasses):
    """Outcomes of whole responses: one class by the largest logit over the tokens, as CodeRL has it.

        E_t = max_{j<=t} e_j        l_t = -log softmax(E_t)_u

    e_t are the outputs after token t was read, u is the class with the reward nearest to the return.
    Taught at the last token only, as card `coderl` teaches, the loss is CodeRL's (Le et al. 2022,
    arXiv:2207.01780), for the maximum runs over what has been read, and never over padding. What a
    single e_t says is then no calibrated chance, but how much its token speaks for each outcome.
    """

    kind: ClassVar[str] = "pooled_outcomes"

    def learn(self, raw: Float[Tensor, "B S K"], lesson: Lesson) -> Learned:
        """Cross-entropy of the pooled outputs."""
        _, outside = inside(lesson.returns, self.rewards[0], self.rewards[-1])
        pooled = raw[:, 1:].cummax(dim=1).values.log_softmax(dim=-1)
        wanted = nearest_class(lesson.returns, self.rewards)
        loss = -pooled.gather(-1, wanted[..., None]).squeeze(-1)
        return Learned(per_token=loss, shares={OUTSIDE: outside})


@dataclass(frozen=True, slots=True, kw_only=True)
class C51(TwoHot):
    """The distribution of the return by bootstrapping, `lambda_distributions`, from what the head itself says.

    Learns from the scored rewards and not from the algorithm's returns, whose mean is all they have:
    a KL penalty in the rewards is not seen. Discount and what stands behind a cut response are the
    algorithm's.
    """

    kind: ClassVar[str] = "c51"

    bins: int = 51
    """Atoms, ends included."""
    lam: float = 0.95

    def learn(self, raw: Float[Tensor, "B S K"], lesson: Lesson) -> Learned:
        """Cross-entropy."""
        _, outside = inside(lesson.returns, self.low, self.high)
        wanted = lambda_distributions(
            raw.detach().softmax(dim=-1),
            lesson.rewards,
            lesson.mask,
            lesson.bootstraps,
            self.atoms,
            gamma=lesson.gamma,
            lam=self.lam,
        )
        return Learned(per_token=cross_entropy(raw[:, :-1], wanted), shares={OUTSIDE: outside})


def nearest_class(
    returns: Float[Tensor, "*shape"], rewards: tuple[float, ...]
) -> Int[Tensor, "*shape"]:
    """Index of the class whose reward is nearest; of two equally near ones, the worse.

    Args:
        returns: unit of reward.
        rewards: of the classes, ascending.

    >>> nearest_class(torch.tensor([-.5, .9, 7.]), (-1., -.6, -.3, 1.))
    tensor([1, 3, 3])
    """
    classes = torch.tensor(rewards, dtype=returns.dtype, device=returns.device)
    return (returns[..., None] - classes).abs().argmin(dim=-1)


def learn_nearest(
    raw: Float[Tensor, "B S K"], lesson: Lesson, atoms: Float[Tensor, "K"]
) -> Learned:
    """Cross-entropy towards `two_hot` of the returns."""
    returns, outside = inside(lesson.returns, float(atoms[0]), float(atoms[-1]))
    loss = cross_entropy(raw[:, :-1], two_hot(returns, atoms))
    return Learned(per_token=loss, shares={OUTSIDE: outside})
