"""Log-probabilities and entropies of chosen tokens, never holding all logits at once.

At 152k words a float32 logit row is 0.6 MB: 16k tokens would need 10 GB for the logits alone and as much again for
their gradient. Rows are therefore projected chunk by chunk, and each chunk is projected again in the backward pass.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Projection = Callable[[Tensor], Tensor]
"""Hidden vectors [n, H] -> logits [n, V]."""


def token_logprobs(
    hidden: Tensor,
    targets: Tensor,
    project: Projection,
    *,
    vocabulary: int,
    temperature: float = 1.0,
    chunk_mb: float = 256.0,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log softmax(project(h) / temperature)[target] and the entropy of that distribution, in float32.

        log π(a|s) = z_a - log Σ_v exp z_v        H(s) = log Σ_v exp z_v - Σ_v π_v z_v        z = logits / temperature

    No tensor of [n, V] larger than `chunk_mb` exists at any time, forward or backward, and about four of that size do:
    with more rows than fit, each chunk is recomputed in the backward pass, which costs one more projection.

    Args:
        hidden: [n, H] hidden vectors of the states.
        targets: [n] the tokens chosen there.
        project: the output layer, soft-capping and scaling included.
        vocabulary: V, the width of the logits, used for the size of a chunk.
        temperature: what the sampler divided its logits by; without it the ratio of sampler and trainer is wrong.
        chunk_mb: bound on one float32 chunk of logits, MiB.
        entropy_gradient: whether the entropy carries a gradient; it is only watched otherwise.

    Returns:
        (log-probabilities [n], entropies [n] in nats).

    >>> h, w = torch.zeros(3, 2), torch.ones(4, 2)
    >>> token_logprobs(h, torch.tensor([0, 1, 2]), lambda x: x @ w.T, vocabulary=4)[0]
    tensor([-1.3863, -1.3863, -1.3863])
    """
    rows = max(1, int(chunk_mb * 2**20 / (4 * vocabulary)))
    if hidden.shape[0] <= rows:
        return _chunk(hidden, targets, project, temperature, entropy_gradient)
    parts = [
        checkpoint(
            _chunk,
            h,
            t,
            project,
            temperature,
            entropy_gradient,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat([logprobs for logprobs, _ in parts]), torch.cat(
        [entropy for _, entropy in parts]
    )


def _chunk(
    hidden: Tensor, targets: Tensor, project: Projection, temperature: float, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    logits = project(hidden).float()
    if temperature != 1.0:
        logits = logits / temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(-1, targets[:, None]).squeeze(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = torch.special.entr(logprobs.exp()).sum(-1)
    return chosen, entropy
