"""What survives a kill: complete checkpoints, or none of them."""

import contextlib
import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy
import torch

from llmac.core.protocols import Stateful
from llmac.errors import CheckpointError
from llmac.runtime.context import Runtime

logger = logging.getLogger(__name__)

_OWNER = "llmac.json"
_MANIFEST = "manifest.json"
_FORMAT = 1


@runtime_checkable
class Saveable(Protocol):
    """A role of a checkpoint: whatever must continue exactly where it stopped."""

    def save(self, directory: Path) -> None:
        """Write everything below `directory`, which exists.

        Called on every rank with the same directory: what all ranks share is written by rank 0,
        what differs by each rank under a name of its own.
        """
        ...

    def load(self, directory: Path) -> None:
        """Continue from what `save` wrote there. Called on every rank."""
        ...


class CheckpointStore:
    """Numbered checkpoints of one run in one directory.

        directory/llmac.json                     whose directory this is
        directory/step-00000050/manifest.json    step, roles, size and sha256 of each file
        directory/step-00000050/<role>/...       what each role wrote
        directory/.saving-step-00000100/         not finished, never read

    A checkpoint is written aside, fsynced, described by its manifest and only then renamed to its
    name, after all ranks are done: at any moment of a kill there is either the whole of it or
    nothing under that name. All methods are collective.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        keep_last: int,
        runtime: Runtime,
        fingerprint: str,
        is_in_use: bool = False,
        explain: Callable[[], str] = str,
    ) -> None:
        """Claim the directory for this run.

        Args:
            directory: on a filesystem that all ranks share; made if missing.
            keep_last: how many of the newest checkpoints stay.
            runtime: the ranks that save together.
            fingerprint: of the configuration; checkpoints of another one are not touched.
            is_in_use: the run that claimed the directory has left something worth keeping beside it, even if
                there is no checkpoint.
            explain: says how this configuration differs from that of the folder, if anybody knows.

        Raises:
            CheckpointError: the directory cannot be written, holds something that is not ours, or
                checkpoints of another configuration.
            ValueError: keep_last below 1.
        """
        if keep_last < 1:
            raise ValueError(f"run.keep_last must be at least 1, got {keep_last}")
        self._directory = Path(directory)
        self._keep_last = keep_last
        self._runtime = runtime
        self._fingerprint = fingerprint
        self._is_in_use = is_in_use
        self._explain = explain
        self._damaged: set[Path] = set()
        with self._together(f"cannot use {self._directory} for checkpoints"):
            if runtime.is_main:
                self._claim()

    def save(self, step: int, roles: Mapping[str, Saveable]) -> Path:
        """Write checkpoint `step`, then drop those beyond `keep_last`.

        Args:
            step: the number `restore_latest` returns: steps done, the next one to run.
            roles: everything that must continue; each must write at least one file.

        Raises:
            CheckpointError: a rank could not write, a role wrote nothing, or there already is a
                later checkpoint that this run did not continue from. Nothing was committed.
        """
        final = self._directory / f"step-{step:08d}"
        staging = self._directory / f".saving-{final.name}"
        with self._together(f"cannot save checkpoint {final}"):
            if self._runtime.is_main:
                self._refuse_to_go_back(step)
                self._clear_unfinished()
                for role in roles:
                    (staging / role).mkdir(parents=True)
        with self._together(f"cannot save checkpoint {final}"):
            for role, saveable in roles.items():
                if not (staging / role).is_dir():
                    raise CheckpointError(
                        f"{staging / role} was made by rank 0 and is not there for rank "
                        f"{self._runtime.rank}; run.output must be on a filesystem all ranks share"
                    )
                saveable.save(staging / role)
        names = self._runtime.broadcast(_files_below(staging))
        mine: dict[str, Any] = {}
        with self._together(f"cannot save checkpoint {final}"):
            mine = self._checksums(staging, names, flush=True)
        sums = _merged(self._runtime.gather(mine))
        with self._together(f"cannot save checkpoint {final}"):
            if self._runtime.is_main:
                for role in roles:
                    if not any(name.startswith(f"{role}/") for name in names):
                        raise CheckpointError(f"role {role} wrote nothing; its state would be lost")
                self._commit(staging, final, step, list(roles), sums)
        logger.debug("saved checkpoint %s", final)
        return final

    def restore_latest(self, roles: Mapping[str, Saveable]) -> int:
        """Load the newest intact checkpoint into `roles`; returns the step to continue with.

        Unfinished and damaged checkpoints are skipped with a warning. 0 if nothing was ever saved.

        Raises:
            CheckpointError: all checkpoints are damaged (starting over would hide it), a role is
                missing in the checkpoint or unknown to this run, or a role cannot load its part.
        """
        newest = self._newest_intact()
        if newest is None:
            return 0
        with self._together(f"cannot restore checkpoint {newest}"):
            manifest = _read_manifest(newest)
            if manifest["fingerprint"] != self._fingerprint:
                raise CheckpointError(
                    f"{newest} was saved by another configuration than this run's"
                )
            _check_roles(newest, saved=manifest["roles"], wanted=list(roles))
            if manifest["world_size"] != self._runtime.world_size and self._runtime.is_main:
                logger.warning(
                    "checkpoint %s was written by %d processes and continues on %d: not bitwise",
                    newest,
                    manifest["world_size"],
                    self._runtime.world_size,
                )
            for role, saveable in roles.items():
                saveable.load(newest / role)
        return _step_of(newest)

    def latest(self) -> Path | None:
        """The newest committed checkpoint, contents unverified; None if there is none."""
        committed = self._runtime.broadcast(_steps_in(self._directory))
        return committed[-1] if committed else None

    def _claim(self) -> None:
        owner = self._directory / _OWNER
        if owner.exists():
            found = _read_json(owner).get("fingerprint")
            if found != self._fingerprint and (self._is_in_use or _steps_in(self._directory)):
                raise CheckpointError(
                    f"{self._directory} belongs to a run of another configuration (fingerprint "
                    f"{found}, this run's is {self._fingerprint}){self._explain()}. Nothing was touched: "
                    "choose another run.output, or go back to the configuration saved there"
                )
        elif self._directory.exists() and set(self._directory.iterdir()) - {_aside(owner)}:
            raise CheckpointError(
                f"{self._directory} is not empty and was not made by llmac (no {_OWNER} in it). "
                "Nothing was touched: choose another run.output"
            )
        self._directory.mkdir(parents=True, exist_ok=True)
        # Written in any case: this is also the test that the directory can be written.
        _write_json(owner, {"format": _FORMAT, "fingerprint": self._fingerprint})

    def _refuse_to_go_back(self, step: int) -> None:
        later = [path for path in _steps_in(self._directory) if _step_of(path) > step]
        intact = [path for path in later if path not in self._damaged]
        if intact:
            # Kept silently, it would be what the next restore continues from.
            raise CheckpointError(
                f"{intact[-1]} is later than step {step}, and this run did not continue from it. "
                "Resume from it (run.resume: auto), or choose another run.output"
            )

    def _clear_unfinished(self) -> None:
        for unfinished in self._directory.glob(".saving-*"):
            shutil.rmtree(unfinished)

    def _commit(
        self, staging: Path, final: Path, step: int, roles: list[str], sums: dict[str, Any]
    ) -> None:
        manifest = {
            "format": _FORMAT,
            "step": step,
            "fingerprint": self._fingerprint,
            "world_size": self._runtime.world_size,
            "roles": roles,
            "files": sums,
        }
        _write_json(staging / _MANIFEST, manifest)
        for folder in [*(path for path in staging.rglob("*") if path.is_dir()), staging]:
            _fsync(folder)
        if final.exists():
            # The same step again, because this one was damaged: out of the way, then gone.
            replaced = self._directory / f".saving-replaced-{final.name}"
            final.rename(replaced)
            staging.rename(final)
            shutil.rmtree(replaced)
        else:
            staging.rename(final)
        self._damaged.discard(final)
        _fsync(self._directory)
        before = [path for path in _steps_in(self._directory) if _step_of(path) <= step]
        keep = [path for path in before if path not in self._damaged][-self._keep_last :]
        for old in set(before) - set(keep):
            # Renamed first: a kill in the middle must not leave half a checkpoint under its name.
            doomed = self._directory / f".saving-dropped-{old.name}"
            old.rename(doomed)
            shutil.rmtree(doomed)

    def _newest_intact(self) -> Path | None:
        if self._runtime.is_main:
            for unfinished in sorted(self._directory.glob(".saving-*")):
                logger.warning("skipped %s: it was not finished", unfinished)
        candidates = self._runtime.broadcast(_steps_in(self._directory))
        for candidate in reversed(candidates):
            finding = self._problem_of(candidate)
            if finding is None:
                return candidate
            self._damaged.add(candidate)
            if self._runtime.is_main:
                logger.warning("skipped checkpoint %s: %s", candidate, finding)
        if candidates:
            raise CheckpointError(
                f"none of the {len(candidates)} checkpoints in {self._directory} is intact; see "
                "the warnings above. Restore them from a copy, or choose another run.output"
            )
        return None

    def _problem_of(self, checkpoint: Path) -> str | None:
        """Why a committed checkpoint cannot be trusted; the same answer on every rank."""
        try:
            mine = self._differences(checkpoint, _read_manifest(checkpoint)["files"])
        except (CheckpointError, OSError) as error:
            mine = [str(error)]
        findings = [finding for part in self._runtime.gather(mine) for finding in part]
        return findings[0] if findings else None

    def _differences(self, checkpoint: Path, files: Mapping[str, Any]) -> list[str]:
        names = sorted(files)
        for name in names:
            path = checkpoint / name
            size = path.stat().st_size if path.is_file() else None
            if size != files[name]["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                return [f"{name} {found}, expected {files[name]['bytes']} bytes"]
        sums = self._checksums(checkpoint, names, flush=False)
        wrong = [name for name, found in sums.items() if found != files[name]]
        return [f"{name} is damaged (its sha256 is not the manifest's)" for name in wrong]

    def _checksums(self, root: Path, names: Sequence[str], *, flush: bool) -> dict[str, Any]:
        """Size and sha256 of this rank's share of the files; `flush` makes them durable as well."""
        sums: dict[str, Any] = {}
        for name in names[self._runtime.rank :: self._runtime.world_size]:
            path = root / name
            with path.open("rb") as file:
                sums[name] = {
                    "bytes": path.stat().st_size,
                    "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                }
                if flush:
                    os.fsync(file.fileno())
        return sums

    @contextlib.contextmanager
    def _together(self, subject: str) -> Iterator[None]:
        """All ranks leave this block together, or all of them raise.

        Without it the ranks that succeeded would wait in the next collective for the one that did
        not. For the same reason the store keeps its own collectives outside such blocks.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # Whatever it is, the others must hear of it before it goes on.
            failure = error
        told = f"rank {self._runtime.rank}: {failure}" if failure is not None else None
        findings = [finding for finding in self._runtime.gather(told) if finding is not None]
        if isinstance(failure, CheckpointError):
            raise failure
        if findings:
            raise CheckpointError(f"{subject}: {findings[0]}") from failure


class RandomState:
    """The random numbers still to come, of python, numpy, torch and the rank's accelerator.

    A role of a checkpoint; each rank has its own file.
    """

    def __init__(self, runtime: Runtime) -> None:
        """Nothing is read before `save`.

        Args:
            runtime: whose rank and device.
        """
        self._runtime = runtime

    def save(self, directory: Path) -> None:
        """Write this rank's generators."""
        version, words, gauss = random.getstate()
        legacy: Any = numpy.random.get_state(legacy=True)
        kind, keys, position, has_gauss, cached = legacy
        state = {
            "python": (version, list(words), gauss),
            "numpy": (kind, torch.from_numpy(keys.astype("int64")), position, has_gauss, cached),
            "torch": torch.get_rng_state(),
        }
        if self._runtime.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._runtime.device)
        torch.save(state, self._path(directory))

    def load(self, directory: Path) -> None:
        """Continue this rank's generators; a rank that did not exist keeps its own seed."""
        path = self._path(directory)
        if not path.exists():
            logger.warning("rank %d has no random state in %s", self._runtime.rank, directory)
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        kind, keys, position, has_gauss, cached = state["numpy"]
        numpy.random.set_state((kind, keys.numpy().astype("uint32"), position, has_gauss, cached))
        torch.set_rng_state(state["torch"])
        if "cuda" in state and self._runtime.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self._runtime.device)

    def _path(self, directory: Path) -> Path:
        return directory / f"rank-{self._runtime.rank}.pt"


def _steps_in(directory: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    found = [path for path in directory.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _files_below(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def _merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: part[name] for part in parts for name in part}


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    manifest = _read_json(checkpoint / _MANIFEST)
    if manifest.get("format") != _FORMAT or manifest.get("step") != _step_of(checkpoint):
        raise CheckpointError(f"{_MANIFEST} is of another format or of another step")
    return manifest


def _check_roles(checkpoint: Path, *, saved: Sequence[str], wanted: Sequence[str]) -> None:
    missing = sorted(set(wanted) - set(saved))
    if missing:
        raise CheckpointError(
            f"checkpoint {checkpoint} has no {', '.join(missing)} (it has {', '.join(saved)}); "
            "what is missing would start from scratch in the middle of the run"
        )
    unknown = sorted(set(saved) - set(wanted))
    if unknown:
        raise CheckpointError(
            f"checkpoint {checkpoint} holds {', '.join(unknown)}, which this run would drop; "
            f"this run has {', '.join(wanted)}"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, expected an object")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all, and durable."""
    aside = _aside(path)
    with aside.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.saving")


def _fsync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Remembered:
    """A role for what remembers in plain data and knows no files."""

    def __init__(self, what: Stateful, runtime: Runtime, *, alike: bool) -> None:
        """Nothing is read before `save`.

        Args:
            what: asked for its `state`.
            runtime: whose rank.
            alike: all ranks remember the same, so that any number of them may continue; else each has its own file.
        """
        self._what = what
        self._runtime = runtime
        self._alike = alike

    def save(self, directory: Path) -> None:
        """Write this rank's state."""
        if self._runtime.is_main or not self._alike:
            kept = {"ranks": self._runtime.world_size, "state": self._what.state()}
            torch.save(kept, directory / self._file(self._runtime.rank))

    def load(self, directory: Path) -> None:
        """Continue from this rank's state; where it is empty there is nothing to continue from.

        Raises:
            CheckpointError: another number of ranks wrote the checkpoint, and one remembered something of its own.
        """
        first = self._read(directory, 0)
        ranks = first["ranks"]
        if self._alike:
            state = first["state"]
        elif ranks == self._runtime.world_size:
            state = self._read(directory, self._runtime.rank)["state"]
        elif any(self._read(directory, rank)["state"] for rank in range(ranks)):
            raise CheckpointError(
                f"{directory} was written by {ranks} processes, and here are {self._runtime.world_size}: "
                "what each remembers cannot be spread over another number; continue with as many as wrote it"
            )
        else:
            return
        if state:
            self._what.restore(state)

    def _read(self, directory: Path, rank: int) -> dict[str, Any]:
        return torch.load(directory / self._file(rank), map_location="cpu", weights_only=True)

    def _file(self, rank: int) -> str:
        return "everywhere.pt" if self._alike else f"rank-{rank}.pt"
