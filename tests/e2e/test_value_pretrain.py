"""Sampled, stored, learned from, and started from: a critic before the policy moves."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmac.api import run as train
from llmac.cli import main
from llmac.config import load_recipe
from llmac.config.cards import card_class
from llmac.core.types import Finish, Prompt, Trajectory
from llmac.critics import CRITICS
from llmac.critics.head_config import HeadConfig
from llmac.errors import ConfigError, DataError
from llmac.models.value_model import ValueModel
from llmac.pretraining.file import examples_in
from llmac.rollout_store import read_rollouts, read_store, vocabulary_mark, write_rollouts
from llmac.sample_rollouts import sample_rollouts
from llmac.value_pretrain import Pretraining, value_pretrain

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EOS, LETTERS = 1, range(2, 8)

FIRST_LETTER = '''
def early(prompt, response):
    """1 if the response begins with a letter of the first half of the alphabet."""
    return float(response[:1] in ("a", "b", "c"))
'''

HEADS = {
    "value_head": {"heads": 2, "combine": "min"},
    "bernoulli": {},
    "hl_gauss": {},
    "two_hot": {},
    "c51": {},
    "quantile": {},
    "gaussian": {},
    "outcome_classes": {"rewards": [0.0, 1.0]},
    "code_outcomes": {"rewards": [0.0, 1.0], "reward_range": [0.0, 1.0]},
}


@pytest.fixture
def ppo(settings, tmp_path):
    """A recipe whose outcome is decided by the first letter of the response."""
    (tmp_path / "early.py").write_text(FIRST_LETTER)
    settings["reward"] = f"{tmp_path / 'early.py'}:early"
    settings["algorithm"] = {"name": "ppo", "group_size": 4, "whiten_advantages": False}
    settings["critic"] = {"name": "value_head", "lr": 1e-2, "value_clip": None}
    return settings


def told(count, *, prompts=20, seed=0, repeated=False):
    """Responses of three to six letters, judged by their first; `repeated`: they are all the same letter."""
    draw = random.Random(seed)
    for index in range(count):
        letters = [draw.choice(LETTERS) for _ in range(draw.randint(3, 6))]
        if repeated:
            letters = letters[:1] * len(letters)
        prompt = index % prompts
        ids = (2 + prompt % 6, 2 + prompt // 6, 8)
        yield Trajectory(
            prompt=Prompt(id=str(prompt), token_ids=ids, source="?"),
            response_ids=(*letters, EOS),
            action_mask=(True,) * (len(letters) + 1),
            sampler_logprobs=(-1.0,) * (len(letters) + 1),
            finish=Finish.STOP,
            group=prompt,
            reward=float(letters[0] < 5),
        )


@pytest.fixture
def stored(tmp_path):
    """A file of such responses."""
    path = tmp_path / "rollouts.parquet"
    write_rollouts(path, list(told(320)))
    return path


def test_the_command_samples_whole_groups_and_judges_them(ppo, write_recipe, tmp_path, capsys):
    recipe, path = write_recipe(ppo), tmp_path / "sampled.parquet"
    command = ["rollouts", str(recipe), "rollout.max_new_tokens=5", "--responses", "42"]
    assert main([*command, "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    rollouts = read_rollouts(path)
    assert len(rollouts) == 44
    assert [t.group for t in rollouts] == [g for g in range(11) for _ in range(4)]
    assert len({t.prompt.id for t in rollouts}) == 11
    assert {t.reward for t in rollouts} == {0.0, 1.0}
    assert all(t.reward == float(t.response_text[:1] in "abc") for t in rollouts if t.response_text)
    assert all(t.prompt.columns["wanted"] == t.prompt.source[0] for t in rollouts)
    assert all(len(t.response_ids) == len(t.sampler_logprobs) <= 5 for t in rollouts)
    mean = sum(t.reward for t in rollouts) / 44
    tokens = sum(len(t.response_ids) for t in rollouts)
    assert f"44 responses to 11 prompts, mean reward {mean:.4g}" in printed
    assert f"{tokens} tokens in" in printed
    assert read_store(path).about["max_new_tokens"] == 5
    assert not (tmp_path / "run").exists(), "the run's folder is not sampling's"

    assert main([*command, "--output", str(path)]) == 1
    assert "sampled.parquet exists" in capsys.readouterr().err
    again = tmp_path / "again.parquet"
    assert main([*command, "--output", str(again)]) == 0
    assert read_rollouts(again) == rollouts


def test_a_critic_that_was_pretrained_knows_at_step_one_what_a_fresh_one_does_not(
    ppo, read_metrics, tmp_path
):
    ppo["run"]["steps"] = 1
    path = tmp_path / "sampled.parquet"
    sample_rollouts(load_recipe(ppo), path, responses=1000)
    how = Pretraining(epochs=5, held_out=0.2)
    done = value_pretrain(load_recipe(ppo), path, tmp_path / "vp", how)
    assert done.held_out["held_out/all/explained_variance"] > 0.3

    explained = {}
    for name, start in (("fresh", {}), ("warm", {"init": str(done.critic)})):
        ppo["critic"] |= start
        ppo["run"]["output"] = str(tmp_path / name)
        train(load_recipe(ppo))
        [step] = read_metrics(tmp_path / name)
        explained[name] = step["critic/vf_explained_var"]
    assert explained["fresh"] == pytest.approx(0.0, abs=1e-5)
    assert explained["warm"] > 0.3


def test_every_epoch_is_reported_and_the_best_is_kept(ppo, stored, tmp_path):
    done = value_pretrain(load_recipe(ppo), stored, tmp_path / "vp", Pretraining(epochs=7))
    lines = [json.loads(line) for line in (tmp_path / "vp/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(done.epochs + 1))
    errors = [line["held_out/all/squared_error"] for line in lines]
    assert done.epoch == errors.index(min(errors)) > 0
    assert done.held_out["held_out/all/squared_error"] == min(errors)
    # Nothing is known before the first letter, and everything after it.
    best = lines[done.epoch]
    assert best["held_out/last/explained_variance"] > 0.8
    assert best["held_out/last/auc_within_prompts"] > 0.95
    assert best["held_out/first/explained_variance"] < best["held_out/last/explained_variance"]
    assert lines[1]["critic/lr"] == 1e-2
    assert "critic/vf_loss" in lines[1]
    assert "critic/vf_loss" not in lines[0]

    model = ValueModel.from_pretrained(done.critic)
    assert sum(p.numel() for p in model.parameters()) > 1000
    assert sorted(p.name for p in (tmp_path / "vp").iterdir()) == [
        "config.yaml",
        "critic",
        "metrics.jsonl",
    ]


@pytest.mark.parametrize("name", HEADS)
def test_any_head_learns_and_starts_a_run_as_good_as_it_was_measured(name, ppo, tmp_path):
    """Going on from the kept critic, epoch 0 says what the best epoch said."""
    path = tmp_path / "repeated.parquet"
    write_rollouts(path, list(told(160, repeated=True)))
    ppo["critic"] = {"name": name, "lr": 1e-2, **HEADS[name]}
    if name == "code_outcomes":  # judges whole responses, which is of use to one card only
        ppo["algorithm"] = "coderl"
    done = value_pretrain(load_recipe(ppo), path, tmp_path / "vp", Pretraining(epochs=5))
    assert done.held_out["held_out/last/explained_variance"] > 0.5
    ppo["critic"]["init"] = str(done.critic)
    value_pretrain(load_recipe(ppo), path, tmp_path / "on", Pretraining(epochs=1))
    first, *_ = (tmp_path / "on/metrics.jsonl").read_text().splitlines()
    found = json.loads(first)
    for metric, value in done.held_out.items():
        assert found[metric] == pytest.approx(value, abs=1e-6), metric


def test_the_cases_cover_every_head_of_the_registry():
    heads = {name for name in CRITICS if issubclass(card_class("critic", name), HeadConfig)}
    assert set(HEADS) == heads


def test_training_stops_when_it_no_longer_helps(ppo, tmp_path):
    """Outcomes by chance: nothing can be learned that holds elsewhere."""
    draw = random.Random(1)
    rollouts = [dataclasses.replace(t, reward=draw.random()) for t in told(80)]
    write_rollouts(tmp_path / "noise.parquet", rollouts)
    how = Pretraining(epochs=30, patience=2, held_out=0.5)
    done = value_pretrain(load_recipe(ppo), tmp_path / "noise.parquet", tmp_path / "vp", how)
    assert done.epochs == done.epoch + 2 < 30


def test_the_schedule_ends_with_the_last_epoch(ppo, stored, tmp_path):
    ppo["critic"] |= {"schedule": "linear", "epochs": 2}
    how = Pretraining(epochs=3, patience=3, held_out=0.2)
    value_pretrain(load_recipe(ppo), stored, tmp_path / "vp", how)
    lines = [json.loads(line) for line in (tmp_path / "vp/metrics.jsonl").read_text().splitlines()]
    # 256 rows in 16 chunks of 16, 2 passes of 2 minibatches: 64 steps an epoch, 192 in all
    assert [line["critic/lr"] for line in lines[1:]] == pytest.approx(
        [1e-2 * (1 - last / 192) for last in (63, 127, 191)]
    )


def test_the_same_seed_gives_the_same_weights_and_another_one_others(ppo, stored, tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ppo["run"]["seed"] = seed
        done = value_pretrain(load_recipe(ppo), stored, tmp_path / name, Pretraining(epochs=1))
        weights.append(load_file(done.critic / "model.safetensors"))
    first, again, other = weights
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def launched(configuration):
    """The start of a command on two processes."""
    return [
        *[sys.executable, "-m", "accelerate.commands.launch"],
        *["--config_file", str(ROOT / f"recipes/accelerate/{configuration}.yaml")],
        *["--num_processes", "2", "--main_process_port", "0"],
    ]


def started(*command):
    """Run a command to its end in a process of its own; returns what it printed."""
    done = subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pretrain(launcher, recipe, rollouts, output):
    """Two epochs of `recipes/value_pretrain.py`, launched; returns what it printed."""
    command = ["recipes/value_pretrain.py", recipe, rollouts, "--epochs", 2, "--output", output]
    return started(*launcher, *command)


def test_two_processes_learn_what_one_does(ppo, write_recipe, tmp_path):
    """The sharding law: rows that do not divide, minibatches that do not divide, from the first step on."""
    write_rollouts(tmp_path / "odd.parquet", list(told(45, prompts=11)))
    ppo["actor"] |= {"minibatches": 3, "prompts_per_step": 6}  # 41 rows: minibatches of 7 and 6
    ppo["critic"]["lr"] = 1e-3
    recipe = write_recipe(ppo)
    pretrain([sys.executable], recipe, tmp_path / "odd.parquet", tmp_path / "one")
    printed = pretrain(launched("ddp"), recipe, tmp_path / "odd.parquet", tmp_path / "two")
    assert printed.count("Train with critic.init") == 1, "both ranks talk"
    one, two = (load_file(tmp_path / n / "critic/model.safetensors") for n in ("one", "two"))
    start = load_file(f"{ppo['model']['name']}/model.safetensors")
    assert all((one[n] - start[f"model.{n}"]).abs().max() > 1e-3 for n in one), "nothing moved"
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    lines = [
        json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[-1])
        for n in ("one", "two")
    ]
    assert lines[0].keys() == lines[1].keys()
    for name in lines[0]:
        if not name.startswith("timing_s/"):
            assert lines[1][name] == pytest.approx(lines[0][name], rel=1e-3, abs=1e-4), name


def test_a_head_on_the_policys_trunk_learns_and_leaves_the_trunk_alone(ppo, tmp_path, home):
    write_rollouts(tmp_path / "repeated.parquet", list(told(160, repeated=True)))
    ppo["critic"] |= {"trunk": "shared", "lr": 3e-2}
    recipe, how = load_recipe(ppo), Pretraining(epochs=4)
    done = value_pretrain(recipe, tmp_path / "repeated.parquet", tmp_path / "vp", how)
    assert done.held_out["held_out/last/explained_variance"] > 0.3
    policy, trunk = (
        load_file(home / "model/model.safetensors"),
        load_file(done.critic / "model.safetensors"),
    )
    assert all(torch.equal(trunk[name], policy[f"model.{name}"]) for name in trunk)

    ppo["critic"]["init"] = str(done.critic)
    again = value_pretrain(
        load_recipe(ppo), tmp_path / "repeated.parquet", tmp_path / "again", Pretraining(epochs=1)
    )
    first = json.loads((again.critic.parent / "metrics.jsonl").read_text().splitlines()[0])
    for name, value in done.held_out.items():
        assert first[name] == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize(
    ("critic", "fits"),
    [
        ({"name": "hl_gauss"}, False),
        ({"name": "bernoulli"}, False),
        ({"name": "two_hot"}, False),
        ({"name": "value_head", "bounded": True}, False),
        ({"name": "value_head"}, True),
        ({"name": "quantile"}, True),
        ({"name": "hl_gauss", "reward_range": [-1.0, 3.0]}, True),
        ({"name": "bernoulli", "reward_range": [-1.0, 3.0]}, True),
    ],
)
def test_a_head_must_be_able_to_say_the_rewards_of_the_file(critic, fits, ppo, tmp_path):
    path = tmp_path / "wide.parquet"
    rows = [dataclasses.replace(t, reward=4 * t.reward - 1) for t in told(20)]
    write_rollouts(path, rows)
    ppo["critic"] = critic
    if fits:
        assert examples_in(path, load_recipe(ppo))
        return
    message = r"cannot say -1, a reward in .*from -1 to 3: let critic.reward_range cover them"
    with pytest.raises(ConfigError, match=message):
        examples_in(path, load_recipe(ppo))


@pytest.mark.parametrize("name", ["group_mean", "prompt_value"])
def test_critics_that_do_not_learn_from_returns_say_so(name, ppo, stored, tmp_path):
    ppo["critic"] = {"name": name}
    with pytest.raises(ConfigError, match=f"critic {name} does not learn from returns"):
        value_pretrain(load_recipe(ppo), stored, tmp_path / "vp")


def test_what_cannot_work_is_said_before_a_model_is_loaded(ppo, stored, tmp_path, home):
    def refused(error, match, *, rollouts=stored, how=None, **sections):
        changed = {n: v for n, v in (ppo | sections).items() if v is not None}
        recipe = load_recipe(changed)
        with pytest.raises(error, match=match):
            value_pretrain(recipe, rollouts, tmp_path / "vp", how)
        assert not (tmp_path / "vp").exists()

    grpo = {"name": "grpo", "group_size": 4}
    refused(ConfigError, "grpo uses no critic", algorithm=grpo, critic=None)
    shared = {"name": "value_head", "trunk": "shared", "detach_trunk": False}
    refused(ConfigError, "detach_trunk: false would move the policy", critic=shared)
    refused(DataError, "there is no rollout file", rollouts=tmp_path / "nothing.parquet")

    other = tmp_path / "other.parquet"
    write_rollouts(other, list(told(8)), {"model": "m", "vocabulary": vocabulary_mark({"x": 0})})
    refused(DataError, "sampled by m with another vocabulary", rollouts=other)
    far = [dataclasses.replace(t, response_ids=(900,) * len(t.response_ids)) for t in told(8)]
    write_rollouts(other, far)
    refused(DataError, "has token 900, which .* has no embedding for", rollouts=other)


@pytest.mark.parametrize(
    ("settings_", "match"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, found 0"),
        ({"patience": 0}, "--patience must be at least 1"),
        ({"held_out": 0.0}, "--held-out is a fraction of the prompts between 0 and 1"),
        ({"held_out": 1.0}, "--held-out is a fraction"),
        ({"lam": 1.5}, r"--lam must be in \[0, 1\], found 1.5"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings_, match):
    with pytest.raises(ConfigError, match=match):
        Pretraining(**settings_)


def test_rewards_that_are_all_equal_are_warned_of_with_the_number(ppo, tmp_path, caplog):
    rollouts = [dataclasses.replace(t, reward=0.25) for t in told(40)]
    write_rollouts(tmp_path / "equal.parquet", rollouts)
    done = value_pretrain(load_recipe(ppo), tmp_path / "equal.parquet", tmp_path / "vp")
    assert "all 40 responses have the reward 0.25; nothing tells them apart" in caplog.text
    assert done.held_out["held_out/all/squared_error"] == pytest.approx(0.0, abs=1e-6)


def test_an_older_critic_is_not_overwritten(ppo, stored, tmp_path):
    (tmp_path / "vp/critic").mkdir(parents=True)
    with pytest.raises(ConfigError, match="vp/critic exists; name another folder with --output"):
        value_pretrain(load_recipe(ppo), stored, tmp_path / "vp")


def test_the_record_of_a_run_is_not_overwritten(ppo, stored, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match=r"metrics.jsonl of an earlier run, .* with --output"):
        value_pretrain(load_recipe(ppo), stored, tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").read_text() == "mine"


@pytest.mark.deepspeed
def test_a_critic_in_shards_is_saved_whole_and_equal(ppo, write_recipe, tmp_path):
    """ZeRO-3 on two processes: the weights of one process without it, to rounding."""
    pytest.importorskip("deepspeed")
    write_rollouts(tmp_path / "odd.parquet", list(told(45, prompts=11)))
    ppo["critic"] |= {"lr": 1e-3, "trunk": "own"}
    recipe = write_recipe(ppo)
    for name, launcher in (("one", [sys.executable]), ("shards", launched("zero3"))):
        pretrain(launcher, recipe, tmp_path / "odd.parquet", tmp_path / name)
    one, shards = (ValueModel.from_pretrained(tmp_path / n / "critic") for n in ("one", "shards"))
    for (name, ours), theirs in zip(one.named_parameters(), shards.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.vllm
def test_another_engine_samples_the_same_kind_of_file(ppo, write_recipe, vllm_home, tmp_path):
    pytest.importorskip("vllm")
    ppo["model"] = {"name": str(vllm_home)}
    ppo["rollout"] |= {"engine": "vllm"}
    command = ["rollouts", write_recipe(ppo), "--responses", 8, "--output", tmp_path / "r.parquet"]
    printed = started(sys.executable, "-m", "llmac.cli", *command)
    assert "8 responses to 2 prompts" in printed
    rollouts = read_rollouts(tmp_path / "r.parquet")
    assert len(rollouts) == 8
    assert all(max(t.sampler_logprobs) < 0 for t in rollouts)
    assert {t.reward for t in rollouts} <= {0.0, 1.0}
