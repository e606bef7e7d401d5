"""VinePPO: PPO whose values are means over continuations (Kazemnejad et al. 2024, arXiv:2410.01679).

Language can be continued from any state, so the value before a reasoning step need not be learned:
sample a few continuations from there and take their mean outcome. Needs: an engine that continues
states (`critic: {name: monte_carlo}`). Only the idea is the paper's for certain: where its numbers
are not known to us, the fields say that the default is ours.
"""

from dataclasses import dataclass
from typing import ClassVar

from .ppo import PPO
from .segmented import Segmenter


@dataclass(frozen=True, kw_only=True)
class VinePPO(PPO):
    """VinePPO: the advantage of a reasoning step is what it changed in the Monte-Carlo value.

        Â_k = R_k + V(after step k) - V(before step k)             V = 0 behind the last token

    and the loss is PPO's. Every token of a step has its advantage. Another critic may take the
    place of continuations, and then learns outcomes: PPO by steps.

    Ours, the paper's being unknown to us: a step is a line, λ = 0 between steps (a λ above mixes
    in later values), whitening over the step's tokens, the critic's number of continuations, and no
    KL. A state in which the response is cut at the length limit is worth 0.
    """

    default_critic: ClassVar[str | None] = "monte_carlo"

    group_size: int = 8
    """Responses sampled for each prompt; ours, as in the other cards that sample several."""
    segmenter: Segmenter = "delimiter"
    """Where values are asked. delimiter: before each reasoning step; every_n: before each piece of
    `segment_tokens` tokens, where answers have no steps."""
    lam: float = 0.0
    """GAE's λ between steps. 0: the values are unbiased, so nothing has to be mixed in against
    their bias."""
    critic_lam: float | None = 1.0
    """GAE's λ for the targets, which `critic/vf_explained_var` compares values with. 1: outcomes;
    continuations learn nothing from them."""
