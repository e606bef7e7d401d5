"""The whole of training with a real vLLM in process."""

import importlib.util

import psutil
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.mark.parametrize(
    "change",
    [
        {"algorithm": {"name": "grpo", "group_size": 4}},
        {"algorithm": {"name": "ppo", "group_size": 4}, "model": {"lora": {"r": 4, "alpha": 8}}},
    ],
    ids=["grpo", "ppo with adapters"],
)
def test_a_policy_sampled_by_vllm_improves(
    change, settings, vllm_home, write_recipe, run, read_metrics, tmp_path
):
    settings["model"] = {"name": str(vllm_home), **change.pop("model", {})}
    settings |= change
    settings["actor"] = {"lr": 3e-2 if "lora" in settings["model"] else 1e-2, "prompts_per_step": 9}
    settings["rollout"] = {"engine": "vllm", "max_new_tokens": 8, "temperature": 0.9}
    settings["rollout"]["probe_every"] = 1
    settings["evaluation"] = {"data": settings["data"], "samples": 4, "temperature": 1.0}
    settings["run"] |= {"steps": 20}
    code, printed = run(write_recipe(settings)).finish()
    assert code == 0, printed
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(21))
    for line in lines[1:]:
        assert line["actor/sampler_logprob_diff_mean"] < 1e-4
        assert line["actor/sampler_logprob_diff_max"] < 1e-3
        assert line["actor/ratio_max"] == pytest.approx(1.0, abs=1e-3)
    before, after = (lines[step]["eval/held_out/reward/reward"] for step in (0, 20))
    assert after > 1.3 * before


def test_two_processes_sample_with_an_engine_each(
    settings, vllm_home, write_recipe, run, read_metrics, tmp_path
):
    settings["model"] = {"name": str(vllm_home)}
    settings["rollout"] = {"engine": "vllm", "max_new_tokens": 8, "probe_every": 1}
    settings["evaluation"] = {"data": settings["data"], "every": 2}
    settings["run"] |= {"steps": 3}
    code, printed = run(write_recipe(settings), processes=2).finish()
    assert code == 0, printed
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert max(line["actor/sampler_logprob_diff_max"] for line in lines[1:]) < 1e-3


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    "rollout",
    [
        {"engine": "vllm", "tensor_parallel_size": 2},
        {"engine": "vllm_server", "server_count": 1},
    ],
    ids=["one engine over both ranks", "a server"],
)
def test_weights_that_learn_in_shards_are_those_that_sample(
    rollout, settings, vllm_home, write_recipe, run, read_metrics, tmp_path
):
    """DeepSpeed ZeRO-3 on two processes, PPO with its critic; the engine is proved at every step."""
    settings["model"] = {"name": str(vllm_home)}
    settings["algorithm"] = {"name": "ppo", "group_size": 2}
    settings["rollout"] = {**rollout, "max_new_tokens": 8, "probe_every": 1}
    # A rank without a held-out prompt takes part all the same.
    settings["evaluation"] = {"data": {**settings["data"], "limit": 1}, "every": 2}
    settings["run"] |= {"steps": 3}
    code, printed = run(write_recipe(settings), processes=2, configuration="zero3").finish()
    assert code == 0, printed
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert max(line["actor/sampler_logprob_diff_max"] for line in lines[1:]) < 1e-3
    assert max(line["actor/sampler_kl"] for line in lines[1:]) < 1e-6
    if rollout["engine"] == "vllm_server":
        assert sum(line["rollout/server_failures"] for line in lines[1:]) == 0
        assert not [p for p in psutil.process_iter() if str(vllm_home) in " ".join(cmdline_of(p))]


def cmdline_of(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []
