"""Make .venv complete and up to date; called by scripts/setup. Standard library only.

`.venv/made_for.json` is written last and says what the environment was made for. Without it, or when it says something
else, or when a package it lists is gone, the environment is not trusted and made anew. Further extras are added to an
environment that is otherwise right. Packages that somebody has installed in addition are left alone.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
MADE_FOR = "made_for.json"
COMPILED_FOR_TORCH = ("torchvision", "torchaudio", "torchcodec")
"""vLLM pulls them in, nothing here uses them, and transformers cannot load a model beside a broken one."""


class SetupError(Exception):
    """The environment could not be made; the message says why and where the log is."""


def fingerprint(checkout: Path, python: str) -> str:
    """Changes exactly when an environment made before must be made anew.

    It covers what `pyproject.toml` says about dependencies and building, all of `constraints.txt`, the Python, and
    where the checkout lies, because scripts of an environment contain its path.
    """
    project = tomllib.loads((checkout / "pyproject.toml").read_text())
    parts = {
        "build": project["build-system"],
        "dependencies": project["project"].get("dependencies", []),
        "extras": project["project"].get("optional-dependencies", {}),
        "entry points": project["project"].get("scripts", {}),
        "constraints": (checkout / "constraints.txt").read_text(),
        "python": python,
        "checkout": str(checkout),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def packages_of(venv: Path) -> set[str]:
    """Name and version of everything installed, as the folders of site-packages say it."""
    return {folder.stem for folder in venv.glob("lib/python*/site-packages/*.dist-info")}


def what_is_wrong(venv: Path, wanted: str) -> str | None:
    """Why `venv` cannot be kept, as part of a sentence; None: it can."""
    stamp = venv / MADE_FOR
    if not venv.exists():
        return "there is no .venv yet"
    if not stamp.exists():
        return "its making was interrupted"
    try:
        made_for = json.loads(stamp.read_text())
        if made_for["fingerprint"] != wanted:
            return "dependencies, Python or the checkout's place have changed"
        missing = sorted(set(made_for["packages"]) - packages_of(venv))
    except (ValueError, KeyError, TypeError):
        return f"{stamp.name} is damaged"
    if missing:
        return f"{missing[0]} was removed or replaced"
    python = venv / "bin" / "python"
    if not python.exists() or subprocess.run([python, "-c", ""], check=False).returncode:
        return "its Python does not run"
    return None


def extras_of(venv: Path) -> set[str]:
    """Extras that `venv` was made with."""
    return set(json.loads((venv / MADE_FOR).read_text())["extras"])


def run(command: list[str | Path], log: Path) -> None:
    """Run with all output in `log`; its end is the error message when that fails."""
    with log.open("a") as file:
        file.write(f"$ {' '.join(map(str, command))}\n")
        file.flush()
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise SetupError(
            f"{tail}\n\nscripts/setup: `{' '.join(map(str, command[:4]))} ...` failed with exit code {code}; "
            f"the end of {log} is above."
        )


def imports(python: Path, statement: str) -> bool:
    """Whether a fresh interpreter survives `statement`."""
    return (
        subprocess.run([python, "-c", statement], capture_output=True, check=False).returncode == 0
    )


def drop_broken(python: Path, venv: Path, log: Path) -> None:
    """Uninstall those of `COMPILED_FOR_TORCH` that do not fit the installed torch."""
    installed = {package.partition("-")[0] for package in packages_of(venv)}
    broken = [
        name
        for name in COMPILED_FOR_TORCH
        if name in installed and not imports(python, f"import {name}")
    ]
    if broken:
        run([python, "-m", "pip", "uninstall", "--yes", *broken], log)


def install(venv: Path, extras: Iterable[str], log: Path) -> None:
    """Install this project, editable, with `extras`, at the versions of `constraints.txt`."""
    python = venv / "bin" / "python"
    target = f"{CHECKOUT}[{','.join(sorted(extras))}]" if extras else str(CHECKOUT)
    constraints = ["--constraint", CHECKOUT / "constraints.txt"]
    run([python, "-m", "pip", "install", *constraints, "--editable", target], log)
    drop_broken(python, venv, log)
    run([python, "-c", "import llmac.core; from transformers import Qwen2ForCausalLM"], log)


def make(venv: Path, extras: set[str], log: Path) -> None:
    """Bring `venv` to a state `what_is_wrong` has nothing against, touching nothing if it is already."""
    wanted = fingerprint(CHECKOUT, f"{sys.version} {sys.base_prefix}")
    wrong = what_is_wrong(venv, wanted)
    present = set() if wrong else extras_of(venv)
    if not wrong and extras <= present:
        return
    if venv.exists() and not (venv / "pyvenv.cfg").exists() and any(venv.iterdir()):
        raise SetupError(f"{venv} exists and is no virtual environment; move it away.")
    why = wrong or f"it lacks {', '.join(sorted(extras - present))}"
    sys.stderr.write(f"setting up .venv, a few minutes ({why}); log: {log}\n")
    started = time.monotonic()
    log.unlink(missing_ok=True)
    (venv / MADE_FOR).unlink(missing_ok=True)  # from here on the environment is not trusted
    if wrong:
        shutil.rmtree(venv, ignore_errors=True)
        run([sys.executable, "-m", "venv", venv], log)
    extras = extras | present
    install(venv, extras, log)
    aside = venv / f"{MADE_FOR}.tmp"
    stamp = {"fingerprint": wanted, "extras": sorted(extras), "packages": sorted(packages_of(venv))}
    aside.write_text(json.dumps(stamp, indent=1))
    aside.replace(venv / MADE_FOR)
    sys.stderr.write(f".venv is ready after {time.monotonic() - started:.0f} s\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/setup", description="Make .venv complete and up to date."
    )
    known = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help=f"any of: {', '.join(known)}")
    extras = set(parser.parse_args().extras)
    if unknown := sorted(extras - set(known)):
        parser.error(f"there is no extra {unknown[0]!r}; extras: {', '.join(known)}")
    os.environ.pop(
        "PYTHONPATH", None
    )  # packages from elsewhere would hide what the environment lacks
    os.environ.pop("PYTHONHOME", None)
    with (CHECKOUT / ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two at once, the second waits and finds it done
        try:
            make(CHECKOUT / ".venv", extras, CHECKOUT / ".venv.log")
        except SetupError as error:
            sys.stderr.write(f"{error}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
