"""What a critic is built from: the parts of a run it may use."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from llmac.algorithms.base import Algorithm
from llmac.core.measures import Measure
from llmac.core.protocols import Critic, Decode, Player, RolloutEngine, SamplingParams, Scorer
from llmac.core.types import Batch, Credit, Rollouts
from llmac.models.loading import LanguageModel, ModelSpec
from llmac.models.packing import Kind, Packing
from llmac.models.policy import TokenPolicy
from llmac.models.value_model import HiddenStates
from llmac.runtime.context import Runtime
from llmac.runtime.learner import Optimization


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOrder:
    """A language model to be trained, and how it learns."""

    name: str
    """Prefix of the metrics of its optimizer: actor, critic."""
    model: ModelSpec
    optimization: Optimization
    epochs: int
    """Passes over what it is given at a time."""
    minibatches: int
    """Optimizer steps a pass."""
    max_tokens_per_microbatch: int
    packing: Kind
    temperature: float
    """What its engine divides logits by."""
    optimizer_steps: int
    """Of the whole run: the end of the learning rate's schedule."""
    uses_reference: bool = False
    """Whether a reference policy is kept."""
    reference: str | None = None
    """Hub id or folder of it; None: the model as it starts."""


class TrainedPolicy(Protocol):
    """A language model that learns, whole or in shards: what `llmac.actor.Actor` can do."""

    @property
    def model(self) -> LanguageModel:
        """As transformers knows it, peft wrapper included."""
        ...

    def annotate(self, batch: Batch, *, reference: bool) -> Rollouts:
        """The batch with log-probabilities as they are now. Collective."""
        ...

    def update(
        self, rollouts: Rollouts, credit: Credit, algorithm: Algorithm
    ) -> dict[str, Measure]:
        """Learn. Collective; metrics begin with `actor/`, those of the optimizer with the order's name."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """For an engine. Collective, to its end."""
        ...

    def logprobs_of(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
        """At temperature 1, for checking an engine against it. Collective."""
        ...

    def save(self, directory: Path) -> None:
        """What a checkpoint keeps."""
        ...

    def load(self, directory: Path) -> None:
        """Continue from a checkpoint."""
        ...


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
    player: Player | None = None
    """The same engine with the policy's words; None: nothing can be sampled."""
    new_player: Callable[[str, int | None], Player] | None = None
    """An engine of its own for another model: Hub id or folder, and longest prompt and response together in tokens
    (None: whatever the model can take). None: nothing can be sampled."""
    new_policy: Callable[[PolicyOrder], TrainedPolicy] | None = None
    """A language model that learns beside the policy; None: there is no room for one."""
    model_named: Callable[[str], ModelSpec] | None = None
    """The recipe's `model` section for another model: its own tokenizer, no adapters."""
    check_engine: Callable[..., object] | None = None
    """Raises unless an engine samples from a model: `llmac.engines.probe.check_engine_holds` with the run's tolerance.
    None: nobody looks."""
    score: Scorer
    """For critics that ask for rewards."""
    sampling: SamplingParams | None = None
    """How the run samples responses, for critics that continue them; None: nothing can be sampled."""
    decode: Decode | None = None
    """Text of token ids, special tokens included; for critics that continue responses which stop strings end."""
    values_ends: bool = True
    """Whether the algorithm takes V behind a response that the length limit has cut; False: a critic for which that is
    dear may say 0 there, but not behind a response that is only paused."""
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
