"""T-PPO: PPO on responses that are still being sampled.

Truncated Proximal Policy Optimization, 2025, arXiv:2506.15050. A step samples a window of tokens
for each response and trains the policy on them at once, so that no step waits for its longest
response. Until a response ends, extended GAE bootstraps from a value; the critic learns from
finished responses. Made from the abstract and accounts of the paper: what they leave open is a
field with a default of ours. The windows are `core.windowed`. Needs: a critic.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.protocols import RolloutPlan, SamplingParams
from llmac.core.types import Rollouts, Values
from llmac.core.windowed import Windowed

from .ppo import PPO


@dataclass(frozen=True, kw_only=True)
class TPPO(PPO):
    """PPO whose steps hold windows of responses instead of whole ones.

        δ_t = r_t + γ V(s_{t+1}) - V(s_t)
        Â_t = δ_t + γ λ Â_{t+1}                   policy: fresh tokens, of all responses
        G_t = Â_t(critic_lam) + V(s_t)            critic: all tokens, of finished responses

    V after the last token s_l of a paused response is V(s_{l-1}) or the critic's V(s_l), as
    `paused_value` says; of a finished one it is what it is in PPO. Every token is in the policy loss
    of exactly one step, the one it was sampled in: actions are on-policy, only the beginnings of
    responses are those of earlier policies. Its advantage knows nothing of a reward that comes in a
    later window, except through the critic. With a window of the length limit this is PPO.
    """

    critic_lam: float | None = 1.0
    """GAE's λ for the critic's targets; None: the policy's. 1.0: Monte-Carlo returns, which no value
    of an unfinished response can bias."""
    whiten_advantages: bool = False
    """Whether advantages get mean 0 and variance 1 over the fresh tokens of the step. Off, our
    choice: in a step in which few responses end, it makes the critic's noise as large as a reward
    is in the others."""
    window_tokens: int | None = None
    """Most new tokens of a response in a step, up to the length limit of sampling. None: a third of
    that limit, rounded up, at least 2; our choice."""
    paused_value: Literal["assumed", "critic"] = "assumed"
    """V(s_l) of a response that goes on. assumed: V(s_{l-1}), as accounts of the paper describe its
    extended GAE, so the last token of a window has Â = 0 where γ = 1 and nothing is rewarded;
    critic: the critic's own."""

    def __post_init__(self) -> None:
        """Refuse windows from which nothing could be learned."""
        super().__post_init__()
        self._require(
            "window_tokens",
            self.window_tokens is None or self.window_tokens >= 1,
            "None, or at least 1",
        )
        self._require(
            "window_tokens",
            self.window_tokens != 1 or self.paused_value == "critic",
            "at least 2 when paused_value is assumed: nothing is learned from the last token of a "
            "window then",
        )

    @property
    def keeps_groups(self) -> bool:
        """False: siblings end in different steps."""
        return False

    @property
    def takes_offered_rows(self) -> bool:
        """False: continuations are sampled to their end, and again in each step of a response."""
        return False

    def plan(self, *, prompts_per_step: int, sampling: SamplingParams) -> RolloutPlan:
        """A window of tokens for each response, the unfinished carried over.

        Raises:
            ValueError: the window is longer than a response can be.
        """
        limit = sampling.max_new_tokens
        window = self.window_tokens
        if window is None:
            window = min(limit, max(2, -(-limit // 3)))
        if window > limit:
            raise ValueError(
                f"window_tokens of {type(self).__name__} must be at most the length limit of "
                f"sampling, {limit} tokens, and it is {window}; lower it, leave it unset for a "
                "third of the limit, or choose ppo, whose responses are never paused"
            )
        return Windowed(
            window_tokens=window,
            responses_per_step=prompts_per_step * self.group_size,
            sampling=sampling,
            group_size=self.group_size,
        )

    def taught(self, rollouts: Rollouts) -> Bool[Tensor, "B T"]:
        """Tokens of responses that ended, those of earlier windows included.

        GAE runs over whole responses, which gives each of them a target and does not touch the
        advantages of fresh tokens, the last ones.
        """
        without = rollouts.truncated if self.mask_truncated else rollouts.paused
        return rollouts.action_mask & ~without[:, None]

    def bootstrap(self, rollouts: Rollouts, values: Values) -> Float[Tensor, "B"]:
        """V after the last token: PPO's where the response ended, `paused_value` where it goes on."""
        goes_on = values.bootstrap
        if self.paused_value == "assumed":
            starts = values.starts & rollouts.action_mask
            remaining = starts.int().flip(1).cumsum(1).flip(1)
            goes_on = values.at.where(starts & (remaining == 1), 0.0).sum(1)
        return torch.where(rollouts.paused, goes_on, super().bootstrap(rollouts, values))
