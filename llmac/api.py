"""Training from Python: the same recipe as in a YAML file, with callables and rows passed directly."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmac.build import build
from llmac.config import Recipe, load_recipe, verify
from llmac.export import save_final
from llmac.loop import train as run_loop
from llmac.runtime.context import Runtime
from llmac.runtime.liveness import Liveness

RewardArgument = str | Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Where a finished run left what."""

    output: Path
    """The run directory."""
    model: Path
    """A folder `AutoModelForCausalLM.from_pretrained` loads."""
    metrics: Mapping[str, float]
    """The last step's numbers."""


def train(
    model: str,
    *,
    algorithm: str | Mapping[str, Any],
    reward: RewardArgument | Sequence[RewardArgument | Mapping[str, Any]],
    dataset: Any,
    eval_dataset: Any = None,
    steps: int = 100,
    output: str | Path = "runs/llmac",
    **sections: Mapping[str, Any],
) -> Result:
    """Improve a model by reinforcement learning.

        import llmac

        def shorter(prompt, response):
            return 1.0 / (1 + len(response))

        llmac.train("Qwen/Qwen2.5-0.5B-Instruct", algorithm="grpo", reward=shorter, dataset="trl-lib/tldr")

    Args:
        model: Hub id or folder, as `from_pretrained` takes it.
        algorithm: name of a card (`llmac algorithms` lists them), or a mapping `{"name": ..., <its fields>}`.
        reward: a function, `"file.py:function"`, or several; either contract (see reward_fns/README.md).
        dataset: Hub id or path, or rows in memory: a `datasets.Dataset` or a list of dicts.
        eval_dataset: held-out rows or their name; None: no evaluation.
        steps: training steps.
        output: run directory; a run that stopped there continues.
        **sections: further recipe sections as mappings: `actor={"lr": 1e-6}`, `rollout={"engine": "vllm"}`,
            `model`'s other fields as `model_options`, `data`, `evaluation`, `critic`, `run`. Same keys as in YAML.

    Returns:
        Where things are.

    Raises:
        ConfigError: a key, a value or a combination that cannot work, before any model is loaded.
    """
    data = dict(sections.pop("data", {}))
    evaluation = dict(sections.pop("evaluation", {}))
    rows, data["name"] = _rows(dataset)
    held_out_rows = None
    if eval_dataset is not None:
        held_out_rows, name = _rows(eval_dataset)
        evaluation["data"] = {**data, "limit": None, **evaluation.get("data", {}), "name": name}
    recipe = load_recipe(
        {
            "model": {"name": str(model), **sections.pop("model_options", {})},
            "data": data,
            "reward": reward,
            "algorithm": {"name": algorithm} if isinstance(algorithm, str) else dict(algorithm),
            "run": {"steps": steps, "output": str(output), **sections.pop("run", {})},
            **({"evaluation": evaluation} if evaluation else {}),
            **sections,
        }
    )
    return run(recipe, rows=rows, held_out_rows=held_out_rows)


def run(recipe: Recipe, *, rows: Any = None, held_out_rows: Any = None) -> Result:
    """Build, train, save the final model, and let everything go again."""
    verify(recipe)
    with contextlib.ExitStack() as cleanup:
        runtime = Runtime.create(seed=recipe.run.seed, output=Path(recipe.run.output))
        liveness = Liveness.start(runtime)
        cleanup.callback(liveness.close)  # after the runtime, which waits for the other ranks
        cleanup.callback(runtime.close)
        with liveness.reporting():
            parts = build(recipe, runtime, rows=rows, held_out_rows=held_out_rows)
            parts.phases.announce = liveness.doing
            parts.phases.last_words = liveness.farewell
            for close in (
                parts.phases.close,
                parts.score.close,
                parts.log.close,
                parts.engines.close,
            ):
                cleanup.callback(close)
            run_loop(recipe.run, parts)
            model = save_final(parts, recipe)
            return Result(output=parts.output, model=model, metrics=parts.log.latest)


def _rows(dataset: Any) -> tuple[Any, str]:
    """(rows in memory or None, name for the recipe)."""
    if isinstance(dataset, str | Path):
        return None, str(dataset)
    return dataset, "<rows passed from Python>"
