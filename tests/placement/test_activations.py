"""What a pass keeps: the closed form by hand, and against what PyTorch really saves and allocates."""

import pytest
import torch

from llmac.config.schema import ModelConfig
from llmac.placement.activations import (
    backward_bytes,
    backward_cast_bytes,
    cast_bytes,
    kept_bytes,
    logits_bytes,
)
from llmac.placement.skeletons import Skeleton, policy_skeleton

from .making import folder_of
from .measuring import looking_bytes, peak_bytes, saved_bytes

SMALL = {}
WIDE = {
    "hidden_size": 192,
    "intermediate_size": 1120,
    "num_hidden_layers": 5,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
SAVED = (0.99, 1.02)
"""Measured / formula, see docs/placement.md."""
PEAK = (0.8, 1.05)


def case(tmp_path, built, kind, sizes, precision, checkpointing):
    """A real model and its skeleton."""
    model = built(kind, **sizes)
    dtype = "bfloat16" if precision == "bfloat16" else "float32"
    model = model.to(getattr(torch, dtype))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    folder = folder_of(tmp_path / "model", model_type=kind, **sizes)
    return model, policy_skeleton(ModelConfig(name=folder, dtype=dtype))


def ids(rows, length):
    return torch.randint(0, 101, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize(
    ("kind", "sizes"), [("qwen2", SMALL), ("qwen2", WIDE), ("llama", SMALL)], ids=str
)
def test_a_forward_pass_saves_what_the_formula_says(
    tmp_path, built, kind, sizes, precision, checkpointing
):
    model, skeleton = case(tmp_path, built, kind, sizes, precision, checkpointing)
    settings = {"gradient_checkpointing": checkpointing}
    formula = kept_bytes(skeleton, 4 * 128, precision, **settings)
    if not checkpointing:  # with it, copies of weights are made anew
        head = 101 * 64 if sizes is SMALL else 101 * 192  # not used here
        copies = backward_cast_bytes(skeleton, precision, **settings)
        formula += copies - (2 * head if precision == "autocast" else 0)
    measured = saved_bytes(model, ids(4, 128), precision)
    assert SAVED[0] <= measured / formula <= SAVED[1]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("precision", "cached"),
    [("float32", True), ("bfloat16", True), ("autocast", True), ("autocast", False)],
)
@pytest.mark.parametrize("sizes", [SMALL, WIDE], ids=str)
def test_the_peak_of_a_pass_is_near_the_estimate(
    tmp_path, built, sizes, precision, cached, checkpointing
):
    model, skeleton = case(tmp_path, built, "qwen2", sizes, precision, checkpointing)
    settings = {"gradient_checkpointing": checkpointing}
    tokens = 4 * 160
    estimate = max(
        kept_bytes(skeleton, tokens, precision, **settings)
        + cast_bytes(skeleton, precision, cached=cached),
        backward_bytes(skeleton, tokens, precision, **settings)
        + backward_cast_bytes(skeleton, precision, **settings),
    )
    measured = peak_bytes(model, ids(4, 160), precision, cached)
    assert PEAK[0] <= measured / estimate <= PEAK[1]


def test_with_its_cache_autocast_holds_copies_of_all_trainable_matrices(tmp_path, built):
    model, skeleton = case(tmp_path, built, "qwen2", WIDE, "autocast", checkpointing=True)
    few = ids(1, 8)  # so few tokens that weights outweigh activations
    copies = cast_bytes(skeleton, "autocast", cached=True) - 2 * 101 * 192  # without the head
    assert 1.0 <= peak_bytes(model, few, "autocast") / copies <= 1.25
    assert 1.0 <= looking_bytes(model, few, "autocast", cached=True) / copies <= 1.05


def test_without_its_cache_autocast_holds_the_copy_of_one_matrix(tmp_path, built):
    model, skeleton = case(tmp_path, built, "qwen2", WIDE, "autocast", checkpointing=True)
    copies = cast_bytes(skeleton, "autocast", cached=True) - 2 * 101 * 192  # without the head
    copy = cast_bytes(skeleton, "autocast", cached=False)
    assert copy == 2 * 192 * 1120
    many, one = (looking_bytes(model, ids(1, 8), "autocast", cached) for cached in (True, False))
    # The rest of the pass is the same.
    assert 0.99 <= (many - one) / (copies - copy) <= 1.01


def test_bytes_of_a_tiny_layer_by_hand():
    model = Skeleton(
        weights=(),
        layers=3,
        hidden=8,
        heads=2,
        key_heads=1,
        head_size=4,
        intermediate=32,
        vocabulary=100,
        context=None,
    )
    # A token in a layer: 24·8 + 4·(2·8 + 2·4) + 4·4·32 = 192 + 96 + 512 = 800; the last norm 8·8.
    assert kept_bytes(model, 10, "float32", gradient_checkpointing=False) == 10 * (3 * 800 + 64)
    # Its input only: 4·8.
    assert kept_bytes(model, 10, "float32", gradient_checkpointing=True) == 10 * (3 * 32 + 64)
    # One layer again, gradients of two tensors of 32 and of two of 8.
    assert backward_bytes(model, 10, "float32", gradient_checkpointing=True) == 10 * (
        3 * 32 + 64 + 800 + 2 * 4 * 32 + 2 * 4 * 8
    )
    # 16·8 + 2·(2·8 + 2·4) + 4·2·32 = 432; the last norm 6·8.
    assert kept_bytes(model, 10, "bfloat16", gradient_checkpointing=False) == 10 * (3 * 432 + 48)
    # 26·8 + 48 + 256 = 512.
    assert kept_bytes(model, 10, "autocast", gradient_checkpointing=False) == 10 * (3 * 512 + 64)


def test_logits_are_four_chunks_or_all_there_are(model):
    skeleton = policy_skeleton(ModelConfig(name=model))
    assert logits_bytes(skeleton, 10**9, 64) == 4 * 64 * 2**20
    assert logits_bytes(skeleton, 10, 64) == 4 * (10 * 101 * 4)
