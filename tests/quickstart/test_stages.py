"""The stage task: hard sums that need many steps right, within the model's context."""

import importlib.util
import random
import sys

import pytest

from .conftest import RECIPE


@pytest.fixture(scope="module")
def task(quickstart):
    """What recipes/stages.py asks for; it imports its neighbour by its bare name."""
    spec = importlib.util.spec_from_file_location("stages_recipe", RECIPE.parent / "stages.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("quickstart", quickstart)
    spec.loader.exec_module(module)
    return module.TEN_STEPS


def test_every_prompt_has_many_critical_steps(quickstart, task):
    sums = quickstart.distinct_sums(random.Random(0), 2000, task)
    hard = [problem for problem in sums if problem.critical >= task.critical]
    assert len(hard) > 0.5 * len(sums)
    assert all(len(problem.operations) == 10 and 20 <= problem.start < 80 for problem in hard)


def test_critical_steps_are_those_in_which_the_student_goes_wrong(quickstart):
    # 45+5 carries, 50-3 borrows, 47+1 and 48-8 do not
    problem = quickstart.Sum(45, (("+", 5), ("-", 3), ("+", 1), ("-", 8)))
    assert problem.critical == 2
    assert problem.worked(random.Random(0), bug_rate=0.0) == "45+5=50;50-3=47;47+1=48;48-8=40"
    assert problem.worked(random.Random(0), bug_rate=1.0) == "45+5=40;40-3=43;43+1=44;44-8=44"


def test_the_student_is_seldom_right_and_right_solutions_fit(quickstart, task):
    rng = random.Random(0)
    drawn = quickstart.distinct_sums(rng, 3000, task)
    sums = [problem for problem in drawn if problem.critical >= task.critical]
    right = [s.worked(rng, bug_rate=task.bug_rate) == s.worked(rng, bug_rate=0.0) for s in sums]
    assert 0.02 < sum(right) / len(right) < 0.07  # its copy makes mistakes of its own
    longest = max(len(s.prompt + s.worked(rng, bug_rate=0.0)) + 1 for s in sums)
    assert longest <= task.context_tokens
