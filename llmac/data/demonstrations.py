"""Prompts and what to say to them: completions in a dataset become token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmac.core.protocols import Demonstration
from llmac.core.types import Messages, Prompt
from llmac.data.tokenizing import tokenize
from llmac.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:  # `config` is a room above this one
    from transformers import PreTrainedTokenizerBase

    from llmac.config.schema import DataConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstrated:
    """What became of the completions of a dataset."""

    prompts: list[Prompt]
    """Those with a completion that fits."""
    completions: Mapping[str, Demonstration]
    """Of each of them, by its id."""
    too_long: int
    """Rows left out because of the completion's length."""

    def line(self) -> str:
        """What a user should know, in one line."""
        counts = [len(shown.token_ids) for shown in self.completions.values()]
        left_out = f"; {self.too_long} others are too long and left out" if self.too_long else ""
        return (
            f"{len(counts)} completions with {sum(counts)} tokens to learn from, "
            f"the longest has {max(counts)}{left_out}"
        )


def demonstrations_in(
    prompts: Sequence[Prompt],
    config: "DataConfig",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    column: str,
    append_end: bool,
    max_tokens: int,
) -> Demonstrated:
    """Tokenize what the rows say should be answered.

    A completion is the row's `column`, text or a list with one message of the assistant; or, where the data has no
    such column, the last message of the chat that is the prompt, which then ends before it. It is tokenized by itself,
    as a policy would continue the prompt, without special tokens but the one at its end.

    Args:
        prompts: what `load_prompts` read, all columns with them.
        config: a recipe's `data` section: how chats become prompts, and whether a long row is an error.
        tokenizer: the policy's.
        column: name of the completions' column.
        append_end: add the end-of-sequence token where it is missing.
        max_tokens: longest completion, the end included.

    Raises:
        DataError: there are no completions, one is empty or no text, or too long and `on_too_long` is `error`.
        ConfigError: an end is to be added, and the tokenizer has none.
    """
    end = _end_of(tokenizer) if append_end else None
    if not any(column in prompt.columns for prompt in prompts):
        prompts, texts = _split_chats(prompts, config, tokenizer, column)
    else:
        texts = [_text(prompt.columns.get(column), prompt.id, column) for prompt in prompts]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    kept: list[Prompt] = []
    completions: dict[str, Demonstration] = {}
    for prompt, text, ids in zip(prompts, texts, encoded, strict=True):
        token_ids = tuple(ids)
        if not token_ids:
            raise DataError(
                f"the completion of {prompt.id} has no tokens: the tokenizer makes nothing of {text!r}; remove "
                "the row, or write what should be said"
            )
        if end is not None and token_ids[-1:] != (end,):
            token_ids += (end,)
        if len(token_ids) > max_tokens:
            if config.on_too_long == "error":
                raise DataError(
                    f"the completion of {prompt.id} has {len(token_ids)} tokens with its end; at most {max_tokens} are "
                    "allowed (rollout.max_new_tokens). Raise it, or set data.on_too_long: skip to leave such rows out "
                    "(counted)."
                )
            continue
        kept.append(prompt)
        completions[prompt.id] = Demonstration(token_ids=token_ids, text=text)
    if not kept:
        raise DataError(
            f"no completion is left: all {len(prompts)} have more than {max_tokens} tokens (rollout.max_new_tokens)"
        )
    return Demonstrated(prompts=kept, completions=completions, too_long=len(prompts) - len(kept))


def _end_of(tokenizer: "PreTrainedTokenizerBase") -> int:
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ConfigError(
            "algorithm.append_end is true, and the tokenizer has no end-of-sequence token; set algorithm.append_end: "
            "false, or model.tokenizer to one that has"
        )
    return end


def _text(value: Any, id_: str, column: str) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
        [message] = value
        if isinstance(message, Mapping) and message.get("role") == "assistant":
            value = message.get("content")
    if isinstance(value, str) and value:
        return value
    what = "empty" if value is None or value == "" else f"a {type(value).__name__}"
    raise DataError(
        f"the completion of {id_} (column {column}) is {what}; expected a text that is not empty, or a list with one "
        "message of the assistant"
    )


def _split_chats(
    prompts: Sequence[Prompt],
    config: "DataConfig",
    tokenizer: "PreTrainedTokenizerBase",
    column: str,
) -> tuple[list[Prompt], list[str]]:
    """Chats that end with the assistant's answer: what leads to it, and the answer."""
    chats: list[Messages] = []
    for prompt in prompts:
        chat = prompt.source
        if isinstance(chat, str) or len(chat) < 2 or chat[-1]["role"] != "assistant":
            present = list(prompt.columns)
            raise DataError(
                f"there is nothing to learn from: the data has no column {column!r}, and the prompt of {prompt.id} is "
                f"no chat that ends with an answer of the assistant.{did_you_mean(column, present)} Set "
                "algorithm.completion_column, or data.columns: {" + column + ": ...}"
            )
        chats.append(chat)
    questions = [chat[:-1] for chat in chats]
    token_ids = tokenize(questions, [prompt.id for prompt in prompts], config, tokenizer)
    left = [
        replace(prompt, token_ids=ids, source=question)
        for prompt, ids, question in zip(prompts, token_ids, questions, strict=True)
    ]
    answers = [
        _text(chat[-1]["content"], prompt.id, "the last message of the chat")
        for prompt, chat in zip(prompts, chats, strict=True)
    ]
    return left, answers
