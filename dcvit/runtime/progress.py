"""Progress reports of long work.

The algorithm calls a `Progress`, and the caller chooses what is shown. `silent` shows nothing. `TerminalProgress` shows
a live bar on a terminal and plain lines elsewhere.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

import torch
from tqdm import tqdm

from dcvit.runtime.output import Lenient

__all__ = ["Progress", "TerminalProgress", "Timer", "silent"]

Progress = Callable[[str, int, int, float | None], None]
"""A function called as progress(stage, done, total, loss) after each step of a stage, such as `"probes"`.

It is also called when a stage begins, so that the time of the first step is known. `done` is then 0, or the number of
steps that an earlier run has finished. A step that takes longer than others of its stage counts for more than one. So
`done / total` is about the finished part of the stage's work. The loss is `None` at first, and always in a stage that
has none, such as timing.
"""


def silent(stage: str, done: int, total: int, loss: float | None) -> None:
    """Show nothing."""


class TerminalProgress:
    """A bar with the loss and the time left on a terminal; else a line when a stage ends and every few seconds.

    Args:
        stream: Where to write; standard error by default.
        interval: Seconds between two lines of one stage where there is no terminal.
    """

    def __init__(self, stream: TextIO | None = None, interval: float = 10.0) -> None:
        self._custom_stream = stream
        self._interval = interval
        self._stage = ""
        self._start = self._last = 0.0
        self._done_before = 0
        self._bar: tqdm[None] | None = None

    @property
    def _stream(self) -> Lenient:
        return Lenient(self._custom_stream or sys.stderr)  # read late, because a child process has its own

    def __call__(self, stage: str, done: int, total: int, loss: float | None) -> None:
        """See `Progress`."""
        now = time.monotonic()
        shown = "" if loss is None else f"loss {loss:.4g}, "
        if stage != self._stage:
            self.close()
            self._stage, self._start, self._last, self._done_before = stage, now, now, done
            if self._stream.isatty():
                self._bar = tqdm(
                    total=total, initial=done, desc=stage, file=self._stream, leave=False, dynamic_ncols=True
                )
        if self._bar is not None:
            self._bar.set_postfix_str(shown.removesuffix(", "), refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._done_before < done < total and now - self._last >= self._interval:
            self._last = now
            left = (now - self._start) / (done - self._done_before) * (total - done)
            print(f"{stage}: {done}/{total}, {shown}{left:.0f} s left", file=self._stream, flush=True)
        if done >= total:
            self.close()
            print(f"{stage}: {shown}{now - self._start:.1f} s", file=self._stream, flush=True)
            self._stage = ""

    def close(self) -> None:
        """Remove the bar from the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@dataclass
class Timer:
    """Wall-clock seconds of each stage, added up over its runs."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_initialized():
            for device in range(torch.cuda.device_count()):
                if torch.cuda.memory_allocated(device):  # else the call would initialise the device
                    torch.cuda.synchronize(device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
