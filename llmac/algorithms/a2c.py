"""A2C: advantage actor-critic, the policy gradient with a critic's advantage and nothing else.

Mnih et al. 2016, arXiv:1602.01783 (A3C; A2C is its synchronous form). PPO without ratio and clip:
with one epoch of one minibatch the two have the same gradient (Huang et al. 2022,
arXiv:2205.09123). Needs: a critic.
"""

from dataclasses import dataclass

from .critic_credit import CriticCredit
from .score_function import ScoreFunctionPolicy


@dataclass(frozen=True, kw_only=True)
class A2C(CriticCredit, ScoreFunctionPolicy):
    """A2C: REINFORCE with Â from a critic.

        l_t = -Â_t · log π_θ(a_t|s_t)

    The gradient is right for responses the policy itself sampled, so leave `actor.epochs` and
    `actor.minibatches` at 1: nothing here corrects, or stops, a policy that has moved on. Where the
    paper bootstraps after n steps, GAE mixes all n with weights λ^n.
    """

    whiten_advantages: bool = False
    """Whether advantages get mean 0 and variance 1 over the tokens of the whole step. Off in the
    paper: they are in the unit of the rewards."""
