"""A critic's weights go into the policy's engine only where they belong, and that is known before weights are read."""

import json
import re

import pytest

from llmac.api import run
from llmac.check import check
from llmac.config import load_recipe
from llmac.errors import ConfigError

from .conftest import character_tokenizer


@pytest.fixture
def shared(settings, home, tmp_path):
    """A recipe whose critic is a copy of the policy without weights, changed: `shared(hidden_size=32)`."""

    def recipe(
        *,
        letters="abcdef=",
        engine="shared",
        template="{{ problem }}{{ partial }}",
        words=8,
        **changes,
    ):
        folder = tmp_path / "second"
        folder.mkdir()
        config = json.loads((home / "model" / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        character_tokenizer(letters).save_pretrained(folder)
        settings["algorithm"] = {"name": "ppo", "group_size": 2}
        critic = {"name": "generative", "init": str(folder), "engine": engine}
        (tmp_path / "t.jinja").write_text(template)
        settings["critic"] = critic | {
            "max_new_tokens": words,
            "template": str(tmp_path / "t.jinja"),
        }
        return load_recipe(settings)

    return recipe


def finding(recipe):
    [found] = [each for each in check(recipe) if each.subject == "second models"]
    return found.verdict, found.detail


def test_a_copy_with_other_weights_may_share_the_engine(shared):
    verdict, detail = finding(shared(max_position_embeddings=64, eos_token_id=5))
    assert verdict == "ok"
    assert "the policy's engine can have the weights of" in detail


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        # The policy's context has 32 tokens, also where the critic's own model has more.
        ({"words": 32}, "of 1 tokens, and the context of .* has 32; lower critic.max_new_tokens"),
        ({"words": 32, "engine": "own"}, "and the context of .*second has 32"),
        ({"words": 32, "max_position_embeddings": 99}, "and the context of .*model has 32"),
        ({"template": "a" * 24 + "{{ problem }}{{ partial }}"}, "its template has 24 without"),
    ],
)
def test_a_critic_whose_words_have_no_room_is_found_before_a_run(shared, asked, message):
    verdict, detail = finding(shared(**asked))
    assert verdict == "wrong"
    assert re.search(message, detail)


def test_an_own_engine_has_the_critics_own_context(shared):
    assert finding(shared(words=32, engine="own", max_position_embeddings=99))[0] == "ok"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, r"hidden_size \(32, not 16\)"),
        ({"tie_word_embeddings": False}, r"tie_word_embeddings \(False, not True\)"),
        ({"rms_norm_eps": 1e-3}, r"rms_norm_eps \(0.001, not 1e-06\)"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_parameters"),
        ({"letters": "fedcba="}, "the policy's tokenizer, and that of .*second is another"),
    ],
)
def test_another_model_or_tokenizer_is_refused_before_any_weights_are_read(
    shared, changes, message, tmp_path, monkeypatch
):
    recipe = shared(**changes)
    verdict, detail = finding(recipe)
    assert verdict == "wrong"

    def never(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("llmac.models.loading.AutoModelForCausalLM.from_pretrained", never)
    with pytest.raises(ConfigError, match=message) as caught:
        run(recipe)
    assert str(caught.value) == detail
    assert "set critic.engine: own" in detail
    assert not (tmp_path / "run/config.yaml").exists()


def test_an_engine_of_its_own_takes_any_model_with_a_tokenizer(shared, tmp_path):
    recipe = shared(engine="own", hidden_size=32, letters="fedcba=")
    assert finding(recipe)[0] == "ok"
    for file in (tmp_path / "second").glob("tokenizer*"):
        file.unlink()
    verdict, detail = finding(recipe)
    assert verdict == "wrong"
    assert "second" in detail


@pytest.fixture
def criticised(settings):
    """Recipes of two players: `criticised("rl4f", refine_tokens=4)`."""

    def recipe(name, **fields):
        settings["algorithm"] = {"name": name, "chat": False, **fields}
        settings["rollout"] = {"max_new_tokens": 4}
        return load_recipe(settings)

    return recipe


SPOKEN = {"critique_prompt": "{question}{answer}=", "refine_prompt": "{question}{answer}{critique}"}


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("rl4f", {"chat": True}, "the tokenizer of .*model has no chat template; set algorithm.ch"),
        ("rl4f", {"answer_tokens": 32}, "an answer may take 32 tokens .* has room for 32, and a q"),
        ("rl4f", {"answer_tokens": 27}, "an answer and a critique of it may take 32 tokens"),
        ("rl4f", {"answer_tokens": 8, "refine_tokens": 20}, "algorithm.refine_tokens or rollout.m"),
        ("critique_rl", {"answer_tokens": 30}, "lower algorithm.answer_tokens or rollout.max_new"),
        ("critique_loop", {"critique_tokens": 24}, "a refinement.* 32 .*algorithm.critique_tokens"),
    ],
)
def test_players_that_cannot_be_spoken_to_are_found_before_a_run(criticised, name, fields, message):
    verdict, detail = finding(criticised(name, **SPOKEN, **fields))
    assert verdict == "wrong"
    assert re.search(message, detail)


def test_players_with_room_for_a_question_are_taken(criticised, settings):
    settings["model"]["lora"] = {"target_modules": ["q_proj"]}
    assert finding(criticised("rl4f", **SPOKEN, answer_tokens=8, refine_tokens=19))[0] == "ok"
    assert finding(criticised("critique_rl", **SPOKEN, answer_tokens=26))[0] == "ok"


def test_models_on_the_hub_are_not_downloaded_to_be_looked_at(settings):
    settings["algorithm"] = {"name": "ppo", "group_size": 2}
    settings["critic"] = {"name": "generative", "init": "org/second"}
    assert finding(load_recipe(settings)) == (
        "not checked",
        "org/second is on the Hub and would have to be downloaded",
    )


def test_runs_with_one_model_have_no_such_finding(settings):
    assert all(each.subject != "second models" for each in check(load_recipe(settings)))
