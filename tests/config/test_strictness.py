"""Whatever a recipe says wrongly is one ConfigError naming field, owner, finding and way out."""

import copy
import dataclasses

import pytest
from pydantic import ValidationError

from llmac.config import load_recipe
from llmac.errors import ConfigError


def refusal(settings, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_recipe(settings, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "modle.name=x",
            ["modle is not a section", "Did you mean model?", "Sections: model, data"],
        ),
        (
            "actor.warmup_step=3",
            ["actor.warmup_step is not a field of actor", "mean actor.warmup_steps?"],
        ),
        ("actor.temperature=1", ["is not a field of actor", "rollout.temperature"]),
        ("rollout.seed=1", ["is not a field of rollout", "Did you mean run.seed?"]),
        ("actor.learning_rate=1e-5", ["Did you mean actor.lr?", "Fields: lr, schedule"]),
        ("rollout.max_completion_length=9", ["Did you mean rollout.max_new_tokens?"]),
        ("model.lora.rank=8", ["model.lora.rank is not a field of model.lora"]),
        (
            "algorithm.clip_hi=0.3",
            ["algorithm.clip_hi is not a field of grpo", "Did you mean clip_high?"],
        ),
        ("algorithm.beta=0.1", ["is not a field of grpo", "Did you mean algorithm.kl_coef?"]),
        ("algorithm.name=gropo", ["there is no algorithm 'gropo'", "Did you mean grpo?", "ppo"]),
        ("critic.lr=1e-4", ["critic.lr has no effect", "grpo uses no critic"]),
        ("actor.lr=fast", ["actor.lr must be a number above 0", "found 'fast' (text)"]),
        ("actor.lr=-1", ["actor.lr must be a number above 0", "found -1"]),
        ("actor.lr=true", ["actor.lr must be a number", "found true"]),
        (
            "actor.epochs=1.5",
            ["actor.epochs must be a whole number above 0", "found 1.5 (a number)"],
        ),
        ("actor.betas=[0.9]", ["actor.betas must be a pair of numbers"]),
        ("actor.betas=[0.9, 1.0]", ["actor.betas must each be at least 0 and below 1"]),
        ("actor=3", ["actor must be a mapping of lr, schedule", "found 3"]),
        (
            "rollout.engine=sglang",
            ["rollout.engine must be hf, vllm or vllm_server", "found 'sglang'"],
        ),
        ("rollout.temperature=0", ["rollout.temperature must be a number above 0"]),
        ("rollout.top_p=0.9", ["rollout.top_p must be 1.0 in training", "kept probability mass"]),
        ("rollout.top_k=20", ["rollout.top_k must be 0 in training", "found 20"]),
        ("run.steps=0", ["run.steps must be a whole number above 0", "found 0"]),
        ("run.save_every=0", ["run.save_every must be a whole number above 0"]),
        ("run.output=", ["run.output is empty"]),
        ("run.trackers=wandb", ["run.trackers must be a list of text", "write [wandb]"]),
        ("data.limit=0", ["data.limit must be a whole number above 0 or null"]),
        (
            "evaluation.every=3",
            ["evaluation.data is required", "leave the section `evaluation` out"],
        ),
        (
            "algorithm.kl_coef=high",
            ["algorithm.kl_coef (grpo) must be a number", "found 'high' (text)"],
        ),
        ("algorithm.group_size=2.0", ["algorithm.group_size (grpo) must be a whole number"]),
        ("algorithm.clip_low=-1", ["algorithm grpo: clip_low"]),
        ("reward=[]", ["reward.functions"]),
        (
            "reward=[{weight: 2}]",
            ["reward.functions[0] must have either path or model, found neither"],
        ),
        ("reward=[{path: a.py:f, wieght: 2}]", ["reward.functions[0].wieght", "Did you mean"]),
    ],
)
def test_a_mistake_is_named_with_its_owner_and_the_way_out(settings, override, parts):
    message = refusal(settings, override)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("overrides", "key", "reason"),
    [
        (["rollout.dtype=auto"], "rollout.dtype", "rollout.engine is hf"),
        (["rollout.kv_cache_mb=64"], "rollout.kv_cache_mb", "rollout.engine: vllm"),
        (["rollout.enforce_eager=true"], "rollout.enforce_eager", "rollout.engine: vllm"),
        (
            ["rollout.tensor_parallel_size=1"],
            "rollout.tensor_parallel_size",
            "rollout.engine: vllm",
        ),
        (["rollout.max_model_len=4096"], "rollout.max_model_len", "rollout.engine: vllm"),
        (["rollout.gpu_memory_utilization=0.3"], "rollout.gpu_memory_utilization", "vllm"),
        (["rollout.sleep_level=2"], "rollout.sleep_level", "rollout.engine: vllm"),
        (["rollout.servers=[http://a:8000]"], "rollout.servers", "vllm_server"),
        (["rollout.server_count=2"], "rollout.server_count", "vllm_server"),
        (["rollout.weight_transport=shm"], "rollout.weight_transport", "vllm_server"),
        (["rollout.request_timeout_seconds=5"], "rollout.request_timeout_seconds", "vllm_server"),
        (["actor.min_lr_ratio=0.1"], "actor.min_lr_ratio", "linear or cosine"),
        (["run.critic_warmup_steps=3"], "run.critic_warmup_steps", "uses no critic"),
        (["run.critic_warmup_explained=0.3"], "run.critic_warmup_explained", "uses no critic"),
        (["run.policy_every=2"], "run.policy_every", "uses no critic"),
        (
            ["algorithm={name: ppo, group_size: 2}", "critic=group_mean", "run.policy_every=2"],
            "run.policy_every",
            "none that learns",
        ),
        (["run.project=mine"], "run.project", "run.trackers"),
        (["model.reference=org/other"], "model.reference", "algorithm.kl_coef above 0"),
        (
            ["model.dtype=bfloat16", "model.compute_dtype=bfloat16"],
            "model.compute_dtype",
            "remove one",
        ),
        (["data.chat=never", "data.system=Be brief."], "data.system", "data.chat is never"),
        (["algorithm=ppo", "critic.min_lr_ratio=0.5"], "critic.min_lr_ratio", "linear or cosine"),
        (
            ["reward=[{model: org/judge, adapter: trl}]"],
            "reward.functions[0].adapter",
            "reward model",
        ),
    ],
)
def test_a_key_without_effect_is_refused_even_at_its_default(settings, overrides, key, reason):
    message = refusal(settings, *overrides)
    assert f"{key} has no effect" in message
    assert reason in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.engine=vllm", "rollout.dtype=auto", "rollout.kv_cache_mb=64"],
        ["actor.schedule=cosine", "actor.min_lr_ratio=0.1"],
        ["algorithm=ppo", "run.critic_warmup_steps=3", "critic.lr=1e-4"],
        ["algorithm=ppo", "run.critic_warmup_explained=0.3", "run.policy_every=2"],
        ["run.trackers=[tensorboard]", "run.project=mine"],
        ["algorithm.kl_coef=0.1", "model.reference=org/other"],
        ["data.chat=always", "data.system=Be brief."],
        ["algorithm=ppo", "critic.schedule=linear", "critic.min_lr_ratio=0.5"],
    ],
)
def test_the_same_keys_are_welcome_where_they_do_something(settings, overrides):
    assert load_recipe(settings, overrides) != load_recipe(settings)


def test_defaults_without_effect_are_not_complained_about(settings):
    assert load_recipe(settings).rollout.max_num_seqs == 256


def test_minibatches_must_be_equal(settings):
    message = refusal(settings, "actor.prompts_per_step=10", "actor.minibatches=4")
    assert "found 10 and 4" in message
    assert "8 prompts would do" in message
    load_recipe(settings, ["actor.prompts_per_step=12", "actor.minibatches=4"])


def test_greedy_evaluation_with_many_samples_is_refused(settings):
    message = refusal(settings, "evaluation.data.name=org/held-out", "evaluation.samples=4")
    assert "evaluation.samples is 4 at temperature 0" in message
    load_recipe(
        settings,
        ["evaluation.data.name=org/x", "evaluation.samples=4", "evaluation.temperature=1"],
    )


def test_a_budget_needs_a_critic_that_values_prompts(settings):
    message = refusal(settings, "algorithm.allocation=failures", "critic=leave_one_out")
    assert "critic leave_one_out does not say it; set critic: prompt_value" in message
    assert load_recipe(settings, ["algorithm.allocation=failures"]).critic.name == "prompt_value"
    load_recipe(settings, ["algorithm.allocation=failures", "critic=running_mean"])


def test_a_critic_of_siblings_needs_siblings(ppo):
    message = refusal(ppo, "critic=leave_one_out", "algorithm.group_size=1")
    assert (
        "critic leave_one_out compares siblings: algorithm.group_size must be at least 2" in message
    )
    load_recipe(ppo, ["critic=leave_one_out", "algorithm.group_size=2"])
    windows = refusal(ppo, "algorithm=t_ppo", "algorithm.group_size=2", "critic=leave_one_out")
    assert "t_ppo does not judge them in one step" in windows


def test_a_critic_that_learns_needs_an_algorithm_that_teaches_it_or_lessons_before(ppo):
    said = refusal(ppo, "algorithm=spo_chain", "critic=value_head")
    assert "critic value_head learns, and spo_chain does not teach it" in said
    load_recipe(ppo, ["algorithm=spo_chain", "critic={name: value_head, init: there}"])
    load_recipe(ppo, ["algorithm=vineppo", "critic=value_head"])


def test_a_critic_that_is_not_taught_must_have_learned_before(ppo):
    frozen = "algorithm={name: coderl, teach_critic: false}"
    for critic in ("code_outcomes", "{name: code_outcomes, init: policy}"):
        said = refusal(ppo, frozen, f"critic={critic}")
        assert "algorithm.teach_critic is false, and critic code_outcomes starts knowing" in said
    load_recipe(ppo, [frozen, "critic={name: code_outcomes, init: there}"])
    load_recipe(ppo, ["algorithm=coderl", "critic=code_outcomes", "run.critic_warmup_steps=1"])
    warmed = "critic={name: code_outcomes, init: there}", "run.critic_warmup_steps=1"
    assert "run.critic_warmup_steps" in refusal(ppo, frozen, *warmed)


def test_a_critic_of_trees_needs_an_algorithm_that_samples_them(ppo):
    assert "ppo samples no trees; choose another critic" in refusal(ppo, "critic=tree_mean")
    load_recipe(ppo, ["algorithm=spo_tree", "critic=tree_mean"])


@pytest.mark.parametrize(
    "critic", ["monte_carlo", "leave_one_out", "running_mean", "value_head", "prefix_tree"]
)
def test_trees_take_no_critic_but_the_one_that_repeats_them(ppo, critic):
    message = refusal(ppo, "algorithm=spo_tree", f"critic={critic}")
    assert f"critic {critic} would be asked for values that the trees of spo_tree know" in message
    assert "set critic: tree_mean" in message


@pytest.mark.parametrize("algorithm", ["tempo", "safe", "dapo_step", "t_ppo", "vapo"])
def test_continuations_are_trained_on_only_where_credit_is_given_row_by_row(ppo, algorithm):
    ppo["critic"] = {"name": "monte_carlo", "reuse": True}
    ppo["algorithm"] = algorithm
    assert "critic.reuse has continuations trained on" in refusal(ppo)


@pytest.mark.parametrize(
    "algorithm",
    [*("ppo", "a2c", "vineppo", "spo_chain"), {"name": "vapo", "likelihood_coef": 0.0}],
)
def test_and_there_they_may_be(ppo, algorithm):
    ppo["critic"] = {"name": "monte_carlo", "reuse": True}
    ppo["algorithm"] = algorithm
    assert load_recipe(ppo).algorithm.settings.takes_offered_rows


def test_continuations_cannot_say_what_lies_behind_the_length_limit(ppo):
    bootstrap = "algorithm.on_truncation=bootstrap"
    message = refusal(ppo, "critic=monte_carlo", bootstrap)
    assert "set algorithm.on_truncation: terminal" in message
    load_recipe(ppo, [bootstrap])
    load_recipe(ppo, ["critic=monte_carlo"])


def test_a_plan_that_cannot_be_is_refused_with_the_recipe(settings):
    message = refusal(settings, "algorithm=t_ppo", "algorithm.window_tokens=999")
    assert "algorithm t_ppo: " in message
    assert "999" in message


def test_critic_settings_are_checked_like_the_actors(ppo):
    assert "betas must be each at least 0 and below 1" in refusal(ppo, "critic.betas=[2, 2]")
    assert "lr must be finite and above 0, found -1.0" in refusal(ppo, "critic.lr=-1")
    assert "max_grad_norm must be above 0" in refusal(ppo, "critic.max_grad_norm=-1")


def test_critic_lora_needs_the_policys_lora(ppo):
    assert "critic.lora takes its sizes from model.lora" in refusal(ppo, "critic.lora=true")
    load_recipe(ppo, ["critic.lora=true", "model.lora.r=8"])


def test_template_and_column_cannot_both_be_the_prompt(settings):
    assert "data.prompt and data.prompt_column" in refusal(
        settings, "data.prompt={q}", "data.prompt_column=q"
    )


def test_two_rewards_of_one_name_are_refused(settings):
    settings["reward"] = [{"path": "a.py:f", "name": "x"}, {"path": "b.py:f", "name": "x"}]
    assert "two functions are named 'x'" in refusal(settings)


def test_several_mistakes_are_reported_together(settings):
    message = refusal(
        settings, "actor.lr=fast", "run.steps=0", "algorithm.clip_hi=1", "algorithm.x=2"
    )
    assert message.startswith("4 problems in the recipe")
    assert message.count("\n- ") == 4


@pytest.mark.parametrize("section", ["model", "data", "reward", "algorithm", "run"])
def test_a_missing_section_is_named(settings, section):
    del settings[section]
    assert f"{section} is required" in refusal(settings)


def test_a_missing_field_is_named_with_its_meaning(settings):
    del settings["run"]["steps"]
    assert "run.steps is required: Training steps" in refusal(settings)


def test_a_recipe_is_frozen(settings):
    recipe = load_recipe(settings)
    with pytest.raises(ValidationError):
        recipe.actor.lr = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.algorithm.settings.clip_low = 0.5


def test_the_mapping_given_is_not_changed(settings):
    before = copy.deepcopy(settings)
    load_recipe(settings, ["actor.lr=1e-3", "algorithm.group_size=4", "reward.on_error=skip"])
    assert settings == before


def test_an_algorithm_with_a_critic_gets_its_own_when_the_recipe_is_silent(ppo):
    critic = load_recipe(ppo).critic
    assert critic is not None
    assert critic.name == "value_head"
    assert load_recipe(ppo | {"critic": {"lr": 1e-3}}).critic.settings.lr == 1e-3


def test_whole_numbers_are_numbers_but_not_the_reverse(settings):
    assert load_recipe(settings, ["actor.lr=1"]).actor.lr == 1.0
    assert "whole number" in refusal(settings, "run.steps=10.0")


CARD = '''
from dataclasses import dataclass
from llmac.algorithms.grpo import GRPO

@dataclass(frozen=True, kw_only=True)
class Mine(GRPO):
    """Mine: GRPO with a knob."""

    knob: tuple[int, ...] = (1, 2)
    """A few numbers."""

    def __post_init__(self):
        super().__post_init__()
        if sum(self.knob) > 10:
            raise ValueError(f"knob may sum up to 10, found {sum(self.knob)}")
'''


def test_a_card_from_a_file_is_checked_like_any_other(settings, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(CARD)
    monkeypatch.chdir(tmp_path)
    settings["algorithm"] = {"name": "./mine.py:Mine", "knob": [3, 4]}
    recipe = load_recipe(settings)
    assert recipe.algorithm.settings.knob == (3, 4)
    assert "knob may sum up to 10, found 11" in refusal(settings, "algorithm.knob=[11]")
    assert "must be a list of whole numbers" in refusal(settings, "algorithm.knob=[a]")
    assert "Did you mean knob?" in refusal(settings, "algorithm.knobs=[1]")


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("Mine = 3", "must name a frozen dataclass"),
        ("class Mine: pass", "must name a frozen dataclass"),
    ],
)
def test_what_is_no_card_is_refused(settings, tmp_path, body, part):
    (tmp_path / "other.py").write_text(body)
    settings["algorithm"] = {"name": f"{tmp_path}/other.py:Mine"}
    assert part in refusal(settings)


def test_a_card_made_in_python_keeps_its_registry_name(settings):
    from llmac.algorithms.grpo import GRPO

    settings["algorithm"] = GRPO(group_size=4)
    choice = load_recipe(settings).algorithm
    assert choice.name == "grpo"
    assert choice.settings.group_size == 4
    assert choice.given == {"name", "group_size"}


def test_a_reward_function_may_be_given_as_such(settings):
    def exact(prompt, response):
        return 1.0

    settings["reward"] = exact
    assert load_recipe(settings).reward.functions[0].path is exact
