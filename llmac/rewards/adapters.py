"""Reward functions written for other trainers, turned into this project's contracts by declaration.

reward: {functions: [{path: my_rewards.py:compute_score, adapter: verl}]}
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmac.errors import RewardError

LogMetric = Callable[[str, float], None]


def verl(compute_score: Callable[..., Any]) -> Callable[..., Any]:
    """A verl `compute_score(data_source, solution_str, ground_truth, extra_info)` under the one-sample contract.

    `ground_truth` is the dataset column of that name (verl's `reward_model.ground_truth` is mapped to it on loading);
    `data_source` and `extra_info` are columns too, None where the dataset has none. The function may be async, and
    may return a number or a dict with `score`; other numbers in the dict become metrics.

    >>> score = verl(lambda data_source, solution_str, ground_truth, extra_info=None: solution_str == ground_truth)
    >>> score(prompt="1 + 1 =", response="2", ground_truth="2", log_metric=None)
    True
    """

    def call(response: str, ground_truth: Any, columns: Mapping[str, Any]) -> Any:
        return compute_score(
            data_source=columns.get("data_source"),
            solution_str=response,
            ground_truth=ground_truth,
            extra_info=columns.get("extra_info"),
        )

    if _is_async(compute_score):

        async def score_later(
            prompt: Any, response: str, ground_truth: Any, log_metric: LogMetric, **columns: Any
        ) -> Any:
            return _verl_score(await call(response, ground_truth, columns), log_metric)

        return score_later

    def score(
        prompt: Any, response: str, ground_truth: Any, log_metric: LogMetric, **columns: Any
    ) -> Any:
        return _verl_score(call(response, ground_truth, columns), log_metric)

    return score


def openrlhf(reward_func: Callable[..., Any]) -> Callable[..., Any]:
    """An OpenRLHF `reward_func(queries, prompts, labels, **kwargs)` under the batch contract.

    `prompts` are the prompts as the model saw them (chat template applied, special tokens kept), `queries` the same
    followed by the response, `labels` the dataset column `label`. The function may return a tensor, a list, or a dict
    with `rewards`; the means of `extra_logs` become metrics.

    >>> longer = openrlhf(lambda queries, prompts, labels: [len(q) - len(p) for q, p in zip(queries, prompts)])
    >>> longer(prompt_texts=["hi "], response_texts=["there"], label=[""], log_metric=None)
    [5]
    """

    def call(prompt_texts: list[str], response_texts: list[str], label: list[Any]) -> Any:
        queries = [p + r for p, r in zip(prompt_texts, response_texts, strict=True)]
        return reward_func(queries=queries, prompts=prompt_texts, labels=label)

    if _is_async(reward_func):

        async def score_later(
            prompt_texts: list[str],
            response_texts: list[str],
            label: list[Any],
            log_metric: LogMetric,
        ) -> Any:
            return _openrlhf_rewards(await call(prompt_texts, response_texts, label), log_metric)

        return score_later

    def score(
        prompt_texts: list[str], response_texts: list[str], label: list[Any], log_metric: LogMetric
    ) -> Any:
        return _openrlhf_rewards(call(prompt_texts, response_texts, label), log_metric)

    return score


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - a callable object with an async __call__
    )


def _verl_score(returned: Any, log_metric: LogMetric) -> Any:
    if not isinstance(returned, Mapping):
        return returned
    if "score" not in returned:
        raise RewardError(
            f"a verl compute_score returned a dict without 'score'; it has: {', '.join(map(str, returned))}"
        )
    for name, number in returned.items():
        if name != "score" and isinstance(number, (int, float)):
            log_metric(str(name), float(number))
    return returned["score"]


def _openrlhf_rewards(returned: Any, log_metric: LogMetric) -> Any:
    if isinstance(returned, Mapping):
        if "rewards" not in returned:
            raise RewardError(
                "an OpenRLHF reward_func returned a dict without 'rewards'; "
                f"it has: {', '.join(map(str, returned))}"
            )
        for name, values in (returned.get("extra_logs") or {}).items():
            for value in _flat(values):
                log_metric(str(name), float(value))
        returned = returned["rewards"]
    return _flat(returned)


def _flat(values: Any) -> Sequence[Any]:
    """Tensors and arrays of any shape as a flat list; lists and numbers in a list as they are."""
    if hasattr(values, "tolist"):  # torch and numpy alike, without importing either here
        return values.reshape(-1).tolist()
    return values if isinstance(values, (list, tuple)) else [values]
