"""Where answers are found, what is known of a critic's training, and live critics as sayers of values."""

import pytest
import torch
import yaml

from llmac.core.types import Finish, Prompt, Values
from llmac.decoding.answers import answer_finder
from llmac.decoding.provenance import Provenance, misfits, provenance
from llmac.decoding.values import CriticSays, State, last_state
from llmac.errors import ConfigError


@pytest.mark.parametrize(
    ("how", "text", "answer"),
    [
        ("equals", "3+4=7;7-2= 5 ", "5"),
        ("equals", "3+4=7;7-2=", None),
        ("equals", "five", None),
        ("boxed", r"\boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1", None),
        ("boxed", "x=1", None),
        ("auto", r"x=1, so \boxed{2}=y", "2"),
        ("auto", "x=1", "1"),
        (r"regex:\d+", "1 or 2.", "2"),
        (r"regex:(\d+) or", "1 or 2.", "1"),
        (r"regex:\d+", "none", None),
    ],
)
def test_answers_are_found(how, text, answer):
    assert answer_finder(how)(text) == answer


def test_an_answer_may_be_found_by_a_function_of_a_file(tmp_path):
    (tmp_path / "mine.py").write_text("def last(text):\n    return text[-1:] or None\nword = 'x'\n")
    assert answer_finder(f"{tmp_path / 'mine.py'}:last")("abc") == "c"
    with pytest.raises(ConfigError, match="is a str; expected a function"):
        answer_finder(f"{tmp_path / 'mine.py'}:word")
    with pytest.raises(ConfigError, match="last"):
        answer_finder(f"{tmp_path / 'mine.py'}:lats")


@pytest.mark.parametrize(
    ("how", "message"), [("box", "boxed, equals"), ("regex:(", "is not a pattern")]
)
def test_what_is_no_way_to_find_answers_is_refused(how, message):
    with pytest.raises(ConfigError, match=message):
        answer_finder(how)


def test_the_policy_that_a_critic_knows_is_told_by_its_run(tmp_path):
    recipe = {"model": {"name": "start/policy"}, "rollout": {"max_new_tokens": 50}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe))
    for folder in ("final/critic", "critic"):
        (tmp_path / folder).mkdir(parents=True)
    of_run = provenance(tmp_path / "final" / "critic")
    assert of_run == Provenance(policy=str(tmp_path / "final"), response_tokens=50)
    pretrained = provenance(tmp_path / "critic")
    assert pretrained == Provenance(policy="start/policy", response_tokens=50)
    assert provenance(tmp_path.parent) is None
    assert (
        misfits(of_run, policy=str(tmp_path / "critic" / ".." / "final"), response_tokens=50) == []
    )
    [other] = misfits(pretrained, policy="other/policy", response_tokens=50)
    assert "start/policy" in other
    assert "other/policy" in other
    [longer] = misfits(pretrained, policy="start/policy", response_tokens=51)
    assert "up to 50 tokens" in longer
    assert misfits(None, policy="x", response_tokens=9) == []


def test_the_end_of_a_response_is_no_state():
    prompt = Prompt(id="p", token_ids=(1,), source="?")
    lengths = [
        len(last_state(prompt, ids, finish).response_ids)
        for ids, finish in (
            ((5, 6), Finish.STOP),
            ((5, 6), Finish.LENGTH),
            ((5, 6), None),
            ((), Finish.STOP),
        )
    ]
    assert lengths == [1, 2, 2, 0]


class Counts:
    """A critic to which a beginning is worth its length."""

    def values(self, rollouts, starts):
        assert not starts.any()
        lengths = rollouts.action_mask.sum(dim=1).float()
        self.limit = rollouts.length_limit
        self.groups = [t.group for t in rollouts.trajectories]
        return Values(
            at=torch.zeros_like(rollouts.rewards),
            starts=starts,
            bootstrap=lengths * rollouts.truncated,
        )

    def update(self, rollouts, targets):
        raise AssertionError("nobody learns here")


def test_a_live_critic_values_states_as_responses_that_were_cut_there():
    prompt = Prompt(id="p", token_ids=(1,), source="?")
    states = [State(prompt=prompt, response_ids=ids) for ids in ((5, 6), (), (7,))]
    critic = Counts()
    assert CriticSays(critic).values_of(states) == [2.0, 0.0, 1.0]
    assert critic.limit == 2
    assert CriticSays(critic, length_limit=9).values_of(states) == [2.0, 0.0, 1.0]
    assert critic.limit == 9
    assert CriticSays(Counts()).values_of([]) == []


def test_states_of_a_prompt_are_a_group_in_the_order_in_which_they_are_asked_about():
    """Prompts of two calls may have the same name."""
    prompts = [
        Prompt(id=name, token_ids=ids, source="?")
        for name, ids in (("q", (1,)), ("p", (1,)), ("q", (2,)), ("q", (1,)), ("a", (3,)))
    ]
    critic = Counts()
    CriticSays(critic).values_of([State(prompt=p, response_ids=(5,)) for p in prompts])
    assert critic.groups == [0, 1, 2, 0, 3]
