import pytest

from llmac.core.types import Rollouts

from .making import ragged


@pytest.fixture
def rollouts() -> Rollouts:
    """Three groups of four rows with everything awkward in them, in float64."""
    return ragged()
