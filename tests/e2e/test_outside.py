"""What a run shows to the outside: trackers, and the Hub."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from llmac.api import run as train
from llmac.config import load_recipe


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_tensorboard_gets_the_numbers_of_metrics_jsonl(settings, tmp_path):
    settings["run"]["trackers"] = ["tensorboard"]
    train(load_recipe(settings))
    (events,) = (tmp_path / "run/trackers").rglob("events.*.0")
    shown = EventAccumulator(str(events.parent))
    shown.Reload()
    written = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward/mean"] for line in written]
    points = shown.Scalars("reward/mean")
    assert [point.step for point in points] == [1, 2, 3, 4]
    assert [point.value for point in points] == pytest.approx(rewards)


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_does_not_cost_the_model(
    settings, write_recipe, run, tmp_path
):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_none"}
    settings["run"] |= {"steps": 1, "push_to_hub": "someone/something"}
    code, printed = run(write_recipe(settings), environment=nowhere).finish()
    assert code == 1
    assert "Traceback" not in printed
    assert "ConfigError: run.push_to_hub: someone/something could not be pushed to" in printed
    assert f"hf upload someone/something {tmp_path / 'run/final'}" in printed
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/final")
    assert (tmp_path / "run/learning_curve.png").exists()
