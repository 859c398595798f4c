"""The context that all steps of a run share."""

from dataclasses import dataclass, field, replace

import torch

from dcvit.ops import Impl
from dcvit.runtime.checkpoint import NOTHING_KEPT, Store
from dcvit.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from dcvit.runtime.progress import Progress, Timer, silent
from dcvit.runtime.seeding import derive_seed, generator

__all__ = ["STANDALONE", "RunContext"]


@dataclass(frozen=True)
class RunContext:
    """Seed, processes and services of a run, passed to all of its steps.

    Attributes:
        seed: Seed of everything random.
        impl: Implementation of the ops, see `dcvit.ops`.
        processes: The processes that share the work, see `dcvit.runtime.distributed`.
        progress: Callback that is called after each step of a stage, see `dcvit.runtime.progress`.
        store: Store of finished work, see `dcvit.runtime.checkpoint`.
        timer: Timer of the stages.
    """

    seed: int = 0
    impl: Impl = "auto"
    processes: ProcessGroup = SINGLE_PROCESS
    progress: Progress = silent
    store: Store = NOTHING_KEPT
    timer: Timer = field(default_factory=Timer)

    def derived(self, *purpose: str | int) -> "RunContext":
        """Return a copy with a seed derived for one purpose, see `derive_seed`."""
        return replace(self, seed=derive_seed(self.seed, *purpose))

    def within(self, prefix: str) -> "RunContext":
        """Return a copy whose store prepends a prefix to the names of entries."""
        return replace(self, store=self.store.within(prefix))

    def single_process(self) -> "RunContext":
        """Return a copy for work that this process does by itself."""
        return replace(self, processes=SINGLE_PROCESS)

    def generator(self, *purpose: str | int) -> torch.Generator:
        """Return a new generator of random numbers for one purpose, see `dcvit.runtime.seeding.generator`."""
        return generator(self.seed, *purpose)


STANDALONE = RunContext()
"""The default context of a step that is called on its own: seed 0, one process, no progress reports, no store."""
