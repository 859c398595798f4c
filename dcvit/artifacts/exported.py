"""Recognition of files that dcvit exported, by their content, so that a user's file of the same name is never replaced.

The content is read without onnx or torch.
"""

import re
import zipfile
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path

from dcvit.runtime.files import open_regular

__all__ = ["is_export", "weights_of"]

MOST_ONNX_BYTES = 2 << 30
"""The size limit of a protocol buffer."""

_GRAPH, _METADATA, _INITIALIZER, _EXTERNAL_DATA, _KEY, _VALUE = 7, 14, 5, 13, 1, 2
"""Field numbers in onnx.proto."""


def is_export(path: Path) -> bool:
    """Return whether `export_model` wrote a file, according to its metadata."""
    return _read(path) is not None


def weights_of(path: Path) -> set[str]:
    """Return the names of the weight files that belong to an export; an empty set if dcvit did not write it."""
    return _read(path) or set()


def _read(path: Path) -> set[str] | None:
    """Return the names of the weight files that an export refers to; `None` if the file is not an export."""
    try:
        with open_regular(path, most=None if path.suffix == ".pt2" else MOST_ONNX_BYTES) as file:
            if path.suffix == ".pt2":
                with zipfile.ZipFile(file) as archive:
                    return set() if any(name.endswith("/dcvit.json") for name in archive.namelist()) else None
            with mmap(file.fileno(), 0, access=ACCESS_READ) as model:
                return _read_onnx(model, path)
    except Exception:  # a parser may raise anything for a file in another format
        return None


def _read_onnx(model: mmap, path: Path) -> set[str] | None:
    if b"dcvit" not in (key for key, _ in _entries(model, range(len(model)), _METADATA)):
        return None
    return {
        name
        for graph in _fields(model, range(len(model)), _GRAPH)
        for tensor in _fields(model, graph, _INITIALIZER)
        for key, value in _entries(model, tensor, _EXTERNAL_DATA)
        if key == b"location" and _is_weights_name(name := value.decode(), path)
    }


def _is_weights_name(name: str, path: Path) -> bool:
    """Return whether a name is that of an export's weight file, as this or an earlier version chose it."""
    stem, suffix = re.escape(path.stem), re.escape(path.suffix)
    return re.fullmatch(rf"{stem}(-[0-9a-f]{{16}})?{suffix}\.data", name) is not None


def _entries(data: mmap, message: range, number: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a field that is a list of pairs."""
    for entry in _fields(data, message, number):
        key, value = (b"".join(data[at.start : at.stop] for at in _fields(data, entry, n)) for n in (_KEY, _VALUE))
        yield key, value


def _fields(data: mmap, message: range, number: int) -> Iterator[range]:
    """Yield the position of each value of one field in a protocol buffer message."""
    at = message.start
    while at < message.stop:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            _, end = _varint(data, at)
        elif kind == 2:
            length, at = _varint(data, at)
            end = at + length
        else:
            end = at + {1: 8, 5: 4}[kind]
        if end > message.stop:
            raise ValueError("a field ends after its message")
        if tag >> 3 == number:
            yield range(at, end)
        at = end


def _varint(data: mmap, at: int) -> tuple[int, int]:
    """Return a varint and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number has more than ten bytes")
