"""One run of `critics.py`: train, then judge the critic at some steps of the run against Monte Carlo.

python scripts/benchmarks/critics_job.py JOB.json RESULT.json
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from llmac.api import run
from llmac.config import load_recipe
from llmac.eval_critic import Truth, eval_critic


def main(job: dict[str, Any]) -> dict[str, Any]:
    began, used = time.monotonic(), time.process_time()
    recipe = load_recipe(Path(job["recipe"]), job["overrides"])
    run(recipe)
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - used
    folder = Path(recipe.run.output)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = {
        line["step"]: line["eval/held_out/pass@1"]
        for line in lines
        if "eval/held_out/pass@1" in line
    }
    truth = Truth(states=job["states"], rollouts=job["rollouts"], siblings=1)
    moments = []
    for step in job["moments"] if recipe.critic is not None else []:
        found = eval_critic(folder, step=step, truth=truth, output=folder / f"critic-{step}")
        moments.append(
            {
                "step": step,
                "values": list(found.report.values),
                "truth": found.states.value.tolist(),
                "depth": found.states.depth.tolist(),
                "noise": found.report.noise,
            }
        )
    return {
        "held_out": held_out,
        "tokens": sum(line.get("rollout/tokens", 0.0) for line in lines),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "moments": moments,
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
