"""A card in a user's own file is a card like any other."""

import importlib.util
import sys

import pytest

from llmac.algorithms.base import Algorithm

from .toy_world.world import train

CARD = '''
"""GRPO that knows better from worse and not by how much."""

from dataclasses import dataclass

import torch

from llmac.algorithms.grpo import GRPO
from llmac.core.types import AllSum, identity


@dataclass(frozen=True, kw_only=True)
class Signed(GRPO):
    """Sign of the group-relative advantage."""

    strength: float = 1.0
    """Size of every advantage."""

    def outcome_advantages(self, scores, group, *, sum_across: AllSum = identity):
        """Plus or minus `strength`; 0 where all are equal."""
        grpo = super().outcome_advantages(scores, group, sum_across=sum_across)
        return self.strength * torch.sign(grpo)
'''


@pytest.fixture
def signed(tmp_path):
    path = tmp_path / "signed.py"
    path.write_text(CARD)
    spec = importlib.util.spec_from_file_location("signed", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["signed"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    yield module.Signed
    del sys.modules["signed"]


def test_a_card_of_twenty_lines_in_a_users_file_learns_the_toy_world(signed):
    assert isinstance(signed(), Algorithm)
    assert train(signed(strength=0.5), steps=40, until=0.9)[-1] >= 0.9


def test_a_users_card_inherits_validation(signed):
    with pytest.raises(ValueError, match="group_size of Signed must be at least 2"):
        signed(group_size=1)
