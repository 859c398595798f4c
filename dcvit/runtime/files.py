"""Safe reading and writing of files that strangers may have made, or that may be in the way.

Only a regular file of bounded size is read, and no link to one. A file is written completely or not at all. It replaces
no link. It gets the permissions of the caller's umask, or the permissions and the owner of the file that it replaces.
The functions raise `OSError` or `ValueError`, and their callers say what that means for the user.
"""

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "DRAFT_MARK",
    "MOST_JSON_BYTES",
    "UnusableFileError",
    "create",
    "digest",
    "draft_folder",
    "exchange",
    "file_mode",
    "is_draft",
    "kind_of",
    "open_regular",
    "own_file",
    "parse_json",
    "probe_folder",
    "read_table",
    "read_text",
    "remove_abandoned_drafts",
    "replacing",
    "sync",
    "take_after",
    "take_owner",
    "well_formed",
]

MOST_JSON_BYTES = 32 << 20
"""Largest JSON file that is read, in bytes: ten times the largest `result.json`. Parsed it may take 25 times that."""

DRAFT_MARK = ".dcvit-draft-"
"""Part of the name of a file or folder while it is written: `.NAME.dcvit-draft-` and 16 hexadecimal digits."""

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # else opening a FIFO waits for a writer
_CLOSE_ON_EXEC = getattr(os, "O_CLOEXEC", 0)
_BINARY = getattr(os, "O_BINARY", 0)

_KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class UnusableFileError(OSError):
    """The error for a path that does not lead to a regular file of the expected size."""

    def __str__(self) -> str:
        return str(self.strerror)


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """Return what lies at a path, without following a link: `"a regular file"`, `"a link"`, ...; `None` for nothing."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    return next((name for test, name in _KINDS if test(mode)), "a regular file")


def open_regular(path: str | os.PathLike[str], *, most: int | None = None) -> BinaryIO:
    """Open a regular file for reading.

    Args:
        path: The file. Its last part must not be a link.
        most: The largest size in bytes that is accepted; any size by default.

    Raises:
        UnusableFileError: If the path is something else, or the file is larger.
        OSError: If the file cannot be opened.
    """
    if (kind := kind_of(path)) not in (None, "a regular file"):  # only opening some devices has an effect
        raise _unusable(path, f"is {kind}, not a regular file")
    descriptor = os.open(path, os.O_RDONLY | _NO_FOLLOW | _NO_WAIT | _CLOSE_ON_EXEC | _BINARY)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise _unusable(path, f"is {kind_of(path)}, not a regular file")
        if most is not None and found.st_size > most:
            raise _unusable(path, f"has {found.st_size:,} bytes, more than the {most:,} that are read")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_text(path: str | os.PathLike[str], *, most: int = MOST_JSON_BYTES) -> str:
    """Read a regular file of UTF-8 text.

    Raises:
        UnusableFileError: If the path is something else, or the file has more than `most` bytes.
        OSError: If the file cannot be read.
        UnicodeDecodeError: If it is not UTF-8.
    """
    with open_regular(path, most=most) as file:
        content = file.read(most + 1)  # it may grow meanwhile
    if len(content) > most:
        raise _unusable(path, f"has more than the {most:,} bytes that are read")
    return content.decode("utf-8")


def parse_json(text: str) -> Any:
    """Parse JSON text from an untrusted source.

    Raises:
        ValueError: If it is not JSON, is nested too deeply, or holds a number of more than 400 digits.
    """
    try:
        return json.loads(text, parse_int=_bounded_int)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_table(path: str | os.PathLike[str], *, most: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """Read a regular file that holds a JSON object.

    Raises:
        OSError: See `read_text`.
        ValueError: If the file holds no JSON object.
    """
    values = parse_json(read_text(path, most=most))
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__} instead of a table")
    return values


def digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a regular file, in hexadecimal.

    Raises:
        OSError: See `open_regular`.
    """
    total = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


def well_formed(text: str) -> str:
    """Return text that UTF-8 can encode. Lone surrogates, as in undecodable file names, become escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def own_file(folder: str | os.PathLike[str], name: str) -> Path:
    """Return the path of a saved folder's file: in it, or in the `blobs` of the hub cache whose snapshot it is.

    Raises:
        UnusableFileError: If it is a link to elsewhere, or to nothing.
    """
    path, home = Path(folder) / name, Path(folder).resolve()
    if kind_of(path) != "a link":
        return path
    target = Path(os.path.realpath(path))  # which also returns for a loop of links
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if target.parent not in homes:
        raise UnusableFileError(errno.EINVAL, f"{os.fspath(path)!r} is a link to outside of the folder")
    if not target.exists():
        raise UnusableFileError(errno.EINVAL, f"{os.fspath(path)!r} is a link that leads nowhere")
    return target


def create(path: str | os.PathLike[str]) -> BinaryIO:
    """Create a new file for writing, with the permissions of the caller's umask.

    Raises:
        FileExistsError: If the name is in use, also by a link that leads nowhere.
        OSError: If the file cannot be created.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _CLOSE_ON_EXEC | _BINARY
    return os.fdopen(os.open(path, flags, 0o666), "wb")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a draft that replaces a file in one rename at the end. On an error the file stays as it was.

    Yields:
        The path of a new, empty file beside the other, to write to or to replace.

    Raises:
        UnusableFileError: If the name belongs to something other than a regular file.
        OSError: If the file cannot be written.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind not in (None, "a regular file"):
        raise _unusable(path, f"is {kind}, not a regular file")
    draft = _draft_path(path)
    create(draft).close()
    found = os.stat(path if kind else draft)
    try:
        yield draft
        take_after(draft, found)
        sync(draft)
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
    sync(path.parent)


@contextmanager
def draft_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new hidden folder beside another one, and delete at the end what still has its name.

    The folder is locked while it is written. So `remove_abandoned_drafts` can tell it from one that a killed process
    left behind.

    Raises:
        OSError: If the folder cannot be made.
    """
    draft = _draft_path(Path(folder))
    os.mkdir(draft)
    lock = _locked(draft)
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def is_draft(name: str) -> bool:
    """Return whether a name is one that `replacing` or `draft_folder` would choose."""
    return re.fullmatch(rf"\..*{re.escape(DRAFT_MARK)}[0-9a-f]{{16}}", name, re.DOTALL) is not None


def remove_abandoned_drafts(path: str | os.PathLike[str]) -> None:
    """Delete the drafts that killed processes left beside a file or folder.

    A folder's lock shows whether another process is still writing it. Files have no lock, so only those older than an
    hour are deleted.
    """
    path = Path(path)
    pattern = re.compile(re.escape(_draft_prefix(path)) + "[0-9a-f]{16}")
    with suppress(OSError):
        for entry in list(os.scandir(path.parent)):
            if not pattern.fullmatch(entry.name):
                continue
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    lock = _locked(Path(entry.path))
                    if lock is not None:
                        shutil.rmtree(entry.path, ignore_errors=True)
                        os.close(lock)
                elif entry.is_file(follow_symlinks=False) and _age(entry.path) > 3600:
                    os.unlink(entry.path)


def exchange(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Exchange the names of two files or folders of one file system, atomically.

    Returns:
        Whether they were exchanged; `False` if the system or the file system cannot do it.

    Raises:
        OSError: If one is missing or, for example, a mount point, or if their folders cannot be written.
    """
    names = os.fsencode(one), os.fsencode(other)
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        failed = libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    elif sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(*names, _RENAME_SWAP)
    else:
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), os.fspath(one), None, os.fspath(other))


_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2  # fcntl.h, linux/fs.h, sys/stdio.h of macOS


def probe_folder(folder: str | os.PathLike[str]) -> None:
    """Check that a file can be made in a folder, by making one and deleting it.

    Raises:
        OSError: If it cannot. The permissions of a folder do not show this on every file system.
    """
    probe = _draft_path(Path(folder) / "probe")
    with create(probe) as file:
        try:
            file.write(b"\0")
            file.flush()
        finally:
            os.unlink(probe)


def file_mode(folder: str | os.PathLike[str]) -> int:
    """Return the permissions that a new file in a folder gets from the caller's umask, without changing the umask."""
    probe = _draft_path(Path(folder) / "mode")
    with create(probe) as file:
        os.unlink(probe)
        return stat.S_IMODE(os.fstat(file.fileno()).st_mode)


def take_after(path: str | os.PathLike[str], other: os.stat_result) -> None:
    """Give a file or folder the permissions of another one, and its owner and group as far as the process may.

    Raises:
        OSError: If that fails for a reason other than missing rights.
    """
    take_owner(path, other)
    os.chmod(path, stat.S_IMODE(other.st_mode))  # after the owner, because changing it clears some of them


def take_owner(path: str | os.PathLike[str], other: os.stat_result) -> None:
    """Give a file or folder the owner and group of another one, as far as the process may.

    Raises:
        OSError: If that fails for a reason other than missing rights.
    """
    found = os.stat(path)
    if (found.st_uid, found.st_gid) == (other.st_uid, other.st_gid):  # always so on Windows, which has no chown
        return
    for owner, group in ((-1, other.st_gid), (other.st_uid, -1)):  # the group of a file given away cannot be changed
        try:
            os.chown(path, owner, group)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EACCES, errno.EINVAL):  # EINVAL: a container lacks that owner
                raise


def sync(path: str | os.PathLike[str]) -> None:
    """Flush a file's content, or a folder's renames, to disk, so that they survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY | _CLOSE_ON_EXEC | _NO_FOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _draft_prefix(path: Path) -> str:
    return f".{path.name[:100]}{DRAFT_MARK}"  # a name has at most 255 bytes: two per character on average


def _draft_path(path: Path) -> Path:
    return path.parent / f"{_draft_prefix(path)}{secrets.token_hex(8)}"


def _locked(folder: Path) -> int | None:
    """Lock a folder, and return its descriptor; `None` if another process holds the lock or the system has none."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY | _CLOSE_ON_EXEC | _NO_FOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _age(path: str) -> float:
    return time.time() - os.lstat(path).st_mtime


def _unusable(path: str | os.PathLike[str], problem: str) -> UnusableFileError:
    return UnusableFileError(errno.EINVAL, f"{os.fspath(path)!r} {problem}")


def _bounded_int(digits: str) -> int:
    if len(digits) > 400:  # no float is longer, and Python refuses 4301 or more, in ways that differ by version
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)
