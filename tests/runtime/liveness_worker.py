"""One rank of test_liveness.py: joins the others, says it is ready, and does as it is told."""

import logging
import os
import sys
import time

import torch

from llmac.errors import LlmacError, RewardError
from llmac.runtime.context import Runtime
from llmac.runtime.liveness import Liveness


def work(
    rank: int, world_size: int, port: int, report: str, task: str, patience: float, grace: float
) -> None:
    """The whole life of a rank; what it prints goes to the file `report`."""
    output = os.open(report, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "OMP_NUM_THREADS": "1",  # accelerate warns without it
        "MASTER_PORT": str(port),
    }
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    runtime = Runtime.create(seed=0, output=None)
    liveness = Liveness.start(runtime, patience_seconds=patience, grace_seconds=grace)
    liveness.doing(task)
    try:
        with liveness.reporting():
            say("ready")
            TASKS[task](runtime)
    except LlmacError as error:
        say(f"{type(error).__name__}: {error}")
        liveness.close()
        sys.exit(1)
    liveness.close()
    say("done")


def say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def collective(runtime: Runtime) -> None:
    """Everybody but rank 1 waits for it in a collective."""
    if runtime.rank == 1:
        time.sleep(600)
    runtime.sum(torch.ones(3))


def loop(runtime: Runtime) -> None:
    """Python code that never looks up."""
    n = 0
    while n >= 0:
        n += 1


def sleep(runtime: Runtime) -> None:
    """In the operating system, where nothing wakes it."""
    time.sleep(600)


def reward(runtime: Runtime) -> None:
    """Rank 1 fails at once; the others would be busy for long."""
    if runtime.rank == 1:
        raise RewardError("exact_match returned None for prompt p7")
    time.sleep(600)


def wrapped(runtime: Runtime) -> None:
    """The failure of a collective arrives as the cause of something else."""
    if runtime.rank == 1:
        time.sleep(600)
    try:
        runtime.sum(torch.ones(3))
    except RuntimeError as error:
        raise ValueError("the sum did not work") from error


def forked(runtime: Runtime) -> None:
    """Every rank has a child that outlives it, as data loaders and engines do."""
    child = os.fork()
    if child == 0:
        time.sleep(600)
    say(f"child {child}.")
    time.sleep(600)


def upwards(runtime: Runtime) -> None:
    """Rank 0 is done first."""
    time.sleep(0.4 * runtime.rank)


def downwards(runtime: Runtime) -> None:
    """Rank 0 is done last."""
    time.sleep(0.4 * (runtime.world_size - runtime.rank))


def nap(runtime: Runtime) -> None:
    """Some seconds of work."""
    time.sleep(4)


TASKS = {
    task.__name__: task
    for task in (collective, loop, sleep, reward, wrapped, forked, upwards, downwards, nap)
}
