"""Players of one character a token that say what a function says, and count how they are asked."""

from collections.abc import Callable, Sequence

from llmac.core.protocols import Completion, Player, Request
from llmac.core.types import Finish, Prompt

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 +-=?!:;./|<>[]{}_\n"


def encode(written) -> tuple[int, ...]:
    if not isinstance(written, str):
        written = "".join(f"<{m['role'][0]}>{m['content']}" for m in written)
    return tuple(ALPHABET.index(letter) for letter in written)


def decode(ids: Sequence[int]) -> str:
    return "".join(ALPHABET[i] for i in ids)


class Scripted:
    """An engine that says `say(prompt, number of the sibling)`."""

    policy_version = 3

    def __init__(self, say: Callable[[str, int], str]) -> None:
        self.say = say
        self.asked: list[list[str]] = []
        self.requests: list[Request] = []

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        self.asked.append([decode(r.prompt_ids) for r in requests])
        self.requests += requests
        return [
            [self._completion(decode(r.prompt_ids), i) for i in range(r.params.n)] for r in requests
        ]

    def load_weights(self, weights, version: int) -> None: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...

    def _completion(self, prompt: str, number: int) -> Completion:
        ids = encode(self.say(prompt, number))
        return Completion(
            token_ids=ids, logprobs=(-0.5,) * len(ids), finish=Finish.STOP, policy_version=3
        )


def player(say: Callable[[str, int], str]) -> Player:
    return Player(engine=Scripted(say), encode=encode, decode=decode, read=decode)


class Questions:
    """Prompts `1?`, `2?`, ... with the columns they are given."""

    def __init__(self, **columns) -> None:
        self.taken, self.columns = 0, columns

    def take(self, count: int) -> list[Prompt]:
        numbers = range(self.taken + 1, self.taken + count + 1)
        self.taken += count
        return [
            Prompt(id=f"q{n}", token_ids=encode(f"{n}?"), source=f"{n}?", columns=self.columns)
            for n in numbers
        ]
