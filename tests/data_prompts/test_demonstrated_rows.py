"""Rows with completions become what the policy is to say, token by token."""

import pytest

from llmac.config.schema import DataConfig
from llmac.data.demonstrations import demonstrations_in
from llmac.errors import ConfigError, DataError

ROWS = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "2+2=", "completion": "4<eos>"}]
CHAT = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "two"}]


@pytest.fixture
def shown(load, tokenizer):
    """(what was made of the rows, text of a prompt's completion, special tokens included)"""

    def make(rows, *, tokenizer=tokenizer, column="completion", append_end=True, limit=8, **fields):
        prompts, _ = load(rows, tokenizer=tokenizer, **fields)
        return demonstrations_in(
            prompts,
            DataConfig(**{"name": "rows", **fields}),
            tokenizer,
            column=column,
            append_end=append_end,
            max_tokens=limit,
        )

    return make


def said(found, tokenizer):
    return [tokenizer.decode(found.completions[p.id].token_ids) for p in found.prompts]


def test_a_completion_is_its_tokens_and_one_end(shown, tokenizer):
    found = shown(ROWS)
    assert said(found, tokenizer) == ["2<eos>", "4<eos>"]
    assert [tokenizer.decode(p.token_ids) for p in found.prompts] == ["1+1=", "2+2="]
    assert [c.text for c in found.completions.values()] == ["2", "4<eos>"]
    assert found.line() == "2 completions with 4 tokens to learn from, the longest has 2"


@pytest.mark.parametrize("append_end", [True, False])
def test_a_completion_of_which_the_tokenizer_makes_nothing_is_named(
    shown, tokenizer, monkeypatch, append_end
):
    real = type(tokenizer).__call__

    def without_fours(self, texts, **settings):
        found = real(self, texts, **settings)
        ids = found["input_ids"]
        found["input_ids"] = [[] if t == "4<eos>" else i for t, i in zip(texts, ids, strict=True)]
        return found

    monkeypatch.setattr(type(tokenizer), "__call__", without_fours)
    with pytest.raises(DataError, match=r"the completion of \S+ has no tokens"):
        shown(ROWS, append_end=append_end)


def test_an_end_is_added_only_where_it_is_wanted(shown, tokenizer):
    assert said(shown(ROWS, append_end=False), tokenizer) == ["2", "4<eos>"]
    end = tokenizer.eos_token
    tokenizer.eos_token = None
    try:
        assert said(shown(ROWS[:1], append_end=False), tokenizer) == ["2"]
        with pytest.raises(ConfigError, match="append_end is true, and the tokenizer has no end"):
            shown(ROWS)
    finally:
        tokenizer.eos_token = end


def test_a_tokenizer_that_begins_texts_with_a_token_does_not_begin_completions_with_it(
    shown, tokenizer, monkeypatch
):
    asked = []
    real = type(tokenizer).__call__

    def watched(self, texts, **options):
        asked.append((texts, options))
        return real(self, texts, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", watched)
    shown(ROWS)
    assert asked[-1] == (["2", "4<eos>"], {"add_special_tokens": False})


def test_a_completion_may_be_a_message_of_the_assistant(shown, chat_tokenizer):
    rows = [{"prompt": CHAT[:1], "completion": CHAT[1:]}]
    found = shown(rows, tokenizer=chat_tokenizer)
    assert said(found, chat_tokenizer) == ["two<eos>"]
    assert chat_tokenizer.decode(found.prompts[0].token_ids) == "<user>1+1?</><assistant>"


def test_of_a_chat_that_ends_with_an_answer_the_answer_is_learned(shown, chat_tokenizer):
    chats = [{"messages": CHAT}, {"messages": [*CHAT, CHAT[0], {**CHAT[1], "content": "2"}]}]
    found = shown(
        chats, tokenizer=chat_tokenizer, prompt_column="messages", system="Be brief.", limit=9
    )
    assert said(found, chat_tokenizer) == ["two<eos>", "2<eos>"]
    first, second = (chat_tokenizer.decode(p.token_ids) for p in found.prompts)
    assert first == "<system>Be brief.</><user>1+1?</><assistant>"
    assert second.endswith("<assistant>two</><user>1+1?</><assistant>")
    assert found.prompts[0].source == CHAT[:1]


def test_a_completion_that_is_too_long_stops_the_run_or_is_left_out_and_counted(shown, tokenizer):
    rows = [*ROWS, {"prompt": "say=", "completion": "12345678"}]
    with pytest.raises(DataError, match=r"rows/train/2 has 9 tokens with its end; at most 8 are"):
        shown(rows)
    assert len(shown(rows, limit=9).prompts) == 3
    found = shown(rows, on_too_long="skip")
    assert (said(found, tokenizer), found.too_long) == (["2<eos>", "4<eos>"], 1)
    assert found.completions.keys() == {p.id for p in found.prompts}
    assert "1 others are too long and left out" in found.line()
    with pytest.raises(DataError, match="no completion is left: all 3 have more than 1 tokens"):
        shown(rows, on_too_long="skip", limit=1)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "is empty"),
        ("", "is empty"),
        (3, "is a int"),
        (CHAT, "is a list"),
        (CHAT[:1], "is a list"),
    ],
)
def test_a_row_without_a_usable_completion_is_named(value, says, shown):
    rows = [ROWS[0], {"prompt": "2+2=", "completion": value}]
    with pytest.raises(
        DataError, match=rf"completion of rows/train/1 \(column completion\) {says}"
    ):
        shown(rows)


def test_a_column_that_is_not_there_is_asked_for_by_name(shown, chat_tokenizer):
    rows = [{"prompt": "1+1=", "completions": "2"}]
    with pytest.raises(
        DataError, match=r"no column 'completion', and the prompt of rows/train/0 is"
    ):
        shown(rows)
    with pytest.raises(
        DataError, match=r"Did you mean 'completions'\? .* Set algorithm.completion_col"
    ):
        shown(rows)
    with pytest.raises(DataError, match="no chat that ends with an answer of the assistant"):
        shown([{"prompt": CHAT[:1]}], tokenizer=chat_tokenizer)
    assert len(shown(rows, column="completions").prompts) == 1
