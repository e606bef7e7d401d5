"""Phases are timed, and one that hangs ends the process with its name."""

import subprocess
import sys
import textwrap

import pytest

from llmac.core.measures import Max
from llmac.runtime.phases import EXIT_STALLED, Phases


def run(body: str) -> subprocess.CompletedProcess[str]:
    program = "import time\nfrom llmac.runtime.phases import Phases\n" + textwrap.dedent(body)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )


def test_seconds_of_a_phase_add_up_within_a_step_and_are_drained_once():
    phases = Phases(rank=0, watchdog_seconds=0)
    for _ in range(2):
        with phases("gen"), phases("score"):
            pass
    measures = phases.drain()
    assert set(measures) == {"timing_s/gen", "timing_s/score"}
    gen, score = measures["timing_s/gen"], measures["timing_s/score"]
    assert isinstance(gen, Max)
    assert gen.value >= score.value > 0
    assert phases.drain() == {}


def test_a_phase_is_timed_even_when_it_raises():
    phases = Phases(rank=0, watchdog_seconds=0)
    with pytest.raises(KeyError), phases("learn"):
        raise KeyError
    assert set(phases.drain()) == {"timing_s/learn"}


def test_a_negative_limit_is_refused():
    with pytest.raises(ValueError, match="watchdog_seconds must be >= 0"):
        Phases(rank=0, watchdog_seconds=-1)


def test_a_stalled_phase_ends_the_process_and_names_rank_phase_seconds_and_stack():
    result = run("""
        def hung_reward():
            time.sleep(60)

        phases = Phases(rank=3, watchdog_seconds=1)
        with phases("step"), phases("score"):
            hung_reward()
    """)
    assert result.returncode == EXIT_STALLED
    assert "rank 3: nothing moved in phase 'score' for 1 seconds" in result.stderr
    assert "hung_reward" in result.stderr


def test_a_process_that_moves_on_is_not_ended():
    result = run("""
        phases = Phases(rank=0, watchdog_seconds=1.2)
        with phases("step"):
            for _ in range(4):
                with phases("gen"):
                    time.sleep(0.35)
        with phases("long"):
            for _ in range(4):
                time.sleep(0.35)
                phases.alive()
        time.sleep(1.4)
        phases.close()
        print("done", *phases.drain())
    """)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["done", "timing_s/gen", "timing_s/step", "timing_s/long"]
