"""Where a command writes: looked at before it works for hours, and nothing is overwritten."""

import os
from pathlib import Path

from llmac.errors import ConfigError


def make_writable(folder: Path, option: str) -> None:
    """Make a folder if need be, and refuse one that takes no files.

    Args:
        folder: to write into.
        option: of the command that names it, for the message.

    Raises:
        ConfigError: it cannot be made, or is read-only.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made ({error.strerror}); name another with {option}"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder} is read-only for this user; name another with {option}")


def make_room_for(file: Path, option: str) -> None:
    """Refuse a file that exists already or could not be written; make its folder.

    Raises:
        ConfigError: either of it.
    """
    if file.exists():
        raise ConfigError(f"{file} exists; name another file with {option}, or remove it")
    make_writable(file.absolute().parent, option)


def refuse_a_run(folder: Path, option: str) -> None:
    """Refuse a folder in which a run or another command has left its record.

    Raises:
        ConfigError: naming what is there.
    """
    found = [n for n in ("config.yaml", "metrics.jsonl", "checkpoints") if (folder / n).exists()]
    if found:
        raise ConfigError(
            f"{folder} has {' and '.join(found)} of an earlier run, which would be overwritten; name another folder "
            f"with {option}"
        )
