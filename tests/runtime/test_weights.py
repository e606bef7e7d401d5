"""What leaves the trainer is what `merge_and_unload` and `save_pretrained` would give."""

import copy
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3MoeConfig,
)

from llmac.errors import ConfigError
from llmac.runtime.weights import full_weights

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def qwen2(tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied))


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=8))


def with_lora(model: nn.Module, **options) -> nn.Module:
    """A LoRA adapter that changes something: B starts at random, not at zero."""
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, **options))  # type: ignore[arg-type]
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.3)
    return adapted


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("build", [qwen2, llama])
def test_a_plain_untied_model_streams_its_state_dict(build):
    model = build()
    got = dict(full_weights(model))
    assert_same(got, model.state_dict())
    assert all(not tensor.requires_grad for tensor in got.values())


SMALL_CONFIGS: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen2-tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=8),
    "phi3": Phi3Config(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    # All experts of a layer are one tensor in memory and one each in a checkpoint.
    "mixtral": MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2),
    "qwen3-moe": Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12
    ),
    "gpt-oss": GptOssConfig(
        **SIZES, head_dim=8, num_local_experts=3, num_experts_per_tok=2, eos_token_id=2
    ),
    # Checkpoints have other names.
    "gpt-neox": GPTNeoXConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=24,
        num_attention_heads=2,
    ),
    "gpt2": GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=2
    ),
    "opt": OPTConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        ffn_dim=24,
        num_attention_heads=2,
        max_position_embeddings=8,
        word_embed_proj_dim=16,
    ),
}


@pytest.mark.parametrize("loaded", [False, True], ids=["made", "loaded"])
@pytest.mark.parametrize("config", SMALL_CONFIGS.values(), ids=SMALL_CONFIGS.keys())
def test_the_stream_is_what_save_pretrained_writes(config, loaded, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    if loaded:
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    got = dict(full_weights(model, bucket_bytes=2000))
    assert set(got) == set(written)
    for name in written:
        assert got[name].dtype == written[name].dtype
        assert torch.equal(got[name], written[name]), name


@pytest.mark.parametrize("config", SMALL_CONFIGS.values(), ids=SMALL_CONFIGS.keys())
def test_a_model_without_memory_says_what_it_would_stream(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    want = {name: tensor.shape for name, tensor in full_weights(model)}
    assert {name: tensor.shape for name, tensor in full_weights(empty)} == want


def test_a_stream_in_another_precision_leaves_integers_alone():
    model = qwen2()
    model.register_buffer("steps", torch.tensor(300))
    got = dict(full_weights(model, dtype=torch.bfloat16))
    assert got.pop("steps").dtype == torch.int64
    for name, tensor in got.items():
        assert torch.equal(tensor, model.state_dict()[name].bfloat16())


def test_a_merged_layer_is_rounded_once_in_the_precision_of_the_stream():
    adapted = with_lora(qwen2(), target_modules=["q_proj"])
    name = "model.layers.0.self_attn.q_proj.weight"
    want = dict(full_weights(adapted))[name]
    assert torch.equal(dict(full_weights(adapted, dtype=torch.bfloat16))[name], want.bfloat16())


def test_buffers_that_are_not_saved_are_left_out():
    model = qwen2()
    model.register_buffer("saved", torch.ones(2))
    model.register_buffer("derived", torch.ones(2), persistent=False)
    names = [name for name, _ in full_weights(model)]
    assert "saved" in names
    assert "derived" not in names


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (qwen2(), {"target_modules": "all-linear"}),
        (qwen2(), {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}),
        (llama(), {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
        (gpt2(), {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    ],
    ids=["qwen2-linear", "qwen2-embedding-and-head", "llama-rslora", "gpt2-conv1d"],
)
def test_lora_streams_what_merge_and_unload_gives_and_leaves_the_base_alone(model, options):
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = with_lora(model, **options)
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    got = {name: tensor.clone() for name, tensor in full_weights(adapted)}
    after = adapted.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)

    want = copy.deepcopy(adapted).merge_and_unload().state_dict()  # type: ignore[operator]
    if model.config.tie_word_embeddings:
        del want["lm_head.weight"]
    assert_same(got, want)
    assert any(not torch.equal(got[name], plain[name]) for name in got)


def test_the_bare_model_inside_an_adapter_streams_the_same():
    adapted = with_lora(qwen2(), target_modules="all-linear")
    assert_same(
        dict(full_weights(adapted.get_base_model())),  # type: ignore[operator]
        dict(full_weights(adapted)),
    )


def test_a_disabled_adapter_streams_the_base():
    model = qwen2()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = with_lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with adapted.disable_adapter():  # type: ignore[operator]
        assert_same(dict(full_weights(adapted)), plain)


def test_an_adapter_merged_by_hand_is_not_added_twice():
    adapted = with_lora(qwen2(), target_modules="all-linear")
    want = {name: tensor.clone() for name, tensor in full_weights(adapted)}
    adapted.merge_adapter()  # type: ignore[operator]
    assert_same(dict(full_weights(adapted)), want)


def test_a_bfloat16_base_is_rounded_once():
    adapted = with_lora(qwen2().bfloat16(), target_modules=["q_proj"])
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj  # type: ignore[operator]
    exact = layer.base_layer.weight.double() + 3.0 * (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    got = dict(full_weights(adapted))["model.layers.0.self_attn.q_proj.weight"]
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, exact.to(torch.bfloat16))


def test_one_merged_tensor_is_alive_at_a_time():
    adapted = with_lora(qwen2(), target_modules="all-linear")
    own = {tensor.data_ptr() for tensor in adapted.state_dict().values()}
    alive: list[weakref.ref[Tensor]] = []
    merged = 0
    stream = full_weights(adapted)
    for _, tensor in stream:
        assert all(reference() is None for reference in alive)
        if tensor.data_ptr() not in own:
            merged += 1
            alive = [weakref.ref(tensor)]
        del tensor, _
    assert merged == 14  # 7 linear layers in each of 2 blocks


@pytest.mark.parametrize(
    ("tied", "options", "finding"),
    [
        (False, {"target_modules": ["q_proj"], "use_dora": True}, "DoRA"),
        (False, {"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias"),
        (True, {"target_modules": ["embed_tokens"]}, "lm_head.weight and model.embed_tokens"),
        (
            False,
            {"target_modules": ["q_proj"], "trainable_token_indices": [1]},
            "TrainableTokens",
        ),
    ],
    ids=["dora", "bias", "tied-embedding", "trainable-tokens"],
)
@pytest.mark.filterwarnings("ignore:.*tie:UserWarning")
def test_an_adapter_that_cannot_be_merged_is_refused_before_the_first_tensor(
    tied, options, finding
):
    adapted = with_lora(qwen2(tied), **options)
    with pytest.raises(ConfigError, match=finding):
        full_weights(adapted)
