"""Asking a player: a seed for every request, and what a frozen one said of the data is remembered."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from llmac.core.exchange import Said
from llmac.core.plans import ask, request_seed
from llmac.core.protocols import Completion, Player, Request, RolloutEngine, SamplingParams

Prompts = Sequence[tuple[int, ...]]


@dataclass(slots=True)
class Memory:
    """What a frozen player answers where it draws nothing: the same today and tomorrow."""

    most: int = 8192
    """Answers kept; the oldest are forgotten first."""
    _known: dict[tuple[tuple[int, ...], SamplingParams], list[Completion]] = field(
        default_factory=dict[tuple[tuple[int, ...], SamplingParams], list[Completion]]
    )

    def get(self, prompt: tuple[int, ...], params: SamplingParams) -> list[Completion] | None:
        """None: not known."""
        return self._known.get((prompt, params))

    def keep(self, prompt: tuple[int, ...], params: SamplingParams, said: list[Completion]) -> None:
        """Remember an answer, and forget the oldest where there are too many."""
        self._known[prompt, params] = said
        if len(self._known) > self.most:
            del self._known[next(iter(self._known))]


class Voice:
    """One player during one step."""

    def __init__(
        self, player: Player, engine: RolloutEngine, *, seed: int, memory: Memory | None = None
    ) -> None:
        """Nothing is asked yet.

        Args:
            player: its words.
            engine: samples it.
            seed: of the step, the rank and this player.
            memory: of a player that does not learn; None: it does.
        """
        self.player = player
        self._engine, self._seed, self._memory = engine, seed, memory
        self._wanted = 0
        self.tokens = 0
        """Sampled so far."""

    def fits(self, prompt: tuple[int, ...], params: SamplingParams) -> bool:
        """Whether the engine has room for the prompt and everything that may be sampled to it."""
        limit = self.player.limit
        return limit is None or len(prompt) + params.max_new_tokens <= limit

    def say(
        self, prompts: Prompts, params: SamplingParams, *, come_back: bool = False
    ) -> list[list[Said]]:
        """`params.n` completions to each prompt. The engine is asked exactly once, maybe for nothing.

        Ranks share engines, and must come to them equally often. A greedy frozen player is asked
        each prompt once.

        Args:
            prompts: each of them fits.
            params: of all.
            come_back: whether later steps will have the same prompts, so that what a greedy frozen
                player says is worth remembering.
        """
        if self._memory is not None and params.temperature == 0:
            memory = self._memory if come_back else Memory()
            answers = self._remembered(prompts, params, memory)
        else:
            answers = self._drawn(prompts, params)
        return [
            [
                Said(prompt_ids=prompt, completion=one, text=self.player.read(one.token_ids))
                for one in some
            ]
            for prompt, some in zip(prompts, answers, strict=True)
        ]

    def _drawn(self, prompts: Prompts, params: SamplingParams) -> list[list[Completion]]:
        seeds = [request_seed(self._seed, self._wanted + params.n * i) for i in range(len(prompts))]
        self._wanted += params.n * len(prompts)
        return self._ask(
            [
                Request(prompt_ids=prompt, params=dataclasses.replace(params, seed=seed))
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
        )

    def _remembered(
        self, prompts: Prompts, params: SamplingParams, memory: Memory
    ) -> list[list[Completion]]:
        params = dataclasses.replace(params, seed=0)  # without effect, and the same in every step
        known = {prompt: memory.get(prompt, params) for prompt in prompts}
        missing = [prompt for prompt, said in known.items() if said is None]
        answers = self._ask([Request(prompt_ids=p, params=params) for p in missing])
        for prompt, said in zip(missing, answers, strict=True):
            known[prompt] = said
            memory.keep(prompt, params, said)
        return [said for prompt in prompts if (said := known[prompt]) is not None]

    def _ask(self, requests: Sequence[Request]) -> list[list[Completion]]:
        answers = ask(self._engine, requests)
        self.tokens += sum(len(one.token_ids) for some in answers for one in some)
        return answers
