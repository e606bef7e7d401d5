"""How SPO moves the policy: where it was in doubt (Segment Policy Optimization, arXiv:2505.23564).

The half that SPO's chain and tree share: which tokens are trained, over what advantages are
whitened, the clipped loss with its guards, and a KL that is summed over each response. Formulas are
those of the authors' code.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.losses import log_ratio
from llmac.core.masking import aggregation_weight, whiten
from llmac.core.measures import Measure, Metrics, Sum
from llmac.core.types import AllSum, Credit, CriticTargets, Rollouts, identity

from .base import ClippedPolicy, mean_over


@dataclass(frozen=True, kw_only=True)
class DoubtfulTokens(ClippedPolicy):
    """The half that trains tokens the policy was in doubt about, and leaves the others alone.

        p_t = π_old(a_t|s_t)
        Â_t = whiten(A_t · [p_t <= train_below])           over tokens with p_t < train_below
        loss = mean over these tokens of the clipped surrogate
             + kl_coef · mean over responses of the sum over these tokens of k3

    A token with p_t = train_below keeps its advantage and is not trained. If no token of the whole
    step was in doubt, all are trained. A card calls `normalized` on its raw advantages and hands
    the result to `make_credit`.

    Where this differs from the authors' code, which does all of it for each micro-batch, so that
    its gradient depends on their size: whitening is over the whole step (`whiten`), "no token in
    doubt" is judged over the whole step, and it is responses that are skipped
    (`skip_ratio_above`), not micro-batches, with their KL kept.
    """

    kl_coef: float = 1e-4
    """Weight β of the KL to the reference policy. 1e-4 in SPO's code; 0: no reference model is
    loaded."""
    kl_aggregation: Literal["sequence_mean_token_sum", "like_policy"] = "sequence_mean_token_sum"
    """How the KL of trained tokens is averaged. sequence_mean_token_sum: summed over each response,
    averaged over all responses of the step (SPO's code); like_policy: as `aggregation` says."""
    train_below: float | None = 0.9
    """Probability from which on a token is not trained: there was nothing to decide. .9 in SPO;
    None: every sampled token is trained."""
    whiten: Literal["step", "rows", "none"] = "step"
    """Over what advantages get mean 0 and variance 1. step: all trained tokens of the step, on all
    ranks; rows: those of `whiten_rows` rows of each rank, which reproduces SPO's code, where it is
    a micro-batch; none: they stay as they are."""
    whiten_rows: int = 8
    """Consecutive rows of each rank that are whitened together, with as many of each other rank. 8:
    the micro-batch of SPO's GSM8K runs."""
    log_ratio_clamp: float = 10.0
    """Log-ratios are clamped to ± this, nats; beyond it a token has no gradient. 10 in SPO's
    code."""
    skip_ratio_above: float | None = 10.0
    """A response whose mean ratio π_θ/π_old is above this adds nothing to the policy term, while
    its tokens still count in the mean. 10 in SPO's code, there for a micro-batch; None: off."""

    def __post_init__(self) -> None:
        """Refuse thresholds out of range, and keys that would have no effect."""
        super().__post_init__()
        below, skip = self.train_below, self.skip_ratio_above
        self._require("train_below", below is None or 0 < below <= 1, "None, or in (0, 1]")
        self._require("whiten_rows", self.whiten_rows >= 1, "at least 1")
        self._require("log_ratio_clamp", self.log_ratio_clamp > 0, "above 0")
        self._require("skip_ratio_above", skip is None or 1 < skip < math.inf, "None, or above 1")
        self._without_effect("whiten_rows", self.whiten != "rows", "set whiten to rows")
        self._without_effect(
            "kl_aggregation",
            self.kl_coef == 0 or self.kl_placement == "reward",
            "set kl_coef above 0 and kl_placement to loss",
        )
        self._require(
            "kl_aggregation",
            self.averages_kl or self.aggregation in ("token_mean", "sequence_mean_token_sum"),
            f"like_policy while aggregation is {self.aggregation}, which weighs the tokens of a "
            "long response less",
        )

    @property
    def averages_kl(self) -> bool:
        """False where the KL is summed over each response: `make_credit` weighs it then."""
        return (
            self.kl_aggregation == "like_policy"
            or self.kl_coef == 0
            or self.kl_placement == "reward"
        )

    def doubtful(self, rollouts: Rollouts) -> Bool[Tensor, "B T"]:
        """Tokens of `policy_mask` that were taken with a probability below `train_below`."""
        mask = self.policy_mask(rollouts)
        if self.train_below is None:
            return mask
        return mask & (rollouts.old_logprobs.exp() < self.train_below)

    def trained(self, rollouts: Rollouts, sum_across: AllSum = identity) -> Bool[Tensor, "B T"]:
        """Doubtful tokens; all of `policy_mask` if no rank has a doubtful one. Collective."""
        doubtful = self.doubtful(rollouts)
        if sum_across(doubtful.sum().double()) == 0:
            return self.policy_mask(rollouts)
        return doubtful

    def normalized(
        self, advantages: Float[Tensor, "B T"], rollouts: Rollouts, sum_across: AllSum = identity
    ) -> Float[Tensor, "B T"]:
        """Advantages without those of near-certain tokens, whitened over what is trained.

        Args:
            advantages: raw, in the unit of the rewards.
            rollouts: the same rows.
            sum_across: sums over ranks; called equally often, with equal shapes, on each.

        Returns:
            Advantages, unitless unless `whiten` is none; 0 where nothing is trained.
        """
        mask = self.trained(rollouts, sum_across)
        if self.train_below is not None:
            certain = rollouts.old_logprobs.exp() > self.train_below
            advantages = advantages.masked_fill(certain, 0.0)
        if self.whiten == "step":
            return whiten(advantages, mask, sum_across=sum_across)
        if self.whiten == "rows":
            return whiten_chunks(advantages, mask, rows=self.whiten_rows, sum_across=sum_across)
        return advantages.where(mask, 0.0)

    def make_credit(
        self,
        rollouts: Rollouts,
        advantages: Float[Tensor, "B T"],
        *,
        sum_across: AllSum,
        critic_targets: CriticTargets | None = None,
        metrics: Metrics | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> Credit:
        """Credit of trained tokens only, and what the KL weighs against the policy term.

        The loss is divided by the trained tokens of a minibatch, so the KL is multiplied by tokens
        a response beforehand, both counted over the whole step on all ranks. With one minibatch a
        step that is the mean over responses exactly; of several, each divides by its share of the
        trained tokens instead of its share of the responses.
        """
        possible = self.policy_mask(rollouts)
        mask = self.trained(rollouts, sum_across) if mask is None else mask
        credit = super().make_credit(
            rollouts,
            advantages,
            sum_across=sum_across,
            critic_targets=critic_targets,
            metrics={"actor/trained_tokens": mean_over(mask, possible), **(metrics or {})},
            mask=mask,
        )
        if self.averages_kl:
            return credit
        policy_weight, responses = sum_across(
            torch.stack(
                [
                    aggregation_weight(mask, self.aggregation).double(),
                    possible.any(dim=1).sum().double(),
                ]
            )
        )
        weight = (policy_weight / responses.clamp(min=1)).to(advantages.dtype)
        return dataclasses.replace(credit, kl_scale=weight * mask)

    def surrogate(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        advantages: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> tuple[Float[Tensor, "B T"], dict[str, Measure]]:
        """Clipped surrogate of each token, 0 in responses that the policy has left far behind."""
        per_token, metrics = super().surrogate(logprobs, old_logprobs, advantages, mask)
        if self.skip_ratio_above is None:
            return per_token, metrics
        ratio = self.ratio(logprobs, old_logprobs, mask).detach().exp().where(mask, 0.0)
        mean = ratio.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        skipped = mean > self.skip_ratio_above
        metrics["actor/skipped_responses"] = Sum(skipped.sum())
        return per_token.masked_fill(skipped[:, None], 0.0), metrics

    def ratio(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """The log ratio of each token, clamped."""
        return log_ratio(logprobs, old_logprobs).clamp(-self.log_ratio_clamp, self.log_ratio_clamp)


def whiten_chunks(
    x: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    rows: int,
    sum_across: AllSum = identity,
) -> Float[Tensor, "B T"]:
    """Zero mean and unit variance within each chunk of rows, pooled with the same chunk elsewhere.

        chunk of row i = i div rows
        y = (x - mean_chunk) / √(var_chunk + 1e-8)                            (unbiased variance)

    Args:
        x: anything where `mask` is False.
        mask: True = counts.
        rows: rows of each rank in a chunk. Ranks may have different numbers of rows.
        sum_across: sums over ranks.

    Returns:
        Whitened elements; 0 where `mask` is False, and for an element alone in its chunk.

    >>> x = torch.tensor([[1., 3.], [10., 30.]])
    >>> whiten_chunks(x, torch.ones(2, 2, dtype=torch.bool), rows=1)
    tensor([[-0.7071,  0.7071],
            [-0.7071,  0.7071]])
    """
    wide = x.double()
    chunk = torch.arange(len(x), device=x.device) // rows
    # As many places on every rank, though another may have more chunks: the sum bounds the largest.
    places = int(sum_across(wide.new_tensor(-(-len(x) // rows))))

    def of_chunks(per_row: Tensor) -> Tensor:
        return sum_across(wide.new_zeros(places).index_add(0, chunk, per_row.to(wide.dtype)))

    count = of_chunks(mask.sum(dim=1))
    mean = of_chunks(wide.where(mask, 0.0).sum(dim=1)) / count.clamp(min=1)
    centred = (wide - mean[chunk][:, None]).where(mask, 0.0)
    variance = of_chunks(centred.square().sum(dim=1)) / (count - 1).clamp(min=1)
    return (centred * torch.rsqrt(variance + 1e-8)[chunk][:, None]).to(x.dtype)
