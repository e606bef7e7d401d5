"""The three stages of the quickstart's generative critic: each runs alone, and begins where the one before it ended."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from llmac.api import run
from llmac.config import load_recipe

from .conftest import RECIPE
from .test_genac import genac  # noqa: F401  a fixture

RECIPES = RECIPE.parent


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_each_stage_begins_where_the_one_before_ended(genac, quickstart, tmp_path):  # noqa: F811
    torch.manual_seed(0)
    rng, start = random.Random(0), tmp_path / "start"
    quickstart.make_model().save_pretrained(start / "policy")
    quickstart.make_tokenizer().save_pretrained(start / "policy")
    genac.make_model(start / "policy").save_pretrained(start / "critic")
    genac.make_tokenizer().save_pretrained(start / "critic")
    quickstart.write_prompts(start / "train.jsonl", quickstart.distinct_sums(rng, 64))
    students = [genac.Student(0.5, rng, quickstart.SIX_STEPS)]
    genac.write_traces(start / "traces.jsonl", students, rng, 64, None)

    def go(stage, *overrides, steps):
        small = ["actor.prompts_per_step=2", f"run.steps={steps}", "run.save_every=1"]
        folder = tmp_path / f"genac{stage}"
        recipe = RECIPES / f"quickstart_genac{stage}.yaml"
        run(load_recipe(recipe, [*small, f"run.output={folder}", *overrides]))
        return lines(folder)

    taught = [f"model.name={start / 'critic'}", f"data.name={start / 'traces.jsonl'}"]
    first = go("_sft", *taught, steps=2)
    assert first[-1]["rollout/sampled_tokens"] == 0.0
    assert first[-1]["actor/pg_loss"] > 0.0

    policy = [f"model.name={start / 'policy'}", f"data.name={start / 'train.jsonl'}"]
    policy += ["evaluation=null", "algorithm.group_size=2"]
    begin = [
        f"critic.init={tmp_path / 'genac_sft' / 'final'}",
        f"critic.template={genac.TEMPLATE}",
        "run.critic_warmup_steps=2",
    ]
    go("_critic", *policy, *begin, steps=1)
    second = go("_critic", *policy, *begin, steps=2)  # goes on from the checkpoint
    assert [line["step"] for line in second] == [1, 2]
    assert "actor/pg_loss" not in second[-1]
    assert second[-1]["critic/states"] > 0
    final = tmp_path / "genac_critic" / "final"
    before, after = weights(start / "policy"), weights(final)
    assert all(torch.equal(before[name], after[name]) for name in before)

    last = go("", *policy, f"critic.init={final / 'critic'}", steps=1)
    assert "actor/pg_loss" in last[-1]
    assert last[-1]["rollout/sampled_tokens"] > last[-1]["rollout/tokens"]
    saved = tmp_path / "genac" / "final" / "critic" / "critic_template.jinja"
    assert saved.read_text() == genac.TEMPLATE.read_text()
