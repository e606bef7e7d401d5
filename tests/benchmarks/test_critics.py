"""scripts/benchmark critics: the arithmetic of its table, what is not run again, and the oracle's values."""

import dataclasses
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from llmac.core.collate import collate
from llmac.core.types import Finish, Prompt, Rollouts, Trajectory

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"


@pytest.fixture(scope="module")
def critics():
    """The part as a module; its neighbours import each other by bare names."""
    sys.path.insert(0, str(FOLDER))
    try:
        import critics

        yield critics
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def oracle(critics):
    import oracle

    return oracle


def moment(step, values, truth):
    return {"step": step, "values": values, "truth": truth}


def line(seed, accuracy, moments=(), setting="grpo", task="stages"):
    return {
        "task": task,
        "setting": setting,
        "seed": seed,
        "date": f"2026-01-0{seed + 1}",
        "held_out": {"80": accuracy},
        "tokens": 2e6,
        "cpu_seconds": 10.0,
        "moments": list(moments),
    }


def test_a_spread_is_the_mean_and_the_standard_error(critics):
    # deviations -.1, 0, .1: variance .01, / 3 seeds, root .0577
    assert critics.spread([0.4, 0.5, 0.6]) == ".500 ± .058"
    assert critics.spread([0.4]) == ".400"


def test_explained_variance_and_error_are_over_the_states_of_all_seeds(critics):
    seeds = [moment(80, [0.0, 1.0], [0.0, 1.0]), moment(80, [0.5, 0.5], [0.0, 1.0])]
    assert critics.explained(seeds) == pytest.approx(0.5)
    assert critics.error(seeds) == pytest.approx((0.5 / 4) ** 0.5)


def test_a_shift_of_all_values_is_an_error_and_explains_as_much(critics):
    shifted = [moment(80, [0.25, 1.25], [0.0, 1.0])]
    assert critics.explained(shifted) == 1.0
    assert critics.error(shifted) == 0.25


def test_truth_that_does_not_vary_explains_nothing(critics):
    assert critics.judged([line(0, 1.0, [moment(80, [0.9], [1.0])])], 80, critics.explained) == (
        "nan"
    )


def test_the_error_of_a_critic_is_the_jackknife_over_seeds(critics):
    runs = [line(0, 1.0, [moment(80, [0.0], [0.1])]), line(1, 1.0, [moment(80, [0.0], [0.3])])]
    # of both: root of .05; left out: .3 and .1, mean .2, (1/2)(.01 + .01), root .1
    assert critics.judged(runs, 80, critics.error) == ".224 ± .100"
    assert critics.judged([line(0, 1.0)], 80, critics.error) is None


def test_a_table_has_a_row_for_each_setting_that_was_run(critics):
    judged = [moment(80, [0.0, 1.0], [0.0, 1.0])]
    lines = [line(0, 0.5), line(1, 0.7), line(0, 0.9, judged, "ppo, as the recipe")]
    report = critics.table("stages", lines)
    assert report.rows == [
        ["grpo", 2, ".600 ± .100", None, None, 2.0, 10.0],
        ["ppo, as the recipe", 1, ".900", "1.000", ".000", 2.0, 10.0],
    ]
    assert "2026-01-01 to 2026-01-02" in report.notes[0]


def test_finished_runs_are_not_run_again(critics, tmp_path, monkeypatch):
    results, ran = tmp_path / "results.jsonl", []
    results.write_text(json.dumps(line(0, 0.5)) + "\n")
    monkeypatch.setattr(critics, "RESULTS", results)
    monkeypatch.setattr(critics, "train", lambda *job: ran.append(job[:3]))
    wanted = Namespace(seeds=2, tasks=["stages"], only=["grpo"], docs=False)
    (report,) = critics.measure(wanted, 1)
    assert ran == [("stages", "grpo", 1)]
    assert report.rows[0][1] == 1


def test_the_page_changes_between_its_marks_only(critics, tmp_path):
    page = tmp_path / "page.md"
    begin, end = critics.MARKS
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    critics.write_between(page, critics.MARKS, [critics.table("stages", [line(0, 0.5)])])
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\n\nTask stages")
    assert text.endswith(f"{end}\nafter\n")
    assert "old" not in text
    page.write_text("no marks")
    with pytest.raises(Exception, match="lacks the lines"):
        critics.write_between(page, critics.MARKS, [])


def test_the_page_has_the_marks(critics):
    text = critics.PAGE.read_text()
    assert text.index(critics.MARKS[0]) < text.index(critics.MARKS[1])


@pytest.mark.parametrize("task", ["quickstart", "stages"])
def test_every_setting_is_a_recipe_that_loads(critics, task):
    from llmac.config import load_recipe

    root, responses = FOLDER.parents[1], set()
    for method, overrides in critics.SETTINGS.values():
        recipe = load_recipe(
            root / "recipes" / f"{critics.TASKS[task].recipe}_{method}.yaml",
            [o.replace("scripts/", f"{root}/scripts/") for o in overrides],
        )
        responses.add(recipe.actor.prompts_per_step * recipe.algorithm.settings.group_size)
    assert len(responses) == 1  # a step of one samples as much as a step of another


def response(text, reward):
    return Trajectory(
        prompt=Prompt(id="p", token_ids=(1,), source="8+6-1="),
        response_ids=(5,) * (len(text) + 1),
        action_mask=(True,) * (len(text) + 1),
        sampler_logprobs=(-1.0,) * (len(text) + 1),
        finish=Finish.STOP,
        group=0,
        reward=reward,
        response_text=text,
    )


def rollouts_of(trajectories):
    batch = collate(trajectories, length_limit=20)
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return Rollouts(**fields, old_logprobs=batch.sampler_logprobs, ref_logprobs=None)


def test_the_oracle_drops_at_the_first_wrong_character(oracle):
    right, wrong = response("8+6=14;14-1=13", 1.0), response("8+6=4;4-1=3", 0.0)
    rollouts = rollouts_of([right, wrong])
    values = oracle.LiveOracle().values(rollouts, rollouts.action_mask).at
    # critical results: 1 of 2 wrong; plain ones: 0 of 1; (wrong + .5) / (tries + 1)
    critical, plain = 1 - 1.5 / 3, 1 - 0.5 / 2
    assert values[0, :5].tolist() == pytest.approx([critical * plain] * 5)
    assert values[0, 5:13].tolist() == pytest.approx([plain] * 8)
    assert values[0, 13:].tolist() == pytest.approx([1.0, 1.0])
    assert values[1, :5].tolist() == pytest.approx([critical * plain] * 5)
    assert values[1, 5:12].tolist() == [0.0] * 7  # nobody recovered


def test_an_error_never_makes_the_oracle_hope_more(oracle):
    lucky, wrong = response("8+6=4;4-1=13", 1.0), response("8+6=4;4-1=3", 0.0)
    rollouts = rollouts_of([lucky, wrong])
    values = oracle.LiveOracle().values(rollouts, rollouts.action_mask).at
    luck = 8 / (8 + 7)  # states after the error: 8 of the response that recovers, 7 of the other
    assert values[0, 5:13].tolist() == pytest.approx([luck] * 8)
    faultless = (1 - 2.5 / 3) * (1 - 0.5 / 1)
    assert values[0, :5].tolist() == pytest.approx([faultless + (1 - faultless) * luck] * 5)


def test_the_oracle_knows_which_results_are_critical(oracle):
    text, begins, critical = oracle.solution("45+5-3-8=")
    assert text == "45+5=50;50-3=47;47-8=39"
    assert [text[b : b + 2] for b in begins] == ["50", "47", "39"]
    assert critical == (True, True, True)
    assert oracle.solution("45+4-3=")[2] == (False, False)
