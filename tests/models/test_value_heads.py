"""Weights of value heads: what is written about them rebuilds them, and precision is theirs."""

import json

import pytest
import torch
from safetensors.torch import save_file

from llmac.core.categorical_heads import C51, HLGauss, OutcomeClasses, PooledOutcomes, TwoHot
from llmac.core.ensembles import Combination
from llmac.core.value_heads import Bernoulli, Gaussian, Quantile, Scalar
from llmac.errors import CheckpointError
from llmac.models.value_heads import (
    ABOUT_FILE,
    HEAD_FILE,
    HEADS,
    HeadSpec,
    build_head,
    load_head,
    save_head,
    start_at,
)

SPECS = [
    HeadSpec(),
    HeadSpec(head=Scalar(bounds=(-1.0, 2.0)), hidden_layers=(8, 4), activation="gelu"),
    HeadSpec(head=Scalar(clip=0.2), normalized=True),
    HeadSpec(head=Bernoulli(low=-1.0), heads=2, combination=Combination(how="min")),
    HeadSpec(head=HLGauss(bins=7, sigma=0.1), heads=3, hidden_layers=(4,), layer_norm=True),
    HeadSpec(head=TwoHot(bins=5)),
    HeadSpec(head=C51(bins=5, lam=0.5), layer_norm=True),
    HeadSpec(head=Quantile(quantiles=3)),
    HeadSpec(head=Gaussian(pessimism=0.5)),
    HeadSpec(head=OutcomeClasses(rewards=(0.0, 0.25, 1.0))),
    HeadSpec(head=PooledOutcomes(rewards=(0.0, 0.25, 1.0))),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.head.kind)
def test_a_saved_head_is_built_again_from_what_is_written_about_it(spec, tmp_path):
    torch.manual_seed(0)
    head = build_head(16, spec)
    start_at(head, spec.head, 0.3)
    for layer in head.last_layers():
        torch.nn.init.normal_(layer.weight)
    save_head(head.state_dict(), spec, tmp_path)
    again, read = load_head(tmp_path, 16)
    assert read == spec
    hidden = torch.randn(3, 16)
    assert torch.equal(again(hidden), head(hidden))
    assert head(hidden).shape == (3, spec.heads, spec.head.outputs)


def test_every_kind_of_head_is_tried_here():
    assert {spec.head.kind for spec in SPECS} == set(HEADS)


def test_a_head_from_when_there_was_only_one_still_loads(tmp_path):
    weights = {
        "weight": torch.full((1, 4), 2.0),
        "bias": torch.ones(1),
        "offset": torch.tensor(0.5),
    }
    save_file(weights, tmp_path / HEAD_FILE)
    (tmp_path / ABOUT_FILE).write_text('{"head": "scalar"}')
    head, spec = load_head(tmp_path, 4)
    # 2 · (1 + 1 + 1 + 1) + 1 + .5
    assert spec.values(head(torch.ones(4))).item() == 9.5


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"head": "crystal_ball"}, "has a head 'crystal_ball'; known are scalar, bernoulli"),
        ({}, "has a head None"),
        ({"head": "two_hot", "settings": {"colour": 3}}, "does not describe a value head"),
        ({"head": "two_hot"}, "does not fit"),  # 101 atoms, and weights of one output
    ],
)
def test_what_is_no_head_of_ours_is_refused(about, message, tmp_path):
    save_head(build_head(4, HeadSpec()).state_dict(), HeadSpec(), tmp_path)
    (tmp_path / ABOUT_FILE).write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=message):
        load_head(tmp_path, 4)


def test_members_of_an_ensemble_are_different_and_the_same_in_every_process():
    spec = HeadSpec(heads=2, hidden_layers=(8,))
    torch.manual_seed(1)
    one = build_head(16, spec)
    torch.manual_seed(2)
    other = build_head(16, spec)
    first, second = (member[0].weight for member in one.members)
    assert not torch.equal(first, second)
    assert torch.equal(first, other.members[0][0].weight)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.head.kind)
def test_heads_compute_in_float32_inside_autocast_and_with_half_precision_weights(spec):
    torch.manual_seed(0)
    head = build_head(16, spec)
    for layer in head.last_layers():
        torch.nn.init.normal_(layer.weight, std=0.01)
    start_at(head, spec.head, 0.3)
    hidden = torch.randn(5, 16).bfloat16()
    expected = spec.values(head(hidden))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(spec.values(head(hidden)), expected)
    half = build_head(16, spec)
    half.load_state_dict(head.state_dict())
    half.to(torch.bfloat16)
    assert half.offset.dtype == torch.float32
    found = spec.values(half(hidden))
    assert found.dtype == torch.float32
    # Weights are rounded, by 2^-9 of themselves; starts and atoms are not.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
