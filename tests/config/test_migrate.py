"""A TRL configuration becomes a recipe that trains as it did, and nothing is lost silently."""

import pytest
import yaml

from llmac.cli import main
from llmac.config import load_recipe
from llmac.errors import ConfigError
from llmac.migrate import from_trl

GRPO = {
    "model_name_or_path": "org/model",
    "dataset_name": "org/data",
    "reward_funcs": ["rewards.exact", "org/judge"],
    "reward_weights": [1, 0.5],
    "max_steps": 100,
    "output_dir": "runs/x",
}
PPO = {
    "sft_model_path": "org/model",
    "reward_model_path": "org/judge",
    "dataset_name": "org/data",
    "total_episodes": 1000,
    "output_dir": "runs/x",
}


def recipe_of(config, **options):
    return load_recipe(yaml.safe_load(from_trl(config, **options).yaml()))


def test_trl_defaults_come_along():
    recipe = recipe_of(GRPO)
    card = recipe.algorithm.settings
    assert (card.group_size, card.aggregation, card.clip_low) == (8, "token_mean", 0.2)
    assert (recipe.rollout.max_new_tokens, recipe.actor.schedule, recipe.run.seed) == (
        256,
        "linear",
        42,
    )
    assert recipe.model.compute_dtype == "bfloat16"
    assert [entry.weight for entry in recipe.reward.functions] == [1.0, 0.5]
    assert recipe.reward.functions[0].path == "rewards:exact"
    assert recipe.reward.functions[1].model == "org/judge"


def test_batches_are_counted_in_prompts_over_all_processes():
    batch = {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 4,
        "num_generations": 8,
    }
    assert recipe_of(GRPO | batch, processes=2).actor.prompts_per_step == 16 * 4 * 2 // 8
    split = recipe_of(GRPO | batch | {"steps_per_generation": 16, "num_iterations": 2})
    assert split.actor.prompts_per_step == 16 * 16 // 8
    assert (split.actor.minibatches, split.actor.epochs) == (4, 2)
    assert split.run.steps == 100 // 8  # TRL counts optimizer steps: 4 minibatches, 2 epochs


def test_a_batch_that_does_not_hold_whole_groups_is_refused():
    with pytest.raises(ConfigError, match="not divisible by num_generations 8; pass --processes"):
        from_trl(GRPO | {"per_device_train_batch_size": 4})


@pytest.mark.parametrize(
    ("change", "read"),
    [
        ({"epsilon": 0.1}, lambda c: (c.clip_low, c.clip_high) == (0.1, 0.1)),
        ({"epsilon": 0.1, "epsilon_high": 0.3}, lambda c: (c.clip_low, c.clip_high) == (0.1, 0.3)),
        ({"beta": 0.04}, lambda c: c.kl_coef == 0.04),
        ({"delta": 4.0}, lambda c: c.dual_clip == 4.0),
        ({"scale_rewards": False}, lambda c: c.scale == "none"),
        ({"scale_rewards": "batch"}, lambda c: c.scale == "batch"),
        ({"loss_type": "grpo"}, lambda c: c.aggregation == "sequence_mean_token_mean"),
        ({"loss_type": "dr_grpo"}, lambda c: c.aggregation == "sequence_mean_token_sum_norm"),
        ({"loss_type": "cispo"}, lambda c: type(c).__name__ == "CISPO"),
        ({"importance_sampling_level": "sequence"}, lambda c: type(c).__name__ == "GSPO"),
        ({"mask_truncated_completions": True}, lambda c: c.mask_truncated),
        ({"use_vllm": True}, lambda c: (c.mismatch, c.mismatch_high) == ("sequence_mask", 3.0)),
    ],
)
def test_loss_settings_of_grpo_are_carried_over(change, read):
    assert read(recipe_of(GRPO | change).algorithm.settings)


def test_ppo_keeps_its_critic_terms():
    recipe = recipe_of(
        PPO | {"num_mini_batches": 2, "per_device_train_batch_size": 32, "cliprange": 0.1}
    )
    card = recipe.algorithm.settings
    assert recipe.algorithm.name == "ppo"
    assert (card.lam, card.kl_coef, card.clip_low, card.clip_high) == (0.95, 0.05, 0.1, 0.1)
    assert recipe.critic is not None
    assert (recipe.critic.settings.lr, recipe.critic.settings.epochs) == (3e-6, 4)
    assert (recipe.actor.prompts_per_step, recipe.actor.minibatches) == (32, 2)
    assert recipe.run.steps == 32  # 1000 episodes in batches of 32, rounded up


def test_every_key_is_either_mapped_or_named_with_a_reason():
    config = GRPO | {"vllm_mode": "colocate", "num_train_epochs": 3, "frobnicate": 1, "top_k": 50}
    report = from_trl(config).report()
    for key in config:
        assert key in report, key
    assert "frobnicate: 1  (no counterpart known)" in report
    assert "run.steps = epochs * rows / actor.prompts_per_step" in report
    assert "top_k: 50  (it would bias the importance ratio" in report


def test_what_the_file_does_not_say_is_left_to_fill_in():
    imported = from_trl({"learning_rate": 1e-5})
    assert [line.split()[0] for line in imported.missing] == [
        "model.name",
        "data.name",
        "reward.functions",
        "run.steps",
        "run.output",
    ]
    assert imported.yaml().startswith("# to fill in: model.name")


def test_an_unknown_loss_is_refused():
    with pytest.raises(ConfigError, match="loss_type 'sapo' has no counterpart"):
        from_trl(GRPO | {"loss_type": "sapo"})


def test_the_command_writes_a_recipe_and_overwrites_nothing(tmp_path, capsys):
    source, target = tmp_path / "trl.yaml", tmp_path / "mine.yaml"
    source.write_text(yaml.safe_dump(GRPO))
    assert main(["import-config", str(source), "--output", str(target)]) == 0
    assert "learning_rate=1e-06 (TRL's default)" in capsys.readouterr().err
    assert load_recipe(target).model.name == "org/model"
    before = target.read_text()
    assert main(["import-config", str(source), "--output", str(target)]) == 1
    assert "exists" in capsys.readouterr().err
    assert target.read_text() == before
