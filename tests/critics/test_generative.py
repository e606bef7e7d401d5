"""A critic that writes: what it is asked, what its scores become, and that its words get better."""

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llmac.config.cards import Choice
from llmac.config.schema import ModelConfig
from llmac.core.types import CriticTargets, Finish, Prompt
from llmac.critics.generative import GenerativeConfig
from llmac.critics.generative_critic import SETTINGS_FILE, TEMPLATE_FILE
from llmac.critics.generative_prompt import VARIABLES, CriticTemplate, problem_text
from llmac.errors import CheckpointError, ConfigError, ConsistencyError
from llmac.eval_critic import _critic
from llmac.runtime.context import Runtime

from .making import CONFIG, bench
from .talking import rollouts_of, row, starts_at, talking

TEMPLATE = "{{ problem }}:{{ partial }}|"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model's configuration and tokenizer without weights, and a short template."""
    home = tmp_path_factory.mktemp("home")
    config = type(CONFIG)(**(CONFIG.to_dict() | {"max_position_embeddings": 128}))
    config.save_pretrained(home / "model")
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    tokenizer.save_pretrained(home / "model")
    (home / "t.jinja").write_text(TEMPLATE)
    return home


@pytest.fixture(scope="module")
def runtime():
    runtime = Runtime.create(seed=0, output=None)
    yield runtime
    runtime.close()


@pytest.fixture
def proved():
    """When an engine had to prove what it holds."""
    return []


@pytest.fixture
def critic_of(home, runtime, proved):
    """Critic and its engine, which answers by a function of the prompt's text."""
    whole = bench(runtime, model=ModelConfig(name=str(home / "model")))
    whole = dataclasses.replace(whole, steps=5, check_engine=lambda *_, when: proved.append(when))
    return lambda say, template="t.jinja", **settings: talking(
        whole, say, home / template, **settings
    )


def always(score):
    return lambda text, sample: f"So. <answer>{score}</answer>"


def by_length(text, sample):
    """The more is written, the better."""
    return f"<answer>{len(text)}</answer>"


ROWS = (
    row("abcd", 1.0),
    row("abxy", 0.0),
    row("abc", 1.0, "q"),
    row("abcdefghi", 0.0, "q", Finish.LENGTH),
)


def targets(rollouts, mask):
    returns = rollouts.rewards.sum(1, keepdim=True).expand(mask.shape)
    return CriticTargets(returns=returns, value_mask=mask, old_values=torch.zeros_like(returns))


def asked(critic, rows=ROWS, positions=(0, 2)):
    rollouts = rollouts_of(rows)
    starts = starts_at(rollouts, *positions)
    return rollouts, starts, critic.values(rollouts, starts)


def test_scores_become_values_in_the_unit_of_rewards(critic_of):
    critic, _ = critic_of(by_length, scale=(0, 20), reward_range=(-1.0, 3.0))
    _, _, values = asked(critic)
    # "p:|" has 3 characters and "p:ab|" 5; a scale of 20 over a range of 4.
    assert values.at[0, 0].item() == pytest.approx(-1 + 3 / 5)
    assert values.at[0, 2].item() == pytest.approx(-1 + 5 / 5)
    # Behind a row that the limit has cut: "q:abcdefghi|". The others have ended.
    assert values.bootstrap.tolist() == pytest.approx([0, 0, 0, -1 + 12 / 5])
    assert (values.at[~values.starts] == 0).all()


def test_what_it_reads_ends_before_the_state_and_has_no_outcome(critic_of):
    critic, engine = critic_of(by_length, conditioning="both", template="all.jinja")
    asked(critic)
    before = engine.prompts
    others = [row("abZZZZ", -5.0), row("abQ", 7.0), row("ab" + "W" * 7, 3.0, "q")]
    _, starts, _ = asked(critic, others)
    assert [text for text in before if "abcdefghi" not in text] == engine.prompts
    assert starts.sum() == 6


def test_equal_states_are_asked_once_and_all_of_them_at_once_side_by_side(critic_of):
    critic, engine = critic_of(by_length)
    _, _, values = asked(critic, positions=(0, 1, 2, 3))
    assert len(engine.asked) == 1
    assert engine.prompts == sorted(
        [
            "p:|",
            "p:a|",
            "p:ab|",
            "p:abc|",
            "p:abx|",
            "q:|",
            "q:a|",
            "q:ab|",
            "q:abc|",
            "q:abcdefghi|",
        ]
    )
    assert torch.equal(values.at[0, :3], values.at[1, :3])
    counts = critic.metrics()
    assert counts["critic/states"].value == 10
    assert counts["critic/states_merged"].value == pytest.approx(1 - 10 / 16)  # 4 + 4 + 3 + 4 + 1
    assert counts["rollout/sampled_tokens"].value == sum(
        len(f"<answer>{len(text)}</answer>") for text in engine.prompts
    )
    params = engine.asked[0][0].params
    assert (params.stop, params.max_new_tokens) == (("</answer>",), 50)
    assert not critic.metrics()


def test_texts_of_a_state_are_averaged_and_those_without_a_score_left_out(critic_of):
    says = ["<answer>2</answer>", "well", "<answer>8</answer>"]
    critic, _ = critic_of(lambda text, n: says[n], samples=3)
    _, _, values = asked(critic)
    assert values.at[0, 0].item() == pytest.approx(0.5)
    counts = critic.metrics()
    assert counts["critic/unparsed"].value == pytest.approx(1 / 3)
    assert counts["critic/score_tokens"].value == pytest.approx((18 + 4 + 18) / 3)


@pytest.mark.parametrize(("settings", "value"), [({}, -1.0), ({"unparsed_value": 0.25}, 0.25)])
def test_a_state_without_a_score_has_the_documented_value_and_is_counted(
    settings, value, critic_of
):
    critic, _ = critic_of(
        lambda text, n: "hm" if text == "p:|" else "<answer>10</answer>",
        reward_range=(-1.0, 1.0),
        **settings,
    )
    _, _, values = asked(critic)
    assert values.at[0, [0, 2]].tolist() == pytest.approx([value, 1.0])
    assert critic.metrics()["critic/unparsed"].value == pytest.approx(1 / 5)


def test_a_prompt_that_does_not_fit_is_not_sent(critic_of):
    # "q:abcdefghi|" has 12 tokens.
    for settings, sent in (({}, 5), ({"max_prompt_tokens": 12}, 5), ({"max_prompt_tokens": 11}, 4)):
        critic, engine = critic_of(always(10), **settings)
        _, _, values = asked(critic)
        assert len(engine.prompts) == sent
        assert values.bootstrap[3].item() == float(sent == 5)
        counts = critic.metrics()
        assert counts["critic/prompts_too_long"].value == 5 - sent
        assert counts["critic/unparsed"].value == 0


def test_ends_are_asked_about_where_somebody_takes_their_value(home, runtime):
    rows = (*ROWS, row("abcdefg", 0.0, "q", Finish.PAUSED))
    for takes, ends in ((True, [0.5, 0.6]), (False, [0.0, 0.6])):
        whole = bench(runtime, model=ModelConfig(name=str(home / "model")), values_ends=takes)
        critic, engine = talking(
            whole, lambda t, n: f"<answer>{6 - ('h' in t)}</answer>", home / "t.jinja"
        )
        _, _, values = asked(critic, rows)
        assert ("q:abcdefghi|" in engine.prompts) == takes
        assert "q:abcdefg|" in engine.prompts
        assert values.bootstrap.tolist() == pytest.approx([0, 0, 0, *ends])


def test_the_row_of_a_rank_without_lessons_fits(critic_of):
    critic, _ = critic_of(always(5), max_prompt_tokens=4)
    asked(critic, positions=(2,))  # "p:ab|" is too long
    spares = []
    critic._learner.learn = lambda lessons, *, spare: spares.append((lessons, spare)) or {}
    rollouts = rollouts_of(ROWS)
    critic.update(rollouts, targets(rollouts, starts_at(rollouts, 2)))
    [(lessons, spare)] = spares
    assert not lessons
    assert len(spare) <= 4


@pytest.mark.parametrize(
    ("say", "most", "told"), [("hm", None, 1), ("hm", 2, 1), ("<answer>3</answer>", None, 0)]
)
def test_a_critic_that_never_says_a_score_is_reported_once(say, most, told, critic_of, caplog):
    critic, _ = critic_of(lambda text, n: say, max_prompt_tokens=most)
    for step in range(5):
        assert sum("wrote no score" in r.message for r in caplog.records) == (
            told if step >= 3 else 0
        )
        asked(critic)


def test_nothing_to_ask_is_asked_all_the_same(critic_of):
    critic, engine = critic_of(always(5))
    _, _, values = asked(critic, ROWS[:3], positions=())
    assert engine.asked == [[]]
    assert not values.at.any()
    metrics = critic.update(rollouts_of(ROWS[:3]), targets(*_first(ROWS[:3])))
    assert metrics["critic/brier"].weight == 0


def _first(rows):
    rollouts = rollouts_of(rows)
    return rollouts, starts_at(rollouts, 0)


def test_a_state_that_several_came_through_is_one_lesson_of_their_mean_reward(critic_of):
    critic, _ = critic_of(always(7), importance_cap=None)
    rollouts, starts, _ = asked(critic)
    mask = starts.clone()
    mask[2] = False  # nothing is known of the third row
    metrics = critic.update(rollouts, targets(rollouts, mask))
    [(learned, credit, _)] = critic._policy.taught
    # s_0 and "ab" of p, whose rows got 1 and 0; s_0 and "ab" of q, whose last row got 0.
    assert len(learned.trajectories) == 4
    weights = credit.advantages[:, 0].tolist()
    assert weights == pytest.approx([0.71, 0.71, 0.51, 0.51])
    assert torch.equal(credit.policy_mask, learned.action_mask)
    assert metrics["critic/brier"].value == pytest.approx(1 - (0.71 + 0.51) / 2)
    assert {"critic/lm/taught", "critic/lr"} <= metrics.keys()
    assert not any(name.startswith("actor/") for name in metrics)
    # Its words are the responses, and what it read the prompts.
    assert bytes(learned.trajectories[0].response_ids).decode() == "So. <answer>7</answer>"
    assert bytes(learned.trajectories[0].prompt.token_ids).decode() == "p:|"


@pytest.mark.parametrize(
    ("baseline", "weights"),
    [
        ("none", [0.91, 0.51, 0.0]),
        ("leave_one_out", [0.91 - 0.255, 0.51 - 0.455, -0.71]),
        ("by_outcome", [0.91, 0.0, -0.91]),
    ],
)
def test_rewards_are_compared_with_those_about_the_same_problem(baseline, weights, critic_of):
    def say(text, sample):
        return "hm" if text.startswith("p:c") else "<answer>7</answer>"

    critic, _ = critic_of(say, baseline=baseline, reward_range=(0.0, 2.0))
    rows = (row("az", 2.0), row("bz", 0.0), row("cz", 3.0), row("az", 2.0, "q"))
    rollouts, starts, _ = asked(critic, rows, positions=(1,))
    metrics = critic.update(rollouts, targets(rollouts, starts))
    [(_, credit, _)] = critic._policy.taught
    assert credit.advantages[:3, 0].tolist() == pytest.approx(weights)
    assert credit.advantages[3, 0].item() == pytest.approx(0.91 if baseline == "none" else 0.0)
    assert metrics["critic/vf_target_clipfrac"].value == pytest.approx(1 / 4)


def test_other_rows_than_were_asked_about_are_refused(critic_of):
    critic, _ = critic_of(always(7))
    rollouts, starts, _ = asked(critic)
    with pytest.raises(ConsistencyError, match="was given other rows"):
        critic.update(rollouts_of(ROWS[::-1]), targets(rollouts, starts))


def test_a_critic_that_does_not_learn_says_how_good_it_is(critic_of, tmp_path):
    critic, engine = critic_of(always(7), learns=False)
    rollouts, starts, _ = asked(critic)
    assert critic.update(rollouts, targets(rollouts, starts)).keys() == {
        *("critic/brier", "critic/vf_target_clipfrac")
    }
    assert not engine.loaded
    critic.save_pretrained(tmp_path / "none", policy=tmp_path)
    assert not (tmp_path / "none").exists()


def test_the_learner_is_ordered_as_the_settings_say(critic_of, proved):
    learning = {"temperature": 0.5, "epochs": 2, "minibatches": 3, "lr": 1e-3}
    critic, engine = critic_of(always(7), importance_cap=0.25, **learning)
    asked(critic)
    assert proved == ["the critic's engine, at its first use"]
    critic.update(*_again(critic))
    order, [(_, credit, _)] = critic._policy.order, critic._policy.taught
    assert (order.temperature, order.optimization.lr, order.epochs) == (0.5, 1e-3, 2)
    assert (order.minibatches, order.optimizer_steps) == (3, 5 * 2 * 3)
    assert engine.asked[0][0].params.temperature == 0.5
    # Trainer and sampler agree, so that the cap is what is left.
    assert credit.importance.max().item() == 0.25


def _again(critic):
    rollouts, starts, _ = asked(critic)
    return rollouts, targets(rollouts, starts)


def test_its_engine_gets_new_weights_when_they_are_due(critic_of):
    critic, engine = critic_of(always(7), sync_every=2)
    seeds = []
    for _ in range(4):
        rollouts, starts, _ = asked(critic)
        seeds.append(engine.asked[-1][0].params.seed)
        critic.update(rollouts, targets(rollouts, starts))
    assert [version for version, _ in engine.loaded] == [0, 2]
    assert [float(weights[0][1]) for _, weights in engine.loaded] == [0, 2]
    # Equal weights and states, equal words; other weights, others.
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]


def test_the_policys_engine_says_that_it_has_other_weights(critic_of):
    critic, engine = critic_of(always(7), engine="shared")
    for _ in range(2):
        rollouts, starts, _ = asked(critic)
        assert engine.policy_version < 0
        critic.update(rollouts, targets(rollouts, starts))
        engine.load_weights(iter(()), 5)  # what the loop does
    asked(critic)
    engine.load_weights(iter(()), 6)
    asked(critic)  # nothing was learned since, and yet it has the policy's
    assert [version for version, _ in engine.loaded] == [-1, 5, -2, 5, -3, 6, -3]


def test_a_checkpoint_brings_back_what_it_learned_and_remembers(critic_of, tmp_path):
    critics = [critic_of(always(7), conditioning="both", template="all.jinja") for _ in range(2)]
    for critic, _ in critics[:1]:
        for _ in range(2):
            rollouts, starts, _ = asked(critic)
            critic.update(rollouts, targets(rollouts, starts))
            critic.observe(rollouts)
        critic.save(tmp_path)
    critics[1][0].load(tmp_path)
    for critic, _ in critics:
        asked(critic)
    (_, one), (_, other) = critics
    assert one.asked[-1] == other.asked[-1]
    assert other.loaded[0][0] == 2
    assert float(other.loaded[0][1][0][1]) == 2
    critics[1][0].load(tmp_path)  # as many updates, but who knows of what
    asked(critics[1][0])
    assert len(other.loaded) == 2


def test_only_the_steps_before_are_told(critic_of):
    critic, engine = critic_of(always(7), template="rate.jinja")
    told = []
    for mean in (0.25, 0.35, 0.50):
        rows = tuple(row("abcd", reward) for reward in (2 * mean, 0.0))
        rows += (dataclasses.replace(row("abcd", 1.0), age=1),)  # of an older policy
        rollouts, _, _ = asked(critic, rows, positions=(1,))
        told.append(engine.prompts[0])
        metrics = critic.observe(rollouts)
    asked(critic, ROWS[:1], positions=(1,))
    told.append(engine.prompts[0])
    assert told == ["p:a|None 1 8", "p:a|25.0 1 8", "p:a|26.0 1 8", "p:a|28.4 1 8"]
    assert metrics["critic/success_rate"].value == pytest.approx(0.284)


@pytest.fixture(autouse=True)
def templates(home):
    rate = "{{ '%.1f' | format(100 * success_rate) if success_rate is not none else none }}"
    (home / "rate.jinja").write_text(TEMPLATE + rate + " {{ tokens_used }} {{ tokens_left }}")
    attempts = "{% for a in attempts %}{{ a.problem }}={{ a.response }}{{ a.solved }};{% endfor %}"
    (home / "all.jinja").write_text(TEMPLATE + attempts + "{{ success_rate }}{{ tokens_used }}")
    (home / "attempts.jinja").write_text(TEMPLATE + attempts)


def test_attempts_are_of_other_problems_right_and_wrong_in_turn(critic_of):
    critic, engine = critic_of(
        always(7), conditioning="attempts", template="attempts.jinja", attempts=3, attempt_tokens=2
    )
    rows = [row(text, 1.0 if text in "ace" else 0.4, text) for text in "abcdef"]
    rows += [row("longer", 1.0, "g"), row("cut", 0.0, "g"), row("no", 9.0, "h", Finish.PAUSED)]
    rows[-1] = dataclasses.replace(rows[-1], reward=None)
    rollouts, _, _ = asked(critic, tuple(rows), positions=(0,))
    assert all(text.endswith("|") for text in engine.prompts)  # nothing is known yet
    critic.observe(rollouts)
    asked(critic, (row("x", 0.0, "z"),), positions=(0,))
    [text] = engine.prompts
    shown = text.partition("|")[2].split(";")[:-1]
    assert len(shown) == 3
    assert [attempt.endswith("True") for attempt in shown] == [True, False, True]
    assert len({attempt.partition("=")[0] for attempt in shown}) == 3
    own = shown[0].partition("=")[0]
    asked(critic, (row("x", 0.0, own),), positions=(0,))
    assert f"{own}=" not in engine.prompts[0]
    asked(critic, (row("x", 0.0, "z"),), positions=(0,))
    critic.observe(rollouts_of([row("longer", 1.0, "y")]))
    asked(critic, (row("x", 0.0, "z"),), positions=(0,))
    assert engine.prompts[0].endswith("y=lo ...True;")


def everything():
    return dict.fromkeys(VARIABLES, 0) | {
        "problem": "1+1=",
        "partial": "It is",
        "tag": "answer",
    }


def test_the_packaged_template_has_what_changes_last():
    told = everything() | {"success_rate": 0.284, "tokens_used": 17, "tokens_left": 83, "high": 10}
    told |= {"actor": "Qwen3", "attempts": [{"problem": "2+2=", "response": "5", "solved": False}]}
    text = CriticTemplate(None).write(**told)
    for part in (
        "28.4%",
        "Qwen3",
        "from 0 to 10",
        "<answer>a whole number</answer>",
        "ended wrong",
    ):
        assert part in text
    shared, _, rest = text.partition("It is")
    assert "1+1=" in shared
    assert "2+2=" in shared
    assert rest.startswith("\n</rollout>")
    assert "17 tokens" in rest
    assert rest.endswith("Answer:")
    less = CriticTemplate(None).write(
        **told | {"success_rate": None, "attempts": [], "tokens_used": None, "tokens_left": None}
    )
    for part in ("%", "attempt", "tokens"):
        assert part not in less


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{{ problem }}", "does not use partial; a critic that does not see both"),
        (
            "{{ problem }}{{ partial }}{{ answer }}",
            "uses answer, which nobody fills in; it may use problem,",
        ),
        ("{{ problem }}{{ partial }}{% if %}", r"is not a Jinja template: .* \(line 1\)"),
        (None, r"there is no file .*t\.jinja"),
    ],
)
def test_a_template_that_cannot_work_is_refused_with_the_settings(text, complaint, tmp_path):
    if text is not None:
        (tmp_path / "t.jinja").write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        GenerativeConfig(template=str(tmp_path / "t.jinja"))


def test_chat_messages_are_read_as_who_said_what():
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1="}]
    prompt = Prompt(id="p", token_ids=(1,), source=messages)
    assert problem_text(prompt) == "system: Add.\nuser: 1+1="


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"scale": (5, 5)}, "scale must be"),
        ({"tag": "<a>"}, "tag must be a name"),
        ({"tag": ""}, "tag must be a name"),
        ({"reward_range": (1.0, 0.0)}, "reward_range must be"),
        ({"samples": 0}, "samples must be at least 1, found 0"),
        ({"sync_every": 0}, "sync_every must be at least 1"),
        ({"attempts": 0}, "attempts must be at least 1"),
        ({"success_rate_memory": 1.0}, "success_rate_memory must be below 1"),
        ({"success_rate_memory": -0.1}, "success_rate_memory must be at least 0"),
        ({"importance_cap": 0.0}, "importance_cap must be above 0, or null"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens must be above 0, or null"),
        ({"temperature": 0.0}, "a critic with learns: false may have 0"),
        ({"temperature": 0.0, "learns": False, "samples": 2}, "where all are the same"),
        ({"engine": "shared", "learns": False}, "set engine: own"),
        ({"unparsed_value": math.inf}, "unparsed_value must be finite"),
        ({"lr": 0.0}, "lr must be"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        GenerativeConfig(**settings)


def test_settings_that_nothing_reads_are_named():
    idle = GenerativeConfig(conditioning="none", engine="shared").without_effect()
    assert idle.keys() == {*("success_rate_memory", "attempts", "attempt_tokens", "sync_every")}
    idle = GenerativeConfig(conditioning="both", learns=False).without_effect()
    assert {"lr", "baseline", "importance_cap", "sync_every"} <= idle.keys()
    assert not idle.keys() & {"attempts", "success_rate_memory", "samples"}


def test_a_context_without_room_is_refused(critic_of):
    with pytest.raises(ConfigError, match=r"and the context of .* has 128; lower critic\.max_new"):
        critic_of(always(7), max_prompt_tokens=79)


def test_a_saved_critic_is_asked_as_it_learned_to_be_asked(tmp_path, critic_of):
    (tmp_path / TEMPLATE_FILE).write_text("{{ partial }}{{ problem }}!")
    asking = GenerativeConfig(scale=(0, 5)).asking()
    context = {"success_rate": 0.5}
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(asking | {"context": context}))
    with pytest.raises(ValueError, match=r"set critic\.scale: \[0, 5\] \(now \[0, 10\]\)$"):
        GenerativeConfig(init=str(tmp_path))
    config = GenerativeConfig(init=str(tmp_path), scale=(0, 5), temperature=0.5)
    assert CriticTemplate(config.template_file).source == "{{ partial }}{{ problem }}!"
    own = GenerativeConfig(init=str(tmp_path), scale=(0, 5), template=None)
    assert own.template_file == str(tmp_path / TEMPLATE_FILE)


def test_a_finished_runs_own_critic_is_asked_and_does_not_learn(tmp_path):
    saved = tmp_path / "final/critic"
    saved.mkdir(parents=True)
    asking = GenerativeConfig(scale=(0, 5)).asking()
    (saved / SETTINGS_FILE).write_text(json.dumps(asking | {"context": {}}))
    (saved / TEMPLATE_FILE).write_text(TEMPLATE)
    own = Choice(name="generative", settings=GenerativeConfig(scale=(0, 5), engine="shared"))
    run = SimpleNamespace(recipe=SimpleNamespace(critic=own), folder=tmp_path, is_final=True)
    for asked_for in (None, str(saved)):
        chosen = _critic(asked_for, run).settings
        assert (chosen.learns, chosen.init, chosen.scale) == (False, str(saved), (0, 5))
    with pytest.raises(CheckpointError, match=r"Did you mean .*final/critic\?"):
        _critic(str(tmp_path), run)


def test_a_saved_critic_remembers_the_writer(home, critic_of, tmp_path):
    shutil.copytree(home / "model", tmp_path / "saved")
    saved = GenerativeConfig().asking() | {"context": {"success_rate": 0.284}}
    (tmp_path / "saved" / SETTINGS_FILE).write_text(json.dumps(saved))
    critic, engine = critic_of(always(7), "rate.jinja", init=str(tmp_path / "saved"))
    asked(critic, ROWS[:1], positions=(1,))
    assert engine.prompts == ["p:a|28.4 1 8"]
