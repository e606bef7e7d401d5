"""What every card is: `Algorithm`, and its reusable halves.

    GroupCredit     who deserves what: siblings of one prompt are each other's baseline
    CriticCredit    who deserves what: a critic says, in `critic_credit.py`
    ClippedPolicy   how the policy moves: PPO's clipped surrogate

A card takes one or both halves and overrides the cell its paper changes.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llmac.core.budgeted import Budgeted
from llmac.core.diagnostics import advantage_by_outcome, sampler_gap
from llmac.core.importance import importance_weights
from llmac.core.kl import kl_estimate, kl_shaped_rewards
from llmac.core.losses import clipped_surrogate, log_ratio
from llmac.core.masking import Aggregation, aggregate, aggregation_weight, masked_var
from llmac.core.measures import Last, Max, Mean, Measure, Metrics
from llmac.core.plans import Flat
from llmac.core.protocols import RolloutPlan, SamplingParams, Stateful
from llmac.core.segments import every_token
from llmac.core.types import AllSum, Credit, CriticTargets, Loss, Rollouts, Values, identity

Mismatch = Literal["off", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """The contract between a card and the loop, with the terms every card shares.

        total = Σ_it [ w_it · surrogate_it + kl_coef · KL_it - entropy_coef · H_it ]

    Σ_it stands for the sum that `aggregation` asks for. w is the sampler-vs-trainer weight
    (`mismatch`); the KL term is here or in the reward (`kl_placement`). Nothing is divided here:
    `policy_loss` returns a sum and its weight, and the learner divides once for the whole
    minibatch.
    """

    default_critic: ClassVar[str | None] = None
    """Registry name of the critic the card needs; None: the card takes no values and refuses
    them."""
    teaches_critic: ClassVar[bool] = True
    """Whether `credit` has targets for a critic whose values it takes; False: that critic stays as
    it is, and nothing reads how it would learn."""

    group_size: int = 8
    """Responses sampled for each prompt. Our choice and TRL's GRPO default."""
    mask_truncated: bool = False
    """Whether responses cut at the length limit stay out of the losses. Their rewards still count
    in group statistics. Overlong filtering of DAPO, arXiv:2503.14476; off in TRL, absent in
    verl."""
    aggregation: Aggregation = "token_mean"
    """How token losses are averaged over the minibatch. token_mean: every token weighs the same
    (verl, TRL, OpenRLHF)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, in nats per token. 0 in verl, TRL and OpenRLHF."""
    kl_coef: float = 0.0
    """Weight β of the KL to the reference policy. 0: no reference model is loaded (TRL GRPO and
    verl default)."""
    kl_estimator: Literal["k1", "k2", "k3", "k3+"] = "k3"
    """Per-token estimate of that KL; k3 is the one of GRPO, arXiv:2402.03300 eq. 4. k3+: k3's
    value, k2's gradient."""
    kl_placement: Literal["loss", "reward"] = "loss"
    """loss: differentiated with the policy; reward: subtracted from the reward of each token,
    before credit."""
    mismatch: Mismatch = "off"
    """Weight the policy term by ρ = π_old/μ, the trainer's over the sampler's probability: per
    token, or the product over the response; truncated to at most `mismatch_high`, or masked to 0
    outside [low, high]. Off in verl; TRL's default is sequence_mask with 3.0."""
    mismatch_low: float | None = None
    """Smallest ρ: a lower truncation, or the lower end of the mask; None: no lower bound (verl,
    TRL)."""
    mismatch_high: float = 2.0
    """Largest ρ. 2.0 in verl, 3.0 in TRL, 5.0 in OpenRLHF."""

    def __post_init__(self) -> None:
        """Refuse values out of range, and keys that would have no effect."""
        self._check_choices()
        self._require("group_size", self.group_size >= 1, "at least 1")
        for name in ("entropy_coef", "kl_coef"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "finite and at least 0")
        self._require("mismatch_high", 0 < self.mismatch_high < math.inf, "finite and above 0")
        low = self.mismatch_low
        self._require(
            "mismatch_low",
            low is None or 0 <= low < self.mismatch_high,
            "None, or in [0, mismatch_high)",
        )
        self._without_effect("kl_estimator", self.kl_coef == 0, "set kl_coef above 0")
        self._without_effect("kl_placement", self.kl_coef == 0, "set kl_coef above 0")
        self._without_effect(
            "mismatch_low", self.mismatch == "off", "set mismatch, for example token_truncate"
        )
        self._without_effect(
            "mismatch_high", self.mismatch == "off", "set mismatch, for example token_truncate"
        )
        self._require(
            "kl_estimator",
            not (self.kl_coef and self.kl_placement == "loss" and self.kl_estimator == "k1"),
            "k2, k3 or k3+ when kl_placement is loss: the expected gradient of k1 is zero",
        )
        self._require(
            "kl_estimator",
            not (self.kl_coef and self.kl_placement == "reward" and self.kl_estimator == "k3+"),
            "k1, k2 or k3 when kl_placement is reward: k3+ differs from k3 only in its gradient",
        )

    @property
    def wanted_critic(self) -> str | None:
        """Registry name of the critic a recipe gets if it names none; None: it may not name one."""
        return self.default_critic

    @property
    def uses_values(self) -> bool:
        """Whether `credit` is given what the critic says."""
        return self.default_critic is not None

    @property
    def keeps_groups(self) -> bool:
        """Whether the `group_size` responses to a prompt are judged in the same step.

        Otherwise siblings are no baseline: a critic that compares them would miss some.
        """
        return True

    @property
    def uses_reference(self) -> bool:
        """Whether `Rollouts.ref_logprobs` must be filled."""
        return self.kl_coef > 0

    @property
    def reads_text(self) -> bool:
        """Whether `segments` looks at text, and is given `decode=`."""
        return False

    @property
    def takes_offered_rows(self) -> bool:
        """Whether responses that a critic sampled on the way may be trained on beside the plan's.

        Such a row begins where the critic was asked, and its own tokens are one segment with values
        at both ends. True only where credit is given row by row: in means over groups or right
        responses, or in what is remembered of rewards, a response would count as often as it was
        continued.
        """
        return False

    @property
    def plan_knows_values(self) -> bool:
        """Whether the card's plan says what both ends of every row are worth (`value_span`)."""
        return False

    @property
    def needs_entropy(self) -> bool:
        """Whether `policy_loss` must be given an entropy that carries a gradient."""
        return self.entropy_coef > 0

    @property
    def refreshes_credit(self) -> bool:
        """Whether credit follows the policy: `refreshed` is called before later optimizer steps."""
        return False

    def refreshed(
        self, credit: Credit, rollouts: Rollouts, logprobs: Float[Tensor, "B T"]
    ) -> Credit:
        """Credit of these rows, whole groups, when their tokens have these log-probabilities."""
        return credit

    def plan(self, *, prompts_per_step: int, sampling: SamplingParams) -> RolloutPlan:
        """How responses are made: `group_size` samples for each of this rank's prompts."""
        return Flat(
            group_size=self.group_size, prompts_per_step=prompts_per_step, sampling=sampling
        )

    def segments(self, rollouts: Rollouts) -> Bool[Tensor, "B T"]:
        """Where V is asked: before every sampled token."""
        return every_token(rollouts.action_mask)

    def memory(self) -> Stateful | None:
        """What the card remembers from step to step; None: nothing.

        Made once a run, saved with it, and given to each `credit` as `memory=`, which may change
        it. Every rank has its own copy, and all must stay equal: what enters goes through
        `sum_across`.
        """
        return None

    def credit(
        self, rollouts: Rollouts, values: Values | None, *, sum_across: AllSum = identity
    ) -> Credit:
        """Who deserves what. Every statistic over the batch goes through `sum_across`.

        Raises:
            ValueError: values are missing, or were given to a card that takes none.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what `credit` is")

    def surrogate(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        advantages: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> tuple[Float[Tensor, "B T"], dict[str, Measure]]:
        """The policy term of each token, to be minimised, and what is worth watching about it."""
        raise NotImplementedError(f"{type(self).__name__} must say what `surrogate` is")

    def policy_term(
        self, logprobs: Float[Tensor, "B T"], rollouts: Rollouts, credit: Credit
    ) -> tuple[Float[Tensor, "B T"], dict[str, Measure]]:
        """`surrogate` of these rows; for cards that need more for it: steps, a reference."""
        mask = credit.policy_mask
        old_logprobs = rollouts.old_logprobs.masked_fill(~mask, 0.0)
        return self.surrogate(logprobs, old_logprobs, credit.advantages, mask)

    def loss_weight(self, rollouts: Rollouts, credit: Credit) -> Float[Tensor, ""]:
        """The weight `policy_loss` will return for these rows, known before any forward pass."""
        return aggregation_weight(credit.policy_mask, self.aggregation)

    def policy_loss(
        self,
        logprobs: Float[Tensor, "B T"],
        rollouts: Rollouts,
        credit: Credit,
        *,
        entropy: Float[Tensor, "B T"] | None = None,
    ) -> Loss:
        """The undivided loss of these rows.

        Args:
            logprobs: log π_θ of the sampled tokens, with gradient; anything, even NaN, outside
                `credit.policy_mask`.
            rollouts: the same rows as collected.
            credit: the same rows of what `credit` returned.
            entropy: of π_θ at each token, nats; with gradient if `needs_entropy`, and only watched
                otherwise.

        Raises:
            ValueError: the entropy bonus is on and no entropy was given.
        """
        mask = credit.policy_mask
        # Replaced before any arithmetic: a NaN at a masked position would survive multiplication by
        # zero in backward.
        logprobs = logprobs.masked_fill(~mask, 0.0)
        old_logprobs = rollouts.old_logprobs.masked_fill(~mask, 0.0)
        per_token, watched = self.policy_term(logprobs, rollouts, credit)
        if credit.importance is not None:
            per_token = per_token * credit.importance
        if credit.likelihood is not None:
            per_token = per_token - credit.likelihood * logprobs
        if credit.kl_weight is not None:
            reference = _reference(self, rollouts).masked_fill(~mask, 0.0)
            per_token = per_token + credit.kl_weight * kl_estimate(logprobs, reference, "k3+")
        total, weight = self._aggregate(per_token, rollouts, mask)

        moved = log_ratio(logprobs, old_logprobs).detach()
        metrics: dict[str, Measure] = {
            "actor/pg_loss": Mean(total.detach(), weight),
            "actor/ppo_kl": mean_over(kl_estimate(old_logprobs, logprobs.detach(), "k3"), mask),
            "actor/ratio_max": Max(
                moved.masked_fill(~mask, -math.inf).exp().max() if mask.numel() else 0.0
            ),
            **watched,
        }
        if self.kl_coef and self.kl_placement == "loss":
            reference = _reference(self, rollouts).masked_fill(~mask, 0.0)
            kl = kl_estimate(logprobs, reference, self.kl_estimator)
            weighed = kl if credit.kl_scale is None else kl * credit.kl_scale
            kl_total, _ = self._aggregate(weighed, rollouts, mask)
            total = total + self.kl_coef * kl_total
            metrics["actor/ref_kl"] = mean_over(kl, mask)
            metrics["actor/kl_loss"] = Mean(kl_total.detach(), weight)
        if entropy is not None:
            entropy = entropy.masked_fill(~mask, 0.0)
            metrics["actor/entropy"] = mean_over(entropy, mask)
        if self.needs_entropy:
            if entropy is None:
                raise ValueError(
                    f"entropy_coef is {self.entropy_coef}, so policy_loss needs the entropy of "
                    "every token and got None; pass entropy=, or set entropy_coef to 0"
                )
            total = total - self.entropy_coef * self._aggregate(entropy, rollouts, mask)[0]
        return Loss(total=total, weight=weight, metrics=metrics)

    def policy_mask(self, rollouts: Rollouts) -> Bool[Tensor, "B T"]:
        """Tokens that enter the policy loss: sampled, and not trained on in another step or row.

        With `mask_truncated`, none of a response that the length limit has cut; a paused one is
        not cut.
        """
        mask = rollouts.action_mask & rollouts.fresh
        if not self.mask_truncated:
            return mask
        cut = rollouts.truncated & ~rollouts.paused
        return mask & ~cut[:, None]

    def shaped_rewards(self, rollouts: Rollouts) -> Float[Tensor, "B T"]:
        """Rewards of each token, minus kl_coef · KL(π_old || π_ref) if that is its place."""
        if not (self.kl_coef and self.kl_placement == "reward"):
            return rollouts.rewards
        return kl_shaped_rewards(
            rollouts.rewards,
            rollouts.old_logprobs,
            _reference(self, rollouts),
            rollouts.action_mask,
            coef=self.kl_coef,
            kind=self.kl_estimator,
        )

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
        """Advantages with what every card adds: mask, sampler-vs-trainer weights, metrics.

        `mask` is what enters the policy loss where a card wants less than its `policy_mask`.
        """
        if mask is None:
            mask = self.policy_mask(rollouts)
        new = newly_sampled(rollouts)
        ended = mask & ~rollouts.paused[:, None]  # what goes on is neither good nor bad yet
        advantages = advantages.masked_fill(~mask, 0.0)
        watched: dict[str, Measure] = {
            "critic/advantages/mean": mean_over(advantages, mask),
            "critic/advantages/std": Last(
                masked_var(advantages, mask, unbiased=False, sum_across=sum_across).sqrt()
            ),
            **sampler_gap(rollouts.old_logprobs, rollouts.sampler_logprobs, new),
            **advantage_by_outcome(advantages, ended, rollouts.rewards.sum(-1)),
            **(metrics or {}),
        }
        importance = None
        if self.mismatch != "off":
            level, kind = self.mismatch.split("_")
            importance = importance_weights(
                rollouts.old_logprobs,
                rollouts.sampler_logprobs,
                self.policy_mask(rollouts),
                level=level,  # type: ignore[arg-type]
                kind=kind,  # type: ignore[arg-type]
                low=self.mismatch_low,
                high=self.mismatch_high,
            )
            watched["actor/mismatch_weight"] = mean_over(importance, mask)
        if self.kl_coef and self.kl_placement == "reward":
            kl = kl_estimate(rollouts.old_logprobs, _reference(self, rollouts), self.kl_estimator)
            watched["actor/ref_kl"] = mean_over(kl, new)
        return Credit(
            advantages=advantages,
            policy_mask=mask,
            importance=importance,
            critic_targets=critic_targets,
            metrics=watched,
        )

    def _aggregate(
        self, per_token: Tensor, rollouts: Rollouts, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        return aggregate(per_token, mask, self.aggregation, horizon=rollouts.length_limit)

    def _refuse_values(self, values: Values | None) -> None:
        if values is not None:
            raise ValueError(
                f"{type(self).__name__} compares rewards and has no use for a critic's values; "
                "remove the critic, or choose an algorithm with one, for example ppo"
            )

    def _require(self, name: str, holds: bool, expectation: str) -> None:
        if not holds:
            raise ValueError(
                f"{name} of {type(self).__name__} must be {expectation}, and it is "
                f"{getattr(self, name)!r}"
            )

    def _without_effect(self, name: str, condition: bool, way_out: str) -> None:
        """A key that nothing would read is a mistake its author wants to hear about."""
        default = next(field.default for field in dataclasses.fields(self) if field.name == name)
        if condition and getattr(self, name) != default:
            raise ValueError(
                f"{name} of {type(self).__name__} is {getattr(self, name)!r} and would have no "
                f"effect; {way_out}, or leave {name} at {default!r}"
            )

    def _check_choices(self) -> None:
        for name, annotation in get_type_hints(type(self)).items():
            if get_origin(annotation) is Literal and getattr(self, name) not in get_args(
                annotation
            ):
                self._require(name, False, "one of " + ", ".join(map(str, get_args(annotation))))


@dataclass(frozen=True, kw_only=True)
class ClippedPolicy(Algorithm):
    """The half that moves the policy: PPO's clipped surrogate.

        max(-Â r, -Â clip(r, 1 - clip_low, 1 + clip_high)),   r = π_θ / π_old

    Schulman et al. 2017, arXiv:1707.06347, eq. 7.
    """

    clip_low: float = 0.2
    """A ratio below 1 - clip_low earns nothing more. 0.2 in the paper, verl, TRL and OpenRLHF."""
    clip_high: float = 0.2
    """A ratio above 1 + clip_high earns nothing more. Above clip_low: DAPO's clip-higher."""
    dual_clip: float | None = None
    """Bound c on the loss where Â < 0: at most c · |Â| (Ye et al. 2020, arXiv:1912.09729). verl:
    always, with 3.0; OpenRLHF and TRL: off."""

    def __post_init__(self) -> None:
        """Refuse an empty or inverted clip range."""
        super().__post_init__()
        self._require(
            "clip_low", self.clip_low >= 0, "at least 0; 1 or more clips nothing from below"
        )
        self._require("clip_high", self.clip_high >= 0, "at least 0; .inf clips nothing from above")
        c = self.dual_clip
        self._require("dual_clip", c is None or 1 < c < math.inf, "None, or above 1")

    def surrogate(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        advantages: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> tuple[Float[Tensor, "B T"], dict[str, Measure]]:
        """Clipped surrogate of each token."""
        ratio = self.ratio(logprobs, old_logprobs, mask)
        per_token, clipped = clipped_surrogate(
            ratio,
            advantages,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
        )
        metrics: dict[str, Measure] = {"actor/pg_clipfrac": mean_over(clipped, mask)}
        if self.dual_clip is not None:
            beyond = (advantages < 0) & (ratio.detach() > math.log(self.dual_clip))
            metrics["actor/pg_clipfrac_lower"] = mean_over(beyond, mask)
        return per_token, metrics

    def ratio(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """The log ratio that is clipped: of each token."""
        return log_ratio(logprobs, old_logprobs)


@dataclass(frozen=True, kw_only=True)
class GroupCredit(Algorithm):
    """The half that needs no critic: siblings of one prompt are compared with each other.

        s_i = Σ_t r_it          Â_it = outcome_advantages(s)_i

    Every token of a response has the response's advantage.
    """

    dynamic_sampling: bool = False
    """Whether groups whose rewards are all equal are dropped, and more prompts drawn until the step
    is full. DAPO, arXiv:2503.14476. Judged by the reward functions' rewards, before KL and length
    shaping."""
    max_sampling_rounds: int = 10
    """Generation rounds after which a step makes do with the groups it has. 10 in verl's DAPO
    recipe."""
    allocation: Literal["equal", "failures", "mixed"] = "equal"
    """How the responses of a step, group_size a prompt on average, are divided: equal; failures:
    the most expected failures that have a successful sibling (reported of V_0, arXiv:2602.03584);
    mixed: the most groups in which rewards differ. Both ask the critic what prompts are worth, as a
    chance between the ends of its `reward_range`."""
    min_responses: int = 2
    """Least responses to a prompt when they are divided. Our choice: the fewest that compare."""
    max_responses: int | None = None
    """Most responses to a prompt when they are divided; None: four times group_size. Our choice:
    without it, failures may give the hardest prompt nearly all."""

    def __post_init__(self) -> None:
        """Refuse groups without siblings, and two ways to deal with prompts that teach nothing."""
        super().__post_init__()
        self._require(
            "group_size",
            self.group_size >= 2,
            "at least 2: a response is compared with its siblings",
        )
        self._require("max_sampling_rounds", self.max_sampling_rounds >= 1, "at least 1")
        self._without_effect(
            "max_sampling_rounds", not self.dynamic_sampling, "set dynamic_sampling to true"
        )
        for name in ("min_responses", "max_responses"):
            self._without_effect(
                name, self.allocation == "equal", "set allocation to failures or mixed"
            )
        self._require(
            "allocation",
            self.allocation == "equal" or not self.dynamic_sampling,
            "equal when dynamic_sampling is true: both deal with prompts that teach nothing",
        )
        self._require(
            "min_responses",
            2 <= self.min_responses <= self.group_size,
            f"at least 2 and at most group_size, {self.group_size}",
        )
        most = self.max_responses
        self._require(
            "max_responses",
            most is None or most >= self.group_size,
            f"None, or at least group_size, {self.group_size}",
        )

    @property
    def wanted_critic(self) -> str | None:
        """None where all groups are equal; else one that says what prompts are worth."""
        return "prompt_value" if self.allocation != "equal" else self.default_critic

    def plan(self, *, prompts_per_step: int, sampling: SamplingParams) -> RolloutPlan:
        """`group_size` samples to each prompt, on average, or to informative ones only."""
        if self.allocation != "equal":
            return Budgeted(
                flat=Flat(
                    group_size=self.group_size, prompts_per_step=prompts_per_step, sampling=sampling
                ),
                utility=self.allocation,
                min_responses=self.min_responses,
                max_responses=self.max_responses or 4 * self.group_size,
            )
        if not self.dynamic_sampling:
            return super().plan(prompts_per_step=prompts_per_step, sampling=sampling)
        return Flat(
            group_size=self.group_size,
            prompts_per_step=prompts_per_step,
            sampling=sampling,
            informative_only=True,
            max_rounds=self.max_sampling_rounds,
        )

    def credit(
        self, rollouts: Rollouts, values: Values | None, *, sum_across: AllSum = identity
    ) -> Credit:
        """The advantage of a response, given to each of its tokens."""
        self._refuse_values(values)
        advantages = self.outcome_advantages(
            self.scores(rollouts), rollouts.group, sum_across=sum_across
        )
        return self.make_credit(
            rollouts, advantages[:, None].expand_as(rollouts.rewards), sum_across=sum_across
        )

    def scores(self, rollouts: Rollouts) -> Float[Tensor, "B"]:
        """What is compared: the sum of each response's (shaped) rewards.

        A response without tokens has no place for its reward in [B, T]; it is taken from its
        trajectory.
        """
        scores = self.shaped_rewards(rollouts).sum(-1)
        empty = ~rollouts.action_mask.any(-1)
        if not empty.any():
            return scores
        outcomes = [
            0.0 if trajectory.reward is None else trajectory.reward
            for trajectory in rollouts.trajectories
        ]
        return torch.where(empty, scores.new_tensor(outcomes), scores)

    def outcome_advantages(
        self, scores: Float[Tensor, "B"], group: Int[Tensor, "B"], *, sum_across: AllSum = identity
    ) -> Float[Tensor, "B"]:
        """Advantage of each response; exactly 0 where all of its group score the same."""
        raise NotImplementedError(f"{type(self).__name__} must say what `outcome_advantages` is")


def mean_over(x: Tensor, mask: Bool[Tensor, "B T"]) -> Mean:
    """The mean of `x` where `mask`, as a metric that adds up over micro-batches and ranks.

    >>> mean_over(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])).value
    2.0
    """
    return Mean(torch.where(mask, x.detach().to(torch.float32), 0.0).sum(), mask.sum())


def newly_sampled(rollouts: Rollouts) -> Bool[Tensor, "B T"]:
    """Tokens sampled in this step, each in one row only: what sampler and trainer are compared on.

    Not those that a row begins with, which are an earlier step's or another row's, nor those of
    replayed rows, whose π_old is what the sampler said.
    """
    return rollouts.action_mask & rollouts.fresh & ~rollouts.replayed[:, None]


def _reference(card: Algorithm, rollouts: Rollouts) -> Tensor:
    if rollouts.ref_logprobs is None:
        raise ValueError(
            f"{type(card).__name__} has a KL term (kl_coef is {card.kl_coef}), and the rollouts carry "
            "no ref_logprobs; annotate them with a reference policy, or switch the term off"
        )
    return rollouts.ref_logprobs
