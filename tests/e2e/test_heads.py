"""Another critic is one changed line, in runs as a user starts them."""

import json

import pytest
import torch

from llmac.api import run
from llmac.config import dump, load_recipe
from llmac.critics import CRITICS
from llmac.critics.head_config import HeadConfig
from llmac.models.value_model import ValueModel
from llmac.rewards.loader import resolve

HEADS = [
    name
    for name, place in CRITICS.items()
    if issubclass(resolve(place), HeadConfig) and name != "code_outcomes"  # for coderl alone
]


def lines_of(result):
    return [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]


def trained(settings, critic):
    settings["algorithm"] = {"name": "ppo", "group_size": 2}
    settings["run"] |= {"steps": 2, "save_every": 10}
    return run(load_recipe({**settings, "critic": critic}))


@pytest.mark.parametrize("name", HEADS)
def test_one_word_changes_the_critic_of_a_recipe(settings, write_recipe, tmp_path, name):
    settings["algorithm"] = {"name": "ppo", "group_size": 2}
    settings["critic"] = {"name": "value_head", "lr": 1e-3, "reward_range": [0.0, 1.0]}
    recipe = load_recipe(write_recipe(settings), [f"critic.name={name}"])
    assert recipe.critic.name == name
    (tmp_path / "again.yaml").write_text(dump(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_ppo_runs_with_every_head_and_leaves_it_beside_the_policy(settings, name):
    result = trained(settings, {"name": name, "lr": 1e-3})
    first = lines_of(result)[0]
    assert first["critic/vf_explained_var"] == pytest.approx(0.0, abs=1e-4)
    assert first["critic/values/mean"] == pytest.approx(first["reward/mean"], abs=1e-3)
    saved = ValueModel.from_pretrained(result.model / "critic")
    assert saved.spec.head.kind == name.replace("value_head", "scalar")
    assert float(saved.head.weight.detach().abs().sum()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}])
def test_an_ensemble_on_the_policys_trunk_with_a_target_network(settings, lora):
    settings["model"] |= {"lora": lora} if lora else {}
    critic = {"name": "hl_gauss", "trunk": "shared", "heads": 2, "combine": "min", "lr": 1e-2}
    result = trained(settings, critic | {"target_tau": 0.5})
    assert lines_of(result)[-1]["critic/values/spread"] > 0
    with torch.no_grad():
        assert ValueModel.from_pretrained(result.model / "critic").spec.heads == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["value_head", "two_hot"])
def test_a_trained_critic_warm_starts_another_run(settings, tmp_path, name):
    first = trained(settings, {"name": name, "lr": 1e-2})
    settings["run"]["output"] = str(tmp_path / "second")
    again = trained(settings, {"name": name, "lr": 1e-6, "init": str(first.model / "critic")})
    before, after = (
        ValueModel.from_pretrained(result.model / "critic").head.weight.detach()
        for result in (first, again)
    )
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    assert before.abs().max() > 1e-3
