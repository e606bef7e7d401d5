"""Responses over several steps in real runs: they survive a kill, and whole windows are PPO."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmac.core.protocols import SamplingParams
from llmac.core.types import Finish, Prompt
from llmac.core.windowed import Windowed
from llmac.engines.hf_engine import HFEngine

WINDOWS = {"name": "t_ppo", "window_tokens": 3}


@pytest.fixture
def same_weights():
    """Whether two runs have ended with the same policy and critic, bit by bit."""

    def compare(one, other):
        files = [f"final/{file}" for file in ("model.safetensors", "critic/model.safetensors")]
        for file in files:
            ours, theirs = load_file(one / file), load_file(other / file)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours), file

    return compare


@pytest.mark.slow
def test_unfinished_responses_survive_a_kill_on_two_processes(
    settings, write_recipe, run, read_metrics, same_weights, tmp_path
):
    settings["algorithm"] = WINDOWS
    settings["actor"]["prompts_per_step"] = 8
    settings["run"] |= {"steps": 6, "save_every": 3, "seed": 11}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    recipe = write_recipe(settings)

    code, printed = run(recipe, f"run.output={straight}", processes=2).finish()
    assert code == 0, printed
    metrics = killed / "metrics.jsonl"
    run(recipe, f"run.output={killed}", processes=2).kill_when(
        lambda: metrics.exists() and '"step": 4' in metrics.read_text()
    )
    code, printed = run(recipe, f"run.output={killed}", processes=2).finish()
    assert code == 0, printed

    lines = read_metrics(straight)
    assert read_metrics(killed) == lines
    same_weights(killed, straight)
    assert [line["rollout/finished"] + line["rollout/paused"] for line in lines] == [8] * 6
    assert lines[2]["rollout/paused"] > 0  # what the checkpoint of step 3 carries over
    for line in lines:
        assert line["rollout/tokens"] == line["rollout/sampled_tokens"] <= 3 * 8


@pytest.mark.slow
def test_a_window_for_the_longest_response_is_ppo(
    settings, write_recipe, run, read_metrics, same_weights, tmp_path
):
    settings["run"] |= {"steps": 2}
    whole, ppo = tmp_path / "whole", tmp_path / "ppo"
    for output, algorithm in (
        (whole, {"name": "t_ppo", "window_tokens": settings["rollout"]["max_new_tokens"]}),
        (ppo, {"name": "ppo", "critic_lam": 1.0, "whiten_advantages": False}),
    ):
        recipe = write_recipe(settings | {"algorithm": algorithm})
        code, printed = run(recipe, f"run.output={output}").finish()
        assert code == 0, printed
    same_weights(whole, ppo)
    added = {"rollout/finished", "rollout/paused", "rollout/windows"}
    for ours, theirs in zip(read_metrics(whole), read_metrics(ppo), strict=True):
        assert {name: x for name, x in ours.items() if name not in added} == theirs


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_response_ends_at_its_first_stop_string_wherever_its_windows_end(window, home):
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    engine = HFEngine(AutoModelForCausalLM.from_pretrained(home / "model"), tokenizer)
    plan = Windowed(
        window_tokens=window,
        responses_per_step=24,
        sampling=SamplingParams(max_new_tokens=8, stop=("ab", "ba", "cd", "dc", "eff", "f=")),
        decode=tokenizer.decode,
    )

    class Prompts:
        def take(self, count):
            return [Prompt(id="p", token_ids=(2, 3, 8), source="ab=")] * count

    def score(trajectories):
        return [dataclasses.replace(t, reward=0.0) for t in trajectories]

    ended = []
    for seed in range(12):
        responses, _ = plan.rollout(engine, Prompts(), score, seed=seed)
        ended += [t for t in responses if t.finish is not Finish.PAUSED]

    def stops_in(tokens):
        return any(stop in tokenizer.decode(tokens) for stop in plan.sampling.stop)

    assert len(ended) > 40
    for t in ended:
        said = stops_in(t.response_ids) or t.response_ids[-1] == tokenizer.eos_token_id
        assert (t.finish is Finish.STOP) == said
        assert not stops_in(t.response_ids[:-1])
    stopped = [t for t in ended if stops_in(t.response_ids)]
    across = [t for t in stopped if not stops_in(t.response_ids[t.fresh_from :])]
    assert len(across) > 3, "too few stop strings began in an earlier window"
