import pytest
import torch

from llmac.core.protocols import SamplingParams
from llmac.engines.sampling import draw, uniform_table


def test_each_token_is_drawn_as_often_as_its_probability_says():
    logits = torch.tensor([0.5, 0.2, 0.1, 0.2]).log().expand(20_000, 4)
    uniforms = uniform_table(20_000, 1, seed=3)[0][:, None]
    ids, _ = draw(logits, uniforms, SamplingParams())
    # Standard error of a frequency p is sqrt(p (1 - p) / 20000) <= 0.0036.
    assert torch.allclose(
        ids.bincount(minlength=4) / 20_000, torch.tensor([0.5, 0.2, 0.1, 0.2]), atol=0.012
    )


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        # softmax([0, 1, 2]) = [0.0900, 0.2447, 0.6652]
        (SamplingParams(), [0.0900, 0.2447, 0.6652]),
        # softmax([0, 2, 4]) = [0.0159, 0.1173, 0.8668]
        (SamplingParams(temperature=0.5), [0.0159, 0.1173, 0.8668]),
        # 0.2447 / 0.9099, 0.6652 / 0.9099
        (SamplingParams(top_k=2), [0.0, 0.2689, 0.7311]),
        (SamplingParams(top_p=0.9), [0.0, 0.2689, 0.7311]),
        # 0.6652 alone reaches 0.6.
        (SamplingParams(top_p=0.6), [0.0, 0.0, 1.0]),
        # After top-k the two probabilities are 0.2689 and 0.7311, and 0.7311 alone reaches 0.7.
        (SamplingParams(top_k=2, top_p=0.7), [0.0, 0.0, 1.0]),
    ],
)
def test_logprobs_are_those_of_the_distribution_drawn_from(params, expected):
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(2_000, 3)
    ids, logprobs = draw(logits, uniform_table(2_000, 1, seed=0)[0][:, None], params)
    assert set(ids.tolist()) == {i for i, p in enumerate(expected) if p}
    assert torch.allclose(logprobs.exp(), torch.tensor(expected)[ids], atol=2e-4)


def test_greedy_takes_the_likeliest_and_reports_its_probability_at_temperature_one():
    ids, logprobs = draw(
        torch.tensor([[0.0, 1.0, 2.0]]), torch.zeros(1, 1), SamplingParams(temperature=0.0)
    )
    assert ids.tolist() == [2]
    assert logprobs.exp().item() == pytest.approx(0.6652, abs=1e-4)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_uniform_range_never_draw_an_impossible_token(uniform):
    never = float("-inf")
    logits = torch.tensor([[never, 0.3, never, -1.0, never]])
    ids, logprobs = draw(logits, torch.tensor([[uniform]]), SamplingParams())
    assert ids.item() in (1, 3)
    assert logprobs.isfinite().all()
