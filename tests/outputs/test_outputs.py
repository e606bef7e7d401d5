"""Nothing is overwritten, and what cannot be written is said beforehand."""

import pytest

from llmac.errors import ConfigError
from llmac.outputs import make_room_for, make_writable, refuse_a_run


def test_a_folder_is_made_with_those_above(tmp_path):
    make_writable(tmp_path / "a" / "b", "--output")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_folder_below_a_file_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"file/x cannot be made .*; name another with --output"):
        make_writable(tmp_path / "file" / "x", "--output")


def test_a_file_that_exists_is_not_written_over(tmp_path):
    (tmp_path / "states").write_text("mine")
    with pytest.raises(ConfigError, match=r"states exists; name another file with --save-states"):
        make_room_for(tmp_path / "states", "--save-states")
    make_room_for(tmp_path / "new" / "states", "--save-states")
    assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new" / "states").exists()


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "checkpoints"])
def test_the_folder_of_a_run_is_not_written_into(tmp_path, name):
    refuse_a_run(tmp_path, "--output")
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=f"has {name} of an earlier run"):
        refuse_a_run(tmp_path, "--output")
