"""The stage task's starting point: as `quickstart.py`, with eight steps on two-digit numbers, most of them critical.

    python recipes/stages.py runs/stages/start --seed 0

The policy learns from all such sums, but what it is asked has at least four steps with a carry or a borrow, which the
student gets right only three times in ten: less than one response in twenty has the right answer, and a part of those
by mistakes that cancel. Most groups of siblings have no success at all. A method that knows which step went wrong has
more to learn from than one that knows only the outcome.
"""

import sys

from quickstart import Task, main

EIGHT_STEPS = Task(steps=8, starts=(20, 80), cap=99, bug_rate=0.7, critical=4, context_tokens=96)
"""A prompt has 19 tokens, the longest right solution 64 with its end."""
WARM_UP_STEPS = 1600

if __name__ == "__main__":
    sys.exit(main(EIGHT_STEPS, made="stages", steps=WARM_UP_STEPS))
