"""How long work tells how it goes.

The algorithm calls a `Progress`; what is shown is the caller's choice. `silent` shows nothing, `TerminalProgress`
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
"""Called as progress(stage, done, total, loss) after each step of a stage, such as `"probes"`.

Also when a stage begins, so that what its first step takes is known: with `done=0`, or with what an earlier run of the
same has finished. A step that takes longer than others of its stage counts for more than one, so that `done / total` is
about the part of the stage's work that is over. The loss is `None` at first, and always in a stage that has none, such
as timing.
"""


def silent(stage: str, done: int, total: int, loss: float | None) -> None:
    """Show nothing."""


class TerminalProgress:
    """A bar with the loss and the time left on a terminal; else a line when a stage ends or every few seconds.

    Args:
        stream: Where to write, standard error unless given.
        interval: Seconds between two lines of one stage where there is no terminal.
    """

    def __init__(self, stream: TextIO | None = None, interval: float = 10.0) -> None:
        self._given_stream = stream
        self._interval = interval
        self._stage = ""
        self._start = self._last = 0.0
        self._done_before = 0
        self._bar: tqdm[None] | None = None

    @property
    def _stream(self) -> Lenient:
        return Lenient(self._given_stream or sys.stderr)  # a process of its own has one, too

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
        """Take the bar off the screen."""
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
                if torch.cuda.memory_allocated(device):  # else asking it would set it up
                    torch.cuda.synchronize(device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
