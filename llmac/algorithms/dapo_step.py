"""Direct Advantage Policy Optimization (arXiv:2412.18279): offline, step by step, a frozen critic.

Not the DAPO of arXiv:2503.14476, which is `dapo`. A critic that was fitted beforehand says what
each reasoning step was worth, and the policy's log-ratio to the reference is regressed on that.
Needs: a reference policy, and a critic fitted to outcomes before this run (`llmac value-pretrain`,
then `critic: {name: value_head, init: <its folder>}`): a fresh one says the same everywhere, so
that only the last step has an advantage, the outcome minus that constant.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llmac.core.diagnostics import explained_variance
from llmac.core.kl import kl_estimate
from llmac.core.losses import log_ratio
from llmac.core.masking import aggregate, aggregation_weight
from llmac.core.measures import Last, Measure
from llmac.core.plans import Flat
from llmac.core.protocols import RolloutPlan, SamplingParams
from llmac.core.returns import segment_gae
from llmac.core.segments import after_ends, every_n
from llmac.core.stored import Stored
from llmac.core.types import AllSum, Credit, Rollouts, Values, identity

from .base import Algorithm, mean_over


@dataclass(frozen=True, kw_only=True)
class DAPOStep(Algorithm):
    """Direct Advantage: the log-ratio of each step is pulled to its advantage over β.

        A(s, a) = r + V(s + a) - V(s)                          V = 0 after the last step
        loss = ½ (clamp(Σ_step (log π_θ - log π_ref), ±c) - A / β)²

    averaged over steps. At π_θ = π_ref its gradient is the policy gradient's over β, and beyond it
    the log-ratio stops where A / β is. The minimiser is the exponential tilt π_ref · exp(A/β) / Z
    only where E_ref[exp(A/β)] = 1; elsewhere it is a compromise, unless `normalize`.

    The critic gets no targets: it stays as it is. With `rollouts` the run is offline, as in the
    paper; without, responses are sampled each step as usual, which makes each step one iteration of
    the paper's iterative form with the critic and π_ref held fixed. To move π_ref too, start a new
    run from the final model, with a critic fitted to that model's responses.

    `aggregation` counts steps where other cards count tokens, and KL and entropy terms are summed
    over the tokens of a step. How steps are cut, the value of β, the clamp, the normaliser and the
    use of the outcome at the last step are ours: the paper's are not known to us.
    """

    default_critic: ClassVar[str | None] = "value_head"
    teaches_critic: ClassVar[bool] = False

    beta: float = 0.1
    """β, unit of reward a nat: how much better than expected a step must be to become e times as
    likely."""
    log_ratio_clamp: float = 10.0
    """c, nats: beyond it a step has no gradient."""
    normalize: bool = False
    """Whether β · log E_ref[exp(A/β)] is subtracted from the advantage, estimated over the siblings
    that took a step from the same state; where there is no sibling, nothing is."""
    step_token_ids: tuple[int, ...] = ()
    """Ids of the tokens that end a step when sampled: those of a newline, or of a semicolon. None
    given: a step ends after `step_tokens`."""
    step_tokens: int = 16
    """Sampled tokens a step; the last of a response may be shorter."""
    rollouts: str | None = None
    """File of stored responses to learn from, as `llmac rollouts` writes them; None: sample."""

    def __post_init__(self) -> None:
        """Refuse steps that cannot be cut, and keys that nothing would read."""
        super().__post_init__()
        self._require("beta", 0 < self.beta < math.inf, "finite and above 0")
        self._require("log_ratio_clamp", self.log_ratio_clamp > 0, "above 0; .inf clamps nothing")
        self._require("step_tokens", self.step_tokens >= 1, "at least 1")
        self._require(
            "step_token_ids", all(i >= 0 for i in self.step_token_ids), "ids of tokens, from 0 on"
        )
        self._require(
            "rollouts", self.rollouts != "", "the name of a file, or None: sample responses"
        )
        self._without_effect(
            "step_tokens", len(self.step_token_ids) > 0, "leave step_token_ids empty"
        )
        self._without_effect(
            "group_size", self.rollouts is not None, "stored responses have the groups they have"
        )

    @property
    def keeps_groups(self) -> bool:
        """Where responses are sampled; stored ones have the siblings that their file has."""
        return self.rollouts is None

    @property
    def uses_reference(self) -> bool:
        """Always: the log-ratio to it is what learns."""
        return True

    def plan(self, *, prompts_per_step: int, sampling: SamplingParams) -> RolloutPlan:
        """Stored responses, or new ones."""
        if self.rollouts is None:
            return Flat(
                group_size=self.group_size, prompts_per_step=prompts_per_step, sampling=sampling
            )
        return Stored(
            path=self.rollouts,
            prompts_per_step=prompts_per_step,
            length_limit=sampling.max_new_tokens,
        )

    def segments(self, rollouts: Rollouts) -> Bool[Tensor, "B T"]:
        """Before every step."""
        if not self.step_token_ids:
            return every_n(rollouts.action_mask, self.step_tokens)
        return after_tokens(rollouts.response_ids, rollouts.action_mask, self.step_token_ids)

    def credit(
        self, rollouts: Rollouts, values: Values | None, *, sum_across: AllSum = identity
    ) -> Credit:
        """What each step changed in the critic's opinion, at each token of the step.

        Raises:
            ValueError: values are missing, or not known before every step.
        """
        if values is None:
            raise ValueError(
                "DAPOStep needs the values of a critic and got none; set critic: {name: "
                "value_head, init: <folder of llmac value-pretrain>}"
            )
        starts = self.segments(rollouts)
        if (starts & ~values.starts).any():
            raise ValueError(
                f"DAPOStep needs a value before each of {int(starts.sum())} steps, and the critic "
                f"gave {int((starts & values.starts).sum())} of them"
            )
        at = values.at.masked_fill(~starts, 0.0)

        def advantages(lam: float) -> Tensor:
            return segment_gae(
                self.shaped_rewards(rollouts),
                at,
                starts,
                torch.zeros_like(values.bootstrap),
                gamma=1.0,
                lam=lam,
                action_mask=rollouts.action_mask,
            )

        of_steps = advantages(0.0)
        if self.normalize:
            of_steps = of_steps - self._excess(rollouts, starts, of_steps)
        outcomes = advantages(1.0) + at
        asked = starts & self.policy_mask(rollouts)
        explained = explained_variance(at, outcomes, asked, sum_across=sum_across)
        return self.make_credit(
            rollouts,
            of_steps,
            sum_across=sum_across,
            metrics={
                "critic/values/mean": mean_over(at, asked),
                "critic/vf_explained_var": Last(explained),
            },
        )

    def policy_term(
        self, logprobs: Float[Tensor, "B T"], rollouts: Rollouts, credit: Credit
    ) -> tuple[Float[Tensor, "B T"], dict[str, Measure]]:
        """Half the squared distance of each step's log-ratio from A/β, shared by its tokens."""
        if rollouts.ref_logprobs is None:
            raise ValueError(
                "DAPOStep learns the log-ratio to a reference, and the rollouts carry no "
                "ref_logprobs; annotate them with a reference policy"
            )
        mask = credit.policy_mask
        number = self._step_of_token(rollouts)
        reference = rollouts.ref_logprobs.masked_fill(~mask, 0.0)
        ratio = _sum_in_steps(log_ratio(logprobs, reference), number, mask)
        size = _sum_in_steps(torch.ones_like(logprobs), number, mask)
        advantage = _sum_in_steps(credit.advantages, number, mask) / size.clamp(min=1)
        c = self.log_ratio_clamp
        error = ratio.clamp(-c, c) - advantage / self.beta
        share = (0.5 * error.square() / size.clamp(min=1)).gather(1, number)
        clamped = (ratio.detach().abs() > c).gather(1, number)
        metrics: dict[str, Measure] = {
            "actor/pg_clipfrac": mean_over(clamped, mask),
            "actor/step_log_ratio": mean_over(ratio, size > 0),
            "actor/step_advantage_over_beta": mean_over(advantage / self.beta, size > 0),
        }
        if not self.kl_coef:
            kl = kl_estimate(logprobs.detach().masked_fill(~mask, 0.0), reference, "k3")
            metrics["actor/ref_kl"] = mean_over(kl, mask)
        return share.where(mask, 0.0), metrics

    def loss_weight(self, rollouts: Rollouts, credit: Credit) -> Float[Tensor, ""]:
        """Steps, or responses if `aggregation` averages those."""
        _, counts = self._steps(rollouts.rewards, rollouts, credit.policy_mask)
        return aggregation_weight(counts, self.aggregation)

    def _aggregate(
        self, per_token: Tensor, rollouts: Rollouts, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        sums, counts = self._steps(per_token, rollouts, mask)
        return aggregate(sums, counts, self.aggregation, horizon=rollouts.length_limit)

    def _steps(
        self, per_token: Tensor, rollouts: Rollouts, mask: Tensor
    ) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
        """Sums over the tokens of each step, in the order of the steps, and which of them count."""
        number = self._step_of_token(rollouts)
        size = _sum_in_steps(torch.ones_like(rollouts.rewards), number, mask)
        return _sum_in_steps(per_token, number, mask), size > 0

    def _step_of_token(self, rollouts: Rollouts) -> Int[Tensor, "B T"]:
        return (self.segments(rollouts).cumsum(dim=1) - 1).clamp(min=0)

    def _excess(
        self,
        rollouts: Rollouts,
        starts: Bool[Tensor, "B T"],
        advantages: Float[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """β · log of the mean of exp(A/β) over steps from the same state; 0 for a step alone."""
        siblings: dict[tuple[int, tuple[int, ...]], list[tuple[int, int]]] = {}
        for place in starts.nonzero().cpu():
            row, t = int(place[0]), int(place[1])
            trajectory = rollouts.trajectories[row]
            state = trajectory.group, trajectory.response_ids[:t]
            siblings.setdefault(state, []).append((row, t))
        excess = torch.zeros_like(advantages)
        for places in siblings.values():
            if len(places) < 2:
                continue
            row, t = torch.tensor(places, device=advantages.device).unbind(1)
            tilts = advantages[row, t] / self.beta
            excess[row, t] = self.beta * (tilts.logsumexp(0) - math.log(len(places)))
        sums = _sum_in_steps(excess, self._step_of_token(rollouts), starts)
        return sums.gather(1, self._step_of_token(rollouts))


def after_tokens(
    response_ids: Int[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    token_ids: tuple[int, ...],
) -> Bool[Tensor, "B T"]:
    """A segment from the first action token, and from each that follows one of the given tokens.

    Only sampled tokens end a segment: one in a tool's output does not.

    Args:
        response_ids: tokens of the responses.
        action_mask: True = sampled by the policy.
        token_ids: which tokens end a segment; each belongs to the segment it ends.

    >>> ids = torch.tensor([[5, 9, 6, 7, 9]])
    >>> after_tokens(ids, torch.ones(1, 5, dtype=torch.bool), (9,))
    tensor([[ True, False,  True, False, False]])
    """
    ends = torch.isin(response_ids, torch.tensor(token_ids, device=response_ids.device))
    return after_ends(ends, action_mask)


def _sum_in_steps(
    x: Float[Tensor, "B T"], number: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Sums over the counted tokens of each step; column k is the k-th step's."""
    return torch.zeros_like(x).scatter_add(1, number, x.where(mask, 0.0))
