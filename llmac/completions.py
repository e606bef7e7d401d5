"""Sampled responses as a table to read: one Parquet file every so many steps."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch

from llmac.core.types import Credit, Finish, Messages, Rollouts


class CompletionLog:
    """Writes what the policy said, and what it got for it, to `<directory>/step_000010.parquet`.

    One row a response, of rank 0's share only: a sample of the step to look at, not a record of
    it. Columns:

        step, prompt_id, group, prompt, response, reward, reward/<function>..., finish, tokens,
        advantage

    `tokens` counts those the policy sampled; `advantage` is the mean over the tokens that enter the
    policy loss, null if there are none; `reward/<function>` is null where the function does not
    apply.

        pandas.read_parquet("runs/quickstart/completions/step_000010.parquet")
        datasets.load_dataset("parquet", data_files="runs/quickstart/completions/*.parquet")
    """

    def __init__(self, directory: Path, *, every: int, is_main: bool) -> None:
        """Nothing is written before the first `log` that is due.

        Args:
            directory: made if need be.
            every: steps between two files; 0 = never.
            is_main: False: this rank writes nothing.
        """
        self._directory = directory
        self._every = every if is_main else 0

    def log(self, step: int, rollouts: Rollouts, credit: Credit | None = None) -> Path | None:
        """Write the step's table if it is due.

        Args:
            step: number of the step.
            rollouts: its responses.
            credit: its advantages; None: the column is null.

        Returns:
            The file, complete; an older one of the same step is replaced. None: not due.
        """
        if not self._every or step % self._every:
            return None
        table = completions_table(step, rollouts, credit)
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"step_{step:06d}.parquet"
        aside = self._directory / f".{path.name}.tmp"
        try:
            with aside.open("wb") as file:
                pyarrow.parquet.write_table(table, file, compression="zstd")
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        return path


def completions_table(step: int, rollouts: Rollouts, credit: Credit | None) -> pyarrow.Table:
    """One row for each trajectory that has ended, in their order; see `CompletionLog` for the columns."""
    ended = [i for i, t in enumerate(rollouts.trajectories) if t.finish is not Finish.PAUSED]
    trajectories = [rollouts.trajectories[i] for i in ended]
    advantages = _mean_advantages(len(rollouts.trajectories), credit)
    functions = dict.fromkeys(name for t in trajectories for name in t.reward_parts)
    text, number, count = pyarrow.string(), pyarrow.float64(), pyarrow.int64()
    columns: dict[str, tuple[Sequence[Any], pyarrow.DataType]] = {
        "step": ([step] * len(trajectories), count),
        "prompt_id": ([t.prompt.id for t in trajectories], text),
        "group": ([t.group for t in trajectories], count),
        "prompt": ([prompt_text(t.prompt.source) for t in trajectories], text),
        "response": ([_valid(t.response_text) for t in trajectories], text),
        "reward": ([t.reward for t in trajectories], number),
        **{
            f"reward/{name}": ([t.reward_parts.get(name) for t in trajectories], number)
            for name in functions
        },
        "finish": ([str(t.finish) for t in trajectories], text),
        "tokens": ([sum(t.action_mask) for t in trajectories], count),
        "advantage": ([advantages[i] for i in ended], number),
    }
    return pyarrow.table({name: pyarrow.array(*column) for name, column in columns.items()})


def prompt_text(source: str | Messages) -> str:
    r"""What the user wrote: a string as it is, chat messages as `role: content` paragraphs.

    >>> prompt_text([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}])
    'user: 1+1?\n\nassistant: 2'
    """
    if isinstance(source, str):
        return _valid(source)
    return _valid("\n\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in source))


def _valid(text: str) -> str:
    # Lone surrogates (from JSON escapes) are not UTF-8; Arrow refuses the whole table for one.
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def _mean_advantages(rows: int, credit: Credit | None) -> Sequence[float | None]:
    if credit is None:
        return [None] * rows
    counts = credit.policy_mask.sum(1)
    totals = torch.where(credit.policy_mask, credit.advantages, 0.0).sum(1, dtype=torch.float64)
    means = (totals / counts).tolist()
    return [
        None if math.isnan(mean) and not count else mean
        for mean, count in zip(means, counts.tolist(), strict=True)
    ]
