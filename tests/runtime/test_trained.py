"""A module whole on one rank: gradients are clipped, steps are made or refused, checkpoints are told apart."""

import math

import pytest
import torch
from torch import nn

from llmac.errors import CheckpointError
from llmac.runtime.trained import Replicated, clip_grad_norm


def two_gradients(a, b):
    module = nn.Linear(2, 1, bias=False)
    module.weight.grad = torch.tensor([[a, b]])
    return module


def trained(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=9.0)
    return Replicated(module, optimizer, max_norm=1.0, is_main=True)


def test_gradients_are_scaled_to_the_norm_and_the_norm_before_is_returned():
    module = two_gradients(3.0, 4.0)
    assert clip_grad_norm(module, 1.0).item() == 5.0  # sqrt(9 + 16)
    torch.testing.assert_close(module.weight.grad, torch.tensor([[0.6, 0.8]]))


def test_an_infinite_limit_only_measures():
    module = two_gradients(3.0, 4.0)
    assert clip_grad_norm(module, math.inf).item() == 5.0
    assert torch.equal(module.weight.grad, torch.tensor([[3.0, 4.0]]))


def test_a_norm_that_is_not_finite_leaves_gradients_and_weights_alone():
    module = two_gradients(math.nan, 4.0)
    before = module.weight.detach().clone()
    assert clip_grad_norm(module, 1.0).isnan()
    assert module.weight.grad[0, 1].item() == 4.0
    assert trained(module).step(lr=1.0).isnan()
    assert torch.equal(module.weight, before)
    assert module.weight.grad is None


def test_a_step_clips_updates_at_its_learning_rate_and_forgets():
    module = two_gradients(3.0, 4.0)
    before = module.weight.detach().clone()
    assert trained(module).step(lr=0.5).item() == 5.0
    torch.testing.assert_close(module.weight, before - 0.5 * torch.tensor([[0.6, 0.8]]))
    assert module.weight.grad is None


def test_shards_are_not_taken_for_a_whole_module(tmp_path):
    with pytest.raises(CheckpointError, match=r"saved by a sharded run.*final/"):
        trained(nn.Linear(1, 1)).load(tmp_path)


def test_a_checkpoint_of_another_module_is_refused(tmp_path):
    trained(nn.Linear(2, 1)).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not fit the module.*0\.weight"):
        trained(nn.Sequential(nn.Linear(2, 1))).load(tmp_path)
