"""States whose true values are known: sampled by the policy, judged by many continuations of each."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llmac.core.collate import collate
from llmac.core.continuations import State, merged
from llmac.core.protocols import Decode, RolloutEngine, SamplingParams, Scorer
from llmac.core.types import Prompt, Rollouts, Trajectory
from llmac.critics.continuing import continue_states
from llmac.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

STATES_AT_ONCE = 64
"""Distinct states whose continuations are asked for and judged together."""

Told = Callable[[int, int], None]
"""Hears how many of how many distinct states are judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """N states s_t of sampled responses, each with the returns of K continuations.

    State n stands in response `row[n]`, before its token `position[n]`.
    """

    trajectories: tuple[Trajectory, ...]
    """The sampled responses, judged; `group` numbers their prompts."""
    row: Int[Tensor, "N"]
    position: Int[Tensor, "N"]
    depth: Float[Tensor, "N"]
    """Position as a fraction of the response, as asked for: 0 is before the first token."""
    outcomes: Float[Tensor, "N K"]
    """Return of each continuation, unit of reward. Equal states share theirs."""
    success_above: float
    """A continuation succeeds if its outcome is above, unit of reward."""
    length_limit: int
    """Response length, tokens, at which sampling was cut."""

    @property
    def value(self) -> Float[Tensor, "N"]:
        """Monte-Carlo estimate of V(s): the mean outcome."""
        return self.outcomes.mean(1)

    @property
    def standard_error(self) -> Float[Tensor, "N"]:
        """Of `value`: s/√K."""
        return self.outcomes.std(1) / self.outcomes.shape[1] ** 0.5

    @property
    def prompt(self) -> Int[Tensor, "N"]:
        """The same integer for states of one prompt."""
        return torch.tensor([t.group for t in self.trajectories])[self.row]

    @property
    def succeeded(self) -> Bool[Tensor, "N"]:
        """Whether the response in which the state stands succeeded in the end."""
        rewards = torch.tensor([t.reward for t in self.trajectories])
        return (rewards > self.success_above)[self.row]

    def rollouts(self) -> tuple[Rollouts, Bool[Tensor, "B T"]]:
        """What a critic is asked about: the responses, and True at the positions of the states."""
        batch = collate(self.trajectories, length_limit=self.length_limit)
        starts = torch.zeros_like(batch.action_mask)
        starts[self.row, self.position] = True
        rollouts = Rollouts.of(batch, old_logprobs=batch.sampler_logprobs)
        return rollouts, starts


def check_numbers(*, states: int, depths: int, rollouts: int, siblings: int = 1) -> None:
    """Refuse what cannot be sampled or says nothing, before anything is loaded.

    Raises:
        ConfigError: names the number.
    """
    if depths < 1:
        raise ConfigError(f"depths must be at least 1, found {depths}")
    if states < depths:
        raise ConfigError(
            f"states is {states} and depths {depths}: every depth needs a state; ask for at least {depths} states"
        )
    if rollouts < 2:
        raise ConfigError(
            f"rollouts is {rollouts}: the noise of a true value is known from at least 2 continuations; take 64"
        )
    if siblings < 1:
        raise ConfigError(f"siblings must be at least 1, found {siblings}")


def sample_states(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    score: Scorer,
    *,
    sampling: SamplingParams,
    decode: Decode | None = None,
    states: int = 200,
    depths: int = 5,
    rollouts: int = 64,
    siblings: int = 2,
    gamma: float = 1.0,
    success_above: float | None = None,
    seed: int = 0,
    told: Told = lambda done, total: None,
) -> States:
    """Sample responses, pick states in them, and estimate the true value of each by fresh continuations.

        v(s) = (1/K) Σ_k γ^(n_k - 1) · r_k

    with r_k the reward of the whole response that continuation k completes and n_k its tokens. A continuation is cut
    where the response would be cut in training, and is rewarded as it would be there.

    Every response has one state at each depth i/depths, i = 0 .. depths - 1: position floor(depth · length). Where a
    state stands depends on how its response went on, so the response's own reward says nothing fair about it; only
    the continuations do. Equal states (all at depth 0 of one prompt) are continued once.

    Args:
        engine: holds the policy.
        prompts: as many of them as are needed are drawn, each at most once.
        score: judges responses; give it counters of its own.
        sampling: as in training; `n` and `seed` do not matter.
        decode: text of token ids; needed when `sampling.stop` is not empty.
        states: how many; rounded down to a multiple of `depths`.
        depths: how many.
        rollouts: K, continuations of a state; at least 2.
        siblings: responses to one prompt, more if there are too few prompts. Values of siblings show whether a critic
            knows more than which prompts are hard.
        gamma: discount a token.
        success_above: outcome above which a response counts as a success; None: midway between the worst and the best.
        seed: of prompts, responses and continuations.
        told: hears of progress.

    Raises:
        ConfigError: numbers that say nothing, see `check_numbers`.
        DataError: no prompts.
        ValueError: stop strings without `decode`.
    """
    check_numbers(states=states, depths=depths, rollouts=rollouts, siblings=siblings)
    if not prompts:
        raise DataError("there are no prompts to sample states from; give it some")
    chosen = _draw_prompts(prompts, states // depths, siblings, seed)
    trajectories = _respond(engine, chosen, score, sampling, decode, seed)
    row = torch.arange(len(trajectories)).repeat_interleave(depths)
    depth = (torch.arange(depths) / depths).repeat(len(trajectories))
    position = torch.tensor(
        [len(t.response_ids) * index // depths for t in trajectories for index in range(depths)]
    )
    places = zip(row.tolist(), position.tolist(), strict=True)
    outcomes = _outcomes(
        engine,
        [State(origin=trajectories[index], position=at) for index, at in places],
        score,
        sampling,
        decode,
        rollouts=rollouts,
        gamma=gamma,
        seed=seed,
        told=told,
    )
    if success_above is None:
        success_above = float(outcomes.min() + outcomes.max()) / 2
    return States(
        trajectories=tuple(trajectories),
        row=row,
        position=position,
        depth=depth,
        outcomes=outcomes,
        success_above=success_above,
        length_limit=sampling.max_new_tokens,
    )


def _draw_prompts(
    prompts: Sequence[Prompt], responses: int, siblings: int, seed: int
) -> list[tuple[Prompt, int]]:
    """Prompts and how often each is answered: as evenly as can be."""
    count = min(len(prompts), max(1, responses // siblings))
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    each, more = divmod(responses, count)
    return [(prompts[int(p)], each + (n < more)) for n, p in enumerate(order[:count])]


def _respond(
    engine: RolloutEngine,
    chosen: Sequence[tuple[Prompt, int]],
    score: Scorer,
    sampling: SamplingParams,
    decode: Decode | None,
    seed: int,
) -> list[Trajectory]:
    siblings, _ = continue_states(
        engine,
        [State.before(prompt, group) for group, (prompt, _) in enumerate(chosen)],
        score,
        sampling=sampling,
        decode=decode,
        counts=[n for _, n in chosen],
        tokens=[sampling.max_new_tokens] * len(chosen),
        seeds=[_seed(seed, index) for index in range(len(chosen))],
    )
    return [trajectory for group in siblings for trajectory in group]


def _outcomes(
    engine: RolloutEngine,
    states: Sequence[State],
    score: Scorer,
    sampling: SamplingParams,
    decode: Decode | None,
    *,
    rollouts: int,
    gamma: float,
    seed: int,
    told: Told,
) -> Tensor:
    """Returns [N, K] of continuations from each state."""
    distinct, places = merged(states)
    # By length, so that those asked together are sampled together.
    order = sorted(range(len(distinct)), key=lambda index: distinct[index].position)
    found: dict[int, list[float]] = {}
    for start in range(0, len(order), STATES_AT_ONCE):
        members = order[start : start + STATES_AT_ONCE]
        part = [distinct[index] for index in members]
        judged, _ = continue_states(
            engine,
            part,
            score,
            sampling=sampling,
            decode=decode,
            counts=[rollouts] * len(part),
            tokens=[sampling.max_new_tokens - state.position for state in part],
            # Other numbers than those of the responses: a state must not see its own future again.
            seeds=[_seed(seed + 1, start + index) for index in range(len(part))],
        )
        for index, state, siblings in zip(members, part, judged, strict=True):
            found[index] = [_discounted(t, state.position, gamma) for t in siblings]
        told(len(found), len(distinct))
    return torch.tensor([found[place] for place in places])


def _discounted(trajectory: Trajectory, position: int, gamma: float) -> float:
    assert trajectory.reward is not None, "continue_states refuses others"
    return trajectory.reward * gamma ** (len(trajectory.response_ids) - position - 1)


def _seed(seed: int, index: int) -> int:
    return (seed * 1_000_003 + index) % 2**31
