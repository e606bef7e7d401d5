"""How V_0 learns from prompts whose outcomes are known: in closed form, or by a transformer that was taught to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmac.core.kernel import kernel_regression
from llmac.core.measures import Mean, Measure, Metrics, combine
from llmac.core.ranking import prompt_loss
from llmac.core.types import Loss, Prompt
from llmac.critics.prompt_record import Asked, PromptRecord
from llmac.critics.prompt_states import Part, Pooling, PromptStates, pooled
from llmac.models.in_context import PromptClassifier
from llmac.runtime.context import Runtime
from llmac.runtime.learner import Learner
from llmac.runtime.saving import whole_weights

MODULE_FILE = "prompt_classifier.safetensors"
Labels = Literal["soft", "hard"]
Task = tuple[list[Part], Tensor, list[Part], Tensor]
"""Known prompts and their outcomes; prompts asked for and theirs."""


class PromptLearner(Protocol):
    """Chances of prompts from a context of others."""

    def predict(self, context: Sequence[Asked], prompts: Sequence[Prompt], *, now: int) -> Tensor:
        """[n] on the CPU; `context` is not empty, `now` is the step the prompts are asked in. Collective."""
        ...

    def learn(self, record: PromptRecord) -> Metrics:
        """Get better at it. Collective."""
        ...

    def save(self, directory: Path) -> None:
        """Part of role `critic`. Collective."""
        ...

    def load(self, directory: Path) -> None:
        """Continue from what `save` wrote."""
        ...

    def ship(self, directory: Path) -> None:
        """Write what another run can start from. Collective."""
        ...


class KernelLearner:
    """Regression with a kernel over embeddings; see `core.kernel`. Nothing is trained."""

    def __init__(
        self, states: PromptStates, *, pooling: Pooling, memory_steps: float, labels: Labels
    ) -> None:
        """Compare prompts by these hidden vectors.

        Args:
            states: what a model makes of prompts.
            pooling: of a prompt's tokens.
            memory_steps: how fast old outcomes fade.
            labels: outcomes as they are, or 1 from a half on and else 0.
        """
        self._states = states
        self._pooling: Pooling = pooling
        self._memory_steps = memory_steps
        self._labels: Labels = labels

    def predict(self, context: Sequence[Asked], prompts: Sequence[Prompt], *, now: int) -> Tensor:
        """See `PromptLearner`."""
        known = pooled(self._states([entry.prompt for entry in context]), self._pooling)
        asked = pooled(self._states(prompts), self._pooling)
        return kernel_regression(
            known,
            labels_of(context, self._labels).to(known.device),
            asked,
            age=known.new_tensor([float(now - entry.step) for entry in context]),
            responses=known.new_tensor([float(entry.responses) for entry in context]),
            memory_steps=self._memory_steps,
        ).cpu()

    def learn(self, record: PromptRecord) -> Metrics:
        """Nothing."""
        return {}

    def save(self, directory: Path) -> None:
        """Nothing."""

    def load(self, directory: Path) -> None:
        """Nothing."""

    def ship(self, directory: Path) -> None:
        """Nothing."""


class TransformerLearner:
    """A classifier that reads its context, trained on tasks from the record.

    A task is a step of the record: its prompts are asked for, those that came before and its other prompts are known.
    Steps in which all prompts are good, or all bad, teach no ranking and are left out.
    """

    def __init__(
        self,
        states: PromptStates,
        learner: Learner,
        runtime: Runtime,
        *,
        context: int,
        labels: Labels,
        pair_weight: float,
        queries: int,
        updates: int,
    ) -> None:
        """Put the parts together.

        Args:
            states: what a model makes of prompts.
            learner: of a `PromptClassifier`.
            runtime: the ranks; each draws tasks of its own.
            context: known prompts of a task, at most.
            labels: of the known: outcomes as they are, or 1 from a half on and else 0.
            pair_weight: of the pairwise loss.
            queries: prompts asked for in a task.
            updates: optimizer steps a call of `learn`.
        """
        self._states = states
        self._learner = learner
        self._runtime = runtime
        self._context = context
        self._labels: Labels = labels
        self._pair_weight = pair_weight
        self._queries = queries
        self._updates = updates

    def predict(self, context: Sequence[Asked], prompts: Sequence[Prompt], *, now: int) -> Tensor:
        """See `PromptLearner`."""
        known = self._states([entry.prompt for entry in context])
        asked = self._states(prompts)
        outcomes = labels_of(context, self._labels).to(self._runtime.device)

        def forward(module: nn.Module, task: tuple[list[Part], Tensor, list[Part]]) -> Tensor:
            module.eval()  # dropout is for learning
            chance = module(*task).softmax(dim=1)[:, 1].cpu()
            module.train()
            return chance

        # A plan asks just before it samples.
        [chance] = self._learner.look(forward, [(known, outcomes, asked)], beside_engine=True)
        return chance

    def learn(self, record: PromptRecord) -> Metrics:
        """Some optimizer steps, each on one task a rank; none before a step had good and bad prompts."""
        entries = list(record)
        steps = [
            step
            for step in dict.fromkeys(entry.step for entry in entries)
            if len({entry.solved >= 0.5 for entry in entries if entry.step == step}) == 2
        ]
        metrics: dict[str, Measure] = {}
        for _ in range(self._updates if steps else 0):
            task = self._task(entries, steps)
            update = self._learner.update([task], self._loss, torch.tensor(1.0))
            metrics = combine(metrics, update)
        return metrics

    def save(self, directory: Path) -> None:
        """The classifier and its optimizer."""
        self._learner.save(directory)

    def load(self, directory: Path) -> None:
        """Continue from a checkpoint."""
        self._learner.load(directory)

    def ship(self, directory: Path) -> None:
        """The classifier's weights."""
        weights = whole_weights(self._learner.trained.inner, keep=self._runtime.is_main)
        if self._runtime.is_main:
            save_file(dict(weights), directory / MODULE_FILE)

    def _task(self, entries: list[Asked], steps: list[int]) -> Task:
        random = torch.Generator().manual_seed(self._learner.steps * 1009 + self._runtime.rank)
        step = steps[int(torch.randint(len(steps), (), generator=random))]
        query = interleaved(
            [entry for entry in entries if entry.step == step], self._queries, random
        )
        chosen = {entry.prompt.id for entry in query}
        known = [
            e for e in entries if e.step < step or (e.step == step and e.prompt.id not in chosen)
        ]
        # A step of two prompts, seen first, leaves nothing else to know.
        known = known[-self._context :] or query
        device = self._runtime.device
        return (
            self._states([entry.prompt for entry in known]),
            labels_of(known, self._labels).to(device),
            self._states([entry.prompt for entry in query]),
            labels_of(query, "soft").to(device),
        )

    def _loss(self, module: nn.Module, task: Task) -> Loss:
        *seen, outcomes = task
        loss = prompt_loss(module(*seen), outcomes, pair_weight=self._pair_weight)
        return Loss(
            total=loss,
            weight=loss.new_ones(()),
            metrics={"critic/prompt_loss": Mean(loss.detach())},
        )


def new_classifier(hidden_size: int, start: Path | None) -> PromptClassifier:
    """A fresh one, or with the weights that `ship` wrote to `start`."""
    module = PromptClassifier(hidden_size)
    if start is not None and (start / MODULE_FILE).is_file():
        module.load_state_dict(load_file(start / MODULE_FILE))
    return module


def labels_of(entries: Sequence[Asked], how: Labels) -> Tensor:
    """What a learner is told of prompts, [n]: the outcomes, or whether they are at least a half."""
    solved = torch.tensor([entry.solved for entry in entries])
    return solved if how == "soft" else (solved >= 0.5).float()


def interleaved(entries: Sequence[Asked], count: int, random: torch.Generator) -> list[Asked]:
    """`count` entries, good and bad in turn, drawn without repetition until one kind is used up, then again."""
    drawn: list[list[Asked]] = []
    for good in (True, False):
        kind = [entry for entry in entries if (entry.solved >= 0.5) == good]
        order = torch.randperm(len(kind), generator=random).tolist()
        drawn.append([kind[place] for place in order])
    turns = ((drawn[turn % 2], turn // 2) for turn in range(count))
    return [kind[place % len(kind)] for kind, place in turns]
