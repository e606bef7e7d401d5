"""`file.py:name` and `module:name`, and what is said when there is no such thing."""

import sys

import pytest

from llmac.errors import ConfigError
from llmac.rewards.loader import resolve


@pytest.fixture(autouse=True)
def _same_path_afterwards():
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_function_of_a_file(write):
    path = write("mine.py", "def reward(prompt, response):\n    return 1.0\n")
    assert resolve(f"{path}:reward")("p", "r") == 1.0


def test_a_relative_path_is_found_beside_the_recipe_then_in_the_working_directory(
    write, tmp_path, monkeypatch
):
    write("mine.py", "WHERE = 'recipe'\n")
    assert resolve("mine.py:WHERE", base=tmp_path) == "recipe"
    other = tmp_path / "elsewhere"
    other.mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("mine.py:WHERE", base=other) == "recipe"
    (other / "mine.py").write_text("WHERE = 'elsewhere'\n")
    assert resolve("mine.py:WHERE", base=other) == "elsewhere"


def test_a_file_is_executed_once_and_may_hold_dataclasses(write):
    path = write(
        "card.py",
        "import dataclasses\n\n@dataclasses.dataclass(frozen=True)\nclass Card:\n    lr: 'float' = 0.5\n",
    )
    card = resolve(f"{path}:Card")
    assert card().lr == 0.5
    assert resolve(f"{path}:Card") is card


def test_a_file_may_import_its_neighbour(write):
    write("neighbour_of_mine.py", "HALF = 0.5\n")
    path = write("mine.py", "from neighbour_of_mine import HALF\n")
    assert resolve(f"{path}:HALF") == 0.5


def test_two_files_of_one_name_are_two_modules(write, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in "ab":
        (tmp_path / folder / "rewards.py").write_text(f"NAME = {folder!r}\n")
    assert [resolve(f"{tmp_path / f / 'rewards.py'}:NAME") for f in "ab"] == ["a", "b"]


def test_a_name_of_a_module():
    assert resolve("os.path:join")("a", "b") == "a/b"


@pytest.mark.parametrize("spec", ["reward", "file.py", ":reward", "file.py:"])
def test_a_spec_without_both_halves_is_explained(spec):
    with pytest.raises(ConfigError, match=r"path/to/file\.py:name"):
        resolve(spec)


def test_a_missing_file_names_the_folders_and_the_nearest_file(write, tmp_path):
    write("gsm8k.py", "")
    with pytest.raises(
        ConfigError, match=r"no file gsm8.py in .*Did you mean 'gsm8k.py'"
    ) as raised:
        resolve("gsm8.py:reward", base=tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_a_missing_name_names_the_nearest(write):
    path = write("mine.py", "def reward(prompt, response):\n    return 1.0\n")
    with pytest.raises(ConfigError, match=r"has no 'rewrad'.*Did you mean 'reward'"):
        resolve(f"{path}:rewrad")


def test_a_missing_module_is_named():
    with pytest.raises(ConfigError, match="no module 'no_such_package'"):
        resolve("no_such_package.rewards:reward")


def test_an_import_error_inside_the_file_shows_the_users_line(write):
    path = write("mine.py", "import re\n\nimport no_such_package\n")
    with pytest.raises(
        ConfigError, match=r"ModuleNotFoundError.*\n.*mine\.py, line 3: import no_such_package"
    ):
        resolve(f"{path}:reward")


def test_an_error_below_the_users_line_still_shows_the_users_line(write):
    path = write(
        "mine.py", "import json\n\n\ndef load():\n    return json.loads('{')\n\n\nTABLE = load()\n"
    )
    with pytest.raises(
        ConfigError, match=r"JSONDecodeError.*\n.*mine\.py, line 5: return json\.loads"
    ):
        resolve(f"{path}:TABLE")


def test_a_syntax_error_shows_its_line(write):
    path = write("mine.py", "x = 1\ndef reward(:\n")
    with pytest.raises(ConfigError, match=r"SyntaxError.*\n.*mine\.py, line 2: def reward"):
        resolve(f"{path}:reward")


def test_a_file_that_failed_is_tried_again(write):
    path = write("mine.py", "raise OSError('no network yet')\n")
    with pytest.raises(ConfigError, match="no network yet"):
        resolve(f"{path}:X")
    path.write_text("X = 1\n")
    assert resolve(f"{path}:X") == 1
