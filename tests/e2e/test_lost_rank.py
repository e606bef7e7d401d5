"""A rank is lost in the middle of a run: the other one stops, and says who was lost, when, and why."""

import re

import pytest

LOST = """
import os, signal
calls = 0
def reward(prompt, response, wanted):
    global calls
    calls += 1
    if calls == 40 and os.environ["RANK"] == "1":
        {what}
    return float(calls % 2)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "died in phase 'gen': its connection closed"),
        (
            "raise ZeroDivisionError('no')",
            "failed in phase 'gen' with RewardError: reward function",
        ),
    ],
)
def test_a_rank_that_is_lost_in_a_run_is_named_by_the_other(
    run, write_recipe, settings, tmp_path, what, said
):
    (tmp_path / "lost.py").write_text(LOST.format(what=what))
    settings["reward"] = f"{tmp_path / 'lost.py'}:reward"
    settings["run"]["steps"] = 50
    code, output = run(write_recipe(settings), processes=2).finish(120)
    assert code != 0
    assert re.search(r"rank 1 \(\S+, pid \d+\) " + re.escape(said), output)
