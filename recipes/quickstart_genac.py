"""The quickstart's generative critic before it has learnt anything: a tiny model, and traces of how to judge a sum.

    python recipes/quickstart_genac.py runs/quickstart/start --seed 0

reads the policy that `quickstart.py` has left there and writes beside it `critic/` (the policy's weights with a few
more characters) and `critic_traces.jsonl` (prompt, completion). Half a minute without a GPU.

The critic reads a sum, the solution so far and how often the actor is right at present, in percent. It says whether
all that is written is right, works out what is left, and only then gives a score:

    4+8-6-9+1=4+8=12;12-6=14?27:      n<answer>0</answer>
    4+8-6-9+1=4+8=12;12-6=6;?27:      y-97!+18<answer>4</answer>

A step of the work is the operation, the last digit of its result, and `!` where it needs a carry or a borrow: that is
where the actor goes wrong. The score is its chance of a right end in tenths. In the traces the scores are those of
students with a known rate of mistakes, from none to always: the critic learns what the percentage in its prompt means,
and need not learn anew when the actor has become better. To score the actor itself is for the next stage.
"""

import argparse
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jinja2 import Template
from quickstart import SIX_STEPS, VOCABULARY, Sum, Task, calculate, random_sum
from quickstart import make_tokenizer as policy_tokenizer
from transformers import AddedToken, PreTrainedTokenizerFast, Qwen2ForCausalLM

TEMPLATE = Path(__file__).parent / "templates" / "quickstart_critic.jinja"
RENDER = Template(TEMPLATE.read_text()).render
CHARACTERS, TAGS = "?:yn!", ("<answer>", "</answer>")
"""What the critic has besides the policy's characters; these come first, so that it starts with their embeddings."""
CRITIC = replace(SIX_STEPS, context_tokens=160)
"""The critic's context has room for longer sums, too."""
BUG_RATES = tuple(rate / 10 for rate in range(11))
UNTOLD, SLIPS = 0.05, 0.1
"""Traces without the percentage, as before a first step; with a slip of the pen that is no student's bug."""
TRACES, SUMS_A_STUDENT = 24576, 2000


@dataclass(frozen=True, slots=True)
class Checked:
    """What can be said of a state without knowing who goes on from it."""

    reasoning: str
    right: bool
    """No written equation is wrong."""
    critical: int
    """Results still to come that need a carry or a borrow."""


def check(problem: Sum, partial: str) -> Checked:
    """Check what is written of a solution, and look ahead.

    >>> check(Sum(4, (("+", 8), ("-", 6), ("-", 9), ("+", 1))), "4+8=12;12-6=6;")
    Checked(reasoning='y-97!+18', right=True, critical=1)
    """
    written = partial.split(";")
    words, value, critical = "y", problem.start, 0
    for index, (sign, digit) in enumerate(problem.operations):
        result = calculate(value, sign, digit, bug=False)
        hard = calculate(value, sign, digit, bug=True) != result
        equation = f"{value}{sign}{digit}={result}"
        begun = written[index] if index < len(written) else ""
        whole = index < len(written) - 1
        if begun != equation if whole else not equation.startswith(begun):
            return Checked("n", right=False, critical=0)
        if "=" not in begun or begun.endswith("="):
            words += f"{sign}{digit}{result % 10}{'!' * hard}"
            critical += hard
        value = result
    if len(written) > len(problem.operations):
        return Checked("n", right=False, critical=0)
    return Checked(words, right=True, critical=critical)


class Student:
    """Solves sums with a known rate of mistakes; knows what became of each kind of state."""

    def __init__(self, bug_rate: float, rng: random.Random, task: Task) -> None:
        """Watch how sums of the task end."""
        self.bug_rate = bug_rate
        outcomes: dict[tuple[bool, int], list[bool]] = defaultdict(list)
        ends: list[bool] = []
        for _ in range(SUMS_A_STUDENT):
            problem = random_sum(rng, task)
            solution = problem.worked(rng, bug_rate=bug_rate)
            good = solution.rpartition("=")[2] == str(problem.answer)
            ends.append(good)
            for partial in beginnings(solution):
                seen = check(problem, partial)
                outcomes[seen.right, seen.critical].append(good)
        self.success_rate = sum(ends) / len(ends)
        self._chances = {kind: sum(found) / len(found) for kind, found in outcomes.items()}

    def score(self, state: Checked) -> int:
        """Chance of a right end in tenths; of kinds of state that never came up, that of as many independent steps."""
        independent = (1 - self.bug_rate) ** state.critical if state.right else 0.0
        return round(10 * self._chances.get((state.right, state.critical), independent))


def beginnings(solution: str) -> list[str]:
    """What is written before each equation.

    >>> beginnings("4+8=12;12-6=6")
    ['', '4+8=12;']
    """
    return [solution[:at] for at in (0, *(i + 1 for i, c in enumerate(solution) if c == ";"))]


def prompt_of(problem: Sum, partial: str, success_rate: float | None) -> str:
    """What the critic reads."""
    return RENDER(problem=problem.prompt, partial=partial, success_rate=success_rate)


def trace(student: Student, rng: random.Random, longer: Task | None = None) -> tuple[str, str]:
    """(prompt, completion) for a state of one of the student's solutions, every other one at the start of a step.

    With `longer` every other sum is one of those, and what such a sum is worth is not said.
    """
    scored = longer is None or rng.random() < 0.5
    problem = random_sum(rng, SIX_STEPS if longer is None or scored else longer)
    solution = problem.worked(rng, bug_rate=student.bug_rate)
    if rng.random() < SLIPS:
        at = rng.randrange(len(solution))
        solution = solution[:at] + rng.choice("0123456789+-=;") + solution[at + 1 :]
    whole = rng.random() < 0.5
    partial = (
        rng.choice(beginnings(solution)) if whole else solution[: rng.randrange(len(solution))]
    )
    seen = check(problem, partial)
    told = None if rng.random() < UNTOLD else student.success_rate
    score = f"{TAGS[0]}{student.score(seen)}{TAGS[1]}" if scored else ""
    return prompt_of(problem, partial, told), f"{seen.reasoning}{score}"


def make_tokenizer(task: Task = CRITIC) -> PreTrainedTokenizerFast:
    """One token a character, and one a tag."""
    tokenizer = policy_tokenizer(task, more=CHARACTERS)
    for tag in TAGS:  # not special: a score is read from text without special tokens
        tokenizer.add_tokens(AddedToken(tag, special=False, normalized=False))
    return tokenizer


def make_model(policy: Path) -> Qwen2ForCausalLM:
    """The policy with embeddings for the critic's characters, and room for longer texts."""
    model = Qwen2ForCausalLM.from_pretrained(policy)
    model.resize_token_embeddings(
        len(VOCABULARY) + len(CHARACTERS) + len(TAGS), mean_resizing=False
    )
    model.config.max_position_embeddings = CRITIC.context_tokens
    return model


def write_traces(
    path: Path, students: Sequence[Student], rng: random.Random, count: int, longer: Task | None
) -> None:
    """One JSON object a line."""
    found = (trace(rng.choice(students), rng, longer) for _ in range(count))
    lines = (json.dumps({"prompt": prompt, "completion": text}) for prompt, text in found)
    path.write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the quickstart's generative critic.")
    parser.add_argument("directory", type=Path, help="made by recipes/quickstart.py")
    parser.add_argument("--seed", type=int, default=0, help="of new embeddings and traces")
    parser.add_argument("--traces", type=int, default=TRACES)
    parser.add_argument(
        "--longer",
        type=int,
        metavar="STEPS",
        help="the reasoning, but no score, of sums of up to so many steps is in the traces, too",
    )
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    started = time.monotonic()
    rng = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)
    model = make_model(directory / "policy")
    model.save_pretrained(directory / "critic")
    make_tokenizer().save_pretrained(directory / "critic")
    students = [Student(rate, rng, SIX_STEPS) for rate in BUG_RATES]
    longer = arguments.longer and replace(SIX_STEPS, steps=(7, arguments.longer))
    write_traces(directory / "critic_traces.jsonl", students, rng, arguments.traces, longer)
    seconds = time.monotonic() - started
    sys.stdout.write(
        f"{directory / 'critic'}: {model.num_parameters():,} parameters, "
        f"{arguments.traces:,} traces, {seconds:.0f} s\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
