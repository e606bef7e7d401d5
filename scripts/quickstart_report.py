"""What the quickstart's run has reached, from its metrics.jsonl; called by scripts/quickstart."""

import argparse
import sys
from pathlib import Path

from llmac.metrics import read_metrics


def report(run: Path, seconds: int) -> str:
    """Where things are, how long it took, and held-out accuracy before and after, the last line."""
    accuracies = [
        value
        for line in read_metrics(run / "metrics.jsonl")
        for name, value in line.items()
        if name.startswith("eval/") and name.endswith("/pass@1")
    ]
    start = run.parent / "start" / "held_out.jsonl"
    prompts = len(start.read_text().splitlines())
    return (
        f"run directory:  {run}\n"
        f"trained policy: {run / 'final'}\n"
        f"learning curve: {run / 'learning_curve.png'}\n"
        f"wall time:      {seconds // 60} min {seconds % 60} s, supervised warm-up included\n"
        f"held-out accuracy: {accuracies[0]:.2f} -> {accuracies[-1]:.2f} (greedy, {prompts} prompts)\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=int, required=True)
    arguments = parser.parse_args()
    sys.stdout.write(report(arguments.run, arguments.seconds))
