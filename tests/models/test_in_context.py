"""V_0's classifier: shapes of the released code, and what it may look at."""

import pytest
import torch

from llmac.models.in_context import FEATURES, ContextClassifier, PromptClassifier, QueryAdapter


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_the_adapter_has_the_size_of_the_released_one():
    adapter = QueryAdapter(1024)
    assert sum(p.numel() for p in adapter.parameters()) == 268_838
    features = adapter(torch.randn(2, 5, 1024), torch.tensor([5, 3]))
    assert features.shape == (2, 1008)
    assert FEATURES == 1008


def test_at_first_the_queries_are_the_same_for_all_prompts():
    # as if nothing were added to the static queries.
    adapter, hidden = QueryAdapter(16), torch.randn(3, 4, 16)
    lengths = torch.tensor([4, 4, 4])
    with_change = adapter(hidden, lengths)
    adapter.residual = torch.nn.Linear(16, FEATURES)
    torch.nn.init.zeros_(adapter.residual.weight)
    torch.nn.init.zeros_(adapter.residual.bias)
    assert torch.equal(with_change, adapter(hidden, lengths))
    torch.nn.init.ones_(adapter.residual.weight)
    assert not torch.allclose(with_change, adapter(hidden, lengths))


def test_padding_is_not_seen():
    adapter = QueryAdapter(16).eval()
    torch.nn.init.normal_(adapter.residual[-1].weight)
    hidden, lengths = torch.randn(2, 6, 16), torch.tensor([4, 2])
    other = hidden.clone()
    other[0, 4:], other[1, 2:] = 100.0, -100.0
    torch.testing.assert_close(adapter(hidden, lengths), adapter(other, lengths))
    torch.testing.assert_close(
        adapter(hidden[:1, :4], lengths[:1]), adapter(hidden, lengths)[:1], rtol=1e-4, atol=1e-5
    )


def classifier():
    model = ContextClassifier(5, width=16, heads=2).eval()
    torch.nn.init.normal_(model.answer.weight)
    return model


def test_untrained_it_says_the_mean_outcome():
    logits = ContextClassifier(5)(
        torch.randn(4, 5), torch.tensor([1.0, 0, 1, 1]), torch.randn(3, 5)
    )
    # Laplace: (3 + 1) / (4 + 2)
    torch.testing.assert_close(logits.softmax(1)[:, 1], torch.full((3,), 4 / 6))


def test_prompts_asked_for_do_not_see_each_other():
    model, known, outcomes = classifier(), torch.randn(6, 5), torch.rand(6)
    asked = torch.randn(3, 5)
    together = model(known, outcomes, asked)
    alone = torch.cat([model(known, outcomes, row[None]) for row in asked])
    torch.testing.assert_close(together, alone)


def test_the_context_is_a_set_and_its_outcomes_count():
    model, known, outcomes = classifier(), torch.randn(6, 5), torch.rand(6)
    asked, order = torch.randn(3, 5), torch.randperm(6)
    said = model(known, outcomes, asked)
    torch.testing.assert_close(model(known[order], outcomes[order], asked), said)
    assert not torch.allclose(model(known, outcomes[order], asked), said)


def test_parts_do_not_change_what_is_said():
    model = PromptClassifier(16).eval()
    torch.nn.init.normal_(model.classifier.answer.weight)
    hidden, lengths = torch.randn(6, 4, 16), torch.tensor([4, 2, 3, 4, 1, 4])
    outcomes = torch.rand(4)
    whole = model([(hidden[:4], lengths[:4])], outcomes, [(hidden[4:], lengths[4:])])
    parts = [(hidden[i : i + 1], lengths[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(model(parts[:4], outcomes, parts[4:]), whole, rtol=1e-4, atol=1e-4)
