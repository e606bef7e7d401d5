"""A second language model, a critic that writes or a partner: what a recipe is told of it before anything starts."""

from dataclasses import dataclass

import pytest

from llmac.algorithms.grpo import GRPO
from llmac.config import load_recipe
from llmac.config.surroundings import check_models
from llmac.config.traits import partner_of
from llmac.errors import ConfigError


@dataclass
class Talking:
    """A plan with a partner."""

    partner_model: str | None
    partner: object = None


@dataclass(frozen=True, kw_only=True)
class Talks(GRPO):
    """A card with such a plan."""

    partner_model: str | None = None

    def plan(self, *, prompts_per_step, sampling):
        return Talking(self.partner_model)


@pytest.fixture
def writing(ppo):
    """PPO with a critic that writes: `writing(learns=False)`."""
    return lambda **critic: ppo | {"critic": {"name": "generative", **critic}}


def refusal(settings, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_recipe(settings, overrides)
    return str(caught.value)


def test_servers_sample_for_one_model(writing, settings):
    servers = "rollout.engine=vllm_server"
    for engine in ("own", "shared"):
        said = refusal(writing(engine=engine), servers)
        assert "critic generative samples from a second language model" in said
        assert "set rollout.engine: vllm or hf" in said
    settings["algorithm"] = Talks()
    assert "Talks samples from a second language model" in refusal(settings, servers)
    load_recipe(settings)
    load_recipe(writing(), ["rollout.engine=vllm"])


def test_a_learner_that_nobody_teaches_is_refused(writing):
    settings = writing() | {"algorithm": {"name": "spo_chain"}}
    assert "set critic.learns: false" in refusal(settings)
    load_recipe(settings, ["critic.learns=false"])


def test_a_policy_that_criticises_has_no_answers_to_evaluate(settings):
    settings["evaluation"] = {"data": {"name": "org/held-out"}, "every": 5}
    for name in ("critique_rl", "critique_filter", "rl4f"):
        said = refusal(settings | {"algorithm": {"name": name}})
        assert f"the policy of {name} is the critic; remove evaluation" in said
    load_recipe(settings | {"algorithm": {"name": "critique_loop"}})


def test_a_schedule_of_two_learners_needs_two(writing):
    assert "run.policy_every has no effect" in refusal(writing(learns=False), "run.policy_every=2")
    load_recipe(writing(), ["run.policy_every=2"])


def test_what_the_critic_reads_and_writes_fits_the_engine(writing):
    engine = ["rollout.engine=vllm", "rollout.max_model_len=2000"]
    assert "at most 976, found null" in refusal(writing(), *engine)
    assert "at most 976, found 977" in refusal(writing(max_prompt_tokens=977), *engine)
    load_recipe(writing(max_prompt_tokens=976), engine)
    assert "leaves 2000 tokens" in refusal(writing(max_new_tokens=2000), *engine)
    load_recipe(writing(), engine[:1])


@pytest.mark.parametrize(("model", "name"), [("./none", "./none"), (None, "org/model")])
def test_a_partner_is_the_policys_model_unless_it_is_named(settings, model, name):
    settings["algorithm"] = Talks(partner_model=model)
    assert partner_of(load_recipe(settings)) == name
    assert partner_of(load_recipe(settings | {"algorithm": "grpo"})) is None


def test_folders_of_second_models_exist(settings, writing, tmp_path, monkeypatch):
    settings["algorithm"] = Talks(partner_model="./none")
    with pytest.raises(ConfigError, match=r"algorithm.partner_model: there is no folder ./none"):
        check_models(load_recipe(settings))
    with pytest.raises(ConfigError, match=r"critic.init: .* is a folder without config.json"):
        check_models(load_recipe(writing(init=str(tmp_path))))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy").mkdir()  # is not what critic.init: policy means
    check_models(load_recipe(writing()))
