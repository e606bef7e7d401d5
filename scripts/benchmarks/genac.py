"""A critic that thinks before it says a value against heads on the same model: error, ranking, use to PPO, cost.

Every piece of work leaves its answer in runs/benchmark/genac/<seed>/<piece>.json and is not done again.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from critics import short, spread
from jobs import CHECKOUT, RUNS, run_job
from pages import check_marks, write_between
from report import Cell, Report

FOLDER = RUNS / "genac"
PAGE = CHECKOUT / "docs" / "benchmarks.md"
MARKS = "<!-- genac: made by scripts/benchmark genac -->", "<!-- genac: end -->"

RESPONSES, EPOCHS = 5120, 6
"""Of the start policy, for each critic to learn from: as many as stage 2 samples. Heads may see them so often."""
STATES, CONTINUATIONS = 200, 32
STEPS, EVERY = 60, 10
"""Of the runs, and from one evaluation to the next."""
TEMPLATE = "recipes/templates/quickstart_critic.jinja"
TOKENS = 48
"""Room for what the critic writes about the longer sums."""
TRACES: dict[str, tuple[str, ...]] = {"short": (), "taught": ("--longer", "9")}
"""Options of the traces. short: of sums as short as in training; taught: reasoning about longer ones, too, unscored."""
HEADS = {
    f"{head}, lr {lr:g}": (head, lr) for lr in (3e-4, 1e-3) for head in ("value_head", "hl_gauss")
}
"""Candidates of the comparison; of each head that with the smaller error on the short sums is in the table."""
LENGTHS = {"short": "held_out.jsonl", "longer": "longer.jsonl"}
COST = ("timing_s/", "cpu_s/", "rollout/sampled_tokens", "rollout/tokens", "critic/s")
"""What is kept of every step, by how the names begin."""
PHASES = ("gen", "old_log_prob", "values", "update_actor", "update_critic", "sync")


def measure(arguments: argparse.Namespace, threads: int) -> list[Report]:
    """Three tables of all that is there."""
    if arguments.docs:
        check_marks(PAGE, MARKS)
    seeds = range(min(arguments.seeds, 3))
    for seed in seeds:
        for piece in (first_stage, second_stage, heads, judge):
            piece(seed, threads)
    for seed in seeds:  # all with the head that is best over all seeds
        for setting in SETTINGS:
            train(setting, seed, threads)
    reports = [values_table(), runs_table(), cost_table()]
    if arguments.docs:
        write_between(PAGE, MARKS, reports)
    return reports


def start(threads: int) -> Path:
    """Policy and prompts, made once."""
    folder = FOLDER / "start"
    work(folder, "start", {"do": "start", "folder": str(folder)}, threads)
    return folder


def first_stage(seed: int, threads: int) -> None:
    """The generative critic learns from traces, and is told how good the policy is, which it has not met yet."""
    begin = start(threads)
    rate = sampled(seed, threads)["success_rate"]
    for name, options in TRACES.items():
        folder = FOLDER / str(seed) / name
        if not (folder / "policy").exists():
            shutil.copytree(begin / "policy", folder / "policy")
        traces = ["recipes/quickstart_genac.py", folder, "--seed", seed, *options]
        script(folder, "traces", traces, threads)
        asked = [f"model.name={folder / 'critic'}", f"data.name={folder / 'critic_traces.jsonl'}"]
        stage(folder, "sft", "quickstart_genac_sft", [*asked, f"run.seed={seed}"], threads)
        told = {"do": "tell", "folder": str(folder / "sft" / "final"), "success_rate": rate}
        work(folder, "told", told, threads)


def second_stage(seed: int, threads: int) -> None:
    """It learns from what came of the policy's responses."""
    for name in TRACES:
        folder = FOLDER / str(seed) / name
        begin = f"critic.init={folder / 'sft' / 'final'}"
        stage(folder, "critic", "quickstart_genac_critic", [*about(seed), begin], threads)


def sampled(seed: int, threads: int) -> dict[str, Any]:
    """The file of responses that the heads learn from."""
    folder = FOLDER / str(seed)
    job = {"do": "rollouts", **policy_recipe(seed), "responses": RESPONSES}
    return work(folder, "rollouts", job | {"output": str(folder / "rollouts.parquet")}, threads)


def heads(seed: int, threads: int) -> None:
    """All candidates learn from it."""
    folder = FOLDER / str(seed)
    for name, (head, lr) in HEADS.items():
        card = f"critic={{name: {head}, lr: {lr}, betas: [0.9, 0.98]}}"
        job = {"do": "pretrain", **policy_recipe(seed, card), "epochs": EPOCHS}
        job |= {"rollouts": str(folder / "rollouts.parquet"), "output": str(folder / slug(name))}
        work(folder, slug(name), job, threads)


def judge(seed: int, threads: int) -> None:
    """Every critic on states of short and of longer sums."""
    folder = FOLDER / str(seed)
    asked = {name: str(folder / slug(name) / "critic") for name in HEADS}
    for name in TRACES:
        for stage_name, init in (("stage 1", "sft/final"), ("stage 2", "critic/final/critic")):
            asked[f"generative ({name}), {stage_name}"] = (
                f"{{name: generative, init: {folder / name / init}, template: {TEMPLATE}, "
                f"max_new_tokens: {TOKENS}, learns: false}}"
            )
    for length, prompts in LENGTHS.items():
        job = {
            "do": "judge",
            **policy_recipe(
                seed,
                f"evaluation.data.name={FOLDER / 'start' / prompts}",
                f"rollout.max_new_tokens={50 if length == 'short' else 76}",
            ),
            "critics": asked,
            "states": str(folder / f"states-{length}"),
            "count": STATES,
            "rollouts": CONTINUATIONS,
            "folder": str(folder / f"reports-{length}"),
            "seed": seed,
        }
        work(folder, f"judged-{length}", job, threads)


def head_of(kind: str) -> str:
    """Of a head's candidates the one with the smallest error on short sums, over the seeds there are."""
    lines = answers("judged-short")
    errors = {
        name: statistics.fmean(line["judged"][name]["rmse"] for line in lines)
        for name, (head, _) in HEADS.items()
        if head == kind
    }
    return min(errors, key=errors.__getitem__)


SETTINGS = ("PPO, value_head", "PPO, hl_gauss", "GenAC")
GROUPS = "algorithm.group_size=8", "actor.prompts_per_step=32"
"""The shape of GenAC's steps, for PPO too."""


def train(setting: str, seed: int, threads: int) -> None:
    """The policy with each critic: the same prompts, responses a step and policy's settings."""
    folder = FOLDER / str(seed)
    output = folder / f"run-{slug(setting)}"
    if setting == "GenAC":
        recipe, critic = "quickstart_genac", f"critic.init={folder / 'short/critic/final/critic'}"
        shape = ()
    else:
        kind = setting.removeprefix("PPO, ")
        best = head_of(kind)
        recipe = "quickstart_ppo"
        critic = (
            f"critic={{name: {kind}, init: {folder / slug(best) / 'critic'}, "
            f"lr: {HEADS[best][1]}, betas: [0.9, 0.98]}}"
        )
        shape = GROUPS
    job = {
        "do": "learn",
        "recipe": f"recipes/{recipe}.yaml",
        "overrides": [
            *about(seed),
            f"evaluation.data.name={FOLDER / 'start' / 'held_out.jsonl'}",
            f"evaluation.every={EVERY}",
            critic,
            *shape,
            f"run.output={output}",
            f"run.steps={STEPS}",
            f"run.save_every={STEPS}",
        ],
        "watch": COST,
    }
    work(folder, f"run-{slug(setting)}", job, threads)


def about(seed: int) -> list[str]:
    """Overrides that every recipe with the policy takes."""
    begin = FOLDER / "start"
    return [
        f"model.name={begin / 'policy'}",
        f"data.name={begin / 'train.jsonl'}",
        f"run.seed={seed}",
    ]


def policy_recipe(seed: int, *more: str) -> dict[str, Any]:
    """The quickstart's PPO with this policy and these prompts."""
    own = [*about(seed), f"evaluation.data.name={FOLDER / 'start' / 'held_out.jsonl'}"]
    output = f"run.output={FOLDER / str(seed) / 'nothing'}"
    return {"recipe": "recipes/quickstart_ppo.yaml", "overrides": [*own, output, *more]}


def stage(folder: Path, name: str, recipe: str, overrides: list[str], threads: int) -> None:
    """A recipe, as a user runs it."""
    command = ["recipes/train.py", f"recipes/{recipe}.yaml", *overrides]
    script(folder, name, [*command, f"run.output={folder / name}"], threads)


def script(folder: Path, name: str, command: Sequence[object], threads: int) -> None:
    """A Python script of the checkout, once."""
    done = folder / f"{name}.json"
    if not done.exists():
        usage = run_job([sys.executable, *map(str, command)], threads)
        done.write_text(json.dumps({"cpu_seconds": usage.cpu_seconds}))


def work(folder: Path, name: str, job: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """A piece of work, once; its answer. What an interrupted one has left as `output` goes."""
    done, asked, answer = (folder / f"{name}.{end}" for end in ("json", "job", "answer"))
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if "output" in job:
            shutil.rmtree(job["output"], ignore_errors=True)
            Path(job["output"]).unlink(missing_ok=True)
        asked.write_text(json.dumps(job))
        run_job([sys.executable, "scripts/benchmarks/genac_job.py", asked, answer], threads)
        answer.rename(done)
    return json.loads(done.read_text())


def answers(piece: str) -> list[dict[str, Any]]:
    """Of all seeds that have got so far."""
    return [json.loads(path.read_text()) for path in sorted(FOLDER.glob(f"[0-9]*/{piece}.json"))]


def slug(name: str) -> str:
    """For a file's name."""
    return "".join(c if c.isalnum() or c == "." else "-" for c in name.lower())


def values_table() -> Report:
    """Error and ranking of the critics, means over seeds ± standard errors."""
    lines = {length: answers(f"judged-{length}") for length in LENGTHS}
    rows: list[list[Cell]] = []
    names = [head_of("value_head"), head_of("hl_gauss")]
    names += [name for name in lines["short"][0]["judged"] if name.startswith("generative")]
    for name in names:
        cells: list[Cell] = [name, len(lines["longer"])]
        for length in LENGTHS:
            for key in ("rmse", "auc"):
                cells.append(spread([line["judged"][name][key] for line in lines[length]]))
        rows.append(cells)
    noise = statistics.fmean(next(iter(x["judged"].values()))["noise"] for x in lines["short"])
    columns = [f"{what}, {length} sums" for length in LENGTHS for what in ("RMSE", "AUC")]
    return Report(
        title="Error and ranking",
        columns=["critic", "seeds", *columns],
        rows=rows,
        notes=[
            f"{STATES} states a seed at five depths, truth by {CONTINUATIONS} continuations: exact values would have "
            f"an RMSE of {short(noise)} on short sums."
        ],
    )


def runs_table() -> Report:
    """Accuracy of the runs."""
    rows: list[list[Cell]] = []
    for setting in SETTINGS:
        curves = [x["curve"] for x in answers(f"run-{slug(setting)}")]
        if curves:
            halves = [next(p for p in c if p["step"] >= STEPS / 3) for c in curves]
            rows.append(
                [
                    setting,
                    len(curves),
                    spread([p["accuracy"] for p in halves]),
                    spread([c[-1]["accuracy"] for c in curves]),
                    statistics.fmean(c[-1]["tokens"] for c in curves) / 1e6,
                    statistics.fmean(c[-1]["cpu_seconds"] for c in curves),
                ]
            )
    third = f"accuracy, step {STEPS // 3}"
    columns = ["setting", "seeds", third, f"accuracy, step {STEPS}", "sampled tokens, M", "CPU s"]
    return Report(title="Runs", columns=columns, rows=rows)


def cost_table() -> Report:
    """CPU seconds of a step by phase, and against the first setting; sampled tokens."""
    rows: list[list[Cell]] = []
    first = None
    for setting in SETTINGS:
        found = [x["watched"] for x in answers(f"run-{slug(setting)}")]
        if not found:
            continue
        phases = [middle(found, f"cpu_s/{phase}") for phase in PHASES]
        step = sum(phases)
        first = first or step
        tokens = middle(found, "rollout/sampled_tokens")
        rows.append([setting, *phases, step, step / first, tokens])
    columns = ["setting", *PHASES, "step", f"/ {SETTINGS[0]}", "sampled tokens"]
    return Report(
        title="CPU seconds of a step", columns=columns, rows=rows, notes=["Means over steps."]
    )


def middle(found: Sequence[Mapping[str, Sequence[float]]], name: str) -> float:
    """Mean over steps and seeds; 0 where nobody counted."""
    numbers = [x for run in found for x in run.get(name, ())]
    return statistics.fmean(numbers) if numbers else 0.0
