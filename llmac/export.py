"""The end of a run: plain folders that transformers loads, a critic beside the policy, and the picture."""

import logging
from pathlib import Path

from peft import PeftModel
from safetensors import safe_open

from llmac.config import Recipe
from llmac.critics.bench import Shippable
from llmac.curves import plot_learning_curve
from llmac.errors import CheckpointError, ConfigError
from llmac.loop import Parts
from llmac.models.loading import LanguageModel, load_tokenizer
from llmac.runtime.saving import save_adapter, save_whole

logger = logging.getLogger(__name__)


def save_final(parts: Parts, recipe: Recipe) -> Path:
    """Write `final/` (policy, adapters merged, and tokenizer), `final/adapter`, `final/critic` and the learning curve.

    Returns:
        The folder of the policy.

    Raises:
        CheckpointError: a file that was written holds no weights.
        ConfigError: the Hub did not take the model, which is complete in `final/`.
    """
    final = parts.output / "final"
    save_policy(parts.actor.model, final, is_main=parts.runtime.is_main)
    if isinstance(parts.critic, Shippable):
        parts.critic.save_pretrained(final / "critic", policy=final)
    if parts.runtime.is_main:
        for folder in (final, final / "adapter", final / "critic"):
            if folder.exists():
                check_not_empty(folder)
        load_tokenizer(recipe.model).save_pretrained(final)
        plot_learning_curve(
            parts.output / "metrics.jsonl",
            parts.output / "learning_curve.png",
            title=f"{recipe.algorithm.name} on {Path(recipe.data.name).stem}",
        )
        if recipe.run.push_to_hub:
            _push(final, recipe.run.push_to_hub)
    parts.runtime.barrier()
    return final


def save_policy(model: LanguageModel, directory: Path, *, is_main: bool) -> None:
    """A `save_pretrained` folder of the whole model, adapters merged in; adapters also by themselves in `adapter/`."""
    save_whole(model, directory, is_main=is_main)
    if isinstance(model, PeftModel):
        save_adapter(model, directory / "adapter", is_main=is_main)


def check_not_empty(directory: Path) -> None:
    """Peers have saved adapters without a single weight for weeks; look before saying it is saved."""
    files = sorted(directory.glob("*.safetensors"))
    empty = [f"{file.name}: no tensors" for file in files if not _shapes(file)]
    empty += [
        f"{file.name}: {n}" for file in files for n, shape in _shapes(file).items() if 0 in shape
    ]
    if not files or empty:
        raise CheckpointError(
            f"{directory} was saved without weights: {empty or 'no safetensors file'}"
        )


def _shapes(file: Path) -> dict[str, list[int]]:
    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118


def _push(directory: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory)
    except Exception as error:  # no connection, no permission, no such name: each of another kind
        raise ConfigError(
            f"run.push_to_hub: {repository} could not be pushed to ({type(error).__name__}: {error}). Training is "
            f"done and the model is saved: log in (`hf auth login`), then `hf upload {repository} {directory}`"
        ) from error
    logger.info("pushed %s to %s", directory, repository)
