"""Log-probs and entropies of some tokens, forward and backward, in one of two ways; prints its memory as JSON.

python scripts/benchmarks/memory_job.py naive|chunked TOKENS HIDDEN VOCABULARY CHUNK_MB
"""

import json
import resource
import sys
import time

import torch

from llmac.models.logprobs import token_logprobs


def naive(hidden, weight, targets):
    """All logits, log-softmax, gather, entropy: what is written when nobody thinks of memory."""
    logprobs = torch.log_softmax(hidden @ weight.T, dim=-1)
    chosen = logprobs.gather(-1, targets[:, None]).squeeze(-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return chosen, entropy


def peak_mb() -> float:
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main(way: str, tokens: int, hidden_size: int, vocabulary: int, chunk_mb: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.empty(vocabulary, hidden_size).normal_(std=hidden_size**-0.5).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))
    (hidden[:2] @ weight[:2].T).sum().backward()  # kernels and gradients are there before it counts
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)

    before, begun = peak_mb(), time.process_time()
    if way == "naive":
        logprobs, entropy = naive(hidden, weight, targets)
    else:
        logprobs, entropy = token_logprobs(
            hidden, targets, lambda x: x @ weight.T, vocabulary=vocabulary, chunk_mb=chunk_mb
        )
    logprobs.mean().backward()
    seconds = time.process_time() - begun
    sys.stdout.write(
        json.dumps(
            {
                "peak_mb": peak_mb() - before,
                "cpu_seconds": seconds,
                "logprob": logprobs.mean().item(),
                "entropy": entropy.mean().item(),
                "gradient": weight.grad.norm().item(),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5]))
