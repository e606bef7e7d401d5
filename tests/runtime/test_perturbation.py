"""Every weight becomes another one for a moment, and then the same again."""

import torch
from torch import nn

from llmac.runtime.perturbation import perturbed


def test_every_tensor_changes_by_a_tenth_of_its_size_and_comes_back_bitwise():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(50, 40), nn.LayerNorm(40))  # a norm's bias starts at 0
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    state = torch.get_rng_state()
    with perturbed(module, seed=3, rank=0):
        inside = {name: p.detach().clone() for name, p in module.named_parameters()}
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in before.items():
        change = (inside[name] - weight).square().mean().sqrt()
        size = weight.square().mean().sqrt() or torch.tensor(1.0)
        # The noise of a small tensor scatters around its expected size: 0.1 of the weights'.
        assert 0.07 < change / size < 0.13, name
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_an_error_inside_leaves_the_true_weights():
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    try:
        with perturbed(module, seed=0, rank=0):
            raise KeyError
    except KeyError:
        assert torch.equal(module.weight, before)


def test_low_precision_comes_back_bitwise():
    module = nn.Linear(30, 20).to(torch.bfloat16)
    before = module.weight.detach().clone()
    with perturbed(module, seed=0, rank=0):
        assert (module.weight != before).float().mean() > 0.9
    assert torch.equal(module.weight, before)
