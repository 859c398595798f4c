"""Tensors that are appended and read part by part, and move to disk once they are large.

A compression on the CPU processes its views block by block, one batch at a time. Meanwhile it keeps the views, the
tokens before a block and the rows of every block. They take several times a large model's size.
"""

import errno
import math
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from dcvit.errors import DcvitError

__all__ = ["IN_MEMORY", "SpilledBuffer"]

IN_MEMORY = 16 << 20
"""Bytes of a buffer on the CPU that stay in memory."""

FILES = hasattr(os, "preadv")  # not on Windows


class SpilledBuffer:
    """Parts `[·, …]` of a tensor in order. On the CPU they are written to a file once they exceed `IN_MEMORY`.

    The file is in the system's folder for temporary files (`TMPDIR`), has no name, and is deleted with the buffer.
    """

    def __init__(self, parts: Iterable[Tensor] = ()) -> None:
        self._parts: list[Tensor] = []
        self._file = -1
        self._length = self._on_disk = self._held_bytes = 0
        self._like = torch.empty(0)
        for part in parts:
            self.append(part)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ([self[:]],)

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)

    def append(self, part: Tensor) -> None:
        """Add a part at the end. Its dtype, device and all dimensions but the first are those of the other parts.

        Raises:
            ValueError: If they are not.
            DcvitError: If the disk cannot be written, or is full.
        """
        if self._length and (part.shape[1:], part.dtype, part.device) != (
            self._like.shape[1:], self._like.dtype, self._like.device
        ):  # fmt: skip
            raise ValueError(
                f"A part is {part.dtype} {list(part.shape)}, the others are like {list(self._like.shape)}."
            )
        if not self._length:
            self._like = part[:0].detach().clone()
        self._length += len(part)
        self._parts.append(part.detach())
        self._held_bytes += part.nbytes
        if FILES and part.device.type == "cpu" and self._held_bytes > IN_MEMORY:
            self._write()

    def __len__(self) -> int:
        return self._length

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all parts together."""
        return (self._length, *self._like.shape[1:])

    @property
    def device(self) -> torch.device:
        """The device of the tensors that are read."""
        return self._like.device

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Return the rows of a slice, of an index, or of a mask `[R]`."""
        if not self._on_disk:
            return self._in_memory()[rows]
        if isinstance(rows, slice):
            first, stop, step = rows.indices(self._length)
            if step != 1:
                raise ValueError(f"step {step}: expected 1.")
            return self._between(first, max(first, stop))
        index = (rows.nonzero().flatten() if rows.dtype == torch.bool else rows).tolist()
        found = [self._between(i, i + 1) for i in index]
        return torch.cat(found) if found else self._like

    def whole(self) -> Tensor:
        """Return all rows as one tensor. A file is memory-mapped: the system loads what is used, and may drop it."""
        if not self._on_disk:
            return self._in_memory()
        if self._parts:
            self._write()
        elements = math.prod(self.shape)
        memory = mmap.mmap(self._file, elements * self._like.element_size(), flags=mmap.MAP_PRIVATE)
        return torch.frombuffer(memory, dtype=self._like.dtype, count=elements).view(self.shape)

    def split(self, count: int) -> Iterator[Tensor]:
        """Yield all rows, `count` at a time."""
        for first in range(0, self._length, count):
            yield self[first : first + count]

    def _in_memory(self) -> Tensor:
        if len(self._parts) != 1:
            self._parts = [torch.cat(self._parts) if self._parts else self._like]
        return self._parts[0]

    def _between(self, first: int, stop: int) -> Tensor:
        written = min(stop, self._on_disk)
        found = [self._read(first, written)] if first < written else []
        at = self._on_disk
        for part in self._parts:
            begin, end = max(first - at, 0), min(stop - at, len(part))
            if begin < end:
                found.append(part[begin:end])
            at += len(part)
        return torch.cat(found) if found else self._like

    def _write(self) -> None:
        try:
            if self._file < 0:
                self._file, name = tempfile.mkstemp(prefix="dcvit-")
                os.unlink(name)
            for part in self._parts:
                left = part.contiguous().flatten().view(torch.uint8).numpy().data
                while left:
                    left = left[os.write(self._file, left) :]
                self._on_disk += len(part)
        except OSError as error:
            step = "make room, or set TMPDIR to a folder on a larger disk that can be written"
            if error.errno in (errno.EMFILE, errno.ENFILE):
                step = "allow more open files (ulimit -n)"
            raise DcvitError(
                f"{tempfile.tempdir or os.getenv('TMPDIR')!r} cannot hold the temporary data of a compression "
                f"({error}): {step}."
            ) from error
        self._parts, self._held_bytes = [], 0

    def _read(self, first: int, stop: int) -> Tensor:
        found = self._like.new_empty(stop - first, *self._like.shape[1:])
        left = found.flatten().view(torch.uint8).numpy().data
        at = first * (len(left) // (stop - first))
        while left:
            count = os.preadv(self._file, [left], at)
            if count == 0:
                raise RuntimeError("A temporary file ended early: something else changed it.")
            left, at = left[count:], at + count
        return found
