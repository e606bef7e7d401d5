"""A recipe can be written down, read back, explained and compared."""

import dataclasses

import pytest
import yaml

from llmac.config import Recipe, dump, fingerprint, load_recipe, show
from llmac.config.cards import card_class, registry
from llmac.config.show import MAY_CHANGE
from llmac.config.words import field_docs

VARIANTS = [
    [],
    ["algorithm=ppo", "critic.reward_range=[-1, 1]", "run.critic_warmup_steps=2"],
    ["rollout.engine=vllm", "rollout.kv_cache_mb=100", "rollout.stop=['\\n', 'no', '1e-6']"],
    [
        "model.lora.target_modules=[q_proj, v_proj]",
        "model.revision=1e5",
        "actor.max_grad_norm=.inf",
    ],
    ["reward=[a.py:f, {model: org/judge, weight: -0.5}]", "data.columns.answer=final"],
    ["evaluation.data.name=org/b", "evaluation.data.prompt={q}: ", "actor.schedule=cosine"],
    ["data.chat=never", 'data.prompt="a: #b\\n{q} \\\\boxed{}"', "run.trackers=[wandb]"],
]


@pytest.mark.parametrize("overrides", VARIANTS)
def test_a_dumped_recipe_reads_back_equal(settings, tmp_path, overrides):
    recipe = load_recipe(settings, overrides)
    (tmp_path / "config.yaml").write_text(dump(recipe))
    again = load_recipe(tmp_path / "config.yaml")
    assert again == recipe
    assert fingerprint(again) == fingerprint(recipe)


@pytest.mark.parametrize("overrides", VARIANTS)
def test_what_show_prints_can_be_pasted(settings, tmp_path, overrides):
    recipe = load_recipe(settings, overrides)
    (tmp_path / "shown.yaml").write_text(show(recipe, overrides))
    assert load_recipe(tmp_path / "shown.yaml") == recipe


@pytest.mark.parametrize("name", sorted(registry("algorithm")))
def test_every_algorithm_reads_back_equal(settings, tmp_path, name):
    recipe = load_recipe(settings | {"algorithm": {"name": name}})
    (tmp_path / "config.yaml").write_text(dump(recipe))
    assert load_recipe(tmp_path / "config.yaml") == recipe


def test_a_written_recipe_means_the_same_to_a_yaml_1_1_reader(settings):
    recipe = load_recipe(settings, ["rollout.stop=['no', '1e-6', '12:30', 'null']"])
    assert yaml.safe_load(dump(recipe))["rollout"]["stop"] == ["no", "1e-6", "12:30", "null"]


def test_show_tells_where_each_value_came_from(settings):
    overrides = ["actor.lr=1e-5", "model.lora.r=8"]
    lines = show(load_recipe(settings, overrides), overrides).splitlines()

    def line(key):
        return next(line for line in lines if line.strip().startswith(f"{key}:"))

    assert "# override. Peak learning rate" in line("lr")
    assert "# override." in line("r")
    assert "# default." in line("alpha")
    assert "# recipe. Training steps" in line("steps")
    assert "# default." in line("weight_decay")


def test_show_comments_out_what_does_nothing(settings):
    text = show(load_recipe(settings))
    assert "# gpu_memory_utilization: 0.3" in text
    assert "no effect here" in text


def test_every_field_is_explained(settings):
    for line in show(load_recipe(settings | {"algorithm": "ppo"})).splitlines():
        if line.strip():
            comment = line.partition("  # ")[2]
            assert len(comment.replace("default.", "").replace("recipe.", "").strip()) > 3, line


@pytest.mark.parametrize("room", ["algorithm", "critic"])
def test_every_field_of_every_card_has_a_docstring(room):
    for name in registry(room):
        owner = card_class(room, name)
        missing = {f.name for f in dataclasses.fields(owner)} - field_docs(owner).keys()
        assert not missing, f"{name}: {missing}"


def test_field_docs_come_from_the_nearest_class():
    ppo, grpo = card_class("algorithm", "ppo"), card_class("algorithm", "grpo")
    assert field_docs(ppo)["group_size"] != field_docs(grpo)["group_size"]
    assert field_docs(ppo)["clip_low"] == field_docs(grpo)["clip_low"]


@pytest.mark.parametrize(
    "override",
    [
        "run.steps=99",
        "run.output=elsewhere",
        "run.save_every=1",
        "run.resume=must",
        "run.trackers=[wandb]",
        "run.watchdog_seconds=5",
        "actor.max_tokens_per_microbatch=64",
        "model.gradient_checkpointing=true",
        "evaluation.data.name=org/b",
        "reward.zero_warning_steps=3",
    ],
)
def test_what_may_change_on_resume_leaves_the_fingerprint(settings, override):
    assert fingerprint(load_recipe(settings, [override])) == fingerprint(load_recipe(settings))


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=1",
        "actor.lr=1e-5",
        "actor.minibatches=2",
        "algorithm.group_size=4",
        "algorithm=ppo",
        "model.name=org/other",
        "model.dtype=bfloat16",
        "data.limit=5",
        "reward=other.py:f",
        "rollout.temperature=0.9",
        "rollout.max_new_tokens=5",
        "rollout.engine=vllm",
    ],
)
def test_what_makes_another_run_changes_the_fingerprint(settings, override):
    assert fingerprint(load_recipe(settings, [override])) != fingerprint(load_recipe(settings))


def test_every_key_that_may_change_exists():
    for key in MAY_CHANGE:
        section, _, field = key.partition(".")
        annotation = Recipe.model_fields[section].annotation
        assert not field or field in annotation.model_fields, key
