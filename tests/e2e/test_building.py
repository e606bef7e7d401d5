"""What `build` ties together: an engine that is closed, asked for its counts, and given its weights again."""

from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmac.algorithms.grpo import GRPO
from llmac.api import run
from llmac.build import build
from llmac.config import load_recipe
from llmac.core.collate import collate
from llmac.core.measures import Sum
from llmac.core.types import Finish, Prompt, Trajectory
from llmac.engines.hf_engine import HFEngine
from llmac.errors import ConfigError, DataError
from llmac.loop import train
from llmac.rollout_store import write_rollouts
from llmac.runtime.context import Runtime


class Remembered(HFEngine):
    """An engine with counts of its own that may ask for its weights again; says when it was closed or put to sleep."""

    resend = None
    closed = 0
    slept = 0

    def sleep(self):
        self.slept += 1
        super().sleep()

    def metrics(self):
        return {"rollout/retried_requests": Sum(2.0)}

    def close(self):
        self.closed += 1
        super().close()


@pytest.fixture
def parts_of():
    """What `build` makes of a recipe's settings."""
    made = []

    def parts(settings):
        runtime = Runtime.create(seed=0, output=None)
        made.append(runtime.close)
        built = build(load_recipe(settings), runtime)
        made.extend([built.phases.close, built.score.close, built.log.close, built.engines.close])
        return built

    yield parts
    for close in reversed(made):
        close()


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


def test_a_plan_asks_the_critic_in_its_range_and_beside_an_engine_that_is_awake(
    settings, engines, parts_of
):
    settings["algorithm"] = {"name": "grpo", "group_size": 4, "allocation": "failures"}
    settings["critic"] = {"name": "prompt_value", "reward_range": [-1.0, 3.0]}
    parts = parts_of(settings)
    assert parts.plan.reward_range == (-1.0, 3.0)
    trajectories, _ = parts.plan.rollout(parts.engine, parts.prompts, parts.score, seed=0)
    batch = collate(trajectories, length_limit=parts.plan.length_limit)
    parts.critic.observe(parts.actor.annotate(batch, reference=False))  # now it has a context
    before = engines[0].slept
    assert len(parts.plan.prompt_values(parts.prompts.take(3))) == 3
    assert engines[0].slept == before


def stored(path, token, **about):
    said = Trajectory(
        prompt=Prompt(id="p", token_ids=(2,), source="?"),
        response_ids=(token,),
        action_mask=(True,),
        sampler_logprobs=(-1.0,),
        finish=Finish.STOP,
        group=0,
        reward=1.0,
    )
    write_rollouts(path, [said], about)
    return {"name": "dapo_step", "rollouts": str(path), "step_tokens": 1}


def test_stored_responses_are_replayed_in_an_order_of_the_runs_seed(settings, parts_of, tmp_path):
    settings["algorithm"] = stored(tmp_path / "stored.parquet", token=3)
    settings["run"]["seed"] = 7
    parts = parts_of(settings)
    assert parts.plan.seed == 7
    assert len(parts.plan.stored) == 1


@pytest.mark.parametrize(
    ("token", "about", "message"),
    [
        (
            3,
            {"vocabulary": "of another", "model": "org/other"},
            "sampled by org/other with another",
        ),
        (9999, {}, "has token 9999"),
    ],
)
def test_stored_responses_of_another_vocabulary_are_refused_before_an_engine_is_built(
    settings, engines, parts_of, tmp_path, token, about, message
):
    settings["algorithm"] = stored(tmp_path / "stored.parquet", token, **about)
    with pytest.raises(DataError, match=message):
        parts_of(settings)
    assert engines == []


class Talking:
    """A plan that speaks to the policy and to a model that does not learn."""

    length_limit = 8
    player = None
    partner = None

    def __init__(self, partner_model):
        self.partner_model = partner_model

    def rollout(self, engine, prompts, score, *, seed, sum_across=None):
        raise AssertionError("nobody samples here")


@dataclass(frozen=True, kw_only=True)
class Talks(GRPO):
    """A card with such a plan."""

    partner_model: str = ""

    def plan(self, *, prompts_per_step, sampling):
        return Talking(self.partner_model)


def test_a_plan_that_speaks_is_handed_the_policy_and_its_partner(
    settings, engines, parts_of, vllm_home
):
    settings["algorithm"] = Talks(group_size=4, partner_model=str(vllm_home))
    parts = parts_of(settings)
    policys, partners = engines
    assert parts.plan.player.engine is parts.engine is policys
    assert parts.plan.partner.engine is partners
    assert parts.plan.partner.encode("ab=") == (2, 3, 8)
    sizes = [engine._model.config.hidden_size for engine in engines]
    assert sizes == [16, 64]
    parts.engines.close()
    assert [engine.closed for engine in engines] == [1, 1]


def test_all_engines_are_closed_when_a_partner_cannot_be_loaded(settings, engines, tmp_path):
    nobody = tmp_path / "nobody"  # with a tokenizer, without weights
    AutoTokenizer.from_pretrained(settings["model"]["name"]).save_pretrained(nobody)
    settings["algorithm"] = Talks(group_size=4, partner_model=str(nobody))
    with pytest.raises(ConfigError, match="nobody"):
        run(load_recipe(settings))
    assert [engine.closed for engine in engines] == [1]


def test_a_plan_that_writes_prompts_gets_the_whole_context_of_the_model(
    settings, parts_of, monkeypatch
):
    rooms = []

    def vllm(model, tokenizer, *, max_model_len, **others):
        rooms.append(max_model_len)
        return HFEngine(AutoModelForCausalLM.from_pretrained(model), tokenizer)

    monkeypatch.setattr("llmac.engines.vllm_engine.VLLMEngine", vllm)
    settings["rollout"]["engine"] = "vllm"
    parts_of(settings)
    settings["algorithm"] = Talks(partner_model=settings["model"]["name"])
    parts_of(settings)
    assert rooms[0] >= 3 + 8
    assert rooms[1:] == [None, None]
