"""Which contract a function follows, by its parameter names, and what it is called with."""

import functools

import pytest

from llmac.errors import ConfigError, DataError
from llmac.rewards.contracts import RewardSpec, understand


def reward(prompt, response, answer, *, level=0, **columns):
    return float(answer == response)


def spoken(prompt, response):
    return 0.0


class Judge:
    def __call__(self, prompts, completions):
        return [0.5] * len(completions)


def understood(function, **options):
    return understand(RewardSpec(function=function, **options))


def test_completions_mean_batch_and_response_means_one():
    assert understood(lambda completions, **kw: []).batched
    assert understood(lambda completion_ids, answer: []).batched
    assert not understood(lambda prompt, response: 0.0).batched
    assert not understood(lambda response, answer: 0.0).batched


def test_required_columns_are_the_parameters_without_default():
    function = understood(reward)
    assert function.required == {"answer"}
    function.check_columns(["answer", "question"])
    with pytest.raises(
        DataError, match=r"requires the column 'answer'.*Did you mean 'anwser'.*data\.columns"
    ):
        function.check_columns(["anwser", "question"])


def test_words_of_the_contract_are_not_columns():
    assert (
        understood(lambda prompt, response, finish, response_ids, log_metric: 0.0).required == set()
    )
    names = understood(lambda prompts, completions, completion_ids, trainer_state, log_extra: [])
    assert names.required == set()
    # A word of one contract is a column in the other.
    assert understood(lambda completions, finish: []).required == {"finish"}


@pytest.mark.parametrize(
    "function",
    [lambda text: 0.0, lambda prompt, completion: 0.0, lambda prompts, **kw: [], lambda: 0.0],
)
def test_other_parameters_are_an_error_that_shows_both_contracts(function):
    with pytest.raises(ConfigError, match="neither contract") as raised:
        understood(function)
    assert "def reward(prompts, completions, **columns)" in str(raised.value)
    assert "def reward(prompt, response, **columns)" in str(raised.value)


def test_foreign_functions_are_recognised_in_the_message_only():
    with pytest.raises(ConfigError, match="adapter: verl"):
        understood(lambda data_source, solution_str, ground_truth, extra_info=None: 0.0)
    with pytest.raises(ConfigError, match="adapter: openrlhf"):
        understood(lambda queries, prompts, labels: [])


def test_a_declared_contract_needs_no_names():
    assert understood(lambda **kwargs: [], adapter="trl").batched
    assert not understood(lambda **kwargs: 0.0, adapter="one").batched


def test_positional_only_parameters_are_refused():
    with pytest.raises(ConfigError, match="by position only"):
        understood(lambda prompt, response, /: 0.0)


def test_something_that_is_no_function_is_refused():
    with pytest.raises(ConfigError, match="a str, not a function"):
        understood("gsm8k.py:reward")


def test_callable_objects_and_partials_have_names_and_contracts():
    assert understood(Judge()).name == "Judge"
    assert understood(Judge()).batched
    partial = understood(functools.partial(reward, level=3))
    assert partial.required == {"answer"}


def test_a_common_name_gives_way_to_the_files_name():
    assert understood(reward).name == "test_reward_contracts"
    assert understood(spoken).name == "spoken"
    assert understood(reward, name="exact").name == "exact"


def test_one_response_gets_its_columns_by_name(rewards, answered):
    seen = {}

    def look(prompt, response, response_ids, finish, **columns):
        seen.update(columns, prompt=prompt, response=response, n=len(response_ids), finish=finish)
        return 0.0

    chat = [{"role": "user", "content": "hi"}]
    rewards(look)([answered("yes", chat, answer="2", level=1)])
    assert seen == {
        "prompt": chat,
        "response": "yes",  # always a string
        "n": 4,
        "finish": "stop",
        "answer": "2",
        "level": 1,
    }


def test_a_column_never_replaces_the_response(rewards, answered):
    scored = rewards(lambda prompt, response: float(response == "mine"))(
        [answered("mine", response="the dataset's")]
    )
    assert scored[0].reward == 1.0


def test_a_column_missing_from_one_row_is_none_in_a_batch(rewards, answered):
    seen = []

    def look(completions, answer):
        seen.extend(answer)
        return [0.0] * len(completions)

    rewards(look)([answered("a", answer="2"), answered("b")])
    assert seen == ["2", None]
