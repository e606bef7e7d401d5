"""Supervised fine-tuning as a card: the policy is shown what to say instead of trying.

Behaviour cloning by maximum likelihood (Pomerleau 1991); for language models the first stage of
InstructGPT, arXiv:2203.02155. With stored responses, of which only good ones are kept, it is
rejection-sampling fine-tuning (RFT, arXiv:2308.01825; one iteration of ReST-EM, arXiv:2312.06585).
Needs: completions in the data, or a file of stored rollouts. No critic.
"""

import math
from dataclasses import dataclass

import torch

from llmac.core.demonstrations import Demonstrations
from llmac.core.diagnostics import sampler_gap
from llmac.core.measures import Metrics
from llmac.core.protocols import RolloutPlan, SamplingParams
from llmac.core.stored import Stored
from llmac.core.types import AllSum, Credit, Rollouts, Values, identity

from .base import newly_sampled
from .likelihood import LikelihoodPolicy


@dataclass(frozen=True, kw_only=True)
class SFT(LikelihoodPolicy):
    """Supervised fine-tuning: mean -log π over the tokens of given completions.

        loss = - (1/N) Σ_it log π_θ(a_it | s_it)          N tokens of completions in the minibatch

    Tokens of prompts do not count. The loss is `actor/pg_loss`, nats a token: the cross-entropy of
    a library that masks the prompt, at `rollout.temperature` 1.

    Nothing is sampled and nothing is scored: `reward` of the recipe is asked by the evaluation only,
    and the training data need not have its columns. A completion stands in a column of the data,
    as text or as one message of the assistant, or is the last message of a chat. It may have
    `rollout.max_new_tokens` tokens; a longer one is an error, or left out with `data.on_too_long:
    skip`. With `rollouts` stored responses are learned from instead, whatever policy sampled them.
    """

    group_size: int = 1
    """A prompt has one completion; stored responses have the groups they have."""
    completion_column: str = "completion"
    """Column of the data with what to say after the prompt. TRL's name for it."""
    append_end: bool = True
    """Whether a completion gets the end-of-sequence token it does not end with. False: it is the
    beginning of a longer text. TRL: on."""
    rollouts: str | None = None
    """File of stored responses to learn from, as `llmac rollouts` writes them; None: completions in
    the data."""
    keep_above: float | None = None
    """Only stored responses with a reward above it are learned from; None: all. RFT and ReST-EM
    keep the right ones: .5 where right is 1 and wrong 0."""

    def __post_init__(self) -> None:
        """Refuse what is about responses that were tried, and keys nothing would read."""
        super().__post_init__()
        self._require("completion_column", self.completion_column != "", "the name of a column")
        self._require(
            "rollouts", self.rollouts != "", "the name of a file, or None: completions in the data"
        )
        self._require(
            "keep_above",
            self.keep_above is None or math.isfinite(self.keep_above),
            "None, or finite, in the unit of the rewards",
        )
        self._require(
            "kl_placement", self.kl_placement == "loss", "loss: no reward is learned from"
        )
        self._without_effect("group_size", True, "each completion is there once")
        self._without_effect(
            "mismatch", True, "it weighs the policy term, and there is only the likelihood"
        )
        for name in ("keep_above", "mask_truncated"):
            self._without_effect(name, self.rollouts is None, "set rollouts to a file")
        for name in ("completion_column", "append_end"):
            self._without_effect(name, self.rollouts is not None, "set rollouts to None")

    @property
    def keeps_groups(self) -> bool:
        """False: there are no siblings, or those that the file has."""
        return False

    def plan(self, *, prompts_per_step: int, sampling: SamplingParams) -> RolloutPlan:
        """Completions of the data, or stored responses."""
        if self.rollouts is None:
            return Demonstrations(
                column=self.completion_column,
                append_end=self.append_end,
                prompts_per_step=prompts_per_step,
                length_limit=sampling.max_new_tokens,
            )
        return Stored(
            path=self.rollouts,
            prompts_per_step=prompts_per_step,
            length_limit=sampling.max_new_tokens,
            keep_above=self.keep_above,
        )

    def credit(
        self, rollouts: Rollouts, values: Values | None, *, sum_across: AllSum = identity
    ) -> Credit:
        """Likelihood of weight 1 at each token, and no advantage."""
        if values is not None:
            raise ValueError(
                "SFT learns from completions and has no use for a critic's values; remove the critic, "
                "or choose an algorithm with one, for example ppo"
            )
        mask = self.policy_mask(rollouts)
        metrics: Metrics = {}
        if self.rollouts is not None:  # of a completion that nobody sampled there is no sampler
            new = newly_sampled(rollouts)
            metrics = sampler_gap(rollouts.old_logprobs, rollouts.sampler_logprobs, new)
        return Credit(
            advantages=torch.zeros_like(rollouts.rewards),
            policy_mask=mask,
            likelihood=mask.to(rollouts.rewards.dtype),
            metrics=metrics,
        )
