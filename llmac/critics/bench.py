"""What a critic is built from: the parts of a run it may use."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from llmac.core.protocols import Critic, Decode, RolloutEngine, SamplingParams, Scorer
from llmac.models.loading import LanguageModel, ModelSpec
from llmac.models.packing import Kind, Packing
from llmac.models.policy import TokenPolicy
from llmac.models.value_model import HiddenStates
from llmac.runtime.context import Runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticBench:
    """Everything on the table when a critic is made."""

    runtime: Runtime
    model: ModelSpec
    """The recipe's `model` section."""
    policy: TokenPolicy
    """The policy in training, for a shared trunk."""
    policy_states: HiddenStates
    """Its hidden vectors, without gradient, in the form in which it is trained (possibly in shards)."""
    prompt_states: HiddenStates | None = None
    """The same for prompts that are asked about before sampling, beside an engine that is awake; None:
    `policy_states`."""
    engine: RolloutEngine
    """For critics that sample continuations."""
    score: Scorer
    """For critics that ask for rewards."""
    sampling: SamplingParams | None = None
    """How the run samples responses, for critics that continue them; None: nothing can be sampled."""
    decode: Decode | None = None
    """Text of token ids, special tokens included; for critics that continue responses which stop strings end."""
    seed: int = 0
    """Of the run."""
    pad_id: int
    packing: Kind = "padded"
    """The recipe's `actor.packing`."""
    minibatches: int
    """Optimizer steps a pass, unless the critic says otherwise."""
    max_tokens_per_microbatch: int
    steps: int
    """Steps of the run: the end of the critic's schedule."""
    compute_dtype: torch.dtype | None
    before_learning: Callable[[], None]

    def packing_for(self, trunk: LanguageModel) -> Packing:
        """How a critic on this trunk packs its rows."""
        packing = Packing(
            kind=self.packing, max_tokens=self.max_tokens_per_microbatch, pad_id=self.pad_id
        )
        return packing.fitting(trunk, device=self.runtime.device)


@runtime_checkable
class CriticConfig(Protocol):
    """Settings of a critic that know how to build it."""

    def build(self, bench: CriticBench) -> Critic:
        """The live critic."""
        ...


@runtime_checkable
class Shippable(Protocol):
    """A critic that is a folder in the end, beside the policy's."""

    def save_pretrained(self, directory: Path, *, policy: Path) -> None:
        """Write it; collective.

        Args:
            directory: made if missing.
            policy: folder of the policy saved at this moment, adapters merged.
        """
        ...
