"""Which states a teacher is shown, how it is asked, and which of its words are kept."""

import json

import pytest

from llmac.core.collate import collate
from llmac.core.protocols import Completion, Player, SamplingParams
from llmac.core.segments import every_token
from llmac.core.types import Finish, Prompt, Rollouts, Trajectory
from llmac.critic_traces import Tracing, _keep
from llmac.critics.generative import GenerativeConfig
from llmac.errors import ConfigError, DataError
from llmac.pretraining.teachers import Question, ask_function, ask_model
from llmac.pretraining.trace_states import choose


def rollouts_of(*, prompts=6, siblings=4, length=9, rewards=lambda p, i: float(i % 2)):
    trajectories = [
        Trajectory(
            prompt=Prompt(id=f"p{p}", token_ids=(p,), source=f"problem {p}", columns={"row": p}),
            response_ids=tuple(10 * i + t for t in range(length)),
            action_mask=(True,) * length,
            sampler_logprobs=(-0.5,) * length,
            finish=Finish.STOP,
            group=p,
            reward=rewards(p, i),
        )
        for p in range(prompts)
        for i in range(siblings)
    ]
    batch = collate(trajectories, length_limit=16)
    return Rollouts.of(batch, old_logprobs=batch.sampler_logprobs)


def chosen_from(rollouts, count=24, seed=0):
    starts = every_token(rollouts.action_mask)
    return choose(rollouts, starts, (0.0, 1.0), count=count, seed=seed)


def cells_of(chosen):
    return {name: sum(c.cell == name for c in chosen) for name in {c.cell for c in chosen}}


def test_outcomes_and_thirds_have_equally_many_states():
    chosen = chosen_from(rollouts_of())
    thirds = ("early", "middle", "late")
    assert cells_of(chosen) == {f"{o}/{t}": 4 for o in ("right", "wrong") for t in thirds}
    for one in chosen:
        third = thirds[one.state.position // 3]
        assert one.cell == ("right/" if one.outcome == 1 else "wrong/") + third


def test_a_cell_with_few_states_is_not_made_up_for_by_others():
    lopsided = rollouts_of(rewards=lambda p, i: float((p, i) == (0, 0)))
    chosen = chosen_from(lopsided, count=60)
    counts = cells_of(chosen)
    assert counts["wrong/late"] == 10
    assert counts["right/late"] == 3
    assert len({c.state.key for c in chosen}) == len(chosen)


def test_equal_states_are_asked_about_once():
    chosen = chosen_from(rollouts_of(prompts=3), count=600)
    # Of each prompt one state before the first token, and eight in each of four responses.
    assert len(chosen) == 3 * (1 + 4 * 8)


def test_prompts_take_turns():
    rollouts = rollouts_of()
    chosen = chosen_from(rollouts, count=36)
    for cell in cells_of(chosen):
        asked = [c.state.origin.prompt.id for c in chosen if c.cell == cell]
        if cell not in ("right/early", "wrong/early"):  # where first states are shared
            assert sorted(asked) == [f"p{p}" for p in range(6)]


def test_the_choice_is_the_seeds():
    keys = [[c.state.key for c in chosen_from(rollouts_of(), seed=s)] for s in (0, 0, 1)]
    assert keys[0] == keys[1] != keys[2]


@pytest.fixture
def questions():
    return [
        Question(prompt=f"judge {n}", problem="1+1=", partial="2", chosen=one)
        for n, one in enumerate(chosen_from(rollouts_of(), count=6))
    ]


def test_a_function_is_told_of_the_state_and_may_be_silent(questions):
    seen = []

    def teacher(prompt, state):
        seen.append((prompt, state))
        return None if prompt == "judge 1" else f"hm {state['outcome']}"

    words = ask_function(teacher, questions)
    assert words[1] is None
    assert words[0] == f"hm {questions[0].chosen.outcome}"
    prompt, state = seen[0]
    origin = questions[0].chosen.state.origin
    assert (prompt, state["problem"], state["partial"]) == ("judge 0", "1+1=", "2")
    assert (state["id"], state["length"]) == (origin.prompt.id, 9)
    assert (state["position"], state["columns"]) == (
        questions[0].chosen.state.position,
        {"row": int(origin.prompt.id[1:])},
    )


def test_a_teacher_that_fails_names_the_response(questions):
    def broken(prompt, state):
        raise KeyError("x")

    name = questions[0].chosen.state.origin.prompt.id
    with pytest.raises(DataError, match=rf"raised KeyError: 'x', asked about token \d .* {name}"):
        ask_function(broken, questions)
    with pytest.raises(DataError, match=rf"returned a int about token \d .* prompt {name}; expec"):
        ask_function(lambda prompt, state: 7, questions)


class Scripted:
    """An engine that repeats the last token of a prompt, and remembers what it was asked."""

    policy_version = 0

    def __init__(self):
        self.asked = []

    def generate(self, requests):
        self.asked += requests
        return [
            [Completion(token_ids=r.prompt_ids[-1:], logprobs=(0.0,), finish=Finish.STOP)]
            for r in requests
        ]

    def load_weights(self, weights, version): ...

    def sleep(self): ...

    def wake(self): ...

    def close(self): ...


@pytest.mark.parametrize("chat", [False, True])
def test_a_model_is_asked_once_for_all_with_a_seed_for_each(questions, chat):
    engine, encoded = Scripted(), []

    def encode(written):
        encoded.append(written)
        return (len(encoded),)

    teacher = Player(engine=engine, encode=encode, decode=str, read=lambda ids: f"said {ids[0]}")
    params = SamplingParams(temperature=0.5, max_new_tokens=7, stop=("</answer>",))
    words = ask_model(teacher, questions, chat=chat, params=params, seed=3)
    assert words == [f"said {n}" for n in range(1, 7)]
    first = [{"role": "user", "content": "judge 0"}] if chat else "judge 0"
    assert encoded[0] == first
    assert len({r.params.seed for r in engine.asked}) == 6
    assert {
        (r.params.n, r.params.temperature, r.params.max_new_tokens, r.params.stop)
        for r in engine.asked
    } == {(1, 0.5, 7, ("</answer>",))}


def test_a_state_that_a_model_has_no_room_for_is_left_out(questions, caplog):
    engine = Scripted()
    teacher = Player(
        engine=engine,
        encode=lambda text: (1,) * (3 if text.endswith("2") else 2),
        decode=str,
        read=lambda ids: "said",
    )
    words = ask_model(
        teacher, questions, chat=False, params=SamplingParams(), seed=3, most_tokens=2
    )
    assert words == ["said", "said", None, "said", "said", "said"]
    assert len(engine.asked) == 5
    assert "1 of 6 states are left out" in caplog.text


def test_words_are_kept_up_to_the_score_if_they_have_one_that_is_not_far_off(questions, tmp_path):
    path = tmp_path / "traces.jsonl"
    right = [q.chosen.outcome == 1 for q in questions]
    near = ["ok <answer>9</answer> more" if r else "no <answer> 1 </answer>" for r in right]
    words = [
        *near[:3],
        None,
        "no score",
        "<answer>0</answer>" if right[5] else "<answer>10</answer>",
    ]
    how = Tracing(function="f.py:f", max_error=0.5)
    traced = _keep(questions, words, GenerativeConfig(), path, how)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert (traced.asked, traced.kept, traced.silent) == (6, 3, 1)
    assert (traced.unparsed, traced.far_off) == (1, 1)
    assert sum(traced.cells.values()) == 3
    assert "3 traces of 6 states" in traced.line()
    assert [r["prompt"] for r in rows] == ["judge 0", "judge 1", "judge 2"]
    assert [r["score"] for r in rows] == [9 if r else 1 for r in right[:3]]
    assert [r["outcome"] for r in rows] == [float(r) for r in right[:3]]
    assert all(r["completion"].endswith("</answer>") for r in rows)
    assert all(0 <= r["position"] < 1 for r in rows)
    all_kept = _keep(questions, words, GenerativeConfig(), path, Tracing(function="f.py:f"))
    assert (all_kept.kept, all_kept.far_off) == (4, 0)


def test_a_score_behind_a_first_closing_tag_is_none_as_it_is_for_the_critic(questions, tmp_path):
    words = ["<answer>well</answer> then <answer>7</answer>"] * 6
    with pytest.raises(DataError, match="no trace is left of 6 states: 0 without words, 6 without"):
        _keep(questions, words, GenerativeConfig(), tmp_path / "t.jsonl", Tracing(model="m"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "a teacher is either a function .* or a model .*, found neither"),
        ({"function": "a.py:b", "model": "m"}, "found both"),
        ({"function": "a.py:b", "chat": True}, "--chat has no effect on a function"),
        ({"model": "m", "states": 5}, "--states must be at least 6, .* found 5"),
        ({"model": "m", "max_error": 0.0}, "--max-error must be above 0 and at most 1, found 0"),
        ({"model": "m", "max_error": 1.5}, "--max-error must be above 0 and at most 1, found 1.5"),
    ],
)
def test_what_cannot_work_is_refused_by_its_option(fields, says):
    with pytest.raises(ConfigError, match=says):
        Tracing(**fields)
