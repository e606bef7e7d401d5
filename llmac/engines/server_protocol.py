"""What `vllm serve` is asked and what it answers: token ids in; token ids, log-probs and version of the weights out."""

import functools
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from llmac.core.protocols import Completion, Request
from llmac.core.types import Finish
from llmac.errors import EngineError

GENERATE = "/inference/v1/generate"
"""vLLM's route for token ids."""
NOT_A_NUMBER = -9999.0
"""What vLLM's JSON says for a log-probability that is NaN or minus infinity."""


class Interrupted(Exception):
    """A server gave no whole answer, and another or the same one may: the request is worth asking again."""


@dataclass(frozen=True, slots=True)
class WeightLabel:
    """The name under which a server holds a set of weights; it comes back with every response.

    The version alone does not tell the weights apart: a proof sends two sets under one version, and a server may
    still hold those of yesterday's run.
    """

    version: int
    """Of the policy, as `load_weights` was told."""
    name: str = "default"
    """What the server is told; vLLM's word for the weights it started with is `default`."""

    @classmethod
    def of_update(cls, version: int, *, update: int, run: str) -> "WeightLabel":
        """The label of the `update`-th set of weights that `run` sends.

        >>> WeightLabel.of_update(7, update=9, run="5f").name
        'version 7, update 9 of run 5f'
        """
        return cls(version, f"version {version}, update {update} of run {run}")


def body_of(request: Request, *, seed: int, ends: frozenset[int]) -> dict[str, Any]:
    """The JSON body of one request, in vLLM's words.

    Args:
        request: what is asked.
        seed: of this request; vLLM counts up from it for siblings.
        ends: token ids that end a response besides the request's own.
    """
    params = request.params
    return {
        "token_ids": list(request.prompt_ids),
        "sampling_params": {
            # Greedy responses of one prompt are equal; vLLM refuses to compute more than one.
            "n": 1 if params.temperature == 0 else params.n,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "max_tokens": params.max_new_tokens,
            "stop": list(params.stop),
            "stop_token_ids": sorted(ends | set(params.stop_token_ids)),
            "seed": seed,
            "logprobs": 0,
            "detokenize": bool(params.stop),
            "skip_special_tokens": False,
        },
    }


def completions_of(
    answer: Any, request: Request, expected: WeightLabel, url: str
) -> list[Completion]:
    """The completions of one request, each sampled by the expected weights from its first token to its last.

    Raises:
        Interrupted: the server was stopped or paused in the middle of a response.
        EngineError: other weights were used, or the answer is not one of vLLM's.
    """
    greedy = request.params.temperature == 0
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        completions = [_completion(choice, expected, url) for choice in choices]
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(
            f"{url}{GENERATE} answered in a form llmac does not know ({type(error).__name__}: {error}); expected that "
            "of `vllm serve` 0.32. Start it with `llmac serve <recipe>`"
        ) from error
    wanted = 1 if greedy else request.params.n
    if len(completions) != wanted:
        raise EngineError(f"{url} was asked for {wanted} responses and returned {len(completions)}")
    return completions * request.params.n if greedy else completions


def cached_tokens(answer: Any) -> int | None:
    """Tokens of the prompt whose keys and values the server had already; None where it does not say.

    >>> cached_tokens({"usage": {"prompt_tokens_details": {"cached_tokens": 32}}}), cached_tokens({})
    (32, None)
    """
    usage = answer.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    return details.get("cached_tokens")


@functools.cache
def tls() -> ssl.SSLContext:
    """Certificates for https, read once: reading them takes httpx longer than a request."""
    return httpx.create_ssl_context()


def decoded(response: httpx.Response) -> Any:
    """The JSON of a response, or the beginning of its text if it is something else."""
    try:
        return response.json()
    except ValueError:
        return response.text[:500]


def message_of(answer: Any) -> str:
    """What an error response says, whichever of vLLM's forms it has.

    >>> message_of({"error": {"message": "too long"}}), message_of({"detail": "no such route"})
    ('too long', 'no such route')
    """
    if isinstance(answer, Mapping):
        inner = answer.get("error", answer)
        if isinstance(inner, Mapping):
            inner = inner.get("message") or inner.get("detail") or inner
        return str(inner)
    return str(answer)


def _completion(choice: Mapping[str, Any], expected: WeightLabel, url: str) -> Completion:
    if choice["finish_reason"] not in ("stop", "length"):
        raise Interrupted(f"a response ended with {choice['finish_reason']!r}")
    _check_label(choice["weight_versions"], expected, url)
    token_ids = tuple(choice["token_ids"])
    content = choice["logprobs"]["content"]
    if len(content) != len(token_ids):
        raise ValueError(f"{len(token_ids)} tokens with {len(content)} log-probabilities")
    if any(at["logprob"] <= NOT_A_NUMBER for at in content):
        raise EngineError(
            f"{url} says log-probabilities that are not finite; the policy's weights are broken. Check "
            "actor/grad_norm of the last steps, and lower actor.lr or actor.max_grad_norm"
        )
    return Completion(
        token_ids=token_ids,
        logprobs=tuple(at["logprob"] for at in content),
        finish=Finish.STOP if choice["finish_reason"] == "stop" else Finish.LENGTH,
        policy_version=expected.version,
    )


def _check_label(spans: list[Mapping[str, Any]] | None, expected: WeightLabel, url: str) -> None:
    """Refuse a response that other weights took part in, or of which nobody knows."""
    if not spans:
        raise EngineError(
            f"{url} does not say which weights sampled a response; expected those labelled {expected.name!r}. llmac "
            "needs a vLLM that reports `weight_versions` (0.32 does)"
        )
    others = [span["version"] for span in spans if span["version"] != expected.name]
    if others:
        raise EngineError(
            f"{url} sampled with weights labelled {others[0]!r}; expected {expected.name!r}. Either the last update "
            "did not reach it, or somebody else updated it: a server belongs to one run at a time. Call load_weights "
            "with the complete weights, or restart the server with `llmac serve <recipe>`"
        )
