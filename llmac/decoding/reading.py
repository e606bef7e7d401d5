"""Next-token logits of rows that grow together, from a transformers model and its own cache."""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Reader:
    """One model over a batch of prompts, padded on the left, and what is drawn behind them."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[tuple[int, ...]]) -> None:
        """Nothing is read yet.

        Args:
            model: in evaluation mode afterwards.
            prompts: token ids of each row.
        """
        self._model = model.eval()
        device = model.device
        self._ids, self._mask = left_padded(prompts, device)
        self._positions = (self._mask.cumsum(dim=1) - 1).clamp_(min=0)
        self._cache = None
        # Of a prompt only the last logits are needed; not every architecture can leave out the others.
        can = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if can else {}

    def start(self) -> Tensor:
        """Logits [B, V] behind the prompts, float32."""
        return self._read(self._ids, self._positions)

    def advance(self, ids: Tensor) -> Tensor:
        """Logits [B, V] behind one more token of each row, `ids` [B]."""
        ids = ids.to(self._mask.device)[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(ids, dtype=torch.bool)], dim=1)
        self._positions = self._positions[:, -1:] + 1
        return self._read(ids, self._positions)

    def _read(self, ids: Tensor, positions: Tensor) -> Tensor:
        out = self._model(
            input_ids=ids,
            attention_mask=self._mask.long(),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **self._last_only,
        )
        self._cache = out.past_key_values
        return out.logits[:, -1].float()


def left_padded(prompts: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, L], the last one of each row in the last column, and where they are [B, L] bool."""
    width = max(map(len, prompts))
    pads = [width - len(prompt) for prompt in prompts]
    ids = [[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
    first = torch.tensor(pads, device=device)[:, None]
    return torch.tensor(ids, device=device), torch.arange(width, device=device) >= first
