"""The doors between rooms: what an engine, a plan, a prompt source and a critic must be able to do."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.measures import Metrics
from llmac.core.types import (
    AllSum,
    CriticTargets,
    Finish,
    Messages,
    Prompt,
    Rollouts,
    Trajectory,
    Values,
    identity,
)

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens included."""

Encode = Callable[[str | Messages], tuple[int, ...]]
"""A prompt that somebody wrote, text or chat messages, to what an engine continues. Messages go through the chat
template; where the last one is the assistant's, it is gone on with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample. The same words and meanings for every engine."""

    n: int = 1
    """Responses per prompt."""
    temperature: float = 1.0
    """Logits are divided by it; 0 = greedy."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability; 1 = all."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 = all."""
    max_new_tokens: int = 512
    stop_token_ids: tuple[int, ...] = ()
    """End the response, besides the tokenizer's end-of-sequence token."""
    stop: tuple[str, ...] = ()
    """End the response when its decoded text contains one of these; the token completing it is kept."""
    seed: int | None = None
    """Same seed, same weights, same requests: same responses. None: the engine draws one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt for an engine."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled response as the engine reports it."""

    token_ids: tuple[int, ...]
    """The stop token is included when one was sampled."""
    logprobs: tuple[float, ...]
    """log μ(a_t|s_t) of each token under the distribution it was drawn from (temperature, top-p, top-k applied)."""
    finish: Finish
    policy_version: int = 0
    """Number of `load_weights` calls the engine had completed when it sampled this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """One completion that somebody wrote."""

    token_ids: tuple[int, ...]
    """With the end-of-sequence token, unless it was not wanted."""
    text: str


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples responses and takes new weights live. Implementations: `engines.hf_engine`, `engines.vllm_engine`."""

    @property
    def policy_version(self) -> int:
        """The version given to the last completed `load_weights`; 0 before any."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """`params.n` completions for each request, in the order of the requests.

        Every rank calls this in step with the others, also with nothing to ask: they may share an engine.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights by the stream (checkpoint naming) and take `version`; all or nothing."""
        ...

    def sleep(self) -> None:
        """Free accelerator memory until the next call."""
        ...

    def wake(self) -> None:
        """Undo `sleep`. Called by the engine itself on `generate` and `load_weights`."""
        ...

    def close(self) -> None:
        """Release everything. Safe to call twice."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Player:
    """A language model that is spoken to in words: who samples, and the way from text to token ids and back."""

    engine: RolloutEngine
    encode: Encode
    decode: Decode
    """Special tokens included."""
    read: Decode
    """Without special tokens: what is shown to another model, or to a reward function."""
    spell: Callable[[str], tuple[int, ...]] | None = None
    """Token ids of a text as it is, without special tokens, which may be none; None: as `encode`."""
    limit: int | None = None
    """Tokens of a prompt and what is sampled to it together that `engine` takes; None: not known."""


@runtime_checkable
class Metered(Protocol):
    """Has counts of its own to report: an engine over servers that may be lost, a critic that samples."""

    def metrics(self) -> Metrics:
        """What happened since the last call."""
        ...


@runtime_checkable
class CountsPrefixHits(Protocol):
    """An engine that knows how much of its prompts it did not have to compute."""

    def prefix_hits(self) -> Metrics:
        """`rollout/prefix_hit_rate` of all that was sampled since the last call; nothing where nothing was."""
        ...


@runtime_checkable
class Resendable(Protocol):
    """An engine that may lose its weights between two updates, and then asks for them again."""

    resend: Callable[[], Iterable[tuple[str, Tensor]]] | None
    """A new stream of the weights of the last update; called on all ranks together."""


@runtime_checkable
class PromptSource(Protocol):
    """An endless, resumable stream of prompts, already sharded to this rank."""

    def take(self, count: int) -> list[Prompt]:
        """This rank's next `count` prompts."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """Sets `reward`, `reward_parts` and `response_text` of finished trajectories."""

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """The same trajectories, in their order, rewarded."""
        ...


@runtime_checkable
class RolloutPlan(Protocol):
    """Decides which responses are sampled for which prompts. Implementations: `core.plans`."""

    @property
    def length_limit(self) -> int:
        """Response length, tokens, at which sampling is cut."""
        ...

    def rollout(
        self,
        engine: RolloutEngine,
        prompts: PromptSource,
        score: Scorer,
        *,
        seed: int,
        sum_across: AllSum = identity,
    ) -> tuple[list[Trajectory], Metrics]:
        """Sample and score one step's trajectories on this rank, with counts of what was dropped."""
        ...


@runtime_checkable
class Critic(Protocol):
    """Says V(s). Implementations: `critics/`. A critic that does not learn returns {} from `update`."""

    def values(self, rollouts: Rollouts, starts: Bool[Tensor, "B T"]) -> Values:
        """V(s_t) where `starts`, and V(s_T) of truncated rows."""
        ...

    def update(self, rollouts: Rollouts, targets: CriticTargets) -> Metrics:
        """Move towards the targets."""
        ...


@runtime_checkable
class OffersResponses(Protocol):
    """A critic that sampled responses of its own, which may be trained on like the plan's."""

    offers: bool
    """Whether it does: the same on all ranks."""

    def responses(self) -> list[Trajectory]:
        """Those of the last `values`, scored: `fresh_from` where they begin, `value_span` what it said there.

        Siblings of the row that they branch off: their `group` is that row's.
        """
        ...


@runtime_checkable
class Observer(Protocol):
    """A critic that learns from outcomes, not from targets: running means, values of prompts."""

    def observe(self, rollouts: Rollouts) -> Metrics:
        """Take in a step's outcomes. Called once a step, after its values were given."""
        ...


@runtime_checkable
class PromptCritic(Protocol):
    """Says what a prompt is worth before anything is sampled: V(s_0)."""

    @property
    def reward_range(self) -> tuple[float, float]:
        """Outcome of a failure and of a success."""
        ...

    def prompt_values(self, prompts: Sequence[Prompt]) -> Float[Tensor, "N"]:
        """Expected outcome of each prompt, in reward units."""
        ...


@runtime_checkable
class AsksPromptValues(Protocol):
    """A plan that wants to know what prompts are worth before it samples. `build` sets the attributes."""

    reward_range: tuple[float, float]
    """Outcome of a failure and of a success, as the critic has them."""
    prompt_values: Callable[[Sequence[Prompt]], Float[Tensor, "N"]] | None
    """Of the run's critic."""


@runtime_checkable
class Uneven(Protocol):
    """A plan that may give one rank much more to learn from than another. The loop then moves groups between ranks."""

    uneven: bool
    """Its rows differ from rank to rank: the same on all ranks."""


@runtime_checkable
class ReadsText(Protocol):
    """A plan that must read what was sampled. `build` sets the attribute."""

    decode: Decode | None


@runtime_checkable
class WritesPrompts(Protocol):
    """A plan that asks the policy about texts which are no row of the data, such as a critique of its own answer.

    `build` sets the attribute, and makes the policy's engine with room for its whole context.
    """

    player: Player | None
    """The trained policy."""


@runtime_checkable
class NeedsPartner(Protocol):
    """A plan in which a second language model takes part that does not learn. `build` sets `partner`."""

    @property
    def partner_model(self) -> str | None:
        """Hub id or folder; None: what the policy began as."""
        ...

    partner: Player | None


@runtime_checkable
class Stateful(Protocol):
    """Remembers something from step to step that a resumed run must know: a plan, an algorithm's memory."""

    def state(self) -> dict[str, Any]:
        """Everything to continue from: numbers, strings, lists, dictionaries, tensors."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        ...


@runtime_checkable
class NeedsDemonstrations(Protocol):
    """A plan that learns from completions in the data. `build` reads them all before a model is loaded."""

    column: str
    """With the completions."""
    append_end: bool
    """Whether a completion gets the end-of-sequence token it lacks."""
    completions: Mapping[str, Demonstration] | None
    """Of each prompt, by its id; None before `build`."""


@runtime_checkable
class NeedsRollouts(Protocol):
    """A plan that replays stored responses. `build` reads them and hands over this rank's share."""

    path: str
    """File of stored rollouts."""
    keep_above: float | None
    """Only responses with a reward above it are handed over; None: all."""
    seed: int
    """Of the run: the order of the replay is drawn from it."""
    stored: Sequence[Trajectory] | None
    """This rank's share; None before `build`."""
