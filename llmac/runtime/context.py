"""Where this process stands among its siblings, and every way in which they talk to each other."""

import atexit
import contextlib
import logging
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch
import torch.distributed as distributed
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.tracking import filter_trackers
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.nn.parallel import DistributedDataParallel

from llmac.errors import ConfigError
from llmac.runtime.fully_sharded import FullShard
from llmac.runtime.interfaces import interface_towards
from llmac.runtime.trained import OptimizerOf, Replicated, Trained
from llmac.runtime.zero import Zero

logger = logging.getLogger(__name__)

T = TypeVar("T")

LAST_TENSORS_SECONDS = 0.25
"""Pause before the interpreter of one rank of several ends."""


class Runtime:
    """One process among `world_size`: its device, its collectives, how modules are spread, its trackers.

    Works in one process without any launcher, and in every process that `accelerate launch` or
    `torchrun` starts. The collectives (`sum`, `max`, `gather`, `broadcast`, `barrier`, `train`,
    `freeze`) must be called by all ranks in the same order; in one process they cost nothing.

    A minibatch split over ranks and micro-batches has the gradient of the whole when each
    micro-batch contributes

        loss = total · gradient_scale / weight,    weight = sum(Σ of this rank's own weights)

    because gradients are *averaged* over ranks: every rank receives (1/R)·Σ_r ∂loss_r, and
    `gradient_scale` = R undoes the 1/R.

    Where weights or gradients are sharded, a forward or backward pass is a collective, and all
    ranks must make the same number of them (`passes`).

    >>> runtime = Runtime.create(seed=0, output=None)
    >>> runtime.world_size, runtime.sum(torch.tensor([3])).tolist(), runtime.gather("a")
    (1, [3], ['a'])
    >>> runtime.close()
    """

    def __init__(self, accelerator: Accelerator, sharding: Zero | FullShard | None = None) -> None:
        """Wrap an accelerator configured as `create` does it, which is the way to make a Runtime."""
        self._accelerator = accelerator
        self._sharding = sharding
        self._tracking = False
        self._closed = False
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.local_rank: int = max(accelerator.local_process_index, 0)
        self.local_world_size: int = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        # accelerate numbers CPU devices by rank; its "cpu:0" compares unequal to a tensor's "cpu".
        device = accelerator.device
        self.device: torch.device = torch.device("cpu") if device.type == "cpu" else device

    @classmethod
    def create(
        cls, *, seed: int, output: Path | str | None, timeout_seconds: float = 7200.0
    ) -> "Runtime":
        """Join the other processes, if a launcher started any, and seed this one.

        Args:
            seed: of the run; each rank derives its own from it, see `seed`.
            output: run directory; trackers that write files do so in its `trackers`. None: a
                tracker that needs a directory is refused.
            timeout_seconds: how long a collective waits for the slowest rank. Longer than the
                watchdog's limit, so that the watchdog, which can name the phase, speaks first.

        Raises:
            ConfigError: the launcher asks for a kind of distribution that is not supported.
        """
        asked = _asked_for()
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision != "no":
            # Precision has one owner, the recipe: accelerate's would wrap forward a second time.
            logger.warning(
                "accelerate's mixed_precision=%s has no effect; model.compute_dtype decides",
                precision,
            )
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        on_cpu = launched and not torch.cuda.is_available()
        handlers: list[Any] = []
        if launched:
            timeout = timedelta(seconds=timeout_seconds)
            backend = "gloo" if on_cpu else "nccl"
            handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timeout))
        project = ProjectConfiguration()
        if output is not None:
            project = ProjectConfiguration(str(output), logging_dir=str(Path(output) / "trackers"))
        ours = launched and not distributed.is_initialized()
        if ours and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < int(os.environ["WORLD_SIZE"]):
            interface = interface_towards(os.environ.get("MASTER_ADDR", ""))
            if interface is not None:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        with _plain_accelerate():
            accelerator = Accelerator(
                cpu=on_cpu,
                mixed_precision="no",
                # Explicit, so that no environment variable divides the loss behind the learner's back.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                project_config=project,
                kwargs_handlers=handlers,
            )
        if ours:
            atexit.register(_leave)
        runtime = cls(accelerator, _sharding(asked, accelerator))
        runtime.seed(seed)
        return runtime

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    @property
    def gradient_scale(self) -> float:
        """Factor on an undivided loss that makes the synchronised gradient the *sum* over ranks."""
        return float(self.world_size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on the tensor's own device and in its dtype, without gradient.

        Half precision is added up in float32. The argument is left alone.

        Raises:
            TypeError: a bool tensor; convert it to int64 to count.
        """
        if tensor.dtype == torch.bool:
            raise TypeError(
                "the sum over ranks of a bool tensor is ambiguous; use .long() to count"
            )
        if self.world_size == 1:
            return tensor.detach()
        half = tensor.dtype in (torch.bfloat16, torch.float16)
        exact = torch.float32 if half else tensor.dtype
        total = tensor.detach().to(device=self.device, dtype=exact, copy=True).contiguous()
        distributed.all_reduce(total, op=distributed.ReduceOp.SUM)
        return total.to(device=tensor.device, dtype=tensor.dtype)

    def max(self, number: float) -> float:
        """The largest over all ranks; NaN if any rank has NaN."""
        if self.world_size == 1:
            return float(number)
        mine = torch.tensor(float(number), dtype=torch.float64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        # Gathered, not reduced: a MAX reduction drops NaN on some backends.
        distributed.all_gather(everyone, mine)
        return float(torch.stack(everyone).max())

    def gather(self, item: T) -> list[T]:
        """Every rank's (picklable) object in the order of ranks, on every rank."""
        if self.world_size == 1:
            return [item]
        everyone: list[Any] = [None] * self.world_size
        distributed.all_gather_object(everyone, item)
        return everyone

    def broadcast(self, item: T) -> T:
        """Rank 0's (picklable) object on every rank."""
        if self.world_size == 1:
            return item
        box: list[Any] = [item]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            self._accelerator.wait_for_everyone()

    def seed(self, n: int) -> int:
        """Seed python, numpy and torch (all devices) from `n` and the rank; returns that seed.

        Hashed, not added: with n + rank, rank 1 of seed 0 would repeat rank 0 of seed 1.
        """
        sequence = numpy.random.SeedSequence(n, spawn_key=(self.rank,))
        own = int(sequence.generate_state(1)[0])
        random.seed(own)
        numpy.random.seed(own)
        torch.manual_seed(own)
        return own

    def train(
        self,
        module: nn.Module,
        optimizer_of: OptimizerOf,
        *,
        max_norm: float,
        compute_dtype: torch.dtype | None = None,
    ) -> Trained:
        """Move a module to the device, spread it over the ranks as the launcher asked, add its optimizer.

        Rank 0's weights win. Every trainable parameter must take part in every forward pass that
        leads to a backward pass.

        Args:
            module: what learns; built alike on every rank.
            optimizer_of: called once, with the module in the form in which it learns.
            max_norm: gradients are clipped to this norm, `math.inf` for never.
            compute_dtype: forward passes run in it where that is safe; None: in the weights' own.
        """
        self._compute_in(module, compute_dtype)
        if isinstance(self._sharding, Zero):
            return self._sharding.train(module, optimizer_of, max_norm=max_norm)
        if isinstance(self._sharding, FullShard):
            return self._sharding.train(module.to(self.device), optimizer_of, max_norm=max_norm)
        prepared, optimizer = self._accelerator.prepare(module, optimizer_of(module))
        if isinstance(prepared, DistributedDataParallel):
            # Otherwise even a forward without gradients is a collective, and ranks with different
            # numbers of them (ragged rollouts) would wait for each other for ever.
            prepared.broadcast_buffers = False
        return Replicated(prepared, optimizer, max_norm=max_norm, is_main=self.is_main)

    def freeze(self, module: nn.Module, *, compute_dtype: torch.dtype | None = None) -> nn.Module:
        """Move a module that only looks to the device, in shards where weights are sharded; returns what to call."""
        self._compute_in(module, compute_dtype)
        module.requires_grad_(False).eval()
        if isinstance(self._sharding, Zero) and self._sharding.stage == 3:
            return self._sharding.freeze(module)
        if isinstance(self._sharding, FullShard):
            return self._sharding.freeze(module.to(self.device))
        return module.to(self.device)

    def loading(self, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
        """Around `from_pretrained(dtype=dtype)` of what is to be spread: shards from the start, if asked for."""
        if isinstance(self._sharding, Zero):
            return self._sharding.loading(dtype)
        return contextlib.nullcontext()

    @property
    def shards(self) -> bool:
        """Whether the launcher asked for sharding; a single process may, for its optimizer in main memory."""
        return self._sharding is not None

    @property
    def in_lockstep(self) -> bool:
        """Whether a pass through a module is a collective, so that all ranks must make equally many."""
        return not isinstance(self._sharding, Zero | None) or (
            self._sharding is not None and self._sharding.stage > 1
        )

    def passes(self, own: int) -> int:
        """Passes this rank has to make when it needs `own`: the most of all ranks, where they are in lockstep."""
        return int(self.max(own)) if self.in_lockstep else own

    def _compute_in(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        """Run the module's forward under autocast to `dtype`; None or float32: in the weights' own precision.

        Inside the module and not around it: DeepSpeed switches autocast off where it is entered outside of its engine.
        """
        if dtype is None or dtype == torch.float32:
            return
        # The cache would keep a copy of every weight in `dtype` until the end of the pass, undoing the sharding.
        autocast = torch.autocast(
            self.device.type, dtype=dtype, cache_enabled=self._sharding is None
        )
        module.forward = autocast(module.forward)

    def start_trackers(self, names: Sequence[str], project: str, config: Mapping[str, Any]) -> None:
        """Start accelerate's trackers (tensorboard, wandb, trackio, ...) and show them the recipe.

        Raises:
            ConfigError: a name that accelerate does not know, or whose package is not installed.
        """
        if not names:
            return
        try:
            found = filter_trackers(list(names), self._accelerator.logging_dir)
        except ValueError as error:
            raise ConfigError(f"run.trackers: {error}") from error
        missing = sorted(set(names) - {str(tracker) for tracker in found})
        if missing:
            raise ConfigError(
                f"run.trackers asks for {', '.join(missing)}, which is not installed; "
                f"install it (pip install {' '.join(missing)}) or take it out of run.trackers"
            )
        self._accelerator.log_with = found
        self._accelerator.init_trackers(project, config=_flat(config))
        self._tracking = True

    def track(self, metrics: Mapping[str, float], step: int) -> None:
        """Hand a step's numbers to the trackers; rank 0's count, and none without trackers."""
        if self._tracking:
            self._accelerator.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the trackers and wait for the other ranks. Once is enough, twice is safe.

        Without the wait a rank that is done would cut the connections the others still read from.
        The process group itself is left when the process ends; until then `create` works again.
        """
        if self._closed:
            return
        self._closed = True
        if self._tracking:
            for tracker in self._accelerator.trackers:
                tracker.finish()
        # Not while failing: the others may never come.
        if self.world_size > 1 and sys.exc_info()[0] is None:
            try:
                distributed.barrier()
            except (RuntimeError, ValueError) as error:
                # Another rank died, or an in-process vLLM that closed first took the group along.
                logger.debug("the process group was already gone: %s", error)


def _asked_for() -> str | None:
    """The kind of sharding that the launcher asked for.

    Raises:
        ConfigError: a kind that is not supported.
    """
    asked = {
        name
        for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM")
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"
    }
    old = "FSDP" in asked and os.environ.get("FSDP_VERSION", "1") != "2"
    if old or "MEGATRON_LM" in asked:
        raise ConfigError(
            f"the accelerate configuration asks for {'FSDP version 1' if old else 'Megatron-LM'}, which llmac does not "
            "run; launch with one of recipes/accelerate/ (ddp, zero1, zero2, zero3, zero3_offload, fsdp2)"
        )
    return next(iter(asked), None)


def _sharding(asked: str | None, accelerator: Accelerator) -> Zero | FullShard | None:
    world_size, device = accelerator.num_processes, accelerator.device
    if asked == "DEEPSPEED":
        if not distributed.is_initialized():  # one process, say with its optimizer in main memory
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed looks for it
            backend = "gloo" if device.type == "cpu" else "nccl"
            distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        return Zero.from_environment(world_size=world_size, on_cpu=device.type == "cpu")
    if asked == "FSDP" and world_size > 1:
        return FullShard(world_size=world_size, device=device)
    return None


@contextlib.contextmanager
def _plain_accelerate() -> Iterator[None]:
    """Inside, accelerate starts processes and trackers and leaves modules alone: sharding is done by `train`."""
    names = [
        name for name in os.environ if name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
    ]
    kept = {name: os.environ.pop(name) for name in names}
    # transformers would load weights on rank 0 only.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    try:
        yield
    finally:
        os.environ.update(kept)


def _leave() -> None:
    """Destroy the process group when the process ends.

    Not earlier: a launcher's rendezvous lets a process join once, and a program may train twice.
    """
    if distributed.is_initialized():
        with contextlib.suppress(AssertionError, RuntimeError, ValueError):
            distributed.destroy_process_group()
    # gloo's threads let go of the tensors of the last collectives a moment after these are over, and need Python's
    # lock for it. One that first gets to ask for it while the interpreter ends aborts the process.
    time.sleep(LAST_TENSORS_SECONDS)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested configuration as `a.b: value`, of the value types every tracker takes."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, bool | int | float | str)
            flat[f"{prefix}{key}"] = value if plain else str(value)
    return flat
