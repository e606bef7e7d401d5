"""What a run has left: its recipe, and the weights of a step to look at again without changing anything."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmac.config import Recipe, load_recipe
from llmac.errors import CheckpointError, ConfigError
from llmac.runtime.checkpoint import CheckpointStore, Saveable
from llmac.runtime.context import Runtime

Step = int | Literal["final"] | None
"""A checkpoint's step, the `final/` folder, or None: the newest checkpoint, else `final/`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRun:
    """A run's recipe and where the weights of one of its moments are."""

    recipe: Recipe
    folder: Path
    """The run's, where it is now; `recipe.run.output` is where it was trained."""
    weights: Path | None
    """`checkpoints/step-00000050` or `final`; None: nothing was trained yet, the models are as the recipe starts."""

    @property
    def is_final(self) -> bool:
        """Whether the weights are those of the `final/` folder, which transformers loads."""
        return self.weights is not None and self.weights.name == "final"

    @property
    def step(self) -> int:
        """Steps done; 0 where they are not known (`final/`) or none."""
        if self.weights is None or self.is_final:
            return 0
        return _number(self.weights)

    @property
    def moment(self) -> str:
        """`step-00000050`, `final` or `start`."""
        return "start" if self.weights is None else self.weights.name


def find_run(source: str | Path, overrides: Sequence[str] = (), *, step: Step = None) -> SavedRun:
    """The run in a folder, or of a recipe.

    Args:
        source: a run's folder, whose `config.yaml` is read; or a recipe's YAML file, whose `run.output` is looked
            into, and whose models are taken as they start if there is nothing.
        overrides: `key.sub=value`, over the recipe.
        step: which weights.

    Raises:
        ConfigError: there is no run or recipe at that place, or the recipe is wrong.
        CheckpointError: the run has no such checkpoint.
    """
    source = Path(source).expanduser()
    if not source.is_dir():
        recipe = load_recipe(source, overrides)
        folder = Path(recipe.run.output)
        weights = _weights(folder, step, needed=step is not None)
        return SavedRun(recipe=recipe, folder=folder, weights=weights)
    if not (source / "config.yaml").is_file():
        above = next((p for p in source.resolve().parents if (p / "config.yaml").is_file()), None)
        hint = f"; did you mean {above}?" if above else ". Give a run's folder or a recipe's file"
        raise ConfigError(f"{source} has no config.yaml, so it is not the folder of a run{hint}")
    recipe = load_recipe(source / "config.yaml", overrides)
    return SavedRun(recipe=recipe, folder=source, weights=_weights(source, step, needed=True))


def restore(run: SavedRun, roles: Mapping[str, Saveable], runtime: Runtime) -> None:
    """Load the given roles of the run's checkpoint, and no others; the checkpoint is verified and not changed.

    Args:
        run: its `weights` are a checkpoint.
        roles: what to load, by role.
        runtime: the process group.

    Raises:
        CheckpointError: it is damaged, lacks a role, or a role does not fit.
    """
    assert run.weights is not None
    assert not run.is_final
    try:
        manifest = json.loads((run.weights / "manifest.json").read_text(encoding="utf-8"))
        saved, fingerprint = list(manifest["roles"]), str(manifest["fingerprint"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{run.weights} has no readable manifest.json: {error}") from error
    # Seen through a store of its own: the run's would be claimed, and may still be written by the run.
    with tempfile.TemporaryDirectory(prefix="llmac-look-") as aside:
        store = CheckpointStore(aside, keep_last=1, runtime=runtime, fingerprint=fingerprint)
        (Path(aside) / run.weights.name).symlink_to(run.weights.resolve())
        store.restore_latest({**{role: _LeftAlone() for role in saved}, **roles})


class _LeftAlone:
    """A role of a checkpoint that nobody wants."""

    def save(self, directory: Path) -> None:
        """Nothing is ever saved."""

    def load(self, directory: Path) -> None:
        """What was saved is left where it is."""


def _weights(folder: Path, step: Step, *, needed: bool) -> Path | None:
    final = folder / "final"
    found = [path for path in (folder / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    checkpoints = sorted(found, key=_number)
    steps = ", ".join(str(_number(path)) for path in checkpoints)
    if isinstance(step, int):
        chosen = next((path for path in checkpoints if _number(path) == step), None)
        if chosen is None:
            has = f"it has those of the steps {steps}" if steps else "it has none"
            raise CheckpointError(f"{folder} has no checkpoint of step {step}; {has}")
        return chosen
    if step is None and checkpoints:
        return checkpoints[-1]
    if (final / "config.json").is_file():
        return final
    if needed:
        what = "no final/ model" if step else "neither a checkpoint nor a final/ model"
        raise CheckpointError(
            f"{folder} has {what}; let the run get to its first checkpoint (run.save_every)"
            + (f", or take one of the steps {steps}" if steps else "")
        )
    return None


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
