"""`llmac eval-critic`: how good is the critic of a run, against continuations sampled by its policy?"""

import dataclasses
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from llmac.build import sampling_of
from llmac.config import Recipe, verify
from llmac.config.cards import Choice, choose_algorithm, choose_critic
from llmac.config.loading import YamlReader
from llmac.config.traits import traits_of
from llmac.core.protocols import Critic
from llmac.core.types import Prompt
from llmac.critics.examine import Report, examine
from llmac.critics.frozen import FrozenCritic
from llmac.critics.generative import ASKING
from llmac.critics.generative_critic import SETTINGS_FILE
from llmac.critics.picture import plot_calibration
from llmac.critics.report import as_dict
from llmac.critics.states import States, Told, check_numbers, sample_states
from llmac.errors import CheckpointError, ConfigError, DataError
from llmac.loop import Parts
from llmac.models.loading import load_tokenizer, pad_token_id, torch_dtype
from llmac.models.packing import Packing
from llmac.models.value_heads import HEAD_FILE
from llmac.models.value_model import ValueModel
from llmac.outputs import make_room_for, make_writable
from llmac.rollout_store import check_storable, vocabulary_mark
from llmac.runtime.checkpoint import Saveable
from llmac.saved_run import SavedRun, Step, find_run, opened
from llmac.state_store import read_states, write_states

logger = logging.getLogger(__name__)

REPORT_FILE, PICTURE_FILE = "critic_eval.json", "critic_calibration.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """Which states, and how many continuations say what they are worth."""

    states: int = 200
    """Rounded down to a multiple of `depths`."""
    depths: int = 5
    """Fractions 0, 1/depths, ... of each response."""
    rollouts: int = 64
    """Continuations of each state."""
    siblings: int = 2
    """Responses to a prompt."""
    success_above: float | None = None
    """Outcome above which a response counts as a success; None: midway between the worst and the best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """What an examination left."""

    report: Report
    states: States
    about: Mapping[str, Any]
    output: Path
    """Folder with `critic_eval.json` and `critic_calibration.png`."""


def eval_critic(
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    critic: str | None = None,
    step: Step = None,
    truth: Truth | None = None,
    states_from: Path | None = None,
    save_states: Path | None = None,
    output: Path | None = None,
    seed: int = 0,
    told: Told = lambda done, total: None,
) -> Examined:
    """Examine a run's critic, or another one for its policy. The run itself is not changed. One process.

    Prompts are those of `evaluation.data`, else of `data`; responses are sampled as in training. The true values are
    expected rewards: a KL penalty that the run takes off its rewards is not in them.

    Args:
        source: the run's folder, or a recipe's file; see `find_run`.
        overrides: `key.sub=value`, over the recipe.
        critic: another critic: a folder that `ValueModel.from_pretrained` loads or a generative critic was saved in,
            the name of a critic, or `{name: ..., key: value}`. A critic that learns and is given by name has not
            learned anything yet.
        step: which weights of the run.
        truth: which states; None: the defaults.
        states_from: take the states from this file instead of sampling; they should be of the same policy.
        save_states: write the states to this file, for other critics.
        output: folder for the report; None: `critic_eval/<moment>` in the run's folder, with the name of another
            critic.
        seed: of prompts, responses and continuations.
        told: hears how many of how many distinct states are judged.

    Raises:
        ConfigError, CheckpointError, DataError: before any model is loaded, where that can be known.
    """
    if truth is not None and states_from is not None:
        raise ConfigError(
            f"the states are those of {states_from}; how many to sample has no effect: leave it out"
        )
    if save_states is not None and states_from is not None:
        raise ConfigError(
            f"the states of {states_from} are saved already: leave out one of save_states and states_from"
        )
    wanted = truth or Truth()
    check_numbers(
        states=wanted.states,
        depths=wanted.depths,
        rollouts=wanted.rollouts,
        siblings=wanted.siblings,
    )
    run = find_run(source, overrides, step=step)
    chosen = _critic(critic, run)
    verify(run.recipe)
    stored = None if states_from is None else read_states(states_from)
    _check_fits(chosen, wanted, None if stored is None else stored[0])
    folder = output or run.folder / "critic_eval" / _folder_name(run, critic)
    make_writable(folder, "--output")
    if save_states is not None:
        make_room_for(save_states, "--save-states")
    about: dict[str, Any] = {
        "run": str(run.folder),
        "moment": run.moment,
        "critic": _described(chosen, critic, run),
        "seed": seed,
    }
    card = chosen if isinstance(chosen, Choice) else None
    with opened(run, critic=card, seed=seed) as parts:
        vocabulary = vocabulary_mark(load_tokenizer(run.recipe.model).get_vocab())
        live = _live(chosen, run, parts)
        if stored is None:
            states, found = _sample(run, parts, wanted, seed, told, save_states)
            found |= {"run": str(run.folder), "moment": run.moment, "vocabulary": vocabulary}
            if save_states is not None:
                write_states(save_states, states, found)
        else:
            states, found = stored
            _check_stored(found, run, states_from, vocabulary)
        about |= {"states_of": dict(found), "prompts": found["prompts"]}
        about |= {"rollouts": states.outcomes.shape[1]}
        report = examine(live, states, seed=seed)
    written = json.dumps(as_dict(report, states, about), indent=1, allow_nan=False)
    (folder / REPORT_FILE).write_text(written + "\n", encoding="utf-8")
    title = f"{about['critic']}, {run.folder.resolve().name} ({run.moment})"
    plot_calibration(report, states, folder / PICTURE_FILE, title=title)
    return Examined(report=report, states=states, about=about, output=folder)


def _critic(asked: str | None, run: SavedRun) -> Path | Choice:
    """A folder with a value model, or a card to build."""
    if asked is None:
        own = run.recipe.critic
        if own is None:
            raise ConfigError(
                f"{run.folder} has no critic: {run.recipe.algorithm.name} compares rewards. Name one with --critic: a "
                "folder with a value model, or a critic of `llmac algorithms`"
            )
        saved = run.folder / "final" / "critic"
        if not (run.is_final and saved.is_dir()):
            return own
        if (saved / SETTINGS_FILE).is_file():
            return _generative(saved)
        return saved if (saved / HEAD_FILE).is_file() else _started_from(own, saved)
    folder = Path(asked).expanduser()
    if folder.is_dir():
        if (folder / SETTINGS_FILE).is_file():
            return _generative(folder)
        if not (folder / HEAD_FILE).is_file():
            inside = [
                place
                for place in (folder / "critic", folder / "final/critic")
                if any((place / file).is_file() for file in (HEAD_FILE, SETTINGS_FILE))
            ]
            hint = f" Did you mean {inside[0]}?" if inside else ""
            raise CheckpointError(
                f"{folder} has no {HEAD_FILE}: it is not a value model saved by llmac.{hint} A critic of another kind "
                f"starts from its folder by name: --critic '{{name: surprise, init: {folder}}}'"
            )
        return folder
    if "/" in asked and ":" not in asked:
        raise ConfigError(f"--critic: there is no folder {asked} (looked in {Path.cwd()})")
    try:
        card = yaml.load(asked, Loader=YamlReader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--critic: {asked} is not valid YAML: {error}") from error
    # Any critic will do here, whatever the run's own algorithm takes.
    choice = choose_critic(card, choose_algorithm("ppo"))
    assert choice is not None, "ppo takes critics"
    return choice


def _generative(folder: Path) -> Choice:
    """A saved generative critic, asked as it was in its run; nothing is learned."""
    saved = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    asked = {name: saved[name] for name in ASKING if saved[name] is not None}
    card = {"name": "generative", "init": str(folder), "learns": False, **asked}
    choice = choose_critic(card, choose_algorithm("ppo"))
    assert choice is not None, "ppo takes critics"
    return choice


def _started_from(card: Choice, folder: Path) -> Choice:
    """The card, with the weights that a finished run has left."""
    if not hasattr(card.settings, "init"):  # cards differ in fields
        return card
    return dataclasses.replace(card, settings=dataclasses.replace(card.settings, init=str(folder)))


def _check_fits(chosen: Path | Choice, truth: Truth, stored: States | None) -> None:
    """Critics that compare siblings need some, and one that repeats a plan has nothing to say here."""
    if isinstance(chosen, Path):
        return
    traits = traits_of(chosen)
    if traits.repeats_the_plan:
        raise ConfigError(
            f"critic {chosen.name} repeats what trees of sampled responses know, and the states examined here are in "
            "no tree; examine another one for the policy of this run, for example --critic monte_carlo"
        )
    least = traits.least_group_size
    if stored is None:
        smallest = min(truth.siblings, truth.states // truth.depths)
    else:
        smallest = min(Counter(t.group for t in stored.trajectories).values())
    if smallest < least:
        raise ConfigError(
            f"critic {chosen.name} needs {least} responses to a prompt, and the states are of {smallest}; raise "
            "siblings, and states if need be"
        )


def _folder_name(run: SavedRun, asked: str | None) -> str:
    """Another one for another critic."""
    name = "" if asked is None else re.sub(r"[^\w.=]+", "-", asked).strip("-.")
    return f"{run.moment}-{name}" if name else run.moment


def _described(chosen: Path | Choice, asked: str | None, run: SavedRun) -> str:
    """For the heading."""
    if asked is None:
        assert run.recipe.critic is not None, "checked when it was chosen"
        return run.recipe.critic.name
    if isinstance(chosen, Path):
        return f"critic {chosen}"
    start = getattr(chosen.settings, "init", None)  # cards differ in fields
    starts = "as it starts" if start in (None, "policy") else f"of {start}"
    return f"{chosen.name} {starts}"


def _live(chosen: Path | Choice, run: SavedRun, parts: Parts) -> Critic:
    if isinstance(chosen, Choice):
        assert parts.critic is not None
        learned = isinstance(parts.critic, Saveable) and getattr(chosen.settings, "learns", True)
        if run.is_final and chosen is run.recipe.critic and learned:  # cards differ in fields
            raise CheckpointError(
                f"{run.weights} holds the policy and no critic; take a checkpoint (--step N), or name a critic"
            )
        return parts.critic
    spec = run.recipe.model
    return FrozenCritic(
        ValueModel.from_pretrained(chosen, dtype=torch_dtype(spec)),
        parts.runtime,
        packing=Packing(
            kind=run.recipe.actor.packing,
            max_tokens=run.recipe.actor.max_tokens_per_microbatch,
            pad_id=pad_token_id(load_tokenizer(spec)),
        ),
        compute_dtype=torch.bfloat16 if spec.compute_dtype else None,
    )


def _sample(
    run: SavedRun, parts: Parts, truth: Truth, seed: int, told: Told, save_states: Path | None
) -> tuple[States, dict[str, Any]]:
    prompts, where = _prompts(run.recipe, parts, truth)
    if save_states is not None:
        check_storable(prompts)
    score = parts.held_out.score if parts.held_out else parts.score.for_evaluation()
    score.step = run.step
    settings = run.recipe.algorithm.settings
    gamma = float(getattr(settings, "gamma", 1.0))  # cards differ in fields
    since = time.monotonic()
    states = sample_states(
        parts.engine,
        prompts,
        score,
        sampling=sampling_of(run.recipe),
        decode=parts.decode,
        states=truth.states,
        depths=truth.depths,
        rollouts=truth.rollouts,
        siblings=truth.siblings,
        gamma=gamma,
        success_above=truth.success_above,
        seed=seed,
        told=told,
    )
    return states, {
        "prompts": where,
        "gamma": gamma,
        "seed": seed,
        "seconds": round(time.monotonic() - since, 1),
    }


def _prompts(recipe: Recipe, parts: Parts, truth: Truth) -> tuple[Sequence[Prompt], str]:
    if parts.held_out is not None:
        assert recipe.evaluation is not None
        return parts.held_out.prompts, f"held-out prompts ({recipe.evaluation.data.name})"
    wanted = max(1, truth.states // truth.depths // truth.siblings)
    # The stream is endless: a small dataset comes round again.
    distinct = {prompt.id: prompt for prompt in parts.prompts.take(wanted)}
    return list(distinct.values()), f"training prompts ({recipe.data.name})"


def _check_stored(
    found: Mapping[str, Any], run: SavedRun, path: Path | None, vocabulary: str
) -> None:
    if found["vocabulary"] != vocabulary:
        raise DataError(
            f"{path} was sampled with another tokenizer than {run.folder} has: its token ids mean other text here"
        )
    policy = (found["run"], found["moment"])
    if policy != (str(run.folder), run.moment):
        logger.warning(
            "the states of %s are of the policy of %s (%s): the true values are those of that policy",
            path,
            *policy,
        )
