"""DeepSpeed ZeRO: optimizer, gradients and weights cut into one shard a rank.

Rajbhandari et al. 2020, arXiv:1910.02054.

    stage 1: the optimizer's state is cut      stage 2: gradients too      stage 3: weights too

Each module in training is a DeepSpeed engine of its own, all made from the configuration the job was launched with.
DeepSpeed is imported when the first is made.
"""

import contextlib
import copy
import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from llmac.errors import CheckpointError, ConfigError
from llmac.runtime.trained import OptimizerOf, set_learning_rate

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_TAG = "shards"
_ABOUT = "zero.json"


@dataclass(frozen=True, slots=True)
class Zero:
    """What the launcher asked of DeepSpeed."""

    plugin: DeepSpeedPlugin
    world_size: int
    on_cpu: bool

    @classmethod
    def from_environment(cls, *, world_size: int, on_cpu: bool) -> "Zero":
        """Read what `accelerate launch` left in the environment.

        Raises:
            ConfigError: DeepSpeed is not installed, stage 0, or a key whose owner is the recipe.
        """
        try:
            import deepspeed
        except ImportError as error:
            raise ConfigError(
                f"the accelerate configuration asks for DeepSpeed, which does not import ({error}); "
                "`pip install llmac[train]`, or launch with recipes/accelerate/ddp.yaml"
            ) from error
        plugin = DeepSpeedPlugin()
        owned = {"optimizer": "actor.lr and critic.lr", "scheduler": "actor.schedule"}
        for key, owner in owned.items():
            if key in plugin.deepspeed_config:
                raise ConfigError(
                    f"the DeepSpeed configuration has {key!r}, which the recipe decides ({owner}); remove it there"
                )
        if plugin.zero_stage not in (1, 2, 3):
            raise ConfigError(
                f"the DeepSpeed configuration asks for ZeRO stage {plugin.zero_stage}; expected 1, 2 or 3. Without "
                "sharding, launch with recipes/accelerate/ddp.yaml"
            )
        if on_cpu:
            _compile_nothing()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        deepspeed.init_distributed()  # it finds the process group that is there
        return cls(plugin, world_size, on_cpu)

    @property
    def stage(self) -> int:
        """1, 2 or 3."""
        return int(self.plugin.zero_stage)

    @contextlib.contextmanager
    def loading(self, dtype: torch.dtype) -> Iterator[None]:
        """Inside, `from_pretrained` keeps only this rank's shard of each weight, if `zero3_init_flag` is set.

        Without the flag every rank loads the whole model into main memory, and it is cut when training begins.

        Args:
            dtype: of the weights; DeepSpeed does not listen to `from_pretrained` here.
        """
        if self.stage < 3 or not self.plugin.zero3_init_flag:
            yield
            return
        # transformers looks at the newest object of this kind that is alive.
        announced = HfDeepSpeedConfig(self._config(dtype, hidden_size=1, max_norm=1.0))
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
            del announced

    def train(
        self, module: nn.Module, optimizer_of: OptimizerOf, *, max_norm: float
    ) -> "ZeroSharded":
        """Make a DeepSpeed engine of `module`."""
        import deepspeed

        dtype = _dtype(module)
        for parameter in module.parameters():
            # One precision an engine: a float32 value head follows its bfloat16 trunk. The optimizer's copy is float32.
            if parameter.is_floating_point() and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self._offloadable(optimizer_of(module)),
            config=self._config(dtype, _hidden_size(module), max_norm),
        )
        return ZeroSharded(engine, world_size=self.world_size, stage=self.stage)

    def freeze(self, module: nn.Module) -> nn.Module:
        """A module that only looks: cut into shards at stage 3, whole below."""
        if self.stage < 3:
            return module
        import deepspeed

        config = self._config(_dtype(module), _hidden_size(module), max_norm=1.0)
        # Nothing of it learns, so there is nothing to offload but the weights.
        config["zero_optimization"].pop("offload_optimizer", None)
        engine: nn.Module = deepspeed.initialize(model=module, config=config)[0]
        engine.eval()  # unlike a module's, it returns nothing
        return engine

    def _config(self, dtype: torch.dtype, hidden_size: int, max_norm: float) -> dict[str, Any]:
        plugin = copy.deepcopy(self.plugin)
        config = plugin.deepspeed_config
        config |= {
            # Micro-batches differ in size; these numbers only feed DeepSpeed's own throughput counter.
            "train_micro_batch_size_per_gpu": 1,
            "train_batch_size": self.world_size,
            # The learner divides by the weight of the whole minibatch, nobody else divides.
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0 if math.isinf(max_norm) else max_norm,
            "zero_allow_untested_optimizer": True,
            "bf16": {**config.get("bf16", {}), "enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": False},
            "steps_per_print": float("inf"),
        }
        if self.on_cpu:
            config["zero_force_ds_cpu_optimizer"] = False
        for key, value in bucket_sizes(hidden_size).items():
            if config["zero_optimization"].get(key, "auto") == "auto":
                config["zero_optimization"][key] = value
        return config

    def _offloadable(self, optimizer: Optimizer) -> Optimizer:
        """DeepSpeed's AdamW for main memory where the optimizer's state lives there beside a GPU."""
        device = self.plugin.get_value("zero_optimization.offload_optimizer.device", "none")
        if self.on_cpu or device in (None, "none"):
            return optimizer
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(optimizer.param_groups, adamw_mode=True)


def bucket_sizes(hidden_size: int) -> dict[str, int]:
    """Elements that DeepSpeed's buffers hold and that stay whole, for a model of this width.

    Those of transformers' integration, where DeepSpeed's own default would be buffers of 2 GB an engine; buckets of
    less than a million elements only cost time.
    """
    square = max(hidden_size * hidden_size, 1_000_000)
    return {
        "reduce_bucket_size": square,
        "stage3_prefetch_bucket_size": int(0.9 * square),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }


class ZeroSharded:
    """A `Trained` module in a DeepSpeed engine."""

    def __init__(self, engine: "DeepSpeedEngine", *, world_size: int, stage: int) -> None:
        """Take an engine made by `Zero.train`."""
        self._engine = engine
        self._about = {"stage": stage, "world_size": world_size}

    @property
    def inner(self) -> nn.Module:
        """The module; at stage 3 its parameters are empty outside of forward and backward."""
        module = self._engine.module
        assert isinstance(module, nn.Module)
        return module

    @property
    def learning(self) -> nn.Module:
        """The engine."""
        return self._engine

    @property
    def looking(self) -> nn.Module:
        """The engine as well: it fetches the weights."""
        return self._engine

    @contextlib.contextmanager
    def accumulate(self, *, sync: bool) -> Iterator[None]:
        """Tell DeepSpeed where the minibatch ends."""
        self._engine.set_gradient_accumulation_boundary(sync)
        yield

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients, as shards from stage 2 on."""
        self._engine.backward(loss)

    def step(self, *, lr: float) -> Tensor:
        """Clip, update, forget the gradients; returns the norm before clipping."""
        set_learning_rate(self._engine.optimizer, lr)  # type: ignore[arg-type]
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        assert norm is not None
        return torch.as_tensor(float(norm))

    def save(self, directory: Path) -> None:
        """One set of files a rank."""
        self._engine.save_checkpoint(
            str(directory), tag=_TAG, save_latest=False, exclude_frozen_parameters=True
        )
        if torch.distributed.get_rank() == 0:
            (directory / _ABOUT).write_text(json.dumps(self._about))

    def load(self, directory: Path) -> None:
        """Read this rank's shards back."""
        about = _about(directory)
        if about != self._about:
            raise CheckpointError(
                f"{directory} holds shards of {_words(about)}, and this run has {_words(self._about)}; shards fit "
                "only the number of processes and the stage they were cut for. Launch as it was saved, or start from "
                "its final/ folder"
            )
        path, _ = self._engine.load_checkpoint(
            str(directory), tag=_TAG, load_module_strict=False, load_lr_scheduler_states=False
        )
        if path is None:
            raise CheckpointError(f"DeepSpeed found no shards in {directory / _TAG}")


def _about(directory: Path) -> Mapping[str, int]:
    path = directory / _ABOUT
    if not path.is_file():
        raise CheckpointError(
            f"{directory} was not saved under DeepSpeed; launch with the accelerate configuration it was saved under, "
            "or start from its final/ folder"
        )
    return json.loads(path.read_text())


def _words(about: Mapping[str, int]) -> str:
    return f"ZeRO stage {about['stage']} on {about['world_size']} processes"


def _compile_nothing() -> None:
    """DeepSpeed's shared-memory collective for CPUs is C++ made at first use; gloo does without."""
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False


def _dtype(module: nn.Module) -> torch.dtype:
    """Of most of the weights: a value head in float32 on a bfloat16 trunk makes a bfloat16 module."""
    return max(module.parameters(), key=_elements).dtype


def _elements(parameter: nn.Parameter) -> int:
    """Also of a parameter that is cut already."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _hidden_size(module: nn.Module) -> int:
    """Width of the model inside, for bucket sizes that DeepSpeed derives from it; 1024 if it has none."""
    for part in module.modules():
        config = getattr(part, "config", None)
        if config is not None and hasattr(config, "get_text_config"):
            return int(config.get_text_config().hidden_size)
    return 1024
