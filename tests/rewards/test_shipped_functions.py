"""The functions in reward_fns/ on text that people and models wrote."""

import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest

from llmac.rewards.contracts import RewardSpec, understand
from llmac.rewards.loader import resolve

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"

SHIPPED = sorted(path.stem for path in (ROOT / "reward_fns").glob("*.py"))


def shipped(name):
    return resolve(f"reward_fns/{name}.py:reward", base=ROOT)


def rows(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_function_follows_a_contract_and_is_short(name):
    assert understand(RewardSpec(function=shipped(name))).name == name
    source = (ROOT / "reward_fns" / f"{name}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) < 60
    assert "llmac" not in source


def test_gsm8k_agrees_with_every_label_of_model_written_solutions():
    # 64 of 64 here; on all 2,568 labelled solutions these were drawn from: 2,568.
    solutions = rows("gsm8k_solutions.jsonl")
    judged = [shipped("gsm8k")("", row["response"], row["gold"]) for row in solutions]
    assert judged == [float(row["label"]) for row in solutions]
    assert sum(judged) == 30


def test_gsm8k_accepts_the_datasets_own_answers_and_no_others():
    problems = rows("gsm8k_train.jsonl")
    reward = shipped("gsm8k")
    assert all(
        reward(row["question"], row["answer"], answer=row["answer"]) == 1.0 for row in problems
    )
    shifted = pairwise(problems)
    different = [(a, b) for a, b in shifted if final(a["answer"]) != final(b["answer"])]
    assert len(different) > 30
    assert all(reward("", a["answer"], answer=b["answer"]) == 0.0 for a, b in different)


def final(text):
    return resolve("reward_fns/gsm8k.py:final_number", base=ROOT)(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 3 = 5\n#### 5", 5),
        ("#### $1,234.50", Fraction(2469, 2)),
        (r"so \boxed{12} and finally \boxed{\$18}", 18),
        (r"\boxed{\text{Total} = 7 \text{ apples}}. Check: 3 + 4", 7),
        (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
        ("The answer is 3 + 4 = 7 apples in 2 days", 7),
        ("**Answer:** 42\nThis took 3 steps.", 42),
        ("Work\nA: 26", 26),
        ("He has -5 dollars", -5),
        ("It goes from 10-3", 3),
        ("- 5 apples", 5),
        ("18.00", 18),
        ("50%", 50),
        ("The answer is 1/2", Fraction(1, 2)),
        ("#### Step 2\nThe answer is 9.", 9),
        ("Banana: 4 of 9", 9),
        (r"\boxed{}", None),
        ("no number", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_gsm8k_reads_the_final_number(text, number):
    assert final(text) == number


def test_gsm8k_does_not_apply_without_a_number_to_compare_with():
    assert shipped("gsm8k")("", "#### 5", answer="a proof") is None


@pytest.mark.parametrize("row", rows("gsm8k_train.jsonl")[:5])
def test_format_asks_for_both_parts_around_real_text(row):
    reward = shipped("format")
    work, _, number = row["answer"].partition("####")
    good = f"<think>\n{work}</think>\n<answer>{number}</answer>"
    assert reward(row["question"], good) == 1.0
    assert reward(row["question"], row["answer"]) == 0.0
    assert reward(row["question"], good + " Hope this helps!") == 0.0
    assert reward(row["question"], good + good) == 0.0
    assert reward(row["question"], f"<answer>{number}</answer><think>{work}</think>") == 0.0
    assert reward(row["question"], f"<think> </think><answer>{number}</answer>") == 0.0
    assert reward(row["question"], good.removesuffix("</answer>")) == 0.0


def test_format_knows_a_think_tag_that_the_prompt_has_opened():
    reward = shipped("format")
    rest = "2 + 2 is 4</think><answer>4</answer>"
    assert reward("2 + 2? <think>\n", rest) == 1.0
    assert reward([{"role": "user", "content": "2 + 2?"}], rest) == 0.0


def test_length_falls_from_0_to_minus_1_within_the_buffer():
    reward = shipped("length")
    # HARD_LIMIT 512, BUFFER 128: the soft limit is 384.
    tokens = {0: 0.0, 384: 0.0, 416: -0.25, 448: -0.5, 512: -1.0, 600: -1.0}
    assert {n: reward("", "", response_ids=[1] * n) for n in tokens} == tokens


def test_length_of_real_solutions(tokenizer):
    reward = shipped("length")
    texts = [row["response"] for row in rows("gsm8k_solutions.jsonl")]
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    judged = [
        reward("", text, response_ids=[1] * n) for text, n in zip(texts, lengths, strict=True)
    ]
    assert all((r == 0.0) == (n <= 384) for r, n in zip(judged, lengths, strict=True))
    assert min(judged) < 0.0 == max(judged)


@pytest.mark.parametrize(
    ("response", "solution", "reward"),
    [
        (r"so it is \boxed{0.5}", r"We get \boxed{\frac{1}{2}}.", 1.0),
        (r"first \boxed{3}, no: \boxed{4}", r"\boxed{4}", 1.0),
        (r"first \boxed{4}, no: \boxed{3}", r"\boxed{4}", 0.0),
        (r"\boxed{x^{2}+1}", r"\boxed{1+x^2}", 1.0),
        (r"\boxed{\text{even}}", r"\boxed{\text{even}}", 1.0),
        (r"\boxed{\text{odd}}", r"\boxed{\text{even}}", 0.0),
        ("4", r"\boxed{4}", 0.0),
        (r"\boxed{4", r"\boxed{4}", 0.0),
        (r"\boxed{" + "4" * 500 + "}", r"\boxed{4}", 0.0),
        (r"\boxed{4}", "no answer is marked", None),
    ],
)
def test_boxed_compares_the_last_box_as_mathematics(response, solution, reward):
    assert shipped("boxed")("?", response, solution) == reward
