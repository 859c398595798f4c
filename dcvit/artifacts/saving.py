"""Atomic output: a folder or file is replaced completely or not at all, and a full disk does not lose the results.

A folder is written as a draft beside its destination and then renamed in one step. Readers see either the old or the
new folder, and a process that is killed leaves the old one. Three kinds of folders cannot be renamed: a mount point,
the current folder, and a folder whose parent cannot be written. There, the old files are moved out and the new ones
moved in, one by one. A process that is killed in between leaves a part of the old or of the new files, which does not
load.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from dcvit.errors import SaveFolderError
from dcvit.runtime.files import (
    create,
    draft_folder,
    exchange,
    is_draft,
    kind_of,
    probe_folder,
    remove_abandoned_drafts,
    replacing,
    sync,
    take_after,
    take_owner,
    well_formed,
)

__all__ = ["or_elsewhere", "replace_file", "replacing_folder", "require_writable", "write_text"]

_Saved = TypeVar("_Saved")


def require_writable(folder: str | Path) -> None:
    """Refuse a folder that cannot be written or created. This creates a file in it or in the nearest existing parent.

    Raises:
        SaveFolderError: If that fails.
    """
    folder = Path(os.path.abspath(folder))
    existing = next(path for path in (folder, *folder.parents) if kind_of(path) is not None)
    try:
        probe_folder(existing)
    except OSError as error:
        raise SaveFolderError(f"{str(folder)!r} cannot be written ({_reason(error)}): name another folder.") from error


@contextmanager
def replacing_folder(folder: str | Path, *, first: str = "", last: str = "") -> Iterator[Path]:
    """Replace a folder with a new one, or leave the old folder unchanged if an error occurs.

    Everything in the old folder is deleted, so the caller must have checked its contents. The new folder gets the old
    one's permissions; it and the files in it get the old one's owner, if the process may set it.

    Args:
        folder: The folder to replace; a link is followed.
        first: The file that is moved in first and out last where files are moved one by one. It exists whenever any
            other file does.
        last: The file that is moved in last and out first. It exists only when all other files do.

    Yields:
        A new folder to write to.

    Raises:
        SaveFolderError: If something cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        in_place = _keeps_its_place(folder)
        for at in (folder, folder / folder.name):
            remove_abandoned_drafts(at)
        with draft_folder(folder / folder.name if in_place else folder) as draft:
            yield draft
            _sync_all(draft)
            if folder.is_dir():
                for path in draft.rglob("*"):
                    take_owner(path, os.stat(folder))
            if in_place or not _take_name(draft, folder):
                _move_entries(draft, folder, first, last)
            sync(folder if in_place else folder.parent)
    except (OSError, SafetensorError) as error:
        raise SaveFolderError(
            f"{str(folder)!r} cannot be written ({_reason(error)}): make room, or name another folder."
        ) from error


def replace_file(path: str | Path, text: str) -> None:
    """Replace a text file, or leave the old file unchanged if an error occurs.

    Raises:
        SaveFolderError: If it cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned_drafts(path)
        with replacing(path) as draft:
            draft.write_bytes(well_formed(text).encode())
    except OSError as error:
        raise SaveFolderError(
            f"{str(path)!r} cannot be written ({_reason(error)}): make room, or name another file."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a new text file.

    Raises:
        OSError: If that fails.
    """
    with create(path) as file:
        file.write(well_formed(text).encode())


def or_elsewhere(save: Callable[[Path], _Saved], path: str | Path) -> _Saved:
    """Save results that took long to compute; if that fails, save them to the temporary or the current folder.

    Args:
        save: Saves the results to a path.
        path: The path where they should be.

    Returns:
        The return value of `save`.

    Raises:
        SaveFolderError: If they cannot be saved to `path`; the message names the path where they are instead.
    """
    path = Path(path)
    try:
        return save(path)
    except SaveFolderError as error:
        instead = _save_elsewhere(save, path.name or "out")
        if instead is None:
            raise
        raise SaveFolderError(f"{error} What was computed is saved as {str(instead)!r}.") from error


def _save_elsewhere(save: Callable[[Path], object], name: str) -> Path | None:
    """Save to the temporary or the current folder, and return the path; `None` if neither has room."""
    for place in (tempfile.gettempdir, os.getcwd):
        with suppress(OSError, SaveFolderError):
            folder = Path(tempfile.mkdtemp(prefix="dcvit-", dir=place()))
            try:
                save(folder / name)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            return folder / name
    return None


def _keeps_its_place(folder: Path) -> bool:
    """Return whether a folder cannot be replaced by a rename."""
    if not folder.is_dir():
        return False
    with suppress(FileNotFoundError):  # the current folder was deleted
        if Path.cwd().is_relative_to(folder):
            return True
    if folder.is_mount():
        return True
    try:
        probe_folder(folder.parent)
    except OSError:
        return True
    return False


def _take_name(draft: Path, folder: Path) -> bool:
    """Replace a folder with a draft in one rename; return whether that was possible."""
    if folder.is_dir():
        take_after(draft, os.stat(folder))
        if any(folder.iterdir()):
            with suppress(OSError):  # the folder may belong to another user
                return exchange(draft, folder)
            return False
    os.replace(draft, folder)
    return True


def _move_entries(draft: Path, folder: Path, first: str, last: str) -> None:
    """Move a folder's files out and a draft's files in, one by one; undo the moves on an error."""

    def rank(name: str) -> int:
        return (name == last) - (name == first)

    coming = sorted(os.listdir(draft), key=rank)
    leaving = sorted((name for name in os.listdir(folder) if not is_draft(name)), key=rank, reverse=True)
    old = draft / ".old"
    old.mkdir()
    moves = [(folder / name, old / name) for name in leaving] + [(draft / name, folder / name) for name in coming]
    try:
        for source, target in moves:
            os.rename(source, target)
        sync(folder)
    except BaseException:
        for source, target in reversed(moves):
            if kind_of(source) is None and kind_of(target) is not None:
                os.rename(target, source)
        raise


def _sync_all(folder: Path) -> None:
    """Sync a folder and everything in it to disk, so that it survives a power failure."""
    for parent, _, names in os.walk(folder):
        for path in (*(Path(parent, name) for name in names), Path(parent)):
            sync(path)


def _reason(error: OSError | SafetensorError) -> str:
    """Return the system's message without the name of the draft."""
    return getattr(error, "strerror", None) or str(error)
