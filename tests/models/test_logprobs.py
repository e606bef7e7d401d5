"""Chunked log-probabilities equal the plain ones, values and gradients, and never hold more than a chunk."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmac.models.logprobs import token_logprobs

ROWS, HIDDEN, VOCABULARY = 37, 8, 501


class LargestTensor(TorchDispatchMode):
    """Watches every tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def problem():
    torch.manual_seed(1)
    hidden = torch.randn(ROWS, HIDDEN, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, requires_grad=True)
    return hidden, weight, torch.randint(VOCABULARY, (ROWS,))


def chunk_mb(rows):
    return rows * VOCABULARY * 4 / 2**20


@pytest.mark.parametrize("rows_a_chunk", [1, 5, 36, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_give_the_values_and_gradients_of_the_whole(rows_a_chunk, temperature):
    hidden, weight, targets = problem()
    logprobs, entropy = token_logprobs(
        hidden,
        targets,
        lambda h: h @ weight.T,
        vocabulary=VOCABULARY,
        temperature=temperature,
        chunk_mb=chunk_mb(rows_a_chunk),
        entropy_gradient=True,
    )
    mix = torch.linspace(-1, 1, ROWS)
    got = torch.autograd.grad((mix * logprobs).sum() + (mix**2 * entropy).sum(), [hidden, weight])

    # Recomputed without the function under test.
    p = torch.distributions.Categorical(logits=(hidden @ weight.T).float() / temperature)
    expected = torch.autograd.grad(
        (mix * p.log_prob(targets)).sum() + (mix**2 * p.entropy()).sum(), [hidden, weight]
    )
    torch.testing.assert_close(logprobs, p.log_prob(targets))
    torch.testing.assert_close(entropy, p.entropy())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_tensor_exceeds_the_chunk_forward_or_backward():
    hidden, weight, targets = problem()
    with LargestTensor() as chunked:
        logprobs, _ = token_logprobs(
            hidden, targets, lambda h: h @ weight.T, vocabulary=VOCABULARY, chunk_mb=chunk_mb(4)
        )
        logprobs.sum().backward()
    with LargestTensor() as whole:
        logprobs, _ = token_logprobs(hidden, targets, lambda h: h @ weight.T, vocabulary=VOCABULARY)
        logprobs.sum().backward()
    # The weight [V, H] and its gradient are larger than four rows of logits and cannot be avoided.
    assert chunked.elements == VOCABULARY * HIDDEN
    assert whole.elements == ROWS * VOCABULARY


def test_watching_the_entropy_costs_no_gradient():
    hidden, weight, targets = problem()
    _, entropy = token_logprobs(hidden, targets, lambda h: h @ weight.T, vocabulary=VOCABULARY)
    assert not entropy.requires_grad
