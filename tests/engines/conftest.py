"""Tiny random models, a character tokenizer, and what transformers itself says about them."""

from collections.abc import Callable, Sequence

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llmac.core.protocols import Completion, SamplingParams

VOCABULARY = 40
END = 1

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    characters = [chr(ord("A") + i) for i in range(VOCABULARY - 2)]
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *characters])}
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """`make_model("qwen2" | "llama", seed=..., tied=...)`: random weights, large enough to have opinions."""

    def make(
        kind: str = "qwen2", *, seed: int = 0, tied: bool = True, **changes
    ) -> PreTrainedModel:
        config_class, model_class = {
            "qwen2": (Qwen2Config, Qwen2ForCausalLM),
            "llama": (LlamaConfig, LlamaForCausalLM),
        }[kind]
        shape = {
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 128,
            "initializer_range": 0.15,
            "eos_token_id": END,
            "pad_token_id": 0,
            "bos_token_id": None,
        }
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        model = model_class(
            config_class(**{**shape, "tie_word_embeddings": tied, **changes})
        ).eval()
        torch.set_rng_state(state)
        return model

    return make


@pytest.fixture(scope="session")
def prompts() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(7)
    return [
        tuple(torch.randint(2, VOCABULARY, (3 + i % 6,), generator=generator).tolist())
        for i in range(16)
    ]


@pytest.fixture(scope="session")
def greedy() -> Callable[[PreTrainedModel, Sequence[tuple[int, ...]], int], list[tuple[int, ...]]]:
    """What `model.generate` says, one prompt at a time, without padding."""

    def generate(model, prompts, new_tokens):
        responses = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                eos_token_id=END,
                pad_token_id=0,
            )
            responses.append(tuple(out[0, len(prompt) :].tolist()))
        return responses

    return generate


@pytest.fixture(scope="session")
def expected_logprobs() -> Callable[
    [PreTrainedModel, tuple[int, ...], Completion, SamplingParams], Tensor
]:
    """Log μ of a completion by one forward pass and a plain reading of temperature, top-k and top-p."""

    @torch.no_grad()
    def recompute(model, prompt, completion, params):
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        logits = model(ids).logits[0, len(prompt) - 1 : -1].double() / (params.temperature or 1.0)
        expected = []
        for row, token in zip(logits, completion.token_ids, strict=True):
            probabilities = row.softmax(dim=-1)
            ranked = sorted(range(len(row)), key=lambda i: -row[i].item())
            kept = ranked[: params.top_k] if params.top_k else ranked
            mass = sum(probabilities[i].item() for i in kept)
            nucleus, held = [], 0.0
            for i in kept:
                if held < params.top_p:
                    nucleus.append(i)
                held += probabilities[i].item() / mass
            total = sum(probabilities[i].item() for i in nucleus)
            assert token in nucleus
            expected.append((probabilities[token] / total).log())
        return torch.stack(expected)

    return recompute
