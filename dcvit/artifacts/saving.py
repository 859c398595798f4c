"""Output that is written whole or not at all, and that a full disk does not cost.

A folder is written beside its place and takes its name in one rename: whoever looks finds the old or the new, and a
process that is killed leaves the old. Three folders cannot give their names to others: a mount point, the current
folder, and one whose parent cannot be written. Their files are moved out and the new ones in, one by one; a process
that is killed in between leaves a part of the old or of the new, which does not load.
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
    """Refuse a folder that takes no file, or that cannot be made, by making a file in it or in the nearest above it.

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
    """Write a folder that in the end takes its place with all that it holds, or leaves what was there as it was.

    All that the place holds is deleted; who calls this has looked at it. A folder that is there keeps its
    permissions; it and the files in it get its owner, where the process may.

    Args:
        folder: Where; of a link to a folder, the folder that it is_main to.
        first: The file that is there whenever anything is, even where files are moved one by one.
        last: The file that is there only when everything is.

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
    """Write a file of text whole, or leave what was there as it was.

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
    """Write a new file of text.

    Raises:
        OSError: If that fails.
    """
    with create(path) as file:
        file.write(well_formed(text).encode())


def or_elsewhere(save: Callable[[Path], _Saved], path: str | Path) -> _Saved:
    """Save what took long to compute; where its place is gone or full, to the temporary or the current folder.

    Args:
        save: Saves it to a path.
        path: Where it should be.

    Returns:
        What `save` does.

    Raises:
        SaveFolderError: If it cannot be saved there; the message names where it is instead.
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
    """Save to a folder of another disk, if there is one with room; where."""
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
    """Whether a folder cannot give its name to another one."""
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
    """Give a draft the name of a folder in one rename; whether that was possible."""
    if folder.is_dir():
        take_after(draft, os.stat(folder))
        if any(folder.iterdir()):
            with suppress(OSError):  # of a folder that is another user's, for example
                return exchange(draft, folder)
            return False
    os.replace(draft, folder)
    return True


def _move_entries(draft: Path, folder: Path, first: str, last: str) -> None:
    """Move out what a folder holds and in what a draft holds, one by one: all of it or, on an error, nothing."""

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
    """Let a folder and all in it outlive a loss of power."""
    for parent, _, names in os.walk(folder):
        for path in (*(Path(parent, name) for name in names), Path(parent)):
            sync(path)


def _reason(error: OSError | SafetensorError) -> str:
    """What the system says, without the name of the draft that it says it of."""
    return getattr(error, "strerror", None) or str(error)
