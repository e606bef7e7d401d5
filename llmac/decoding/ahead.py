"""What every candidate for the next token is worth: K + 1 states of each row, asked again at each token."""

import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from llmac.core.types import Prompt
from llmac.decoding.reading import left_padded
from llmac.decoding.values import SaysValues, State, ValueModelSays
from llmac.models.tree_attention import narrow_view
from llmac.models.value_model import ValueModel

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Largest difference between values from a cache and from whole rows, relative to the largest of them, in float32."""


class LooksAhead(Protocol):
    """Values of a batch of rows that grow together."""

    def look(self, rows: Sequence[State | None], candidates: Tensor) -> tuple[Tensor, Tensor]:
        """V(s) [B] and V(s, a) [B, K] of candidates [B, K], on their device; 0 for rows that are None."""
        ...

    def advance(self, ids: Tensor) -> None:
        """One more token of each row, `ids` [B]."""
        ...


def looking_ahead(says: SaysValues, prompts: Sequence[Prompt]) -> LooksAhead:
    """By the cache of a value model where that gives its own values, else by asking about whole states."""
    by_states = ByStates(says)
    if not isinstance(says, ValueModelSays):
        return by_states
    narrow = narrow_view(says.model.backbone.config.get_text_config())
    if narrow is not None:  # a cache that forgets cannot be taken back
        logger.info("values of candidates are computed from whole rows, slower: %s", narrow)
        return by_states
    probe = [
        Prompt(id="probe", token_ids=p.token_ids[-length:], source="")
        for p, length in zip(prompts, (4, 2), strict=False)  # padded, where there are two
    ]
    tokens = torch.tensor([[p.token_ids[0], p.token_ids[-1]] for p in probe])
    try:
        found = _probed(ByCache(says.model, probe), probe, tokens)
    except (AttributeError, TypeError, ValueError, RuntimeError) as problem:
        logger.info("values of candidates are computed from whole rows, slower: %s", problem)
        return by_states
    expected = _probed(by_states, probe, tokens)
    gap = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    low = next(says.model.parameters()).dtype != torch.float32
    if gap > (50 * TOLERANCE if low else TOLERANCE):
        logger.info(
            "values of candidates are computed from whole rows, slower: with a cache they are off by %.2g",
            gap,
        )
        return by_states
    return ByCache(says.model, prompts)


def _probed(ahead: LooksAhead, prompts: Sequence[Prompt], tokens: Tensor) -> Tensor:
    """Values behind a token, and of two candidates there."""
    ahead.advance(tokens[:, 0])
    rows = [
        State(prompt=prompt, response_ids=(token,))
        for prompt, token in zip(prompts, tokens[:, 0].tolist(), strict=True)
    ]
    before, after = ahead.look(rows, tokens)
    return torch.cat([before[:, None], after], dim=1).cpu()


class ByStates:
    """Asks anybody, about whole states."""

    def __init__(self, says: SaysValues) -> None:
        """Nobody is asked yet."""
        self._says = says

    def look(self, rows: Sequence[State | None], candidates: Tensor) -> tuple[Tensor, Tensor]:
        """V(s) and V(s, a); 0 for rows that are None, about which nobody is asked."""
        going = [number for number, row in enumerate(rows) if row is not None]
        states = [
            State(prompt=row.prompt, response_ids=(*row.response_ids, *more))
            for number, row in enumerate(rows)
            if row is not None
            for more in ((), *((token,) for token in candidates[number].tolist()))
        ]
        values = torch.zeros(len(rows), 1 + candidates.shape[1])
        values[going] = torch.tensor(self._says.values_of(states)).view(len(going), -1)
        values = values.to(candidates.device)
        return values[:, 0], values[:, 1:]

    def advance(self, ids: Tensor) -> None:
        """Nothing is kept."""


class ByCache:
    """A value model with keys and values of all that its rows have read.

    The candidates of a row are read side by side behind it, each looking at the row and at itself only, and are
    forgotten again.
    """

    def __init__(self, model: ValueModel, prompts: Sequence[Prompt]) -> None:
        """Read the prompts."""
        self._model = model
        device = next(model.parameters()).device
        ids, self._seen = left_padded([p.token_ids for p in prompts], device)
        self._positions = (self._seen.cumsum(dim=1) - 1).clamp_(min=0)
        self._cache = None
        self._before = self._read(ids, self._seen.long(), self._positions)[:, -1]

    def look(self, rows: Sequence[State | None], candidates: Tensor) -> tuple[Tensor, Tensor]:
        """V(s) and V(s, a)."""
        ids = candidates.to(self._seen.device)
        count = ids.shape[1]
        itself = torch.eye(count, dtype=torch.bool, device=ids.device).expand(len(ids), -1, -1)
        visible = torch.cat([self._seen[:, None].expand(-1, count, -1), itself], dim=2)
        dtype = next(self._model.backbone.parameters()).dtype
        hidden = torch.zeros(visible.shape, dtype=dtype, device=ids.device)
        hidden.masked_fill_(~visible, torch.finfo(dtype).min)
        positions = (self._positions[:, -1:] + 1).expand(-1, count)
        after = self._read(ids, hidden[:, None], positions)
        assert self._cache is not None, "the prompts were read"
        self._cache.crop(-count)
        goes_on = torch.tensor([row is not None for row in rows], device=ids.device)
        before, after = self._before.where(goes_on, 0.0), after.where(goes_on[:, None], 0.0)
        return before.to(candidates.device), after.to(candidates.device)

    def advance(self, ids: Tensor) -> None:
        """Read the tokens that were drawn."""
        ids = ids.to(self._seen.device)[:, None]
        self._seen = torch.cat([self._seen, torch.ones_like(ids, dtype=torch.bool)], dim=1)
        self._positions = self._positions[:, -1:] + 1
        self._before = self._read(ids, self._seen.long(), self._positions)[:, -1]

    @torch.no_grad()
    def _read(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        out = self._model.backbone(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = out.past_key_values
        with torch.autocast(ids.device.type, enabled=False):
            return self._model.spec.values(self._model.head(out.last_hidden_state))
