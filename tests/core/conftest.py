"""A token world small enough to know everything about it."""

import pytest

from .exact_world import ExactWorld


@pytest.fixture
def exact_world():
    """The class; each test builds the world it needs."""
    return ExactWorld
