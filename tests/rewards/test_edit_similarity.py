"""RL4F's measure of sorted words, and its reward for repairing them, by hand."""

from pathlib import Path

import pytest

from llmac.core.refinement import Outcome, RepairReward
from llmac.rewards.loader import resolve

ROOT = Path(__file__).parents[2]
similarity = resolve("reward_fns/edit_similarity.py:reward", base=ROOT)


def test_an_exact_repair_earns_one_and_one_that_gains_nothing_nothing():
    gold, first = "ant bee cat", similarity("", "bee ant cat", "ant bee cat")
    assert first == pytest.approx(5 / 11)

    def worth(repaired):
        after = similarity("", repaired, gold)
        outcome = Outcome(
            before=first, before_right=False, after=(after,), after_right=(after >= 1.0,)
        )
        return RepairReward(mode="diff_or_exact").worth(outcome)

    assert worth("ant bee cat") == 1
    assert worth("ant cat bee") == pytest.approx(0)
    assert worth("") == pytest.approx(-5 / 11)
    assert similarity("", "", "") == 1
