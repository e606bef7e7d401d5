"""The quickstart's task: sums stay in range, the student has exactly its two bugs, and the reward sees the result."""

import importlib.util
import random
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "reward_fns" / "arithmetic.py"
SPEC = importlib.util.spec_from_file_location("arithmetic", PATH)
arithmetic = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(arithmetic)


def reward_of(problem, response):
    return arithmetic.reward(prompt=problem.prompt, response=response, answer=str(problem.answer))


def test_partial_results_stay_between_zero_and_the_cap(quickstart):
    rng = random.Random(0)
    for _ in range(500):
        problem = quickstart.random_sum(rng)
        value = problem.start
        assert 0 <= value <= 9
        assert len(problem.operations) == quickstart.SIX_STEPS.steps
        for sign, digit in problem.operations:
            value += digit if sign == "+" else -digit
            assert 1 <= digit <= 9
            assert 0 <= value <= quickstart.SIX_STEPS.cap
        assert value == problem.answer


def test_a_prompt_reads_as_the_sum_it_stands_for(quickstart):
    problem = quickstart.Sum(4, (("+", 8), ("+", 6), ("-", 6), ("+", 1), ("-", 9), ("+", 5)))
    assert problem.prompt == "4+8+6-6+1-9+5="
    assert problem.answer == 4 + 8 + 6 - 6 + 1 - 9 + 5
    right = problem.worked(random.Random(0), bug_rate=0.0)
    assert right == "4+8=12;12+6=18;18-6=12;12+1=13;13-9=4;4+5=9"


@pytest.mark.parametrize(
    ("value", "sign", "digit", "right", "wrong"),
    [
        (8, "+", 6, 14, 4),  # the carry is dropped
        (14, "+", 8, 22, 12),
        (12, "-", 6, 6, 14),  # the smaller from the larger digit
        (10, "-", 3, 7, 13),
        (3, "+", 6, 9, 9),  # nothing to carry: no bug
        (18, "-", 6, 12, 12),  # nothing to borrow
        (9, "-", 9, 0, 0),
    ],
)
def test_the_student_drops_carries_and_does_not_borrow(
    quickstart, value, sign, digit, right, wrong
):
    assert quickstart.calculate(value, sign, digit, bug=False) == right
    assert quickstart.calculate(value, sign, digit, bug=True) == wrong


def test_the_student_is_right_a_quarter_of_the_time(quickstart):
    rng = random.Random(0)
    sums = [quickstart.random_sum(rng) for _ in range(4000)]
    rewards = [reward_of(s, s.worked(rng, bug_rate=quickstart.SIX_STEPS.bug_rate)) for s in sums]
    assert 0.22 < sum(rewards) / len(rewards) < 0.29


def test_every_right_solution_is_rewarded_and_every_wrong_end_is_not(quickstart):
    rng = random.Random(1)
    for _ in range(200):
        problem = quickstart.random_sum(rng)
        solution = problem.worked(rng, bug_rate=0.0)
        assert reward_of(problem, solution) == 1.0
        assert reward_of(problem, solution + "0") == 0.0
        assert reward_of(problem, solution[: solution.rindex("=")]) == 0.0


def test_a_bare_number_is_no_worked_solution():
    assert arithmetic.reward(prompt="8+6=", response="14", answer="14") == 0.0
    assert arithmetic.reward(prompt="8+6=", response="", answer="14") == 0.0
    assert arithmetic.reward(prompt="8+6=", response="8+6=", answer="14") == 0.0


def test_prompts_are_distinct_and_follow_the_seed(quickstart):
    sums = quickstart.distinct_sums(random.Random(5), 3000)
    assert len({s.prompt for s in sums}) == 3000
    assert quickstart.distinct_sums(random.Random(5), 3000) == sums
    assert quickstart.distinct_sums(random.Random(6), 3000) != sums


def test_only_faultless_work_is_rewarded_where_the_work_counts(quickstart):
    rng = random.Random(2)
    for _ in range(200):
        problem = quickstart.random_sum(rng)
        solution = problem.worked(rng, bug_rate=0.0)
        given = {"prompt": problem.prompt, "answer": str(problem.answer)}
        assert arithmetic.worked(response=solution, **given) == 1.0
        assert arithmetic.worked(response=solution.rpartition(";")[2], **given) == 0.0
        buggy = problem.worked(rng, bug_rate=1.0)
        assert arithmetic.worked(response=buggy, **given) == float(buggy == solution)
