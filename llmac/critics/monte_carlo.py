"""A critic that learns nothing and asks the policy itself: what do fresh continuations of the state earn?

Critic of VinePPO (arXiv:2410.01679) and of SPO-chain (arXiv:2505.23564); there and here K = 9. With K fixed, every
state asked and no continuation cut before its response would be, it is unbiased at every state, for the policy as it is
sampled (temperature, `top_p`, `top_k`), with a variance that falls as 1/K. What savings cost stands at their fields.
"""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from llmac.core.continuations import PromptBudget, State, merged, standard_error, still_needed
from llmac.core.measures import Mean, Measure, Metrics, Sum
from llmac.core.protocols import SamplingParams, Scorer
from llmac.core.types import CriticTargets, Finish, Rollouts, Trajectory, Values
from llmac.core.value_heads import OUTSIDE
from llmac.critics.bench import CriticBench
from llmac.critics.continuing import CountingScorer, continue_states
from llmac.critics.refusals import refuse_infinite, refuse_range, refuse_unless
from llmac.errors import ConfigError

logger = logging.getLogger(__name__)

DEAR = 20
"""Continuation tokens for each token of the responses, from which on a run is told what its values cost."""


@dataclass(frozen=True, kw_only=True)
class MonteCarloConfig:
    """The mean reward of K fresh continuations of each state asked about; equal states share theirs."""

    continuations: int = 9
    """K, continuations of each state. 9 in SPO's GSM8K settings and in VinePPO, 4 in SPO's of a distilled model."""
    standard_error: float | None = None
    """Standard error, unit of reward, down to which a state gets more continuations than K; they are asked for in
    rounds, at most as many again each. It is reckoned with one more outcome imagined at each end of `reward_range`.
    When to stop depends on what was found, which biases values slightly. None: K it is."""
    max_continuations: int = 64
    """With `standard_error`: continuations of a state in all. Our choice."""
    reward_range: tuple[float, float] = (0.0, 1.0)
    """Smallest and largest reward, for standard errors only; `critic/vf_target_clipfrac` counts rewards beyond."""
    tokens_per_prompt: int | None = None
    """Continuation tokens to spend on all states of a prompt together. Each state gets its first continuation, and
    further ones in turn while they are thought to fit, at the length that the prompt's own responses still had from
    there; what is sampled may be somewhat more or less. Counted in `critic/states_withheld`. None: no budget."""
    skip_equal: bool = False
    """Whether states of a prompt whose responses all earned the same are taken to be worth that, unasked. It saves
    where nothing seems to be at stake, and is biased: continuations might have done otherwise. Counted in
    `critic/states_skipped`. Needs two responses to a prompt."""
    continuation_tokens: int | None = None
    """Tokens after which a continuation is cut, and judged as it is, before the response's own limit would cut it.
    Biased wherever it does; counted in `critic/continuations_cut`. None: the response's limit alone."""
    reuse: bool = False
    """Whether continuations are trained on too, each as a response that begins at its state. Its baseline is the mean
    reward of the state's *other* continuations, so that with a fixed K the advantage is unbiased; with
    `standard_error` how many others there are depends on what they earned, and it is biased as the values are."""

    def __post_init__(self) -> None:
        """Refuse numbers that nothing can be known from, and settings that contradict each other."""
        refuse_range("reward_range", self.reward_range, "smallest, largest")
        refuse_infinite(self)
        refuse_unless(
            self.continuations >= 1,
            f"continuations must be at least 1, found {self.continuations}: a value is their mean reward",
        )
        for name in ("standard_error", "tokens_per_prompt", "continuation_tokens"):
            found = getattr(self, name)
            refuse_unless(
                found is None or found > 0, f"{name} must be above 0, or null, found {found}"
            )
        refuse_unless(
            self.standard_error is None or self.max_continuations > self.continuations,
            f"max_continuations must be above continuations, {self.continuations}, for standard_error to be reached "
            f"by more of them, found {self.max_continuations}",
        )
        refuse_unless(
            not self.reuse or self.continuations >= 2,
            "reuse compares a continuation with the others of its state: continuations must be at least 2, found 1",
        )
        refuse_unless(
            not self.reuse or self.continuation_tokens is None,
            "reuse would train on continuations that continuation_tokens cut short; leave out one of the two",
        )

    @property
    def least_group_size(self) -> int:
        """Responses to a prompt that it needs."""
        return 2 if self.skip_equal else 1

    def without_effect(self) -> dict[str, str]:
        """Fields that do nothing as they are set, with the reason."""
        if self.standard_error is None:
            return {"max_continuations": "every state gets K continuations; set standard_error"}
        return {}

    def build(self, bench: CriticBench) -> "MonteCarlo":
        """The live critic.

        Raises:
            ConfigError: nothing can be sampled.
        """
        if bench.sampling is None:
            raise ConfigError(
                "critic monte_carlo samples continuations, and here nothing is sampled; it learns nothing that could "
                "be taught beforehand. Choose a critic that learns, for example value_head"
            )
        return MonteCarlo(self, bench, bench.sampling)


class MonteCarlo:
    """V(s_t) = (1/K) Σ_k reward of the whole response that continuation k of s_t completes.

    A continuation ends where the response would, at the same stop strings, stop tokens and length limit, and is
    rewarded as a response would be, so a response at the limit is worth what it earned: V(s_T) of one that was cut
    there is 0, and of one that is only paused it is asked like any other. Values are of undiscounted rewards as scored
    (γ = 1), without a KL that the algorithm takes off.

    Nothing is remembered: seeds follow from the state, the run's seed and the version of the weights. Where what an
    engine samples is decided by the seed of a request, a resumed run finds the same, and two ranks that ask about one
    state do, too.
    """

    def __init__(
        self, config: MonteCarloConfig, bench: CriticBench, sampling: SamplingParams
    ) -> None:
        """Put the parts together.

        Args:
            config: settings.
            bench: of it engine, score, decode, seed and ranks.
            sampling: as the run's responses are sampled.
        """
        self._config, self._sampling, self._seed = config, sampling, bench.seed
        self._engine, self._runtime, self._decode = bench.engine, bench.runtime, bench.decode
        self._training = bench.score if isinstance(bench.score, CountingScorer) else None
        self._judge = None if self._training is None else self._training.for_evaluation()
        self._score: Scorer = self._judge or bench.score
        self._metrics: dict[str, Measure] = {}
        self._responses: list[Trajectory] = []
        self._told = False
        self.offers: bool = config.reuse

    def values(self, rollouts: Rollouts, starts: Bool[Tensor, "B T"]) -> Values:
        """Mean rewards of continuations. Collective: ranks ask the engine equally often."""
        places = starts.nonzero().tolist()
        ends = _paused(rollouts)
        states = [State(origin=rollouts.trajectories[row], position=t) for row, t in places + ends]
        distinct, which = merged(states)
        known = _equal_outcomes(rollouts.trajectories) if self._config.skip_equal else {}
        # In the order of their tokens, so that those which begin alike are neighbours: engines keep what they read.
        unknown = sorted(
            (n for n, state in enumerate(distinct) if state.question not in known),
            key=lambda n: (distinct[n].token_ids, str(distinct[n].question)),
        )
        found = self._continued([distinct[n] for n in unknown], rollouts)
        worth = [known.get(state.question, 0.0) for state in distinct]
        for n, continuations in zip(unknown, found, strict=True):
            worth[n] = _mean(_rewards(continuations))

        at = rollouts.rewards.new_zeros(starts.shape)
        bootstrap = rollouts.rewards.new_zeros(len(rollouts.trajectories))
        for (row, t), n in zip(places, which[: len(places)], strict=True):
            at[row, t] = worth[n]
        for (row, _), n in zip(ends, which[len(places) :], strict=True):
            bootstrap[row] = worth[n]
        self._responses = _lessons(found) if self.offers else []
        self._metrics |= {
            "critic/states": Sum(float(len(unknown))),
            "critic/states_merged": Mean(float(len(states) - len(distinct)), float(len(states))),
        }
        if self._config.skip_equal:
            self._metrics["critic/states_skipped"] = Sum(float(len(distinct) - len(unknown)))
        return Values(at=at, starts=starts, bootstrap=bootstrap)

    def update(self, rollouts: Rollouts, targets: CriticTargets) -> dict[str, Measure]:
        """Nothing learns."""
        return {}

    def metrics(self) -> Metrics:
        """Of the last `values`."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def responses(self) -> list[Trajectory]:
        """The continuations of the last `values`, as responses that begin at their states.

            V(start) = mean reward of the other continuations of the state,    V(end) = 0

        One of a state that a budget left no second one is not among them: it has nothing to be compared with.
        """
        return self._responses

    def _continued(self, states: Sequence[State], rollouts: Rollouts) -> list[list[Trajectory]]:
        """The continuations of each state, in as many rounds as any rank needs."""
        config = self._config
        limits = [rollouts.length_limit - state.position for state in states]
        most = config.continuation_tokens
        tokens = [limit if most is None else min(limit, most) for limit in limits]
        budget = PromptBudget(config.tokens_per_prompt, states, tokens, rollouts.trajectories)
        found: list[list[Trajectory]] = [[] for _ in states]
        sampled = 0
        counts, rounds = budget.allowed([config.continuations] * len(states), found), 0
        if self._training and self._judge:
            self._judge.step = self._training.step
        while True:
            more, more_tokens = continue_states(
                self._engine,
                states,
                self._score,
                sampling=self._sampling,
                decode=self._decode,
                counts=counts,
                tokens=tokens,
                seeds=[self._seed_of(state, rounds) for state in states],
            )
            for before, new in zip(found, more, strict=True):
                before += new
            rounds, sampled = rounds + 1, sampled + more_tokens
            if config.standard_error is None:
                break
            wanted = [
                still_needed(
                    _rewards(continuations),
                    target=config.standard_error,
                    most=config.max_continuations,
                    reward_range=config.reward_range,
                )
                for continuations in found
            ]
            counts = budget.allowed(wanted, found)
            if not float(self._runtime.sum(torch.tensor(float(sum(counts))))):
                break
        self._count(states, found, limits, tokens)
        self._metrics["rollout/sampled_tokens"] = Sum(float(sampled))
        self._tell_cost(sampled, len(states), rollouts)
        if config.tokens_per_prompt is not None:
            self._metrics["critic/states_withheld"] = Sum(float(budget.withheld))
        return found

    def _count(
        self,
        states: Sequence[State],
        found: Sequence[Sequence[Trajectory]],
        limits: Sequence[int],
        tokens: Sequence[int],
    ) -> None:
        errors = [standard_error(_rewards(c), self._config.reward_range) for c in found]
        low, high = self._config.reward_range
        rewards = [reward for continuations in found for reward in _rewards(continuations)]
        self._metrics |= {
            "critic/continuations": Sum(float(sum(map(len, found)))),
            OUTSIDE: Mean(float(sum(not low <= r <= high for r in rewards)), float(len(rewards))),
            "critic/standard_error": Mean(sum(errors), float(len(errors))),
        }
        if self._config.continuation_tokens is not None:
            cut = [
                t.finish is Finish.LENGTH and len(t.response_ids) - state.position == most < limit
                for state, continuations, most, limit in zip(
                    states, found, tokens, limits, strict=True
                )
                for t in continuations
            ]
            self._metrics["critic/continuations_cut"] = Sum(float(sum(cut)))
        if self._judge:
            wrong = [
                measure.value
                for name, measure in self._judge.metrics().items()
                if name == "reward/unscored" or name.endswith("/errors")
            ]
            self._metrics["critic/continuations_unscored"] = Sum(sum(wrong))

    def _tell_cost(self, sampled: int, states: int, rollouts: Rollouts) -> None:
        own = int((rollouts.action_mask & rollouts.fresh).sum())
        if self._told or sampled <= DEAR * own:
            return
        self._told = True
        logger.warning(
            "critic monte_carlo sampled %d tokens to value %d states of responses of %d tokens together; ask at fewer "
            "states (algorithm.segmenter, algorithm.max_segments), or bound it by critic.tokens_per_prompt. Said once: "
            "rollout/sampled_tokens counts it",
            sampled,
            states,
            own,
        )

    def _seed_of(self, state: State, rounds: int) -> int:
        what = (self._seed, self._engine.policy_version, rounds, state.key)
        digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 2


def _paused(rollouts: Rollouts) -> list[list[int]]:
    """Row and length of every response that is paused and has room left."""
    return [
        [row, len(trajectory.response_ids)]
        for row, trajectory in enumerate(rollouts.trajectories)
        if trajectory.finish is Finish.PAUSED
        and len(trajectory.response_ids) < rollouts.length_limit
    ]


def _equal_outcomes(responses: Sequence[Trajectory]) -> dict[Hashable, float]:
    """Prompts whose responses, two at least, all earned the same, and what."""
    earned: dict[Hashable, list[float | None]] = defaultdict(list)
    for response in responses:
        earned[State(origin=response, position=0).question].append(response.reward)
    return {
        question: rewards[0]
        for question, rewards in earned.items()
        if len(rewards) > 1 and len(set(rewards)) == 1 and rewards[0] is not None
    }


def _lessons(found: Sequence[Sequence[Trajectory]]) -> list[Trajectory]:
    """Continuations as rows to train on."""
    lessons: list[Trajectory] = []
    for continuations in found:
        rewards = _rewards(continuations)
        for trajectory, reward in zip(continuations, rewards, strict=True):
            if len(rewards) > 1:
                others = (sum(rewards) - reward) / (len(rewards) - 1)
                span = (others, 0.0)
                lessons.append(replace(trajectory, value_span=span))
    return lessons


def _rewards(continuations: Sequence[Trajectory]) -> list[float]:
    return [t.reward for t in continuations if t.reward is not None]


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
