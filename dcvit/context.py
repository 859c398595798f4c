"""What the steps of a run share beside the values that they work on."""

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
    """How a run is carried out: one of these goes through all of its steps.

    Attributes:
        seed: Everything random follows from it.
        impl: The implementation of the ops.
        processes: The processes that share the work, see `dcvit.runtime.distributed`.
        progress: It is called after each step of a stage, see `dcvit.runtime.progress`.
        store: It keeps finished work, see `dcvit.runtime.checkpoint`.
        timer: It takes the time of the stages.
    """

    seed: int = 0
    impl: Impl = "auto"
    processes: ProcessGroup = SINGLE_PROCESS
    progress: Progress = silent
    store: Store = NOTHING_KEPT
    timer: Timer = field(default_factory=Timer)

    def derived(self, *purpose: str | int) -> "RunContext":
        """Return the same with the seed of one purpose, see `derive_seed`."""
        return replace(self, seed=derive_seed(self.seed, *purpose))

    def within(self, prefix: str) -> "RunContext":
        """Return the same with a store of its own for work whose names begin so."""
        return replace(self, store=self.store.within(prefix))

    def single_process(self) -> "RunContext":
        """Return the same for work that this process does by itself."""
        return replace(self, processes=SINGLE_PROCESS)

    def generator(self, *purpose: str | int) -> torch.Generator:
        """Return a new generator of random numbers for one purpose, see `dcvit.runtime.seeding.generator`."""
        return generator(self.seed, *purpose)


STANDALONE = RunContext()
"""The context of a step that is called for itself: seed 0, one process, nothing shown or kept."""
