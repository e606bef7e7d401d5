"""What a recipe names outside itself, files, folders and functions, before anything heavy loads."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from llmac.config.effects import data_sections
from llmac.config.schema import DataConfig, Recipe, RewardFunctionConfig
from llmac.config.traits import partner_of, traits_of
from llmac.config.words import closest
from llmac.errors import ConfigError

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".gz")


def verify(recipe: Recipe) -> None:
    """Refuse a recipe whose reward functions, files or output folder are not usable. Loads no model and no data.

    Raises:
        ConfigError: all findings together.
    """
    problems: list[str] = []
    for check in (check_output, check_models, check_cards, check_data_paths, check_rewards):
        try:
            check(recipe)
        except ConfigError as error:
            problems += str(error).split("\n") if len(problems) else [str(error)]
    if problems:
        raise ConfigError("\n".join(problems))


def check_output(recipe: Recipe) -> str:
    """The output folder exists and takes files, or can be made."""
    output = Path(recipe.run.output).expanduser()
    existing = output
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"run.output: {output} cannot be made, because {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"run.output: {output} cannot be written, because {existing} is read-only for this user"
        )
    return f"{output} is writable" if output.exists() else f"{output} can be made"


def check_models(recipe: Recipe) -> str:
    """Names that look like local folders are model folders; the Hub is not asked."""
    for key, name in _model_names(recipe):
        path = Path(name).expanduser()
        if path.is_dir():
            if not any(
                (path / file).exists()
                for file in ("config.json", "adapter_config.json", "tokenizer.json")
            ):
                raise ConfigError(
                    f"{key}: {name} is a folder without config.json; is it a saved model?"
                )
        elif path.is_file():
            raise ConfigError(f"{key}: {name} is a file; give the folder it is in, or a Hub id")
        elif looks_local(name):
            raise ConfigError(f"{key}: there is no folder {name} (looked in {Path.cwd()})")
    return "local model folders exist"


def check_cards(recipe: Recipe) -> str:
    """What algorithm and critic start from exists, where its name looks local: stored responses, weights."""
    for room, choice in (("algorithm", recipe.algorithm), ("critic", recipe.critic)):
        for key in ("rollouts", "init", "embedding"):
            name = getattr(choice and choice.settings, key, None)  # cards differ in fields
            if name and looks_local(name) and not Path(name).expanduser().exists():
                raise ConfigError(f"{room}.{key}: there is no {name} (looked in {Path.cwd()})")
    return "what algorithm and critic start from exists"


def check_data_paths(recipe: Recipe) -> str:
    """Names that look like local files or folders exist; the Hub is not asked."""
    for section, data in data_sections(recipe):
        path = Path(data.name).expanduser()
        if path.exists() or not looks_local(data.name):
            continue
        near = (
            closest(path.name, [p.name for p in path.parent.iterdir()])
            if path.parent.is_dir()
            else None
        )
        hint = f" Did you mean {path.parent / near}?" if near else ""
        raise ConfigError(
            f"{section}.name: there is no file or folder {data.name} (looked in {Path.cwd()}).{hint}"
        )
    return "local data files exist"


def check_rewards(recipe: Recipe) -> str:
    """Every reward function exists and follows a known contract; reward models are not loaded."""
    return "; ".join(
        [
            detail
            for index, entry in enumerate(recipe.reward.functions)
            for detail in _reward(index, entry)
        ]
    )


def looks_local(name: str) -> bool:
    """Whether a name can only be meant as a path on this machine."""
    return name.startswith((".", "/", "~")) or name.endswith(DATA_SUFFIXES) or name.count("/") > 1


def is_local(data: DataConfig) -> bool:
    """Whether the dataset is on this machine."""
    return Path(data.name).expanduser().exists()


def _model_names(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "model.name", recipe.model.name
    if recipe.model.tokenizer is not None:
        yield "model.tokenizer", recipe.model.tokenizer
    if recipe.model.reference is not None:
        yield "model.reference", recipe.model.reference
    if (partner := partner_of(recipe)) is not None:
        yield "algorithm.partner_model", partner
    if recipe.critic is not None and traits_of(recipe.critic).engine is not None:
        init = recipe.critic.settings.init
        yield "critic.init", recipe.model.name if init == "policy" else init
    for index, entry in enumerate(recipe.reward.functions):
        if entry.model is not None:
            yield f"reward.functions[{index}].model", entry.model


def _reward(index: int, entry: RewardFunctionConfig) -> Iterator[str]:
    from llmac.rewards.contracts import RewardSpec, understand
    from llmac.rewards.loader import resolve

    if entry.path is None:
        yield f"{entry.model} is a reward model, loaded when training starts"
        return
    function: Callable[..., object] = (
        resolve(entry.path) if isinstance(entry.path, str) else entry.path
    )
    try:
        known = understand(
            RewardSpec(
                function=function, name=entry.name, weight=entry.weight, adapter=entry.adapter
            )
        )
    except ConfigError as error:
        raise ConfigError(f"reward.functions[{index}]: {error}") from error
    needs = f", needs the columns {', '.join(sorted(known.required))}" if known.required else ""
    yield f"{known.name} ({'batch' if known.batched else 'one-sample'} contract{needs})"
