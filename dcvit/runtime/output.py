"""What is printed never ends a run: characters that a terminal lacks, and streams that are closed or full."""

import os
from contextlib import suppress
from typing import Any, TextIO

__all__ = ["Lenient"]


class Lenient:
    """A text stream that takes whatever is written, and remembers why it could not be passed on.

    Characters that the stream's encoding lacks come as escapes, such as `\\u2026`.

    Args:
        stream: What is written to; `None`, as Python has it for a closed descriptor, takes nothing.

    Attributes:
        failure: Why something could not be written; empty if nothing was lost.
        unread: Whether that is because the reader of a pipe has left, as `head` does when it has enough.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.failure = ""
        self.unread = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, or lose it."""
        if self._stream is None:
            self.failure = "it is closed"
        elif not self.failure:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            try:
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as error:  # the latter of a stream that Python closed
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Pass on what was written, or lose it."""
        if self._stream is not None and not self.failure:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failure, self.unread = str(error), isinstance(error, BrokenPipeError)

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream is not None and not getattr(self._stream, "closed", False) and self._stream.isatty()

    def abandon(self) -> None:
        """After a failure, let what is held for the stream go nowhere, so that Python's exit does not fail on it."""
        if self._stream is not None and self.failure:
            with suppress(OSError, ValueError):  # it has no descriptor
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
