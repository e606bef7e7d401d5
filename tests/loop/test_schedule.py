"""When the policy learns: after the warm-up of the critic, and then every so many steps."""

import pytest

from llmac.core.measures import Last
from llmac.errors import ConfigError
from llmac.schedule import EXPLAINED, PolicySchedule


def moves(schedule, explained, *, first=1):
    """For each step's explained variance, whether the policy moves."""
    return [schedule.moves(first + i, {EXPLAINED: Last(x)}) for i, x in enumerate(explained)]


def test_without_conditions_it_moves_in_every_step():
    assert moves(PolicySchedule(), [0.0] * 3) == [True] * 3


def test_the_warm_up_lasts_its_steps():
    assert moves(PolicySchedule(warmup_steps=2), [0.9] * 4) == [False, False, True, True]


def test_the_warm_up_lasts_until_the_critic_explains_enough_and_never_comes_back():
    schedule = PolicySchedule(warmup_explained=0.5)
    assert moves(schedule, [0.1, 0.4, 0.6, 0.2]) == [False, False, True, True]


def test_both_conditions_must_hold():
    schedule = PolicySchedule(warmup_steps=3, warmup_explained=0.5)
    assert moves(schedule, [0.9, 0.9, 0.9, 0.4, 0.9]) == [False, False, False, False, True]


def test_the_delay_is_counted_from_the_end_of_the_warm_up():
    assert moves(PolicySchedule(warmup_steps=1, every=2), [0.0] * 6) == [
        False,
        False,
        True,
        False,
        True,
        False,
    ]
    # Warm before step 2, and then every third.
    late = PolicySchedule(warmup_explained=0.5, every=3)
    assert moves(late, [0.1, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]) == [
        False,
        False,
        False,
        True,
        False,
        False,
        True,
    ]


def test_a_resumed_run_goes_on_where_it_was():
    explained = [0.1, 0.6, 0.1, 0.1, 0.1, 0.1]
    whole = moves(PolicySchedule(warmup_explained=0.5, every=2), explained)
    first = PolicySchedule(warmup_explained=0.5, every=2)
    before = moves(first, explained[:3])
    second = PolicySchedule(warmup_explained=0.5, every=2)
    second.restore(first.state())
    assert before + moves(second, explained[3:], first=4) == whole


def test_a_condition_nobody_reports_on_is_named():
    with pytest.raises(ConfigError, match=r"critic_warmup_explained waits for critic/vf_explained"):
        PolicySchedule(warmup_explained=0.5).moves(1, {})
