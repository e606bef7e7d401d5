"""An examination against exact values: the exact critic is found exact, and every kind of wrong one is found out."""

import dataclasses
import functools
import io
import json
import math
import random

import pytest
import torch
from rich.console import Console

from llmac.core.protocols import Completion, SamplingParams
from llmac.core.types import Finish, Prompt, Values
from llmac.critics.examine import MEASURES, examine
from llmac.critics.picture import plot_calibration
from llmac.critics.report import as_dict, tables
from llmac.critics.states import sample_states
from llmac.errors import ConfigError, ConsistencyError, DataError, EngineError, RewardError

LIMIT, NEEDED, STOP = 12, 4, 2
CHANCES = {10: 0.2, 11: 0.35, 12: 0.5, 13: 0.65}
"""Of a 1 at each token, by the prompt's only token; else it is a 0, or at one token in twenty the end."""


class Coins:
    """An engine whose policy is known: independent coins, of one bias for each prompt."""

    policy_version = 0

    def __init__(self):
        self.asked = []

    def generate(self, requests):
        self.asked += requests
        return [[self._flip(r, k) for k in range(r.params.n)] for r in requests]

    def _flip(self, request, k):
        dice, tokens = random.Random(f"{request.params.seed} {k}"), []
        while len(tokens) < request.params.max_new_tokens:
            ended = dice.random() < 0.05
            tokens.append(STOP if ended else int(dice.random() < CHANCES[request.prompt_ids[0]]))
            if ended:
                break
        return Completion(
            token_ids=tuple(tokens),
            logprobs=(0.0,) * len(tokens),
            finish=Finish.STOP if tokens[-1] == STOP else Finish.LENGTH,
        )


def enough_ones(trajectories):
    return [
        dataclasses.replace(t, reward=float(t.response_ids.count(1) >= NEEDED))
        for t in trajectories
    ]


@functools.cache
def exact(chance, ones, left):
    """V with `ones` so far and `left` tokens to come."""
    if ones >= NEEDED or not left:
        return float(ones >= NEEDED)
    goes_on = chance * exact(chance, ones + 1, left - 1) + (1 - chance) * exact(
        chance, ones, left - 1
    )
    return 0.95 * goes_on


class Exact:
    """The critic that knows."""

    def values(self, rollouts, starts):
        at = torch.full(starts.shape, math.nan)
        for row, place in starts.nonzero().tolist():
            t = rollouts.trajectories[row]
            ones = t.response_ids[:place].count(1)
            at[row, place] = self.wrong(exact(CHANCES[t.prompt.token_ids[0]], ones, LIMIT - place))
        return Values(at=at, starts=starts, bootstrap=torch.zeros(len(at)))

    def wrong(self, value):
        return value

    def update(self, rollouts, targets):
        return {}


class Shifted(Exact):
    def wrong(self, value):
        return value + 0.2


class Constant(Exact):
    def wrong(self, value):
        return 0.5


class Overconfident(Exact):
    def wrong(self, value):
        return float(value > 0.5)


class Broken(Exact):
    def wrong(self, value):
        return math.nan


def prompts_of(ids):
    return [Prompt(id=f"p{n}", token_ids=(token,), source="?") for n, token in enumerate(ids)]


ABOUT = {"critic": "c", "run": "runs/r", "moment": "final", "prompts": "held-out", "rollouts": 64}
SAMPLING = SamplingParams(max_new_tokens=LIMIT)
PROMPTS = prompts_of(list(CHANCES) * 10)


@pytest.fixture(scope="module")
def states():
    return sample_states(
        Coins(), PROMPTS, enough_ones, sampling=SAMPLING, states=200, rollouts=64, siblings=2
    )


@pytest.fixture(scope="module")
def reports(states):
    critics = (Exact(), Shifted(), Constant(), Overconfident())
    return {type(critic).__name__: examine(critic, states, draws=400) for critic in critics}


def score(report, name):
    return report.overall.scores[name].value


def test_the_monte_carlo_values_are_the_true_ones_up_to_their_standard_error(states):
    truth = Exact().values(*states.rollouts()).at[states.row, states.position]
    error = (states.value - truth)[states.standard_error > 0]
    # Of independent states 95 % are within two standard errors; these are not all independent.
    assert (
        error.abs() < 2.5 * states.standard_error[states.standard_error > 0]
    ).float().mean() > 0.9
    assert error.mean().abs() < 0.02


def test_the_exact_critic_is_found_exact(reports):
    report = reports["Exact"]
    assert 0.02 < report.noise < 0.06
    assert score(report, "rmse") == pytest.approx(report.noise, rel=0.25)
    assert score(report, "rmse_corrected") < 0.5 * report.noise
    assert abs(score(report, "bias")) < 0.02
    assert score(report, "explained_variance") > 0.97
    assert score(report, "ece") < 0.03
    best = report.overall.best
    for name in ("brier", "auc", "auc_within_prompts", "explained_variance_of_outcomes"):
        assert score(report, name) == pytest.approx(best[name], abs=0.02)
    assert best["rmse"] == best["ece"] == 0.0


def test_a_constant_critic_explains_and_ranks_nothing(reports):
    report = reports["Constant"]
    assert score(report, "explained_variance") == pytest.approx(0.0, abs=1e-6)
    assert score(report, "auc") == score(report, "auc_within_prompts") == 0.5
    assert score(report, "ece") == pytest.approx(abs(score(report, "bias")))
    assert [b.value for b in report.curve] == [0.5]


def test_a_shift_is_bias_and_nothing_else(reports):
    exact_report, report = reports["Exact"], reports["Shifted"]
    shift = score(report, "bias") - score(exact_report, "bias")
    assert shift == pytest.approx(0.2)
    assert score(report, "rmse_corrected") == pytest.approx(0.2, abs=0.02)
    assert score(report, "ece") == pytest.approx(0.2, abs=0.03)
    for name in ("explained_variance", "auc", "auc_within_prompts"):
        assert score(report, name) == pytest.approx(score(exact_report, name), abs=1e-6)


def test_overconfidence_shows_in_calibration_and_brier(reports):
    report, exact_report = reports["Overconfident"], reports["Exact"]
    assert score(report, "ece") > 0.1
    assert score(report, "brier") > score(exact_report, "brier") + 0.03
    assert len(report.curve) == 2


def test_every_depth_has_equally_many_states_and_knows_more_than_the_one_before(reports):
    depths = reports["Exact"].by_depth
    assert [d.where for d in depths] == [f"depth {d:.2f}" for d in (0, 0.2, 0.4, 0.6, 0.8)]
    assert {d.states for d in depths} == {40}
    # Before the first token all that can be known is the prompt.
    assert depths[0].scores["auc_within_prompts"].value == 0.5
    assert depths[0].scores["auc"].value > 0.7
    briers = [d.scores["brier"].value for d in depths]
    assert briers == sorted(briers, reverse=True)


def test_failed_and_successful_responses_are_told_apart_by_their_own_reward(states, reports):
    failed, successful = reports["Exact"].by_outcome
    assert (failed.where, successful.where) == ("failed", "successful")
    assert failed.states + successful.states == 200
    assert failed.mean_truth < successful.mean_truth
    wins = sum(t.reward == 1.0 for t in states.trajectories)
    assert successful.states == 5 * wins


def test_the_truth_is_in_most_intervals():
    # The error of the exact critic against Monte Carlo has mean 0.
    covered = 0
    for seed in range(12):
        found = sample_states(
            Coins(), PROMPTS, enough_ones, sampling=SAMPLING, states=30, depths=3, rollouts=8,
            siblings=1, seed=seed,
        )  # fmt: skip
        estimate = examine(Exact(), found, draws=100).overall.scores["bias"]
        covered += estimate.low <= 0.0 <= estimate.high
        assert estimate.low <= estimate.value <= estimate.high
    assert covered >= 9


def test_equal_states_are_continued_once():
    engine = Coins()
    states = sample_states(
        engine, PROMPTS[:3], enough_ones, sampling=SAMPLING, states=24, depths=2, rollouts=5
    )
    continued = [request for request in engine.asked if request.params.n == 5]
    assert len(continued) == len({request.prompt_ids for request in continued})
    # A state must not see its own future again.
    drawn = {request.params.seed for request in engine.asked if request.params.n != 5}
    assert drawn.isdisjoint(request.params.seed for request in continued)
    at_start = [request for request in continued if len(request.prompt_ids) == 1]
    assert len(at_start) == 3
    for n in range(12):  # siblings share the truth of their first state
        first = states.prompt[2 * n] == states.prompt[::2]
        assert (states.outcomes[::2][first] == states.outcomes[2 * n]).all()


def test_a_continuation_ends_where_the_response_would():
    engine = Coins()
    sample_states(engine, PROMPTS, enough_ones, sampling=SAMPLING, states=40, depths=4, rollouts=2)
    assert all(
        len(request.prompt_ids) - 1 + request.params.max_new_tokens == LIMIT
        for request in engine.asked
    )


def test_more_responses_than_prompts_share_them_evenly():
    states = sample_states(
        Coins(), PROMPTS[:4], enough_ones, sampling=SAMPLING, states=20, depths=2, rollouts=2, siblings=1
    )  # fmt: skip
    groups = [t.group for t in states.trajectories]
    assert sorted(groups.count(g) for g in range(4)) == [2, 2, 3, 3]
    assert len({t.prompt.id for t in states.trajectories}) == 4


def test_the_discount_is_of_the_tokens_to_come():
    options = {"sampling": SAMPLING, "states": 8, "depths": 2, "rollouts": 3}
    always = lambda ts: [dataclasses.replace(t, reward=1.0) for t in ts]  # noqa: E731
    engine = Coins()
    states = sample_states(engine, PROMPTS, always, gamma=0.5, **options)
    for row, at, outcomes in zip(states.row, states.position, states.outcomes, strict=True):
        prefix = states.trajectories[row].response_ids[:at]
        prompt = states.trajectories[row].prompt.token_ids
        # Several prompts are the same tokens, so several requests may be meant.
        requests = [
            r for r in engine.asked if r.prompt_ids == (*prompt, *prefix) and r.params.n == 3
        ]
        assert outcomes.tolist() in [
            [0.5 ** (len(answer.token_ids) - 1) for answer in answers]
            for answers in Coins().generate(requests)
        ]


def test_rewards_of_any_scale_are_judged_alike():
    def scaled(trajectories):
        return [dataclasses.replace(t, reward=10 * t.reward - 5) for t in enough_ones(trajectories)]

    class Scaled(Exact):
        def wrong(self, value):
            return 10 * value - 5

    options = {"sampling": SAMPLING, "states": 60, "depths": 3, "rollouts": 16}
    plain = sample_states(Coins(), PROMPTS, enough_ones, **options)
    wide = sample_states(Coins(), PROMPTS, scaled, **options)
    assert (plain.success_above, wide.success_above) == (0.5, 0.0)
    one, other = (
        examine(critic, states, draws=50).overall.scores
        for critic, states in ((Exact(), plain), (Scaled(), wide))
    )
    for name in ("rmse", "rmse_corrected", "bias", "ece"):
        assert other[name].value == pytest.approx(10 * one[name].value, abs=1e-4)
    for name in ("explained_variance", "auc", "auc_within_prompts"):
        assert other[name].value == pytest.approx(one[name].value, abs=1e-5)


def test_one_prompt_gives_numbers_without_intervals():
    states = sample_states(
        Coins(), PROMPTS[2:3], enough_ones, sampling=SAMPLING, states=20, depths=2, rollouts=4
    )
    scores = examine(Exact(), states, draws=20).overall.scores
    assert scores.keys() == MEASURES.keys()
    assert not math.isnan(scores["rmse"].value)
    assert math.isnan(scores["rmse"].low)


@pytest.mark.parametrize(
    ("numbers", "part"),
    [
        ({"rollouts": 1}, "rollouts is 1"),
        ({"states": 4}, "at least 5 states"),
        ({"depths": 0}, "depths must be at least 1"),
        ({"siblings": 0}, "siblings must be at least 1"),
    ],
)
def test_numbers_that_say_nothing_are_refused(numbers, part):
    with pytest.raises(ConfigError, match=part):
        sample_states(Coins(), PROMPTS, enough_ones, sampling=SAMPLING, **numbers)


def test_what_cannot_be_judged_is_refused(states):
    with pytest.raises(DataError, match="no prompts"):
        sample_states(Coins(), [], enough_ones, sampling=SAMPLING)
    with pytest.raises(ConsistencyError, match="200 values of 200"):
        examine(Broken(), states)
    with pytest.raises(RewardError, match="no reward"):
        sample_states(Coins(), PROMPTS, list, sampling=SAMPLING, rollouts=2)

    class Miser(Coins):
        def generate(self, requests):
            return [answers[:1] for answers in super().generate(requests)]

    with pytest.raises(EngineError, match="returned 1"):
        sample_states(Miser(), PROMPTS, enough_ones, sampling=SAMPLING, rollouts=2)


def test_a_report_is_json_tables_and_a_picture(states, reports, tmp_path):
    report = reports["Shifted"]
    content = as_dict(report, states, ABOUT)
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["overall"]["scores"]["bias"]["value"] == score(report, "bias")
    assert content["overall"]["scores"].keys() == content["measures"].keys()
    assert sum(b["states"] for b in content["calibration"]) == 200
    entry = content["states"][7]
    trajectory = states.trajectories[entry["response"]]
    ones = trajectory.response_ids[: entry["position"]].count(1)
    chance = CHANCES[trajectory.prompt.token_ids[0]]
    assert entry["value"] == pytest.approx(exact(chance, ones, LIMIT - entry["position"]) + 0.2)
    assert entry["prompt"] == trajectory.prompt.id

    text = shown(report)
    for name in (*MEASURES, "depth 0.80", "failed", "successful"):
        assert name in text
    assert f"{score(report, 'bias'):.3f}" in text
    picture = plot_calibration(report, states, tmp_path / "deep" / "x.png", title="coins")
    assert picture.stat().st_size > 10_000


def test_what_is_undefined_is_null_a_dash_and_not_drawn(tmp_path):
    never = lambda ts: [dataclasses.replace(t, reward=0.0) for t in ts]  # noqa: E731
    states = sample_states(
        Coins(), PROMPTS[:1], never, sampling=SAMPLING, states=4, depths=2, rollouts=2
    )
    report = examine(Constant(), states, draws=10)
    content = as_dict(report, states, ABOUT)
    json.dumps(content, allow_nan=False)
    scores = content["overall"]["scores"]
    assert scores["auc"] == {"value": None, "low": None, "high": None}
    assert scores["rmse"] == {"value": 0.5, "low": None, "high": None}
    assert [part["where"] for part in content["by_outcome"]] == ["failed"]
    assert "nan" not in shown(report)
    assert plot_calibration(report, states, tmp_path / "x.png", title="coins").is_file()


def shown(report):
    console = Console(width=132, record=True, file=io.StringIO())
    console.print(tables(report, ABOUT))
    return console.export_text()
