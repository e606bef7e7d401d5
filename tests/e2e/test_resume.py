"""Six steps are three steps, a kill -9, and three steps: bitwise."""

import pytest
import torch
from safetensors.torch import load_file


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_killed_run_continues_as_if_nothing_had_happened(
    algorithm, settings, write_recipe, run, read_metrics, tmp_path
):
    settings["algorithm"] = {"name": algorithm, "group_size": 4}
    settings["run"] |= {"steps": 6, "save_every": 3, "seed": 11}
    settings["evaluation"] = {
        "data": settings["data"],
        "every": 2,
        "samples": 2,
        "temperature": 1.0,
    }
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    recipe = write_recipe(settings)

    code, printed = run(recipe, f"run.output={straight}").finish()
    assert code == 0, printed

    # Killed after the checkpoint of step 3, once step 4 is in the metrics: its work is lost and done again.
    metrics = killed / "metrics.jsonl"
    run(recipe, f"run.output={killed}").kill_when(
        lambda: metrics.exists() and '"step": 4' in metrics.read_text()
    )
    code, printed = run(recipe, f"run.output={killed}").finish()
    assert code == 0, printed

    assert read_metrics(killed) == read_metrics(straight)
    assert [line["step"] for line in read_metrics(killed)] == [0, 1, 2, 3, 4, 5, 6]
    files = ["final/model.safetensors"]
    files += ["final/critic/model.safetensors", "final/critic/value_head.safetensors"] * (
        algorithm == "ppo"
    )
    for file in files:
        ours, theirs = load_file(killed / file), load_file(straight / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), file


@pytest.mark.slow
def test_a_finished_run_says_so_and_a_longer_one_goes_on(settings, write_recipe, run, read_metrics):
    recipe = write_recipe(settings)
    assert run(recipe).finish()[0] == 0
    code, printed = run(recipe).finish()
    assert code == 0
    assert "all 4 steps of this run are done; raise run.steps to train longer" in printed
    code, printed = run(recipe, "run.steps=6").finish()
    assert code == 0, printed
    assert [line["step"] for line in read_metrics(settings["run"]["output"])] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_another_configuration_in_the_same_folder_is_refused_and_nothing_is_overwritten(
    settings, write_recipe, run, tmp_path
):
    recipe = write_recipe(settings)
    assert run(recipe).finish()[0] == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    code, printed = run(recipe, "algorithm.group_size=2").finish()
    assert code == 1
    assert "CheckpointError" in printed
    assert "Traceback" not in printed
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
