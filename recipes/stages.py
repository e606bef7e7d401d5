"""The stage task's starting point: as `quickstart.py`, but ten steps on two-digit numbers, most of them critical.

    python recipes/stages.py runs/stages/start --seed 0

The policy learns from all such sums, but what it is asked has at least five steps with a carry or a borrow, each of
which the student gets right six times in ten, and only a solution without any wrong equation is rewarded
(`reward_fns/arithmetic.py:worked`): less than one response in twenty at the start. Most groups of siblings have no
success at all, and most steps of a failed response were right. A method that knows which one was not has more to learn
from.
"""

import sys

from quickstart import Task, main

TEN_STEPS = Task(steps=10, starts=(20, 80), cap=99, bug_rate=0.4, critical=5, context_tokens=128)
"""A prompt has 23 tokens, the longest right solution 80 with its end."""
WARM_UP_STEPS = 800

if __name__ == "__main__":
    sys.exit(main(TEN_STEPS, made="stages", steps=WARM_UP_STEPS))
