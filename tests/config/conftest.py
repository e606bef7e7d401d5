import pytest


@pytest.fixture
def settings():
    """The smallest recipe, as a mapping; nothing it names needs to exist."""
    return {
        "model": {"name": "org/model"},
        "data": {"name": "org/data"},
        "reward": "rewards.py:exact",
        "algorithm": {"name": "grpo"},
        "run": {"steps": 10, "output": "runs/a"},
    }


@pytest.fixture
def ppo(settings):
    return settings | {"algorithm": {"name": "ppo"}}
