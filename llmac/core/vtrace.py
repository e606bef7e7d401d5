"""V-trace: values and advantages of the trained policy from responses another one sampled."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.losses import MAX_LOG_RATIO
from llmac.core.returns import columns, spread_from_starts


def segment_ratios(
    old_logprobs: Float[Tensor, "B T"],
    sampler_logprobs: Float[Tensor, "B T"],
    starts: Bool[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """How much likelier each segment is under the trained policy than under the one that sampled.

        ratio_k = exp(clamp(Σ_{t in segment k} action_mask · (log π_old - log μ), ±20))

    Args:
        old_logprobs: π_old, the trainer's policy at collection.
        sampler_logprobs: μ, as the engine reports it.
        starts: True begins a segment. With one at every action token these are token ratios.
        action_mask: True = sampled by the policy.

    Returns:
        The segment's ratio at each of its tokens; 0 before the first start and where
        `action_mask` is False.

    >>> trainer, engine = torch.tensor([[-1., -1., -1.]]), torch.tensor([[-1., -2., -1.5]])
    >>> starts, every = torch.tensor([[True, False, True]]), torch.ones(1, 3, dtype=torch.bool)
    >>> segment_ratios(trainer, engine, starts, every)
    tensor([[2.7183, 2.7183, 1.6487]])
    """
    starts = starts & action_mask
    difference = (old_logprobs - sampler_logprobs).detach().where(action_mask, 0.0)
    segment = starts.cumsum(dim=1)
    totals = difference.new_zeros(len(segment), segment.shape[1] + 1)
    totals = totals.scatter_add(1, segment, difference).gather(1, segment)
    ratios = totals.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return ratios.where(action_mask & (segment > 0), 0.0)


def vtrace(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    ratios: Float[Tensor, "B T"],
    starts: Bool[Tensor, "B T"],
    bootstrap: Float[Tensor, "B"],
    *,
    gamma: float | Float[Tensor, "B T"],
    lam: float | Float[Tensor, "B T"],
    rho_max: float,
    c_max: float,
    action_mask: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Advantages and critic targets of π from segments sampled by μ.

    With k counting segments as in `segment_gae`, ρ_k = min(rho_max, ratio_k) and c_k =
    min(c_max, ratio_k):

        δ_k = R_k + γ_k · V_{k+1} - V_k
        v_k = V_k + ρ_k · δ_k + γ_k · λ_k · c_k · (v_{k+1} - V_{k+1})
        Â_k = ρ_k · (δ_k + γ_k · λ_k · (v_{k+1} - V_{k+1}))

    Â_k carries the importance weight of its own segment. rho_max decides whose values these are:
    π's at infinity, those of a policy between μ and π below; c_max only how far news travels.
    IMPALA: Espeholt et al. 2018, arXiv:1802.01561. λ < 1 mixes V into the next state's target, as
    rlax does; without that, equal policies would not give `segment_gae`, which they now do for
    every λ.

    Args:
        rewards: r_t, arriving after token t.
        values: V(s_t), read before token t; anything where `starts` is False.
        ratios: π over μ of the segment, from `segment_ratios`; read at the segment's start.
        starts: True where a value is known.
        bootstrap: V(s_T): 0 for terminated rows.
        gamma: discount a segment.
        lam: trace decay a segment.
        rho_max: largest weight of a TD error; infinity: no bound.
        c_max: largest weight of what a trace passes on; infinity: no bound.
        action_mask: True = sampled by the policy; None: every token was.

    Returns:
        advantages: unit of `rewards`, one for each segment, repeated over its tokens; 0 before the
            first start and where `action_mask` is False.
        targets: v, laid out likewise.

    >>> rewards, values = torch.tensor([[0., 0., 1.]]), torch.tensor([[.2, .5, .8]])
    >>> ratios, starts = torch.tensor([[2., .5, 1.]]), torch.ones(1, 3, dtype=torch.bool)
    >>> vtrace(rewards, values, ratios, starts, torch.zeros(1), gamma=1.0, lam=1.0,
    ...        rho_max=1.0, c_max=1.0)
    (tensor([[0.5500, 0.2500, 0.2000]]), tensor([[0.7500, 0.7500, 1.0000]]))
    """
    if action_mask is not None:
        starts = starts & action_mask
    values = values.where(starts, 0.0)
    discount, decay = columns(gamma, rewards), columns(lam, rewards)
    rho, c = ratios.clamp(max=rho_max).unbind(1), ratios.clamp(max=c_max).unbind(1)
    reward, value, start = rewards.unbind(1), values.unbind(1), starts.unbind(1)

    segment_reward, next_value = torch.zeros_like(bootstrap), bootstrap
    next_correction = torch.zeros_like(bootstrap)  # v - V at the next start
    advantages: list[Tensor] = []
    corrections: list[Tensor] = []
    for t in reversed(range(rewards.shape[1])):
        segment_reward = segment_reward + reward[t]
        td_error = segment_reward + discount[t] * next_value - value[t]
        passed_on = discount[t] * decay[t] * next_correction
        advantages.append(rho[t] * (td_error + passed_on))
        next_correction = torch.where(
            start[t], rho[t] * td_error + c[t] * passed_on, next_correction
        )
        corrections.append(next_correction)
        next_value = torch.where(start[t], value[t], next_value)
        segment_reward = torch.where(start[t], 0.0, segment_reward)

    if not advantages:
        return torch.zeros_like(rewards), torch.zeros_like(rewards)
    advantage = spread_from_starts(torch.stack(advantages[::-1], dim=1), starts)
    target = spread_from_starts(values + torch.stack(corrections[::-1], dim=1), starts)
    if action_mask is None:
        return advantage, target
    return advantage.where(action_mask, 0.0), target.where(action_mask, 0.0)
