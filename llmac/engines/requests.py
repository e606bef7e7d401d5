"""What every engine checks and reads the same way: requests, and the tokens that end a response."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from llmac.core.protocols import Request, SamplingParams
from llmac.errors import EngineError


def generation_config_of(model: str, revision: str | None) -> GenerationConfig | None:
    """The checkpoint's generation config, if it has one.

    Args:
        model: Hub id or folder.
        revision: branch, tag or commit on the Hub; None: its main branch.
    """
    try:
        return GenerationConfig.from_pretrained(model, revision=revision or "main")
    except OSError:
        return None


def end_tokens(
    tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None
) -> frozenset[int]:
    """Token ids that end a response: the tokenizer's end-of-sequence token and those of the generation config.

    A chat model often has two, and only one of them is the tokenizer's.
    """
    configured = generation.eos_token_id if generation is not None else None
    ends = configured if isinstance(configured, list) else [configured]
    return frozenset(end for end in (*ends, tokenizer.eos_token_id) if isinstance(end, int))


def check_requests(requests: Sequence[Request], max_tokens: int | None) -> None:
    """Refuse what no engine can serve, naming the request.

    Args:
        requests: what was asked.
        max_tokens: prompt and response together; None when the model has no limit.
    """
    for index, request in enumerate(requests):
        params = request.params
        if not request.prompt_ids:
            raise EngineError(
                f"request {index} has an empty prompt; expected at least one token to continue"
            )
        _check_params(index, params)
        wanted = len(request.prompt_ids) + params.max_new_tokens
        if max_tokens is not None and wanted > max_tokens:
            raise EngineError(
                f"request {index} may reach {wanted} tokens ({len(request.prompt_ids)} of prompt, max_new_tokens "
                f"{params.max_new_tokens}), but the engine's limit is {max_tokens}; lower rollout.max_new_tokens or "
                "data.max_prompt_tokens, or raise rollout.max_model_len"
            )


def _check_params(index: int, params: SamplingParams) -> None:
    """Refuse parameters outside their range."""
    wrong = [
        ("n", params.n, "at least 1", params.n < 1),
        ("max_new_tokens", params.max_new_tokens, "at least 1", params.max_new_tokens < 1),
        ("temperature", params.temperature, "0 (greedy) or above", not params.temperature >= 0),
        ("top_p", params.top_p, "above 0 and at most 1", not 0 < params.top_p <= 1),
        ("top_k", params.top_k, "0 (all) or above", params.top_k < 0),
        ("stop", params.stop, "strings that are not empty", "" in params.stop),
    ]
    for name, found, expected, is_wrong in wrong:
        if is_wrong:
            raise EngineError(
                f"request {index}: sampling parameter {name} is {found!r}; expected {expected}"
            )


def request_seeds(requests: Sequence[Request]) -> list[int]:
    """A seed for each request, from its own; requests with equal seeds get different ones, in their order.

    Equal prompts with equal seeds would otherwise be answered alike, and siblings must differ.

    >>> from llmac.core.protocols import Request, SamplingParams
    >>> twins = [Request(prompt_ids=(1,), params=SamplingParams(seed=5))] * 2
    >>> request_seeds(twins) == request_seeds(twins), len(set(request_seeds(twins)))
    (True, 2)
    """
    generators: dict[int | None, torch.Generator] = {}
    seeds = []
    for request in requests:
        seed = request.params.seed
        if seed not in generators:
            drawn = int(torch.randint(2**62, ())) if seed is None else seed
            generators[seed] = torch.Generator().manual_seed(drawn)
        seeds.append(int(torch.randint(2**62, (), generator=generators[seed])))
    return seeds
