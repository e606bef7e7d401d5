"""scripts/benchmark credit: what a curve is made of, its arithmetic, its table, and that nothing is run twice."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"


@pytest.fixture(scope="module")
def credit():
    """The part as a module; its neighbours import each other by bare names."""
    sys.path.insert(0, str(FOLDER))
    try:
        import credit

        yield credit
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def picture(credit):
    import credit_picture

    return credit_picture


@pytest.fixture(scope="module")
def job(credit):
    import credit_job

    return credit_job


def points(*pairs):
    """A curve of (tokens, accuracy), a token taking a second."""
    return [
        {"step": i, "tokens": t, "accuracy": a, "seconds": t, "cpu_seconds": t}
        for i, (t, a) in enumerate(pairs)
    ]


def line(setting, seed, *pairs, task="stages"):
    date = f"2026-01-0{seed + 1}"
    curve = points(*pairs)
    return {"task": task, "setting": setting, "seed": seed, "date": date, "curve": curve}


def test_a_curve_counts_all_sampled_tokens_and_the_seconds_of_training_alone(job):
    accuracy = {"eval/held_out/pass@1": 0.5}
    lines = [
        {"step": 0, **accuracy, "timing_s/start": 9.0, "cpu_s/start": 9.0},
        {"step": 1, "rollout/sampled_tokens": 30.0, "rollout/tokens": 5.0, "timing_s/gen": 1.0},
        {
            "step": 2,
            **accuracy,
            "rollout/sampled_tokens": 20.0,
            "timing_s/update_actor": 2.0,
            "timing_s/eval": 50.0,
            "timing_s/step": 60.0,
            "timing_s/save": 7.0,
            "cpu_s/values": 0.5,
            "cpu_s/eval": 50.0,
        },
    ]
    first, last = job.curve(lines)
    assert first == {"step": 0, "accuracy": 0.5, "tokens": 0, "seconds": 0, "cpu_seconds": 0}
    assert last == {"step": 2, "accuracy": 0.5, "tokens": 50, "seconds": 3, "cpu_seconds": 0.5}
    assert job.watched(lines, ["rollout/tokens"]) == {"rollout/tokens": [5.0]}


def test_phases_are_clocked_in_cpu_seconds_too(job):
    phases = job.ClockedPhases()
    for _ in range(2):
        with phases("gen"):
            sum(range(10_000))
    found = phases.drain()
    assert set(found) == {"timing_s/gen", "cpu_s/gen"}
    assert found["cpu_s/gen"].value > 0
    assert phases.drain() == {}


def test_a_goal_is_reached_between_evaluations(credit):
    curve = points((0, 0.2), (10, 0.4), (20, 0.8), (30, 0.7))
    assert credit.first_at(curve, 0.2) == 0
    assert credit.first_at(points((0, 0.2), (10, 0.1), (20, 0.3)), 0.2) == 0
    assert credit.first_at(curve, 0.5) == pytest.approx(12.5)
    assert credit.first_at(curve, 0.8) == 20
    assert credit.first_at(curve, 0.9) is None


def test_mean_accuracy_is_over_tokens_and_not_over_evaluations(credit):
    # a trapezium of 10 x .5 and one of 30 x 1
    assert credit.area(points((0, 0.0), (10, 1.0), (40, 1.0))) == pytest.approx(35 / 40)


def test_who_never_reaches_the_goal_counts_with_all_it_used_and_is_named(credit):
    early, late = points((0, 0.0), (2e6, 1.0)), points((0, 0.0), (3e6, 0.4))
    assert credit.until([early, early], 0.5) == ("1.000 ± .000", "2 of 2")
    assert credit.until([early, late], 0.5) == ("> 2.000 ± 1.000", "1 of 2")


def test_the_goal_of_a_table_is_the_references_mean_final_accuracy(credit):
    lines = [
        line("GRPO", 0, (0, 0.0), (2e6, 0.4)),
        line("GRPO", 1, (0, 0.0), (2e6, 0.6)),
        line("SPO-tree", 0, (0, 0.0), (1e6, 0.5), (2e6, 0.7)),
        line("TEMPO", 0, (0, 0.0), (1e6, 0.9), task="quickstart"),
    ]
    report = credit.table("stages", lines)
    assert report.columns[4] == "tokens to GRPO's .500, M"
    assert report.rows == [
        ["GRPO", 2, ".500 ± .100", ".250 ± .050", "> 1.833 ± .167", "1 of 2", 2.0, 2e6, 2e6],
        ["SPO-tree", 1, ".700", ".425", "1.000", "1 of 1", 2.0, 2e6, 2e6],
    ]
    assert "2026-01-01 to 2026-01-02" in report.notes[0]
    assert credit.table("quickstart", lines).rows[0][4:6] == ["-", "-"]


def test_curves_are_averaged_as_far_as_all_go(picture):
    at, mean, error = picture.average(
        [points((0, 0.0), (10, 1.0)), points((0, 0.0), (5, 0.0), (20, 0.6))], "tokens"
    )
    assert (at[0], at[-1]) == (0, 10)
    # at 10 the second is a third of the way from 0 to .6: .2; deviation of 1 and .2 over root 2: .4
    assert (mean[0], mean[-1]) == (0, pytest.approx(0.6))
    assert (error[0], error[-1]) == (0, pytest.approx(0.4))
    assert picture.average([points((0, 0.0), (10, 1.0))], "tokens")[2] == [0.0] * len(at)


def test_the_picture_has_two_panels_for_each_task_that_was_run(picture, credit, tmp_path):
    lines = [line("GRPO", 0, (0, 0.0), (2e6, 0.4))]
    runs = {name: credit.runs_of(name, lines) for name in credit.TASKS}
    assert runs == {"quickstart": {}, "stages": {"GRPO": [lines[0]["curve"]]}}
    picture.draw(runs, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    picture.draw({"stages": {}}, tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()
    assert set(picture.COLOURS) == set(credit.SETTINGS)


def test_finished_runs_are_not_run_again_and_the_page_changes_between_its_marks(
    credit, tmp_path, monkeypatch
):
    results, page, ran = tmp_path / "results.jsonl", tmp_path / "page.md", []
    results.write_text(json.dumps(line("GRPO", 0, (0, 0.0), (2e6, 0.4))) + "\n")
    page.write_text(f"before\n{credit.MARKS[0]}\nold\n{credit.MARKS[1]}\nafter\n")
    monkeypatch.setattr(credit, "RESULTS", results)
    monkeypatch.setattr(credit, "PAGE", page)
    monkeypatch.setattr(credit, "PICTURE", tmp_path / "picture.png")
    monkeypatch.setattr(credit, "train", lambda *job: ran.append(job[:3]))
    wanted = Namespace(seeds=2, tasks=["stages"], only=["GRPO", "TEMPO"], docs=True)
    credit.measure(wanted, 1)
    assert ran == [("stages", "TEMPO", 0), ("stages", "GRPO", 1), ("stages", "TEMPO", 1)]
    text = page.read_text()
    assert text.startswith(f"before\n{credit.MARKS[0]}\n\nTask stages")
    assert text.endswith(f"{credit.MARKS[1]}\nafter\n")
    assert "old" not in text
    with pytest.raises(Exception, match="there is no 'grpo'; settings: GRPO, PPO"):
        credit.measure(Namespace(seeds=1, tasks=["stages"], only=["grpo"], docs=False), 1)


def test_the_page_has_the_marks(credit):
    text = credit.PAGE.read_text()
    assert text.index(credit.MARKS[0]) < text.index(credit.MARKS[1])


@pytest.mark.parametrize("task", ["quickstart", "stages"])
def test_every_method_is_a_recipe_that_differs_in_how_credit_is_assigned_alone(credit, task):
    from llmac.config import load_recipe

    recipes = [
        load_recipe(FOLDER.parents[1] / "recipes" / f"{task}_{method}.yaml")
        for method in credit.SETTINGS.values()
    ]
    for recipe in recipes:
        assert recipe.model == recipes[0].model
        assert recipe.rollout == recipes[0].rollout
        assert recipe.evaluation == recipes[0].evaluation
        as_run = {"prompts_per_step": 1, "lr": 1.0}  # as many as make the tokens equal; the task's
        assert recipe.actor.model_copy(update=as_run) == recipes[0].actor.model_copy(update=as_run)
        assert recipe.algorithm.settings.kl_coef == 0
