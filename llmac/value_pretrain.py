"""Value pre-training: a critic learns what responses are worth before the policy moves.

    G_t = return of a stored response after its first t tokens        (λ = 1: its outcome)
    L   = mean over sampled tokens of l(V(s_t), G_t),                 l: the critic's own loss

PPO that starts from such a critic (`critic.init`) does not spend its first steps on the advantages of one that knows
nothing. VC-PPO: Yuan et al. 2025, arXiv:2503.01491, section on value pre-training: rollouts of the frozen policy,
λ = 1, until value loss and explained variance are good; how long, and on how many, is up to the user.
"""

import contextlib
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmac.config import Recipe, dump, plain, verify
from llmac.core.measures import Metrics
from llmac.core.segments import every_token
from llmac.core.types import Rollouts, Values
from llmac.errors import ConfigError
from llmac.export import check_not_empty
from llmac.metrics import MetricLog
from llmac.models.loading import load_tokenizer, pad_token_id
from llmac.outputs import make_writable, refuse_a_run
from llmac.pretraining.bench import LearnedCritic, check_critic, critic_of
from llmac.pretraining.file import examples_in, say_what_there_is
from llmac.pretraining.report import Judged, report
from llmac.pretraining.rows import (
    Example,
    chunks,
    returns_of,
    rollouts_of,
    share_of,
    split_by_prompt,
    targets_of,
)
from llmac.runtime.context import Runtime
from llmac.runtime.liveness import Liveness

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretraining:
    """How long a critic learns from stored rollouts, and by what it is judged."""

    epochs: int = 4
    """Most passes over the rollouts. Our choice."""
    held_out: float = 0.1
    """Fraction of the prompts that are not learned from; the best epoch is the one with the smallest squared error
    on their responses. Our choice."""
    patience: int = 2
    """Stop after this many epochs in a row that were not better. Our choice."""
    lam: float = 1.0
    """λ of the returns: 1 = what came of the response (VC-PPO); below, the critic's own later values take part."""

    def __post_init__(self) -> None:
        """Refuse settings under which nothing is learned or nothing can be said about it."""
        for name, count in (("--epochs", self.epochs), ("--patience", self.patience)):
            if count < 1:
                raise ConfigError(f"{name} must be at least 1, found {count}")
        if not 0 < self.held_out < 1:
            raise ConfigError(
                f"--held-out is a fraction of the prompts between 0 and 1, found {self.held_out}; it cannot be 0, "
                "because the best epoch is told by responses that were not learned from"
            )
        if not 0 <= self.lam <= 1:
            raise ConfigError(f"--lam must be in [0, 1], found {self.lam}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """Where the critic is, and how good."""

    critic: Path
    """A folder that `critic.init` and `ValueModel.from_pretrained` take."""
    epoch: int
    """The best one; 0: the critic as it started."""
    epochs: int
    """Done in all."""
    held_out: Mapping[str, float]
    """What the instruments said of the best one."""
    is_main: bool
    """Whether this process is the one that talks."""

    def line(self) -> str:
        """What a user should know, in one line."""
        error, explained = (
            self.held_out[f"held_out/all/{name}"]
            for name in ("squared_error", "explained_variance")
        )
        better = "" if self.epoch else ", which no epoch made better"
        return (
            f"{self.critic}: the critic after epoch {self.epoch} of {self.epochs}{better}; held-out squared error "
            f"{error:.4g}, explained variance {explained:.3f}. Train with critic.init={self.critic}"
        )


def value_pretrain(
    recipe: Recipe, rollouts: Path, output: Path, how: Pretraining | None = None
) -> Pretrained:
    """Fit the recipe's critic to stored rollouts; leaves the best of all epochs in `<output>/critic`.

    Every process of a launcher calls this; rows are split over them, and the result is the same. The critic's own
    learning rate, schedule, epochs and minibatches apply, as if every `actor.prompts_per_step` x group size rows were
    a step of a run.

    Args:
        recipe: of the run that the critic is for; its `run.output` is not touched.
        rollouts: file that `llmac rollouts` or `write_rollouts` wrote.
        output: folder for metrics.jsonl, config.yaml and the critic.
        how: None: the defaults.

    Raises:
        ConfigError, DataError: before any model is loaded, one clear message.
    """
    how = how or Pretraining()
    verify(recipe)
    check_critic(recipe)
    kept = output / "critic"
    if kept.exists():
        raise ConfigError(f"{kept} exists; name another folder with --output, or remove it")
    refuse_a_run(output, "--output")
    learn, held_out = split_by_prompt(
        examples_in(rollouts, recipe), how.held_out, seed=recipe.run.seed
    )
    make_writable(output, "--output")
    with contextlib.ExitStack() as cleanup:
        runtime = Runtime.create(seed=recipe.run.seed, output=output)
        liveness = Liveness.start(runtime)
        cleanup.callback(liveness.close)  # after the runtime, which waits for the other ranks
        cleanup.callback(runtime.close)
        with liveness.reporting():
            if runtime.is_main:
                (output / "config.yaml").write_text(dump(recipe))
            runtime.start_trackers(recipe.run.trackers, recipe.run.project, plain(recipe))
            if runtime.is_main:
                say_what_there_is(rollouts, learn, held_out)
            return _Fit(recipe, how, runtime, learn, held_out).run(output)


class _Fit:
    """The epochs of one critic on one rank."""

    def __init__(
        self,
        recipe: Recipe,
        how: Pretraining,
        runtime: Runtime,
        learn: Sequence[Example],
        held_out: Sequence[Example],
    ) -> None:
        self._recipe, self._how, self._runtime = recipe, how, runtime
        self._learn, self._held_out = learn, held_out
        settings = recipe.algorithm.settings
        self._rows = min(len(learn), recipe.actor.prompts_per_step * settings.group_size)
        longest = max(len(e.trajectory.response_ids) for e in (*learn, *held_out))
        self._length_limit = max(longest, recipe.rollout.max_new_tokens)
        self._gamma: float = getattr(settings, "gamma", 1.0)  # cards without a discount have none
        assert recipe.critic is not None
        own = getattr(recipe.critic.settings, "minibatches", None)  # not every critic cuts steps
        self._minibatches: int = own or recipe.actor.minibatches
        self._critic: LearnedCritic = critic_of(
            recipe,
            runtime,
            pad_id=pad_token_id(load_tokenizer(recipe.model)),
            steps=how.epochs * math.ceil(len(learn) / self._rows),
        )

    def run(self, output: Path) -> Pretrained:
        """All epochs, a line of metrics each."""
        log = MetricLog(output, self._runtime)
        log.rewind(0)
        self._show_the_scale()
        best, best_epoch, best_report = math.inf, 0, dict[str, float]()
        epoch = 0
        for epoch in range(self._how.epochs + 1):
            if epoch:
                self._learn_once(epoch, log)
            log.add(self._instruments())
            found = log.flush(epoch)
            better = found["held_out/all/squared_error"] < best
            if better:
                best, best_epoch = found["held_out/all/squared_error"], epoch
                best_report = {n: v for n, v in found.items() if n.startswith("held_out/")}
                self._keep(output)
            self._say(epoch, found, better=better)
            if epoch - best_epoch >= self._how.patience:
                break
        return Pretrained(
            critic=output / "critic",
            epoch=best_epoch,
            epochs=epoch,
            held_out=best_report,
            is_main=self._runtime.is_main,
        )

    def _show_the_scale(self) -> None:
        """A critic that knows nothing starts at the mean reward of the rollouts it is asked about first."""
        first, *_ = chunks(len(self._learn), self._rows, seed=self._recipe.run.seed, epoch=0)
        # Without rows that stand in: they would count in that mean.
        mine = first[self._runtime.rank :: self._runtime.world_size] or first[:1]
        self._values([self._learn[row] for row in mine])

    def _learn_once(self, epoch: int, log: MetricLog) -> None:
        """One pass over what is to be learned."""
        for rows in chunks(len(self._learn), self._rows, seed=self._recipe.run.seed, epoch=epoch):
            examples, counts = self._share(self._learn, rows, minibatches=self._minibatches)
            rollouts, values = self._values(examples)
            returns = returns_of(
                examples, rollouts, gamma=self._gamma, lam=self._how.lam, values=values
            )
            targets = targets_of(returns, values, counts, gamma=self._gamma)
            log.add(self._critic.update(rollouts, targets))

    def _values(self, examples: Sequence[Example]) -> tuple[Rollouts, Values]:
        rollouts = rollouts_of(examples, length_limit=self._length_limit)
        return rollouts, self._critic.values(rollouts, every_token(rollouts.action_mask))

    def _instruments(self) -> Metrics:
        """What is known of the critic by the responses held out; the same on every rank."""
        prompts = sorted({e.trajectory.prompt.token_ids for e in self._held_out})
        numbers = {token_ids: number for number, token_ids in enumerate(prompts)}
        mine: list[Judged] = []
        everything = range(len(self._held_out))
        for start in range(0, len(self._held_out), self._rows):
            rows = everything[start : start + self._rows]
            examples, counts = self._share(self._held_out, rows, minibatches=1)
            rollouts, values = self._values(examples)
            returns = returns_of(examples, rollouts, gamma=self._gamma)
            mine += [
                Judged(
                    values=values.at[row][mask],
                    returns=returns[row][mask],
                    prompt=numbers[examples[row].trajectory.prompt.token_ids],
                )
                for row, mask in enumerate(values.starts)
                if counts[row]
            ]
        everyone = [one for rank in self._runtime.gather(mine) for one in rank]
        return report(everyone)

    def _share(
        self, examples: Sequence[Example], rows: Sequence[int], *, minibatches: int
    ) -> tuple[list[Example], tuple[bool, ...]]:
        share = share_of(
            rows,
            minibatches=minibatches,
            rank=self._runtime.rank,
            world_size=self._runtime.world_size,
        )
        return [examples[row] for row in share.rows], share.counts

    def _keep(self, output: Path) -> None:
        """Put the critic as it is in the place of the best one so far. Collective."""
        kept, aside, older = (output / name for name in ("critic", ".critic", ".older"))
        if self._runtime.is_main:  # of an earlier try that was killed
            for left in (aside, older):
                shutil.rmtree(left, ignore_errors=True)
        self._runtime.barrier()
        self._critic.save_pretrained(aside, policy=Path(self._recipe.model.name))
        if self._runtime.is_main:
            check_not_empty(aside)
            if kept.exists():
                kept.replace(older)
            aside.replace(kept)
            shutil.rmtree(older, ignore_errors=True)
        self._runtime.barrier()

    def _say(self, epoch: int, found: dict[str, float], *, better: bool) -> None:
        if not self._runtime.is_main:
            return
        words = {
            "squared error": "squared_error",
            "explained variance": "explained_variance",
            "calibration error": "ece",
            "AUC": "auc",
            "within prompts": "auc_within_prompts",
        }
        said = [
            f"{word} {found[f'held_out/all/{name}']:.4f}"
            for word, name in words.items()
            if f"held_out/all/{name}" in found
        ]
        logger.info(
            "epoch %d/%d | %s%s",
            epoch,
            self._how.epochs,
            " | ".join(said),
            " | best so far, kept" if better else "",
        )
