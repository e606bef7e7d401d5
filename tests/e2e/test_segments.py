"""Runs whose critics are asked at the starts of segments: by continuations, and by a learned head."""

import pytest

from llmac.api import run as train
from llmac.config import load_recipe

EVERY_TWO = {"name": "ppo", "segmenter": "every_n", "segment_tokens": 2}
AFTER_VOWELS = {"name": "vineppo", "group_size": 2, "delimiter": "[ae]"}
RUNS = [
    (EVERY_TWO, {"name": "monte_carlo", "continuations": 3}),
    (EVERY_TWO, {"name": "value_head"}),
    (AFTER_VOWELS, {"name": "monte_carlo", "continuations": 3, "reuse": True}),
    ({"name": "spo_chain", "group_size": 2, "cut_interval": 2}, {"name": "monte_carlo"}),
    ({"name": "spo_chain", "group_size": 2}, {"name": "monte_carlo", "reuse": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "critic"), RUNS)
def test_a_critic_is_asked_at_segments_only(algorithm, critic, settings, read_metrics):
    settings["rollout"]["max_new_tokens"] = 6
    settings["run"] |= {"steps": 2, "save_every": 2}
    recipe = load_recipe(settings | {"algorithm": algorithm, "critic": critic})
    train(recipe)
    lines = read_metrics(settings["run"]["output"])
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert 1 <= line["rollout/segments"] <= 4
        assert 0 <= line["rollout/uncut_responses"] < 1
        assert ("critic/vf_loss" in line) == (critic["name"] == "value_head")
        if critic["name"] == "monte_carlo":
            assert line["critic/states"] > 0
            assert line["rollout/sampled_tokens"] > line["response_length/mean"]


@pytest.mark.slow
def test_ranks_with_different_numbers_of_rows_whiten_chunks_together(
    settings, write_recipe, run, read_metrics
):
    settings["algorithm"] = {"name": "spo_chain", "group_size": 2, "whiten": "rows"}
    settings["critic"] = {"name": "monte_carlo", "continuations": 3, "reuse": True}
    settings["rollout"]["max_new_tokens"] = 6
    settings["run"] |= {"steps": 2, "save_every": 2}
    code, printed = run(write_recipe(settings), processes=2).finish()
    assert code == 0, printed
    assert [line["step"] for line in read_metrics(settings["run"]["output"])] == [1, 2]
