"""`monte_carlo`: what it asks the engine for, what it makes of the answers, and what it says it did."""

import dataclasses

import pytest
import torch

from llmac.algorithms.ppo import PPO
from llmac.config.cards import choose_algorithm, choose_critic
from llmac.core.collate import collate
from llmac.core.continuations import standard_error
from llmac.core.protocols import Metered, OffersResponses, SamplingParams
from llmac.core.spans import span_values
from llmac.core.types import Finish, Prompt, Rollouts, Trajectory
from llmac.critics.monte_carlo import MonteCarloConfig
from llmac.errors import ConfigError
from llmac.rewards.scoring import Rewards
from tests.core.exact_world import ExactWorld, WorldEngine
from tests.critics.making import bench

LIMIT, STOP = 5, 0


def prompt(number=0, **fields):
    return Prompt(**{"id": f"p{number}", "token_ids": (90 + number,), "source": "?"} | fields)


def response(ids, reward=0.0, *, asks=None, finish=Finish.STOP, group=0):
    return Trajectory(
        prompt=asks or prompt(group),
        response_ids=tuple(ids),
        action_mask=(True,) * len(ids),
        sampler_logprobs=tuple(-0.1 * n for n in range(len(ids))),
        finish=finish,
        group=group,
        reward=reward,
    )


def rollouts_of(trajectories, limit=LIMIT):
    batch = collate(trajectories, length_limit=limit)
    return Rollouts.of(batch, old_logprobs=batch.sampler_logprobs)


class Ranks:
    """One process; others may want more rounds than it does."""

    def __init__(self, more_rounds=0):
        self.left = more_rounds

    def sum(self, tensor):
        self.left -= 1
        return tensor + max(self.left + 1, 0)


def odd(tokens):
    return float(sum(tokens) % 2)


def live(*, ranks=None, reward=odd, score=None, seed=0, **settings):
    """The critic, and the engine that it asks."""
    world = ExactWorld(symbols=3, horizon=LIMIT, reward=reward, stop=STOP, seed=1)
    engine = WorldEngine(world)
    on_the_table = bench(
        ranks or Ranks(),
        policy="not asked",
        engine=engine,
        score=score or engine.score,
        sampling=SamplingParams(temperature=0.5, max_new_tokens=77),
        seed=seed,
    )
    return MonteCarloConfig(**settings).build(on_the_table), engine


def asked(critic, trajectories, limit=LIMIT):
    rollouts = rollouts_of(trajectories, limit)
    return critic.values(rollouts, rollouts.action_mask)


def measured(critic):
    return {name: measure.value for name, measure in critic.metrics().items()}


TWO = [response([1, 2, 1, 0], 1.0), response([1, 1, 0], 0.0)]


def test_each_state_is_continued_as_the_response_would_have_been():
    critic, engine = live(continuations=3)
    asked(critic, TWO)
    [requests] = engine.asked
    assert {len(r.prompt_ids) - 1 + r.params.max_new_tokens for r in requests} == {LIMIT}
    assert {(r.params.n, r.params.temperature) for r in requests} == {(3, 0.5)}
    assert len({r.params.seed for r in requests}) == len(requests)
    # Nested prefixes are neighbours, and what two responses share is asked once.
    states = [(), (1,), (1, 1), (1, 2), (1, 2, 1)]
    assert [r.prompt_ids for r in requests] == [(90, *state) for state in states]


def test_a_value_is_the_mean_reward_of_the_whole_responses():
    critic, engine = live(continuations=4)
    values = asked(critic, TWO)
    for row, t in values.starts.nonzero().tolist():
        before = TWO[row].response_ids[:t]
        request = next(r for r in engine.asked[0] if r.prompt_ids == (90, *before))
        whole = [before + c.token_ids for c in engine.generate([request])[0]]
        assert set(whole) <= {judged.response_ids for judged in engine.judged}
        assert values.at[row, t] == sum(map(odd, whole)) / 4
    assert values.at[~values.starts].eq(0).all()
    assert not values.bootstrap.any()


def test_it_is_only_asked_where_a_value_is_wanted():
    critic, engine = live()
    rollouts = rollouts_of(TWO)
    starts = torch.zeros_like(rollouts.action_mask)
    starts[1, 2] = True
    values = critic.values(rollouts, starts)
    assert [r.prompt_ids for r in engine.asked[0]] == [(90, 1, 1)]
    assert values.starts is starts
    assert measured(critic)["critic/continuations"] == 9


def test_equal_states_share_their_continuations():
    critic, engine = live(continuations=2)
    same_words = response([1, 0], asks=prompt(id="another", token_ids=(90,)), group=1)
    values = asked(critic, [*TWO, same_words])
    assert values.at[0, 0] == values.at[1, 0]
    assert values.at[0, 1] == values.at[1, 1]
    # Another question in the same words may have another answer.
    assert sum(r.prompt_ids == (90,) for r in engine.asked[0]) == 2
    found = measured(critic)
    assert found["critic/states"] == 7  # of 4 + 3 + 2, two equal to others
    assert found["critic/states_merged"] == pytest.approx(2 / 9)
    assert found["critic/continuations"] == 14
    own = sum(len(t.response_ids) for t in engine.judged) - 2 * (0 + 1 + 2 + 2 + 3 + 0 + 1)
    assert found["rollout/sampled_tokens"] == own
    assert critic.metrics() == {}


def test_seeds_follow_from_state_run_and_weights_and_nothing_else():
    def said(version=0, seed=0, rows=TWO):
        critic, engine = live(continuations=5, seed=seed)
        engine.policy_version = version
        return asked(critic, rows).at

    assert said().equal(said())
    assert said(rows=TWO[::-1]).equal(said().flip(0))
    assert not said(version=1).equal(said())
    assert not said(seed=1).equal(said())


def test_what_lies_behind_a_response_is_worth_something_only_if_it_is_paused():
    rows = [
        response([1, 1, 1, 1, 1], 1.0, finish=Finish.LENGTH),
        response([1, 1], None, finish=Finish.PAUSED),
        response([1, 1, 2, 1, 1], None, finish=Finish.PAUSED),
        response([], 0.0, group=1),
        response([1, 2], 0.0, finish=Finish.LENGTH),  # an engine had no room for more
    ]
    critic, engine = live(reward=lambda tokens: 1.0)
    values = asked(critic, rows)
    assert values.bootstrap.tolist() == [0, 1, 0, 0, 0]
    assert (90, 1, 1) in [r.prompt_ids for r in engine.asked[0]]
    assert max(len(r.prompt_ids) for r in engine.asked[0]) <= LIMIT
    starts = values.starts.clone()
    starts[3, 0] = True  # before a response of no tokens: the prompt's own value
    again = critic.values(rollouts_of(rows), starts)
    assert again.at[3, 0] == 1
    assert again.bootstrap[3] == 0


class Reader:
    def decode(self, token_ids, skip_special_tokens=False):
        return " ".join(map(str, token_ids))


def test_rewards_of_continuations_are_counted_apart():
    steps = []

    def picky(completions, trainer_state):
        steps.append(trainer_state.global_step)
        return [None if text.startswith("1 1") else 1.0 for text in completions]

    training = Rewards([picky], Reader())
    training.step = 7
    critic, _ = live(continuations=3, score=training)
    values = asked(critic, [response([1, 1, 0], 1.0)])
    assert values.at[0, 2] == 0
    assert set(steps) == {7}
    assert measured(critic)["critic/continuations_unscored"] >= 3
    assert training.metrics()["reward/mean"].weight == 0
    training.step = 8
    asked(critic, TWO)
    assert steps[-1] == 8


def test_unsure_states_get_more_until_they_are_sure_enough():
    settings = {"continuations": 4, "standard_error": 0.15, "max_continuations": 10}
    critic, engine = live(**settings)
    asked(critic, TWO)
    outcomes, sampled = {}, 0
    everything = [request for requests in engine.asked for request in requests]
    assert len({request.params.seed for request in everything}) == len(everything)
    for request in everything:
        before = request.prompt_ids[1:]
        [answers] = engine.generate([request])
        sampled += sum(len(c.token_ids) for c in answers)
        drawn = [odd(before + c.token_ids) for c in answers]
        outcomes.setdefault(before, []).extend(drawn)
    numbers = [len(found) for found in outcomes.values()]
    assert min(numbers) < max(numbers) == 10
    for state, found in outcomes.items():
        assert len(found) == 10 or standard_error(found, (0.0, 1.0)) <= 0.15, state
    errors = [standard_error(found, (0.0, 1.0)) for found in outcomes.values()]
    said = measured(critic)
    assert said["critic/standard_error"] == pytest.approx(sum(errors) / len(errors))
    assert said["critic/continuations"] == sum(numbers)
    assert said["rollout/sampled_tokens"] == sampled


def test_a_rank_that_needs_no_more_asks_as_often_as_the_others():
    settings = {"continuations": 9, "standard_error": 0.4}
    alone, engine = live(**settings)
    asked(alone, TWO)
    assert len(engine.asked) == 1
    waiting, engine = live(ranks=Ranks(more_rounds=2), **settings)
    values = asked(waiting, TWO)
    assert [len(requests) for requests in engine.asked] == [5, 0, 0]
    assert values.at.equal(asked(alone, TWO).at)
    nothing, engine = live()
    rollouts = rollouts_of(TWO)
    nothing.values(rollouts, torch.zeros_like(rollouts.action_mask))
    assert engine.asked == [[]]


def test_a_budget_gives_fewer_and_says_so():
    critic, engine = live(continuations=3, tokens_per_prompt=20)
    other = response([1, 0], 0.0, group=1)
    asked(critic, [*TWO, other])
    counts = {r.prompt_ids: r.params.n for r in engine.asked[0]}
    # Left from (), (1), (1,1), (1,2), (1,2,1): 3.5, 2.5, 1.5, 1.5, 1 tokens. One of each is 10, two are 20.
    states = [(90,), (90, 1), (90, 1, 1), (90, 1, 2), (90, 1, 2, 1)]
    assert [counts[state] for state in states] == [2, 2, 2, 2, 2]
    # And of (), (1): 2 and 1. All three of each are 9.
    assert [counts[state] for state in [(91,), (91, 1)]] == [3, 3]
    assert measured(critic)["critic/states_withheld"] == 5
    poor, engine = live(continuations=3, tokens_per_prompt=1)
    asked(poor, TWO)
    assert {r.params.n for r in engine.asked[0]} == {1}


def test_a_budget_ends_the_search_for_certainty():
    settings = {"continuations": 2, "standard_error": 0.01, "max_continuations": 1000}
    critic, _ = live(tokens_per_prompt=60, **settings)
    asked(critic, TWO)
    found = measured(critic)
    assert found["critic/states_withheld"] == 5
    assert found["critic/continuations"] > 2 * 5
    assert found["rollout/sampled_tokens"] < 80


def test_prompts_whose_responses_earned_the_same_are_not_asked():
    critic, engine = live(skip_equal=True)
    equal = [response([2, 2, 0], 0.25, group=1), response([1, 0], 0.25, group=1)]
    values = asked(critic, [*TWO, *equal, response([2, 0], 0.5, group=2)])
    assert values.at[2:4][values.starts[2:4]].tolist() == [0.25] * 5
    assert {r.prompt_ids[0] for r in engine.asked[0]} == {90, 92}
    found = measured(critic)
    assert found["critic/states_skipped"] == 4
    assert found["critic/states"] == 5 + 2
    unknown = [
        response([2, 2], None, finish=Finish.PAUSED),
        response([1, 2], None, finish=Finish.PAUSED),
    ]
    asked(critic, unknown)
    assert measured(critic)["critic/states_skipped"] == 0


def test_an_early_end_of_continuations_is_counted():
    critic, engine = live(continuations=6, continuation_tokens=2)
    asked(critic, TWO)
    assert {r.params.max_new_tokens for r in engine.asked[0]} == {2}
    cut = [
        t
        for t, request in zip(
            engine.judged, [r for r in engine.asked[0] for _ in range(6)], strict=True
        )
        if t.finish is Finish.LENGTH and len(request.prompt_ids) - 1 + 2 < LIMIT
    ]
    found = measured(critic)["critic/continuations_cut"]
    assert 0 < len(cut) == found < 30
    whole, _ = live(continuations=6)
    asked(whole, TWO)
    assert "critic/continuations_cut" not in whole.metrics()


def test_reused_continuations_are_compared_with_the_others_of_their_state():
    critic, _ = live(continuations=3, reuse=True)
    assert isinstance(critic, OffersResponses)
    assert isinstance(critic, Metered)
    assert critic.offers
    assert not live()[0].offers
    values = asked(critic, TWO)
    rows = critic.responses()
    assert len(rows) == 15
    by_hand = {
        (1.0, 3): 1.0,
        (1.0, 2): 0.5,
        (1.0, 1): 0.0,
        (0.0, 2): 1.0,
        (0.0, 1): 0.5,
        (0.0, 0): 0.0,
    }
    for place in range(5):
        three = rows[3 * place : 3 * place + 3]
        wins = int(sum(t.reward for t in three))
        for t in three:
            assert t.value_span == (by_hand[t.reward, wins], 0.0)
            assert t.group == 0
            assert t.response_ids[: t.fresh_from] in [r.response_ids[: t.fresh_from] for r in TWO]
            assert t.sampler_logprobs[: t.fresh_from] == TWO[0].sampler_logprobs[: t.fresh_from]
            assert set(t.sampler_logprobs[t.fresh_from :]) == {-1.0}
    assert [t.fresh_from for t in rows[::3]] == [0, 1, 2, 2, 3]
    # What a card makes of them: outcome minus the others' mean, at every token that was sampled afresh.
    batch = rollouts_of([*TWO, *rows])
    joined = values.joined(span_values(rollouts_of(rows)))
    advantages = PPO(whiten_advantages=False).credit(batch, joined).advantages
    for row, t in enumerate(rows, start=2):
        own = advantages[row, t.fresh_from : len(t.response_ids)]
        assert own.tolist() == pytest.approx([t.reward - t.value_span[0]] * len(own))


def test_reused_continuations_belong_to_the_response_that_they_branch_off():
    critic, engine = live(continuations=2, reuse=True)
    engine.policy_version = 4
    injected = dataclasses.replace(response([1, 2, 0], group=3), action_mask=(True, False, True))
    rollouts = rollouts_of([injected])
    critic.values(rollouts, rollouts.action_mask)
    rows = critic.responses()
    assert [(row.group, row.policy_version) for row in rows] == [(3, 4)] * 4
    assert [row.action_mask[:3] for row in rows[2:]] == [(True, False, True)] * 2


def test_a_single_continuation_is_no_lesson():
    critic, _ = live(continuations=3, reuse=True, tokens_per_prompt=1)
    asked(critic, TWO)
    assert critic.responses() == []


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"continuations": 0}, "continuations must be at least 1, found 0"),
        ({"standard_error": 0.0}, "standard_error must be above 0, or null, found 0.0"),
        ({"tokens_per_prompt": 0}, "tokens_per_prompt must be above 0"),
        ({"continuation_tokens": -1}, "continuation_tokens must be above 0"),
        ({"standard_error": 0.1, "max_continuations": 9}, "above continuations, 9"),
        ({"standard_error": 0.1, "reward_range": (1.0, 0.0)}, "reward_range must be"),
        ({"standard_error": float("nan")}, "standard_error must be finite"),
        ({"reuse": True, "continuations": 1}, "at least 2, found 1"),
        ({"reuse": True, "continuation_tokens": 4}, "leave out one"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, part):
    with pytest.raises(ValueError, match=part):
        MonteCarloConfig(**settings)


def test_it_is_a_choice_of_a_recipe():
    choice = choose_critic("monte_carlo", choose_algorithm("ppo"))
    assert choice.settings == MonteCarloConfig()
    assert choice.settings.least_group_size == 1
    assert MonteCarloConfig(skip_equal=True).least_group_size == 2
    assert set(MonteCarloConfig().without_effect()) == {"max_continuations"}
    assert MonteCarloConfig(standard_error=0.1).without_effect() == {}
    with pytest.raises(ConfigError, match="nothing is sampled"):
        MonteCarloConfig().build(bench(Ranks(), policy="not asked"))


def test_rows_of_an_earlier_window_are_continued_from_all_their_tokens():
    later = dataclasses.replace(TWO[0], fresh_from=2)
    critic, engine = live()
    rollouts = rollouts_of([later])
    critic.values(rollouts, rollouts.action_mask & rollouts.fresh)
    assert [r.prompt_ids for r in engine.asked[0]] == [(90, 1, 2), (90, 1, 2, 1)]


def test_what_values_cost_is_told_once_where_it_is_much(caplog):
    critic, _ = live(continuations=40)
    for _ in range(2):
        asked(critic, TWO)
    [said] = [r.getMessage() for r in caplog.records]
    assert (
        f"sampled {int(measured(critic)['rollout/sampled_tokens'])} tokens to value 5 states"
        in said
    )
    cheap, _ = live(continuations=1)
    asked(cheap, TWO)
    assert len(caplog.records) == 1


def test_rewards_beyond_the_range_that_standard_errors_stand_on_are_counted():
    critic, _ = live(continuations=4, reward=lambda tokens: 2.0 * (sum(tokens) % 2))
    asked(critic, TWO)
    said = measured(critic)
    inside, _ = live(continuations=4, reward_range=(0.0, 2.0), reward=lambda tokens: 2.0)
    asked(inside, TWO)
    assert 0 < said["critic/vf_target_clipfrac"] < 1
    assert measured(inside)["critic/vf_target_clipfrac"] == 0
