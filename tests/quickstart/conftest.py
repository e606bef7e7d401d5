import importlib.util
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.py"


@pytest.fixture(scope="session")
def quickstart():
    """recipes/quickstart.py, which lies outside the package, as a module."""
    spec = importlib.util.spec_from_file_location("quickstart_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module
