"""What `build` ties together: an engine that is closed, asked for its counts, and given its weights again."""

import pytest
import torch

from llmac.api import run
from llmac.config import load_recipe
from llmac.core.measures import Sum
from llmac.engines.hf_engine import HFEngine
from llmac.errors import ConfigError
from llmac.loop import train


class Remembered(HFEngine):
    """An engine with counts of its own that may ask for its weights again; says when it was closed."""

    resend = None
    closed = 0

    def metrics(self):
        return {"rollout/retried_requests": Sum(2.0)}

    def close(self):
        self.closed += 1
        super().close()


@pytest.fixture
def engines(monkeypatch):
    """Engines that were built, in the place of the transformers one."""
    built = []
    monkeypatch.setattr(
        "llmac.engines.hf_engine.HFEngine",
        lambda *arguments, **options: built.append(Remembered(*arguments, **options)) or built[-1],
    )
    return built


def test_an_engine_is_closed_when_who_learns_beside_it_cannot_be_built(settings, engines, tmp_path):
    (tmp_path / "nothing_here").mkdir()
    settings["algorithm"] = {"name": "ppo"}
    settings["critic"] = {"name": "value_head", "init": str(tmp_path / "nothing_here")}
    with pytest.raises(ConfigError, match="nothing_here"):
        run(load_recipe(settings))
    assert [engine.closed for engine in engines] == [1]


def test_an_engine_is_given_the_policys_weights_again_and_its_counts_are_logged(
    settings, engines, monkeypatch, read_metrics, tmp_path
):
    seen = {}

    def watch(run_settings, parts):
        seen.update((name, t.clone()) for name, t in parts.engine.resend())
        seen["policy"] = {n: p.detach().clone() for n, p in parts.actor.model.named_parameters()}
        train(run_settings, parts)

    monkeypatch.setattr("llmac.api.run_loop", watch)
    settings["run"]["steps"] = 2
    run(load_recipe(settings))
    policy = seen.pop("policy")
    assert seen.keys() == policy.keys()
    assert all(torch.equal(seen[name], policy[name]) for name in policy)
    lines = read_metrics(tmp_path / "run")
    assert [line.get("rollout/retried_requests") for line in lines] == [2.0, 2.0]
