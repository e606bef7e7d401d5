import pytest

from llmac.core.types import Rollouts

from .making import ragged, ragged_for


@pytest.fixture
def rollouts(request: pytest.FixtureRequest) -> Rollouts:
    """Three groups of four rows with everything awkward in them, in float64, with rewards that the
    card under test takes."""
    if "name" not in request.fixturenames:
        return ragged()
    return ragged_for(request.getfixturevalue("name"))
