"""Trees in real runs: they resume bitwise, replay what they keep, and no rank waits for one that learned nothing."""

import dataclasses
import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmac.api import run as train
from llmac.build import build
from llmac.config import load_recipe
from llmac.core.collate import collate
from llmac.core.spans import span_values
from llmac.errors import ConsistencyError
from llmac.runtime.context import Runtime

TREES = {
    "name": "spo_tree",
    "branching": [3, 2, 2],
    "segment_tokens": 2,
    "edges_per_step": 24,
    "edges_per_prompt": 5,
    "replay_steps": 2,
}


@pytest.fixture
def settings(settings):
    """Four trees a step, three steps."""
    settings["algorithm"] = dict(TREES)
    settings["run"] |= {"steps": 3, "save_every": 1}
    return settings


@pytest.fixture
def parts(settings):
    """What `build` makes of the recipe, with the weights where the engine samples them."""
    runtime = Runtime.create(seed=0, output=None)
    built = build(load_recipe(settings), runtime)
    built.engine.load_weights(built.actor.weights(), 0)
    yield built
    for closing in (built.engine, built.log, built.score, built.phases, runtime):
        closing.close()


@pytest.mark.slow
def test_a_run_with_replay_resumes_bitwise(settings, read_metrics, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train(load_recipe(settings, [f"run.output={straight}"]))
    # As if it had been killed in the third step, with edges of the second waiting.
    shutil.copytree(straight, killed)
    shutil.rmtree(killed / "final")
    [last] = [folder for folder in (killed / "checkpoints").iterdir() if folder.name.endswith("3")]
    shutil.rmtree(last)
    train(load_recipe(settings, [f"run.output={killed}"]))

    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (killed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    before = load_file(Path(settings["model"]["name"]) / "model.safetensors")
    assert any(not torch.equal(before[name], theirs[name]) for name in before)
    lines = read_metrics(straight)
    assert read_metrics(killed) == lines
    assert lines[0]["rollout/edges_replayed"] == 0
    for line in lines:
        assert line["rollout/edges"] <= 4 * (3 + 6 + 12)
        assert line["rollout/tokens"] < line["rollout/sampled_tokens"]
        assert line["rollout/edges_waiting"] > 0
        assert 0 < line["reward/mean"] < 1
        assert 0 < line["rollout/distinct_tokens"] < 1
    assert lines[2]["rollout/edges_replayed"] > 0  # 5 of each of 4 prompts are this step's


@pytest.mark.slow
def test_a_rank_whose_edges_say_nothing_keeps_step_with_the_other(
    settings, write_recipe, run, read_metrics, tmp_path
):
    (tmp_path / "partial.py").write_text(
        "import os\n"
        "def judge(prompt, response, wanted):\n"
        "    constant = os.environ['RANK'] == '1'\n"
        "    return 0.5 if constant else response.count(wanted) / max(len(response), 1)\n"
    )
    settings["reward"] = f"{tmp_path / 'partial.py'}:judge"
    code, printed = run(write_recipe(settings), processes=2).finish()
    assert code == 0, printed
    lines = read_metrics(settings["run"]["output"])
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["rollout/edges_dropped"] > line["rollout/edges"] / 3 for line in lines)
    assert all(line["rollout/edges_missing"] >= 12 for line in lines)
    assert all(line["rollout/edges_waiting"] > 0 for line in lines)
    for line in lines:
        assert 1 <= line["rollout/token_imbalance"] <= line["rollout/token_imbalance_sampled"]


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_grows_trees(settings, vllm_home, write_recipe, run, read_metrics):
    settings["model"] = {"name": str(vllm_home)}
    settings["rollout"]["engine"] = "vllm"
    code, printed = run(write_recipe(settings)).finish()
    assert code == 0, printed
    lines = read_metrics(settings["run"]["output"])
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[2]["rollout/edges_replayed"] > 0
    # Of fresh edges, prefixes included or not.
    assert all(line["actor/sampler_logprob_diff_max"] < 1e-3 for line in lines)


def test_replayed_rows_keep_the_log_probs_they_were_sampled_with(parts):
    rows, _ = parts.plan.rollout(parts.engine, parts.prompts, parts.score, seed=0)
    wrong = [
        dataclasses.replace(
            row, age=index % 2, sampler_logprobs=tuple(x - 0.5 for x in row.sampler_logprobs)
        )
        for index, row in enumerate(rows)
    ]
    batch = collate(wrong, length_limit=8)
    looked = parts.actor.annotate(batch, reference=True)
    old, replayed = looked.old_logprobs, looked.replayed
    assert 0 < replayed.sum() < len(wrong)
    assert torch.equal(old[replayed], batch.sampler_logprobs[replayed])
    gap = (old - batch.sampler_logprobs)[~replayed][batch.action_mask[~replayed]]
    assert torch.allclose(gap, torch.full_like(gap, 0.5), atol=1e-4)  # the trainer's

    # Fresh rows like these are a reason to doubt that the trainer is where it was; replayed ones are none.
    credit = parts.algorithm.credit(looked, span_values(looked))
    young = tuple(dataclasses.replace(row, age=0) for row in looked.trajectories)
    with pytest.raises(ConsistencyError, match="the policy has not moved since"):
        parts.actor.update(dataclasses.replace(looked, trajectories=young), credit, parts.algorithm)
    parts.actor.update(looked, credit, parts.algorithm)
