"""scripts/benchmark genac: which head stands for its kind, what the tables say, and that nothing is done twice."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"


@pytest.fixture(scope="module")
def module():
    """The part; its neighbours import each other by bare names."""
    sys.path.insert(0, str(FOLDER))
    try:
        import genac

        yield genac
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture
def genac(module, tmp_path, monkeypatch):
    """Its answers lie elsewhere."""
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    return module


def judged(genac, seed, errors):
    """Answers of a seed: RMSE of each critic on short sums, twice that on longer ones."""
    (genac.FOLDER / str(seed)).mkdir()
    for factor, length in enumerate(genac.LENGTHS, start=1):
        found = {
            name: {"rmse": factor * error, "auc": 1 - error, "noise": 0.05}
            for name, error in errors.items()
        }
        file = genac.FOLDER / str(seed) / f"judged-{length}.json"
        file.write_text(json.dumps({"judged": found}))


def test_a_head_is_shown_with_its_best_learning_rate_over_all_seeds(genac):
    names = list(genac.HEADS)
    good, bad = ([n for n in names if f"lr {lr}" in n] for lr in ("0.001", "0.0003"))
    generative = {"generative (short), stage 1": 0.1}
    judged(genac, 0, dict.fromkeys(good, 0.2) | dict.fromkeys(bad, 0.3) | generative)
    judged(genac, 1, dict.fromkeys(good, 0.25) | dict.fromkeys(bad, 0.24) | generative)
    assert genac.head_of("value_head") == "value_head, lr 0.001"
    rows = genac.values_table().rows
    assert [row[0] for row in rows] == [*good, *generative]
    assert rows[0][1:] == [2, ".225 ± .025", ".775 ± .025", ".450 ± .050", ".775 ± .025"]


def test_a_step_costs_what_its_phases_cost(genac):
    for seed, scale in ((0, 1.0), (1, 3.0)):
        (genac.FOLDER / str(seed)).mkdir()
        for setting, values in (("PPO, value_head", 1.0), ("GenAC", 3.0)):
            watched = {f"cpu_s/{phase}": [scale, scale] for phase in genac.PHASES}
            watched |= {"cpu_s/values": [scale * values] * 2, "cpu_s/eval": [100.0]}
            watched |= {"rollout/sampled_tokens": [10.0, 20.0]}
            line = {"watched": watched, "curve": []}
            file = genac.FOLDER / str(seed) / f"run-{genac.slug(setting)}.json"
            file.write_text(json.dumps(line))
    ppo, ours = genac.cost_table().rows
    assert ppo[0] == "PPO, value_head"
    assert ppo[1:] == [2.0] * 6 + [12.0, 1.0, 15.0]
    assert ours[7:9] == [16.0, pytest.approx(4 / 3)]


def test_finished_work_is_not_done_again(genac):
    (genac.FOLDER / "0").mkdir()
    (genac.FOLDER / "0" / "rollouts.json").write_text('{"success_rate": 0.25}')
    assert genac.sampled(0, threads=1) == {"success_rate": 0.25}
    (genac.FOLDER / "0" / "critic.json").write_text("{}")
    genac.stage(genac.FOLDER / "0", "critic", "no such recipe", [], threads=1)


def test_what_an_interrupted_piece_has_left_is_in_nobodys_way(genac, monkeypatch):
    left = genac.FOLDER / "0" / "head"
    left.mkdir(parents=True)

    def run_job(command, threads):
        assert not left.exists()
        command[-1].write_text('{"epoch": 1}')

    monkeypatch.setattr(genac, "run_job", run_job)
    found = genac.work(genac.FOLDER / "0", "head", {"do": "x", "output": str(left)}, threads=1)
    assert found == {"epoch": 1}
    assert json.loads((genac.FOLDER / "0" / "head.json").read_text()) == found
