"""The quickstart's GRPO recipe without evaluation; `against_trl.py` runs it beside `trl_job.py`.

python scripts/benchmarks/llmac_job.py START STEPS SEED OUTPUT RESULT.json
"""

import json
import sys
from pathlib import Path

import yaml
from clocked_reward import calls, final_number_is_right

from llmac.api import run
from llmac.config import load_recipe


def main(start: Path, steps: int, seed: int, output: Path, result: Path) -> None:
    recipe = yaml.safe_load(Path("recipes/quickstart_grpo.yaml").read_text())
    recipe["reward"] = final_number_is_right
    overrides = {
        "model.name": start / "policy",
        "data.name": start / "train.jsonl",
        "evaluation": "null",
        "run.steps": steps,
        "run.seed": seed,
        "run.output": output,
    }
    run(load_recipe(recipe, [f"{key}={value}" for key, value in overrides.items()]))
    result.write_text(json.dumps(calls))


if __name__ == "__main__":
    main(
        Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5])
    )
