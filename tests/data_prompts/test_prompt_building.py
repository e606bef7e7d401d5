"""How a row becomes a prompt."""

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from llmac.errors import ConfigError, DataError

USER = [{"role": "user", "content": "hi"}]


def test_a_template_is_filled_with_columns(load, texts):
    prompts, _ = load(
        [{"question": "1+1?", "level": 3}, {"question": "2+2?", "level": 4}],
        prompt="[{level}] {question}\nA:",
    )
    assert texts(prompts) == ["[3] 1+1?\nA:", "[4] 2+2?\nA:"]
    assert prompts[0].source == "[3] 1+1?\nA:"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (r"{q} in \boxed{}.", r"x in \boxed{}."),
        (r"{q} in \boxed{{answer}}", r"x in \boxed{answer}"),
        (r"{q} \frac{1}{2} {", r"x \frac{1}{2} {"),
        ("{{q}} {q}", "{q} x"),
        ("{{{q}}}", "{x}"),
        ("{odd name} {q}", "y x"),
        ("{not a column} {q}", "{not a column} x"),
    ],
)
def test_braces_around_anything_but_a_column_stand_for_themselves(load, texts, template, text):
    assert texts(load([{"q": "x", "odd name": "y"}], prompt=template)[0]) == [text]


def test_braces_within_a_value_stay(load, texts):
    assert texts(load([{"q": "{q} {{x}}"}], prompt="{q}!")[0]) == ["{q} {{x}}!"]


def test_a_template_with_an_unknown_column_names_the_nearest(load):
    with pytest.raises(DataError, match=r"\{quesion\}.*Did you mean 'question'.*\{\{quesion\}\}"):
        load([{"question": "?"}], prompt="{quesion}")


def test_a_template_without_a_column_is_refused(load):
    with pytest.raises(DataError, match="every prompt would be the same"):
        load([{"question": "?"}], prompt="Say something.")


def test_a_row_that_lacks_a_value_of_the_template_is_named(load):
    with pytest.raises(DataError, match="prompt of rows/train/1 is empty"):
        load([{"q": "a"}, {"q": None}], prompt="{q}")


def test_prompt_column_wins_over_a_column_called_prompt(load, texts):
    prompts, report = load([{"prompt": "a", "text": "b"}], prompt_column="text")
    assert texts(prompts) == ["b"]
    assert report.mapping == {}


def test_a_missing_prompt_column_names_the_nearest(load):
    with pytest.raises(DataError, match=r"data\.prompt_column is 'txt'.*Did you mean 'text'"):
        load([{"text": "b"}], prompt_column="txt")


def test_two_sayings_of_what_the_prompt_is_are_refused(load):
    with pytest.raises(ConfigError, match=r"data\.prompt and data\.prompt_column"):
        load([{"text": "b"}], prompt_column="text", prompt="{text}")


@pytest.mark.parametrize("name", ["question", "problem"])
def test_known_names_are_recognised_and_said(load, texts, name):
    prompts, report = load([{name: "why?", "answer": "so", "solution": "long"}])
    assert texts(prompts) == ["why?"]
    assert report.mapping == {"prompt": name}
    assert any(f"prompt <- {name}" in line for line in report.lines())
    assert prompts[0].columns == {name: "why?", "answer": "so", "solution": "long"}


def test_verls_layout_is_recognised(load, chat_tokenizer, texts):
    row = {
        "data_source": "openai/gsm8k",
        "prompt": USER,
        "reward_model": {"style": "rule", "ground_truth": "72"},
        "extra_info": {"split": "train"},
    }
    prompts, report = load([row], tokenizer=chat_tokenizer)
    assert texts(prompts) == ["<user>hi</><assistant>"]
    assert prompts[0].columns["ground_truth"] == prompts[0].columns["solution"] == "72"
    assert prompts[0].columns["extra_info"] == {"split": "train"}
    assert report.mapping["ground_truth"] == "reward_model.ground_truth"


def test_a_column_that_is_there_is_not_replaced_by_verls(load):
    row = {"prompt": "p", "solution": "mine", "reward_model": {"ground_truth": "72"}}
    columns = load([row])[0][0].columns
    assert (columns["solution"], columns["ground_truth"]) == ("mine", "72")


def test_nothing_known_names_the_columns_and_the_way_out(load):
    with pytest.raises(DataError, match=r"it has: text, label\. Set data\.prompt_column.*\{text\}"):
        load([{"text": "a", "label": 1}])


def test_columns_are_renamed_new_from_old(load):
    row = {"question": "q", "answer": "a", "meta": {"gold": {"x": 5}}}
    columns = load([row], columns={"ground_truth": "answer", "label": "meta.gold.x"})[0][0].columns
    assert columns == {"question": "q", "meta": {"gold": {"x": 5}}, "ground_truth": "a", "label": 5}


def test_renames_of_what_is_not_there_or_onto_what_is_are_refused(load):
    row = {"question": "q", "answer": "a"}
    with pytest.raises(DataError, match=r"from 'anwser'.*Did you mean 'answer'"):
        load([row], columns={"label": "anwser"})
    with pytest.raises(DataError, match=r"'question', which .* has already"):
        load([row], columns={"question": "answer"})
    with pytest.raises(DataError, match=r"nothing at 'meta.gold': 'gold' is missing"):
        load([{"question": "q", "meta": {}}], columns={"label": "meta.gold"})


def test_names_may_be_exchanged(load):
    columns = load([{"prompt": "p", "a": 1, "b": 2}], columns={"a": "b", "b": "a"})[0][0].columns
    assert columns == {"a": 2, "b": 1}


def test_messages_get_the_chat_template_and_stay_messages_for_rewards(load, chat_tokenizer, texts):
    prompts, _ = load([{"prompt": USER}], tokenizer=chat_tokenizer)
    assert texts(prompts) == ["<user>hi</><assistant>"]
    assert prompts[0].source == USER


def test_a_conversation_that_ends_with_the_assistant_is_continued(load, chat_tokenizer, texts):
    messages = [*USER, {"role": "assistant", "content": "Well,"}]
    prompts, _ = load([{"prompt": messages}], tokenizer=chat_tokenizer)
    assert texts(prompts) == ["<user>hi</><assistant>Well,"]


def test_auto_leaves_strings_alone_unless_there_is_a_system_message(load, chat_tokenizer, texts):
    rows = [{"prompt": "hi"}]
    assert texts(load(rows, tokenizer=chat_tokenizer)[0]) == ["hi"]
    prompts, _ = load(rows, tokenizer=chat_tokenizer, system="Be brief.")
    assert texts(prompts) == ["<system>Be brief.</><user>hi</><assistant>"]
    assert prompts[0].source == "hi"


def test_always_makes_strings_user_messages(load, chat_tokenizer, texts):
    prompts, _ = load([{"prompt": "hi"}], tokenizer=chat_tokenizer, chat="always")
    assert texts(prompts) == ["<user>hi</><assistant>"]


@pytest.mark.parametrize(
    ("prompt", "fields", "reason"),
    [
        ("hi", {"chat": "always"}, "data.chat is always"),
        ("hi", {"system": "Be brief."}, "data.system is set"),
        (USER, {}, "prompt of rows/train/0 is a list of chat messages"),
    ],
)
def test_a_needed_chat_template_that_is_missing_is_an_error(load, prompt, fields, reason):
    with pytest.raises(ConfigError, match=f"{reason}, but the tokenizer has no chat template"):
        load([{"prompt": prompt}], **fields)


def test_contradictions_about_chat_are_refused(load, chat_tokenizer):
    with pytest.raises(ConfigError, match=r"list of chat messages, and data.chat is never"):
        load([{"prompt": USER}], tokenizer=chat_tokenizer, chat="never")
    with pytest.raises(ConfigError, match=r"data.system needs a chat template"):
        load([{"prompt": "hi"}], tokenizer=chat_tokenizer, chat="never", system="x")
    own = [{"role": "system", "content": "y"}, *USER]
    with pytest.raises(DataError, match="system message of its own"):
        load([{"prompt": own}], tokenizer=chat_tokenizer, system="x")


@pytest.mark.parametrize(
    ("value", "found"), [(None, "empty"), (3, "a int"), ([], "a list"), ([{"text": "x"}], "a list")]
)
def test_a_prompt_that_is_neither_text_nor_messages_is_named(load, value, found):
    with pytest.raises(DataError, match=f"prompt of rows/train/1 is {found}"):
        load([{"prompt": "fine"}, {"prompt": value}])


def test_an_empty_string_has_nothing_to_continue(load):
    with pytest.raises(DataError, match="prompt of rows/train/0 has no tokens"):
        load([{"prompt": ""}])


def test_an_appended_end_of_sequence_is_taken_off(load, tokenizer, texts):
    raw = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    raw.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    ending = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    assert ending("hi")["input_ids"][-1] == ending.eos_token_id
    assert texts(load([{"prompt": "hi"}], tokenizer=ending)[0]) == ["hi"]
    assert texts(load([{"prompt": "hi<eos>"}], tokenizer=tokenizer)[0]) == ["hi<eos>"]


def test_a_chat_template_writes_its_own_special_tokens(load, tokenizer, texts):
    raw = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    raw.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    beginning = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    beginning.chat_template = "{{ messages[0].content }}?"
    assert texts(load([{"prompt": "hi"}], tokenizer=beginning)[0]) == ["<pad>hi"]
    assert texts(load([{"prompt": USER}], tokenizer=beginning)[0]) == ["hi?"]


def test_ids_come_from_the_id_column_when_it_tells_rows_apart(load):
    assert [p.id for p in load([{"prompt": "a", "id": 7}, {"prompt": "b", "id": 8}])[0]] == [
        "7",
        "8",
    ]
    same = load([{"prompt": "a", "id": 7}, {"prompt": "b", "id": 7}])[0]
    assert [p.id for p in same] == ["rows/train/0", "rows/train/1"]


def test_all_columns_pass_through_and_gaps_are_none(load):
    prompts, report = load([{"prompt": "a", "x": 1}, {"prompt": "b", "y": [2]}])
    assert [p.columns for p in prompts] == [{"x": 1, "y": None}, {"x": None, "y": [2]}]
    assert report.columns == ("x", "y")


def test_a_prompt_over_the_limit_is_an_error_naming_it(load):
    rows = [{"prompt": "abc"}, {"prompt": "abcdef", "id": None}]
    with pytest.raises(
        DataError, match=r"rows/train/1 has 6 tokens; at most 5 .*data\.max_prompt_tokens.*skip"
    ):
        load(rows, max_prompt_tokens=5)
    assert load(rows, max_prompt_tokens=6)[1].kept == 2


def test_prompts_over_the_limit_are_left_out_and_counted_by_choice(load, texts):
    prompts, report = load(
        [{"prompt": "abc"}, {"prompt": "abcdef"}, {"prompt": "ab"}],
        max_prompt_tokens=5,
        on_too_long="skip",
    )
    assert texts(prompts) == ["abc", "ab"]
    assert [p.id for p in prompts] == ["rows/train/0", "rows/train/2"]  # names do not move
    assert (report.rows, report.kept, report.too_long, report.longest_tokens) == (3, 2, 1, 3)
    assert any("1 of 3 prompts are too long" in line for line in report.lines())


def test_prompt_and_response_must_fit_the_model(load):
    rows = [{"prompt": "abcdef"}]
    assert load(rows, model_max_tokens=14, max_new_tokens=8)[1].kept == 1
    with pytest.raises(
        DataError, match=r"6 tokens; at most 5 .*model's 13 less .*max_new_tokens = 8"
    ):
        load(rows, model_max_tokens=13, max_new_tokens=8)
    with pytest.raises(DataError, match=r"at most 4 .*data\.max_prompt_tokens"):
        load(rows, model_max_tokens=13, max_new_tokens=8, max_prompt_tokens=4)
    with pytest.raises(DataError, match="no room for a prompt"):
        load(rows, model_max_tokens=8, max_new_tokens=8)


def test_nothing_left_after_skipping_is_an_error(load):
    with pytest.raises(
        DataError, match="no prompt of rows/train is left: all 1 have more than 2 tokens"
    ):
        load([{"prompt": "abc"}], max_prompt_tokens=2, on_too_long="skip")


def test_limit_keeps_the_first_rows(load, texts):
    assert texts(load([{"prompt": c} for c in "abc"], limit=2)[0]) == ["a", "b"]
