"""What somebody has written, text or chat messages, becomes the token ids that a language model continues."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from llmac.core.protocols import Encode
from llmac.core.types import Messages
from llmac.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Chatting(Protocol):
    """What the `data` section of a recipe says of chat templates."""

    @property
    def chat(self) -> Literal["auto", "always", "never"]:
        """Whether to use one."""
        ...

    @property
    def system(self) -> str | None:
        """Message put before others."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plainly:
    chat: Literal["auto", "always", "never"] = "auto"
    system: str | None = None


def encoder(tokenizer: "PreTrainedTokenizerBase") -> Encode:
    """Text as it is, chat messages by the template, for prompts that a plan or a critic writes."""

    def encode(written: str | Messages) -> tuple[int, ...]:
        [token_ids] = tokenize([written], ["a prompt that was written"], _Plainly(), tokenizer)
        return token_ids

    return encode


def tokenize(
    sources: Sequence[str | Messages],
    ids: Sequence[str],
    config: Chatting,
    tokenizer: "PreTrainedTokenizerBase",
) -> list[tuple[int, ...]]:
    """Prompts as they are written, strings or chat messages, to what an engine continues.

    Args:
        sources: the prompts.
        ids: their names, for errors.
        config: `chat` and `system` of a recipe's `data` section.
        tokenizer: of the model that continues them.

    Raises:
        ConfigError: a chat template is needed, and there is none, or it must not be used.
        DataError: a prompt has no tokens, or two system messages.
    """
    if config.chat == "never" and config.system is not None:
        raise ConfigError(
            "data.system needs a chat template, and data.chat is never; remove one of them"
        )
    plain: dict[int, str] = {}
    chats: dict[int, str] = {}
    for index, seen in enumerate(sources):
        is_text = isinstance(seen, str)
        if is_text and (
            config.chat == "never" or (config.chat == "auto" and config.system is None)
        ):
            plain[index] = seen
        else:
            messages = [{"role": "user", "content": seen}] if is_text else seen
            chats[index] = _chat(messages, ids[index], config, tokenizer)
    token_ids: list[tuple[int, ...]] = [()] * len(sources)
    for texts, is_chat in ((plain, False), (chats, True)):
        if texts:
            # A chat template writes its own special tokens.
            encoded = tokenizer(list(texts.values()), add_special_tokens=not is_chat)["input_ids"]
            for (index, text), tokens in zip(texts.items(), encoded, strict=True):
                token_ids[index] = _open_ended(tuple(tokens), text, tokenizer)
    for id_, tokens in zip(ids, token_ids, strict=True):
        if not tokens:
            raise DataError(f"the prompt of {id_} has no tokens; there is nothing to continue")
    return token_ids


def _chat(
    messages: Messages, id_: str, config: Chatting, tokenizer: "PreTrainedTokenizerBase"
) -> str:
    if config.chat == "never":
        raise ConfigError(
            f"the prompt of {id_} is a list of chat messages, and data.chat is never. Set it to auto, or name a "
            "column with strings."
        )
    if tokenizer.chat_template is None:
        reason = (
            "data.chat is always"
            if config.chat == "always"
            else "data.system is set"
            if config.system is not None
            else f"the prompt of {id_} is a list of chat messages"
        )
        raise ConfigError(
            f"{reason}, but the tokenizer has no chat template. Use an instruction-tuned model's tokenizer "
            "(model.tokenizer), or string prompts with data.chat: never."
        )
    if config.system is not None:
        if messages[0]["role"] == "system":
            raise DataError(
                f"the prompt of {id_} has a system message of its own, and data.system is set; remove one"
            )
        messages = [{"role": "system", "content": config.system}, *messages]
    begun = (
        messages[-1]["role"] == "assistant"
    )  # the policy goes on with what the assistant has begun to say
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tokenize=False,
        add_generation_prompt=not begun,
        continue_final_message=begun,
    )
    assert isinstance(text, str)
    return text


def _open_ended(
    tokens: tuple[int, ...], text: str, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[int, ...]:
    """Without the end-of-sequence token that some tokenizers append: the policy is to go on."""
    end = tokenizer.eos_token_id
    if tokens and tokens[-1] == end and not text.endswith(str(tokenizer.eos_token)):
        return tokens[:-1]
    return tokens
