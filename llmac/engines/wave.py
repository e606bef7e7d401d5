"""The rows of one batch while they are being sampled: what each has drawn, and which have finished."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llmac.core.protocols import Completion, SamplingParams
from llmac.core.types import Finish
from llmac.errors import EngineError

STEPS_BETWEEN_CHECKS = 4
"""Tokens between looks at who has finished: a look costs a device synchronisation and about ten small operations."""
WORTH_DROPPING = 1 / 16
"""Fraction of the batch that must have finished before rows leave it."""


class Wave:
    """Rows that are sampled together. The decoder calls `take` once a step; `kept` says when the batch shrinks."""

    def __init__(
        self,
        *,
        prompts: Sequence[tuple[int, ...]],
        params: SamplingParams,
        uniforms: Sequence[Tensor],
        device: torch.device,
        ends: frozenset[int],
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        """Start with nothing drawn.

        Args:
            prompts: of each row, longest first, equal ones side by side.
            params: the same for all rows; its `max_new_tokens` is not read.
            uniforms: of each row, a number for each token it may draw: how many there are is the row's limit.
            device: that samples.
            ends: token ids that end a response.
            decode: token ids to text; called only when `params.stop` is set.
        """
        self.prompts = prompts
        self.params = params
        self._uniforms = pad_sequence(list(uniforms)).to(device)
        self._ends = torch.tensor(sorted(ends), dtype=torch.long)
        self._decode = decode
        self._window = 8 + max((len(stop.encode()) for stop in params.stop), default=0)
        self._limits = torch.tensor([len(numbers) for numbers in uniforms])
        self._ids = torch.zeros(self.steps, len(prompts), dtype=torch.long)
        self._logprobs = torch.zeros(self.steps, len(prompts))
        self._lengths = torch.zeros(len(prompts), dtype=torch.long)
        self._stopped = torch.zeros(len(prompts), dtype=torch.bool)
        self._alive_rows = torch.arange(len(prompts))
        self._selected: Tensor | None = None
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._step = 0
        self._seen = 0

    @property
    def steps(self) -> int:
        """Most tokens that any row may draw."""
        return len(self._uniforms)

    @property
    def reach(self) -> int:
        """Most tokens that prompt and response of a row may have together."""
        limits = self._limits.tolist()
        return max(len(p) + limit for p, limit in zip(self.prompts, limits, strict=True))

    @property
    def finished(self) -> bool:
        """Whether every row has ended or reached its limit, as of the last look."""
        return bool(self._lengths.all())

    def uniforms(self) -> Tensor:
        """[B, 1]: the uniform numbers of this step for the rows still in the batch."""
        column = self._uniforms[self._step]
        return (column if self._selected is None else column[self._selected])[:, None]

    def take(self, ids: Tensor, logprobs: Tensor) -> None:
        """Record one token of every row in the batch; [B] each."""
        self._pending.append((ids, logprobs))
        self._step += 1
        if len(self._pending) == STEPS_BETWEEN_CHECKS or self._step == self.steps:
            self.look()

    def look(self) -> None:
        """Find out which rows have ended since the last look."""
        if not self._pending:
            return
        ids, logprobs = (torch.stack(drawn).cpu() for drawn in zip(*self._pending, strict=True))
        if not logprobs.isfinite().all():
            raise EngineError(
                "the policy's log-probabilities are not finite while sampling; its weights are broken. Check "
                "actor/grad_norm of the last steps, and lower actor.lr or actor.max_grad_norm"
            )
        self._pending.clear()
        first, self._seen = self._seen, self._step
        rows = self._alive_rows
        self._ids[first : self._seen, rows] = ids
        self._logprobs[first : self._seen, rows] = logprobs
        stops = torch.isin(ids, self._ends)
        if self.params.stop:
            self._mark_stop_strings(first, stops)
        drawn = torch.arange(first + 1, self._seen + 1)
        ended = stops | (drawn[:, None] == self._limits[rows])
        new = (ended.any(dim=0) & (self._lengths[rows] == 0)).nonzero().squeeze(1)
        last = ended[:, new].int().argmax(dim=0)
        self._lengths[rows[new]] = drawn[last]
        self._stopped[rows[new]] = stops[last, new]

    def drop_finished(self) -> tuple[int, Tensor, Tensor] | None:
        """Shrink the batch, if enough rows have finished: how many stay, places to fill, rows to fill them with.

        Only the rows in `movers` move; the caller applies the same to whatever it keeps per row.
        """
        if self._pending:
            return None
        done = self._lengths[self._alive_rows] > 0
        count = int(done.sum())
        if count == 0 or count < WORTH_DROPPING * len(done):
            return None
        rows = len(done) - count
        holes = done[:rows].nonzero().squeeze(1)
        movers = rows + (~done[rows:]).nonzero().squeeze(1)
        self._alive_rows = compact(self._alive_rows, rows, holes, movers)
        device = self._uniforms.device
        self._selected = self._alive_rows.to(device)
        return rows, holes.to(device), movers.to(device)

    def completions(self, version: int) -> list[Completion]:
        """What every row sampled, in the order of `prompts`."""
        self.look()
        ids, logprobs = self._ids.t().tolist(), self._logprobs.t().tolist()
        ends = zip(self._lengths.tolist(), self._stopped.tolist(), strict=True)
        return [
            Completion(
                token_ids=tuple(ids[row][:length]),
                logprobs=tuple(logprobs[row][:length]),
                finish=Finish.STOP if stopped else Finish.LENGTH,
                policy_version=version,
            )
            for row, (length, stopped) in enumerate(ends)
        ]

    def _mark_stop_strings(self, first: int, ended: Tensor) -> None:
        """Set `ended` [steps since `first`, B] at the token that completes a stop string."""
        start = max(0, first - self._window)
        for column, row in enumerate(self._alive_rows.tolist()):
            if self._lengths[row]:
                continue
            tokens = self._ids[start : self._seen, row].tolist()
            if not self._has_stop(tokens):
                continue
            place = next(
                step
                for step in range(first, self._seen)
                if self._has_stop(tokens[: step + 1 - start])
            )
            ended[place - first, column] = True

    def _has_stop(self, tokens: Sequence[int]) -> bool:
        text = self._decode(tokens)
        return any(stop in text for stop in self.params.stop)


def compact(x: Tensor, rows: int, holes: Tensor, movers: Tensor) -> Tensor:
    """The first `rows` rows of `x`, after its rows `movers` have been written over `holes`, in place.

    >>> compact(torch.tensor([5, 6, 7, 8]), 2, torch.tensor([0]), torch.tensor([3]))
    tensor([8, 6])
    """
    if len(holes):
        x[holes] = x[movers]
    return x[:rows]
