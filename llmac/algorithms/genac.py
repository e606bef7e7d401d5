"""GenAC: PPO whose critic thinks before it says a value (Shan et al. 2026, arXiv:2604.10701).

A language model reads the problem and the unfinished response, writes an analysis and then a score;
the advantage of a segment is the outcome less the score before it, and, with λ below 1, in part
what the segment changed in the score. Needs: a critic that writes
(`critic: {name: generative}`), trained to write by `sft` first. Its three stages are recipes:
`math_genac_sft`, `math_genac_critic`, `math_genac`. We know of the paper its idea, its stages and
what its public re-implementation (open-instruct) says of it; the fields say which is which.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.masking import masked_mean
from llmac.core.types import AllSum

from .ppo import PPO
from .segmented import Segmenter


@dataclass(frozen=True, kw_only=True)
class GenAC(PPO):
    """GenAC: a generative critic says V before each segment, PPO does the rest.

        Â_t = z - V(s_b) - mean          b: where the segment of t begins; z: outcome of the response
        l_t = max(-Â_t ρ_t, -Â_t clip(ρ_t, 1 - clip_low, 1 + clip_high))

    The mean is over all tokens of the step, and nothing is divided by a deviation. A segment ends
    with a token that the policy was in doubt about, and V is asked before it begins, so that no
    baseline has seen the decision it is compared with. γ = λ = 1; below, a segment is one step:
    Â_k = V_{k+1} - V_k + λ Â_{k+1}. No KL, no entropy bonus, one epoch.

    The critic learns outcomes z. With `run.critic_warmup_steps` equal to `run.steps` the policy
    stays as it is and the critic alone learns: the second stage. A KL term belongs in the loss
    here (`kl_placement: loss`): in the reward it is part of what the score is to predict, and the
    critic is not told of it.
    """

    default_critic: ClassVar[str | None] = "generative"

    group_size: int = 8
    """Responses sampled for each prompt. 8 in accounts of the paper's runs."""
    segmenter: Segmenter = "after_doubt"
    """Where values are asked. after_doubt: after each token sampled with a probability below
    `cut_below`, as in the re-implementation, which has pieces of 512 tokens (every_n), too; the
    paper's rule is not known to us. delimiter: before each line or sentence."""
    cut_below: float = 0.2
    """Probability below which a token was in doubt. .2 in the re-implementation."""
    max_segments: int | None = 16
    """Most segments of a response, and so most questions to the critic; 16 in the
    re-implementation. None: no bound."""
    critic_lam: float | None = 1.0
    """GAE's λ for the critic's targets. 1: outcomes, which its score is to predict."""
    whiten_advantages: bool = False
    """Whether advantages get mean 0 and variance 1 over the tokens of the whole step. Off: only the
    mean is taken out."""
    center_advantages: bool = True
    """Whether the mean over the tokens of the whole step is taken out of advantages that are not
    whitened. On in the re-implementation."""

    def __post_init__(self) -> None:
        """Refuse to say twice what happens to the mean."""
        super().__post_init__()
        self._without_effect(
            "center_advantages", self.whiten_advantages, "set whiten_advantages to false"
        )

    def scaled(
        self, advantages: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, sum_across: AllSum
    ) -> Float[Tensor, "B T"]:
        """Advantages without their mean over the tokens of the step, whitened, or as they are."""
        if self.whiten_advantages or not self.center_advantages:
            return super().scaled(advantages, mask, sum_across=sum_across)
        return advantages - masked_mean(advantages, mask, sum_across=sum_across)
