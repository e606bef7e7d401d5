"""Whoever overlooks what rows share is found out before rows are shared, and then learns of padded rows."""

import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmac.actor import Actor, Reference
from llmac.errors import ConsistencyError
from llmac.models.loading import train_in_full_mode
from llmac.models.packing import Packing, pack, pack_along_paths
from llmac.models.path_probe import PathProbe, settled
from llmac.models.policy import TokenPolicy
from llmac.models.tree_attention import why_not
from llmac.runtime.context import Runtime
from llmac.runtime.learner import Learner, Optimization

SIZES = {
    "vocab_size": 29,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LLAMA4 = {
    "layer_types": ["full_attention"] * 2,
    "num_local_experts": 2,
    "intermediate_size_mlp": 24,
}
AUTO = Packing(kind="auto", max_tokens=1000, pad_id=0)
ALONE = SimpleNamespace(device=torch.device("cpu"), max=float)


def policy_of(architecture="nemotron", **changes):
    """Nemotron's layers do not hand on to their attention what they are called with."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **SIZES | {"initializer_range": 0.3} | changes)
    )
    train_in_full_mode(model, gradient_checkpointing=False)
    return TokenPolicy(model, temperature=1.0, chunk_mb=1.0)


def settle(packing, policy, ranks=ALONE):
    fitting = packing.fitting(policy.model)
    return settled(fitting, [policy], torch.no_grad()(policy), ranks)


def test_a_model_that_overlooks_paths_reads_padded_rows_as_if_nothing_had_been_tried(
    ragged, caplog
):
    rows = pack(ragged, pad_id=0)
    expected = policy_of()(rows)[0]
    policy = policy_of()
    with caplog.at_level(logging.INFO, logger="llmac"):
        assert settle(AUTO, policy) == Packing(kind="padded", max_tokens=1000, pad_id=0)
    [line] = caplog.messages
    assert "NemotronForCausalLM reads padded rows" in line
    assert "of their length" in line
    assert policy.model.config._attn_implementation == "sdpa"
    assert torch.equal(policy(rows)[0], expected)
    assert AUTO.fitting(policy.model).kind == "padded"  # whoever asks next


@pytest.mark.parametrize("kind", ["trie", "varlen"])
def test_who_asks_for_paths_is_told_that_they_are_overlooked(kind, ragged):
    policy = policy_of()
    packing = settle(Packing(kind=kind, max_tokens=1000, pad_id=0), policy)
    assert packing.kind == kind
    policy(pack(ragged, pad_id=0))  # sharing nothing, all is well
    for _ in range(2):
        with pytest.raises(ConsistencyError, match=r"Nemotron.* actor.packing: padded"):
            policy(packing.pack(ragged))


def test_what_one_rank_finds_out_holds_for_all():
    policy = policy_of("qwen2")
    assert settle(AUTO, policy) == AUTO
    elsewhere = SimpleNamespace(device=torch.device("cpu"), max=lambda _: 1.0)
    assert settle(AUTO, policy, elsewhere).kind == "padded"
    assert "another rank" in why_not(policy.model)


def test_attention_that_fails_along_paths_is_overlooking_them():
    """Qwen2's layers refuse what they do not know here, as those of other architectures do."""
    policy = policy_of("qwen2")
    layer = policy.model.model.layers[0]
    own = layer.forward

    def strict(*args, **named):
        if "paths" in named:
            raise TypeError("unexpected keyword argument 'paths'")
        return own(*args, **named)

    layer.forward = strict
    assert settle(AUTO, policy).kind == "padded"
    assert "TypeError: unexpected" in why_not(policy.model)


@pytest.mark.parametrize("overlooking", ["policy", "reference", "nobody"])
def test_an_actor_settles_how_it_packs_before_it_packs(overlooking):
    runtime = Runtime.create(seed=0, output=None)
    policy, reference = (
        policy_of("nemotron" if who == overlooking else "qwen2") for who in ("policy", "reference")
    )
    packing = AUTO.fitting(policy.model, reference.model)
    actor = Actor(
        policy,
        Learner(policy, Optimization(lr=1e-3), runtime, name="actor", total_steps=1),
        runtime,
        reference=Reference(runtime.freeze(reference)),
        packing=packing,
        epochs=1,
        minibatches=1,
        ratio_tolerance=1e-4,
    )
    assert actor._packing.kind == ("auto" if overlooking == "nobody" else "padded")


def test_a_model_without_a_backbone_is_probed_by_its_logits(ragged):
    policy = policy_of("llama4_text", **LLAMA4)
    expected = policy(pack(ragged, pad_id=0))[0].detach()
    prepared = policy_of("llama4_text", **LLAMA4)
    assert settle(AUTO, prepared) == AUTO
    for rows in (pack(ragged, pad_id=0), pack_along_paths(ragged, pad_id=0)):
        torch.testing.assert_close(prepared(rows)[0], expected, rtol=1e-4, atol=1e-4)


def test_what_autocast_rounds_is_forgiven_where_it_is_on(ragged):
    model = policy_of("qwen2").model
    rows = pack_along_paths(ragged, pad_id=0)

    def rounded(packed):
        return torch.full((packed.input_ids.numel(), 2), 1.0 if packed.paths is None else 1.01)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        PathProbe()(model, rows, rounded, vocabulary=29)
    with pytest.raises(ConsistencyError, match=r"off by 0\.01"):
        PathProbe()(model, rows, rounded, vocabulary=29)
