"""Rows in a trie are as likely, as uncertain and as valuable as padded rows, and teach the same."""

import logging
from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from llmac.config.schema import LoraConfig
from llmac.errors import ConfigError, ConsistencyError
from llmac.models.block_mask import block_mask
from llmac.models.loading import add_lora, train_in_full_mode
from llmac.models.packing import Packing, pack, pack_along_paths
from llmac.models.policy import TokenPolicy
from llmac.models.tree_attention import SMALL_AREA, WASTE, Paths, attend, follows_paths, why_not
from llmac.models.trie import Trie
from llmac.models.value_heads import HeadSpec
from llmac.models.value_model import ValueModel

SIZES = {
    "vocab_size": 29,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
}
KINDS = ("trie", "varlen")


def config(architecture="qwen2", **changes):
    return AutoConfig.for_model(architecture, **SIZES | changes)


def language_model(architecture="qwen2", *, how="plain", **changes):
    """The same random model every time, ready to learn."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(architecture, **changes))
    if how == "lora":
        model = add_lora(model, LoraConfig(r=2, alpha=8))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero otherwise, and half of the gradient with it
                torch.nn.init.normal_(parameter, std=0.1)
    train_in_full_mode(model, gradient_checkpointing=how == "checkpointing")
    return model


@pytest.fixture
def family(make_trajectory):
    """Everything that may happen to a row: see the comments."""
    story = [4, 5, 6, 7, 8, 9, 10, 11]
    return [
        make_trajectory([1, 2, 3], story),
        # a tree: edges begin with what their parents brought, and train on what they bring
        replace(make_trajectory([1, 2, 3], [*story[:4], 20, 21]), fresh_from=4),
        replace(make_trajectory([1, 2, 3], [*story[:4], 20, 22, 23]), fresh_from=5),
        replace(make_trajectory([1, 2, 3], story[:4]), fresh_from=2),
        # twice the same
        make_trajectory([1, 2, 3], [4, 5, 12]),
        make_trajectory([1, 2, 3], [4, 5, 12]),
        # the same tokens, some of them given by a tool in one of the rows
        make_trajectory([1, 2, 3], [4, 5, 12, 13], action_mask=[True, False, False, True]),
        # nothing said
        make_trajectory([1, 2, 3], []),
        # another group with this prompt, one whose prompt begins another row, one whose prompt is part of a response
        make_trajectory([1, 2, 3], [14, 15], group=1),
        make_trajectory([1, 2], [3, 4, 16], group=2),
        make_trajectory([1, 2, 3, 4, 5], [6, 17], group=3),
        # nothing in common, and one token
        make_trajectory([18, 19, 1, 2], [3, 4], group=4),
        make_trajectory([24], [25], group=5),
    ]


def learned(policy, parts):
    """What a policy says of the rows, and the gradient of a loss in which no two tokens count the same."""
    policy.zero_grad()
    said = {}
    for index, rows in parts:
        logprobs, entropy = policy(rows, entropy_gradient=True)
        counts = 1 + torch.cos(index[:, None] + 0.7 * torch.arange(logprobs.shape[1]))
        ((logprobs + 0.3 * entropy.square()) * counts).sum().div(30).backward()
        for row, length, *both in zip(index.tolist(), rows.lengths, logprobs, entropy, strict=True):
            said[row] = torch.stack(both)[:, :length].detach()
    together = torch.cat([said[row] for row in sorted(said)], dim=1)
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    return together, torch.cat([p.grad.flatten() for p in trained])


def packed(kind, rows, *, max_tokens=1000):
    return list(Packing(kind=kind, max_tokens=max_tokens, pad_id=0).packed(rows))


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("how", ["plain", "lora", "checkpointing"])
def test_a_policy_says_and_learns_of_a_trie_what_it_does_of_padded_rows(architecture, how, family):
    model = language_model(architecture, how=how)
    policy = TokenPolicy(model, temperature=0.7, chunk_mb=20 * 4 * 29 / 2**20)
    said, gradient = learned(policy, packed("padded", family))
    assert gradient.norm() > 0.1
    assert Packing(kind="trie", max_tokens=1, pad_id=0).fitting(model).kind == "trie"
    for kind in KINDS:
        also_said, also_gradient = learned(policy, packed(kind, family))
        torch.testing.assert_close(also_said, said, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(also_gradient, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("budget", [1, 12, 24])
def test_gradients_of_bins_add_up_to_that_of_one(budget, family):
    policy = TokenPolicy(language_model(), temperature=1.0, chunk_mb=1.0)
    said, gradient = learned(policy, packed("padded", family))
    Packing(kind="trie", max_tokens=1, pad_id=0).fitting(policy.model)
    for kind in (*KINDS, "auto"):
        parts = packed(kind, family, max_tokens=budget)
        assert len(parts) > 1
        also_said, also_gradient = learned(policy, parts)
        torch.testing.assert_close(also_said, said, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(also_gradient, gradient, rtol=1e-5, atol=1e-5)


def test_each_distinct_token_is_computed_once(family):
    policy = TokenPolicy(language_model(), temperature=1.0, chunk_mb=1.0)
    Packing(kind="trie", max_tokens=1, pad_id=0).fitting(policy.model)
    distinct = {
        ids[: end + 1]
        for t in family
        for ids in [t.prompt.token_ids + t.response_ids]
        for end in range(len(ids))
    }
    chosen = {
        t.prompt.token_ids + t.response_ids[: place + 1]
        for t in family
        for place, acts in enumerate(t.action_mask)
        if acts
    }
    seen = []
    model = policy.model
    [(_, rows)] = packed("trie", family)
    policy(rows)  # probes
    masks = []
    hooks = [
        model.model.layers[0].register_forward_pre_hook(
            lambda _m, _given, named: masks.append(named["attention_mask"].numel()),
            with_kwargs=True,
        )
    ]
    hooks += [
        layer.register_forward_hook(lambda _m, inputs, _out: seen.append(inputs[0].shape))
        for layer in (model.model.layers[0].mlp, model.lm_head)
    ]
    policy(rows)
    for hook in hooks:
        hook.remove()
    assert seen == [(1, len(distinct), 16), (len(chosen), 16)]
    assert masks == [1]  # nobody made one of N x N


@pytest.mark.parametrize("heads", [1, 2])
def test_a_value_model_judges_and_learns_of_a_trie_what_it_does_of_padded_rows(heads, family):
    torch.manual_seed(0)
    spec = HeadSpec(heads=heads, hidden_layers=() if heads == 1 else (4,))
    model = ValueModel(AutoModel.from_config(config()), spec)
    for layer in model.head.last_layers():
        torch.nn.init.normal_(layer.weight)
    Packing(kind="trie", max_tokens=1, pad_id=0).fitting(model.backbone)

    def judged(kind):
        model.zero_grad()
        [(index, rows)] = packed(kind, family)
        values = model(rows)
        counts = 1 + torch.cos(index[:, None] + 0.7 * torch.arange(values.shape[1]))
        asked = torch.arange(values.shape[1]) <= rows.lengths[:, None]
        (values.square() * counts * asked).sum().div(50).backward()
        ordered = torch.empty_like(values)
        ordered[index] = values.where(asked, 0.0)
        return ordered.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    values, gradient = judged("padded")
    asked = []
    model.head.register_forward_hook(lambda _m, inputs, _out: asked.append(len(inputs[0])))
    for kind in KINDS:
        also_values, also_gradient = judged(kind)
        torch.testing.assert_close(also_values, values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(also_gradient, gradient, rtol=1e-5, atol=2e-5)
    states = [
        t.prompt.token_ids + t.response_ids[:n]
        for t in family
        for n in range(len(t.response_ids) + 1)
    ]
    assert asked == [len(set(states)), len(states)]


def test_hidden_vectors_of_a_shared_trunk_are_those_of_padded_rows(family):
    policy = TokenPolicy(language_model(), temperature=1.0, chunk_mb=1.0)
    padded = pack(family, pad_id=0)
    expected, _ = policy(padded, hidden_only=True)
    Packing(kind="trie", max_tokens=1, pad_id=0).fitting(policy.model)
    rows = pack_along_paths(family, pad_id=0)
    found, _ = policy(rows, hidden_only=True)
    torch.testing.assert_close(found[rows.states], expected[padded.states], rtol=1e-5, atol=1e-5)


def test_without_paths_a_prepared_model_is_as_before(family):
    plain, prepared = language_model(), language_model()
    Packing(kind="auto", max_tokens=1, pad_id=0).fitting(prepared)
    ids = pack(family, pad_id=0).input_ids
    mask = (ids > 0).long()
    for settings in ({}, {"attention_mask": mask}):
        assert torch.equal(
            prepared(ids, use_cache=False, **settings).logits,
            plain(ids, use_cache=False, **settings).logits,
        )
    assert "along_paths" not in prepared.config.to_json_string()


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("mistral", {"sliding_window": 8}, "slides over 8"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "sliding_attention"),
        ("gemma2", {}, "sliding_attention"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "capped"),
        ("mamba", {}, "linear_attention"),
        ("bloom", {"n_head": 2, "n_layer": 1}, "cannot be replaced"),
        ("qwen2", {"attn_implementation": "eager"}, "is eager"),
    ],
)
def test_models_that_cannot_share_prefixes_are_named_and_read_padded_rows(
    architecture, changes, reason, caplog
):
    model = AutoModelForCausalLM.from_config(config(architecture, **changes))
    other = language_model()
    with caplog.at_level(logging.INFO, logger="llmac"):
        found = Packing(kind="trie", max_tokens=9, pad_id=0).fitting(other, model)
    assert found == Packing(kind="padded", max_tokens=9, pad_id=0)
    [line] = caplog.messages
    assert type(model).__name__ in line
    assert reason in line
    assert why_not(other) is None
    assert not follows_paths(other)


def test_flash_attention_reads_padded_rows():
    """Its name in the configuration is what transformers looks its kernels up by."""
    model = language_model()
    model.config._attn_implementation_internal = "flash_attention_2"
    assert "is flash_attention_2; set model.attention: sdpa" in why_not(model)


def test_a_model_that_overlooks_paths_is_found_out(family):
    policy = TokenPolicy(language_model(), temperature=1.0, chunk_mb=1.0)  # nobody prepared it
    with pytest.raises(ConsistencyError, match=r"Qwen2ForCausalLM .* actor.packing: padded"):
        policy(pack_along_paths(family, pad_id=0))
    value_model = ValueModel(AutoModel.from_config(config()))
    with pytest.raises(ConsistencyError, match="Qwen2Model"):
        value_model(pack_along_paths(family, pad_id=0))


def test_a_prepared_model_is_probed_whatever_rows_come_first(family):
    """Where weights are sharded every rank must take part, and rows of ranks may be packed differently."""
    model = language_model()
    backbone = AutoModel.from_config(config())
    Packing(kind="auto", max_tokens=1, pad_id=0).fitting(model, backbone)
    inputs = []
    for layers in (model.model.layers, backbone.layers):
        layers[0].register_forward_hook(lambda _m, given, _out: inputs.append(given[0].shape[:2]))
    rows = pack(family, pad_id=0)
    for module in (TokenPolicy(model, temperature=1.0, chunk_mb=1.0), ValueModel(backbone)):
        module(rows)
        assert (1, 10) in inputs  # the probe's trie
        inputs.clear()
        module(rows)
        assert inputs == [rows.input_ids.shape]
        inputs.clear()


def test_attention_that_wants_more_is_refused(family):
    model = language_model()
    Packing(kind="trie", max_tokens=1, pad_id=0).fitting(model)
    rows = pack_along_paths(family, pad_id=0)
    with pytest.raises(ConfigError, match=r"Qwen2Attention .* \(softcap\)"):
        model(**rows.inputs(), softcap=2.0)
    torch.manual_seed(0)
    forgetful = AutoModelForCausalLM.from_config(config(attention_dropout=0.5)).train()
    Packing(kind="trie", max_tokens=1, pad_id=0).fitting(forgetful)
    with pytest.raises(ConfigError, match=r"\(dropout\)"):
        forgetful(**rows.inputs())


def test_rows_of_similar_size_ask_together_and_little_is_padded():
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(20, 300, (120,), generator=draw).tolist()
    rows = [(1,) * (30 * (i % 5)) + (2 + i,) * size for i, size in enumerate(sizes)]
    trie = Trie.of([*rows, *rows[:30]])  # who brings nothing, asks nothing
    blocks = Paths.of(trie).blocks
    needed = int(((trie.lengths - trie.shared) * trie.lengths).sum())
    padded = sum(len(b.asking) * len(b.answering) // b.rows for b in blocks)
    assert padded <= WASTE * needed + SMALL_AREA * len(blocks)
    assert len(blocks) < len(rows) / 4
    assert sum(block.rows for block in blocks) == len(rows)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_sees_the_same_paths(family):
    torch.manual_seed(0)
    trie = Trie.of([(*t.prompt.token_ids, *t.response_ids) for t in family])
    paths = Paths.of(trie)
    query = torch.randn(1, 4, len(trie.tokens), 8)
    key, value = torch.randn(2, 1, 2, len(trie.tokens), 8)
    expected = attend(query, key, value, paths, 0.6)
    mask = paths.flexible().block_mask
    found = flex_attention(query, key, value, block_mask=mask, scale=0.6, enable_gqa=True)
    torch.testing.assert_close(found.transpose(1, 2), expected)


@pytest.mark.parametrize(("nodes", "step"), [(5, 1), (700, 1), (1100, 1), (1024, 128)])
@pytest.mark.parametrize("share", [True, False])
def test_a_block_mask_is_that_of_all_pairs(nodes, step, share):
    draw = torch.Generator().manual_seed(nodes)
    rows, size = [], 0
    while size < nodes:
        known = rows[int(torch.randint(len(rows), (), generator=draw))] if rows else ()
        cut, length = (
            -(-int(n) // step) * step for n in torch.randint(1, 400, (2,), generator=draw)
        )
        rows.append((*known[:cut], *range(size, size + min(length, nodes - size))))
        size += length
    ends = Trie.of(rows, share=share).ends

    def on_path(_b, _h, query, key):
        return (key <= query) & (query < ends[key])

    expected = create_block_mask(on_path, None, None, len(ends), len(ends), device="cpu")
    found = block_mask(ends)
    assert found.shape == expected.shape
    names = ("kv", "full_kv", "q", "full_q")
    for name in names:
        counts, which = f"{name}_num_blocks", f"{name}_indices"
        assert torch.equal(getattr(found, counts), getattr(expected, counts))
        assert torch.equal(getattr(found, which), getattr(expected, which))


def test_a_block_mask_is_made_without_a_tensor_of_all_pairs():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            largest = max(largest, made.numel() if isinstance(made, torch.Tensor) else 0)
            return made

    with Watch():
        block_mask(torch.full((4096,), 4096))
    assert 0 < largest <= 4096


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_policy_on_a_gpu_says_and_learns_of_a_trie_what_it_does_of_padded_rows(family):
    model = language_model(head_dim=16).to("cuda")
    policy = TokenPolicy(model, temperature=0.7, chunk_mb=1.0)

    def on_gpu(kind):
        return [(index, rows.to(torch.device("cuda"))) for index, rows in packed(kind, family)]

    said, gradient = learned(policy, on_gpu("padded"))
    Packing(kind="trie", max_tokens=1, pad_id=0).fitting(model)
    also_said, also_gradient = learned(policy, on_gpu("trie"))
    torch.testing.assert_close(also_said, said, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(also_gradient, gradient, rtol=1e-2, atol=1e-2)
