"""Who says what the beginning of a response is worth: a value model, a critic, or anything else that can."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from llmac.core.collate import collate
from llmac.core.protocols import Critic
from llmac.core.types import Finish, Prompt, Rollouts, Trajectory
from llmac.decoding.fitting import check_judges_states
from llmac.errors import ConfigError
from llmac.models.packing import PackedRows, Packing
from llmac.models.path_probe import settled
from llmac.models.value_model import ValueModel

MAX_TOKENS = 16384
"""Tokens of one forward pass of a value model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A prompt, and what was said so far."""

    prompt: Prompt
    response_ids: tuple[int, ...]


@runtime_checkable
class SaysValues(Protocol):
    """Says what states are worth, higher for better ones."""

    def values_of(self, states: Sequence[State]) -> list[float]:
        """V of each state, in their order."""
        ...


@runtime_checkable
class SharesEngine(Protocol):
    """A critic that can say whether it speaks through the policy's engine."""

    @property
    def shares_engine(self) -> bool:
        """Whether that engine has the critic's weights once it was asked."""
        ...


class ValueModelSays:
    """A `SaysValues` over a loaded value model, which goes to evaluation mode and is otherwise not changed."""

    def __init__(
        self, model: ValueModel, *, max_tokens: int = MAX_TOKENS, packing: str = "auto"
    ) -> None:
        """Look at the model; nothing is computed yet but a few tokens.

        Args:
            model: on the device where it is to compute.
            max_tokens: of one forward pass.
            packing: how states become inputs, as in `actor.packing`; states that begin alike are computed once where
                that pays.
        """
        self.model = model.eval()
        self._alone = _Alone(device=next(model.parameters()).device)
        assert packing in ("auto", "trie", "varlen", "padded"), packing
        wanted = Packing(kind=packing, max_tokens=max_tokens, pad_id=0)
        fitting = wanted.fitting(model.backbone, device=self._alone.device)
        with torch.no_grad():
            self._packing = settled(fitting, [model.backbone], model, self._alone)

    @torch.no_grad()
    def values_of(self, states: Sequence[State]) -> list[float]:
        """V(s) of each state: what the head says behind its last token."""
        rows = [_row(state, group) for group, state in enumerate(states)]
        values = torch.zeros(len(rows))
        for index, packed in self._packing.packed(rows):
            values[index] = self._last(packed)
        return values.tolist()

    def _last(self, packed: PackedRows) -> torch.Tensor:
        said = self.model(packed.to(self._alone.device)).cpu()
        return said.gather(1, packed.lengths[:, None]).squeeze(1)


class CriticSays:
    """A `SaysValues` over a live critic, of any kind that can value a response that was cut: V(s_T)."""

    def __init__(self, critic: Critic, *, length_limit: int | None = None) -> None:
        """The critic is asked and learns nothing.

        Args:
            critic: any.
            length_limit: response length, tokens, at which sampling will be cut, for critics that want to know how much
                is left; None: that of the longest state of a call.

        Raises:
            ConfigError: it speaks through the policy's engine, which would go on with the critic's weights.
        """
        if isinstance(critic, SharesEngine) and critic.shares_engine:
            raise ConfigError(
                "a critic with engine: shared puts its weights into the policy's engine, and nobody puts the policy's "
                "back between two tokens; set critic.engine: own to guide sampling by it"
            )
        self._critic = critic
        self._length_limit = length_limit

    def values_of(self, states: Sequence[State]) -> list[float]:
        """What the critic would bootstrap from if sampling had ended there."""
        if not states:
            return []
        asked = dict.fromkeys((s.prompt.id, s.prompt.token_ids) for s in states)  # in their order
        groups = {prompt: number for number, prompt in enumerate(asked)}
        # Paused, not cut: what a run's algorithm makes of the length limit is not asked here.
        rows = [
            dataclasses.replace(
                _row(state, groups[state.prompt.id, state.prompt.token_ids]), finish=Finish.PAUSED
            )
            for state in states
        ]
        longest = max(len(row.response_ids) for row in rows)
        batch = collate(rows, length_limit=self._length_limit or longest)
        rollouts = Rollouts.of(batch, old_logprobs=torch.zeros_like(batch.sampler_logprobs))
        nowhere = torch.zeros_like(batch.action_mask)
        return self._critic.values(rollouts, nowhere).bootstrap.tolist()


Valuer = ValueModel | SaysValues | Critic
"""What may be asked for values."""


def speaker(value: Valuer) -> SaysValues:
    """The same, as somebody who says values of states.

    Raises:
        ConfigError: a value model that judges whole responses only.
    """
    if isinstance(value, ValueModel):
        check_judges_states(value.spec.head)
        return ValueModelSays(value)
    return value if isinstance(value, SaysValues) else CriticSays(value)


def last_state(prompt: Prompt, response_ids: Sequence[int], finish: Finish | None) -> State:
    """The state at which a response is to be valued: the last one that critics learn about.

    Of a response that ended itself that is the state before its last token: V is 0 by definition behind the end, and
    no critic learns anything there. Of one that goes on, or was cut, it is the whole.
    """
    ended = finish is Finish.STOP and len(response_ids) > 0
    return State(prompt=prompt, response_ids=tuple(response_ids[:-1] if ended else response_ids))


@dataclass(slots=True, kw_only=True)
class _Alone:
    """The one rank of a process that was started without a launcher."""

    device: torch.device

    def max(self, number: float) -> float:
        return number


def _row(state: State, group: int) -> Trajectory:
    length = len(state.response_ids)
    return Trajectory(
        prompt=state.prompt,
        response_ids=state.response_ids,
        action_mask=(True,) * length,
        sampler_logprobs=(0.0,) * length,
        finish=Finish.LENGTH,
        group=group,
        reward=0.0,
    )
