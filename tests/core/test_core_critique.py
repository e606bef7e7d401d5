"""Two players: who is asked what, who is trained on what, and what a step says of both."""

import dataclasses
import itertools

import pytest

from llmac.core.critique import Critique
from llmac.core.critique_draw import evenly
from llmac.core.critique_rows import REFINED, Keep
from llmac.core.measures import combine
from llmac.core.protocols import NeedsPartner, RolloutPlan, SamplingParams, Uneven, WritesPrompts
from llmac.core.refinement import StageReward
from llmac.core.types import Finish
from llmac.core.verdicts import VerdictLine
from llmac.core.voices import Memory, Voice
from llmac.core.wording import Wording

from .critique_players import Questions, decode, encode, player

PLAIN = Wording(
    critique="C{question}{answer}", refinement="R{question}{answer}|{critique}", chat=False
)
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=9)
DRAWN = SamplingParams(temperature=0.7, max_new_tokens=12)
VERDICT = VerdictLine(marker="v", right="+", wrong="-")


def score(trajectories):
    """Right is an answer that ends in the number of its question."""
    return [
        dataclasses.replace(t, reward=float(decode(t.response_ids)[-1:] == t.prompt.source[0]))
        for t in trajectories
    ]


def trains_critic(**changes):
    fields = {
        "trains": "critic",
        "prompts_per_step": 3,
        "answers": GREEDY,
        "critiques": dataclasses.replace(DRAWN, n=2),
        "refinements": GREEDY,
        "wording": PLAIN,
        "solved_at": 1.0,
        "verdicts": VERDICT,
        "judge": StageReward(stage=2),
        "partner_model": "frozen",
    }
    return Critique(**{**fields, **changes})


def trains_actor(keep=None, **changes):
    fields = {
        "trains": "actor",
        "prompts_per_step": 3,
        "answers": dataclasses.replace(DRAWN, n=2),
        "critiques": GREEDY,
        "refinements": dataclasses.replace(DRAWN, n=3),
        "wording": PLAIN,
        "solved_at": 1.0,
        "verdicts": VERDICT,
        "keep": keep or Keep(barrier=False),
        "partner_model": "frozen",
    }
    return Critique(**{**fields, **changes})


def obeys(prompt, number):
    """Answers `x1` to everything; refined, the last character of the critique."""
    return prompt[-1] if prompt[0] == "R" else "x1"


def critic(prompt, number):
    """The first sibling finds fault with everything and knows the answer; the second one is content."""
    return f"v- {prompt[1]}" if number == 0 else "v+ 1"


def introduced(plan, answers=obeys, criticises=critic):
    words = {"actor": answers, "critic": criticises}
    plan.player = player(words.pop(plan.trains))
    plan.partner = player(words.popitem()[1])
    return plan


def rolled(plan, **given):
    rows, metrics = plan.rollout(plan.player.engine, Questions(), score, seed=5, **given)
    return rows, {name: measure.value for name, measure in metrics.items()}


def test_a_critic_is_trained_on_critiques_that_are_siblings_and_worth_what_follows():
    plan = introduced(trains_critic())
    rows, _ = rolled(plan)
    assert [t.response_text for t in rows] == ["v- 1", "v+ 1", "v- 2", "v+ 1", "v- 3", "v+ 1"]
    assert [t.group for t in rows] == [0, 0, 1, 1, 2, 2]
    assert [decode(t.prompt.token_ids) for t in rows[::2]] == ["C1?x1", "C2?x1", "C3?x1"]
    assert len({t.prompt.id for t in rows}) == 3
    # Answers right: the first of three. Refined: 1 1 | 2 1 | 3 1 -> right: 1 1 | 1 0 | 1 0.
    assert [t.reward for t in rows] == pytest.approx([1.0, 1.2, 1.2, 0.0, 1.2, 0.0])
    assert rows[2].reward_parts == {"answer": 0.0, "discrimination": 1.0, REFINED: 1.0}
    assert {t.policy_version for t in rows} == {3}
    assert plan.partner.engine.asked[1] == [
        "R1?x1|v- 1", "R1?x1|v+ 1", "R2?x1|v- 2", "R2?x1|v+ 1", "R3?x1|v- 3", "R3?x1|v+ 1"
    ]  # fmt: skip


def test_what_a_step_says_is_counted_by_hand():
    _, metrics = rolled(introduced(trains_critic()))
    expected = {
        "critique/answer_accuracy": 1 / 3,
        "critique/refined_accuracy": 4 / 6,
        "critique/delta": 4 / 6 - 1 / 3,
        "critique/right_to_wrong": 0.0,
        "critique/wrong_to_right": 2 / 6,
        "critique/discrimination": 3 / 6,
        "critique/discrimination/right_answers": 1 / 2,
        "critique/discrimination/wrong_answers": 2 / 4,
        "critique/verdict_missing": 0.0,
        "reward/mean": 4.6 / 6,
        # Partner: 3 answers of 2 tokens, 6 refinements of 1; policy: 6 critiques of 4.
        "critique/partner_tokens": 12.0,
        "critique/too_long": 0.0,
        "rollout/sampled_tokens": 36.0,
    }
    assert metrics == pytest.approx(expected)


def test_an_answer_that_gets_worse_is_counted_and_a_missing_verdict_is():
    plan = introduced(trains_critic(), criticises=lambda prompt, number: "9")
    _, metrics = rolled(plan)
    assert metrics["critique/right_to_wrong"] == pytest.approx(1 / 3)
    assert metrics["critique/delta"] == pytest.approx(-1 / 3)
    assert metrics["critique/verdict_missing"] == 1
    assert metrics["critique/discrimination"] == 0


def test_a_critic_that_finds_fault_with_everything_is_right_about_wrong_answers_only():
    _, metrics = rolled(introduced(trains_critic(), criticises=lambda prompt, number: "v- 9"))
    split = "critique/discrimination/{}_answers"
    assert (metrics[split.format("right")], metrics[split.format("wrong")]) == (0, 1)
    assert metrics["critique/discrimination"] == pytest.approx(2 / 3)


def test_reward_functions_read_a_frozen_actors_answers_in_the_policys_tokens():
    plan = introduced(trains_critic())
    theirs = plan.partner.read
    # A vocabulary of its own: every id means the letter before.
    plan.partner = dataclasses.replace(plan.partner, read=lambda ids: theirs([i - 1 for i in ids]))
    plan.partner.engine.say = lambda prompt, number: "y4"  # read as x3
    _, metrics = rolled(plan)
    assert metrics["critique/answer_accuracy"] == pytest.approx(1 / 3)
    assert plan.player.engine.asked[0] == ["C1?x3", "C2?x3", "C3?x3"]


def test_in_stage_1_nobody_is_asked_to_refine():
    plan = introduced(trains_critic(refinements=None, judge=StageReward(stage=1)))
    rows, metrics = rolled(plan)
    assert [t.reward for t in rows] == [0, 1, 1, 0, 1, 0]
    assert len(plan.partner.engine.asked) == 1
    assert rows[0].reward_parts[REFINED] is None
    assert metrics["critique/refined_accuracy"] == 0


def test_without_verdicts_nothing_is_said_of_them():
    _, metrics = rolled(introduced(trains_critic(verdicts=None)))
    assert not any("verdict" in name or "discrimination" in name for name in metrics)


def by_heart(prompt, number):
    """First answers: right for question 2, and once for 3. Refined: the third attempt's is right."""
    if prompt[0] == "R":
        return f"r{number}{prompt[1]}" if number else "no"
    return {"2?": "x2", "3?": "x3" if number else "x1"}.get(prompt, "x0")


def test_an_actor_is_trained_on_right_answers_and_refined_ones_are_answers_to_the_question():
    plan = introduced(trains_actor(), answers=by_heart, criticises=lambda p, n: "v-")
    rows, metrics = rolled(plan)
    # Wrong: both answers to 1, the first to 3. Of two right refinements each, one is reserved.
    assert [(t.prompt.id, t.response_text) for t in rows] == [
        ("q1", "r11"), ("q1", "r11"), ("q2", "x2"), ("q2", "x2"), ("q3", "x3"), ("q3", "r13")
    ]  # fmt: skip
    assert [t.group for t in rows] == [0, 0, 1, 1, 2, 2]
    assert [decode(t.prompt.token_ids) for t in rows] == ["1?", "1?", "2?", "2?", "3?", "3?"]
    assert [t.reward_parts[REFINED] for t in rows] == [1, 1, 0, 0, 0, 1]
    assert all(t.reward == 1 for t in rows)
    assert rows[0].sampler_logprobs == (0.0, 0.0, 0.0)  # sampled to another prompt
    assert rows[2].sampler_logprobs == (-0.5, -0.5)
    assert metrics["reward/mean"] == 0.5  # of first answers
    assert metrics["critique/answers_learned"] == 3
    assert metrics["critique/refinements_learned"] == 3
    assert metrics["critique/answer_accuracy"] == 0.5
    assert metrics["critique/refined_accuracy"] == pytest.approx(2 / 3)
    # Two wrong answers to question 1 are the same text, and the frozen critic is greedy.
    assert plan.partner.engine.asked == [["C1?x0", "C3?x1"]]


@pytest.mark.parametrize(
    ("learned_as", "prompts"),
    [("critique", ["R1?x0|v-"]), ("both", ["1?", "R1?x0|v-"])],
)
def test_a_refined_answer_may_be_learned_as_one_to_the_critique(learned_as, prompts):
    plan = trains_actor(
        Keep(barrier=False, learned_as=learned_as),
        prompts_per_step=1,
        answers=DRAWN,
    )
    rows, _ = rolled(introduced(plan, answers=by_heart, criticises=lambda p, n: "v-"))
    assert [decode(t.prompt.token_ids) for t in rows] == prompts
    assert rows[-1].sampler_logprobs == (-0.5,) * 3


def test_reserved_barrier_and_criticism_of_right_answers_are_settings():
    def learned(solution=None, **keep):
        columns = {} if solution is None else {"solution": solution}
        plan = introduced(
            trains_actor(Keep(**keep)), answers=by_heart, criticises=lambda p, n: "v-"
        )
        rows, metrics = plan.rollout(plan.player.engine, Questions(**columns), score, seed=0)
        return len(rows), metrics["critique/refinements_barred"].value

    assert learned(barrier=False, reserved=2) == (3 + 6, 0)
    assert learned(barrier=False, reserved=1, also_right=True) == (3 + 6, 0)
    assert learned() == (3 + 3, 0)
    # A solution of one number asks for none; the answers have one group of digits, refined ones too.
    assert learned(solution="1", solution_column="solution") == (3 + 3, 0)
    with pytest.raises(ValueError, match="solution_column is gold, and the data has solution"):
        learned(solution="1", solution_column="gold")


def test_the_barrier_counts_the_numbers_of_the_answer():
    def reasons(prompt, number):
        return ["1 1 1 1 1 0", "1 1 1 1", "1"][number if prompt[0] == "R" else 0]

    plan = trains_actor(Keep(reserved=3), prompts_per_step=1, answers=DRAWN)
    rows, metrics = rolled(introduced(plan, answers=reasons, criticises=lambda p, n: "v-"))
    # The answer has six numbers; of two right refinements one has four, the other one.
    assert [t.response_text for t in rows] == ["1 1 1 1"]
    assert metrics["critique/refinements_barred"] == 1


def test_a_rank_without_a_right_answer_has_a_row_that_counts_nothing_and_asks_as_often():
    plan = introduced(trains_actor(), answers=lambda p, n: "no", criticises=lambda p, n: "v-")
    rows, _ = rolled(plan)
    assert [(t.reward, t.response_text) for t in rows] == [(0.0, "no")]
    lucky = introduced(trains_actor(), answers=lambda p, n: p[0], criticises=lambda p, n: "v-")
    rows, _ = rolled(lucky)
    assert len(rows) == 6
    for one in (plan, lucky):
        assert (len(one.player.engine.asked), len(one.partner.engine.asked)) == (2, 1)
    assert lucky.partner.engine.asked == [[]]
    assert lucky.player.engine.asked[1] == []


def test_a_frozen_greedy_player_is_asked_once_and_others_every_time():
    plan = introduced(trains_critic(prompts_per_step=1))
    for _ in range(2):
        plan.rollout(plan.player.engine, Questions(), score, seed=1)
    # Answers to the data come back; refinements of what the policy says do not.
    assert [len(asked) for asked in plan.partner.engine.asked] == [1, 2, 0, 2]
    assert [len(asked) for asked in plan.player.engine.asked] == [1, 1]
    warm = introduced(trains_critic(prompts_per_step=1, answers=DRAWN))
    for _ in range(2):
        warm.rollout(warm.player.engine, Questions(), score, seed=1)
    assert [len(asked) for asked in warm.partner.engine.asked] == [1, 2, 1, 2]


def test_a_player_that_learns_is_never_remembered_and_memory_is_bounded():
    learning = player(lambda prompt, number: "a")
    voice = Voice(learning, learning.engine, seed=0)
    for _ in range(2):
        voice.say([encode("x")], GREEDY)
    assert (learning.engine.asked, voice.tokens) == ([["x"], ["x"]], 2)
    frozen, memory = player(lambda prompt, number: "a"), Memory(most=2)
    voice = Voice(frozen, frozen.engine, seed=0, memory=memory)
    for word in ("x", "yz", "y", "x"):
        voice.say([encode(letter) for letter in word], GREEDY, come_back=True)
    assert frozen.engine.asked == [["x"], ["y", "z"], [], ["x"]]


def test_every_request_has_a_seed_of_its_own_and_the_same_step_the_same_seeds():
    def seeds(seed):
        plan = introduced(trains_critic(answers=DRAWN, refinements=DRAWN))
        plan.rollout(plan.player.engine, Questions(), score, seed=seed)
        partner = [r.params.seed for r in plan.partner.engine.requests]
        policy = [r.params.seed for r in plan.player.engine.requests]
        # Siblings have the seeds between theirs and the next.
        assert {b - a for a, b in itertools.pairwise(policy)} == {2}
        return partner + policy

    assert len(set(seeds(1))) == 3 + 6 + 3
    assert seeds(1) == seeds(1)
    assert not set(seeds(1)) & set(seeds(2))


def test_answers_to_criticise_are_drawn_half_right_and_half_wrong():
    def half(prompt, number):
        return obeys(prompt, number) if prompt[0] == "R" else "123"[number]

    plan = introduced(
        trains_critic(answers=dataclasses.replace(DRAWN, n=3), answers_kept=2), answers=half
    )
    rows, metrics = rolled(plan)
    assert len(rows) == 3 * 2 * 2
    answers = [t.reward_parts["answer"] for t in rows[::2]]
    assert (sum(answers), len(answers)) == (3, 6)
    assert [t.group for t in rows] == [number for number in range(6) for _ in range(2)]
    assert metrics["critique/answer_accuracy"] == pytest.approx(1 / 3)  # of all that were sampled


def test_the_draw_takes_what_there_is_and_depends_on_its_seed():
    right = [True] + 9 * [False]
    assert sum(right[i] for i in evenly(right, 4, seed=0)) == 1
    assert len(evenly([not x for x in right], 4, seed=0)) == 4
    assert sum(not right[i] for i in evenly(right, 4, seed=0)) == 3
    draws = {tuple(evenly(5 * [True, False], 4, seed=seed)) for seed in range(20)}
    assert len(draws) > 5
    assert all(sum(i % 2 for i in draw) == 2 for draw in draws)


def test_players_that_chat_are_told_in_turns():
    chat = Wording(critique="{question} {answer}?", refinement="{critique}!")
    assert chat.to_answer("q") == [{"role": "user", "content": "q"}]
    assert chat.to_criticise("q", "{question}") == [{"role": "user", "content": "q {question}?"}]
    assert chat.to_refine("q", "a", "c") == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "c!"},
    ]
    begun = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "Step by step: "},
    ]
    assert [m["content"] for m in chat.to_refine(begun, "a", "c")] == [
        "s", "q", "Step by step: a", "c!"
    ]  # fmt: skip
    assert chat.to_criticise(begun, "a")[0]["content"] == "q a?"
    assert begun[-1]["content"] == "Step by step: "
    with pytest.raises(ValueError, match="a list of chat messages, and chat is false"):
        PLAIN.to_answer(begun)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"critique": "{question}"}, "the critique template has no {answer}"),
        ({"refinement": "again"}, "the refinement template has no {critique}"),
        ({"chat": False}, "no {question}, so nobody would be shown it .there is no chat"),
    ],
)
def test_a_template_that_withholds_what_it_is_about_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        Wording(**{"critique": "{answer}", "refinement": "{critique}", **fields})


@pytest.mark.parametrize(
    ("make", "fields", "says"),
    [
        (trains_critic, {"prompts_per_step": 0}, "prompts_per_step is at least 1; found 0"),
        (trains_critic, {"judge": None}, "trains the critic needs a judge"),
        (trains_critic, {"answers_kept": 2}, "answers_kept is 2, and 1 answers are sampled"),
        (trains_actor, {"refinements": None}, "trains the actor needs refinements"),
    ],
)
def test_a_plan_that_could_teach_nothing_is_refused(make, fields, says):
    with pytest.raises(ValueError, match=says):
        make(**fields)


def test_the_plan_says_what_it_needs_and_misses():
    plan = trains_critic()
    for contract in (RolloutPlan, WritesPrompts, NeedsPartner, Uneven):
        assert isinstance(plan, contract)
    assert (plan.uneven, trains_actor().uneven) == (False, True)
    assert (plan.length_limit, trains_actor().length_limit) == (12, 12)
    plan.player = player(critic)
    with pytest.raises(ValueError, match="does not know the frozen player"):
        plan.rollout(plan.player.engine, Questions(), score, seed=0)


def bounded(plan, *, policy=None, partner=None):
    plan.player = dataclasses.replace(plan.player, limit=policy)
    plan.partner = dataclasses.replace(plan.partner, limit=partner)
    return plan


def lengthy(prompt, number):
    """Answers question 1 at length, and obeys critiques."""
    return obeys(prompt, number) if prompt[0] == "R" else "x" * 8 * (prompt[0] == "1") + "x1"


def test_an_answer_too_long_to_criticise_makes_room_for_another_one():
    # C2?x1 and a critique of 12 tokens at most; the first answer is longer.
    rows, metrics = rolled(bounded(introduced(trains_critic(), answers=lengthy), policy=5 + 12))
    assert [decode(t.prompt.token_ids) for t in rows[::2]] == ["C2?x1", "C3?x1", "C2?x1"]
    assert [t.group for t in rows] == [0, 0, 1, 1, 2, 2]
    assert metrics["critique/too_long"] == 1
    with pytest.raises(ValueError, match=r"none of the 3 questions .* lower algorithm\.answer_tok"):
        rolled(bounded(introduced(trains_critic()), policy=16))


def test_an_answer_that_nobody_has_room_to_refine_stands_as_it_is():
    # R1?x1|v- 1 and a refinement of 9 tokens at most.
    plan = bounded(introduced(trains_critic(), answers=lengthy), partner=10 + 9)
    rows, metrics = rolled(plan)
    assert metrics["critique/too_long"] == 2
    assert [t.reward_parts[REFINED] for t in rows] == [1, 1, 1, 0, 1, 0]
    assert [len(asked) for asked in plan.partner.engine.asked] == [3, 4]


def test_a_question_that_the_partner_has_no_room_for_is_passed_over():
    class Longer(Questions):
        def take(self, count):
            first, *others = super().take(count)
            return [dataclasses.replace(first, source="1" * 20), *others]

    plan = bounded(introduced(trains_critic()), partner=19)
    rows, metrics = plan.rollout(plan.player.engine, Longer(), score, seed=0)
    assert [decode(t.prompt.token_ids)[1] for t in rows[::2]] == ["2", "3", "2"]
    assert metrics["critique/too_long"].value == 1


def test_an_actor_learns_from_what_has_room():
    plan = introduced(trains_actor(), answers=by_heart, criticises=lambda p, n: "v-")
    _, metrics = rolled(bounded(plan, policy=12))  # first answers only
    counts = ("critique/too_long", "critique/answers_learned", "critique/refinements_learned")
    assert [metrics[name] for name in counts] == [3, 3, 0]
    assert rolled(bounded(plan, partner=1))[1]["critique/too_long"] == 6


def test_answers_that_the_policy_has_no_tokens_for_are_empty():
    plan = introduced(trains_critic(prompts_per_step=1))
    plan.player = dataclasses.replace(plan.player, spell=lambda text: ())
    _, metrics = rolled(plan)
    assert (metrics["critique/answer_accuracy"], metrics["critique/refined_accuracy"]) == (0, 0)


def test_answers_that_were_cut_stay_cut_for_the_reward_functions():
    seen = []

    def looks(trajectories):
        seen.extend(t.finish for t in trajectories)
        return score(trajectories)

    plan = introduced(trains_critic(prompts_per_step=1))
    says = plan.partner.engine._completion
    plan.partner.engine._completion = lambda p, n: dataclasses.replace(
        says(p, n), finish=Finish.LENGTH
    )
    plan.rollout(plan.player.engine, Questions(), looks, seed=0)
    assert set(seen) == {Finish.LENGTH}


def test_metrics_of_two_ranks_add_up():
    plan = introduced(trains_critic(answers=DRAWN, refinements=DRAWN))
    one, two = (
        plan.rollout(plan.player.engine, Questions(), score, seed=seed)[1] for seed in (0, 1)
    )
    both = combine(one, two)
    assert both["rollout/sampled_tokens"].value == 72
    assert both["critique/discrimination"].value == 0.5
