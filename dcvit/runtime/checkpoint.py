"""Finished work on disk, so that a killed run resumes with the same result.

A run's folder holds

    run.json                 what defines the run: settings, model, images, versions
    units/NAME.json          a finished entry: its values and checksums
    units/NAME.safetensors   the entry's tensors, if it has any
    lock                     held by the process that works

An entry is, for example, a proxy set, a measured plan, a probe, a reconstructed block or a distillation step. Each file
is written under a temporary name, synced and renamed, and the JSON file comes last. So an entry is either complete or
absent. What follows from the entries is computed again from the same seeds, with the same result.

Someone else may have made or changed the folder. No link in it is followed, and only files that a run wrote are
overwritten or deleted. Callers say how to check each entry, and an entry that the work could not have produced is
computed again.
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
"""Whether this system has the file locks that run folders need."""

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
_UNFINISHED = re.compile(  # drafts of killed processes: long names are truncated; older versions added `.part`
    rf"\.{_NAME.pattern}[-.]?{re.escape(DRAFT_MARK)}[0-9a-f]{{16}}|({_ENTRY_FILE.pattern}|{re.escape(RUN_FILE)})\.part"
)
_HOLDER = re.compile(r"(process [0-9]+ on [^\n]{1,255}\n)?")  # what a run writes into its lock


@dataclass(frozen=True)
class Entry:
    """A checkpoint entry: the result of one piece of work.

    Attributes:
        values: Plain values for JSON.
        tensors: Tensors by name.
    """

    values: Any
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


Check = Callable[[Entry], object]
"""A function that raises `ValueError` or `TypeError` for an entry that the work cannot make. It changes nothing."""

NO_CHECKS: Mapping[str, Check] = MappingProxyType({})


class Store(ABC):
    """A place that keeps finished entries."""

    @abstractmethod
    def find(self, name: str, check: Check | None = None) -> Entry | None:
        """Return a finished entry; `None` if it is not finished, not kept, or fails the check."""

    @abstractmethod
    def keep(self, name: str, entry: Entry) -> None:
        """Keep a finished entry.

        Raises:
            RunStoreError: If the entry cannot be written.
        """

    @abstractmethod
    def within(self, prefix: str) -> "Store":
        """Return this store for entries whose names begin with a prefix."""

    def entry(
        self,
        name: str,
        work: Callable[[], Entry],
        restore: Callable[[Entry], object] | None = None,
        *,
        check: Check | None = None,
        together: bool = False,
    ) -> Entry:
        """Return an entry from the store, or compute and keep it.

        Args:
            name: Lower-case letters and digits, joined by `-` or `.`. Each entry of a run has its own name.
            work: Computes the entry.
            restore: Called with an entry from the store, to change a model as the work would have changed it.
            check: Called with an entry from the store before it is used.
            together: Whether all processes of a group (`dcvit.runtime.distributed`) run the work, which is split among
                them. By default only one process runs it.

        Raises:
            RunStoreError: If the entry cannot be written.
        """
        found = self.find(name, check)
        if found is None:
            found = work()
            self.keep(name, found)
        elif restore is not None:
            restore(found)
        return found

    def finished(self, names: Iterable[str], checks: Mapping[str, Check] = NO_CHECKS) -> dict[str, Entry]:
        """Return those of the named entries that are finished and pass their checks, by name."""
        return {name: entry for name in names if (entry := self.find(name, checks.get(name))) is not None}

    def entries(
        self,
        works: Mapping[str, Callable[[], Entry]],
        on_progress: Callable[[int, Entry | None], None],
        checks: Mapping[str, Check] = NO_CHECKS,
    ) -> dict[str, Entry]:
        """Return independent entries from the store, or compute and keep them, each in one of several processes.

        Args:
            works: Functions that compute the entries, by name.
            on_progress: Called before any work with the number of finished entries and `None`. Then called after each
                computed entry with the number of finished entries and that entry.
            checks: Checks by name, each called with an entry from the store before it is used.
        """
        entries = self.finished(works, checks)
        on_progress(len(entries), None)
        for name in [name for name in works if name not in entries]:
            entries[name] = works[name]()
            self.keep(name, entries[name])
            on_progress(len(entries), entries[name])
        return {name: entries[name] for name in works}


class _NothingKept(Store):
    """A store that keeps nothing, so that work is done each time."""

    def find(self, name: str, check: Check | None = None) -> Entry | None:
        return None

    def keep(self, name: str, entry: Entry) -> None:
        """Discard the entry."""

    def within(self, prefix: str) -> "Store":
        return self


NOTHING_KEPT: Store = _NothingKept()


@dataclass(frozen=True)
class MemoryStore(Store):
    """A store in memory, for work that starts over in the same process.

    Attributes:
        found: Entries by name.
        prefix: The beginning of the names of this store's entries.
    """

    found: dict[str, Entry] = field(default_factory=dict)
    prefix: str = ""

    def find(self, name: str, check: Check | None = None) -> Entry | None:
        """See `Store`; entries that this process has kept need no check."""
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
    """A store in a run's folder, see `open_run`.

    Attributes:
        folder: The folder.
        prefix: The beginning of the names of this store's entries.
    """

    folder: Path
    prefix: str = ""

    def within(self, prefix: str) -> "RunStore":
        """See `Store`."""
        return RunStore(self.folder, f"{self.prefix}{prefix}.")

    def _paths(self, name: str) -> tuple[Path, Path]:
        name = self.prefix + name
        if not _NAME.fullmatch(name):
            raise ValueError(f"entry {name!r}: expected lower-case letters and digits, joined by - or .")
        entries = self.folder / ENTRIES
        return entries / f"{name}.json", entries / f"{name}.safetensors"

    def find(self, name: str, check: Check | None = None) -> Entry | None:
        """See `Store`; a damaged entry causes a warning."""
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
                f"{str(values)!r} is damaged ({error}): this entry is computed again.",
                DamagedEntryWarning,
                stacklevel=2,
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
    """An entry as its JSON file holds it.

    Attributes:
        name: The name of the entry, with its store's prefix.
        values: Its values.
        tensors: The SHA-256 of its tensor file; `None` if it has no tensors.
    """

    name: str
    values: Any
    tensors: str | None


@dataclass(frozen=True)
class _Kept:
    """The content of an entry's JSON file.

    Attributes:
        entry: The entry.
        sha256: The SHA-256 of the entry as JSON with sorted keys.
    """

    entry: _Entry
    sha256: str


def require_alike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors whose names, shapes or dtypes are not the expected ones.

    Args:
        found: The tensors of an entry.
        expected: Tensors of the expected names, shapes and dtypes; their values do not matter.

    Raises:
        ValueError: If the tensors differ in that, or one of those found holds NaN or infinity.
    """
    if differing := sorted(found.keys() ^ expected.keys()):
        raise ValueError(f"its tensors differ from the expected ones: {_shown(differing[0])}")
    for name, tensor in found.items():
        of_found, of_expected = ((x.dtype, tuple(x.shape)) for x in (tensor, expected[name]))
        if of_found != of_expected:
            raise ValueError(
                f"tensor {name} is {of_found[0]} {of_found[1]}: expected {of_expected[0]} {of_expected[1]}"
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"tensor {name} is not finite")


@contextmanager
def open_run(folder: str | Path | None, fingerprint: Mapping[str, Any]) -> Iterator[Store]:
    """Yield the store of a run, locked until the end of the `with` block.

    Args:
        folder: The run's folder, created if missing. It stays the same if the working directory changes. `None` keeps
            nothing.
        fingerprint: Everything that the result depends on, as plain values for JSON.

    Raises:
        RunStoreError: If the folder is a link, cannot be written, or holds something else or a run with another
            fingerprint; if another process works on it.
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
    """Delete what `open_run` made in a run's folder, and the folder itself if nothing else is left in it.

    A folder that is in use, or that holds no run, is left as it is, with a warning.
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
    """Delete a run's folder while its lock is held, see `delete_run`.

    Args:
        folder: The folder.
        began: Whether a run had begun there before the lock was taken.
    """
    if kind_of(folder / RUN_FILE) is not None:
        if not _is_run(_read_run(folder)):
            raise _foreign(folder, RUN_FILE)
        for path in (*_regular_files(folder / ENTRIES, _ENTRY_FILE), *_regular_files(folder / ENTRIES, _UNFINISHED)):
            path.unlink()
        with suppress(OSError):  # it holds someone else's file, or is no folder
            (folder / ENTRIES).rmdir()
        (folder / RUN_FILE).unlink()
    for path in _regular_files(folder, _UNFINISHED) if began else ():
        path.unlink()
    (folder / LOCK_FILE).unlink()
    with suppress(OSError):
        folder.rmdir()


def digest_model(model: nn.Module, config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a model's `config.json`, its parameters and all its buffers, including unsaved ones."""
    total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(_bytes(tensor))
    return total.hexdigest()


def digest_images(images: Tensor) -> str:
    """Return the SHA-256 of images."""
    total = hashlib.sha256(f"{images.dtype} {tuple(images.shape)}".encode())
    total.update(_bytes(images))
    return total.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, without a copy if it is on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _load(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file.

    Raises:
        ValueError: If the file holds something else.
    """
    try:
        return load_file(path)
    except (SafetensorError, KeyError, AttributeError, RuntimeError) as error:  # a dtype that torch does not have
        raise ValueError(f"its tensors cannot be read: {error}") from error


def _replace(path: Path, write: Callable[[Path], Any]) -> str:
    """Write a file completely or not at all, and return its SHA-256."""
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
    """Return the regular files in a folder whose names match. A path that is no folder, such as a link, has none."""
    if kind_of(folder) != "a folder":
        return []
    return [path for path in folder.iterdir() if names.fullmatch(path.name) and kind_of(path) == "a regular file"]


def _require_folder(folder: Path) -> None:
    """Refuse a system without file locks, and a path that is no folder.

    Raises:
        RunStoreError: If either is the case.
    """
    if fcntl is None:
        raise RunStoreError(f"run_dir={str(folder)!r}: this system has no file locks; leave run_dir out.")
    try:
        kind = kind_of(folder)
    except (OSError, ValueError) as error:
        raise _unwritable(folder, error) from error
    if kind not in (None, "a folder"):
        better = "the folder that it leads to" if kind == "a link" else "a folder that is empty or does not exist"
        raise RunStoreError(f"run_dir={str(folder)!r} is {kind}, not a folder: name {better}.")


def _require_own(folder: Path) -> None:
    """Refuse a folder that holds files of no run, or, for example, a link in place of a run's file.

    Raises:
        RunStoreError: If it does.
        OSError: If the folder cannot be read.
    """
    foreign = [*_foreign_in(folder, re.compile(rf"{re.escape(RUN_FILE)}|{LOCK_FILE}"), (ENTRIES,))]
    if not foreign and kind_of(folder / ENTRIES) is not None:
        foreign = [f"{ENTRIES}/{what}" for what in _foreign_in(folder / ENTRIES, _ENTRY_FILE)]
    if foreign:
        raise _foreign(folder, ", ".join(foreign[:3]))
    if not _began(folder):
        for parent in (folder, folder / ENTRIES):
            for path in _regular_files(parent, _UNFINISHED):
                raise _foreign(folder, str(path.relative_to(folder)))


def _foreign_in(folder: Path, files: re.Pattern[str], folders: Sequence[str] = ()) -> Iterator[str]:
    """Yield, in words, what lies in a run's folder and has no name or kind that a run creates there."""
    for path in sorted(folder.iterdir()):
        kind = kind_of(path)
        if path.name in folders:
            expected = "a folder"
        elif files.fullmatch(path.name) or _UNFINISHED.fullmatch(path.name):
            expected = "a regular file"
        else:
            yield path.name
            continue
        if kind not in (None, expected):  # `None` if it was deleted just now
            yield f"{path.name} is {kind}"


def _began(folder: Path) -> bool:
    """Return whether a run began in a folder, according to the `run.json` or the lock that it left there.

    An empty lock proves nothing, because any file of that name may be empty.
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
    """Delete the drafts of a killed process, and check that the folder can be written.

    Raises:
        OSError: If it cannot.
    """
    for path in (*_regular_files(folder, _UNFINISHED), *_regular_files(folder / ENTRIES, _UNFINISHED)):
        path.unlink()
    probe_folder(folder / ENTRIES if (folder / ENTRIES).exists() else folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a run's lock, which is released when its process dies.

    Raises:
        RunStoreError: If another process holds the lock, or the file is no lock of a run; it is then left as it is.
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
    """Open a lock without changing its content, and create it if missing.

    Raises:
        OSError: If it cannot be opened, or is no regular file.
    """
    kind = kind_of(path)
    if kind in (None, "a regular file"):  # only opening a device, for example, may have an effect
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "r+b", buffering=0)
        os.close(descriptor)
        kind = "no regular file"
    raise OSError(f"{str(path)!r} is {kind}")


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Return whether a path still names an open file, rather than nothing or another file."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _is_one_name(file: BinaryIO) -> bool:
    """Return whether an open file has only one hard link; with a second one it may be someone else's file."""
    return os.fstat(file.fileno()).st_nlink == 1


def _holder(file: BinaryIO) -> str | None:
    """Return the process that a lock names, which is only for messages; `None` if the file holds something else."""
    file.seek(0)
    found = _HOLDER.fullmatch(file.read(1000).decode(errors="replace"))
    return found and found.group().strip()


def _read_run(folder: Path) -> dict[str, Any]:
    """Return the content of a run's `run.json`.

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
    """Return whether a run wrote the content of a `run.json`."""
    return found.get("format") == FORMAT and isinstance(found.get("settings"), dict)


def _check_fingerprint(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Refuse a folder that holds another run, and write this run's fingerprint to a new one.

    Raises:
        RunStoreError: If the folder holds another run, or cannot be read or written.
    """
    path = folder / RUN_FILE
    # As read back from a file, in which tuples are lists.
    expected = json.loads(json.dumps({"format": FORMAT, **fingerprint}))
    entries = bool(_regular_files(folder / ENTRIES, _ENTRY_FILE))

    def note() -> None:
        _replace(path, lambda draft: draft.write_text(json.dumps(expected, indent=2) + "\n"))

    if kind_of(path) is None:
        if entries:
            raise RunStoreError(f"{str(folder)!r} has entries but no {RUN_FILE}: delete it, or name another folder.")
        note()
        return
    found = run_of_earlier_versions(_read_run(folder))
    differing = list(differences(found, expected))
    if differing and _is_run(found) and found.keys() == expected.keys() and not entries:
        note()  # the other run finished nothing, for example because it was refused
    elif differing:
        raise RunStoreError(
            f"run_dir={str(folder)!r} holds another run: {'; '.join(differing[:3])}. Name another folder, or "
            "delete that one."
        )


def differences(found: Any, expected: Any, name: str = "") -> Iterator[str]:
    """Yield, in words, where plain values for JSON differ from the expected ones."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() | expected.keys()):
            yield from differences(found.get(key), expected.get(key), f"{name}.{key}" if name else key)
    elif found != expected and not (found != found and expected != expected):  # NaN equals NaN here
        yield f"{name} was {_shown(found)} there and is {_shown(expected)} here"


def _shown(value: Any) -> str:
    """Return a short representation of a file's value for an error message."""
    return _REPR.repr(value)


_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxlong = 30


def require_one_of(candidates: Sequence[float], entry: Entry) -> None:
    """Refuse an entry that does not hold one of the candidate numbers.

    Raises:
        TypeError, ValueError: If it does not.
    """
    if from_plain(float, entry.values) not in candidates:
        raise ValueError(f"it holds {entry.values!r}: expected one of {', '.join(map(str, candidates))}")
