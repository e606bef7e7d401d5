"""Every recipe in the repository loads, is short, and says honestly where it was run."""

from pathlib import Path

import pytest

from llmac.config import load_recipe, verify

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_there_are_recipes():
    assert {"gsm8k_ppo", "gsm8k_grpo", "rlhf_ppo"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_loads_and_names_things_that_exist(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(path)
    assert recipe.run.steps > 1
    # These want a model, data or stored responses that are made first.
    if not path.stem.startswith(
        ("quickstart", "stages", "gsm8k_dapo_step", "math_genac", "critique")
    ):
        verify(recipe)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_short_and_has_a_header(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 40
    assert lines[0].startswith("#")


@pytest.mark.parametrize(
    "name",
    [
        "critique_loop",
        "critique_rl_stage1",
        "critique_rl_stage2",
        "gsm8k_ppo",
        "gsm8k_grpo",
        "gsm8k_vapo",
        "gsm8k_dapo_step",
        "gsm8k_spo_chain",
        "math_genac_sft",
        "math_genac_critic",
        "math_genac",
        "math_spo_tree",
        "rlhf_ppo",
        "rlhf_safe",
    ],
)
def test_a_recipe_nobody_has_run_says_so(name):
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    for word in ("# Task:", "# Hardware:", "# Status:", "not yet run at this size"):
        assert word in text


@pytest.mark.parametrize("name", ["gsm8k_ppo", "gsm8k_grpo", "gsm8k_vapo", "gsm8k_spo_chain"])
def test_gsm8k_trains_and_evaluates_on_the_same_prompt_and_another_split(name):
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    assert recipe.evaluation is not None
    assert recipe.evaluation.data.prompt == recipe.data.prompt
    assert (recipe.data.split, recipe.evaluation.data.split) == ("train", "test")
    assert recipe.data.prompt is not None
    assert "\n" in recipe.data.prompt
