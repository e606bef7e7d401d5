"""Credit on two time scales: which sub-goal to choose, when to change it, and what to do for it.

A step is one turn. A segment is the run of steps under one sub-goal; `starts` marks the step at
which it was chosen. HiPER, arXiv:2602.16165, over options: Sutton, Precup and Singh 1999.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.returns import segment_gae, spread_from_starts


def action_advantages(
    rewards: Float[Tensor, "B T"],
    low_values: Float[Tensor, "B T"],
    high_values: Float[Tensor, "B T"],
    starts: Bool[Tensor, "B T"],
    *,
    gamma: float,
    lam: float,
    step_mask: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """GAE of the actions under each sub-goal, which ends where the next sub-goal begins.

        δ_t = r_t + γ · next_t - V_low(s_t, o)
        next_t = V_low(s_{t+1}, o) within the segment, V_high(s_{t+1}) at its end, 0 at the last
        A_low_t = δ_t + γ · λ · A_low_{t+1} within the segment, δ_t at its end

    HiPER, arXiv:2602.16165.

    Args:
        rewards: r_t, arriving after step t.
        low_values: V_low(s_t, o), the value of going on with the sub-goal of step t.
        high_values: V_high(s_t), the value before a sub-goal is chosen; read at starts.
        starts: True at the first step of each sub-goal, the first of the row included.
        gamma: discount a step.
        lam: trace decay a step, within a segment.
        step_mask: True = a step, False = padding after the last; None: all are steps.

    Returns:
        Advantages of the actions; 0 where `step_mask` is False.

    >>> low = torch.tensor([[.3, .5, .55, .7, .8]])
    >>> high, starts = torch.tensor([[.4, 0, .6, 0, 0]]), torch.tensor([[1, 0, 1, 0, 0]]).bool()
    >>> rewards = torch.tensor([[0., 0, 0, 0, 1]])
    >>> action_advantages(rewards, low, high, starts, gamma=0.9, lam=0.95)
    tensor([[0.1842, 0.0400, 0.2433, 0.1910, 0.2000]])
    """
    steps = torch.ones_like(starts) if step_mask is None else step_mask
    _check_starts(starts, steps)
    # A step hands over if the next one is a start: there the next value is V_high, and no trace.
    hands_over = torch.cat([starts[:, 1:] & steps[:, 1:], torch.zeros_like(starts[:, :1])], dim=1)
    difference = torch.cat(
        [(high_values - low_values)[:, 1:], torch.zeros_like(rewards[:, :1])], dim=1
    )
    return segment_gae(
        rewards + (gamma * difference).where(hands_over, 0.0),
        low_values,
        steps,
        torch.zeros_like(rewards[:, 0]),
        gamma=gamma,
        lam=torch.full_like(rewards, lam).masked_fill(hands_over, 0.0),
        action_mask=steps,
    )


def subgoal_advantages(
    rewards: Float[Tensor, "B T"],
    high_values: Float[Tensor, "B T"],
    starts: Bool[Tensor, "B T"],
    *,
    gamma: float,
    lam: float,
    step_mask: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """GAE of the sub-goals, each one decision that lasts as long as its segment.

        R_k = Σ_{t in segment k} γ^(t - b_k) · r_t        g_k = γ^(steps of segment k)
        δ_k = R_k + g_k · V_high(s_{b_{k+1}}) - V_high(s_{b_k})
        A_high_k = δ_k + g_k · λ · A_high_{k+1}

    HiPER, arXiv:2602.16165.

    Args:
        rewards: r_t, arriving after step t.
        high_values: V_high(s_t); read at starts.
        starts: True at the first step of each sub-goal, the first of the row included.
        gamma: discount a step.
        lam: trace decay a sub-goal.
        step_mask: True = a step, False = padding after the last; None: all are steps.

    Returns:
        The advantage of the sub-goal at each of its steps; 0 where `step_mask` is False.

    >>> high, starts = torch.tensor([[.4, 0, .6, 0, 0]]), torch.tensor([[1, 0, 1, 0, 0]]).bool()
    >>> rewards = torch.tensor([[0., 0, 0, 0, 1]])
    >>> subgoal_advantages(rewards, high, starts, gamma=0.9, lam=0.95)
    tensor([[0.2476, 0.2476, 0.2100, 0.2100, 0.2100]])
    """
    steps = torch.ones_like(starts) if step_mask is None else step_mask
    _check_starts(starts, steps)
    starts = starts & steps
    count = steps.cumsum(dim=1)
    elapsed = count - spread_from_starts(count.to(rewards.dtype), starts)  # t - b_k
    segment = starts.cumsum(dim=1)
    lengths = torch.zeros_like(torch.cat([rewards, rewards[:, :1]], dim=1))
    lengths = lengths.scatter_add(1, segment, steps.to(rewards.dtype)).gather(1, segment)
    return segment_gae(
        rewards * gamma**elapsed,
        high_values,
        starts,
        torch.zeros_like(rewards[:, 0]),
        gamma=gamma**lengths,
        lam=lam,
        action_mask=steps,
    )


def switch_advantages(
    switched: Bool[Tensor, "B T"],
    switch_chance: Float[Tensor, "B T"],
    high_values: Float[Tensor, "B T"],
    kept_values: Float[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """What the choice between a new sub-goal and the old one was worth.

        A_switch_t = (q_t - β_t) · (V_high(s_t) - V_low(s_t, o_{t-1}))

    Zero on average over the policy's choices: β · (1 - β) · x + (1 - β) · (-β) · x = 0. HiPER,
    arXiv:2602.16165.

    Args:
        switched: q_t, True where a new sub-goal was chosen.
        switch_chance: β_t, the policy's probability of that.
        high_values: V_high(s_t), of choosing anew.
        kept_values: V_low(s_t, o_{t-1}), of going on with the sub-goal before.

    Returns:
        Advantages of the switch decisions. The first step of a row has no sub-goal before it: leave
        its entry out of the loss.

    >>> chance, high, kept = torch.tensor([[.7]]), torch.tensor([[.6]]), torch.tensor([[.45]])
    >>> switch_advantages(torch.tensor([[True]]), chance, high, kept)
    tensor([[0.0450]])
    """
    return (switched.to(switch_chance.dtype) - switch_chance) * (high_values - kept_values)


def _check_starts(starts: Tensor, steps: Tensor) -> None:
    first = steps & (steps.cumsum(dim=1) == 1)
    orphans = (first & ~starts).any(dim=1)
    if orphans.any():
        raise ValueError(
            "starts must be True at the first step of each row, since every step has a sub-goal; "
            f"row {int(orphans.nonzero()[0])} begins without one"
        )
