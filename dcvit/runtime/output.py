"""Output that never ends a run, even if a terminal lacks characters or a stream is closed or full."""

import os
from contextlib import suppress
from typing import Any, TextIO

__all__ = ["Lenient"]


class Lenient:
    """A text stream that accepts any text, and remembers why it could not pass it on.

    Characters that the stream's encoding lacks are written as escapes, such as `\\u2026`.

    Args:
        stream: The stream to write to. `None`, which Python uses for a closed descriptor, accepts nothing.

    Attributes:
        failure: Why something could not be written; empty if nothing was lost.
        unread: Whether the reason is that the reader of a pipe has left, as `head` does when it has enough.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.failure = ""
        self.unread = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text; it is lost if the stream has failed."""
        if self._stream is None:
            self.failure = "it is closed"
        elif not self.failure:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            try:
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as error:  # ValueError if Python closed the stream
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, unless it has failed."""
        if self._stream is not None and not self.failure:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failure, self.unread = str(error), isinstance(error, BrokenPipeError)

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._stream is not None and not getattr(self._stream, "closed", False) and self._stream.isatty()

    def abandon(self) -> None:
        """Discard the stream's unwritten text after a failure, so that Python's exit does not fail on it."""
        if self._stream is not None and self.failure:
            with suppress(OSError, ValueError):  # the stream has no descriptor
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
