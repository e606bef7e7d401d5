"""A policy that says what a script says, and real ones of a few thousand parameters."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from llmac.core.protocols import Completion, Player
from llmac.core.types import Finish

END = 1
LETTERS = ["<pad>", "<eos>", *"abcdef="]


class Scripted:
    """An engine whose responses are strings: `say(prompt and response so far, number of the sibling)`."""

    def __init__(self, say: Callable[[str, int], str]):
        self.say, self.requests = say, []

    def generate(self, requests):
        self.requests += requests
        return [
            [self._said(r, self.say(read(r.prompt_ids), i)) for i in range(r.params.n)]
            for r in requests
        ]

    def _said(self, request, text):
        ids = (*encode(text), END)[: request.params.max_new_tokens]
        finish = Finish.STOP if ids[-1] == END else Finish.LENGTH
        return Completion(token_ids=ids, logprobs=(-0.5,) * len(ids), finish=finish)

    policy_version = 0

    def load_weights(self, weights, version):
        raise AssertionError("nobody learns here")

    def sleep(self):
        pass

    wake = close = sleep


@dataclasses.dataclass
class ByText:
    """Says values of states by the text of the response."""

    worth: Callable[[str], float]
    asked: list[str] = dataclasses.field(default_factory=list)

    def values_of(self, states) -> list[float]:
        texts = [read(s.response_ids) for s in states]
        self.asked += texts
        return [float(self.worth(text)) for text in texts]


def encode(text) -> tuple[int, ...]:
    return tuple(LETTERS.index(letter) for letter in text)


def read(ids: Sequence[int]) -> str:
    return "".join(LETTERS[i] for i in ids if i > 1)


def player_of(say) -> Player:
    return Player(
        engine=Scripted(say),
        encode=encode,
        decode=lambda ids: "".join(LETTERS[i] for i in ids),
        read=read,
    )


def tiny(seed: int, *, vocabulary: int = 9, width: int = 16) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=END,
    )
    return Qwen2ForCausalLM(config).eval()
