"""One optimizer step from many micro-batches on many ranks, with one denominator."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from llmac.core.measures import Last, Mean, Measure, Sum, combine
from llmac.core.types import Loss
from llmac.errors import ConsistencyError
from llmac.runtime.context import Runtime

Rows = TypeVar("Rows")
Seen = TypeVar("Seen")

_PROGRESS = "learner.json"


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How one module is optimized: AdamW, a schedule, gradient clipping."""

    lr: float
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: keep `lr`, or decay it to `min_lr_ratio` of it at the end of the run."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises, the first at `lr / warmup_steps`."""
    min_lr_ratio: float = 0.0
    """The schedule ends at this fraction of `lr`."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Global gradient norm is clipped to this."""

    def __post_init__(self) -> None:
        """Refuse settings that AdamW would refuse later, or take for something else."""
        low, high = self.betas
        for name, holds, expected in (
            ("lr", 0 < self.lr < math.inf, "finite and above 0"),
            ("warmup_steps", self.warmup_steps >= 0, "at least 0"),
            ("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "in [0, 1]"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "finite and at least 0"),
            ("betas", 0 <= low < 1 and 0 <= high < 1, "each at least 0 and below 1"),
            ("eps", 0 < self.eps < math.inf, "finite and above 0"),
            ("max_grad_norm", self.max_grad_norm > 0, "above 0; .inf: gradients are not scaled"),
        ):
            if not holds:
                raise ValueError(f"{name} must be {expected}, found {getattr(self, name)}")

    @classmethod
    def of(cls, settings: object) -> "Optimization":
        """Those of a recipe's section, which has fields of the same names."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    def lr_factor(self, step: int, total_steps: int) -> float:
        """Learning rate at optimizer step `step` (from 0) as a fraction of `lr`.

        >>> o = Optimization(lr=1.0, schedule="linear", warmup_steps=2)
        >>> [round(o.lr_factor(s, 6), 2) for s in range(7)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        shape = {
            "constant": 1.0,
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        }
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * shape[self.schedule]


class Learner:
    """Owns a module's optimizer. Losses come undivided; the gradient is divided once, by the global weight.

        g = Σ_ranks Σ_micro ∇ total / Σ_ranks Σ_micro weight

    Dividing per micro-batch would be a mean of means: any split into micro-batches and ranks gives the same gradient
    here (see tests/runtime/test_sharding.py).
    """

    def __init__(
        self,
        module: nn.Module,
        optimization: Optimization,
        runtime: Runtime,
        *,
        name: str,
        total_steps: int,
        compute_dtype: torch.dtype | None = None,
        before_learning: Callable[[], None] = lambda: None,
    ) -> None:
        """Build the optimizer over the trainable parameters of `module` and prepare both for the runtime.

        Args:
            module: what is called in `loss_of`.
            optimization: learning rate and the rest.
            runtime: the process group.
            name: prefix of the metrics, `actor` or `critic`.
            total_steps: optimizer steps of the whole run; the end of the schedule.
            compute_dtype: autocast forward passes to this; None = the parameters' own.
            before_learning: called before each use; a colocated engine sleeps here.
        """
        self._runtime = runtime
        self._name = name
        self._optimization = optimization
        self._total_steps = total_steps
        self._before_learning = before_learning
        self.steps = 0
        self.trained = runtime.train(
            module,
            self._optimizer_of,
            max_norm=optimization.max_grad_norm,
            compute_dtype=compute_dtype,
        )

    @torch.no_grad()
    def look(
        self,
        forward: Callable[[nn.Module, Rows], Seen],
        micro_batches: Sequence[Rows],
        *,
        beside_engine: bool = False,
    ) -> list[Seen]:
        """Run `forward` on the module for each micro-batch, without gradients.

        Every rank calls this with at least one micro-batch; where passes are collective, a rank that has fewer repeats
        its first one for the others' sake.

        Args:
            forward: called with the module and a micro-batch.
            micro_batches: this rank's.
            beside_engine: let a colocated engine stay awake: for a row or two, asked between an update and sampling.
        """
        if not beside_engine:
            self._before_learning()
        # First of all: a forward pass may contain collectives of its own.
        extra = self._runtime.passes(len(micro_batches)) - len(micro_batches)
        seen = [forward(self.trained.looking, rows) for rows in micro_batches]
        for _ in range(extra):
            forward(self.trained.looking, micro_batches[0])
        return seen

    def update(
        self,
        micro_batches: Sequence[Rows],
        loss_of: Callable[[nn.Module, Rows], Loss],
        weight: Tensor,
    ) -> dict[str, Measure]:
        """One optimizer step.

        Args:
            micro_batches: this rank's parts of the global minibatch, in any split.
            loss_of: the undivided loss of one part.
            weight: this rank's share of the denominator, known before the forward pass.

        Returns:
            The losses' metrics, gradient norm before clipping, learning rate.

        Raises:
            ConsistencyError: the losses' weights do not add up to `weight`, or the gradient is not finite.
        """
        self._before_learning()
        global_weight = float(self._runtime.sum(weight.detach().double()))
        if global_weight == 0.0:
            return {f"{self._name}/empty_minibatches": Sum(1.0)}
        metrics: dict[str, Measure] = {}
        seen = 0.0
        scale = self._runtime.gradient_scale / global_weight
        passes = self._runtime.passes(len(micro_batches))
        for index in range(passes):
            extra = index >= len(micro_batches)  # for the sake of ranks that have more
            rows = micro_batches[0 if extra else index]
            with self.trained.accumulate(sync=index == passes - 1):
                loss = loss_of(self.trained.learning, rows)
                self.trained.backward(loss.total * (0.0 if extra else scale))
            if not extra:
                seen += float(loss.weight)
                metrics = combine(metrics, loss.metrics)
        if not math.isclose(seen, float(weight), rel_tol=1e-4, abs_tol=1e-6):
            raise ConsistencyError(
                f"{self._name}: the micro-batches weigh {seen} together, but the minibatch was announced with "
                f"{float(weight)}; loss_weight and policy_loss of the algorithm disagree"
            )
        lr = self._optimization.lr * self._optimization.lr_factor(self.steps, self._total_steps)
        norm = self.trained.step(lr=lr)
        if not math.isfinite(float(norm)):
            raise ConsistencyError(
                f"{self._name}: the gradient norm is {float(norm)} at optimizer step {self.steps}; "
                "no update was made. Look at the learning rate, the rewards and the precision"
            )
        self.steps += 1
        return combine(
            metrics, {f"{self._name}/grad_norm": Mean(norm.detach()), f"{self._name}/lr": Last(lr)}
        )

    def save(self, directory: Path) -> None:
        """Write module, optimizer and step count (role of a checkpoint)."""
        self.trained.save(directory)
        if self._runtime.is_main:
            (directory / _PROGRESS).write_text(json.dumps({"steps": self.steps}))

    def load(self, directory: Path) -> None:
        """Continue from what `save` wrote."""
        self.trained.load(directory)
        self.steps = int(json.loads((directory / _PROGRESS).read_text())["steps"])

    def _optimizer_of(self, module: nn.Module) -> torch.optim.Optimizer:
        optimization = self._optimization
        return torch.optim.AdamW(
            _decay_groups(module, optimization.weight_decay),
            lr=optimization.lr,
            betas=optimization.betas,
            eps=optimization.eps,
            fused=_fusable([p for p in module.parameters() if p.requires_grad]),
        )


def _decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay on matrices only: norms and biases are left alone."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups: Iterable[tuple[list[nn.Parameter], float]] = (
        ([p for p in trainable if p.dim() > 1], weight_decay),
        ([p for p in trainable if p.dim() <= 1], 0.0),
    )
    return [
        {"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters
    ]


def _fusable(parameters: Sequence[nn.Parameter]) -> bool:
    return all(p.is_floating_point() and p.device.type in {"cpu", "cuda"} for p in parameters)
