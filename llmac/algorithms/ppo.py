"""PPO: proximal policy optimization with a learned value model.

Schulman et al. 2017, arXiv:1707.06347. Every token is an action, V(s_t) is asked before each, GAE
(Schulman et al. 2016, arXiv:1506.02438) turns rewards and values into advantages, and the policy
takes clipped steps. For language models: Ziegler et al. 2019, arXiv:1909.08593. Needs: a critic.
`lam` and `critic_lam` apart is decoupled GAE (VC-PPO, arXiv:2503.01491).
"""

from dataclasses import dataclass

from .base import ClippedPolicy
from .critic_credit import CriticCredit


@dataclass(frozen=True, kw_only=True)
class PPO(CriticCredit, ClippedPolicy):
    """PPO: advantages from a learned critic by GAE, clipped policy steps.

        Â_t = Σ_k (γλ)^k δ_{t+k},   δ_t = r_t + γ V(s_{t+1}) - V(s_t)
        l_t = max(-Â_t ρ_t, -Â_t clip(ρ_t, 1 - clip_low, 1 + clip_high))

    Advantages and the critic's targets are those of `CriticCredit`, the loss is `ClippedPolicy`'s.
    With another `segmenter` than every_token a step of these formulas is a segment, whose tokens
    share its advantage; with `critic: {name: monte_carlo}` no critic is learned.
    """
