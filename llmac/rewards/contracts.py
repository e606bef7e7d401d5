"""The two contracts of a reward function, told apart by parameter names.

Batch contract (TRL's: a function written for its GRPOTrainer runs unchanged), recognised by `completions` or
`completion_ids`; called once with lists:

    def reward(prompts, completions, **columns) -> list[float | None]

One-sample contract, recognised by `response`; called once a response:

    def reward(prompt, response, **columns) -> float | None

Either may be `async`. Dataset columns arrive by name: a function gets those it names, and all of them if it has
`**columns`. None means "does not apply to this response". A prompt is a string, or a list of chat messages if the
dataset had messages; then `completions` are lists with one assistant message, while `response` is always a string.
A function may also name `response_ids` and `finish` ("stop" or "length"; one-sample), `trainer_state` (its
`global_step`), and `log_metric(name, number)`, whose mean becomes the metric `reward/<function>/logged/<name>`.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmac.core.types import Trajectory
from llmac.errors import ConfigError, DataError, did_you_mean
from llmac.rewards.adapters import openrlhf, verl

Adapter = Literal["auto", "trl", "one", "verl", "openrlhf"]

_TRL_EXTRAS = frozenset({"trainer_state", "log_metric", "log_extra"})
_TEXTS = frozenset({"prompt_texts", "response_texts"})
"""The prompt as the model saw it (chat template applied, special tokens kept) and the response as a string."""
_BATCH_WORDS = frozenset({"prompts", "completions", "completion_ids"}) | _TRL_EXTRAS | _TEXTS
_ONE_WORDS = frozenset({"prompt", "response", "response_ids", "finish", "log_metric"})
_COMMON_NAMES = frozenset({"reward", "rewards", "reward_fn", "reward_func", "reward_function"}) | {
    "compute_score",
    "score",
    "<lambda>",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSpec:
    """A reward function as the user declares it."""

    function: Callable[..., Any]
    name: str | None = None
    """In metrics and messages. None: the function's own name, or its file's when that is a word like `reward`."""
    weight: float = 1.0
    """Factor of this function in the sum."""
    adapter: Adapter = "auto"
    """`auto` tells the contract from parameter names; `verl` and `openrlhf` translate a foreign function."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunction:
    """A reward function whose contract is known."""

    function: Callable[..., Any]
    name: str
    weight: float
    batched: bool
    named: frozenset[str]
    """Parameters passed by name."""
    required: frozenset[str]
    """Dataset columns without which it cannot be called."""
    takes_any: bool
    """It has `**kwargs`, so it gets every column."""
    is_async: bool

    def check_columns(self, columns: Collection[str]) -> None:
        """Raise unless the dataset has every column this function requires."""
        missing = sorted(self.required - set(columns))
        if missing:
            raise DataError(
                f"reward function {self.name} requires the column {missing[0]!r}, which the dataset lacks."
                f"{did_you_mean(missing[0], sorted(columns))} Rename one with data.columns: "
                f"{{{missing[0]}: <column>}}, or give the parameter a default."
            )

    def calls(
        self, trajectories: Sequence[Trajectory], offered: Mapping[str, Any]
    ) -> list[tuple[list[int], dict[str, Any]]]:
        """(indices of the trajectories it is about, keyword arguments) of each call to make."""
        if self.batched:
            return [(list(range(len(trajectories))), self._batch_arguments(trajectories, offered))]
        return [([i], self._one_argument(t, offered)) for i, t in enumerate(trajectories)]

    def _batch_arguments(
        self, trajectories: Sequence[Trajectory], offered: Mapping[str, Any]
    ) -> dict[str, Any]:
        columns = dict.fromkeys(name for t in trajectories for name in t.prompt.columns)
        arguments: dict[str, Any] = {
            name: [t.prompt.columns.get(name) for t in trajectories]
            for name in columns
            if self._wants(name)
        }
        if self._wants("prompts"):
            arguments["prompts"] = [t.prompt.source for t in trajectories]
        if self._wants("completions"):
            arguments["completions"] = [_completion(t) for t in trajectories]
        if self._wants("completion_ids"):
            arguments["completion_ids"] = [list(t.response_ids) for t in trajectories]
        for name in (_TRL_EXTRAS if self.takes_any else _TRL_EXTRAS & self.named) | (
            _TEXTS & self.named
        ):
            arguments[name] = offered[name]
        return arguments

    def _one_argument(self, trajectory: Trajectory, offered: Mapping[str, Any]) -> dict[str, Any]:
        arguments = {
            **trajectory.prompt.columns,
            "prompt": trajectory.prompt.source,
            "response": trajectory.response_text,
            "response_ids": list(trajectory.response_ids),
            "finish": trajectory.finish.value,
        }
        wanted = {name: value for name, value in arguments.items() if self._wants(name)}
        if "log_metric" in self.named:
            wanted["log_metric"] = offered["log_metric"]
        return wanted

    def _wants(self, name: str) -> bool:
        return self.takes_any or name in self.named


def understand(spec: RewardSpec) -> RewardFunction:
    """Decide which contract the function follows.

    Raises:
        ConfigError: it is not callable, or its parameters fit neither contract.
    """
    function = spec.function
    if not callable(function):
        raise ConfigError(
            f"reward {spec.name or function!r} is a {type(function).__name__}, not a function"
        )
    name = spec.name or _own_name(function)
    if spec.adapter == "verl":
        function = verl(function)
    elif spec.adapter == "openrlhf":
        function = openrlhf(function)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"reward function {name} has no readable signature; wrap it in a Python function"
        ) from error
    _check_positional_only(name, parameters)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    by_name = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    named = frozenset(p.name for p in by_name)
    batched = _is_batched(name, spec.adapter, named, takes_any)
    known = _BATCH_WORDS if batched else _ONE_WORDS
    return RewardFunction(
        function=function,
        name=name,
        weight=float(spec.weight),
        batched=batched,
        named=named,
        required=frozenset(p.name for p in by_name if p.default is p.empty) - known,
        takes_any=takes_any,
        is_async=inspect.iscoroutinefunction(function)
        or inspect.iscoroutinefunction(type(function).__call__),
    )


def _is_batched(name: str, adapter: Adapter, named: frozenset[str], takes_any: bool) -> bool:
    if adapter in ("trl", "openrlhf"):
        return True
    if adapter in ("one", "verl"):
        return False
    if named & {"completions", "completion_ids"}:
        return True
    if "response" in named:
        return False
    foreign = (
        "\nIt looks like verl's compute_score: declare it with adapter: verl."
        if "solution_str" in named
        else "\nIt looks like OpenRLHF's reward_func: declare it with adapter: openrlhf."
        if "queries" in named
        else ""
    )
    found = ", ".join(sorted(named) + ["**kwargs"] * takes_any) or "no parameters"
    raise ConfigError(
        f"reward function {name} has the parameters ({found}), which fit neither contract:\n"
        "  def reward(prompts, completions, **columns) -> list[float | None]    # a batch, as TRL calls it\n"
        "  def reward(prompt, response, **columns) -> float | None              # one response\n"
        f"Parameters are passed by name, so the names matter.{foreign}"
    )


def _check_positional_only(name: str, parameters: Collection[inspect.Parameter]) -> None:
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ConfigError(
                f"reward function {name} takes {parameter.name!r} by position only; arguments are passed by name. "
                "Remove the / from its signature."
            )


def _own_name(function: Callable[..., Any]) -> str:
    inner = getattr(function, "func", function)  # functools.partial
    name = getattr(inner, "__name__", None) or type(inner).__name__
    file = getattr(getattr(inner, "__code__", None), "co_filename", "")
    if name in _COMMON_NAMES and file.endswith(".py"):
        return Path(file).stem
    return name


def _completion(trajectory: Trajectory) -> Any:
    if isinstance(trajectory.prompt.source, str):
        return trajectory.response_text
    return [{"role": "assistant", "content": trajectory.response_text}]
