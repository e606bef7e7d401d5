"""The quickstart's starting point: a tiny policy that has learnt arithmetic from a bad student, and its prompts.

    python recipes/quickstart.py runs/quickstart/start --seed 0

writes `policy/` (a Qwen2 of 150 thousand parameters and a character tokenizer, as `from_pretrained` loads them),
`train.jsonl` and `held_out.jsonl` (prompt and answer; no prompt is in both). About a minute without a GPU.

The task is to work out a sum of one-digit steps, writing every step: `4+8-6=` -> `4+8=12;12-6=6`. The student whose
solutions the policy copies has two bugs, each with probability 0.6 where it can happen: a carry is dropped (8+6=4), and
instead of borrowing the smaller digit is taken from the larger (12-6=14). So it gets about one sum in four right (.27).
The true rules are in the copy's repertoire too, and reinforcement learning has to find out, from final answers alone,
which of six steps to do differently.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

TRAIN_PROMPTS, HELD_OUT_PROMPTS = 8192, 256
WARM_UP_STEPS = 800

VOCABULARY = ("<pad>", "<eos>", *"0123456789+-=;")
PAD, END = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Which sums there are."""

    steps: int | tuple[int, int]
    """Operations of one sum; two numbers: drawn from the one to the other."""
    starts: tuple[int, int]
    """The first number is at least the one and below the other."""
    cap: int
    """No partial result of a right solution is above."""
    bug_rate: float
    """Probability of the student's bug where one can happen."""
    critical: int
    """Sums to train and to test on have at least so many steps in which a bug can happen."""
    context_tokens: int
    """Room for the longest prompt and solution."""


SIX_STEPS = Task(steps=6, starts=(0, 10), cap=19, bug_rate=0.6, critical=0, context_tokens=64)
"""The quickstart's. A cap of 20 would be the one result that begins with a 2, too rare to copy. The student's accuracy
is 0.27; a prompt has 14 tokens, the longest solution 48 with its end."""


@dataclass(frozen=True, slots=True)
class Sum:
    """A start and its operations, `Sum(4, (("+", 8), ("-", 6)))` for 4+8-6."""

    start: int
    operations: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> str:
        return f"{self.start}{''.join(f'{sign}{digit}' for sign, digit in self.operations)}="

    @property
    def critical(self) -> int:
        """Steps in which a carry or a borrow is needed."""
        value, found = self.start, 0
        for sign, digit in self.operations:
            change = digit if sign == "+" else -digit
            found += not 0 <= value % 10 + change <= 9
            value += change
        return found

    @property
    def answer(self) -> int:
        return self.start + sum(d if sign == "+" else -d for sign, d in self.operations)

    def worked(self, rng: random.Random, *, bug_rate: float) -> str:
        """Every step as an equation, with the student's bugs."""
        value, equations = self.start, []
        for sign, digit in self.operations:
            result = calculate(value, sign, digit, bug=rng.random() < bug_rate)
            equations.append(f"{value}{sign}{digit}={result}")
            value = result
        return ";".join(equations)


def random_sum(rng: random.Random, task: Task = SIX_STEPS) -> Sum:
    """A sum whose partial results stay between 0 and the cap."""
    start = value = rng.randrange(*task.starts)
    operations: list[tuple[str, int]] = []
    steps = task.steps if isinstance(task.steps, int) else rng.randint(*task.steps)
    for _ in range(steps):
        sign, digit = rng.choice("+-"), rng.randrange(1, 10)
        if value - digit < 0:
            sign = "+"
        elif value + digit > task.cap:
            sign = "-"
        value += digit if sign == "+" else -digit
        operations.append((sign, digit))
    return Sum(start, tuple(operations))


def calculate(value: int, sign: str, digit: int, *, bug: bool) -> int:
    """value ± digit, right, or as a student does it who forgets carries and does not borrow."""
    tens, ones = divmod(value, 10)
    if sign == "+":
        return 10 * tens + (ones + digit) % 10 if bug else value + digit
    if digit > ones and (bug or tens == 0):  # nothing to borrow from: only after an earlier mistake
        return 10 * tens + digit - ones
    return value - digit


def make_tokenizer(task: Task = SIX_STEPS, *, more: str = "") -> PreTrainedTokenizerFast:
    """One token a character, those of `more` after the task's; no token is added to a text."""
    ids = {token: i for i, token in enumerate((*VOCABULARY, *more))}
    characters = Tokenizer(models.WordLevel(ids, unk_token=VOCABULARY[PAD]))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token=VOCABULARY[PAD],
        eos_token=VOCABULARY[END],
        model_max_length=task.context_tokens,
        clean_up_tokenization_spaces=False,
    )


def make_model(task: Task = SIX_STEPS) -> Qwen2ForCausalLM:
    """149 thousand parameters, random."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(VOCABULARY),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=task.context_tokens,
            initializer_range=0.08,  # the usual 0.02 learns too slowly at this width
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=END,
        )
    )


def lesson(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, rows: int, task: Task = SIX_STEPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, labels) of the student's solutions to fresh sums; prompts and padding have label -100."""
    sums = [random_sum(rng, task) for _ in range(rows)]
    texts = [s.prompt + s.worked(rng, bug_rate=task.bug_rate) + VOCABULARY[END] for s in sums]
    ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    labels = ids.masked_fill(ids == PAD, -100)
    for row, problem in zip(labels, sums, strict=True):
        row[: len(problem.prompt)] = -100
    return ids, labels


def warm_up(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    *,
    steps: int,
    rows: int = 48,
    lr: float = 8e-3,
    task: Task = SIX_STEPS,
) -> float:
    """Copy the student by supervised learning; returns the last hundred steps' mean loss, nats a token."""
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    losses = []
    for step in range(1, steps + 1):
        scale = min(step / 30, (30 / step) ** 0.5) * min(1.0, 5 * (1 - step / steps) + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        ids, labels = lesson(tokenizer, rng, rows, task)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 200 == 0:
            sys.stdout.write(f"warm-up {step}/{steps}: loss {sum(losses[-100:]) / 100:.4f}\n")
            sys.stdout.flush()
    model.eval()
    return sum(losses[-100:]) / len(losses[-100:])


def write_prompts(path: Path, sums: list[Sum]) -> None:
    """One JSON object a line: prompt and answer."""
    lines = (json.dumps({"prompt": s.prompt, "answer": str(s.answer)}) for s in sums)
    path.write_text("\n".join(lines) + "\n")


def distinct_sums(rng: random.Random, count: int, task: Task = SIX_STEPS) -> list[Sum]:
    """Sums with different prompts."""
    sums: dict[str, Sum] = {}
    while len(sums) < count:
        problem = random_sum(rng, task)
        sums[problem.prompt] = problem
    return list(sums.values())


def main(task: Task = SIX_STEPS, *, made: str = "quickstart", steps: int = WARM_UP_STEPS) -> int:
    """Command line: make policy and prompts of a task in a folder."""
    parser = argparse.ArgumentParser(description=f"Make the tiny policy and the prompts: {made}.")
    parser.add_argument("directory", type=Path, help="made if need be")
    parser.add_argument("--seed", type=int, default=0, help="of weights, lessons and prompts")
    parser.add_argument("--steps", type=int, default=steps, help="of supervised learning")
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    directory.mkdir(parents=True, exist_ok=True)

    rng = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)
    sums = distinct_sums(rng, HELD_OUT_PROMPTS + TRAIN_PROMPTS, task)
    sums = [problem for problem in sums if problem.critical >= task.critical]
    write_prompts(directory / "held_out.jsonl", sums[:HELD_OUT_PROMPTS])
    write_prompts(directory / "train.jsonl", sums[HELD_OUT_PROMPTS:])

    tokenizer = make_tokenizer(task)
    model = make_model(task)
    started = time.monotonic()
    warm_up(model, tokenizer, rng, steps=arguments.steps, task=task)
    model.save_pretrained(directory / "policy")
    tokenizer.save_pretrained(directory / "policy")
    seconds = time.monotonic() - started
    sys.stdout.write(
        f"{directory / 'policy'}: {model.num_parameters():,} parameters, {seconds:.0f} s\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
