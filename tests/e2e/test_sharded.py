"""Whole runs with sharded weights, launched as the documentation says: they learn, stop, continue and are saved."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmac.models.value_model import ValueModel

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]

PPO = {"name": "ppo", "group_size": 2, "kl_coef": 0.01}


def check_final(output):
    """Policy and critic load, and have learned."""
    policy = AutoModelForCausalLM.from_pretrained(output / "final")
    assert policy.num_parameters() > 1000
    assert ValueModel.from_pretrained(output / "final/critic").head.weight.abs().sum() > 0


def test_a_killed_run_continues_bitwise_and_shards_fit_only_their_own_job(
    settings, home, write_recipe, run, read_metrics, tmp_path
):
    settings["algorithm"] = PPO
    settings["evaluation"] = {"data": {"name": str(home / "held_out.jsonl")}, "every": 2}
    settings["run"]["steps"] = 3
    recipe = write_recipe(settings)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    zero3 = {"processes": 2, "configuration": "zero3"}

    code, printed = run(recipe, f"run.output={straight}", "run.save_every=9", **zero3).finish()
    assert code == 0, printed
    job = run(recipe, f"run.output={killed}", **zero3)
    job.kill_when(lambda: (killed / "checkpoints/step-00000002").exists())

    code, printed = run(recipe, f"run.output={killed}").finish()
    assert code != 0
    assert "was saved by a sharded run" in printed
    code, printed = run(recipe, f"run.output={killed}", processes=2, configuration="zero2").finish()
    assert code != 0
    assert "holds shards of ZeRO stage 3 on 2 processes, and this run has ZeRO stage 2" in printed

    code, printed = run(recipe, f"run.output={killed}", **zero3).finish()
    assert code == 0, printed
    assert "continuing after step 2" in printed
    assert read_metrics(killed) == read_metrics(straight)
    assert [line["step"] for line in read_metrics(killed)] == [0, 1, 2, 3]
    for part in ("final", "final/critic"):
        ours, theirs = (load_file(o / part / "model.safetensors") for o in (killed, straight))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    check_final(killed)


def test_a_run_under_fsdp2_leaves_the_same_folders(settings, write_recipe, run, tmp_path):
    """In bfloat16, beside a value head that stays in float32."""
    settings["model"]["dtype"] = "bfloat16"
    settings["algorithm"] = PPO
    settings["run"] |= {"steps": 2, "ratio_tolerance": 0.05}
    code, printed = run(write_recipe(settings), processes=2, configuration="fsdp2").finish()
    assert code == 0, printed
    check_final(tmp_path / "run")


def test_deepspeed_in_one_process_trains_and_wants_each_weight_in_one_engine(
    settings, write_recipe, run, tmp_path
):
    one = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    settings["algorithm"] = PPO
    settings["run"]["steps"] = 1
    code, printed = run(write_recipe(settings), environment=one).finish()
    assert code == 0, printed
    check_final(tmp_path / "run")
    settings["critic"] = {"name": "value_head", "trunk": "shared", "detach_trunk": False}
    settings["run"]["output"] = str(tmp_path / "other")
    code, printed = run(write_recipe(settings), environment=one).finish()
    assert code == 1
    assert "two optimizers would own the same weights" in printed


def test_low_precision_weights_learn_in_small_steps_under_deepspeed(
    settings, home, write_recipe, run, tmp_path
):
    """Steps far below bfloat16's resolution: a float32 copy in the optimizer adds them up."""
    settings["model"]["dtype"] = "bfloat16"
    settings["algorithm"] = PPO
    settings["critic"] = {"name": "value_head", "lr": 1e-4}
    settings["actor"] = {"lr": 1e-4, "prompts_per_step": 4, "minibatches": 2}
    settings["run"] |= {"steps": 5, "ratio_tolerance": 0.05}
    code, printed = run(write_recipe(settings), processes=2, configuration="zero3").finish()
    assert code == 0, printed
    before = AutoModelForCausalLM.from_pretrained(home / "model").to(torch.bfloat16).state_dict()
    after = load_file(tmp_path / "run/final/model.safetensors")
    moved = [(after[name] != before[name]).float().mean() for name in after]
    assert all(weight.dtype == torch.bfloat16 for weight in after.values())
    assert sum(moved) / len(moved) > 0.2


def test_adapters_are_trained_on_a_sharded_base(settings, write_recipe, run, tmp_path):
    settings["model"] |= {"lora": {"r": 4, "alpha": 8}, "gradient_checkpointing": True}
    settings["algorithm"] = PPO
    settings["critic"] = {"name": "value_head", "lr": 1e-3, "lora": True}
    settings["run"]["steps"] = 2
    code, printed = run(write_recipe(settings), processes=2, configuration="zero3").finish()
    assert code == 0, printed
    final = tmp_path / "run/final"
    adapter = load_file(final / "adapter/adapter_model.safetensors")
    assert any("lora_B" in name and weight.abs().sum() > 0 for name, weight in adapter.items())
    merged = AutoModelForCausalLM.from_pretrained(final).state_dict()
    base = AutoModelForCausalLM.from_pretrained(settings["model"]["name"]).state_dict()
    assert any(not torch.equal(merged[name], base[name]) for name in base)
    ValueModel.from_pretrained(final / "critic")
