"""Stage one of a generative critic: rollouts, a teacher's traces, supervised learning, a critic that starts there."""

import json

import pytest

from llmac.api import run as train
from llmac.cli import main
from llmac.config import load_recipe
from llmac.critic_traces import Tracing, critic_traces
from llmac.errors import ConfigError, DataError
from llmac.sample_rollouts import sample_rollouts

pytestmark = pytest.mark.slow

TEACHER = """
def teach(prompt, state):
    assert state["partial"] in prompt and state["problem"] in prompt
    return f"{state['partial']}<answer>{round(9 * state['outcome'])}</answer>"
"""


@pytest.fixture
def genac(settings, tmp_path):
    """A recipe of `genac`, a file of its rollouts, and a teacher."""
    (tmp_path / "teacher.py").write_text(TEACHER)
    (tmp_path / "critic.jinja").write_text("{{ problem }}{{ partial }}={{ success_rate }}")
    settings["algorithm"] = {"name": "genac", "group_size": 4, "segmenter": "every_token"}
    settings["critic"] = {"name": "generative", "template": str(tmp_path / "critic.jinja")}
    settings["critic"] |= {"max_new_tokens": 8, "reward_range": [0.0, 0.4]}
    recipe = load_recipe(settings)
    sample_rollouts(recipe, tmp_path / "stored.parquet", responses=96)
    return settings


def test_traces_of_a_function_are_data_of_sft(genac, write_recipe, read_metrics, tmp_path, capsys):
    stored, traces = tmp_path / "stored.parquet", tmp_path / "traces.jsonl"
    teacher = f"{tmp_path / 'teacher.py'}:teach"
    words = ["critic-traces", str(write_recipe(genac)), str(stored), "--output", str(traces)]
    assert main([*words, "--teacher-function", teacher, "--states", "36"]) == 0
    assert "traces of" in capsys.readouterr().out
    rows = [json.loads(line) for line in traces.read_text().splitlines()]
    assert 12 <= len(rows) <= 36
    assert {row["score"] for row in rows} > {0, 9}
    mean = {row["prompt"].rpartition("=")[2] for row in rows}
    assert len(mean) == 1
    assert 0 < float(mean.pop()) < 1  # the mean outcome of the file, as a fraction of the range
    sft = genac | {"data": {"name": str(traces), "on_too_long": "skip"}, "algorithm": "sft"}
    del sft["critic"]
    sft["actor"] = {"lr": 1e-2, "prompts_per_step": 4}
    sft["rollout"] = {"max_new_tokens": 20}
    sft["run"] = {"steps": 8, "output": str(tmp_path / "sft")}
    train(load_recipe(sft))
    losses = [line["actor/pg_loss"] for line in read_metrics(tmp_path / "sft")]
    assert losses[-1] < losses[0] - 0.3

    joint = genac | {"critic": genac["critic"] | {"init": str(tmp_path / "sft/final")}}
    joint["run"] = {"steps": 2, "output": str(tmp_path / "joint")}
    train(load_recipe(joint))
    last = read_metrics(tmp_path / "joint")[-1]
    assert last["critic/states"] > 16
    assert last["critic/advantages/mean"] == pytest.approx(0.0, abs=1e-6)
    assert (tmp_path / "joint/final/critic/model.safetensors").is_file()
    assert main([*words, "--teacher-function", teacher]) == 1
    assert "exists; name another file with --output" in capsys.readouterr().err


def test_what_cannot_teach_is_refused_before_anything_is_asked(genac, home, tmp_path):
    stored, traces = tmp_path / "stored.parquet", tmp_path / "traces.jsonl"
    recipe = load_recipe(genac)
    teach = Tracing(function=f"{tmp_path / 'teacher.py'}:teach")
    with pytest.raises(ConfigError, match="has no 'preach'"):
        critic_traces(recipe, stored, traces, Tracing(function=f"{tmp_path / 'teacher.py'}:preach"))
    with pytest.raises(ConfigError, match="is a str, no function"):
        critic_traces(
            recipe, stored, traces, Tracing(function=f"{tmp_path / 'teacher.py'}:__name__")
        )
    with pytest.raises(DataError, match="there is no rollout file"):
        critic_traces(recipe, tmp_path / "none.parquet", traces, teach)
    never = load_recipe(genac | {"critic": genac["critic"] | {"reward_range": [0.0, 9.0]}})
    with pytest.raises(DataError, match=r"responses ended alike \(badly\)"):
        critic_traces(never, stored, traces, teach)
    value = load_recipe(genac | {"critic": {"name": "value_head"}})
    with pytest.raises(ConfigError, match="the recipe's critic is value_head; set critic"):
        critic_traces(value, stored, traces, teach)
    # A model that writes letters only has no scores; its engine is closed all the same.
    with pytest.raises(DataError, match="no trace is left of 6 states: 0 without words, 6 without"):
        critic_traces(recipe, stored, traces, Tracing(model=str(home / "model"), states=6))
    assert not traces.exists()
