"""Sleeping and updating, on memory that counts what it holds and forgets what it discards."""

import itertools

import pytest

from llmac.engines.readiness import Readiness
from llmac.errors import EngineError


class Accelerator:
    """Memory of two parts; like vLLM's, it refuses to give back or take what it has not or has."""

    def __init__(self):
        self.there = {"weights", "kv_cache"}
        self.kept = True
        self.calls = []

    def sleep(self, level):
        assert "weights" in self.there
        self.there = set()
        self.kept = level == 1
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags):
        assert not self.there & set(tags)
        self.there |= set(tags)
        self.calls.append(f"wake {' '.join(tags)}")


def update(readiness, version=1):
    readiness.begin_update(version)
    readiness.finish_update()


def test_level_0_frees_nothing():
    accelerator = Accelerator()
    readiness = Readiness(accelerator, level=0)
    readiness.sleep()
    readiness.wake()
    update(readiness)
    assert accelerator.calls == []


def test_level_1_keeps_the_weights():
    accelerator = Accelerator()
    readiness = Readiness(accelerator, level=1)
    readiness.sleep()
    readiness.sleep()
    readiness.wake()
    readiness.wake()
    assert accelerator.calls == ["sleep 1", "wake weights", "wake kv_cache"]


def test_after_level_2_nothing_samples_until_complete_weights_have_arrived():
    accelerator = Accelerator()
    readiness = Readiness(accelerator, level=2)
    readiness.sleep()
    with pytest.raises(EngineError, match=r"discarded while it slept \(rollout\.sleep_level 2\)"):
        readiness.wake()
    readiness.begin_update(version=3)
    with pytest.raises(EngineError, match="the update to version 3 did not complete"):
        readiness.wake()
    assert accelerator.calls == ["sleep 2", "wake weights"]
    readiness.finish_update()
    readiness.wake()
    assert accelerator.there == {"weights", "kv_cache"}


@pytest.mark.parametrize("level", [1, 2])
def test_an_update_never_holds_keys_and_values_beside_the_weights(level):
    accelerator = Accelerator()
    readiness = Readiness(accelerator, level=level)
    readiness.sleep()
    update(readiness)
    assert accelerator.there == {"weights"}
    readiness.sleep()
    assert accelerator.there == set()
    update(readiness)
    readiness.wake()
    assert accelerator.there == {"weights", "kv_cache"}


def test_a_broken_update_is_remembered_through_a_sleep():
    for level in (0, 1, 2):
        readiness = Readiness(Accelerator(), level=level)
        readiness.begin_update(version=1)
        readiness.sleep()
        assert readiness.updating
        with pytest.raises(EngineError, match="incomplete weights"):
            readiness.wake()
        update(readiness)
        assert not readiness.updating
        readiness.wake()


@pytest.mark.parametrize("level", [0, 1, 2])
def test_no_order_of_calls_samples_from_weights_that_are_not_there(level):
    """All sequences of five calls, against the plain statement of when sampling is allowed."""

    def broken(readiness):
        readiness.begin_update(version=1)

    for calls in itertools.product(["sleep", "update", "broken", "wake"], repeat=5):
        accelerator = Accelerator()
        readiness = Readiness(accelerator, level=level)
        complete = True
        for call in calls:
            if call == "sleep":
                asleep = "weights" not in accelerator.there
                readiness.sleep()
                complete = complete and (level != 2 or (asleep and complete))
            elif call == "update":
                update(readiness)
                complete = True
            elif call == "broken":
                broken(readiness)
                complete = False
            elif complete:
                readiness.wake()
                assert accelerator.there == {"weights", "kv_cache"}, calls
            else:
                with pytest.raises(EngineError):
                    readiness.wake()
            assert (readiness.refusal is None) == complete, calls
