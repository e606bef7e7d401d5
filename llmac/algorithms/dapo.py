"""DAPO: decoupled clip and dynamic sampling policy optimization (Yu et al. 2025, arXiv:2503.14476).

GRPO with four changes: a higher upper clip (keeps exploring), groups that teach nothing replaced by
others, every token weighing the same, and a soft penalty on answers that come close to the length
limit. No KL. (Not the "Direct Advantage Policy Optimization" of arXiv:2412.18279.)
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from llmac.core.masking import Aggregation
from llmac.core.protocols import RolloutPlan, SamplingParams
from llmac.core.types import Rollouts

from .grpo import GRPO


@dataclass(frozen=True, kw_only=True)
class DAPO(GRPO):
    """DAPO: GRPO with clip-higher, dynamic sampling and a soft penalty on overlong responses.

        s_i = Σ_t r_it + overlong_penalty · clip(-(T_i - (L_max - L_buffer)) / L_buffer, -1, 0)

    T_i is the response's length, L_max the length limit of sampling, tokens.
    """

    group_size: int = 16
    """The paper's."""
    aggregation: Aggregation = "token_mean"
    """The paper's: long responses weigh as much as their tokens."""
    clip_high: float = 0.28
    """The paper's clip-higher; clip_low stays .2."""
    dynamic_sampling: bool = True
    """The paper's: groups whose rewards are all equal are dropped, and more prompts drawn until the
    step is full. Judged by the reward functions' rewards, before length shaping."""
    overlong_buffer_tokens: int | None = None
    """L_buffer: length before the limit over which the penalty grows. 0: no penalty. None: a fifth
    of the limit, the paper's 4096 of 20480."""
    overlong_penalty: float = 1.0
    """Penalty of a response that reaches the limit, in the unit of the rewards; the paper's."""

    def __post_init__(self) -> None:
        """Refuse a negative buffer or penalty, or a penalty nothing would read."""
        super().__post_init__()
        buffer = self.overlong_buffer_tokens
        self._require(
            "overlong_buffer_tokens", buffer is None or buffer >= 0, "None, or at least 0"
        )
        self._require(
            "overlong_penalty", 0 < self.overlong_penalty < float("inf"), "finite and above 0"
        )
        self._without_effect("overlong_penalty", buffer == 0, "set overlong_buffer_tokens above 0")

    def plan(self, *, prompts_per_step: int, sampling: SamplingParams) -> RolloutPlan:
        """Dynamic sampling, under a length limit that leaves room before the buffer."""
        self._buffer_tokens(sampling.max_new_tokens)
        return super().plan(prompts_per_step=prompts_per_step, sampling=sampling)

    def scores(self, rollouts: Rollouts) -> Float[Tensor, "B"]:
        """Outcome plus the penalty for coming close to the length limit."""
        scores = super().scores(rollouts)
        buffer = self._buffer_tokens(rollouts.length_limit)
        if buffer == 0:
            return scores
        lengths = rollouts.action_mask.sum(-1)
        return scores + self.overlong_penalty * overlong_shaping(
            lengths, rollouts.length_limit, buffer
        ).to(scores.dtype)

    def _buffer_tokens(self, length_limit: int) -> int:
        buffer = self.overlong_buffer_tokens
        if buffer is None:
            return max(1, length_limit // 5)
        if buffer >= length_limit:
            raise ValueError(
                f"overlong_buffer_tokens of {type(self).__name__} must be below the length "
                f"limit of sampling, {length_limit} tokens, and it is {buffer}; lower it, or leave "
                "it unset for a fifth of the limit"
            )
        return buffer


def overlong_shaping(lengths: Int[Tensor, "B"], limit: int, buffer: int) -> Float[Tensor, "B"]:
    """How far into the buffer before the limit each response reaches, from 0 to -1.

        clip(-(length - (limit - buffer)) / buffer, -1, 0)

    Floored at -1 as in OpenRLHF and TRL; verl lets it fall further beyond the limit, where no
    response can be.

    Args:
        lengths: sampled tokens of each response.
        limit: L_max, tokens.
        buffer: L_buffer, tokens, above 0.

    >>> overlong_shaping(torch.tensor([16000, 18432, 20480]), 20480, 4096)
    tensor([ 0.0000, -0.5000, -1.0000])
    """
    return ((limit - buffer - lengths) / buffer).clamp(-1.0, 0.0)
