"""Another distribution for every token: by the values of the likeliest ones, or by what small models have learned.

With transformers models in this process: an engine does not show its logits.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmac.core.guidance import reweighted, shifted_logits, value_ratio, value_tilt
from llmac.core.protocols import Request, SamplingParams
from llmac.core.types import Finish, Prompt
from llmac.data.tokenizing import encoder
from llmac.decoding.ahead import LooksAhead, looking_ahead
from llmac.decoding.candidates import Candidate, Decoded, Written, prompts_of
from llmac.decoding.reading import Reader
from llmac.decoding.values import State, Valuer, speaker
from llmac.engines.requests import check_requests, end_tokens
from llmac.engines.sampling import draw, uniform_table
from llmac.errors import ConfigError


class Shaper(Protocol):
    """Another distribution for the next token of a batch of rows."""

    def __call__(self, logits: Sequence[Tensor], rows: Sequence["Row"]) -> Tensor:
        """Logits [B, V] of each model, and the rows: to the logits [B, V] that are drawn from."""
        ...

    def advance(self, ids: Tensor) -> None:
        """These [B] were drawn."""
        ...


def token_guided(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    value: Valuer,
    prompts: Sequence[Written],
    *,
    rule: Literal["ratio", "tilt"] = "ratio",
    scale: Literal["logit", "probability"] = "logit",
    lam: float = 1.0,
    top_k: int = 10,
    others: Literal["zero", "keep"] = "zero",
    sampling: SamplingParams | None = None,
    rows_at_once: int = 256,
) -> list[Decoded]:
    """One response to each prompt, every token drawn in proportion to its probability and to what it is worth.

    The `top_k` likeliest tokens are valued, `top_k` + 1 states a token. A token that ends the response is worth what
    the state before it is: no critic learns about states behind the end.

    Args:
        model: the policy, on the device where it is to compute.
        tokenizer: its own.
        value: who says values.
        prompts: text, chat messages, or `Prompt`s.
        rule: `ratio`: `core.guidance.value_ratio` (CriticControl); `tilt`: `value_tilt` (Controlled Decoding).
        scale: of `ratio`: what a value is. CriticControl takes the logit, whatever the values are; `probability` is
            right for critics of outcomes 0 and 1.
        lam: strength; 0 is the policy cut to its `top_k` likeliest tokens.
        top_k: candidates (CriticControl: 10).
        others: `zero` or `keep` the probabilities of tokens that are no candidates (`ratio` only: CriticControl's
            program keeps them).
        sampling: temperature acts before the values do, top_p after; 0 takes the likeliest token after both.
            Its `n` is 1. None: the defaults.
        rows_at_once: prompts decoded together.

    Raises:
        ConfigError: no prompts, top_k below 1, tokens kept that tilting would starve, or a value that
            `scale` has for a probability and that is none.
        EngineError: a prompt leaves too little room for the response.
    """
    if top_k < 1:
        raise ConfigError(f"top_k of guided tokens is {top_k}; expected at least 1 candidate")
    if rule == "tilt" and others == "keep":
        raise ConfigError(
            "others is keep, and rule tilt gives candidates weights that others have no counterpart of; take rule ratio"
        )
    sampling = sampling or SamplingParams()
    says = speaker(value)
    settings = _Settings(rule=rule, scale=scale, lam=lam, top_k=top_k, others=others)
    ends = torch.tensor(sorted(_ends(model, tokenizer, sampling)))

    def shaper(batch: Sequence[Prompt]) -> Shaper:
        ahead = looking_ahead(says, batch)
        return _ByValue(ahead, settings, sampling.temperature or 1.0, ends)

    tempered = 0.0 if sampling.temperature == 0 else 1.0
    return _decode_all(
        [model],
        tokenizer,
        prompts,
        dataclasses.replace(sampling, temperature=tempered),
        shaper,
        rows_at_once=rows_at_once,
        states_a_token=min(top_k, model.config.get_text_config().vocab_size) + 1,
    )


def transfer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[PreTrainedModel, PreTrainedModel]],
    prompts: Sequence[Written],
    *,
    lam: float = 1.0,
    sampling: SamplingParams | None = None,
    rows_at_once: int = 256,
) -> list[Decoded]:
    """One response to each prompt by a model on which is put what reinforcement learning changed in a smaller one.

    RAST, arXiv:2506.15710: see `core.guidance.shifted_logits`. Three models read every token, and no critic.

    Args:
        model: the large one.
        tokenizer: of all models.
        pairs: a tuned model, and the one it was tuned from.
        prompts: text, chat messages, or `Prompt`s.
        lam: strength; 0 is the large model as it is.
        sampling: of the shifted logits; its `n` is 1. None: the defaults.
        rows_at_once: prompts decoded together.

    Raises:
        ConfigError: no prompts, or no pair.
        EngineError: a prompt leaves too little room for the response.
    """
    if not pairs:
        raise ConfigError(
            "there is no pair of a tuned model and its reference; expected at least one"
        )

    models = [model, *(one for pair in pairs for one in pair)]
    return _decode_all(
        models,
        tokenizer,
        prompts,
        sampling or SamplingParams(),
        lambda _: _Shifted(lam),
        rows_at_once=rows_at_once,
    )


@dataclasses.dataclass(slots=True, kw_only=True)
class Row:
    """A response that is being written."""

    prompt: Prompt
    ids: list[int] = dataclasses.field(default_factory=list[int])
    logprob: float = 0.0
    finish: Finish | None = None

    @property
    def state(self) -> State | None:
        """Where it is; None: it has ended."""
        if self.finish is not None:
            return None
        return State(prompt=self.prompt, response_ids=tuple(self.ids))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """Of `token_guided`."""

    rule: Literal["ratio", "tilt"]
    scale: Literal["logit", "probability"]
    lam: float
    top_k: int
    others: Literal["zero", "keep"]


class _ByValue:
    """The likeliest tokens, reweighted by what they are worth."""

    def __init__(
        self, ahead: LooksAhead, settings: _Settings, temperature: float, ends: Tensor
    ) -> None:
        self._ahead, self._settings = ahead, settings
        self._temperature, self._ends = temperature, ends

    def __call__(self, logits: Sequence[Tensor], rows: Sequence[Row]) -> Tensor:
        how = self._settings
        probs = (logits[0] / self._temperature).softmax(dim=1)
        candidates = probs.topk(min(how.top_k, probs.shape[1]), dim=1).indices
        before, after = self._ahead.look([row.state for row in rows], candidates)
        after = torch.where(
            torch.isin(candidates, self._ends.to(candidates.device)), before[:, None], after
        )
        weights = (
            value_tilt(after, lam=how.lam) if how.rule == "tilt" else _ratio(before, after, how)
        )
        return reweighted(probs, candidates, weights, others=how.others).log()

    def advance(self, ids: Tensor) -> None:
        self._ahead.advance(ids)


def _ratio(before: Tensor, after: Tensor, how: _Settings) -> Tensor:
    try:
        return value_ratio(before, after, lam=how.lam, scale=how.scale)
    except ValueError as error:
        raise ConfigError(str(error)) from error


class _Shifted:
    """The first model, shifted by the differences of the pairs behind it."""

    def __init__(self, lam: float) -> None:
        self._lam = lam

    def __call__(self, logits: Sequence[Tensor], rows: Sequence[Row]) -> Tensor:
        base, *rest = (one.to(logits[0].device) for one in logits)
        return shifted_logits(base, list(zip(rest[::2], rest[1::2], strict=True)), lam=self._lam)

    def advance(self, ids: Tensor) -> None:
        pass


def _decode_all(
    models: Sequence[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Written],
    sampling: SamplingParams,
    shaper_of: Callable[[Sequence[Prompt]], Shaper],
    *,
    rows_at_once: int,
    states_a_token: int = 0,
) -> list[Decoded]:
    found = prompts_of(encoder(tokenizer), prompts)
    for model in models:
        room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        check_requests([Request(prompt_ids=p.token_ids, params=sampling) for p in found], room)
    uniforms = uniform_table(len(found), sampling.max_new_tokens, _seed(sampling))
    decoded: list[Decoded] = []
    for start in range(0, len(found), rows_at_once):
        rows = [Row(prompt=prompt) for prompt in found[start : start + rows_at_once]]
        own = uniforms[:, start : start + len(rows)]
        _decode(models, tokenizer, rows, sampling, shaper_of([r.prompt for r in rows]), own)
        decoded += [_decoded(row, tokenizer, states_a_token) for row in rows]
    return decoded


@torch.inference_mode()
def _decode(
    models: Sequence[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    sampling: SamplingParams,
    shaper: Shaper,
    uniforms: Tensor,
) -> None:
    """Let all rows advance together until each has ended."""
    readers = [Reader(model, [row.prompt.token_ids for row in rows]) for model in models]
    ends = _ends(models[0], tokenizer, sampling)
    logits = [reader.start() for reader in readers]
    for numbers in uniforms:
        shaped = shaper(logits, rows)
        ids, logprobs = draw(shaped, numbers[:, None].to(shaped.device), sampling)
        for row, token, logprob in zip(rows, ids.tolist(), logprobs.tolist(), strict=True):
            if row.finish is None:
                _advance(row, token, logprob, tokenizer, ends, sampling)
        if all(row.finish is not None for row in rows):
            return
        shaper.advance(ids)
        logits = [reader.advance(ids) for reader in readers]


def _advance(
    row: Row,
    token: int,
    logprob: float,
    tokenizer: PreTrainedTokenizerBase,
    ends: frozenset[int],
    sampling: SamplingParams,
) -> None:
    row.ids.append(token)
    row.logprob += logprob
    if token in ends or (
        sampling.stop and any(word in str(tokenizer.decode(row.ids)) for word in sampling.stop)
    ):
        row.finish = Finish.STOP
    elif len(row.ids) == sampling.max_new_tokens:
        row.finish = Finish.LENGTH


def _decoded(row: Row, tokenizer: PreTrainedTokenizerBase, states_a_token: int) -> Decoded:
    assert row.finish is not None, "decoding ends when all rows have"
    only = Candidate(
        response_ids=tuple(row.ids),
        text=str(tokenizer.decode(row.ids, skip_special_tokens=True)),
        finish=row.finish,
        logprob=row.logprob,
    )
    return Decoded(
        prompt=row.prompt,
        chosen=only,
        candidates=(only,),
        sampled_tokens=len(row.ids),
        valued_states=len(row.ids) * states_a_token,
    )


def _ends(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: SamplingParams
) -> frozenset[int]:
    """Tokens that end a response."""
    return end_tokens(tokenizer, model.generation_config) | frozenset(sampling.stop_token_ids)


def _seed(sampling: SamplingParams) -> int:
    return int(torch.randint(2**62, ())) if sampling.seed is None else sampling.seed
