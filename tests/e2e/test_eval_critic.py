"""`llmac eval-critic` on real runs: the right weights and values, the same truth for all, and nothing changed."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from llmac.api import run as train
from llmac.config import dump, load_recipe
from llmac.core.types import Finish, Prompt, Trajectory
from llmac.errors import CheckpointError, ConfigError, DataError
from llmac.eval_critic import Truth, eval_critic
from llmac.models.packing import pack
from llmac.models.value_model import ValueModel
from llmac.rollout_store import write_rollouts
from llmac.saved_run import find_run
from llmac.state_store import read_states

SMALL = Truth(states=24, depths=3, rollouts=6, siblings=2)


def recipe_of(home, output, algorithm, **sections):
    return {
        "model": {"name": str(home / "model")},
        "data": {"name": str(home / "train.jsonl")},
        "evaluation": {"data": {"name": str(home / "held_out.jsonl")}, "at_start": False},
        "reward": f"{home / 'reward.py'}:reward",
        "algorithm": algorithm,
        "actor": {"lr": 3e-3, "prompts_per_step": 4, "minibatches": 2},
        "rollout": {"max_new_tokens": 8},
        "run": {"steps": 4, "output": str(output), "save_every": 2},
        **sections,
    }


@pytest.fixture(scope="session")
def ppo_run(home, tmp_path_factory):
    """The folder of a finished PPO run with checkpoints of steps 2 and 4."""
    output = tmp_path_factory.mktemp("runs") / "ppo"
    ppo = {"name": "ppo", "group_size": 4}
    train(load_recipe(recipe_of(home, output, ppo, critic={"lr": 1e-2})))
    return output


@pytest.fixture(scope="session")
def grpo_run(home, tmp_path_factory):
    """The folder of a finished run without a critic."""
    output = tmp_path_factory.mktemp("runs") / "grpo"
    train(load_recipe(recipe_of(home, output, {"name": "grpo", "group_size": 4})))
    return output


@pytest.fixture
def untrained(home, tmp_path):
    """A recipe's file and the folder of a run that was killed before it saved anything."""
    settings = recipe_of(home, tmp_path / "run", {"name": "ppo", "group_size": 4})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump(load_recipe(settings)))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def fingerprints(folder):
    """Content and time of every file."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def said_by(folder, states):
    """V of each state by the value model in a folder, one row at a time."""
    model = ValueModel.from_pretrained(folder)
    with torch.no_grad():
        rows = [model(pack([t], pad_id=0))[0] for t in states.trajectories]
    places = zip(states.row.tolist(), states.position.tolist(), strict=True)
    return torch.stack([rows[row][position] for row, position in places])


@pytest.mark.slow
def test_a_run_is_judged_with_its_own_weights_and_left_alone(ppo_run, tmp_path):
    before = fingerprints(ppo_run)
    stored = tmp_path / "states.parquet"
    found = eval_critic(ppo_run, truth=SMALL, output=tmp_path / "out", save_states=stored)
    assert fingerprints(ppo_run) == before
    assert found.about["moment"] == "step-00000004"

    # The critic's values are those of the critic that was exported after the same step.
    said = said_by(ppo_run / "final" / "critic", found.states)
    assert said.std() > 1e-3
    torch.testing.assert_close(torch.tensor(found.report.values), said, atol=1e-4, rtol=0)

    # The responses were sampled by the policy of that step.
    policy = AutoModelForCausalLM.from_pretrained(ppo_run / "final")
    first = found.states.trajectories[0]
    ids = torch.tensor([[*first.prompt.token_ids, *first.response_ids]])
    with torch.no_grad():
        logprobs = policy(ids).logits.log_softmax(-1)[0, len(first.prompt.token_ids) - 1 : -1]
    expected = logprobs.gather(1, torch.tensor(first.response_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(first.sampler_logprobs), expected, atol=1e-4, rtol=0)

    content = json.loads((tmp_path / "out" / "critic_eval.json").read_text())
    assert len(content["states"]) == content["overall"]["states"] == 24
    assert [part["where"] for part in content["by_depth"]] == [
        "depth 0.00",
        "depth 0.33",
        "depth 0.67",
    ]
    assert (tmp_path / "out" / "critic_calibration.png").stat().st_size > 10_000

    # The same truth for another critic: the exported one, which is the same critic.
    again = eval_critic(
        ppo_run, critic=str(ppo_run / "final/critic"), states_from=stored, output=tmp_path / "two"
    )
    assert torch.equal(again.states.outcomes, found.states.outcomes)
    assert again.states.trajectories == found.states.trajectories
    assert again.report.values == pytest.approx(found.report.values, abs=1e-4)
    assert read_states(stored)[0].success_above == found.states.success_above


@pytest.mark.slow
def test_an_earlier_step_is_another_policy_and_another_critic(ppo_run, tmp_path):
    early = eval_critic(ppo_run, step=2, truth=SMALL, output=tmp_path / "a")
    late = eval_critic(ppo_run, step=4, truth=SMALL, output=tmp_path / "b")
    again = eval_critic(ppo_run, step=4, truth=SMALL, output=tmp_path / "c")
    final = eval_critic(ppo_run, step="final", truth=SMALL, output=tmp_path / "d")
    assert early.about["moment"] == "step-00000002"
    assert early.report.values != pytest.approx(late.report.values, abs=1e-4)
    for same in (again, final):
        assert torch.equal(same.states.outcomes, late.states.outcomes)
        assert same.report.values == pytest.approx(late.report.values, abs=1e-4)
    assert final.about["moment"] == "final"


@pytest.mark.slow
def test_a_run_without_a_critic_takes_one_by_name(grpo_run, tmp_path):
    found = eval_critic(
        grpo_run,
        ["rollout.max_num_seqs=32"],
        critic="group_mean",
        truth=SMALL,
        output=tmp_path / "out",
    )
    rewards = torch.tensor([t.reward for t in found.states.trajectories])
    groups = torch.tensor([t.group for t in found.states.trajectories])
    means = torch.tensor([float(rewards[groups == g].mean()) for g in found.states.prompt])
    torch.testing.assert_close(torch.tensor(found.report.values), means, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_critic_of_ones_own_that_knows_the_truth_is_found_exact(untrained, tmp_path):
    # Outcomes that the prompt alone decides.
    (tmp_path / "sure.py").write_text(
        "def reward(prompt, response, wanted):\n    return float(wanted in 'abc')\n"
    )
    (tmp_path / "knows.py").write_text(
        "import torch\nfrom dataclasses import dataclass\nfrom llmac.core.types import Values\n\n"
        "class Knowing:\n"
        "    def values(self, rollouts, starts):\n"
        "        known = [float(t.prompt.columns['wanted'] in 'abc') for t in rollouts.trajectories]\n"
        "        at = torch.tensor(known)[:, None] * starts\n"
        "        return Values(at=at, starts=starts, bootstrap=torch.zeros(len(at)))\n"
        "    def update(self, rollouts, targets):\n        return {}\n\n"
        "@dataclass(frozen=True)\nclass Config:\n"
        "    def build(self, bench):\n        return Knowing()\n"
    )
    found = eval_critic(
        untrained / "recipe.yaml",
        [f"reward={tmp_path / 'sure.py'}:reward"],
        critic=f"{tmp_path / 'knows.py'}:Config",
        truth=SMALL,
        output=tmp_path / "out",
    )
    scores = found.report.overall.scores
    assert found.about["moment"] == "start"
    assert scores["rmse"].value == scores["bias"].value == scores["ece"].value == 0.0
    assert scores["explained_variance"].value == scores["auc"].value == 1.0


@pytest.mark.slow
def test_the_console_prints_tables_and_says_where_the_rest_is(ppo_run, tmp_path):
    command = [sys.executable, "-m", "llmac.cli", "eval-critic", str(ppo_run)]
    small = ["--states", "8", "--depths", "2", "--rollouts", "3", "--siblings", "2"]
    done = subprocess.run(
        [*command, *small, "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "value_head, run" in done.stdout
    assert "rmse_corrected" in done.stdout
    assert "depth 0.50" in done.stdout
    assert f"wrote {tmp_path / 'out'}" in done.stdout
    wrong = subprocess.run(
        [*command, "--step", "last"], capture_output=True, text=True, check=False, timeout=240
    )
    assert wrong.returncode == 1
    assert "--step must be the number of a step, or final; found 'last'" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.slow
def test_a_damaged_checkpoint_and_one_of_another_critic_are_refused(ppo_run, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(ppo_run), str(copy)], check=True)
    weights = copy / "checkpoints" / "step-00000004" / "critic" / "learner.pt"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="intact"):
        eval_critic(copy, truth=SMALL, output=tmp_path / "out")
    with pytest.raises(CheckpointError, match="does not fit"):
        eval_critic(ppo_run, ["critic.hidden_layers=[4]"], truth=SMALL, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "error", "part"),
    [
        ({}, CheckpointError, "neither a checkpoint nor a final/ model"),
        ({"step": 3}, CheckpointError, "no checkpoint of step 3; it has none"),
        ({"step": "final"}, CheckpointError, "no final/ model"),
        ({"source": "{}"}, ConfigError, "no config.yaml"),
        ({"source": "{}/nothing.yaml"}, ConfigError, "does not exist"),
        ({"source": "{}/run/final/critic"}, ConfigError, "did you mean .*run?"),
        ({"truth": Truth(rollouts=1)}, ConfigError, "rollouts is 1"),
        ({"truth": Truth(states=4)}, ConfigError, "at least 5 states"),
        (
            {"truth": Truth(), "states_from": Path("x")},
            ConfigError,
            "how many to sample has no effect",
        ),
    ],
)
def test_what_cannot_be_examined_is_refused_before_anything_is_loaded(
    untrained, arguments, error, part
):
    (untrained / "run" / "final" / "critic").mkdir(parents=True)
    source = arguments.pop("source", "{}/run").format(untrained)
    with pytest.raises(error, match=part):
        eval_critic(source, **arguments)
    assert not (untrained / "run" / "critic_eval").exists()


@pytest.mark.parametrize(
    ("critic", "error", "part"),
    [
        (None, ConfigError, "has no critic: grpo compares rewards"),
        ("{}/run", CheckpointError, "not a value model"),
        ("{}/nowhere", ConfigError, "no folder"),
        ("valu_head", ConfigError, "Did you mean value_head"),
        ("[1", ConfigError, "not valid YAML"),
    ],
)
def test_what_is_no_critic_is_refused_before_anything_is_loaded(untrained, critic, error, part):
    with pytest.raises(error, match=part):
        eval_critic(
            untrained / "recipe.yaml",
            ["algorithm.name=grpo"],
            critic=critic and critic.replace("{}", str(untrained)),
        )


@pytest.mark.parametrize("truth", [Truth(siblings=1), Truth(states=5)])
def test_a_critic_that_compares_siblings_needs_some(untrained, truth):
    with pytest.raises(ConfigError, match="leave_one_out needs 2 responses to a prompt"):
        eval_critic(untrained / "recipe.yaml", critic="leave_one_out", truth=truth)


@pytest.mark.parametrize("asked", [None, "tree_mean"])
def test_a_critic_that_repeats_its_plan_is_refused_before_anything_is_loaded(home, tmp_path, asked):
    trees = {"name": "spo_tree", "branching": [2, 2], "segment_tokens": 3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(home, tmp_path / "run", trees)))
    with pytest.raises(ConfigError, match=r"in no tree; examine another .* --critic monte_carlo"):
        eval_critic(tmp_path / "recipe.yaml", critic=asked)


def test_states_must_be_states(untrained, tmp_path):
    stored = tmp_path / "some.parquet"
    with pytest.raises(DataError, match="no rollout file"):
        eval_critic(untrained / "recipe.yaml", states_from=stored)
    plain = Trajectory(
        prompt=Prompt(id="p", token_ids=(2,), source="?"),
        response_ids=(3,),
        action_mask=(True,),
        sampler_logprobs=(0.0,),
        finish=Finish.STOP,
        group=0,
        reward=1.0,
    )
    write_rollouts(stored, [plain])
    with pytest.raises(DataError, match="without Monte-Carlo states"):
        eval_critic(untrained / "recipe.yaml", states_from=stored)


def test_saved_states_are_not_written_over(untrained, tmp_path):
    mine = tmp_path / "states.parquet"
    mine.write_text("mine")
    recipe = untrained / "recipe.yaml"
    with pytest.raises(ConfigError, match=r"states.parquet exists; .* --save-states"):
        eval_critic(recipe, save_states=mine, output=tmp_path / "report")
    with pytest.raises(ConfigError, match="leave out one of save_states and states_from"):
        eval_critic(recipe, save_states=tmp_path / "new", states_from=mine)
    assert mine.read_text() == "mine"


def test_a_critic_that_is_no_value_model_is_judged_from_the_end_of_a_run(home, tmp_path):
    settings = recipe_of(
        home, tmp_path / "run", {"name": "ppo", "group_size": 4}, critic={"name": "surprise"}
    )
    train(load_recipe(settings))
    truth = {"truth": SMALL, "save_states": tmp_path / "states"}
    last = eval_critic(tmp_path / "run", output=tmp_path / "a", **truth)
    final = eval_critic(
        tmp_path / "run", step="final", states_from=tmp_path / "states", output=tmp_path / "b"
    )
    assert final.report.values == pytest.approx(last.report.values, abs=1e-6)
    with pytest.raises(CheckpointError, match=r"--critic '{name: surprise, init: "):
        eval_critic(tmp_path / "run", critic=str(tmp_path / "run/final/critic"))


def test_a_recipe_that_was_not_trained_yet_is_at_its_start(untrained):
    assert find_run(untrained / "recipe.yaml").moment == "start"
    with pytest.raises(CheckpointError, match="no checkpoint of step 2"):
        find_run(untrained / "recipe.yaml", step=2)
