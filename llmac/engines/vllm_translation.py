"""Requests in vLLM's words, and its outputs in ours."""

from typing import TYPE_CHECKING

from llmac.core.protocols import Completion, Request, SamplingParams
from llmac.core.types import Finish
from llmac.errors import EngineError

if TYPE_CHECKING:
    import vllm


def translated(params: SamplingParams, seed: int, ends: frozenset[int]) -> "vllm.SamplingParams":
    """The same request in vLLM's words.

    Args:
        params: what was asked.
        seed: of this request.
        ends: tokens that end every response, besides those of the request.
    """
    import vllm

    return vllm.SamplingParams(
        # Greedy responses of one prompt are equal; vLLM refuses to compute more than one.
        n=1 if params.temperature == 0 else params.n,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        max_tokens=params.max_new_tokens,
        stop=list(params.stop),
        stop_token_ids=sorted(ends | set(params.stop_token_ids)),
        seed=seed,
        logprobs=0,
        detokenize=bool(params.stop),
        skip_special_tokens=False,
    )


def completions(request: Request, output: "vllm.RequestOutput", version: int) -> list[Completion]:
    """What vLLM answered to a request, `params.n` of it.

    Raises:
        EngineError: a response ended in another way than by a stop or at its length.
    """
    sampled = sorted(output.outputs, key=lambda one: one.index)
    found = [_completion(one, version) for one in sampled]
    return found * request.params.n if request.params.temperature == 0 else found


def _completion(output: "vllm.CompletionOutput", version: int) -> Completion:
    """One of vLLM's outputs in our words."""
    if output.finish_reason not in ("stop", "length") or output.logprobs is None:
        raise EngineError(
            f"vLLM ended a response with {output.finish_reason!r}; expected 'stop' or 'length'. "
            "Its log has the cause"
        )
    token_ids = tuple(output.token_ids)
    return Completion(
        token_ids=token_ids,
        logprobs=tuple(
            at[token].logprob  # type: ignore[index]
            for token, at in zip(token_ids, output.logprobs, strict=True)
        ),
        finish=Finish.STOP if output.finish_reason == "stop" else Finish.LENGTH,
        policy_version=version,
    )
