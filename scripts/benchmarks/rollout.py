"""Sampling: tokens a second of each engine, against transformers' `generate`."""

import importlib.util
import json
import shutil
import statistics
import sys
from pathlib import Path

from jobs import CHECKOUT, fresh_folder, run_job
from report import Cell, Report, ratio

ROUNDS = 7
BASELINE = "transformers generate"


def measure(start: Path, threads: int) -> list[Report]:
    """One table for the quickstart's policy, one for a random model of 3 million parameters."""
    folder = fresh_folder("rollout")
    save_larger_model(folder / "larger")
    cases = {"the quickstart's policy": start / "policy", "random weights": folder / "larger"}
    reports = [
        of_model(name, model, start / "train.jsonl", folder / "result.json", threads)
        for name, model in cases.items()
    ]
    shutil.rmtree(folder)
    return reports


def save_larger_model(folder: Path) -> None:
    """3 million parameters; a vocabulary so large that random responses seldom end early."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    spec = importlib.util.spec_from_file_location("start", CHECKOUT / "recipes" / "quickstart.py")
    quickstart = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = quickstart  # its dataclass looks itself up
    spec.loader.exec_module(quickstart)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=quickstart.PAD,
        bos_token_id=None,
        eos_token_id=quickstart.END,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    quickstart.make_tokenizer().save_pretrained(folder)


def of_model(name: str, model: Path, prompts: Path, result: Path, threads: int) -> Report:
    job = CHECKOUT / "scripts" / "benchmarks" / "rollout_job.py"
    run_job([sys.executable, job, model, prompts, str(ROUNDS), result], threads)
    found = json.loads(result.read_text())
    speeds = {
        engine: [r["tokens"] / r["seconds"] for r in rounds]
        for engine, rounds in found["rounds"].items()
    }
    rows: list[list[Cell]] = []
    for engine, rounds in found["rounds"].items():
        cores = statistics.median(r["cpu_seconds"] / r["seconds"] for r in rounds)
        times = ratio(speeds[engine], speeds[BASELINE])
        rows.append([engine, statistics.median(speeds[engine]), times, cores])
    rows += [[engine, None, None, None] for engine in found["absent"]]
    return Report(
        title=f"Sampling, {name}, {found['parameters']:,} parameters: 32 prompts x 8, up to 50 tokens, "
        f"medians of {ROUNDS} rounds",
        columns=["engine", "tokens/s", f"/ {BASELINE.split()[1]}", "cores used"],
        rows=rows,
        notes=[
            "hf and vllm also report log-probs; generate does not.",
            *(f"{engine}: {reason}" for engine, reason in found["absent"].items()),
        ],
        raw=found,
    )
