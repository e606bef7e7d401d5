"""The discriminative critic: a language model with a scalar head, its own optimizer, learning rate and schedule."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from llmac.core.losses import value_clipped, value_mse
from llmac.core.masking import aggregate, aggregation_weight, masked_mean
from llmac.core.measures import Mean, Measure, combine
from llmac.core.types import CriticTargets, Loss, Rollouts, Values
from llmac.critics.bench import CriticBench
from llmac.errors import ConfigError
from llmac.models.loading import add_lora, load_backbone, torch_dtype, train_in_full_mode
from llmac.models.packing import (
    micro_batches,
    minibatch_rows,
    pack,
    packed_micro_batches,
)
from llmac.models.policy import causal_lm
from llmac.models.value_model import HEAD_FILE, ValueModel, save_head
from llmac.runtime.context import Runtime
from llmac.runtime.learner import Learner, Optimization
from llmac.runtime.saving import save_whole, whole_weights


@dataclass(frozen=True, kw_only=True)
class ValueHeadConfig(Optimization):
    """A language model with a scalar head that learns returns by (clipped) squared error."""

    lr: float = 1e-5
    """Learning rate of AdamW; ten times the policy's is usual (verl: 1e-5 against 1e-6)."""
    init: str = "policy"
    """Where the backbone's weights come from: `policy` (the starting policy) or a Hub id or folder."""
    trunk: Literal["own", "shared"] = "own"
    """A model of its own, or the policy's backbone with only the head added."""
    detach_trunk: bool = True
    """With a shared trunk: values do not move it. False: the critic's optimizer moves it too."""
    lora: bool = False
    """Train low-rank adapters (the sizes of `model.lora`) on an own trunk instead of all its weights."""
    epochs: int = 1
    """Passes over each step's rollouts."""
    minibatches: int | None = None
    """Optimizer steps a pass; None = as many as the actor takes."""
    value_clip: float | None = 0.2
    """How far a value may move from the one at collection before its loss is clipped, as a fraction of the width of
    `reward_range`; None = no clipping. The peers' fixed 0.2 and 0.5 (TRL, verl) are this only for rewards in [0, 1]."""
    reward_range: tuple[float, float] = (0.0, 1.0)
    """Smallest and largest return to expect; sizes the clip."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        low, high = self.reward_range
        if not low < high:
            raise ValueError(f"reward_range must be (smallest, largest), found ({low}, {high})")
        if self.value_clip is not None and self.value_clip <= 0:
            raise ValueError(
                f"value_clip must be positive or null (no clipping), found {self.value_clip}"
            )
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, found {self.epochs}")

    def without_effect(self) -> dict[str, str]:
        """Fields that do nothing as they are set, with the reason."""
        if self.trunk == "own":
            return {"detach_trunk": "a trunk of its own is always trained; set trunk: shared"}
        reason = "a shared trunk is the policy's; set trunk: own"
        return {"init": reason, "lora": reason}

    @property
    def clip(self) -> float | None:
        """The clip in units of reward."""
        low, high = self.reward_range
        return None if self.value_clip is None else self.value_clip * (high - low)

    def build(self, bench: CriticBench) -> "ValueHead":
        """The live critic: backbone, head, learner."""
        alone = bench.runtime.world_size == 1 and not bench.runtime.shards
        if self.trunk == "shared" and not self.detach_trunk and not alone:
            raise ConfigError(
                "critic.detach_trunk: false with critic.trunk: shared works in one process without DeepSpeed only, "
                "because two optimizers would own the same weights; set detach_trunk: true or trunk: own"
            )
        with bench.runtime.loading(torch_dtype(bench.model)):
            model, fresh_head = self._model(bench)
        if self.trunk == "own":
            train_in_full_mode(
                model.backbone, gradient_checkpointing=bench.model.gradient_checkpointing
            )
        minibatches = self.minibatches or bench.minibatches
        learner = Learner(
            model,
            self,
            bench.runtime,
            name="critic",
            total_steps=bench.steps * self.epochs * minibatches,
            compute_dtype=bench.compute_dtype,
            before_learning=bench.before_learning,
        )
        return ValueHead(
            model,
            learner,
            bench.runtime,
            self,
            pad_id=bench.pad_id,
            minibatches=minibatches,
            max_tokens_per_microbatch=bench.max_tokens_per_microbatch,
            fresh_head=fresh_head,
        )

    def _model(self, bench: CriticBench) -> tuple[ValueModel, bool]:
        """The value model, and whether its head was never trained."""
        if self.trunk == "shared":
            trunk = cast(PreTrainedModel, causal_lm(bench.policy.model).base_model)
            return ValueModel(
                trunk, states=bench.policy_states if self.detach_trunk else None
            ), True
        if (Path(self.init) / HEAD_FILE).is_file():
            saved = ValueModel.from_pretrained(self.init, dtype=torch_dtype(bench.model))
            return self._adapted(saved, bench), False
        backbone = load_backbone(bench.model, None if self.init == "policy" else self.init)
        return self._adapted(ValueModel(backbone), bench), True

    def _adapted(self, model: ValueModel, bench: CriticBench) -> ValueModel:
        """With adapters on its trunk, if the settings say so."""
        if not self.lora:
            return model
        assert bench.model.lora is not None, "checked with the recipe"
        assert isinstance(model.backbone, PreTrainedModel)
        adapted = ValueModel(add_lora(model.backbone, bench.model.lora, task="FEATURE_EXTRACTION"))
        adapted.head.load_state_dict(model.head.state_dict())
        return adapted


class ValueHead:
    """A learning `Critic`.

    Until it is first asked it knows nothing; its head is then set to the mean reward of those rollouts, so that the
    explained variance at step 0 is 0 and not negative.
    """

    def __init__(
        self,
        model: ValueModel,
        learner: Learner,
        runtime: Runtime,
        config: ValueHeadConfig,
        *,
        pad_id: int,
        minibatches: int,
        max_tokens_per_microbatch: int,
        fresh_head: bool,
    ) -> None:
        """Put the parts together.

        Args:
            model: the module inside `learner`.
            learner: takes the optimizer steps.
            runtime: the process group.
            config: settings.
            pad_id: any token id; padding is never looked at.
            minibatches: optimizer steps a pass.
            max_tokens_per_microbatch: bound on rows x longest row.
            fresh_head: the head was never trained; start it at the mean reward.
        """
        self._model = model
        self._learner = learner
        self._runtime = runtime
        self._config = config
        self._pad_id = pad_id
        self._minibatches = minibatches
        self._max_tokens = max_tokens_per_microbatch
        self._fresh_head = fresh_head

    def values(self, rollouts: Rollouts, starts: Bool[Tensor, "B T"]) -> Values:
        """V(s_t) where `starts`, and V(s_T) for truncated rows."""
        if self._fresh_head:
            self._start_at(rollouts)
        rows, width = rollouts.response_ids.shape
        at, bootstrap = torch.zeros(rows, width), torch.zeros(rows)
        micro = list(
            packed_micro_batches(
                rollouts.trajectories, max_tokens=self._max_tokens, pad_id=self._pad_id
            )
        )
        seen = self._learner.look(
            lambda module, packed: module(packed.to(self._runtime.device)).cpu(),
            [packed for _, packed in micro],
        )
        for (index, packed), values in zip(micro, seen, strict=True):
            at[index, : values.shape[1] - 1] = values[:, :-1]
            bootstrap[index] = values.gather(1, packed.lengths[:, None]).squeeze(1)
        return Values(at=at * starts, starts=starts, bootstrap=bootstrap * rollouts.truncated)

    def update(self, rollouts: Rollouts, targets: CriticTargets) -> dict[str, Measure]:
        """`epochs` passes of clipped squared error towards the returns."""
        metrics: dict[str, Measure] = {}
        for _ in range(self._config.epochs):
            for index in minibatch_rows(len(rollouts.trajectories), self._minibatches):
                part = rollouts.rows(index)
                part_targets = targets.rows(index, part.response_ids.shape[1])
                metrics = combine(metrics, self._step(part, part_targets))
        return metrics

    def save(self, directory: Path) -> None:
        """Role `critic` of a checkpoint."""
        self._learner.save(directory)

    def load(self, directory: Path) -> None:
        """Continue from a checkpoint; a trained head is not started again."""
        self._learner.load(directory)
        self._fresh_head = False

    def save_pretrained(self, directory: Path, *, policy: Path) -> None:
        """A folder that `ValueModel.from_pretrained` loads. Collective.

        Args:
            directory: made if missing.
            policy: folder of the policy saved at this moment, adapters merged: the trunk, if it is shared.
        """
        is_main = self._runtime.is_main
        if self._config.trunk == "own":
            save_whole(self._model.backbone, directory, is_main=is_main)
        elif is_main:
            AutoModel.from_pretrained(policy).save_pretrained(directory)
        head = whole_weights(self._model.head, keep=is_main)
        if is_main:
            save_head(head, directory)

    def _start_at(self, rollouts: Rollouts) -> None:
        outcomes = rollouts.rewards.sum(1)
        mean = masked_mean(
            outcomes, torch.ones_like(outcomes, dtype=torch.bool), sum_across=self._runtime.sum
        )
        self._model.head.offset.fill_(float(mean))
        self._fresh_head = False

    def _step(self, rollouts: Rollouts, targets: CriticTargets) -> dict[str, Measure]:
        def loss_of(module: nn.Module, index: Tensor) -> Loss:
            part = rollouts.rows(index)
            wanted = targets.rows(index, part.response_ids.shape[1])
            rows = pack(part.trajectories, pad_id=self._pad_id).to(self._runtime.device)
            return self._loss(module(rows)[:, :-1].cpu(), wanted)

        return self._learner.update(
            micro_batches(rollouts.trajectories, max_tokens=self._max_tokens),
            loss_of,
            aggregation_weight(targets.value_mask, "token_mean"),
        )

    def _loss(self, values: Tensor, targets: CriticTargets) -> Loss:
        mask, clip = targets.value_mask, self._config.clip
        if clip is None:
            per_token = value_mse(values, targets.returns)
            clipped = torch.zeros_like(mask)
        else:
            per_token = value_clipped(values, targets.old_values, targets.returns, clip=clip)
            clipped = (values.detach() - targets.old_values).abs() > clip
        total, weight = aggregate(per_token, mask, "token_mean", horizon=1)
        return Loss(
            total=total,
            weight=weight,
            metrics={
                "critic/vf_loss": Mean(total.detach(), weight),
                "critic/vf_clipfrac": Mean((clipped & mask).sum(), weight),
            },
        )
