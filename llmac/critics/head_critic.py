"""The live critic behind every head on a language model: asks, starts, teaches and saves a `ValueModel`."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import AutoModel

from llmac.core.categorical_heads import OutcomeClasses, nearest_class
from llmac.core.ensembles import spread
from llmac.core.masking import aggregate, aggregation_weight
from llmac.core.measures import Last, Mean, Measure, combine
from llmac.core.moments import Moments
from llmac.core.types import CriticTargets, Loss, Rollouts, Values
from llmac.core.value_heads import Learned, Lesson, Scalar
from llmac.critics.outcomes import mean_outcome
from llmac.critics.scatter import chances_of, values_of
from llmac.critics.target_network import TargetNetwork
from llmac.models.packing import PackedRows, Packing, minibatches
from llmac.models.value_heads import normalize, save_head, start_at
from llmac.models.value_model import ValueModel
from llmac.runtime.context import Runtime
from llmac.runtime.learner import Learner
from llmac.runtime.saving import save_whole, whole_weights

SMALLEST_DEVIATION = 1e-4
"""Returns that do not vary are not divided by less, unit of reward."""

_STATE = "critic.pt"


class Teaching(Protocol):
    """How a head critic learns: what it reads of its settings."""

    @property
    def trunk(self) -> str:
        """`own` or `shared`."""
        ...

    @property
    def epochs(self) -> int:
        """Passes over each step's rollouts."""
        ...

    @property
    def normalization(self) -> str:
        """`none`, `running` or `popart`."""
        ...

    @property
    def learns_together(self) -> bool:
        """Whether an ensemble learns by the loss of its one value."""
        ...


class HeadCritic:
    """A learning `Critic`.

    Until it is first asked it knows nothing; its head is then set to the mean reward of those rollouts, so that the
    explained variance at step 0 is 0 and not negative.
    """

    def __init__(
        self,
        model: ValueModel,
        learner: Learner,
        runtime: Runtime,
        config: Teaching,
        *,
        packing: Packing,
        minibatches: int,
        fresh_head: bool,
        target: TargetNetwork | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            model: the module inside `learner`.
            learner: takes the optimizer steps.
            runtime: the process group.
            config: settings.
            packing: how rows become inputs; the trunk must be able to read them.
            minibatches: optimizer steps a pass.
            fresh_head: the head was never trained; start it at the mean reward.
            target: a copy that follows the model slowly and is asked in its place.
        """
        self._model = model
        self._learner = learner
        self._runtime = runtime
        self._config = config
        self._packing = packing
        self._minibatches = minibatches
        self._fresh_head = fresh_head
        self._target = target
        self._moments = Moments()

    def values(self, rollouts: Rollouts, starts: Bool[Tensor, "B T"]) -> Values:
        """V(s_t) where `starts`, and V(s_T) for truncated rows."""
        if self._fresh_head:
            self._start_at(rollouts)
        micro = list(self._packing.packed(rollouts.trajectories))

        def ask(module: nn.Module, packed: PackedRows, *, raw: bool = False) -> Tensor:
            asked = module if self._target is None else self._target.module
            return asked(packed.to(self._runtime.device), raw=raw).cpu()

        head, packed_rows = self._model.spec.head, [packed for _, packed in micro]
        if not isinstance(head, OutcomeClasses):
            seen = self._learner.look(ask, packed_rows)
            return values_of(micro, seen, rollouts, starts)
        outputs = self._learner.look(partial(ask, raw=True), packed_rows)
        values = values_of(micro, map(self._model.spec.values, outputs), rollouts, starts)
        return dataclasses.replace(
            values,
            outcome_chances=chances_of(
                micro,
                (raw.float().softmax(dim=-1).mean(dim=2) for raw in outputs),
                nearest_class(rollouts.rewards.sum(dim=1), head.rewards),
                starts.shape[1],
            ),
        )

    def update(self, rollouts: Rollouts, targets: CriticTargets) -> dict[str, Measure]:
        """`epochs` passes towards the returns."""
        metrics: dict[str, Measure] = {}
        if self._config.normalization != "none":
            metrics = self._renormalize(targets)
        for _ in range(self._config.epochs):
            for part, part_targets in minibatches(rollouts, targets, self._minibatches):
                metrics = combine(metrics, self._step(part, part_targets))
        return metrics

    def save(self, directory: Path) -> None:
        """Role `critic` of a checkpoint."""
        self._learner.save(directory)
        if self._runtime.is_main:
            target = self._target.state() if self._target else {}
            torch.save(
                {
                    "moments": dataclasses.asdict(self._moments),
                    "target": target,
                    "fresh": self._fresh_head,
                },
                directory / _STATE,
            )

    def load(self, directory: Path) -> None:
        """Continue from a checkpoint; a head that started is not started again."""
        self._learner.load(directory)
        self._fresh_head = False
        path = directory / _STATE
        if path.is_file():  # not in checkpoints from before there was anything to keep
            state = torch.load(path, map_location="cpu", weights_only=True)
            self._moments = Moments(**state["moments"])
            self._fresh_head = state.get("fresh", False)  # not kept by older checkpoints
            if self._target is not None:
                self._target.restore(state["target"], self._model)
        elif self._target is not None:
            self._target.restore({}, self._model)

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
            save_head(head, self._model.spec, directory)

    def _models(self) -> list[ValueModel]:
        return [self._model] + ([self._target.model] if self._target else [])

    def _start_at(self, rollouts: Rollouts) -> None:
        mean = mean_outcome(rollouts, self._runtime)
        if mean is None:  # nothing has ended yet
            return
        for model in self._models():
            start_at(model.head, model.spec.head, mean)
        self._fresh_head = False

    def _renormalize(self, targets: CriticTargets) -> dict[str, Measure]:
        self._moments = self._moments.after(
            targets.returns, targets.value_mask, sum_across=self._runtime.sum
        )
        deviation = max(self._moments.deviation, SMALLEST_DEVIATION)
        for model in self._models():
            normalize(
                model.head,
                mean=self._moments.mean,
                deviation=deviation,
                keep_values=self._config.normalization == "popart",
            )
        return {"critic/vf_scale": Last(deviation)}

    def _step(self, rollouts: Rollouts, targets: CriticTargets) -> dict[str, Measure]:
        def loss_of(module: nn.Module, index: Tensor) -> Loss:
            part = rollouts.rows(index)
            wanted = targets.rows(index, part.response_ids.shape[1])
            rows = self._packing.pack(part.trajectories).to(self._runtime.device)
            return self._loss(module(rows, raw=True), part, wanted)

        metrics = self._learner.update(
            self._packing.micro_batches(rollouts.trajectories),
            loss_of,
            aggregation_weight(targets.value_mask, "token_mean"),
        )
        if self._target is not None:
            self._target.follow(self._model)
        return metrics

    def _loss(self, raw: Tensor, rollouts: Rollouts, targets: CriticTargets) -> Loss:
        spec, mask = self._model.spec, targets.value_mask
        scale = self._model.head.scale
        bootstraps = rollouts.truncated if targets.bootstraps is None else targets.bootstraps
        lesson = Lesson(
            returns=targets.returns.to(raw.device),
            old_values=targets.old_values.to(raw.device),
            mask=mask.to(raw.device),
            rewards=rollouts.rewards.to(raw.device),
            bootstraps=bootstraps.to(raw.device),
            gamma=targets.gamma,
            unit=1.0 if scale is None else float(scale),
        )
        if self._config.learns_together:
            assert isinstance(spec.head, Scalar), "no other card has the field"
            learned = [spec.head.learn_values(spec.values(raw)[:, :-1], lesson)]
        else:
            learned = [spec.head.learn(member, lesson) for member in raw.unbind(dim=2)]
        loss = torch.stack([each.per_token for each in learned]).mean(dim=0).cpu()
        total, weight = aggregate(loss, mask, "token_mean", horizon=1)
        metrics = {"critic/vf_loss": Mean(total.detach(), weight), **_shares(learned, mask, weight)}
        if spec.heads > 1:
            apart = spread(spec.head.decode(raw.detach()))[:, :-1].cpu()
            metrics["critic/values/spread"] = Mean(apart.where(mask, 0.0).sum(), weight)
        return Loss(total=total, weight=weight, metrics=metrics)


def _shares(learned: list[Learned], mask: Tensor, weight: Tensor) -> dict[str, Mean]:
    """Metrics that count states, the mean over the heads of an ensemble."""
    return {
        name: Mean(
            sum((each.shares[name].cpu() & mask).sum() / len(learned) for each in learned), weight
        )
        for name in learned[0].shares
    }
