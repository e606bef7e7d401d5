"""What a run has left: its recipe, and the weights of a step to look at again without changing anything."""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmac.build import build
from llmac.config import Recipe, load_recipe
from llmac.config.cards import Choice, choose_algorithm
from llmac.errors import CheckpointError, ConfigError
from llmac.loop import Parts, synchronize
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


@contextlib.contextmanager
def opened(run: SavedRun, *, critic: Choice | None, seed: int) -> Iterator[Parts]:
    """The parts of a run with the weights of its moment, in trainer and engine; closed at the end of the block.

    The run is not changed: all that parts write goes to a folder that is thrown away. One process.

    Args:
        run: which, and when.
        critic: the run's own, which gets its weights from a checkpoint, or another one, which stays as it is built;
            None: no critic.
        seed: of prompts, sampling and initialisation.

    Raises:
        ConfigError: several processes were launched, or the recipe cannot be built.
        CheckpointError: the checkpoint is damaged, or does not fit the recipe.
    """
    with contextlib.ExitStack() as cleanup:
        aside = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="llmac-look-"))
        runtime = Runtime.create(seed=seed, output=None)
        cleanup.callback(runtime.close)
        if runtime.world_size > 1:
            raise ConfigError("looking at a saved run is one process; start it without a launcher")
        parts = build(_to_look_at(run, critic, aside, seed), runtime)
        for close in (parts.phases.close, parts.score.close, parts.log.close, parts.engines.close):
            cleanup.callback(close)
        if run.weights is not None and not run.is_final:
            roles: dict[str, Saveable] = {"policy": parts.actor}
            if critic is run.recipe.critic and isinstance(parts.critic, Saveable):
                roles["critic"] = parts.critic
            _restore(run.weights, roles, runtime)
        synchronize(parts, version=run.step, probe=True)
        yield parts


def _to_look_at(run: SavedRun, critic: Choice | None, aside: str, seed: int) -> Recipe:
    """The run's recipe as far as its policy, its prompts and its rewards go."""
    recipe = run.recipe
    changes: dict[str, Any] = {
        # The plainest card that takes a critic: no reference policy, no stored rollouts to load.
        "algorithm": choose_algorithm("ppo"),
        "critic": critic,
        "run": recipe.run.model_copy(
            update={"output": aside, "resume": "auto", "trackers": (), "seed": seed}
        ),
    }
    if run.is_final:
        saved = {"name": str(run.weights), "tokenizer": None, "revision": None, "lora": None}
        changes["model"] = recipe.model.model_copy(update=saved)
    return recipe.model_copy(update=changes)


def _restore(checkpoint: Path, roles: Mapping[str, Saveable], runtime: Runtime) -> None:
    """Load the given roles of a checkpoint, and no others; it is verified and not changed."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        saved, fingerprint = list(manifest["roles"]), str(manifest["fingerprint"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{checkpoint} has no readable manifest.json: {error}") from error
    # Seen through a store of its own: the run's would be claimed, and may still be written by the run.
    with tempfile.TemporaryDirectory(prefix="llmac-look-") as aside:
        store = CheckpointStore(aside, keep_last=1, runtime=runtime, fingerprint=fingerprint)
        view = Path(aside) / checkpoint.name
        view.symlink_to(checkpoint.resolve())
        try:
            store.restore_latest({**{role: _LeftAlone() for role in saved}, **roles})
        except CheckpointError as error:
            message = str(error).replace(str(view), str(checkpoint))
            raise CheckpointError(message.replace(aside, str(checkpoint.parent))) from error


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
