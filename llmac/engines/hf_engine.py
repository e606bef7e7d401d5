"""Sampling with a transformers model in this process: the embedded default, on CPU and GPU.

Each distinct prompt is read once and its keys and values are copied to its siblings; all rows advance together, one
token a step; finished rows leave the batch. A model whose cache is more than keys and values of all earlier tokens
(sliding windows, state spaces) is driven by `model.generate` instead, with the same sampling.
"""

import dataclasses
import inspect
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

from llmac.core.measures import Metrics
from llmac.core.protocols import Completion, Request, SamplingParams
from llmac.engines.attention import use_grouped_attention
from llmac.engines.checkpoint_form import check_restorable, parts, restored
from llmac.engines.cpu_linear import use_onednn_linear
from llmac.engines.manifest import Manifest
from llmac.engines.prefix_hits import PrefixHits
from llmac.engines.requests import check_requests, end_tokens, request_seeds
from llmac.engines.row_cache import RowCache
from llmac.engines.sampling import NEVER, draw, uniform_table
from llmac.engines.wave import Wave, compact
from llmac.errors import EngineError

logger = logging.getLogger(__name__)

PREFILL_TOKENS = 16384
"""Prompt tokens, padding included, read in one forward pass."""
TRIAL_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest difference of log-probs between decoding in step and a plain forward pass, by dtype."""
TRIAL_TOLERANCE_LOW_PRECISION = 0.25
"""The same for bfloat16 and float16, where the order of summation shows in the second digit."""


class HFEngine:
    """A `RolloutEngine` over a transformers causal language model that it owns: `HFEngine(model, tokenizer)`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_batch_rows: int = 512,
    ) -> None:
        """Take over `model`: it goes to evaluation mode, and `load_weights` replaces its weights.

        Args:
            model: a causal language model on the device to sample on; not the model that is trained.
            tokenizer: gives the end-of-sequence token and decodes for stop strings.
            max_batch_rows: responses sampled at once; lower it when memory runs out.
        """
        if model.config.is_encoder_decoder:
            raise EngineError(
                f"{type(model).__name__} is an encoder-decoder; llmac samples from decoder-only models, where a "
                "response continues its prompt"
            )
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._max_batch_rows = max_batch_rows
        self._ends = end_tokens(tokenizer, model.generation_config)
        # A checkpoint's own repetition penalty or temperature must not act besides the request's parameters.
        model.generation_config = GenerationConfig()
        text_config = model.config.get_text_config()
        # Recurrent models have no limit.
        self._max_tokens = getattr(text_config, "max_position_embeddings", None)
        self._parts = parts(model)
        check_restorable(model, self._parts)
        self._manifest = Manifest.of(model, self._parts)
        self._version = 0
        self._hits = PrefixHits()
        use_onednn_linear(model)
        self._in_step = self._prepare_decoding_in_step()

    @property
    def policy_version(self) -> int:
        """The version given to the last completed `load_weights`; 0 before any."""
        return self._version

    @property
    def reuses_prefixes(self) -> bool:
        """False: a prompt that begins like one of an earlier call is read from its beginning."""
        return False

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """`params.n` completions for each request, in the order of the requests.

        Greedy (temperature 0) tokens report their log-probability at temperature 1.

        Raises:
            EngineError: a request cannot be served, memory ran out, or the weights give log-probabilities that are
                not finite.
        """
        check_requests(requests, self._max_tokens)
        sampled: list[list[Completion]] = [[] for _ in requests]
        seeds = request_seeds(requests)
        for params, members in _by_params(requests):
            rows = [
                _Row(requests[index].prompt_ids, numbers)
                for index in members
                for numbers in _numbers(requests[index].params, seeds[index])
            ]
            completions = iter(self._sample(rows, params))
            for index in members:
                sampled[index] = list(itertools.islice(completions, requests[index].params.n))
        return sampled

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights by the stream and take `version`; if anything is wrong with it, none is replaced.

        Needs room for a second copy of the weights until it returns, and for mixtures of experts for two more of one
        layer's experts.

        Args:
            weights: in the naming of the model's checkpoints, as `runtime.weights.full_weights` gives them.
            version: of the policy they are.

        Raises:
            EngineError: names are missing, unknown or double, or a shape differs. The old weights stay.
        """
        checked = self._manifest.checked(weights)
        arrived = list(restored(self._model, self._parts, checked))
        for target, tensor in arrived:
            target.data = tensor
        self._version = version

    def prefix_hits(self) -> Metrics:
        """The fraction of prompt tokens that were copied from an equal prompt, not computed, since the last call."""
        return self._hits.drain()

    def sleep(self) -> None:
        """Nothing to free: keys and values live only during `generate`, and the weights stay where they are."""

    def wake(self) -> None:
        """Nothing to undo."""

    def close(self) -> None:
        """Forget the model. Safe to call twice."""
        self.__dict__.pop("_model", None)

    def _sample(self, rows: Sequence["_Row"], params: SamplingParams) -> list[Completion]:
        """One completion a row, in waves of at most `max_batch_rows`."""
        # Longest first, so that a wave has little padding and memory runs out at once or never; equal ones together.
        order = sorted(range(len(rows)), key=lambda row: (-len(rows[row].prompt), rows[row].prompt))
        completions: dict[int, Completion] = {}
        # `generate` counts positions on for rows that are past their own limits.
        most_tokens = None if self._in_step else self._max_tokens
        for places in _waves(rows, order, self._max_batch_rows, most_tokens):
            wave = Wave(
                prompts=[rows[place].prompt for place in places],
                params=params,
                uniforms=[rows[place].uniforms for place in places],
                device=self._model.device,
                ends=self._ends | frozenset(params.stop_token_ids),
                decode=self._decode_text,
            )
            try:
                if self._in_step:
                    self._decode_in_step(wave)
                else:
                    self._decode_with_generate(wave)
            except torch.OutOfMemoryError as error:
                raise EngineError(
                    f"out of memory while sampling {len(places)} responses of up to {wave.steps} tokens at "
                    f"once; lower rollout.max_num_seqs (now {self._max_batch_rows}) or rollout.max_new_tokens"
                ) from error
            completions.update(zip(places, wave.completions(self._version), strict=True))
        return [completions[place] for place in range(len(rows))]

    def _decode_text(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def _decode_in_step(self, wave: Wave) -> None:
        """All rows advance together; finished ones leave."""
        cache, logits, padding = self._read_prompts(wave)
        device = self._model.device
        seen, last = len(wave.prompts[0]), wave.reach - 1
        lengths = [len(prompt) for prompt in wave.prompts]
        # One position serves all rows when there is no padding.
        positions = torch.tensor(lengths if padding is not None else [seen], device=device)[:, None]
        while True:
            ids, logprobs = draw(logits, wave.uniforms(), wave.params)
            wave.take(ids, logprobs)
            if wave.finished:
                return
            dropped = wave.drop_finished()
            if dropped is not None:
                cache.keep(*dropped)
                ids = compact(ids, *dropped)
                if padding is not None:
                    positions, padding = compact(positions, *dropped), compact(padding, *dropped)
            seen += 1
            logits = self._model(
                input_ids=ids[:, None],
                attention_mask=None if padding is None else padding[..., :seen],
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
            # A row past its own limit waits here for the others; no position is asked for that no row may reach.
            positions = (positions + 1).clamp_(max=last)

    def _read_prompts(self, wave: Wave) -> tuple[RowCache, Tensor, Tensor | None]:
        """Read each distinct prompt once.

        Returns:
            Keys and values of every row, next-token logits [B, V], and the term that hides padding from attention,
            [B, 1, 1, S] for S up to the last token that may be sampled; None when all prompts are equally long.
        """
        prompts, device = wave.prompts, self._model.device
        longest = len(prompts[0])
        cache: RowCache | None = None
        logits = []
        for first_row, distinct, source in _prefills(prompts):
            ids, mask = _left_padded(distinct, device)
            ragged = len(distinct[-1]) < len(distinct[0])
            read = DynamicCache(config=self._model.config)
            out = self._model(
                input_ids=ids,
                attention_mask=mask if ragged else None,
                position_ids=(mask.cumsum(dim=1) - 1).clamp_(min=0) if ragged else None,
                past_key_values=read,
                use_cache=True,
                logits_to_keep=1,
            )
            copies = torch.tensor(source, device=device)
            layers: list[tuple[Tensor, Tensor]] = [(x.keys, x.values) for x in read.layers]  # type: ignore[misc]
            if cache is None:
                cache = RowCache(layers, len(prompts), longest, wave.steps)
            cache.put(first_row, layers, copies)
            asked = sum(len(distinct[place]) for place in source)
            self._hits.add(asked=asked, reused=asked - sum(map(len, distinct)))
            logits.append(out.logits[copies, -1])
        assert cache is not None
        if len(prompts[-1]) == longest:
            return cache, torch.cat(logits), None
        pads = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
        hidden = torch.arange(longest + wave.steps, device=device) < pads[:, None]
        padding = torch.zeros(hidden.shape, dtype=self._model.dtype, device=device)
        padding.masked_fill_(hidden, torch.finfo(padding.dtype).min)
        return cache, torch.cat(logits), padding[:, None, None]

    def _decode_with_generate(self, wave: Wave) -> None:
        """Let `model.generate` do the forward passes and keep its own cache; sampling stays ours."""
        self._hits.add(asked=sum(map(len, wave.prompts)), reused=0)
        ids, mask = _left_padded(wave.prompts, self._model.device)
        self._model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=wave.steps, pad_token_id=0
            ),
            logits_processor=LogitsProcessorList([_DrawnToken(wave)]),
            stopping_criteria=StoppingCriteriaList([_WaveFinished(wave)]),
        )

    @torch.inference_mode()
    def _prepare_decoding_in_step(self) -> bool:
        """Whether decoding in step gives this model's own log-probabilities, found by trying it on a few tokens."""
        model, name = self._model, type(self._model).__name__
        missing = {"position_ids", "logits_to_keep"} - inspect.signature(
            model.forward
        ).parameters.keys()
        layers = [] if missing else DynamicCache(config=model.config).layers
        if missing or any(type(layer) is not DynamicLayer for layer in layers):
            logger.info(
                "%s needs a cache of its own kind: sampling with model.generate, which is slower",
                name,
            )
            return False
        own_attention = model.config._attn_implementation or "eager"
        use_grouped_attention(model)
        vocabulary = model.config.get_text_config().vocab_size
        prompts = [
            tuple((7 * start + i) % vocabulary for i in range(width))
            for start, width in [(1, 5), (2, 3)]
        ]
        wave = Wave(
            prompts=prompts,
            params=SamplingParams(temperature=0.0),
            uniforms=[torch.zeros(4)] * len(prompts),
            device=model.device,
            ends=frozenset(),
            decode=self._decode_text,
        )
        self._decode_in_step(wave)
        self._hits.drain()
        switched = model.config._attn_implementation or "eager"
        model.set_attn_implementation(own_attention)
        gap = max(
            self._gap_to_plain_forward(p, c)
            for p, c in zip(prompts, wave.completions(0), strict=True)
        )
        if gap > TRIAL_TOLERANCE.get(model.dtype, TRIAL_TOLERANCE_LOW_PRECISION):
            logger.info(
                "%s decoded in step differs by %.2g: sampling with model.generate, slower",
                name,
                gap,
            )
            return False
        model.set_attn_implementation(switched)
        return True

    def _gap_to_plain_forward(self, prompt: tuple[int, ...], completion: Completion) -> float:
        """Largest difference between a completion's log-probs and those of one forward pass without a cache."""
        ids = torch.tensor([prompt + completion.token_ids], device=self._model.device)
        logits = self._model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = (
            logits.float().log_softmax(dim=-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        )
        return float(
            (expected - torch.tensor(completion.logprobs, device=expected.device)).abs().max()
        )


class _DrawnToken(LogitsProcessor):
    """Draws the tokens of a wave and leaves `generate` no other choice."""

    def __init__(self, wave: Wave) -> None:
        self._wave = wave

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        ids, logprobs = draw(scores, self._wave.uniforms(), self._wave.params)
        self._wave.take(ids, logprobs)
        return torch.full_like(scores, NEVER).scatter_(1, ids[:, None], 0.0)


class _WaveFinished(StoppingCriteria):
    """Stops `generate` when every row of the wave has ended."""

    def __init__(self, wave: Wave) -> None:
        self._wave = wave

    # The base class passes its own options by name, and declares types that no tensor has.
    def __call__(self, input_ids, scores, **kwargs):  # type: ignore[override]
        return torch.full((len(input_ids),), self._wave.finished, device=input_ids.device)


@dataclass(frozen=True, slots=True)
class _Row:
    """One response to be sampled."""

    prompt: tuple[int, ...]
    uniforms: Tensor
    """A number for each token it may have."""


def _by_params(requests: Sequence[Request]) -> Iterator[tuple[SamplingParams, list[int]]]:
    """Places of the requests that differ in their seeds, lengths and numbers of responses at most.

    States of one response leave different lengths to their continuations; in waves of their own these would be slow.
    """
    groups: dict[SamplingParams, list[int]] = {}
    for index, request in enumerate(requests):
        alike = dataclasses.replace(request.params, seed=None, n=1, max_new_tokens=1)
        groups.setdefault(alike, []).append(index)
    yield from groups.items()


def _numbers(params: SamplingParams, seed: int) -> tuple[Tensor, ...]:
    """The uniform numbers of each of a request's responses."""
    return uniform_table(params.n, params.max_new_tokens, seed).unbind(dim=1)


def _waves(
    rows: Sequence[_Row], order: Sequence[int], most_rows: int, most_tokens: int | None
) -> Iterator[list[int]]:
    """Cut the places in `order` (longest prompt first) into batches; `most_tokens` bounds prompt and response."""
    wave: list[int] = []
    for place in order:
        longest = len(rows[wave[0] if wave else place].prompt)
        too_long = most_tokens is not None and longest + len(rows[place].uniforms) > most_tokens
        if wave and (len(wave) == most_rows or too_long):
            yield wave
            wave = []
        wave.append(place)
    yield wave


def _prefills(
    prompts: Sequence[tuple[int, ...]],
) -> Iterator[tuple[int, list[tuple[int, ...]], list[int]]]:
    """Cut sorted prompts into forward passes: first row, distinct prompts, which of them each row continues."""
    first_row, distinct, source = 0, [prompts[0]], []
    for row, prompt in enumerate(prompts):
        if prompt != distinct[-1]:
            if (len(distinct) + 1) * len(distinct[0]) > PREFILL_TOKENS:
                yield first_row, distinct, source
                first_row, distinct, source = row, [], []
            distinct.append(prompt)
        source.append(len(distinct) - 1)
    yield first_row, distinct, source


def _left_padded(prompts: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask (1 = token), [P, L] each; the last token of every prompt is in the last column."""
    width = max(len(prompt) for prompt in prompts)
    pads = [width - len(prompt) for prompt in prompts]
    ids = [[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
    mask = [[0] * pad + [1] * len(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
