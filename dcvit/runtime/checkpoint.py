"""Finished work on disk, so that a run that is killed goes on from there with the same result.

A run's folder holds

    run.json                 what the run is of: settings, model, images, versions
    units/NAME.json          a finished unit of work: its values, and the checksums
    units/NAME.safetensors   its tensors, where it has any
    lock                     held by the process that works

A unit is a proxy set, a plan that was measured, a probe, a reconstructed block, a step of distillation. Each file is
written under a temporary name, synced and renamed, and the JSON last: a unit is there whole or not at all. What follows
from units is computed again from the same seeds, and comes out the same.

A folder may also have been made or changed by someone else. No link in it is followed, nothing is overwritten or
deleted that no run wrote, and a unit that the work could not have come to is computed again: whoever asks for a unit
says how to check it.
"""

import hashlib
import json
import os
import re
import socket
import stat
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import Repr
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dcvit.errors import DamagedEntryWarning, DcvitWarning, RunStoreError
from dcvit.runtime.earlier import entry_of_earlier_versions, in_present_words, run_of_earlier_versions
from dcvit.runtime.files import DRAFT_MARK, digest, kind_of, open_regular, probe_folder, read_table, replacing
from dcvit.serialization import from_plain

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CAN_LOCK = fcntl is not None
"""Whether this system has the locks without which no run is kept."""

__all__ = [
    "CAN_LOCK",
    "NOTHING_KEPT",
    "NO_CHECKS",
    "Check",
    "Entry",
    "MemoryStore",
    "RunStore",
    "Store",
    "delete_run",
    "differences",
    "digest_images",
    "digest_model",
    "open_run",
    "require_alike",
]

RUN_FILE, LOCK_FILE, ENTRIES = "run.json", "lock", "units"
FORMAT = 1

_NAME = re.compile(r"[a-z0-9]+([-.][a-z0-9]+)*")
_ENTRY_FILE = re.compile(rf"{_NAME.pattern}\.(json|safetensors)")
_UNFINISHED = re.compile(  # what a process that died was writing: a name may be cut; older versions added `.part`
    rf"\.{_NAME.pattern}[-.]?{re.escape(DRAFT_MARK)}[0-9a-f]{{16}}|({_ENTRY_FILE.pattern}|{re.escape(RUN_FILE)})\.part"
)
_HOLDER = re.compile(r"(process [0-9]+ on [^\n]{1,255}\n)?")  # what a run writes into its lock


@dataclass(frozen=True)
class Entry:
    """What a unit of work came to.

    Attributes:
        values: Plain values for JSON.
        tensors: By name.
    """

    values: Any
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


Check = Callable[[Entry], object]
"""Raises `ValueError` or `TypeError` if the work could not have come to a unit; changes nothing."""

NO_CHECKS: Mapping[str, Check] = MappingProxyType({})


class Store(ABC):
    """Where finished units go."""

    @abstractmethod
    def find(self, name: str, check: Check | None = None) -> Entry | None:
        """A unit that is finished; `None` if it is not, or not kept, or does not pass the check."""

    @abstractmethod
    def keep(self, name: str, entry: Entry) -> None:
        """Keep a unit that is finished.

        Raises:
            RunStoreError: If it cannot be written.
        """

    @abstractmethod
    def within(self, prefix: str) -> "Store":
        """The same store for units whose names begin so."""

    def entry(
        self,
        name: str,
        work: Callable[[], Entry],
        restore: Callable[[Entry], object] | None = None,
        *,
        check: Check | None = None,
        together: bool = False,
    ) -> Entry:
        """What the work comes to: from the store if it is done there, else now, and kept.

        Args:
            name: Lower-case letters and digits, joined by `-` or `.`; each unit of a run has its own.
            work: Computes it.
            restore: Called with a unit from the store, to do to a model what the work would have done to it.
            check: Called with a unit from the store, before it is used.
            together: Of several processes (`dcvit.runtime.distributed`) all do the work, which tells them apart; else
                one does.

        Raises:
            RunStoreError: If the unit cannot be written.
        """
        found = self.find(name, check)
        if found is None:
            found = work()
            self.keep(name, found)
        elif restore is not None:
            restore(found)
        return found

    def finished(self, names: Iterable[str], checks: Mapping[str, Check] = NO_CHECKS) -> dict[str, Entry]:
        """Those of some units that are finished and pass their checks, by name."""
        return {name: entry for name in names if (entry := self.find(name, checks.get(name))) is not None}

    def entries(
        self,
        works: Mapping[str, Callable[[], Entry]],
        on_progress: Callable[[int, Entry | None], None],
        checks: Mapping[str, Check] = NO_CHECKS,
    ) -> dict[str, Entry]:
        """Several that do not depend on each other, each done by one process of several.

        Args:
            works: By name, what computes it.
            on_progress: Called before any work with how many are finished already, and `None`; then after each that is worked
                out with how many are, and it.
            checks: By name, called with a unit from the store before it is used.
        """
        entries = self.finished(works, checks)
        on_progress(len(entries), None)
        for name in [name for name in works if name not in entries]:
            entries[name] = works[name]()
            self.keep(name, entries[name])
            on_progress(len(entries), entries[name])
        return {name: entries[name] for name in works}


class _NothingKept(Store):
    """A store that forgets: work is done each time."""

    def find(self, name: str, check: Check | None = None) -> Entry | None:
        return None

    def keep(self, name: str, entry: Entry) -> None:
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

    found: dict[str, Entry] = field(default_factory=dict)
    prefix: str = ""

    def find(self, name: str, check: Check | None = None) -> Entry | None:
        """See `Store`; what this process has kept needs no check."""
        return self.found.get(self.prefix + name)

    def keep(self, name: str, entry: Entry) -> None:
        """See `Store`; the tensors are copied."""
        tensors = {key: tensor.detach().to("cpu", copy=True) for key, tensor in entry.tensors.items()}
        self.found[self.prefix + name] = Entry(entry.values, tensors)

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
        entries = self.folder / ENTRIES
        return entries / f"{name}.json", entries / f"{name}.safetensors"

    def find(self, name: str, check: Check | None = None) -> Entry | None:
        """See `Store`; a unit that is there but damaged is said to be."""
        values, tensors = self._paths(name)
        try:
            if kind_of(values) is None:
                return None
            kept = from_plain(_Kept, entry_of_earlier_versions(read_table(values)), "the file")
            if kept.sha256 != _digest(vars(kept.entry)):
                raise ValueError("its values were changed")
            if kept.entry.name != self.prefix + name:
                raise ValueError(f"it is a copy of {kept.entry.name!r}")
            found = in_present_words(kept.entry.values)
            entry = Entry(found)
            if kept.entry.tensors is not None:
                if digest(tensors) != kept.entry.tensors:
                    raise ValueError("its tensors were changed")
                entry = Entry(found, _load(tensors))
            if check is not None:
                check(entry)
            return entry
        except (OSError, ValueError, TypeError, RecursionError) as error:
            warnings.warn(
                f"{str(values)!r} is damaged ({error}): this unit is computed again.", DamagedEntryWarning, stacklevel=2
            )
            return None

    def keep(self, name: str, entry: Entry) -> None:
        """See `Store`."""
        values, tensors = self._paths(name)
        sha256 = None
        if entry.tensors:
            plain = {key: tensor.detach().cpu().contiguous() for key, tensor in entry.tensors.items()}
            sha256 = _replace(tensors, lambda path: save_file(plain, path))
        kept = vars(_Entry(self.prefix + name, entry.values, sha256))
        _replace(values, lambda path: path.write_text(json.dumps({"entry": kept, "sha256": _digest(kept)}) + "\n"))


@dataclass(frozen=True)
class _Entry:
    """A unit as its file holds it.

    Attributes:
        name: Of the unit, with its store's prefix.
        values: Its values.
        tensors: The SHA-256 of the file of its tensors; `None` where it has none.
    """

    name: str
    values: Any
    tensors: str | None


@dataclass(frozen=True)
class _Kept:
    """What a unit's file holds.

    Attributes:
        entry: The unit.
        sha256: Of the unit as JSON with sorted keys.
    """

    entry: _Entry
    sha256: str


def require_alike(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse tensors that cannot take the place of others.

    Args:
        found: Of a unit.
        wanted: Tensors of the names, shapes and dtypes that it must have; their values do not matter.

    Raises:
        ValueError: If they differ in that, or one that was found holds NaN or infinity.
    """
    if differing := sorted(found.keys() ^ wanted.keys()):
        raise ValueError(f"its tensors are others than they should be: {_shown(differing[0])}")
    for name, tensor in found.items():
        of_found, of_wanted = ((x.dtype, tuple(x.shape)) for x in (tensor, wanted[name]))
        if of_found != of_wanted:
            raise ValueError(f"tensor {name} is {of_found[0]} {of_found[1]}: expected {of_wanted[0]} {of_wanted[1]}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"tensor {name} is not finite")


@contextmanager
def open_run(folder: str | Path | None, fingerprint: Mapping[str, Any]) -> Iterator[Store]:
    """The store of a run, locked until the end of the block.

    Args:
        folder: The run's; created if missing, and the same one to the end if the current folder changes. `None` keeps
            nothing.
        fingerprint: Everything that the result depends on, as plain values for JSON.

    Raises:
        RunStoreError: If the folder is a link, holds something else or a run of another fingerprint, cannot be written,
            or another process works on it.
    """
    if folder is None:
        yield NOTHING_KEPT
        return
    folder = Path(folder).absolute()
    _require_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _require_own(folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    with _locked(folder):
        try:
            _remove_unfinished(folder)
        except OSError as error:
            raise _unwritable(folder, error) from error
        _check_fingerprint(folder, fingerprint)
        yield RunStore(folder)


def delete_run(folder: str | Path) -> None:
    """Delete a run's folder: what `open_run` made there, and it where nothing else is left.

    A folder that is in use, or whose files are not a run's, is left as it is, with a warning.
    """
    folder = Path(folder).absolute()
    if kind_of(folder) is None:
        return
    try:
        _require_folder(folder)
        began = _began(folder)
        with _locked(folder):
            _delete(folder, began)
    except (RunStoreError, OSError) as error:
        warnings.warn(f"A finished run is not deleted. {error}", DcvitWarning, stacklevel=2)


def _delete(folder: Path, began: bool) -> None:
    """See `delete_run`, with the lock held.

    Args:
        folder: The folder.
        began: Whether a run began there before the lock was taken.
    """
    if kind_of(folder / RUN_FILE) is not None:
        if not _is_run(_read_run(folder)):
            raise _foreign(folder, RUN_FILE)
        for path in (*_regular_files(folder / ENTRIES, _ENTRY_FILE), *_regular_files(folder / ENTRIES, _UNFINISHED)):
            path.unlink()
        with suppress(OSError):  # someone's file is in it, or it is none
            (folder / ENTRIES).rmdir()
        (folder / RUN_FILE).unlink()
    for path in _regular_files(folder, _UNFINISHED) if began else ():
        path.unlink()
    (folder / LOCK_FILE).unlink()
    with suppress(OSError):
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


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        ValueError: If it holds something else.
    """
    try:
        return load_file(path)
    except (SafetensorError, KeyError, AttributeError, RuntimeError) as error:  # a dtype that torch does not have
        raise ValueError(f"its tensors cannot be read: {error}") from error


def _replace(path: Path, write: Callable[[Path], Any]) -> str:
    """Write a file whole or not at all; its SHA-256."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (kind := kind_of(path.parent)) != "a folder":
            raise OSError(f"{str(path.parent)!r} is {kind}")
        with replacing(path) as draft:
            write(draft)
            return digest(draft)
    except (OSError, SafetensorError) as error:
        raise RunStoreError(
            f"{str(path)!r} cannot be written ({error}). What was finished before is kept: make room, or make the "
            "folder writable, and run the same again."
        ) from error


def _regular_files(folder: Path, names: re.Pattern[str]) -> list[Path]:
    """The regular files of some names in a folder; none where there is no folder but a link, for example."""
    if kind_of(folder) != "a folder":
        return []
    return [path for path in folder.iterdir() if names.fullmatch(path.name) and kind_of(path) == "a regular file"]


def _require_folder(folder: Path) -> None:
    """Refuse a system without locks, and what is no folder.

    Raises:
        RunStoreError: If that is so.
    """
    if fcntl is None:
        raise RunStoreError(f"run_dir={str(folder)!r}: this system has no file locks; leave run_dir out.")
    try:
        kind = kind_of(folder)
    except (OSError, ValueError) as error:
        raise _unwritable(folder, error) from error
    if kind not in (None, "a folder"):
        better = "the folder that it is_main to" if kind == "a link" else "a folder that is empty or does not exist"
        raise RunStoreError(f"run_dir={str(folder)!r} is {kind}, not a folder: name {better}.")


def _require_own(folder: Path) -> None:
    """Refuse a folder in which something lies that no run made, or a link for example where a run has a file.

    Raises:
        RunStoreError: If that is so.
        OSError: If it cannot be looked at.
    """
    foreign = [*_foreign_in(folder, re.compile(rf"{re.escape(RUN_FILE)}|{LOCK_FILE}"), (ENTRIES,))]
    if not foreign and kind_of(folder / ENTRIES) is not None:
        foreign = [f"{ENTRIES}/{what}" for what in _foreign_in(folder / ENTRIES, _ENTRY_FILE)]
    if foreign:
        raise _foreign(folder, ", ".join(foreign[:3]))
    if not _began(folder):
        for place in (folder, folder / ENTRIES):
            for path in _regular_files(place, _UNFINISHED):
                raise _foreign(folder, str(path.relative_to(folder)))


def _foreign_in(folder: Path, files: re.Pattern[str], folders: Sequence[str] = ()) -> Iterator[str]:
    """What lies in a run's folder and is of no name or kind that a run makes there, in words."""
    for path in sorted(folder.iterdir()):
        kind = kind_of(path)
        if path.name in folders:
            wanted = "a folder"
        elif files.fullmatch(path.name) or _UNFINISHED.fullmatch(path.name):
            wanted = "a regular file"
        else:
            yield path.name
            continue
        if kind not in (None, wanted):  # None was deleted just now
            yield f"{path.name} is {kind}"


def _began(folder: Path) -> bool:
    """Whether a run began in a folder, by the `run.json` or the lock that it left there.

    An empty lock does not tell: any file of that name may be empty.
    """
    with suppress(RunStoreError):
        if _is_run(_read_run(folder)):
            return True
    with suppress(OSError), open_regular(folder / LOCK_FILE) as file:
        return _is_one_name(file) and bool(_holder(file))
    return False


def _foreign(folder: Path, what: str) -> RunStoreError:
    return RunStoreError(
        f"run_dir={str(folder)!r} holds something else ({what}): name a folder that is empty or does not exist."
    )


def _unwritable(folder: Path, error: Exception) -> RunStoreError:
    return RunStoreError(f"run_dir={str(folder)!r} cannot be written ({error}): name another folder.")


def _remove_unfinished(folder: Path) -> None:
    """Delete what a process that died was writing, and find out whether more can be written.

    Raises:
        OSError: If not.
    """
    for path in (*_regular_files(folder, _UNFINISHED), *_regular_files(folder / ENTRIES, _UNFINISHED)):
        path.unlink()
    probe_folder(folder / ENTRIES if (folder / ENTRIES).exists() else folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a run's lock, which its process loses when it dies.

    Raises:
        RunStoreError: If another process holds it, or the file is no lock of a run, which is then left as it is.
    """
    path = folder / LOCK_FILE
    try:
        file = _open_lock(path)
    except OSError as error:
        raise _unwritable(folder, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunStoreError(
                f"run_dir={str(folder)!r} is in use by {_holder(file) or 'another process'}: wait for it, or name "
                "another folder."
            ) from error
        except OSError as error:
            raise _unwritable(folder, error) from error
        if not _is_at(file, path):
            raise RunStoreError(f"run_dir={str(folder)!r} was deleted by another process just now: run the same again.")
        if _holder(file) is None or not _is_one_name(file):
            raise _foreign(folder, LOCK_FILE)
        try:
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as error:
            raise RunStoreError(
                f"{str(path)!r} cannot be written ({error}): make room, and run the same again."
            ) from error
        yield


def _open_lock(path: Path) -> BinaryIO:
    """Open a lock, made if there is none, with its content untouched.

    Raises:
        OSError: If it cannot be opened, or is no regular file.
    """
    kind = kind_of(path)
    if kind in (None, "a regular file"):  # opening a device, for example, may do something already
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "r+b", buffering=0)
        os.close(descriptor)
        kind = "no regular file"
    raise OSError(f"{str(path)!r} is {kind}")


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether a path still is_main to an open file, and not to none or another."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _is_one_name(file: BinaryIO) -> bool:
    """Whether an open file has no second name, under which it may be anyone's."""
    return os.fstat(file.fileno()).st_nlink == 1


def _holder(file: BinaryIO) -> str | None:
    """Who a lock says holds it, which is for a message alone; `None` if the file holds something else."""
    file.seek(0)
    found = _HOLDER.fullmatch(file.read(1000).decode(errors="replace"))
    return found and found.group().strip()


def _read_run(folder: Path) -> dict[str, Any]:
    """What a run's folder says that the run is of.

    Raises:
        RunStoreError: If it cannot be read.
    """
    path = folder / RUN_FILE
    try:
        return read_table(path)
    except (OSError, ValueError) as error:
        raise RunStoreError(
            f"{str(path)!r} cannot be read ({error}): delete the folder, or name another one."
        ) from error


def _is_run(found: Mapping[str, Any]) -> bool:
    """Whether a file of the name that runs use is one of theirs."""
    return found.get("format") == FORMAT and isinstance(found.get("settings"), dict)


def _check_fingerprint(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Refuse to mix two runs, and note what this one is of.

    Raises:
        RunStoreError: If the folder holds another run, or cannot be read or written.
    """
    path = folder / RUN_FILE
    # As they come back from a file: tuples are lists there.
    wanted = json.loads(json.dumps({"format": FORMAT, **fingerprint}))
    entries = bool(_regular_files(folder / ENTRIES, _ENTRY_FILE))

    def note() -> None:
        _replace(path, lambda draft: draft.write_text(json.dumps(wanted, indent=2) + "\n"))

    if kind_of(path) is None:
        if entries:
            raise RunStoreError(f"{str(folder)!r} has units but no {RUN_FILE}: delete it, or name another folder.")
        note()
        return
    found = run_of_earlier_versions(_read_run(folder))
    differing = list(differences(found, wanted))
    if differing and _is_run(found) and found.keys() == wanted.keys() and not entries:
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
        yield f"{name} was {_shown(found)} there and is {_shown(wanted)} here"


def _shown(value: Any) -> str:
    """A value of a file in an error, not too long."""
    return _REPR.repr(value)


_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxlong = 30


def require_one_of(candidates: Sequence[float], entry: Entry) -> None:
    """Refuse a unit that holds none of the numbers among which one was sought.

    Raises:
        TypeError, ValueError: If that is so.
    """
    if from_plain(float, entry.values) not in candidates:
        raise ValueError(f"it holds {entry.values!r}: expected one of {', '.join(map(str, candidates))}")
