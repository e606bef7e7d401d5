"""Folders that `from_pretrained` loads: the same weights in their precision, and what the checkpoint said besides."""

import copy

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

from llmac.config.schema import LoraConfig
from llmac.models.loading import add_lora
from llmac.runtime.saving import save_adapter, save_whole, whole_weights

CONFIG = Qwen2Config(
    vocab_size=19,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=24,
    tie_word_embeddings=True,
    pad_token_id=None,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_the_same_in_the_same_precision(model, dtype, tmp_path):
    model.to(dtype)
    save_whole(model, tmp_path, is_main=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert again.config.dtype == dtype
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_what_only_the_generation_config_said_is_kept(model, tmp_path):
    """A chat model's second end token often stands nowhere else."""
    model.generation_config = GenerationConfig(eos_token_id=[1, 2], pad_token_id=3)
    save_whole(model, tmp_path, is_main=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert (again.eos_token_id, again.pad_token_id) == ([1, 2], 3)


def test_adapters_are_saved_merged_and_by_themselves(model, tmp_path):
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapted = add_lora(model, LoraConfig(r=2, alpha=4))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_whole(adapted, tmp_path, is_main=True)
    save_adapter(adapted, tmp_path / "adapter", is_main=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG))
    fresh.load_state_dict(base)
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(again(input_ids=ids).logits, expected)


def test_only_the_rank_that_writes_keeps_the_weights(model, tmp_path):
    assert whole_weights(model, keep=False) == {}
    save_whole(model, tmp_path / "nothing", is_main=False)
    assert not (tmp_path / "nothing").exists()
