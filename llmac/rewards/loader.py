"""From a name in a recipe to a Python object: `path/file.py:name` or `package.module:name`."""

import hashlib
import importlib
import importlib.util
import linecache
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from llmac.errors import ConfigError, did_you_mean


def resolve(spec: str, *, base: Path | None = None) -> Any:
    """The object that `spec` names; its module is executed once and then shared.

    A file is looked for under `base` (usually the recipe's folder), then under the working directory. Its folder is
    appended to `sys.path`, so that a file may import its neighbours.

    Args:
        spec: `path/to/file.py:name` or `package.module:name`.
        base: first folder for relative paths; None = only the working directory.

    Raises:
        ConfigError: the file, module or name does not exist, or its module raises when executed.

    >>> resolve("math:sqrt")(9.0)
    3.0
    """
    target, colon, name = spec.rpartition(":")
    if not colon or not target or not name:
        raise ConfigError(
            f"{spec!r} does not say where to look. Write path/to/file.py:name or package.module:name."
        )
    if target.endswith(".py"):
        module = _module_of_file(_existing_file(target, base, spec), spec)
    else:
        module = _module_of_package(target, spec)
    try:
        return getattr(module, name)  # names in a user's module are known only at run time
    except AttributeError:
        public = [entry for entry in vars(module) if not entry.startswith("_")]
        raise ConfigError(
            f"{target} has no {name!r} (asked for by {spec!r}).{did_you_mean(name, public)}"
        ) from None


def _existing_file(target: str, base: Path | None, spec: str) -> Path:
    path = Path(target).expanduser()
    folders = [Path.cwd()] if base is None else [base, Path.cwd()]
    candidates = [folder / path for folder in folders]  # an absolute path replaces the folder
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    neighbours = sorted(
        {other.name for c in candidates if c.parent.is_dir() for other in c.parent.glob("*.py")}
    )
    places = " or ".join(dict.fromkeys(str(c.parent.resolve()) for c in candidates))
    raise ConfigError(
        f"{spec!r}: no file {path.name} in {places}.{did_you_mean(path.name, neighbours)}"
    )


def _module_of_file(path: Path, spec: str) -> ModuleType:
    name = f"llmac_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last: a neighbour called math.py must not hide Python's
    description = importlib.util.spec_from_file_location(name, path)
    assert description is not None, path
    assert description.loader is not None, path
    module = importlib.util.module_from_spec(description)
    sys.modules[name] = module  # before execution: dataclasses look their module up
    try:
        description.loader.exec_module(module)
    except Exception as error:  # user code may raise anything
        del sys.modules[name]
        raise ConfigError(_failure(spec, error)) from error
    return module


def _module_of_package(target: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name is not None and (target + ".").startswith(error.name + "."):
            raise ConfigError(
                f"{spec!r}: there is no module {error.name!r}. Install the package it is in, "
                "or write path/to/file.py:name for a file."
            ) from error
        raise ConfigError(_failure(spec, error)) from error
    except Exception as error:  # user code may raise anything
        raise ConfigError(_failure(spec, error)) from error


def _failure(spec: str, error: Exception) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        place, line = f"{error.filename}, line {error.lineno}", (error.text or "").strip()
    else:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if not frame.filename.startswith("<frozen") and frame.filename != __file__
        ] or traceback.extract_tb(error.__traceback__)
        # The innermost frame that is still the user's own file, not a library it calls.
        own = [frame for frame in frames if frame.filename == frames[0].filename]
        place = f"{own[-1].filename}, line {own[-1].lineno}"
        line = linecache.getline(own[-1].filename, own[-1].lineno or 0).strip()
    return f"{spec!r} cannot be loaded: {type(error).__name__}: {error}\n  {place}: {line}"
