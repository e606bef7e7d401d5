"""Two processes on one machine: the same recipe, launched as the documentation says, fails and resumes as one."""

import os
import signal
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmac.models.value_model import ValueModel

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(settings, home, write_recipe):
    """PPO with a critic and an evaluation that two ranks cannot share equally."""
    settings["algorithm"] = {"name": "ppo", "group_size": 2, "kl_coef": 0.01}
    settings["evaluation"] = {
        "data": {"name": str(home / "held_out.jsonl"), "limit": 5},
        "every": 2,
        "samples": 2,
        "temperature": 1.0,
    }
    return write_recipe(settings)


def ranks_of(launcher):
    """Process ids of the training processes under a launcher."""
    return [
        child.pid
        for child in psutil.Process(launcher.pid).children(recursive=True)
        if any(argument.endswith("recipes/train.py") for argument in child.cmdline())
        and "accelerate.commands.launch" not in child.cmdline()
    ]


def wait_for(text, file, seconds=120):
    deadline = time.monotonic() + seconds
    while not (file.exists() and text in file.read_text()):
        assert time.monotonic() < deadline, f"{text} never came"
        time.sleep(0.01)


def test_two_processes_train_evaluate_and_leave_one_record(recipe, run, read_metrics, tmp_path):
    code, printed = run(recipe, processes=2).finish()
    assert code == 0, printed
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval/held_out/pass@1" in line] == [0, 2, 4]
    # 4 prompts x 2 responses of at least one token and at most 8.
    assert all(8 <= line["rollout/tokens"] <= 64 for line in lines[1:])
    final = tmp_path / "run/final"
    assert AutoModelForCausalLM.from_pretrained(final).num_parameters() > 1000
    assert ValueModel.from_pretrained(final / "critic").head.weight.abs().sum() > 0
    assert printed.count("step 4/4") == 1, "both ranks talk"


def test_a_killed_rank_ends_the_job_and_the_job_resumes_bitwise(
    recipe, run, read_metrics, tmp_path
):
    more = ["run.steps=12", "evaluation.data.limit=1", "run.save_every=2"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    code, printed = run(recipe, f"run.output={straight}", *more, processes=2).finish()
    assert code == 0, printed

    job = run(recipe, f"run.output={killed}", *more, processes=2)
    wait_for('"step": 3', killed / "metrics.jsonl")
    _, second = sorted(ranks_of(job.process))
    os.kill(second, signal.SIGKILL)
    since = time.monotonic()
    code, printed = job.finish(seconds=120)
    assert code != 0
    assert time.monotonic() - since < 60, "the other rank waited for the dead one"
    assert not (killed / "final").exists()

    code, printed = run(recipe, f"run.output={killed}", *more, processes=2).finish()
    assert code == 0, printed
    assert "continuing after step" in printed
    assert read_metrics(killed) == read_metrics(straight)
    ours, theirs = (load_file(o / "final/model.safetensors") for o in (killed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_error_on_one_rank_ends_the_job_with_its_message(settings, write_recipe, run, tmp_path):
    """Only the rank whose share has the row fails; the other one must not wait for it for ever."""
    (tmp_path / "picky.py").write_text(
        "def judge(prompt, response, wanted):\n"
        "    if prompt == 'ab=':\n"
        "        raise KeyError('ab')\n"
        "    return 1.0\n"
    )
    settings["reward"] = f"{tmp_path / 'picky.py'}:judge"
    settings["actor"]["prompts_per_step"] = 36
    since = time.monotonic()
    code, printed = run(write_recipe(settings), processes=2).finish()
    assert code != 0
    assert "RewardError: reward function judge raised KeyError: 'ab'" in printed
    assert time.monotonic() - since < 90
    assert not (tmp_path / "run/final").exists()
