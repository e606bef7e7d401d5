"""The loss V_0's classifier is trained with."""

import math

import pytest
import torch

from llmac.core.calibration import ranking_auc
from llmac.core.ranking import pairwise_loss, prompt_loss, soft_cross_entropy

LOGITS = torch.tensor([[0.2, 1.0], [0.5, -0.1]])
OUTCOMES = torch.tensor([0.9, 0.25])


def test_the_loss_is_the_cards():
    margins = LOGITS[:, 1] - LOGITS[:, 0]
    assert margins.tolist() == pytest.approx([0.8, -0.6])
    assert float(pairwise_loss(margins, OUTCOMES)) == pytest.approx(0.220417, abs=1e-6)
    each = [float(soft_cross_entropy(LOGITS[i : i + 1], OUTCOMES[i : i + 1])) for i in (0, 1)]
    assert each == pytest.approx([0.451101, 0.587488], abs=1e-6)
    assert float(soft_cross_entropy(LOGITS, OUTCOMES)) == pytest.approx(0.519294, abs=1e-6)
    hard = torch.tensor([1.0, 0.0])
    each = [float(soft_cross_entropy(LOGITS[i : i + 1], hard[i : i + 1])) for i in (0, 1)]
    assert each == pytest.approx([0.371101, 0.437488], abs=1e-6)
    found = float(prompt_loss(LOGITS, OUTCOMES, pair_weight=0.25))
    assert found == pytest.approx(0.444575, abs=1e-6)
    assert LOGITS.softmax(1)[:, 1].tolist() == pytest.approx([0.689974, 0.354344], abs=1e-6)


def test_equal_margins_are_worth_a_bit():
    assert float(pairwise_loss(torch.tensor([0.4, 0.4]), OUTCOMES)) == pytest.approx(math.log(2))


def test_the_pairwise_loss_looks_at_order_only():
    margins, outcomes = torch.tensor([2.0, 1.0, -1.0, 0.5]), torch.tensor([1.0, 0.6, 0.0, 0.4])
    loss = pairwise_loss(margins, outcomes)
    torch.testing.assert_close(pairwise_loss(margins + 5, outcomes), loss)
    pairs = [2 - -1, 2 - 0.5, 1 - -1, 1 - 0.5]
    assert float(loss) == pytest.approx(sum(math.log1p(math.exp(-gap)) for gap in pairs) / 4)


def test_without_pairs_there_is_nothing_to_rank_and_a_gradient_all_the_same():
    margins = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = pairwise_loss(margins, torch.tensor([0.9, 0.8]))
    loss.backward()
    assert loss.item() == 0.0
    assert margins.grad.tolist() == [0.0, 0.0]


def test_ranking_within_steps_is_measured_as_the_card_does():
    values = torch.tensor([0.9, 0.8, 0.3, 0.2, 0.6, 0.6, 0.1])
    labels = torch.tensor([1.0, 0, 0, 1, 1, 0, 0])
    group = torch.tensor([1, 1, 1, 2, 2, 2, 2])

    def auc(rows):
        weight = torch.ones(len(values[rows]))
        return float(ranking_auc(values[rows], labels[rows], 1 - labels[rows], group[rows], weight))

    assert auc(slice(0, 3)) == 1.0
    assert auc(slice(3, 7)) == pytest.approx(0.625)
    assert auc(slice(0, 7)) == pytest.approx(0.785714, abs=1e-6)
