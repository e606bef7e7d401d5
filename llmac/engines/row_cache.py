"""Keys and values of a batch of rows that grows in steps and loses rows."""

from collections.abc import Sequence

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

KeysValues = tuple[Tensor, Tensor]

GROWTH_TOKENS = 256
"""Room for new tokens to begin with; doubled when it is used up."""


class RowCacheLayer(CacheLayerMixin):
    """One layer's keys and values in a buffer with room to spare: a step writes one column and copies nothing."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Take over buffers [B, H, capacity, D] of which the first `length` tokens are, or will be, filled."""
        super().__init__()
        self._keys, self._values = keys, values
        self.length = length
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the buffers came with the constructor."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Append the new tokens; returns views of everything so far."""
        start, end = self.length, self.length + key_states.shape[2]
        if end > self._keys.shape[2]:
            self._keys, self._values = (_widen(x, start, end) for x in (self._keys, self._values))
        keys, values = self._keys[:, :, :end], self._values[:, :, :end]
        keys[:, :, start:] = key_states
        values[:, :, start:] = value_states
        self.length = end
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens seen by a query of this length, and the offset of the first."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def fill(self, rows: slice, keys: Tensor, values: Tensor) -> None:
        """Write prompts [R, H, L, D] into `rows` so that each ends in the last column held."""
        columns = slice(self.length - keys.shape[2], self.length)
        self._keys[rows, :, columns] = keys
        self._values[rows, :, columns] = values

    def keep(self, rows: int, holes: Tensor, movers: Tensor) -> None:
        """Go on with the first `rows` rows, after `movers` have taken the places of the finished `holes`."""
        if len(holes):
            for buffer in (self._keys, self._values):
                buffer[holes, :, : self.length] = buffer[movers, :, : self.length]
        self._keys, self._values = self._keys[:rows], self._values[:rows]


class RowCache(Cache):
    """A `transformers` cache of `RowCacheLayer`s, filled from prompts that were read once each."""

    def __init__(self, like: Sequence[KeysValues], rows: int, length: int, new_tokens: int) -> None:
        """Room for `rows` rows of `length` tokens, to be filled by `put`, and for `new_tokens` after them.

        Args:
            like: keys and values of each layer, [any, H, any, D].
            rows: batch size.
            length: tokens of the longest prompt.
            new_tokens: room beyond them; it grows when needed.
        """
        capacity = length + min(new_tokens, GROWTH_TOKENS)
        self._rows_of = [
            RowCacheLayer(
                # One query times all keys reads along the tokens, so on CPU those lie next to each other.
                _room(keys, rows, capacity, tokens_last=keys.device.type == "cpu"),
                _room(values, rows, capacity),
                length,
            )
            for keys, values in like
        ]
        super().__init__(layers=list(self._rows_of))

    def put(self, first_row: int, prompts: Sequence[KeysValues], source: Tensor) -> None:
        """Write prompt `source[i]` of each layer's keys and values into row `first_row + i`."""
        rows = slice(first_row, first_row + len(source))
        for layer, (keys, values) in zip(self._rows_of, prompts, strict=True):
            layer.fill(rows, keys[source], values[source])

    def keep(self, rows: int, holes: Tensor, movers: Tensor) -> None:
        """Drop finished rows from every layer."""
        for layer in self._rows_of:
            layer.keep(rows, holes, movers)


def _room(like: Tensor, rows: int, capacity: int, *, tokens_last: bool = False) -> Tensor:
    """Zeros [rows, H, capacity, D]: a large negative number hides padding from attention, but would not hide a NaN."""
    heads, width = like.shape[1], like.shape[3]
    if tokens_last:
        return like.new_zeros(rows, heads, width, capacity).mT
    return like.new_zeros(rows, heads, capacity, width)


def _widen(buffer: Tensor, length: int, needed: int) -> Tensor:
    """A copy with room for at least `needed` tokens; doubling keeps the copies of a long response few."""
    capacity = max(needed, 2 * buffer.shape[2])
    wider = _room(buffer, buffer.shape[0], capacity, tokens_last=buffer.stride(2) == 1)
    wider[:, :, :length] = buffer[:, :, :length]
    return wider
