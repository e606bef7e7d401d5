"""YAML is read by the rules of 1.2, and overrides are typed by the schema."""

import pytest

from llmac.config import load_recipe
from llmac.config.loading import read_yaml
from llmac.errors import ConfigError

RECIPE = """
model: {name: org/model}
data: {name: org/data}
reward: rewards.py:exact
algorithm: {name: ppo, lam: 0.9}
run: {steps: 10, output: runs/a}
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("algorithm.lam=0.95", lambda r: r.algorithm.settings.lam == 0.95),
        ("--algorithm.lam=0.95", lambda r: r.algorithm.settings.lam == 0.95),
        ("actor.lr=1e-5", lambda r: r.actor.lr == 1e-5),
        ("actor.max_grad_norm=.inf", lambda r: r.actor.max_grad_norm == float("inf")),
        ("actor.betas=[0.9, 0.98]", lambda r: r.actor.betas == (0.9, 0.98)),
        ("model.lora.r=8", lambda r: r.model.lora.r == 8 and r.model.lora.alpha == 32),
        ("model.lora={r: 4}", lambda r: r.model.lora.r == 4),
        ("model.lora=null", lambda r: r.model.lora is None),
        ("model.name=123", lambda r: r.model.name == "123"),
        ("model.revision=null", lambda r: r.model.revision is None),
        ("data.split=train[:5%]", lambda r: r.data.split == "train[:5%]"),
        ("data.prompt={question}", lambda r: r.data.prompt == "{question}"),
        ('data.prompt="{q}\\n"', lambda r: r.data.prompt == "{q}\n"),
        ("data.system=a=b", lambda r: r.data.system == "a=b"),
        ("data.columns.answer=final", lambda r: r.data.columns == {"answer": "final"}),
        ("data.shuffle=false", lambda r: r.data.shuffle is False),
        ("reward=reward_fns/x.py:f", lambda r: r.reward.functions[0].path == "reward_fns/x.py:f"),
        ("reward.on_error=skip", lambda r: r.reward.on_error == "skip"),
        ("reward.functions.0.weight=2", lambda r: r.reward.functions[0].weight == 2.0),
        ("reward=[a.py:f, {path: b.py:g, weight: 0.5}]", lambda r: len(r.reward.functions) == 2),
        ("run.trackers=[tensorboard]", lambda r: r.run.trackers == ("tensorboard",)),
        ("rollout.stop=['\\n']", lambda r: r.rollout.stop == ("\\n",)),
        ("algorithm.critic_lam=1", lambda r: r.algorithm.settings.critic_lam == 1.0),
        ("critic.lr=1e-3", lambda r: r.critic.settings.lr == 1e-3),
        ("evaluation.data.name=x", lambda r: r.evaluation.data.name == "x"),
    ],
)
def test_an_override_is_read_as_the_type_of_its_key(recipe_file, override, read):
    assert read(load_recipe(recipe_file, [override]))


def test_the_last_override_wins(recipe_file):
    assert load_recipe(recipe_file, ["run.steps=1", "run.steps=2"]).run.steps == 2


def test_naming_an_algorithm_drops_the_files_keys_and_keeps_the_command_lines(recipe_file):
    recipe = load_recipe(recipe_file, ["algorithm.group_size=4", "algorithm=grpo"])
    assert recipe.algorithm.name == "grpo"
    assert recipe.algorithm.settings.group_size == 4
    with pytest.raises(ConfigError, match=r"algorithm\.lam is not a field of grpo"):
        load_recipe(recipe_file, ["algorithm.name=grpo"])


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("actor.lr", "has no '='"),
        ("=3", "names no key"),
        ("actor..lr=3", "names no key"),
        ("run.steps.x=1", "run.steps is the single value 10"),
        ("reward.functions.4.weight=1", "not the number of one of 1 entries"),
        ("actor.betas=[0.9", "not valid YAML"),
    ],
)
def test_a_malformed_override_is_refused(recipe_file, override, part):
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe_file, [override])
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1.0e-6", 1e-6),
        ("-3", -3),
        ("010", 10),
        (".5", 0.5),
        ("no", "no"),
        ("off", "off"),
        ("true", True),
        ("null", None),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("e5", "e5"),
        (".", "."),
    ],
)
def test_scalars_follow_yaml_1_2(tmp_path, text, value):
    file = tmp_path / "a.yaml"
    file.write_text(f"key: {text}\n")
    read = read_yaml(file)["key"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model: {name: x", "is not valid YAML, line 2"),
        ("model:\n\tname: x", "line 2, column 1"),
        ("- a\n- b", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("run: {steps: 1, steps: 2}", "steps is written twice"),
        ("!!python/object:os.system x", "is not valid YAML"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(tmp_path, text, part):
    file = tmp_path / "broken.yaml"
    file.write_text(text + "\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(file)
    assert part in str(caught.value)
    assert "broken.yaml" in str(caught.value)


def test_a_missing_file_suggests_its_neighbour(recipe_file):
    with pytest.raises(
        ConfigError, match=r"smal\.yaml does not exist\. Did you mean .*small\.yaml\?"
    ):
        load_recipe(recipe_file.with_name("smal.yaml"))


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        load_recipe(tmp_path / "a.yaml")


def test_files_are_found_where_the_command_runs_and_then_beside_the_recipe(tmp_path, monkeypatch):
    beside, here = tmp_path / "recipes", tmp_path / "here"
    beside.mkdir()
    here.mkdir()
    (beside / "a.yaml").write_text(RECIPE)
    (beside / "rewards.py").write_text("def exact(prompt, response): return 1.0\n")
    monkeypatch.chdir(here)
    assert load_recipe(beside / "a.yaml").reward.functions[0].path == f"{beside}/rewards.py:exact"
    (here / "rewards.py").write_text("def exact(prompt, response): return 0.0\n")
    assert load_recipe(beside / "a.yaml").reward.functions[0].path == "rewards.py:exact"
