"""Learning from stored responses, and cards with a memory, in whole runs."""

import pytest
import torch
from safetensors.torch import load_file

from llmac.api import run as train
from llmac.config import load_recipe
from llmac.errors import ConfigError, DataError
from llmac.rollout_store import read_rollouts
from llmac.sample_rollouts import sample_rollouts
from llmac.value_pretrain import Pretraining, value_pretrain

pytestmark = pytest.mark.slow

FIRST_LETTER = '''
def early(prompt, response):
    """1 if the response begins with a letter of the first half of the alphabet."""
    return float(response[:1] in ("a", "b", "c"))
'''


@pytest.fixture
def stored(settings, tmp_path):
    """A file of 320 responses of the starting policy; about half of them are right."""
    (tmp_path / "early.py").write_text(FIRST_LETTER)
    settings["reward"] = f"{tmp_path / 'early.py'}:early"
    path = tmp_path / "stored.parquet"
    sample_rollouts(load_recipe(settings), path, responses=320)
    return path


@pytest.fixture
def offline(settings, stored):
    """A recipe of `dapo_step` that learns from them."""
    settings["algorithm"] = {"name": "dapo_step", "rollouts": str(stored), "step_tokens": 1}
    settings["critic"] = {"name": "value_head", "lr": 1e-2, "value_clip": None}
    return settings


def continued(settings, output, steps):
    """A run that stopped at each of these steps; (its metrics, its final policy)."""
    settings["run"]["output"] = str(output)
    for last in steps:
        settings["run"]["steps"] = last
        train(load_recipe(settings))
    return load_file(output / "final/model.safetensors")


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_policy_learns_from_a_file_and_its_critic_stays_as_it_was(
    offline, stored, home, read_metrics, tmp_path
):
    ppo = offline | {"algorithm": {"name": "ppo"}}
    how = Pretraining(epochs=5, held_out=0.2)
    fitted = value_pretrain(load_recipe(ppo), stored, tmp_path / "fitted", how).critic
    offline["critic"]["init"] = str(fitted)
    offline["evaluation"] = {"data": {"name": str(home / "held_out.jsonl")}, "every": 20}
    offline["evaluation"] |= {"temperature": 1.0, "samples": 32}
    offline["actor"] |= {"prompts_per_step": 16, "lr": 5e-3}
    offline["run"] |= {"steps": 20, "save_every": 10}
    train(load_recipe(offline))

    lines = read_metrics(tmp_path / "run")
    before, after = (lines[step]["eval/held_out/reward"] for step in (0, 20))
    assert after > before + 0.15
    assert [line["rollout/stored_passes"] for line in lines[1:4]] == pytest.approx([0.2, 0.4, 0.6])
    mean = sum(t.reward for t in read_rollouts(stored)) / 320
    passes = [line["reward/mean"] for line in lines[1:6]]
    assert sum(passes) / 5 == pytest.approx(mean)
    assert "critic/vf_loss" not in lines[-1]
    assert same(
        load_file(fitted / "model.safetensors"),
        load_file(tmp_path / "run/final/critic/model.safetensors"),
    )


def test_a_resumed_run_replays_what_the_other_had_not_seen(offline, read_metrics, tmp_path):
    straight = continued(offline, tmp_path / "straight", [4])
    resumed = continued(offline, tmp_path / "resumed", [2, 4])
    assert same(straight, resumed)
    assert read_metrics(tmp_path / "straight") == read_metrics(tmp_path / "resumed")


def test_a_resumed_run_of_safe_remembers_its_gate(settings, read_metrics, tmp_path):
    settings["algorithm"] = {"name": "safe", "group_size": 2, "gate_threshold": 0.001}
    settings["algorithm"] |= {"gate_bounds": [0.0001, 0.6], "gate_coef": 5.0, "phase_window": 2}
    straight = continued(settings, tmp_path / "straight", [4])
    resumed = continued(settings, tmp_path / "resumed", [2, 4])
    assert same(straight, resumed)
    lines = read_metrics(tmp_path / "straight")
    assert lines == read_metrics(tmp_path / "resumed")
    assert lines[-1]["actor/gate_weight"] > 0
    assert lines[-1]["actor/gate_kl"] > lines[0]["actor/gate_kl"]


def test_a_file_that_cannot_be_replayed_is_refused(offline, tmp_path):
    offline["rollout"]["max_new_tokens"] = 1
    with pytest.raises(DataError, match=r"length limit of this run is 1; raise rollout\.max_new"):
        train(load_recipe(offline))
    offline["algorithm"]["rollouts"] = str(tmp_path / "store.parquet")
    with pytest.raises(ConfigError, match=r"algorithm\.rollouts: there is no .*store\.parquet"):
        train(load_recipe(offline))
