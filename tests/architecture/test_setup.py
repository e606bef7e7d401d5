"""scripts/setup reuses an environment that is complete and up to date, and trusts no other."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("make_venv", ROOT / "scripts" / "make_venv.py")
make_venv = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_venv)

PYPROJECT = """
[build-system]
requires = ["setuptools"]
[project]
dependencies = ["torch>=2.6"]
[project.optional-dependencies]
dev = ["pytest"]
[tool.ruff]
line-length = 100
"""


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n")
    return tmp_path


@pytest.fixture
def venv(tmp_path):
    """An environment as `make` leaves it, with one package, for the fingerprint 'right'."""
    folder = tmp_path / ".venv"
    (folder / "lib/python3.11/site-packages/torch-2.13.0.dist-info").mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(sys.executable)
    stamp = {"fingerprint": "right", "extras": ["dev"], "packages": ["torch-2.13.0"]}
    (folder / make_venv.MADE_FOR).write_text(json.dumps(stamp))
    return folder


def changed(checkout, name, old, new):
    before = make_venv.fingerprint(checkout, "3.11")
    path = checkout / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return make_venv.fingerprint(checkout, "3.11") != before


def test_a_changed_dependency_changes_the_fingerprint(checkout):
    assert changed(checkout, "pyproject.toml", "torch>=2.6", "torch>=2.7")


def test_a_changed_extra_changes_the_fingerprint(checkout):
    assert changed(checkout, "pyproject.toml", "pytest", "pytest>=9")


def test_a_changed_pin_changes_the_fingerprint(checkout):
    assert changed(checkout, "constraints.txt", "2.13.0", "2.13.1")


def test_another_python_changes_the_fingerprint(checkout):
    assert make_venv.fingerprint(checkout, "3.11") != make_venv.fingerprint(checkout, "3.12")


def test_a_linter_setting_does_not_change_the_fingerprint(checkout):
    assert not changed(checkout, "pyproject.toml", "line-length = 100", "line-length = 99")


def test_a_complete_environment_is_kept(venv):
    assert make_venv.what_is_wrong(venv, "right") is None
    assert make_venv.extras_of(venv) == {"dev"}


def test_an_environment_without_stamp_was_interrupted(venv):
    (venv / make_venv.MADE_FOR).unlink()
    assert make_venv.what_is_wrong(venv, "right") == "its making was interrupted"


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"fingerprint": "right"}'])
def test_an_environment_with_a_damaged_stamp_is_not_trusted(venv, content):
    (venv / make_venv.MADE_FOR).write_text(content)
    assert make_venv.what_is_wrong(venv, "right") == "made_for.json is damaged"


def test_an_environment_made_for_other_dependencies_is_stale(venv):
    assert "have changed" in make_venv.what_is_wrong(venv, "other")


def test_a_package_of_another_version_is_noticed(venv):
    folder = venv / "lib/python3.11/site-packages"
    (folder / "torch-2.13.0.dist-info").rename(folder / "torch-2.6.0.dist-info")
    assert make_venv.what_is_wrong(venv, "right") == "torch-2.13.0 was removed or replaced"


def test_a_package_somebody_added_is_left_alone(venv):
    (venv / "lib/python3.11/site-packages/wandb-1.0.dist-info").mkdir()
    assert make_venv.what_is_wrong(venv, "right") is None


def test_an_environment_whose_python_is_gone_is_not_trusted(venv):
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").symlink_to(venv / "no-such-python")
    assert make_venv.what_is_wrong(venv, "right") == "its Python does not run"


def test_a_failing_command_shows_the_end_of_its_log(tmp_path):
    log = tmp_path / "log"
    program = "print('\\n'.join(map(str, range(99)))); raise SystemExit(3)"
    with pytest.raises(make_venv.SetupError, match=r"(?s)^74\n.*98\n.*exit code 3") as caught:
        make_venv.run([sys.executable, "-c", program], log)
    assert "\n10\n" not in str(caught.value)


def test_without_a_suitable_python_the_message_says_what_is_needed(tmp_path):
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = subprocess.run(
        [ROOT / "scripts" / "setup"],
        env={**os.environ, "PYTHON": str(old)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "needs Python 3.11 or later" in result.stderr
    assert str(old) in result.stderr


def test_an_unknown_extra_is_refused_before_anything_is_touched():
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "make_venv.py", "rolout"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "there is no extra 'rolout'; extras: train, rollout, cpu, dev" in result.stderr
