"""V_0: the value of a prompt before anything is sampled, from the outcomes of prompts asked lately.

Instead of fitting a critic to one policy, the policy is described by a context of (prompt, outcome) pairs, and what is
near a prompt in it says what to expect: V_0, arXiv:2602.03584. Ours reads the prompts with the policy's own trunk
unless told otherwise, and the tabular foundation model of the paper is not shipped: a kernel or a small transformer is
in its place.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.measures import Measure, Metrics
from llmac.core.types import CriticTargets, Prompt, Rollouts, Values
from llmac.critics.bench import CriticBench
from llmac.critics.in_context import (
    KernelLearner,
    Labels,
    PromptLearner,
    TransformerLearner,
    new_classifier,
)
from llmac.critics.outcomes import foresight, outside_range, prompt_outcomes, remaining
from llmac.critics.prompt_record import PromptRecord
from llmac.critics.prompt_states import EmbeddingStates, Pooling, PromptStates, TrunkStates
from llmac.critics.refusals import refuse_infinite, refuse_range
from llmac.models.policy import causal_lm
from llmac.runtime.context import Runtime
from llmac.runtime.learner import Learner, Optimization

_SAID_FILE = "prompt_said.json"
_TRAINED_ONLY = (
    "lr",
    "schedule",
    "warmup_steps",
    "min_lr_ratio",
    "weight_decay",
    "betas",
    "eps",
    "max_grad_norm",
    "pair_weight",
    "queries",
    "updates",
    "history",
)


@dataclass(frozen=True, kw_only=True)
class PromptValueConfig(Optimization):
    """Values of prompts from a context of prompts whose outcomes are known; nothing is said about single tokens."""

    says_prompt_values: ClassVar[bool] = True
    """A plan may ask it what prompts are worth."""

    embedding: str = "policy"
    """Who reads the prompts: `policy` (its trunk as it is now) or a Hub id or folder of a frozen model."""
    learner: Literal["kernel", "transformer"] = "kernel"
    """kernel: regression in closed form, works from the second step on; transformer: query adapter and in-context
    classifier (arXiv:2602.03584), trained on the run's own steps."""
    context: int = 256
    """Prompts with known outcomes that a value is made from, the latest. 256 in the released code."""
    reward_range: tuple[float, float] = (0.0, 1.0)
    """Outcome of a failure and of a success; what is outside counts as the nearer of the two."""
    labels: Labels = "soft"
    """What the context says of a prompt: soft: the mean outcome of its responses; hard: 1 from the middle of the range
    on, else 0 (the released code)."""
    init: str | None = None
    """Folder of a prompt_value critic that another run saved: its context and classifier; null: start empty."""
    pooling: Pooling = "mean"
    """With learner kernel: how the vectors of a prompt's tokens become one. Our choice."""
    memory_steps: float = 8.0
    """With learner kernel: steps after which an outcome counts 1/e of what it did, as the policy moves on. Our
    choice."""
    lr: float = 2e-4
    """Learning rate of the classifier; 2e-4 for the adapter in the released code."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, on matrices only. .01 in the released code."""
    pair_weight: float = 0.25
    """Weight of the pairwise loss, the rest is cross-entropy. .25 in the released code."""
    queries: int = 8
    """Prompts asked for in a task of training. 8 in the released code."""
    updates: int = 4
    """Optimizer steps a step of the run. Our choice."""
    history: int = 2048
    """Prompts with outcomes from which tasks are made, the latest. Our choice."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        super().__post_init__()
        refuse_range("reward_range", self.reward_range, "failure, success")
        refuse_infinite(self)
        for name in ("context", "queries", "updates", "history"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.queries < 2:
            raise ValueError("queries must be at least 2, a good and a bad prompt, found 1")
        if not self.memory_steps > 0:
            raise ValueError(f"memory_steps must be above 0, found {self.memory_steps}")
        if not 0 <= self.pair_weight <= 1:
            raise ValueError(f"pair_weight must be in [0, 1], found {self.pair_weight}")
        if self.learner == "transformer" and self.history < self.context:
            raise ValueError(
                f"history holds the context too; it must be at least {self.context}, found {self.history}"
            )

    def without_effect(self) -> dict[str, str]:
        """Fields that do nothing as they are set, with the reason."""
        if self.learner == "transformer":
            reason = "only the kernel uses it; set learner: kernel"
            return {"pooling": reason, "memory_steps": reason}
        return dict.fromkeys(_TRAINED_ONLY, "a kernel is not trained; set learner: transformer")

    def build(self, bench: CriticBench) -> "PromptValue":
        """The live critic."""
        states, hidden_size = self._states(bench)
        start = None if self.init is None else Path(self.init)
        record = PromptRecord(self.context if self.learner == "kernel" else self.history)
        if start is not None:
            record.load(start)
        learner: PromptLearner = KernelLearner(
            states, pooling=self.pooling, memory_steps=self.memory_steps, labels=self.labels
        )
        if self.learner == "transformer":
            learner = TransformerLearner(
                states,
                Learner(
                    new_classifier(hidden_size, start),
                    self,
                    bench.runtime,
                    name="critic",
                    total_steps=bench.steps * self.updates,
                    before_learning=bench.before_learning,
                ),
                bench.runtime,
                context=self.context,
                labels=self.labels,
                pair_weight=self.pair_weight,
                queries=self.queries,
                updates=self.updates,
            )
        return PromptValue(self, learner, record, bench.runtime)

    def _states(self, bench: CriticBench) -> tuple[PromptStates, int]:
        tokens = bench.max_tokens_per_microbatch
        if self.embedding != "policy":
            embedding = EmbeddingStates(
                self.embedding, bench.model, bench.runtime, max_tokens=tokens
            )
            return embedding, embedding.hidden_size
        trunk = TrunkStates(
            bench.prompt_states or bench.policy_states,
            bench.runtime,
            pad_id=bench.pad_id,
            max_tokens=tokens,
        )
        config = causal_lm(bench.policy.model).config
        return trunk, int(config.get_text_config().hidden_size)


class PromptValue:
    """V(s_0) of prompts. All states of a response have the value of its prompt, less what was earned before them.

    What is said of a prompt stays said until the step's outcomes are known: a plan that sizes groups by it and a card
    that takes it as a baseline hear the same.
    """

    def __init__(
        self,
        config: PromptValueConfig,
        learner: PromptLearner,
        record: PromptRecord,
        runtime: Runtime,
    ) -> None:
        """Put the parts together.

        Args:
            config: settings.
            learner: makes chances out of a context.
            record: where the context comes from; the critic adds to it.
            runtime: the ranks, whose outcomes are all seen by all.
        """
        self._config = config
        self._learner = learner
        self._record = record
        self._runtime = runtime
        self._said: dict[tuple[str, tuple[int, ...]], float] = {}

    @property
    def reward_range(self) -> tuple[float, float]:
        """Outcome of a failure and of a success."""
        return self._config.reward_range

    def prompt_values(self, prompts: Sequence[Prompt]) -> Float[Tensor, "N"]:
        """Expected outcomes, in reward units; the middle of the range before any outcome is known. Collective.

        Never quite certain: with n prompts in the context chances are within [1/(n+2), (n+1)/(n+2)].
        """
        low, high = self._config.reward_range
        new = list({_key(p): p for p in prompts if _key(p) not in self._said}.values())
        # All ranks or none: a trunk in shards is asked together.
        if self._runtime.max(float(len(new))):
            asked = new or list(prompts[:1])
            for prompt, chance in zip(asked, self._chances(asked).tolist(), strict=True):
                self._said.setdefault(_key(prompt), low + (high - low) * chance)
        return torch.tensor([self._said[_key(prompt)] for prompt in prompts])

    def values(self, rollouts: Rollouts, starts: Bool[Tensor, "B T"]) -> Values:
        """What is still to come if the response earns what is expected of its prompt. Collective."""
        expected = self.prompt_values([t.prompt for t in rollouts.trajectories])
        return remaining(expected, rollouts, starts)

    def update(self, rollouts: Rollouts, targets: CriticTargets) -> dict[str, Measure]:
        """Targets are not needed: see `observe`."""
        return {}

    def observe(self, rollouts: Rollouts) -> Metrics:
        """Take the step's prompts into the record, and learn from it. Collective."""
        prompts = {t.prompt.id: t.prompt for t in rollouts.trajectories}
        mine = dict(zip(prompts, self.prompt_values(list(prompts.values())).tolist(), strict=True))
        said = {name: value for part in self._runtime.gather(mine) for name, value in part.items()}
        found = prompt_outcomes(rollouts, self._runtime)
        if not found:
            return {}
        low, high = self._config.reward_range
        expected = torch.tensor([said[entry.prompt.id] for entry in found])
        metrics = {
            **foresight(expected, found, (low, high)),
            **outside_range(found, (low, high)),
        }
        self._record.add(
            (entry.prompt, min(max((entry.mean - low) / (high - low), 0.0), 1.0), entry.responses)
            for entry in found
        )
        self._said.clear()
        return {**metrics, **self._learner.learn(self._record)}

    def save(self, directory: Path) -> None:
        """Role `critic` of a checkpoint, with what each rank has said and not yet seen the outcome of. Collective."""
        said = self._runtime.gather(list(self._said.items()))
        if self._runtime.is_main:
            self._record.save(directory)
            (directory / _SAID_FILE).write_text(json.dumps(said))
        self._learner.save(directory)

    def load(self, directory: Path) -> None:
        """Continue from a checkpoint; another number of ranks goes on with all that was said."""
        self._record.load(directory)
        self._learner.load(directory)
        self._said.clear()
        path = directory / _SAID_FILE
        if path.is_file():  # older checkpoints have none
            ranks = json.loads(path.read_text())
            if len(ranks) == self._runtime.world_size:
                ranks = [ranks[self._runtime.rank]]
            for (name, tokens), value in itertools.chain.from_iterable(ranks):
                self._said[name, tuple(tokens)] = value

    def save_pretrained(self, directory: Path, *, policy: Path) -> None:
        """A folder that `init` of another run takes. Collective.

        Args:
            directory: made if missing.
            policy: not needed; what reads the prompts is named, not saved.
        """
        if self._runtime.is_main:
            directory.mkdir(parents=True, exist_ok=True)
            self._record.save(directory)
        self._learner.ship(directory)

    def _chances(self, prompts: Sequence[Prompt]) -> Tensor:
        context = self._record.latest(self._config.context)
        if not context:
            return torch.full((len(prompts),), 0.5)
        edge = 1 / (len(context) + 2)
        chance = self._learner.predict(context, prompts, now=self._record.step + 1)
        return chance.clamp(edge, 1 - edge)


def _key(prompt: Prompt) -> tuple[str, tuple[int, ...]]:
    return prompt.id, prompt.token_ids
