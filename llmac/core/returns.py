"""What follows an action: advantages over segments, returns, and where an outcome reward stands."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def segment_gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    starts: Bool[Tensor, "B T"],
    bootstrap: Float[Tensor, "B"],
    *,
    gamma: float | Float[Tensor, "B T"],
    lam: float | Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """Generalized advantage estimation between the positions where a value is known.

    A segment runs from one start to the next. With k counting segments, R_k the sum of the rewards
    in segment k, V_k the value at its start, and V_{K} = `bootstrap` after the last:

        δ_k = R_k + γ_k · V_{k+1} - V_k
        Â_k = δ_k + γ_k · λ_k · Â_{k+1}

    and every token of the segment gets Â_k. Time passes once a segment: with a start at every token
    this is textbook GAE (Schulman et al. 2016, arXiv:1506.02438, eq. 16); with one start it is
    return minus value; with cut points and λ = 0 it is the segment advantage of VinePPO and SPO.
    The critic's target is Â_k + V_k.

    Args:
        rewards: r_t, arriving after token t. Wherever it stands, it belongs to the segment around
            it.
        values: V(s_t), read before token t; anything where `starts` is False.
        starts: True where a value is known. Starts on injected tokens are ignored.
        bootstrap: V(s_T): 0 for terminated rows.
        gamma: discount a segment; as [B, T], read at the segment's start.
        lam: trace decay a segment; as [B, T], read at the segment's start.
        action_mask: True = sampled by the policy. Injected tokens are skipped: no discount, no
            value, and their rewards flow into the segment around them. None: every token was
            sampled.

    Returns:
        Advantages in the unit of `rewards`, one for each segment, repeated over its tokens; 0
        before the first start and where `action_mask` is False.

    >>> rewards, values = torch.tensor([[0., 0., 1.]]), torch.tensor([[.2, .5, .8]])
    >>> starts = torch.tensor([[True, True, True]])
    >>> segment_gae(rewards, values, starts, torch.zeros(1), gamma=1.0, lam=0.95)
    tensor([[0.7655, 0.4900, 0.2000]])
    """
    if action_mask is not None:
        # Skipped, not zeroed: a zero value here would cut the bootstrap of the token before the
        # tool call.
        starts = starts & action_mask
    width = rewards.shape[1]
    values = values.where(starts, 0.0)
    discount, decay = columns(gamma, rewards), columns(lam, rewards)
    reward, value, start = rewards.unbind(1), values.unbind(1), starts.unbind(1)

    segment_reward, next_value, next_advantage = (
        torch.zeros_like(bootstrap),
        bootstrap,
        torch.zeros_like(bootstrap),
    )
    advantages: list[Tensor] = []
    for t in reversed(range(width)):
        segment_reward = segment_reward + reward[t]
        td_error = segment_reward + discount[t] * next_value - value[t]
        next_advantage = torch.where(
            start[t], td_error + discount[t] * decay[t] * next_advantage, next_advantage
        )
        next_value = torch.where(start[t], value[t], next_value)
        segment_reward = torch.where(start[t], 0.0, segment_reward)
        advantages.append(next_advantage)

    if not advantages:
        return torch.zeros_like(rewards)
    belongs = spread_from_starts(torch.stack(advantages[::-1], dim=1), starts)
    return belongs if action_mask is None else belongs.where(action_mask, 0.0)


def reward_to_go(rewards: Float[Tensor, "B T"], *, gamma: float = 1.0) -> Float[Tensor, "B T"]:
    """Discounted sum of the rewards from each token on.

        G_t = r_t + γ · G_{t+1}

    Time passes at every token, injected ones included; where that is not wanted, use `segment_gae`
    with values 0.

    Args:
        rewards: r_t, arriving after token t; 0 on padding.
        gamma: discount a token.

    Returns:
        Returns in the unit of `rewards`.

    >>> reward_to_go(torch.tensor([[0., 1., 1.]]), gamma=0.5)
    tensor([[0.7500, 1.5000, 1.0000]])
    """
    following = torch.zeros_like(rewards[:, 0]) if rewards.shape[1] else rewards.new_zeros(0)
    returns: list[Tensor] = []
    for reward in reversed(rewards.unbind(1)):
        following = reward + gamma * following
        returns.append(following)
    return torch.stack(returns[::-1], dim=1) if returns else torch.zeros_like(rewards)


def place_outcome_rewards(
    outcomes: Float[Tensor, "B"], action_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Put each response's outcome on its last action token, the last decision that could earn it.

    On a later injected token the reward would be lost to any estimator that looks at action tokens
    only.

    Args:
        outcomes: outcome reward of each response.
        action_mask: True = sampled by the policy.

    Returns:
        Per-token rewards; a row without action tokens has none.

    >>> action_mask = torch.tensor([[True, True, False], [False, False, False]])
    >>> place_outcome_rewards(torch.tensor([1., 2.]), action_mask)
    tensor([[0., 1., 0.],
            [0., 0., 0.]])
    """
    remaining = action_mask.int().flip(1).cumsum(1).flip(1)
    last = action_mask & (remaining == 1)
    return outcomes[:, None] * last


def columns(
    rate: float | Float[Tensor, "B T"], like: Float[Tensor, "B T"]
) -> Sequence[float | Float[Tensor, "B"]]:
    """A rate as one entry for each token position, be it one number or one a token.

    >>> columns(0.5, torch.zeros(1, 2))
    [0.5, 0.5]
    """
    return rate.to(like.dtype).unbind(1) if isinstance(rate, Tensor) else [rate] * like.shape[1]


def spread_from_starts(
    x: Float[Tensor, "B T"], starts: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Give every token what stands at the start of its segment.

    Args:
        x: anything where `starts` is False.
        starts: True begins a segment.

    Returns:
        x at the last start at or before each token; 0 before the first.

    >>> spread_from_starts(torch.tensor([[1., 2., 3.]]), torch.tensor([[False, True, False]]))
    tensor([[0., 2., 2.]])
    """
    position = torch.arange(x.shape[1], device=x.device).expand_as(x)
    source = position.where(starts, -1).cummax(dim=1).values
    return x.gather(1, source.clamp(min=0)).where(source >= 0, 0.0)
