"""Tiny random language models and hand-made trajectories."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmac.core.types import Finish, Prompt, Trajectory

COMMON = {
    "vocab_size": 29,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
ARCHITECTURES = {
    "qwen2": {"tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": False},
    "gemma2": {"final_logit_softcapping": 1.5, "head_dim": 8},
    "granite": {"logits_scaling": 4.0},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
}


@pytest.fixture
def make_model():
    """A random model of an architecture, the same every time."""

    def make(architecture="qwen2", auto=AutoModelForCausalLM, dropout=0.0):
        torch.manual_seed(0)
        settings = {"vocab_size": 29} if architecture == "gpt2" else COMMON
        config = AutoConfig.for_model(architecture, **{**settings, **ARCHITECTURES[architecture]})
        config.initializer_range = 0.5
        config.attention_dropout = dropout
        return auto.from_config(config).eval()

    return make


@pytest.fixture
def make_trajectory():
    """A trajectory with given tokens."""

    def make(prompt, response, *, group=0, reward=0.0, finish=Finish.STOP, action_mask=None):
        return Trajectory(
            prompt=Prompt(id=f"p{group}", token_ids=tuple(prompt), source="?"),
            response_ids=tuple(response),
            action_mask=tuple(action_mask) if action_mask else (True,) * len(response),
            sampler_logprobs=(0.0,) * len(response),
            finish=finish,
            group=group,
            reward=reward,
        )

    return make


@pytest.fixture
def ragged(make_trajectory):
    """Rows of different prompt and response lengths; one single-token, one empty, one with an injected token."""
    return [
        make_trajectory([1, 2, 3], [4, 5, 6, 7]),
        make_trajectory([8], [9], group=1),
        make_trajectory([1, 2, 3, 4, 5], [10, 11, 12], group=2, action_mask=[True, False, True]),
        make_trajectory([3, 1], [], group=3),
    ]
