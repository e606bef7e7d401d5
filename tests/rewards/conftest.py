"""Hand-made trajectories and a tokenizer of bytes."""

import itertools

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmac.core.types import Finish, Prompt, Trajectory
from llmac.rewards.scoring import Rewards


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte; <eos> is special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(["<pad>", "<eos>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def answered(tokenizer):
    """A trajectory that answers `prompt` with `text`, ended by <eos>."""
    numbers = itertools.count()

    def make(text, prompt="What is 1 + 1?", *, group=0, id_=None, **columns):
        ids = (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)
        seen = prompt if isinstance(prompt, str) else str(prompt)
        return Trajectory(
            prompt=Prompt(
                id=id_ or f"row/{next(numbers)}",
                token_ids=tuple(tokenizer(seen)["input_ids"]),
                source=prompt,
                columns=columns,
            ),
            response_ids=ids,
            action_mask=(True,) * len(ids),
            sampler_logprobs=(-1.0,) * len(ids),
            finish=Finish.STOP,
            group=group,
        )

    return make


@pytest.fixture
def rewards(tokenizer):
    """Makes `Rewards`, and ends their threads."""
    made = []

    def make(*functions, **options):
        made.append(Rewards(functions, tokenizer, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
