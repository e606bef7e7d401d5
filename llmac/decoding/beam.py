"""Search over beginnings: sample a block, value it, go on with the best."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmac.core.guidance import kept_beams
from llmac.core.protocols import Completion, Player, Request, SamplingParams
from llmac.core.types import Finish, Prompt
from llmac.decoding.candidates import Decoded, Written, candidate, prompts_of, seeded
from llmac.decoding.choosing import Extract, Same, equal, voted, worth_most
from llmac.decoding.values import Valuer, last_state, speaker
from llmac.errors import ConfigError


def beam(
    player: Player,
    value: Valuer,
    prompts: Sequence[Written],
    *,
    block_tokens: int,
    width: int = 2,
    expand: int = 2,
    trees: int = 1,
    answer: Extract | None = None,
    same: Same = equal,
    worst: float = 0.0,
    sampling: SamplingParams | None = None,
) -> list[Decoded]:
    """Grow responses block by block, and go on with the beginnings that are worth most.

    In each tree of a prompt, `width` beams are kept. A round samples `expand` blocks behind each of them (in the first
    round `width` x `expand` behind the prompt), values all ends, and keeps the best `width`. A beam that is kept when
    it has ended is frozen: it keeps its place. When all have, the beams of all trees vote, weighted by value.

    Value-guided search: arXiv:2505.17373, with independent trees as in DVTS. `width` 1 is the block-wise best of K =
    `expand` of Controlled Decoding (arXiv:2310.17022), at most `core.guidance.blockwise_kl` from the policy.

    Args:
        player: who samples.
        value: who says values of beginnings.
        prompts: text, chat messages, or `Prompt`s.
        block_tokens: sampled at once.
        width: beams kept in a tree.
        expand: blocks sampled behind each beam.
        trees: searched independently of each other.
        answer: finds what a beam votes for; None: no vote, the beam worth most is chosen.
        same: which answers are one.
        worst: reward of a failure, taken off the weights of votes.
        sampling: how; its `max_new_tokens` bounds the whole response. None: the defaults.

    Raises:
        ConfigError: no prompts, or a number below 1.
    """
    for name, number in (
        ("block_tokens", block_tokens),
        ("width", width),
        ("expand", expand),
        ("trees", trees),
    ):
        if number < 1:
            raise ConfigError(f"{name} of a beam search is {number}; expected at least 1")
    found, says = prompts_of(player.encode, prompts), speaker(value)
    sampling = sampling or SamplingParams()
    forest = [_Tree(prompt) for prompt in found for _ in range(trees)]
    numbers = itertools.count()
    first = True
    while any(tree.open for tree in forest):
        sprouts = [(tree, stem) for tree in forest for stem in tree.open]
        requests = [
            _request(
                tree, stem, numbers, sampling, block_tokens, width * expand if first else expand
            )
            for tree, stem in sprouts
        ]
        grown: dict[int, list[_Beam]] = {id(tree): [] for tree in forest}
        for (tree, stem), completions in zip(
            sprouts, player.engine.generate(requests), strict=True
        ):
            for completion in completions:
                tree.sampled += len(completion.token_ids)
                grown[id(tree)].append(_grown(player, stem, completion, sampling))
        ends = [(tree, child) for tree in forest for child in grown[id(tree)]]
        values = says.values_of([last_state(t.prompt, c.ids, c.finish) for t, c in ends])
        for (tree, child), worth in zip(ends, values, strict=True):
            child.value = worth
            tree.valued += 1
        for tree in forest:
            tree.keep(grown[id(tree)], width)
        first = False
    return [
        _decoded(player, forest[start : start + trees], answer, same, worst)
        for start in range(0, len(forest), trees)
    ]


@dataclass(slots=True, kw_only=True)
class _Beam:
    """A beginning, or a whole response."""

    ids: tuple[int, ...] = ()
    logprob: float = 0.0
    finish: Finish | None = None
    """None: it may be gone on with."""
    value: float = 0.0


class _Tree:
    """The beams of one search."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.beams = [_Beam()]
        self.sampled = self.valued = 0

    @property
    def open(self) -> list[_Beam]:
        return [one for one in self.beams if one.finish is None]

    def keep(self, children: list[_Beam], width: int) -> None:
        frozen = [one for one in self.beams if one.finish is not None]
        pool = frozen + children
        is_frozen = [True] * len(frozen) + [False] * len(children)
        places = kept_beams([one.value for one in pool], is_frozen, width=width)
        self.beams = [pool[place] for place in places]


def _request(
    tree: _Tree,
    stem: _Beam,
    numbers: "itertools.count[int]",
    sampling: SamplingParams,
    block_tokens: int,
    n: int,
) -> Request:
    left = sampling.max_new_tokens - len(stem.ids)
    params = seeded(sampling, next(numbers), n=n)
    return Request(
        prompt_ids=tree.prompt.token_ids + stem.ids,
        params=dataclasses.replace(params, max_new_tokens=min(block_tokens, left)),
    )


def _grown(player: Player, stem: _Beam, block: Completion, sampling: SamplingParams) -> _Beam:
    ids, finish = stem.ids + block.token_ids, block.finish
    cut = None if finish is Finish.STOP else _stop_across(player, stem.ids, ids, sampling.stop)
    if cut is not None:
        ids, finish = ids[:cut], Finish.STOP
    kept = block.logprobs[: len(ids) - len(stem.ids)]
    goes_on = finish is not Finish.STOP and len(ids) < sampling.max_new_tokens
    return _Beam(
        ids=ids,
        logprob=stem.logprob + math.fsum(kept),
        finish=None if goes_on else finish,
    )


def _stop_across(
    player: Player, before: tuple[int, ...], ids: tuple[int, ...], stop: Sequence[str]
) -> int | None:
    """Tokens up to the end of a stop string that began in an earlier block: the engine has not seen that one."""
    if not stop:
        return None
    for length in range(len(before) + 1, len(ids) + 1):
        text = player.decode(ids[:length])
        if any(word in text for word in stop):
            return length
    return None


def _decoded(
    player: Player,
    trees: Sequence[_Tree],
    answer: Extract | None,
    same: Same,
    worst: float,
) -> Decoded:
    candidates = [
        dataclasses.replace(
            candidate(player, one.ids, one.finish or Finish.LENGTH, one.logprob), value=one.value
        )
        for tree in trees
        for one in tree.beams
    ]
    prompt, sampled = trees[0].prompt, sum(tree.sampled for tree in trees)
    states = sum(tree.valued for tree in trees)
    if answer is not None:
        return voted(
            prompt,
            candidates,
            answer=answer,
            same=same,
            worst=worst,
            sampled_tokens=sampled,
            valued_states=states,
        )
    return Decoded(
        prompt=prompt,
        chosen=worth_most(candidates),
        candidates=tuple(candidates),
        sampled_tokens=sampled,
        valued_states=states,
    )
