"""Trajectories in, rewarded trajectories out: calls reward functions, adds up, counts what went wrong."""

import dataclasses
import inspect
import logging
import math
import numbers
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal, Protocol

from llmac.core.measures import Mean, Measure, Metrics, Sum
from llmac.core.types import Trajectory
from llmac.errors import ConfigError, RewardError
from llmac.rewards.contracts import RewardFunction, RewardSpec, understand
from llmac.rewards.event_loop import BackgroundLoop

logger = logging.getLogger(__name__)


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> Any:
        """Text of token ids."""
        ...


@dataclass(slots=True)
class _Counter:
    """One function's step."""

    total: float = 0.0
    scored: int = 0
    nones: int = 0
    errors: int = 0
    nonzero: bool = False
    logged: dict[str, Mean] = field(default_factory=dict)


class Rewards:
    """The reward of a response: the weighted sum over the functions that apply to it (a `core.protocols.Scorer`).

        r = Σ_f weight_f · f(prompt, response)      over the functions f that do not return None

    A response to which no function applies gets 0.0, as in TRL, and is counted in `reward/unscored`.
    Async functions of one call run concurrently, also with each other; the others run in the calling thread.
    """

    step: int = 0
    """Training step of the next call: `trainer_state.global_step` of functions that ask for it. `metrics()` adds 1."""

    def __init__(
        self,
        specs: Sequence[RewardSpec | Callable[..., Any]],
        tokenizer: Decoder,
        *,
        on_error: Literal["stop", "skip"] = "stop",
        zero_reward_warning_steps: int = 10,
    ) -> None:
        """Understand every function's contract.

        Args:
            specs: the functions, plain or with weight and name; names must differ.
            tokenizer: decodes responses.
            on_error: `stop`: a function that raises, or returns NaN or a non-number, ends the run. `skip`: that
                function does not apply to the response (None), the case is counted and logged. A batch function that
                raises, is skipped for its whole batch.
            zero_reward_warning_steps: warn after so many steps in a row in which a function said 0 to everything, and
                again after as many more; 0 = never.

        Raises:
            ConfigError: no function, two of one name, or parameters that fit neither contract.
        """
        self._specs = tuple(
            spec if isinstance(spec, RewardSpec) else RewardSpec(function=spec) for spec in specs
        )
        self.functions: tuple[RewardFunction, ...] = tuple(understand(s) for s in self._specs)
        if not self.functions:
            raise ConfigError("reward names no function; training needs at least one")
        names = [function.name for function in self.functions]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    f"two reward functions are called {name!r}; give one of them another `name`"
                )
        self._tokenizer = tokenizer
        self._on_error: Literal["stop", "skip"] = on_error
        self._warning_steps = zero_reward_warning_steps
        self._zero_steps: dict[str, int] = dict.fromkeys(names, 0)
        self._told_of_extras: set[str] = set()
        self._loop = BackgroundLoop()
        self._forget()

    def for_evaluation(self) -> "Rewards":
        """The same functions with counters of their own, so that evaluation does not show up as training reward."""
        return Rewards(
            self._specs, self._tokenizer, on_error=self._on_error, zero_reward_warning_steps=0
        )

    def check_columns(self, columns: Collection[str]) -> None:
        """Raise `DataError` before training if a function requires a column the dataset lacks."""
        for function in self.functions:
            function.check_columns(columns)

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """The trajectories with `reward`, `reward_parts` and `response_text` set, in their order.

        Raises:
            RewardError: a function raised or returned something that is not a reward; names function and prompt ids.
        """
        decoded = [
            dataclasses.replace(
                t, response_text=self._tokenizer.decode(t.response_ids, skip_special_tokens=True)
            )
            for t in trajectories
        ]
        parts = self._ask_all(decoded) if decoded else {}
        rewarded = [
            self._rewarded(t, {name: values[i] for name, values in parts.items()})
            for i, t in enumerate(decoded)
        ]
        self._count_groups(rewarded)
        return rewarded

    def metrics(self) -> Metrics:
        """Everything counted since the last call, which ends a step.

        `reward/std` is the deviation within this rank's share; ranks are averaged by their number of responses.
        `reward/equal_groups` is the fraction of groups (of two or more) whose rewards are all equal.
        """
        metrics: dict[str, Measure] = {}
        total, count = sum(self._rewards, 0.0), float(len(self._rewards))
        mean = total / max(count, 1.0)
        std = math.sqrt(sum((r - mean) ** 2 for r in self._rewards) / max(count, 1.0))
        metrics["reward/mean"] = Mean(total, count)
        metrics["reward/std"] = Mean(std * count, count)
        metrics["reward/equal_groups"] = Mean(float(self._equal_groups), float(self._groups))
        metrics["reward/unscored"] = Sum(float(self._unscored))
        for name, counter in self._counters.items():
            metrics[f"reward/{name}/mean"] = Mean(counter.total, float(counter.scored))
            metrics[f"reward/{name}/none"] = Sum(float(counter.nones))
            metrics[f"reward/{name}/errors"] = Sum(float(counter.errors))
            for word, logged in counter.logged.items():
                metrics[f"reward/{name}/logged/{word}"] = logged
        self._warn_of_zeros()
        self.step += 1
        self._forget()
        return metrics

    def close(self) -> None:
        """End the thread of the async functions, if there is one."""
        self._loop.close()

    def _ask_all(self, trajectories: Sequence[Trajectory]) -> dict[str, list[float | None]]:
        # Async functions first: they wait for the network while the others compute here.
        started = {f.name: self._start(f, trajectories) for f in self.functions if f.is_async}
        parts = {
            f.name: self._finish(f, trajectories, *self._start(f, trajectories))
            for f in self.functions
            if not f.is_async
        }
        for function in self.functions:
            if function.is_async:
                parts[function.name] = self._finish(function, trajectories, *started[function.name])
        return {function.name: parts[function.name] for function in self.functions}

    def _start(
        self, function: RewardFunction, trajectories: Sequence[Trajectory]
    ) -> tuple[list[list[int]], list[Any]]:
        """Make the calls: (indices each is about), (what it returned, its exception, or where that will be)."""
        about, answers, waiting = [], [], []
        for indices, arguments in function.calls(
            trajectories, self._offered(function, trajectories)
        ):
            about.append(indices)
            try:
                answer = function.function(**arguments)
            except Exception as error:  # user code may raise anything; `_finish` decides
                answer = error
                if self._on_error == "stop":
                    answers.append(answer)
                    break
            if inspect.isawaitable(answer):
                waiting.append((len(answers), answer))
            answers.append(answer)
        if waiting:
            future = self._loop.start([awaitable for _, awaitable in waiting])
            for place, (index, _) in enumerate(waiting):
                answers[index] = _Later(future, place)
        return about, answers

    def _finish(
        self,
        function: RewardFunction,
        trajectories: Sequence[Trajectory],
        about: Sequence[Sequence[int]],
        answers: Sequence[Any],
    ) -> list[float | None]:
        rewards: list[float | None] = [None] * len(trajectories)
        counter = self._counters[function.name]
        for indices, answer in zip(about, answers, strict=True):
            concerned = [trajectories[i] for i in indices]
            if isinstance(answer, _Later):
                answer = answer.result()
            if isinstance(answer, Exception):
                self._failed(function, concerned, _raised(function, answer, concerned), answer)
                continue
            if isinstance(answer, BaseException):
                raise answer
            values = _as_list(function, answer, concerned) if function.batched else [answer]
            for index, value in zip(indices, values, strict=True):
                if value is None:
                    counter.nones += 1
                    continue
                try:
                    rewards[index] = _as_number(value)
                except ValueError as error:
                    concerned = [trajectories[index]]
                    self._failed(function, concerned, _returned(function, error, concerned), None)
        for reward in rewards:
            if reward is not None:
                counter.total += reward
                counter.scored += 1
                counter.nonzero |= reward != 0.0
        return rewards

    def _failed(
        self,
        function: RewardFunction,
        concerned: Sequence[Trajectory],
        message: str,
        cause: Exception | None,
    ) -> None:
        if self._on_error == "stop":
            raise RewardError(message) from cause
        self._counters[function.name].errors += len(concerned)
        logger.warning("skipped: %s", message, exc_info=cause)

    def _rewarded(self, trajectory: Trajectory, parts: Mapping[str, float | None]) -> Trajectory:
        applying = [f.weight * part for f in self.functions if (part := parts[f.name]) is not None]
        if not applying:
            self._unscored += 1
            if self._unscored == 1:
                logger.warning(
                    "no reward function applies to a response to prompt %s; its reward is 0.0 (counted in "
                    "reward/unscored). At least one function should return a number for every response.",
                    trajectory.prompt.id,
                )
        reward = float(sum(applying))
        self._rewards.append(reward)
        return dataclasses.replace(trajectory, reward=reward, reward_parts=parts)

    def _count_groups(self, rewarded: Sequence[Trajectory]) -> None:
        groups: dict[int, list[float | None]] = defaultdict(list)
        for trajectory in rewarded:
            groups[trajectory.group].append(trajectory.reward)
        for rewards in groups.values():
            if len(rewards) > 1:
                self._groups += 1
                self._equal_groups += len(set(rewards)) == 1

    def _offered(
        self, function: RewardFunction, trajectories: Sequence[Trajectory]
    ) -> dict[str, Any]:
        """Arguments that are neither responses nor columns."""
        logged = self._counters[function.name].logged

        def log_metric(name: str, value: float) -> None:
            logged[name] = logged.get(name, Mean(0.0, 0.0)) + Mean(float(value))

        def log_extra(column: str, values: Any) -> None:
            if function.name not in self._told_of_extras:
                self._told_of_extras.add(function.name)
                logger.info(
                    "log_extra(%r) of reward function %s is not kept", column, function.name
                )

        offered: dict[str, Any] = {
            "log_metric": log_metric,
            "log_extra": log_extra,
            "trainer_state": SimpleNamespace(global_step=self.step),
        }
        if "prompt_texts" in function.named:
            offered["prompt_texts"] = [
                self._tokenizer.decode(t.prompt.token_ids, skip_special_tokens=False)
                for t in trajectories
            ]
        if "response_texts" in function.named:
            offered["response_texts"] = [t.response_text for t in trajectories]
        return offered

    def _warn_of_zeros(self) -> None:
        for name, counter in self._counters.items():
            if counter.scored:
                self._zero_steps[name] = 0 if counter.nonzero else self._zero_steps[name] + 1
            steps = self._zero_steps[name]
            if self._warning_steps and steps and steps % self._warning_steps == 0:
                logger.warning(
                    "reward function %s has said 0 to every response for %d steps. Look at the sampled completions: "
                    "is the answer in a form it understands, and is the task within reach of the model?",
                    name,
                    steps,
                )

    def _forget(self) -> None:
        self._counters = {function.name: _Counter() for function in self.functions}
        self._rewards: list[float] = []
        self._groups = self._equal_groups = self._unscored = 0


@dataclass(frozen=True, slots=True)
class _Later:
    """A place in the results of a gathered future."""

    future: "Future[list[Any]]"
    place: int

    def result(self) -> Any:
        return self.future.result()[self.place]


def _as_list(
    function: RewardFunction, answer: Any, concerned: Sequence[Trajectory]
) -> Sequence[Any]:
    """What a batch function returned, one entry a response; nobody can tell whose is whose if the number is wrong."""
    if hasattr(answer, "tolist") and getattr(answer, "ndim", 0) == 1:  # an array or a tensor
        answer = answer.tolist()
    if not isinstance(answer, (list, tuple)):
        raise RewardError(
            f"reward function {function.name} returned {_shown(answer)} for {_ids(concerned)}; a function with "
            f"`completions` returns a list of {len(concerned)} numbers or None, one for each completion"
        )
    if len(answer) != len(concerned):
        raise RewardError(
            f"reward function {function.name} returned {len(answer)} rewards for {len(concerned)} completions "
            f"({_ids(concerned)}); return one for each, None where it does not apply"
        )
    return answer


def _as_number(value: Any) -> float:
    """A finite number as a float: numbers, booleans, and one-element arrays or tensors."""
    if hasattr(value, "item") and getattr(value, "size", None) is not None:
        value = value.item() if math.prod(value.shape) == 1 else value
    if not isinstance(value, numbers.Real):
        raise ValueError(_shown(value))
    if not math.isfinite(value):
        raise ValueError(str(float(value)))
    return float(value)


def _raised(function: RewardFunction, error: Exception, concerned: Sequence[Trajectory]) -> str:
    return (
        f"reward function {function.name} raised {type(error).__name__}: {error}, for {_ids(concerned)}. "
        "Return None where it does not apply, or set reward.on_error: skip to count and log such responses."
    )


def _returned(function: RewardFunction, error: ValueError, concerned: Sequence[Trajectory]) -> str:
    return (
        f"reward function {function.name} returned {error} for {_ids(concerned)}; a reward is a finite number, or "
        "None where the function does not apply. Set reward.on_error: skip to count and log such responses."
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} (a {type(value).__name__})"


def _ids(trajectories: Sequence[Trajectory], most: int = 3) -> str:
    ids = list(dict.fromkeys(t.prompt.id for t in trajectories))
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return f"prompt{'s' * (len(ids) > 1)} {', '.join(ids[:most])}{more}"
