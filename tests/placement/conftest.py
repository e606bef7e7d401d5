"""Recipes over configuration-only model folders, and models small enough to measure."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from llmac.config import load_recipe

from .making import QWEN2, RECIPE, folder_of


@pytest.fixture
def model(tmp_path):
    return folder_of(tmp_path / "tiny")


@pytest.fixture
def recipe_of(model):
    """A recipe over the tiny model: `recipe_of("ppo", "actor.minibatches=2")`."""

    def recipe(algorithm="grpo", *overrides):
        settings = {**RECIPE, "model": {"name": model}, "algorithm": {"name": algorithm}}
        return load_recipe(settings, overrides)

    return recipe


@pytest.fixture
def built():
    """Real models of the architectures the activation formula was written for."""

    def model_of(kind, **sizes):
        torch.manual_seed(0)
        config = {k: v for k, v in (QWEN2 | sizes).items() if k != "model_type"}
        if kind == "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**config)).train()
        return LlamaForCausalLM(LlamaConfig(**config)).train()

    return model_of
