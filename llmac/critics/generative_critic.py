"""The live generative critic: which states are asked about, what scores become, what is learned and kept."""

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Bool
from torch import Tensor

from llmac.core.continuations import State, merged
from llmac.core.measures import Mean, Measure, Metrics, Sum
from llmac.core.protocols import Completion, Player, Request, SamplingParams
from llmac.core.scores import fraction_of, parse_score, value_of_score
from llmac.core.types import CriticTargets, Rollouts, Trajectory, Values
from llmac.core.value_heads import OUTSIDE
from llmac.critics.bench import TrainedPolicy
from llmac.critics.generative_context import Context
from llmac.critics.generative_engine import CriticEngine
from llmac.critics.generative_learning import Lesson, ScoreLearner, Written
from llmac.critics.generative_prompt import (
    NOTHING_TOLD,
    CriticTemplate,
    critic_prompt,
    problem_text,
)
from llmac.errors import ConsistencyError
from llmac.models.loading import ModelSpec, load_tokenizer
from llmac.runtime.context import Runtime
from llmac.runtime.saving import save_whole

if TYPE_CHECKING:
    from llmac.critics.generative import GenerativeConfig

logger = logging.getLogger(__name__)

SETTINGS_FILE, TEMPLATE_FILE = "generative_critic.json", "critic_template.jinja"
"""Beside the weights of a saved critic: what its scores mean and what it remembers; what it reads."""
_MEMORY_FILE = "memory.json"
_PROBE_TOKENS = 16
_SILENT_STEPS = 3
"""Steps without any score after which that is said."""


class Generative:
    """V(s_t) = the score that a language model writes about s_t, scaled to the range of the rewards.

    What it reads ends before the token at t, so that the action is no part of its own baseline. Equal states are asked
    about once. A state about which no score was written, or whose prompt is too long, has a documented value and is
    counted. Seeds follow from the state, the run's seed and the number of updates: where what an engine samples is
    decided by the seed of a request, a resumed run finds the same.
    """

    def __init__(
        self,
        config: "GenerativeConfig",
        *,
        template: CriticTemplate,
        context: Context,
        writer: Player,
        player: Player,
        voice: CriticEngine,
        policy: TrainedPolicy | None,
        learner: ScoreLearner | None,
        runtime: Runtime,
        spec: ModelSpec,
        seed: int,
        most_prompt_tokens: int | None,
        values_ends: bool,
    ) -> None:
        """Put the parts together.

        Args:
            config: settings.
            template: of the prompt.
            context: what is known of the writer.
            writer: the policy, whose responses are read.
            player: the critic, with its own words.
            voice: its engine.
            policy: its language model in training; None: it does not learn.
            learner: teaches that.
            runtime: the ranks.
            spec: where its tokenizer is.
            seed: of the run.
            most_prompt_tokens: longest prompt; None: there is no limit.
            values_ends: whether the ends of responses that the length limit has cut are asked about; those of paused
                ones always are.
        """
        self._config, self._template, self._context = config, template, context
        self._writer, self._player, self._voice = writer, player, voice
        self._policy, self._learner, self._runtime = policy, learner, runtime
        self._spec, self._seed, self._most = spec, seed, most_prompt_tokens
        self._values_ends = values_ends
        low = config.reward_range[0]
        self._unparsed = low if config.unparsed_value is None else config.unparsed_value
        self._updates = 0
        self._rows: tuple[Trajectory, ...] = ()
        self._said: dict[tuple[int, int], Written] = {}
        self._spare: tuple[int, ...] = ()
        self._silent_steps = 0
        self._metrics: dict[str, Measure] = {}

    @property
    def shares_engine(self) -> bool:
        """Whether the policy's engine has the critic's weights once it was asked."""
        return self._config.engine == "shared"

    def values(self, rollouts: Rollouts, starts: Bool[Tensor, "B T"]) -> Values:
        """Of all states asked about, and of the ends of rows that go on, in one call of the engine. Collective."""
        places = starts.nonzero().tolist()
        rows, limit = rollouts.trajectories, rollouts.length_limit
        go_on = rollouts.truncated if self._values_ends else rollouts.paused
        ends = [[row, len(rows[row].response_ids)] for row in go_on.nonzero()[:, 0].tolist()]
        states = [State(origin=rows[row], position=t) for row, t in places + ends]
        distinct, which = merged(states)
        prompts = [self._prompt(state, limit) for state in distinct]
        self._spare = self._spare or self._any_prompt()
        said = self._ask(distinct, prompts)
        worth = [self._value(told) for told in said]

        at = rollouts.rewards.new_zeros(starts.shape)
        bootstrap = rollouts.rewards.new_zeros(len(rows))
        for (row, t), n in zip(places, which[: len(places)], strict=True):
            at[row, t] = worth[n]
        for (row, _), n in zip(ends, which[len(places) :], strict=True):
            bootstrap[row] = worth[n]
        self._rows = rows
        self._said = {
            (row, t): told
            for (row, t), n in zip(places, which[: len(places)], strict=True)
            if (told := said[n]) is not None
        }
        self._count(said, asked=len(states))
        return Values(at=at, starts=starts, bootstrap=bootstrap)

    def update(self, rollouts: Rollouts, targets: CriticTargets) -> Metrics:
        """Learn from what came of the states that the last `values` were about. Collective.

        A state that several responses came through is one lesson, with the mean reward over their outcomes. Of targets
        only `returns` and `value_mask` matter.

        Raises:
            ConsistencyError: the rows are not those of the last `values`.
        """
        found: dict[int, tuple[Written, list[float]]] = {}
        beyond = 0
        low, high = self._config.reward_range
        for (row, t), said in self._said.items():
            if rollouts.trajectories[row] is not self._rows[row]:
                raise ConsistencyError(
                    "a generative critic learns from the states it was asked about last, and was given other rows"
                )
            if targets.value_mask[row, t]:
                outcome = float(targets.returns[row, t])
                beyond += not low <= outcome <= high
                found.setdefault(id(said), (said, []))[1].append(
                    fraction_of(outcome, self._config.reward_range)
                )
        lessons = [Lesson(said=said, outcomes=tuple(zs)) for said, zs in found.values()]
        rewards = [reward for lesson in lessons for reward in lesson.rewards]
        states = float(sum(len(lesson.outcomes) for lesson in lessons))
        metrics: dict[str, Measure] = {
            "critic/brier": Mean(len(rewards) - sum(rewards), float(len(rewards))),
            OUTSIDE: Mean(float(beyond), states),
        }
        if self._learner is not None:
            metrics |= self._learner.learn(lessons, spare=self._spare)
            self._updates += 1
        self._said = {}
        return metrics

    def observe(self, rollouts: Rollouts) -> Metrics:
        """Take the step's outcomes into what will be told of the writer. Collective."""
        return self._context.observe(rollouts)

    def metrics(self) -> Metrics:
        """Of the last `values`."""
        metrics, self._metrics = {**self._metrics, **self._voice.metrics()}, {}
        return metrics

    def save(self, directory: Path) -> None:
        """Role `critic` of a checkpoint. Collective."""
        if self._policy is not None:
            self._policy.save(directory)
        if self._runtime.is_main:
            kept = {"updates": self._updates, "context": self._context.state()}
            (directory / _MEMORY_FILE).write_text(json.dumps(kept), encoding="utf-8")

    def load(self, directory: Path) -> None:
        """Continue from a checkpoint."""
        if self._policy is not None:
            self._policy.load(directory)
        kept = json.loads((directory / _MEMORY_FILE).read_text(encoding="utf-8"))
        self._updates = int(kept["updates"])
        self._context.restore(kept["context"])
        self._voice.forget()

    def save_pretrained(self, directory: Path, *, policy: Path) -> None:
        """A folder that transformers loads, and `init` of another run. Collective.

        Nothing is written of a critic that did not learn: it is where `init` says.

        Args:
            directory: made if missing.
            policy: not needed; the critic has weights of its own.
        """
        if self._policy is None:
            return
        save_whole(self._policy.model, directory, is_main=self._runtime.is_main)
        if self._runtime.is_main:
            load_tokenizer(self._spec).save_pretrained(directory)
            (directory / TEMPLATE_FILE).write_text(self._template.source, encoding="utf-8")
            kept = {**self._config.asking(), "context": self._context.state()}
            (directory / SETTINGS_FILE).write_text(json.dumps(kept, indent=1), encoding="utf-8")

    def _prompt(self, state: State, length_limit: int) -> tuple[int, ...]:
        written = critic_prompt(
            self._template,
            self._config,
            problem=problem_text(state.origin.prompt),
            partial=self._writer.read(state.origin.response_ids[: state.position]),
            told=self._context.about(state, length_limit),
        )
        return self._player.encode(written)

    def _any_prompt(self) -> tuple[int, ...]:
        """One about nothing, which fits: for ranks that have nothing to ask, and for the proof of an engine."""
        told = {**NOTHING_TOLD, "tokens_used": 0, "tokens_left": 0}
        written = critic_prompt(self._template, self._config, problem="?", partial="", told=told)
        return self._player.encode(written)

    def _ask(
        self, states: Sequence[State], prompts: Sequence[tuple[int, ...]]
    ) -> list[Written | None]:
        """What is written about each state; None: its prompt is too long."""
        config = self._config
        self._voice.bring(self._updates, self._spare[:_PROBE_TOKENS])
        fitting = [
            n for n, ids in enumerate(prompts) if self._most is None or len(ids) <= self._most
        ]
        # Prompts that begin alike are neighbours: engines keep what they have read.
        order = sorted(fitting, key=lambda n: (prompts[n], str(states[n].question)))
        answers = self._voice.generate(
            [
                Request(
                    prompt_ids=prompts[n],
                    params=SamplingParams(
                        n=config.samples,
                        temperature=config.temperature,
                        max_new_tokens=config.max_new_tokens,
                        stop=(f"</{config.tag}>",),
                        seed=self._seed_of(states[n]),
                    ),
                )
                for n in order
            ]
        )
        groups: dict[object, int] = defaultdict(lambda: len(groups))
        said: list[Written | None] = [None] * len(states)
        for n, completions in zip(order, answers, strict=True):
            said[n] = Written(
                prompt_ids=prompts[n],
                completions=tuple(completions),
                values=tuple(self._fraction(completion) for completion in completions),
                group=groups[states[n].question],
            )
        return said

    def _fraction(self, completion: Completion) -> float | None:
        """From 0 to 1; None: there is no score."""
        config = self._config
        text = self._player.decode(completion.token_ids)  # tags may be special tokens
        score = parse_score(text, scale=config.scale, tag=config.tag)
        if score is None:
            return None
        return value_of_score(score, scale=config.scale, reward_range=(0.0, 1.0))

    def _value(self, said: Written | None) -> float:
        """In reward units."""
        scores = [] if said is None else [v for v in said.values if v is not None]
        if not scores:
            return self._unparsed
        low, high = self._config.reward_range
        return low + (high - low) * sum(scores) / len(scores)

    def _count(self, said: Sequence[Written | None], *, asked: int) -> None:
        written = [told for told in said if told is not None]
        texts = float(sum(len(told.completions) for told in written))
        tokens = float(sum(len(c.token_ids) for told in written for c in told.completions))
        silent = float(sum(value is None for told in written for value in told.values))
        self._silent_steps = self._silent_steps + 1 if said and silent == texts else 0
        if self._silent_steps == _SILENT_STEPS:
            logger.warning(
                "the critic wrote no score about any state of %d steps (%d of the last %d prompts were too long): all "
                "have unparsed_value, and nothing is learned; train it by sft first, or look at critic.template, "
                "critic.max_new_tokens and critic.max_prompt_tokens",
                _SILENT_STEPS,
                len(said) - len(written),
                len(said),
            )
        self._metrics |= {
            "critic/states": Sum(float(len(written))),
            "critic/states_merged": Mean(float(asked - len(said)), float(asked)),
            "critic/unparsed": Mean(silent, texts),
            "critic/prompts_too_long": Sum(float(len(said) - len(written))),
            "critic/score_tokens": Mean(tokens, texts),
            "rollout/sampled_tokens": Sum(tokens),
        }

    def _seed_of(self, state: State) -> int:
        what = (self._seed, self._voice.held, state.key)
        digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 2
