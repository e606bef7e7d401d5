"""The actor: says how likely the responses are, and moves the policy along the advantages."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from llmac.algorithms.base import Algorithm
from llmac.core.measures import Measure, combine
from llmac.core.types import Batch, Credit, Loss, Rollouts
from llmac.errors import ConsistencyError
from llmac.models.loading import LanguageModel
from llmac.models.packing import PackedRows, Packing, minibatches
from llmac.models.path_probe import settled
from llmac.models.policy import TokenPolicy
from llmac.runtime.context import Runtime
from llmac.runtime.learner import Learner
from llmac.runtime.perturbation import perturbed
from llmac.runtime.weights import BUCKET_BYTES, full_weights


@dataclass(frozen=True, slots=True)
class Reference:
    """π_ref: a frozen policy of its own, or the trained one with its adapter switched off."""

    policy: nn.Module | None
    """What `Runtime.freeze` returned; None: the trained one."""
    frozen_adapter: Callable[[], AbstractContextManager[None]] = nullcontext


class Actor:
    """Owns the policy and its `Learner`."""

    def __init__(
        self,
        policy: TokenPolicy,
        learner: Learner,
        runtime: Runtime,
        *,
        reference: Reference | None,
        packing: Packing,
        epochs: int,
        minibatches: int,
        ratio_tolerance: float,
        sync_bucket_bytes: int = BUCKET_BYTES,
        engine_dtype: torch.dtype | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            policy: the module inside `learner`.
            learner: takes the optimizer steps.
            runtime: the process group.
            reference: needed by algorithms with `uses_reference`.
            packing: how rows become inputs, `fitting` policy and reference.
            epochs: passes over the step's rollouts.
            minibatches: optimizer steps per pass.
            ratio_tolerance: how far the first importance ratio of a step may be from 1 (on-policy check).
            sync_bucket_bytes: memory that `weights` may take above the shards.
            engine_dtype: `weights` come in it; None: in the policy's.
        """
        self._policy = policy
        self._learner = learner
        self._runtime = runtime
        self._reference = reference
        models = [policy, *([reference.policy] if reference and reference.policy else [])]
        self._packing = settled(packing, models, self._ask_everyone, runtime)
        self._epochs = epochs
        self._minibatches = minibatches
        self._ratio_tolerance = ratio_tolerance
        self._sync_bucket_bytes = sync_bucket_bytes
        self._engine_dtype = engine_dtype

    @property
    def model(self) -> LanguageModel:
        """The Hugging Face model in training, peft wrapper included."""
        return self._policy.model

    def annotate(self, batch: Batch, *, reference: bool) -> Rollouts:
        """The batch with log-probs of the policy as it is now, and of the reference if asked for.

        Replayed rows keep the log-probs they were sampled with.
        """
        rollouts = Rollouts.of(
            batch,
            old_logprobs=self._logprobs(batch),
            ref_logprobs=self._reference_logprobs(batch) if reference else None,
        )
        old = torch.where(rollouts.replayed[:, None], batch.sampler_logprobs, rollouts.old_logprobs)
        return replace(rollouts, old_logprobs=old)

    def update(
        self, rollouts: Rollouts, credit: Credit, algorithm: Algorithm
    ) -> dict[str, Measure]:
        """`epochs` passes of `minibatches` optimizer steps each.

        Raises:
            ConsistencyError: on the first micro-batch, before anything was learned, the importance ratio is not 1.
        """
        metrics: dict[str, Measure] = {}
        for epoch in range(self._epochs):
            parts = minibatches(
                rollouts, credit, self._minibatches, whole_groups=algorithm.refreshes_credit
            )
            for number, (part, known) in enumerate(parts):
                first = epoch == 0 and number == 0
                if algorithm.refreshes_credit and not first:
                    known = algorithm.refreshed(known, part, self._logprobs(part))
                metrics = combine(metrics, self._step(part, known, algorithm, on_policy=first))
        return metrics

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights in checkpoint naming, adapters merged: what an engine loads. Collective, to its end."""
        return full_weights(
            self.model, bucket_bytes=self._sync_bucket_bytes, dtype=self._engine_dtype
        )

    def logprobs_of(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
        """Log π of one response's tokens at temperature 1, for checking an engine against the policy."""
        ids = torch.tensor([[*prompt_ids, *response_ids]])
        start, width = len(prompt_ids), len(response_ids)
        rows = PackedRows(
            input_ids=ids,
            states=torch.arange(start - 1, start + width)[None],
            response_ids=ids[:, start:],
            action_mask=torch.ones((1, width), dtype=torch.bool),
            lengths=torch.tensor([width]),
        ).to(self._runtime.device)
        [logprobs] = self._learner.look(
            lambda m, r: m(r, temperature=1.0)[0], [rows], beside_engine=True
        )
        return logprobs[0].tolist()

    def perturbed(self) -> AbstractContextManager[None]:
        """Inside, every weight is another one; afterwards all are what they were. For `prove_updates_arrive`."""
        return perturbed(self._learner.trained.inner, seed=0, rank=self._runtime.rank)

    def hidden(self, rows: PackedRows, *, beside_engine: bool = False) -> Tensor:
        """The backbone's hidden vectors of a micro-batch, flattened [b * L, H], without gradient.

        With `beside_engine` a colocated engine stays awake: for what is asked between an update and sampling.
        """
        [states] = self._learner.look(
            lambda m, r: m(r, hidden_only=True)[0], [rows], beside_engine=beside_engine
        )
        return states

    def save(self, directory: Path) -> None:
        """Role `policy` of a checkpoint."""
        self._learner.save(directory)

    def load(self, directory: Path) -> None:
        """Continue from a checkpoint."""
        self._learner.load(directory)

    def _ask_everyone(self, rows: PackedRows) -> None:
        """Show rows to the policy and the reference."""
        self._learner.look(lambda module, r: module(r), [rows], beside_engine=True)
        other = self._reference.policy if self._reference else None
        if other is not None:
            self._learner.look(lambda _, r: other(r), [rows], beside_engine=True)

    def _step(
        self, rollouts: Rollouts, credit: Credit, algorithm: Algorithm, *, on_policy: bool
    ) -> dict[str, Measure]:
        first = [on_policy]

        def loss_of(module: nn.Module, index: Tensor) -> Loss:
            part = rollouts.rows(index)
            width = part.response_ids.shape[1]
            rows = self._packing.pack(part.trajectories).to(self._runtime.device)
            logprobs, entropy = module(rows, entropy_gradient=algorithm.needs_entropy)
            logprobs, entropy = logprobs.cpu(), entropy.cpu()
            if first.pop() if first else False:
                self._check_ratio(logprobs.detach(), part)
            return algorithm.policy_loss(logprobs, part, credit.rows(index, width), entropy=entropy)

        return self._learner.update(
            self._packing.micro_batches(rollouts.trajectories),
            loss_of,
            algorithm.loss_weight(rollouts, credit),
        )

    def _check_ratio(self, logprobs: Tensor, rollouts: Rollouts) -> None:
        mask = rollouts.action_mask & ~rollouts.replayed[:, None]
        gap = float(
            ((logprobs - rollouts.old_logprobs).abs() * mask).sum() / mask.sum().clamp(min=1)
        )
        # Written so that NaN stops, too.
        if not gap <= self._ratio_tolerance:
            raise ConsistencyError(
                f"the policy has not moved since the rollouts were looked at, yet its log-probabilities changed by "
                f"{gap:.3g} on average (tolerance {self._ratio_tolerance}, run.ratio_tolerance): something in the "
                "model is not deterministic (dropout, a mixture-of-experts router) or the precision is low; with "
                "bfloat16, raise run.ratio_tolerance to what your model needs"
            )

    def _reference_logprobs(self, batch: Batch) -> Tensor:
        reference = self._reference
        assert reference is not None
        with reference.frozen_adapter():
            return self._logprobs(batch, reference.policy)

    def _logprobs(self, batch: Batch | Rollouts, other: nn.Module | None = None) -> Tensor:
        """Of the trained policy, or of the `other`."""
        micro = list(self._packing.packed(batch.trajectories))
        result = torch.zeros(batch.response_ids.shape)
        seen = self._learner.look(
            lambda module, rows: (other or module)(rows.to(self._runtime.device))[0].cpu(),
            [rows for _, rows in micro],
        )
        for (index, _), logprobs in zip(micro, seen, strict=True):
            result[index, : logprobs.shape[1]] = logprobs
        return result
