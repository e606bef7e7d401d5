"""Supervised fine-tuning in whole runs: on a file of completions, resumed, on two ranks, on stored responses."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llmac.api import run as train
from llmac.check import check
from llmac.config import load_recipe
from llmac.errors import DataError
from llmac.rollout_store import read_rollouts
from llmac.sample_rollouts import sample_rollouts

pytestmark = pytest.mark.slow


@pytest.fixture
def shown(settings, home, tmp_path):
    """A recipe of `sft`: twelve prompts, each answered with its first letter three times."""
    rows = [json.loads(line) for line in (home / "train.jsonl").read_text().splitlines()][::3]
    file = tmp_path / "shown.jsonl"
    lines = [{"prompt": r["prompt"], "completion": 3 * r["wanted"]} for r in rows]
    file.write_text("\n".join(map(json.dumps, lines)))
    settings["data"] = {"name": str(file)}  # without the column that the reward asks for
    settings["algorithm"] = {"name": "sft"}
    settings["actor"] |= {"minibatches": 1, "lr": 1e-2}
    return settings


def final(folder):
    return load_file(folder / "final/model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_small_file_is_learned_by_heart_and_the_evaluation_sees_it(
    shown, home, read_metrics, tmp_path
):
    shown["evaluation"] = {"data": {"name": str(home / "train.jsonl")}, "every": 60}
    shown["actor"] |= {"prompts_per_step": 12}
    shown["run"] |= {"steps": 60, "save_every": 60}
    train(load_recipe(shown))
    lines = read_metrics(tmp_path / "run")
    losses = [line["actor/pg_loss"] for line in lines[1:]]
    assert losses[0] > 1.5
    assert losses[-1] < 0.02
    assert lines[-1]["eval/held_out/reward"] > 0.4 > lines[0]["eval/held_out/reward"] + 0.15
    assert all(line["rollout/sampled_tokens"] == 0 for line in lines[1:])
    assert lines[-1]["rollout/tokens"] == 12 * 4
    assert not {"reward/mean", "actor/sampler_kl", "critic/advantages/mean"} & set(lines[-1])


def test_a_resumed_run_goes_on_with_the_rows_the_other_had_not_seen(shown, read_metrics, tmp_path):
    for name, stops in (("straight", [5]), ("resumed", [2, 5])):
        shown["run"]["output"] = str(tmp_path / name)
        for last in stops:
            shown["run"]["steps"] = last
            train(load_recipe(shown))
    assert same(final(tmp_path / "straight"), final(tmp_path / "resumed"))
    lines = read_metrics(tmp_path / "straight")
    assert lines == read_metrics(tmp_path / "resumed")
    assert len({line["actor/pg_loss"] for line in lines}) == 5


def test_two_processes_learn_what_one_does(shown, write_recipe, run, read_metrics, tmp_path):
    recipe = write_recipe(shown)
    for processes in (1, 2):
        code, printed = run(
            recipe, f"run.output={tmp_path / str(processes)}", processes=processes
        ).finish()
        assert code == 0, printed
    alone, both = (read_metrics(tmp_path / str(n)) for n in (1, 2))
    for name in ("actor/pg_loss", "rollout/tokens", "actor/grad_norm"):
        assert [line[name] for line in both] == pytest.approx([line[name] for line in alone], 1e-4)
    ours, theirs = final(tmp_path / "1"), final(tmp_path / "2")
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-3) for n in ours)


def test_stored_responses_above_a_reward_are_learned_from(settings, read_metrics, tmp_path):
    path = tmp_path / "stored.parquet"
    sample_rollouts(load_recipe(settings), path, responses=64)
    kept = [t for t in read_rollouts(path) if t.reward > 0.1]
    settings["algorithm"] = {"name": "sft", "rollouts": str(path), "keep_above": 0.1}
    settings["actor"] |= {"minibatches": 1, "prompts_per_step": 8}
    train(load_recipe(settings))
    lines = read_metrics(tmp_path / "run")
    assert 0 < len(kept) < 64
    assert lines[0]["rollout/sampled_tokens"] == 0
    assert all(line["reward/mean"] > 0.1 for line in lines)
    assert lines[0]["actor/sampler_logprob_diff_max"] < 1e-3


def test_data_without_completions_is_refused_before_a_model_is_loaded(settings, tmp_path):
    settings["algorithm"] = {"name": "sft"}
    settings["actor"]["minibatches"] = 1
    with pytest.raises(DataError, match="there is nothing to learn from: the data has no column"):
        train(load_recipe(settings))
    assert not (tmp_path / "run/config.yaml").exists()
    [wrong] = [finding for finding in check(load_recipe(settings)) if finding.verdict == "wrong"]
    assert "there is nothing to learn from" in wrong.detail


def test_a_recipe_without_the_rewards_columns_passes_the_check(shown):
    findings = list(check(load_recipe(shown)))
    assert all(finding.verdict != "wrong" for finding in findings)
    assert any("12 completions with 48 tokens" in finding.detail for finding in findings)
