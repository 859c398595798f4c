"""Finished work on disk, so that a run that is killed goes on from there with the same result.

A run's folder holds

    run.json                 what the run is of: settings, model, images, versions
    units/NAME.json          a finished unit of work: its values, and the checksums
    units/NAME.safetensors   its tensors, where it has any
    lock                     held by the process that works

A unit is a metric set, a plan that was measured, a trial, a reconstructed block, a step of mimicking. Each file is
written under a temporary name, synced and renamed, and the JSON last: a unit is there whole or not at all. What follows
from units is computed again from the same seeds, and comes out the same.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dcvit.errors import DamagedUnitWarning, RunStoreError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CAN_LOCK = fcntl is not None
"""Whether this system has the locks without which no run is kept."""

__all__ = [
    "CAN_LOCK",
    "NOTHING_KEPT",
    "MemoryStore",
    "RunStore",
    "Store",
    "Unit",
    "delete_run",
    "differences",
    "digest_images",
    "digest_model",
    "open_run",
]

RUN_FILE, LOCK_FILE, UNITS, PARTIAL = "run.json", "lock", "units", ".part"
FORMAT = 1

_NAME = re.compile(r"[a-z0-9]+([-.][a-z0-9]+)*")


@dataclass(frozen=True)
class Unit:
    """What a unit of work came to.

    Attributes:
        values: Plain values for JSON.
        tensors: By name.
    """

    values: Any
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Store(ABC):
    """Where finished units go."""

    @abstractmethod
    def find(self, name: str) -> Unit | None:
        """A unit that is finished; `None` if it is not, or not kept."""

    @abstractmethod
    def keep(self, name: str, unit: Unit) -> None:
        """Keep a unit that is finished.

        Raises:
            RunStoreError: If it cannot be written.
        """

    @abstractmethod
    def within(self, prefix: str) -> "Store":
        """The same store for units whose names begin so."""

    def unit(
        self,
        name: str,
        work: Callable[[], Unit],
        restore: Callable[[Unit], object] | None = None,
        *,
        together: bool = False,
    ) -> Unit:
        """What the work comes to: from the store if it is done there, else now, and kept.

        Args:
            name: Lower-case letters and digits, joined by `-` or `.`; each unit of a run has its own.
            work: Computes it.
            restore: Called with a unit from the store, to do to a model what the work would have done to it.
            together: Of several processes (`dcvit.distributed`) all do the work, which tells them apart; else one does.

        Raises:
            RunStoreError: If the unit cannot be written.
        """
        found = self.find(name)
        if found is None:
            found = work()
            self.keep(name, found)
        elif restore is not None:
            restore(found)
        return found

    def finished(self, names: Iterable[str]) -> dict[str, Unit]:
        """Those of some units that are finished, by name."""
        return {name: unit for name in names if (unit := self.find(name)) is not None}

    def units(
        self, works: Mapping[str, Callable[[], Unit]], told: Callable[[int, Unit | None], None]
    ) -> dict[str, Unit]:
        """Several that do not depend on each other, each done by one process of several.

        Args:
            works: By name, what computes it.
            told: Called before any work with how many are finished already, and `None`; then after each that is worked
                out with how many are, and it.
        """
        units = self.finished(works)
        told(len(units), None)
        for name in [name for name in works if name not in units]:
            units[name] = works[name]()
            self.keep(name, units[name])
            told(len(units), units[name])
        return {name: units[name] for name in works}


class _NothingKept(Store):
    """A store that forgets: work is done each time."""

    def find(self, name: str) -> Unit | None:
        return None

    def keep(self, name: str, unit: Unit) -> None:
        """Forget it."""

    def within(self, prefix: str) -> "Store":
        return self


NOTHING_KEPT: Store = _NothingKept()


@dataclass(frozen=True)
class MemoryStore(Store):
    """Units in memory, for work that starts over in the same process.

    Attributes:
        found: Units by name.
        prefix: What the names of its units begin with.
    """

    found: dict[str, Unit] = field(default_factory=dict)
    prefix: str = ""

    def find(self, name: str) -> Unit | None:
        """See `Store`."""
        return self.found.get(self.prefix + name)

    def keep(self, name: str, unit: Unit) -> None:
        """See `Store`; the tensors are copied."""
        tensors = {key: tensor.detach().to("cpu", copy=True) for key, tensor in unit.tensors.items()}
        self.found[self.prefix + name] = Unit(unit.values, tensors)

    def within(self, prefix: str) -> "MemoryStore":
        """See `Store`."""
        return MemoryStore(self.found, f"{self.prefix}{prefix}.")


@dataclass(frozen=True)
class RunStore(Store):
    """A run's folder, see `open_run`.

    Attributes:
        folder: The folder.
        prefix: What the names of its units begin with.
    """

    folder: Path
    prefix: str = ""

    def within(self, prefix: str) -> "RunStore":
        """See `Store`."""
        return RunStore(self.folder, f"{self.prefix}{prefix}.")

    def _paths(self, name: str) -> tuple[Path, Path]:
        name = self.prefix + name
        if not _NAME.fullmatch(name):
            raise ValueError(f"unit {name!r}: expected lower-case letters and digits, joined by - or .")
        units = self.folder / UNITS
        return units / f"{name}.json", units / f"{name}.safetensors"

    def find(self, name: str) -> Unit | None:
        """See `Store`; a unit that is there but damaged is said to be."""
        values, tensors = self._paths(name)
        if not values.is_file():
            return None
        try:
            kept = json.loads(values.read_text(encoding="utf-8"))
            if kept["sha256"] != _digest(kept["unit"]):
                raise ValueError("its values were changed")
            expected = kept["unit"]["tensors"]
            if expected is None:
                return Unit(kept["unit"]["values"])
            if _digest_file(tensors) != expected:
                raise ValueError("its tensors were changed")
            return Unit(kept["unit"]["values"], load_file(tensors))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            warnings.warn(
                f"{str(values)!r} is damaged ({error}): this unit is computed again.", DamagedUnitWarning, stacklevel=2
            )
            return None

    def keep(self, name: str, unit: Unit) -> None:
        """See `Store`."""
        values, tensors = self._paths(name)
        digest = None
        if unit.tensors:
            plain = {key: tensor.detach().cpu().contiguous() for key, tensor in unit.tensors.items()}
            digest = _replace(tensors, lambda path: save_file(plain, path))
        kept = {"name": self.prefix + name, "values": unit.values, "tensors": digest}
        _replace(values, lambda path: path.write_text(json.dumps({"unit": kept, "sha256": _digest(kept)}) + "\n"))


@contextmanager
def open_run(folder: str | Path | None, fingerprint: Mapping[str, Any]) -> Iterator[Store]:
    """The store of a run, locked until the end of the block.

    Args:
        folder: The run's; created if missing. `None` keeps nothing.
        fingerprint: Everything that the result depends on, as plain values for JSON.

    Raises:
        RunStoreError: If the folder holds something else or a run of another fingerprint, cannot be written, or another
            process works on it.
    """
    if folder is None:
        yield NOTHING_KEPT
        return
    folder = Path(folder)
    with _locked(folder):
        for left in (folder / UNITS).glob(f"*{PARTIAL}"):  # by a process that died
            left.unlink(missing_ok=True)
        _check_fingerprint(folder, fingerprint)
        yield RunStore(folder)


def delete_run(folder: str | Path) -> None:
    """Delete a run's folder: what `open_run` made there, and it where nothing else is left."""
    folder = Path(folder)
    shutil.rmtree(folder / UNITS, ignore_errors=True)
    for name in (RUN_FILE, LOCK_FILE):
        _remove(folder / name)
    with suppress(OSError):  # someone's file is in it
        folder.rmdir()


def digest_model(model: nn.Module, config: Mapping[str, Any]) -> str:
    """SHA-256 of a model's `config.json`, and of its parameters and buffers, those too that are not saved."""
    total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(_bytes(tensor))
    return total.hexdigest()


def digest_images(images: Tensor) -> str:
    """SHA-256 of images."""
    total = hashlib.sha256(f"{images.dtype} {tuple(images.shape)}".encode())
    total.update(_bytes(images))
    return total.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes; of one on the CPU no copy."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _digest_file(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


def _replace(path: Path, write: Callable[[Path], Any]) -> str:
    """Write a file whole or not at all; its SHA-256."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        digest = _digest_file(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        _remove(partial)
        raise RunStoreError(
            f"{str(path)!r} cannot be written ({error}). What was finished before is kept: make room, or make the "
            "folder writable, and run the same again."
        ) from error
    return digest


def _sync_folder(folder: Path) -> None:
    """Let a rename outlive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{str(path)!r} is left over and cannot be removed ({error}).", stacklevel=2)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a run's lock, which its process loses when it dies."""
    if fcntl is None:
        raise RunStoreError(f"run_dir={str(folder)!r}: this system has no file locks; leave run_dir out.")
    if folder.exists() and not folder.is_dir():
        raise RunStoreError(f"run_dir={str(folder)!r} is a file: name a folder that is empty or does not exist.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = sorted({path.name for path in folder.iterdir()} - {RUN_FILE, LOCK_FILE, UNITS, RUN_FILE + PARTIAL})
        if foreign:
            raise RunStoreError(
                f"run_dir={str(folder)!r} holds something else ({', '.join(foreign[:3])}): name a folder that is empty "
                "or does not exist."
            )
        file = (folder / LOCK_FILE).open("a+")
    except OSError as error:
        raise RunStoreError(f"run_dir={str(folder)!r} cannot be written ({error}): name another folder.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise RunStoreError(
                f"run_dir={str(folder)!r} is in use by {file.read().strip() or 'another process'}: wait for it, or "
                "name another folder."
            ) from error
        _say_who(file)
        yield


def _say_who(file: TextIO) -> None:
    """For the message of a process that comes later; only the lock itself counts."""
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError as error:
        raise RunStoreError(f"{file.name!r} cannot be written ({error}): make room, and run the same again.") from error


def _check_fingerprint(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Refuse to mix two runs, and note what this one is of."""
    path = folder / RUN_FILE
    # As they come back from a file: tuples are lists there.
    wanted = json.loads(json.dumps({"format": FORMAT, **fingerprint}))
    units = any((folder / UNITS).glob("*"))

    def note() -> None:
        _replace(path, lambda partial: partial.write_text(json.dumps(wanted, indent=2) + "\n"))

    if not path.is_file():
        if units:
            raise RunStoreError(f"{str(folder)!r} has units but no {RUN_FILE}: delete it, or name another folder.")
        note()
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no table")
    except (OSError, ValueError) as error:
        raise RunStoreError(
            f"{str(path)!r} cannot be read ({error}): delete the folder, or name another one."
        ) from error
    differing = list(differences(found, wanted))
    if differing and "format" in found and not units:
        note()  # that run finished nothing; it was refused, for example
    elif differing:
        raise RunStoreError(
            f"run_dir={str(folder)!r} holds another run: {'; '.join(differing[:3])}. Name another folder, or "
            "delete that one."
        )


def differences(found: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """Where what was found differs from what is wanted, plain values for JSON both, in words."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif found != wanted and not (found != found and wanted != wanted):  # NaN is NaN
        yield f"{name} was {found!r} there and is {wanted!r} here"
