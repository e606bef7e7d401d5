"""A tokenizer of bytes, with and without a chat template, and data sections."""

import copy

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmac.config.schema import DataConfig
from llmac.core.types import Prompt
from llmac.data.prompts import load_prompts

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte, no chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(["<pad>", "<eos>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer):
    """The same with a chat template."""
    with_template = copy.deepcopy(tokenizer)
    with_template.chat_template = TEMPLATE
    return with_template


@pytest.fixture
def load(tokenizer):
    """(prompts, report) of rows in memory or of a dataset's name."""

    def make(rows=None, *, tokenizer=tokenizer, model_max_tokens=None, max_new_tokens=8, **fields):
        return load_prompts(
            DataConfig(**{"name": "rows", **fields}),
            tokenizer,
            model_max_tokens=model_max_tokens,
            max_new_tokens=max_new_tokens,
            rows=rows,
        )

    return make


@pytest.fixture
def texts(tokenizer):
    """What the model would see of each prompt."""
    return lambda prompts: [tokenizer.decode(p.token_ids) for p in prompts]


@pytest.fixture
def numbered():
    """`count` prompts whose ids are their numbers."""
    return lambda count: [Prompt(id=str(i), token_ids=(i,), source=str(i)) for i in range(count)]
