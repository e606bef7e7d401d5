"""What a plan or a critic writes becomes what an engine continues, without a recipe's data section."""

import copy

import pytest
from tokenizers.processors import TemplateProcessing

from llmac.data.tokenizing import encoder
from llmac.errors import ConfigError, DataError

QUESTION = {"role": "user", "content": "1+1?"}


def test_text_is_taken_as_it_is_also_where_there_is_a_template(tokenizer, chat_tokenizer):
    for each in (tokenizer, chat_tokenizer):
        assert each.decode(encoder(each)("1+1=")) == "1+1="


def test_messages_go_through_the_template_which_asks_for_an_answer(chat_tokenizer):
    ids = encoder(chat_tokenizer)([QUESTION])
    assert chat_tokenizer.decode(ids) == "<user>1+1?</><assistant>"
    assert isinstance(ids, tuple)


def test_a_message_the_assistant_has_begun_is_gone_on_with(chat_tokenizer):
    ids = encoder(chat_tokenizer)([QUESTION, {"role": "assistant", "content": "It is"}])
    assert chat_tokenizer.decode(ids) == "<user>1+1?</><assistant>It is"


def test_an_end_that_the_tokenizer_appends_is_taken_off_and_one_that_was_written_is_not(tokenizer):
    ending = copy.deepcopy(tokenizer)
    ending._tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    assert ending("ab")["input_ids"][-1] == 1
    assert ending.decode(encoder(ending)("ab")) == "ab"
    assert encoder(ending)("ab<eos>")[-1] == 1


def test_messages_without_a_template_and_texts_without_tokens_are_refused(tokenizer):
    encode = encoder(tokenizer)
    with pytest.raises(ConfigError, match="a prompt that was written is a list of chat messages"):
        encode([QUESTION])
    with pytest.raises(DataError, match="a prompt that was written has no tokens"):
        encode("")
