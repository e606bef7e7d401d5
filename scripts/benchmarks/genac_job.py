"""One piece of work of `genac.py` in a process of its own.

python scripts/benchmarks/genac_job.py JOB.json RESULT.json
"""

import dataclasses
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from credit_job import ClockedPhases, curve

from llmac.build import build
from llmac.config import load_recipe, verify
from llmac.critics.generative import GenerativeConfig
from llmac.critics.generative_critic import SETTINGS_FILE
from llmac.eval_critic import Truth, eval_critic
from llmac.loop import train as run_loop
from llmac.runtime.context import Runtime
from llmac.sample_rollouts import sample_rollouts
from llmac.value_pretrain import Pretraining, value_pretrain

LENGTHS = 6, 9
"""Steps of the sums that critics learn from, and of the longer ones. The policy has learnt both, and those between."""
CONTEXT_TOKENS, POLICY_STEPS = 160, 1000
TRAIN, HELD_OUT = 8192, 256


def start(job: dict[str, Any]) -> dict[str, Any]:
    """A policy that can do short and long sums, prompts of short ones to learn from, and of both to be judged on."""
    sys.path.insert(0, "recipes")
    import quickstart

    folder = Path(job["folder"])
    torch.manual_seed(0)
    task = dataclasses.replace(quickstart.SIX_STEPS, steps=LENGTHS, context_tokens=CONTEXT_TOKENS)
    tokenizer, model = quickstart.make_tokenizer(task), quickstart.make_model(task)
    quickstart.warm_up(model, tokenizer, random.Random(0), steps=POLICY_STEPS, task=task)
    model.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    short, long = (dataclasses.replace(task, steps=steps) for steps in LENGTHS)
    rng = random.Random(1)
    sums = quickstart.distinct_sums(rng, HELD_OUT + TRAIN, short)
    quickstart.write_prompts(folder / "held_out.jsonl", sums[:HELD_OUT])
    quickstart.write_prompts(folder / "train.jsonl", sums[HELD_OUT:])
    longer = quickstart.distinct_sums(rng, HELD_OUT, long)
    quickstart.write_prompts(folder / "longer.jsonl", longer)
    return {}


def rollouts(job: dict[str, Any]) -> dict[str, Any]:
    """Responses of the policy for critics to learn from."""
    found = sample_rollouts(recipe_of(job), Path(job["output"]), responses=job["responses"])
    return {"success_rate": found.mean_reward}


def tell(job: dict[str, Any]) -> dict[str, Any]:
    """Leave with a critic that has only seen traces how good the policy is."""
    kept = {**GenerativeConfig().asking(), "context": {"success_rate": job["success_rate"]}}
    (Path(job["folder"]) / SETTINGS_FILE).write_text(json.dumps(kept))
    return {}


def pretrain(job: dict[str, Any]) -> dict[str, Any]:
    """A head on a language model, from those."""
    found = value_pretrain(
        recipe_of(job),
        Path(job["rollouts"]),
        Path(job["output"]),
        Pretraining(epochs=job["epochs"]),
    )
    return {"epoch": found.epoch, "squared_error": found.held_out["held_out/all/squared_error"]}


def judge(job: dict[str, Any]) -> dict[str, Any]:
    """Critics, by name, on the same states; these are sampled by the first and kept in a file."""
    states = Path(job["states"])
    found: dict[str, Any] = {}
    for number, (name, critic) in enumerate(job["critics"].items()):
        kept = states.exists()
        examined = eval_critic(
            job["recipe"],
            job["overrides"],
            critic=critic,
            truth=None if kept else Truth(states=job["count"], rollouts=job["rollouts"]),
            states_from=states if kept else None,
            save_states=None if kept else states,
            output=Path(job["folder"]) / f"report-{number}",
            seed=job["seed"],
        )
        scores = examined.report.overall.scores
        found[name] = {
            "values": list(examined.report.values),
            "truth": examined.states.value.tolist(),
            "noise": examined.report.noise,
            **{key: scores[key].value for key in ("rmse", "auc", "bias", "explained_variance")},
        }
    return {"judged": found}


def learn(job: dict[str, Any]) -> dict[str, Any]:
    """A run, with the CPU seconds of each phase of its steps."""
    recipe = recipe_of(job)
    verify(recipe)
    output = Path(recipe.run.output)
    runtime = Runtime.create(seed=recipe.run.seed, output=output)
    parts = dataclasses.replace(build(recipe, runtime), phases=ClockedPhases())
    try:
        run_loop(recipe.run, parts)
    finally:
        for close in (parts.engines.close, parts.log.close, parts.score.close, runtime.close):
            close()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {"curve": curve(lines), "watched": steps_of(lines, job["watch"])}


def recipe_of(job: dict[str, Any]) -> Any:
    """What the job is about."""
    return load_recipe(Path(job["recipe"]), job["overrides"])


def steps_of(lines: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, list[float]]:
    """Metrics of each step whose names begin so."""
    known = sorted({key for line in lines for key in line if key.startswith(tuple(names))})
    return {name: [line[name] for line in lines if name in line] for name in known}


DOES = {
    "start": start,
    "rollouts": rollouts,
    "tell": tell,
    "pretrain": pretrain,
    "judge": judge,
    "learn": learn,
}

if __name__ == "__main__":
    wanted = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(DOES[wanted["do"]](wanted)))
