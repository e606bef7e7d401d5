"""What a language model makes of prompts: hidden vectors of their tokens, without gradient."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmac.core.types import Finish, Prompt, Trajectory
from llmac.errors import ConfigError
from llmac.models.loading import ModelSpec, load_backbone, torch_dtype
from llmac.models.packing import pack
from llmac.models.value_model import HiddenStates
from llmac.runtime.context import Runtime

Pooling = Literal["mean", "last"]
Part = tuple[Tensor, Tensor]
"""Hidden vectors [b, L, H] of some prompts, float32, and their lengths [b]; padding follows the tokens."""
PromptStates = Callable[[Sequence[Prompt]], list[Part]]
"""Prompts, at least one, to parts that together have them in their order. Collective where weights are sharded."""

MAX_TOKENS = 2048
"""Longest prompt an embedding model of its own is shown; as in the released code of arXiv:2602.03584."""


class TrunkStates:
    """Hidden vectors of a trunk that reads token ids as the policy does: the policy's own."""

    def __init__(
        self, states: HiddenStates, runtime: Runtime, *, pad_id: int, max_tokens: int
    ) -> None:
        """Ask this trunk.

        Args:
            states: hidden vectors of packed rows.
            runtime: whose device, and whether passes are collective.
            pad_id: any token id.
            max_tokens: bound on rows x longest row.
        """
        self._states = states
        self._runtime = runtime
        self._pad_id = pad_id
        self._max_tokens = max_tokens

    def __call__(self, prompts: Sequence[Prompt]) -> list[Part]:
        """See `PromptStates`."""
        lengths = [len(prompt.token_ids) for prompt in prompts]
        parts = list(_parts(lengths, self._max_tokens))
        # For the sake of ranks that have more.
        again = self._runtime.passes(len(parts)) - len(parts)
        return [self._look(prompts[part]) for part in parts + parts[:1] * again][: len(parts)]

    @torch.no_grad()
    def _look(self, prompts: Sequence[Prompt]) -> Part:
        rows = pack([_unanswered(prompt) for prompt in prompts], pad_id=self._pad_id)
        device = self._runtime.device
        hidden = self._states(rows.to(device)).float().unflatten(0, (len(prompts), -1))
        return hidden, torch.tensor([len(p.token_ids) for p in prompts], device=device)


class EmbeddingStates:
    """Hidden vectors of a frozen model with a tokenizer of its own, which reads the text of prompts."""

    def __init__(self, name: str, spec: ModelSpec, runtime: Runtime, *, max_tokens: int) -> None:
        """Load it.

        Args:
            name: Hub id or folder of the model and its tokenizer.
            spec: the recipe's `model` section, for precision and attention.
            runtime: whose device, and how weights are spread.
            max_tokens: bound on rows x longest row.

        Raises:
            ConfigError: there is no such model or no such tokenizer.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as reason:
            raise ConfigError(
                f"critic.embedding: no tokenizer could be loaded from {name!r}: {reason}"
            ) from reason
        self._tokenizer: PreTrainedTokenizerBase = tokenizer
        self._tokenizer.padding_side = "right"
        with runtime.loading(torch_dtype(spec)):
            backbone = load_backbone(spec, name)
        self.hidden_size = int(backbone.config.get_text_config().hidden_size)
        self._module: nn.Module = runtime.freeze(backbone)
        self._runtime = runtime
        self._max_tokens = max_tokens

    def __call__(self, prompts: Sequence[Prompt]) -> list[Part]:
        """See `PromptStates`."""
        ids = [
            self._tokenizer(text_of(prompt), truncation=True, max_length=MAX_TOKENS)["input_ids"]
            for prompt in prompts
        ]
        parts = list(_parts([len(row) for row in ids], self._max_tokens))
        again = self._runtime.passes(len(parts)) - len(parts)
        return [self._look(ids[part]) for part in parts + parts[:1] * again][: len(parts)]

    @torch.no_grad()
    def _look(self, ids: list[list[int]]) -> Part:
        device = self._runtime.device
        lengths = torch.tensor([len(row) for row in ids], device=device)
        rows = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
        seen = torch.arange(rows.shape[1], device=device) < lengths[:, None]
        hidden = self._module(input_ids=rows.to(device), attention_mask=seen.long())
        return hidden.last_hidden_state.float(), lengths


def pooled(parts: Sequence[Part], how: Pooling) -> Tensor:
    """One vector a prompt, [n, H]: the mean over its tokens, or that of the last."""
    return torch.cat([_pool(hidden, lengths, how) for hidden, lengths in parts])


def text_of(prompt: Prompt) -> str:
    r"""A prompt as the user wrote it: the string, or the contents of its messages.

    >>> text_of(Prompt(id="a", token_ids=(1,), source=[{"role": "user", "content": "1+1?"}]))
    '1+1?'
    """
    if isinstance(prompt.source, str):
        return prompt.source
    return "\n\n".join(str(message.get("content", "")) for message in prompt.source)


def _pool(hidden: Tensor, lengths: Tensor, how: Pooling) -> Tensor:
    if how == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    seen = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
    # Selected, not multiplied: padding may hold anything.
    return hidden.where(seen[..., None], 0.0).sum(1) / lengths[:, None]


def _parts(lengths: Sequence[int], max_tokens: int) -> Iterator[slice]:
    """Neighbours whose padded size stays within the budget; one that is longer is alone."""
    start = longest = 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if index > start and longest * (index + 1 - start) > max_tokens:
            yield slice(start, index)
            start, longest = index, length
    yield slice(start, len(lengths))


def _unanswered(prompt: Prompt) -> Trajectory:
    return Trajectory(
        prompt=prompt,
        response_ids=(),
        action_mask=(),
        sampler_logprobs=(),
        finish=Finish.LENGTH,
        group=0,
    )
