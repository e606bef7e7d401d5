"""A critic that writes beside a frozen actor, with real engines: it runs, resumes, and starts stage 2 where 1 ended."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from llmac.api import run as train
from llmac.config import load_recipe
from llmac.core.critique_rows import REFINED
from llmac.rollout_store import read_rollouts
from llmac.sample_rollouts import sample_rollouts

SPOKEN = {
    "chat": False,
    "critique_prompt": "{question}{answer}=",
    "refine_prompt": "{question}{answer}{critique}",
    "solved_at": 0.2,
    "verdict_marker": "e",
    "right_word": "a",
    "wrong_word": "b",
}
CRITIC = {"name": "critique_rl", "group_size": 4, "answer_temperature": 1.0, "answer_tokens": 4}


@pytest.fixture
def recipe(settings):
    """Stage 1; its critic writes a few letters."""
    settings["algorithm"] = {**CRITIC, **SPOKEN}
    settings["rollout"] = {"max_new_tokens": 2}
    settings["run"] |= {"steps": 2, "save_every": 1}
    return settings


def outputs(read_metrics, settings, step):
    return next(line for line in read_metrics(settings["run"]["output"]) if line["step"] == step)


@pytest.mark.slow
def test_stage_2_stays_close_to_the_critic_that_stage_1_has_left(
    recipe, tmp_path, read_metrics, home
):
    recipe["actor"] |= {"minibatches": 1, "prompts_per_step": 8, "lr": 1e-2}
    recipe["algorithm"]["group_size"] = 16  # enough that somebody happens to write a verdict
    recipe["run"] |= {"steps": 3, "save_every": 3}
    train(load_recipe(recipe))
    first = outputs(read_metrics, recipe, 3)
    assert first["actor/ref_kl"] != 0  # the critic has moved
    assert "critique/refined_accuracy" not in first  # nobody refines
    critic, began = (
        load_file(f / "model.safetensors") for f in (tmp_path / "run/final", home / "model")
    )
    assert any(not torch.equal(critic[name], began[name]) for name in began)

    recipe["model"] = {"name": str(tmp_path / "run/final")}
    recipe["algorithm"] |= {
        "stage": 2,
        "refine_tokens": 4,
        "form": "gated",
        "partner_model": str(home / "model"),
    }
    recipe["run"] |= {"output": str(tmp_path / "second"), "steps": 1}
    train(load_recipe(recipe))
    second = outputs(read_metrics, recipe, 1)
    assert second["actor/ref_kl"] == pytest.approx(0, abs=1e-6)
    assert second["rollout/sampled_tokens"] > second["critique/partner_tokens"] > 0
    # 8 prompts, each with an answer of at most 4 tokens, and 16 refinements of at most 4.
    assert second["critique/partner_tokens"] <= 8 * (4 + 16 * 4)
    assert -1 <= second["reward/mean"] <= 1.2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["critique_rl", "critique_loop"])
def test_a_run_of_two_players_continues_as_if_nothing_had_happened(
    name, recipe, tmp_path, read_metrics
):
    if name == "critique_loop":
        recipe["algorithm"] = {
            "name": name,
            "group_size": 3,
            "critique_tokens": 2,
            "refinements_per_critique": 2,
            "learn_as": "both",
            **SPOKEN,
        }
        recipe["rollout"] = {"max_new_tokens": 4}
    recipe["actor"]["prompts_per_step"] = 2
    recipe["run"]["steps"] = 3
    train(load_recipe(recipe))
    straight = read_metrics(recipe["run"]["output"])
    assert straight[-1]["rollout/sampled_tokens"] > 0
    recipe["run"] |= {"output": str(tmp_path / "resumed"), "steps": 2}
    train(load_recipe(recipe))
    recipe["run"]["steps"] = 3
    train(load_recipe(recipe))
    assert read_metrics(recipe["run"]["output"]) == straight
    ours, theirs = (
        load_file(tmp_path / run / "final/model.safetensors") for run in ("resumed", "run")
    )
    assert all(torch.equal(ours[weight], theirs[weight]) for weight in theirs)


@pytest.mark.slow
def test_two_processes_have_an_actor_learn_from_unequal_numbers_of_right_answers(
    recipe, write_recipe, run, read_metrics
):
    recipe["algorithm"] = {
        "name": "critique_loop",
        "group_size": 2,
        "critique_tokens": 2,
        "refinements_per_critique": 2,
        **SPOKEN,
        "solved_at": 0.6,
    }
    recipe["rollout"] = {"max_new_tokens": 4}
    code, printed = run(write_recipe(recipe), processes=2).finish()
    assert code == 0, printed
    line = outputs(read_metrics, recipe, 2)
    assert line["rollout/token_imbalance_sampled"] >= line["rollout/token_imbalance"] >= 1
    assert line["rollout/sampled_tokens"] > line["rollout/tokens"] > 0


@pytest.mark.slow
def test_a_critic_learns_to_tell_right_answers_from_wrong_ones(
    recipe, tmp_path, read_metrics, home
):
    """Right is an answer that begins with a, b or c; half of those to judge are, so always saying the same is .5."""
    torch.manual_seed(0)
    config = Qwen2Config.from_pretrained(home / "model", hidden_size=32, intermediate_size=64)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(home / "model").save_pretrained(tmp_path / "model")
    (tmp_path / "half.py").write_text(
        "def right(prompt, response, **columns):\n"
        "    return float(response[:1] in ('a', 'b', 'c'))\n"
    )
    recipe["model"] = {"name": str(tmp_path / "model")}
    recipe["reward"] = f"{tmp_path / 'half.py'}:right"
    recipe["algorithm"] |= {
        "group_size": 8,
        "solved_at": 1.0,
        "answer_tokens": 1,
        "answers_sampled": 4,
        "form": "gated",
        "kl_coef": 0.0,
        "entropy_coef": 0.3,  # or it soon says always the same
    }
    recipe["actor"] = {"lr": 3e-3, "prompts_per_step": 32, "minibatches": 4}
    recipe["actor"] |= {"schedule": "cosine", "min_lr_ratio": 0.1}
    recipe["run"] |= {"steps": 75, "save_every": 75}
    train(load_recipe(recipe))
    lines = read_metrics(recipe["run"]["output"])
    assert lines[0]["critique/discrimination"] < 0.1  # verdicts are missing
    last = lines[-5:]
    assert sum(line["critique/discrimination"] for line in last) / 5 > 0.9
    for half in ("right", "wrong"):
        assert sum(line[f"critique/discrimination/{half}_answers"] for line in last) / 5 > 0.8
    assert last[-1]["critique/verdict_missing"] < 0.05


@pytest.mark.slow
def test_right_answers_of_two_players_are_stored_and_the_base_model_learns_them(
    recipe, tmp_path, read_metrics
):
    recipe["algorithm"] = {
        "name": "critique_loop",
        "group_size": 2,
        "critique_tokens": 2,
        "refinements_per_critique": 2,
        **SPOKEN,
    }
    recipe["rollout"] = {"max_new_tokens": 4}
    file = tmp_path / "iteration.parquet"
    sample_rollouts(load_recipe(recipe), file, responses=24)
    rows = read_rollouts(file)
    refined = [t for t in rows if t.reward == 1 and t.reward_parts[REFINED]]
    assert refined
    assert all(len(t.prompt.token_ids) == 3 for t in rows)  # the question alone
    recipe["algorithm"] = {"name": "sft", "rollouts": str(file), "keep_above": 0.5}
    recipe["run"]["steps"] = 6
    train(load_recipe(recipe))
    lines = read_metrics(recipe["run"]["output"])
    assert lines[-1]["actor/pg_loss"] < lines[0]["actor/pg_loss"]
