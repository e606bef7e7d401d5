"""Held-out accuracy: closed forms, sharding, and a training run that does not notice."""

import random

import numpy
import pytest
import torch

from llmac.core.measures import combine
from llmac.core.protocols import Completion, SamplingParams
from llmac.core.types import Finish, Prompt
from llmac.errors import DataError, RewardError
from llmac.evaluate import evaluate


class ScriptedEngine:
    """Answers the prompt (p,) with the responses scripted for p."""

    def __init__(self, script):
        self.script = script
        self.requests = []

    def generate(self, requests):
        self.requests += requests
        torch.rand(3)
        return [
            [
                Completion(token_ids=ids, logprobs=(0.0,) * len(ids), finish=finish)
                for ids, finish in self.script[request.prompt_ids[0]]
            ]
            for request in requests
        ]


def score(trajectories):
    """One point for beginning with 1; the form is judged where there are two tokens."""
    import dataclasses

    random.random(), numpy.random.rand()
    return [
        dataclasses.replace(
            t,
            reward=float(t.response_ids[0] == 1),
            reward_parts={
                "right": float(t.response_ids[0] == 1),
                "form": 0.25 if len(t.response_ids) == 2 else None,
            },
        )
        for t in trajectories
    ]


RIGHT, WRONG = ((1,), Finish.STOP), ((0, 0), Finish.LENGTH)
SCRIPT = {
    10: [RIGHT, WRONG, WRONG, WRONG],
    11: [RIGHT, RIGHT, WRONG, WRONG],
    12: [WRONG] * 4,
    13: [RIGHT] * 4,
}
PROMPTS = [Prompt(id=f"test/{p}", token_ids=(p,), source="") for p in SCRIPT]
SAMPLING = SamplingParams(n=4, temperature=1.0, max_new_tokens=2)


def measured(prompts, **options):
    options = {"sampling": SAMPLING, "name": "held_out", **options}
    return evaluate(ScriptedEngine(SCRIPT), prompts, score, **options)


def values(metrics):
    return {name.removeprefix("eval/held_out/"): m.value for name, m in metrics.items()}


def test_pass_at_k_has_its_closed_form():
    # c of n = 4 right: 1, 2, 0, 4.
    # k = 1: c/4. k = 2: 1 - C(4-c, 2)/6 -> 1 - 3/6, 1 - 1/6, 0, 1. k = 4: any right -> 1, 1, 0, 1.
    found = values(measured(PROMPTS))
    assert found["pass@1"] == pytest.approx((1 / 4 + 2 / 4 + 0 + 1) / 4)
    assert found["pass@2"] == pytest.approx((1 / 2 + 5 / 6 + 0 + 1) / 4)
    assert found["pass@4"] == pytest.approx(3 / 4)
    assert {name for name in found if name.startswith("pass")} == {"pass@1", "pass@2", "pass@4"}


def test_rewards_and_lengths_are_means_over_responses():
    found = values(measured(PROMPTS))
    assert found["reward"] == 7 / 16
    assert found["reward/right"] == 7 / 16
    assert found["reward/form"] == 0.25  # over the 9 responses it applies to
    assert found["response_length/mean"] == (7 * 1 + 9 * 2) / 16
    assert found["response_length/clip_ratio"] == 9 / 16


def test_a_function_that_never_applies_has_no_mean():
    found = values(measured(PROMPTS[3:]))
    assert "reward/form" not in found
    assert found["pass@1"] == 1.0


def test_any_split_over_ranks_gives_the_same_numbers():
    whole = values(measured(PROMPTS))
    total = lambda count: torch.tensor(4)  # noqa: E731
    split = combine(
        measured(PROMPTS[:1], sum_across=total),
        measured(PROMPTS[1:], sum_across=total),
        measured([], sum_across=total),
    )
    assert values(split) == whole


def test_a_set_without_prompts_on_any_rank_is_an_error():
    with pytest.raises(DataError, match="held_out has no prompts"):
        measured([])


def test_a_response_without_reward_is_an_error_that_names_the_prompt():
    with pytest.raises(RewardError, match="test/10"):
        evaluate(ScriptedEngine(SCRIPT), PROMPTS, list, sampling=SAMPLING, name="held_out")


def test_solved_is_a_threshold_on_the_total_reward():
    import dataclasses

    def almost(trajectories):  # 0.7 + 0.2 + 0.1 in floating point
        return [dataclasses.replace(t, reward=0.7 + 0.2 + 0.1) for t in trajectories]

    def solved(at):
        options = {"sampling": SAMPLING, "name": "s", "solved_at": at}
        return evaluate(ScriptedEngine(SCRIPT), PROMPTS, almost, **options)["eval/s/pass@1"].value

    assert (solved(1.0), solved(1.01)) == (1.0, 0.0)


def test_the_random_state_of_training_is_untouched():
    def draw():
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    def seed():
        random.seed(3), numpy.random.seed(3), torch.manual_seed(3)

    seed()
    undisturbed = draw()
    seed()
    measured(PROMPTS)
    assert draw() == undisturbed


def test_the_random_state_inside_is_the_same_each_time():
    def noisy(trajectories):
        import dataclasses

        noise = random.random(), numpy.random.rand(), torch.rand(1).item()
        return [dataclasses.replace(t, reward=sum(noise)) for t in trajectories]

    def mean():
        engine = ScriptedEngine(SCRIPT)
        return evaluate(engine, PROMPTS, noisy, sampling=SAMPLING, name="s")["eval/s/reward"].value

    first = mean()
    random.random(), numpy.random.rand(), torch.rand(1)
    assert mean() == first


def seeds(prompts, sampling):
    engine = ScriptedEngine(SCRIPT)
    evaluate(engine, prompts, score, sampling=sampling, name="s")
    return {request.prompt_ids[0]: request.params.seed for request in engine.requests}


def test_a_prompts_seed_depends_on_its_id_and_the_run_not_on_its_place():
    import dataclasses

    found = seeds(PROMPTS, SAMPLING)
    assert len(set(found.values())) == 4
    assert seeds(PROMPTS[::-1], SAMPLING) == found
    assert seeds(PROMPTS[2:], SAMPLING) == {p: found[p] for p in (12, 13)}
    assert seeds(PROMPTS, dataclasses.replace(SAMPLING, seed=1)) != found


def test_greedy_requests_are_alike_so_that_they_can_share_a_batch():
    greedy = SamplingParams(n=4, temperature=0.0)
    assert len(set(seeds(PROMPTS, greedy).values())) == 1
