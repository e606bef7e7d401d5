"""One run of `credit.py`: train, and say what was reached after how many sampled tokens and seconds of training.

python scripts/benchmarks/credit_job.py JOB.json RESULT.json
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmac.build import build
from llmac.config import load_recipe, verify
from llmac.core.measures import Measure, Sum
from llmac.loop import train as run_loop
from llmac.runtime.context import Runtime
from llmac.runtime.phases import Phases

NOT_TRAINING = {"start", "eval", "log", "save", "step"}
"""Phases whose time is not counted."""
ACCURACY = "eval/held_out/pass@1"


class ClockedPhases(Phases):
    """Also counts the CPU seconds of each phase: another program on the same core does not change them."""

    def __init__(self) -> None:
        super().__init__(rank=0, watchdog_seconds=0)
        self._cpu: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun = time.process_time()
        with super().__call__(name):
            yield
        self._cpu[name] = self._cpu.get(name, 0.0) + time.process_time() - begun

    def drain(self) -> dict[str, Measure]:
        cpu, self._cpu = self._cpu, {}
        return {**super().drain(), **{f"cpu_s/{name}": Sum(spent) for name, spent in cpu.items()}}


def main(job: dict[str, Any]) -> dict[str, Any]:
    recipe = load_recipe(Path(job["recipe"]), job["overrides"])
    verify(recipe)
    output = Path(recipe.run.output)
    with contextlib.ExitStack() as cleanup:
        runtime = Runtime.create(seed=recipe.run.seed, output=output)
        cleanup.callback(runtime.close)
        parts = dataclasses.replace(build(recipe, runtime), phases=ClockedPhases())
        for close in (parts.score.close, parts.log.close, parts.engines.close):
            cleanup.callback(close)
        run_loop(recipe.run, parts)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {"curve": curve(lines), "watched": watched(lines, job.get("watch", ()))}


def curve(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """One point for each evaluation: step, held-out accuracy, and what training had cost until then."""
    points: list[dict[str, float]] = []
    tokens = seconds = cpu_seconds = 0.0
    for line in lines:
        tokens += line.get("rollout/sampled_tokens", 0.0)
        seconds += spent(line, "timing_s/")
        cpu_seconds += spent(line, "cpu_s/")
        if ACCURACY in line:
            point = {"step": line["step"], "accuracy": line[ACCURACY], "tokens": tokens}
            points.append({**point, "seconds": seconds, "cpu_seconds": cpu_seconds})
    return points


def spent(line: Mapping[str, Any], clock: str) -> float:
    """Seconds of the phases of training in one step."""
    return sum(
        value
        for name, value in line.items()
        if name.startswith(clock) and name.removeprefix(clock) not in NOT_TRAINING
    )


def watched(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[float]]:
    """Some metrics of each step in which they are known."""
    return {name: [line[name] for line in lines if name in line] for name in names}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
