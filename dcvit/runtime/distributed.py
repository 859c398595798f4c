"""A compression spread over processes that torch's launcher starts, on one machine or several.

    torchrun --nproc-per-unit 4 -m dcvit compress deit_small_patch16_224 --data photos/ --macs 0.75 --out small/

Every process, a rank, is given the same model, images and settings, and ends with the same student:

- Probes are taken from one queue in the launcher's c10d store, so that a fast rank takes more.
- The teacher sees the views once: each rank passes its share of the batches, and the tokens drawn are gathered.
- A block's normal equations are summed over each rank's share of them, then over the ranks.
- Gradient steps on a block, and those of the refinement, split each batch (DistributedDataParallel).
- What all would do alike, such as the proxy set, the first rank does and sends to the others.

Probes come out bit for bit as in one process on equal hardware with as many threads. Sums over ranks are in another
order than in one process, so that weights agree with those of one process up to rounding; two runs of as many ranks
agree bit for bit where all-reduce does (gloo does).

A rank that dies takes its group with it, and torch's launcher starts all again (`--max-restarts`). They go on from the
run's folder (`dcvit.runtime.checkpoint`), to which each rank writes the probes that it has done: it must be one that
all reach.
"""

import base64
import inspect
import json
import os
import pickle
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from dcvit.errors import DcvitError, DistributedError
from dcvit.runtime.checkpoint import NO_CHECKS, NOTHING_KEPT, Check, Entry, RunStore, Store, differences, open_run
from dcvit.runtime.spill import SpilledBuffer

__all__ = ["SINGLE_PROCESS", "ProcessGroup", "launched", "on_devices"]

PATIENCE = timedelta(days=1)
"""How long a rank waits for what another computes. The launcher notices much earlier if one dies."""

# Torch 2.14 has a new name, and warns of the old one.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
OWN_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}
"""Ranks do not tell each other their buffers in every pass: they do not change."""


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of one compression, and which of them this is.

    Attributes:
        rank: From 0; the first is_main.
        size: How many there are.
        queues: The launcher's store, where probes are queued; `None` where there is one process.
    """

    rank: int = 0
    size: int = 1
    queues: c10d.Store | None = field(default=None, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the first rank, which saves and says what is to be said."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """The part of so many things that is this rank's; parts are contiguous, and in the order of the ranks."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def batches(self, count: int, size: int) -> tuple[range, bool]:
        """Where those of the batches of so many things begin that are this rank's, and whether they count.

        A rank that has none is given the first, which does not count, to learn what the others make of theirs is like.
        """
        firsts = range(0, count, size)
        mine = firsts[self.share(len(firsts))]
        return (mine, True) if mine else (firsts[:1], False)

    def gather(self, part: Tensor) -> Tensor:
        """The parts of all ranks, one after another, which may differ in their first dimension only."""
        if self.size == 1:
            return part
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(part)
        self.sum(lengths)
        parts = [
            part.contiguous() if rank == self.rank else part.new_empty(length, *part.shape[1:])
            for rank, length in enumerate(lengths.tolist())
        ]
        for rank, tensor in enumerate(parts):
            if len(tensor):
                dist.broadcast(tensor, rank)
        return torch.cat(parts)

    def gathered(self, buffer: SpilledBuffer, counts: bool) -> SpilledBuffer:
        """The stacks of all ranks, one after another; one that does not count, see `batches`, is left out."""
        return buffer if self.size == 1 else SpilledBuffer([self.gather(buffer[:] if counts else buffer[:0])])

    def sum(self, *values: Tensor) -> None:
        """Add up tensors over all ranks, in place; every rank gets the same bits."""
        if self.size > 1:
            for value in values:
                dist.all_reduce(value)

    def parallel(self, module: nn.Module) -> nn.Module:
        """A module whose gradients are means over the ranks; the parameters that take gradients become the first's."""
        return module if self.size == 1 else DistributedDataParallel(module, **OWN_BUFFERS)

    def batch(self, index: Tensor) -> tuple[Tensor, float]:
        """The part of a batch that is this rank's, and what its mean loss counts in the mean over the ranks.

        Args:
            index: Of the whole batch, at least one.
        """
        if self.size == 1:
            return index, 1.0
        mine = index[self.rank :: self.size]
        # A rank without any takes part with one that does not count: every gradient is reduced over all ranks.
        return (mine, self.size * len(mine) / len(index)) if len(mine) else (index[:1], 0.0)

    def send(self, entry: Entry | None, source: int = 0) -> Entry:
        """What one rank has, on all of them.

        Args:
            entry: On the rank that has it; ignored on the others.
            source: That rank.
        """
        if self.size == 1:
            assert entry is not None
            return entry
        if self.rank == source:
            assert entry is not None
            data = torch.frombuffer(bytearray(_packed(entry)), dtype=torch.uint8)
            length = torch.tensor([len(data)])
        else:
            length = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(length, source)
        if self.rank != source:
            data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, source)
        return _unpacked(data.numpy().tobytes())

    def of_first(self, work: Callable[[], Entry]) -> Entry:
        """What the first rank works out, on all of them."""
        if self.size == 1:
            return work()
        return self.send(work() if self.is_main else None)

    def require_same(self, given: Mapping[str, Any]) -> None:
        """Refuse, on all ranks, to go on where one was not given what the first was.

        Args:
            given: Plain values for JSON.

        Raises:
            DistributedError: Naming the first rank of which that is so, and what differs.
        """
        of_first = self.send(Entry(dict(given))).values
        ours = "; ".join([*differences(of_first, json.loads(json.dumps(given)))][:3])
        for rank in range(1, self.size):
            differing = self.send(Entry(ours), rank).values
            if differing:
                raise DistributedError(
                    f"rank {rank} was not given what rank 0 was: {differing}. Start all ranks with one command, on "
                    "machines that hold the same files."
                )

    @contextmanager
    def store(self, folder: str | Path | None, fingerprint: Mapping[str, Any]) -> Iterator[Store]:
        """The store of a run on all ranks, see `dcvit.runtime.checkpoint.open_run`; the first rank holds the lock.

        Args:
            folder: The run's, which all ranks reach; `None` keeps nothing.
            fingerprint: As of `open_run`.

        Raises:
            DistributedError: If the ranks were not given the same.
            RunStoreError: As `open_run` does, on the first rank.
        """
        if self.size == 1:
            with open_run(folder, fingerprint) as store:
                yield store
            return
        self.require_same(fingerprint)
        assert self.queues is not None
        queues = c10d.PrefixStore(self.send(Entry(secrets.token_hex(8))).values, self.queues)
        if self.is_main:
            with open_run(folder, fingerprint) as kept:
                dist.barrier()
                yield _Shared(kept, self, queues)
        else:
            dist.barrier()  # the first has looked at the folder by then
            yield _Shared(NOTHING_KEPT if folder is None else RunStore(Path(folder).absolute()), self, queues)


SINGLE_PROCESS = ProcessGroup()
"""One process."""


@contextmanager
def launched(device: str | None = None) -> Iterator[ProcessGroup]:
    """The ranks that torch's launcher started this process as one of; `SINGLE_PROCESS` where it did not.

    Args:
        device: Of this process. `cuda` without a number, or none on a machine with GPUs, is the one of the process's
            own number there. It becomes CUDA's current device.

    Raises:
        DistributedError: If there are fewer GPUs than ranks on this machine.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SINGLE_PROCESS
        return
    backend = "cpu:gloo"
    if device not in (None, "cpu", "cuda"):
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    elif device != "cpu" and torch.cuda.is_available():
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            raise DistributedError(
                f"rank {local} of this machine has no GPU, there are {count}: start {count} processes "
                f"(--nproc-per-unit {count})."
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    # The launcher's store outlives a restart of the ranks, and must not bring their predecessors' addresses.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend, store=c10d.PrefixStore(f"group-{attempt}", store), rank=rank, world_size=size, timeout=PATIENCE
    )
    try:
        yield ProcessGroup(rank, size, c10d.PrefixStore(f"queues-{attempt}", store))
    finally:
        dist.destroy_process_group()


T = TypeVar("T")


def on_devices(devices: Sequence[str], work: Callable[[ProcessGroup, str], T]) -> T:
    """Start a process for each of some devices of this machine, by torch's launcher, and let them share work.

    Args:
        devices: Such as `"cuda:0"` or `"cpu"`.
        work: Called in each process with its ranks and device. It and what it gives back must be picklable.

    Returns:
        What it gives back in the first process.

    Raises:
        DistributedError: If a process dies, or there is no temporary folder.
        DcvitError: What the work raises of that.
        KeyboardInterrupt: If that stops it; the processes are stopped, too.
    """
    _require_devices(devices)
    threads = max(1, torch.get_num_threads() // sum(device == "cpu" for device in devices)) if "cpu" in devices else 1
    try:
        temporary = TemporaryDirectory(prefix="dcvit-")
    except OSError as error:
        raise DistributedError(f"devices: {error}. Set TMPDIR to a folder that can be written.") from error
    try:
        with temporary as folder, _own_signals():
            outcomes = _launched(devices, work, threads, Path(folder))
    except SignalException as stopped:
        signal.raise_signal(stopped.sigval)  # the launcher caught it, and stopped the processes
        raise DistributedError(f"The processes were stopped ({stopped.sigval.name}).") from stopped
    found: T | DcvitError = outcomes[0]
    if isinstance(found, DcvitError):
        raise found
    return found


def _launched(
    devices: Sequence[str], work: Callable[[ProcessGroup, str], T], threads: int, folder: Path
) -> dict[int, T | DcvitError]:
    """What each process gives back, by rank; the folder is for what the launcher and they write."""
    refusal = folder / "error"
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=len(devices), run_id=secrets.token_hex(8), rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=1,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
    )  # fmt: skip
    try:
        outcomes: dict[int, T | DcvitError] = elastic_launch(config, _on_device)(work, tuple(devices), threads, refusal)
    except ChildFailedError as error:
        if refusal.is_file():  # the others died of it
            raise pickle.loads(refusal.read_bytes()) from error
        rank, failure = error.get_first_failure()
        raise DistributedError(
            f"The process on {devices[rank]} died (exit code {failure.exitcode}; what it wrote is above). With "
            "run_dir, the same call goes on from what is finished."
        ) from error
    return outcomes


@contextmanager
def _own_signals() -> Iterator[None]:
    """Give the caller's signal handlers back in the end: torch's launcher puts its own in their place."""
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    handlers = {number: signal.getsignal(number) for name in names if (number := getattr(signal, name, None))}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:  # it was not set by Python
                    signal.signal(number, handler)


def _require_devices(devices: Sequence[str]) -> None:
    """Refuse devices that are not there, before processes start."""
    for name in devices:
        try:
            device = torch.device(name)
            if device.type != "cuda":
                torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise DistributedError(f"devices: {name!r} is not usable here ({str(error).splitlines()[0]}).") from error
        # A tensor on a GPU would hold some of its memory, or all of one that serves a single process, for this one.
        if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
            raise DistributedError(f"devices: {name!r} is not usable here (torch finds {count} GPUs).")


def _on_device(
    work: Callable[[ProcessGroup, str], T], devices: Sequence[str], threads: int, refusal: Path
) -> T | DcvitError:
    """One process of `on_devices`; the first that may not go on leaves word why."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a terminal interrupts all processes; the first one speaks for them
    torch.set_num_threads(threads)
    device = devices[int(os.environ["LOCAL_RANK"])]
    try:
        with launched(device) as processes:
            return work(processes, device)
    except DcvitError as error:  # for the caller, who asked
        with suppress(FileExistsError), refusal.open("xb") as file:
            pickle.dump(error, file)
        return error


class _Shared(Store):
    """A store whose units one rank works out, or several share.

    Args:
        kept: Keeps units on disk, or does not.
        processes: All of them.
        queues: Where they queue.
    """

    def __init__(self, kept: Store, processes: ProcessGroup, queues: c10d.Store) -> None:
        self._kept, self._processes, self._queues = kept, processes, queues

    def find(self, name: str, check: Check | None = None) -> Entry | None:
        """See `Store`."""
        return self._kept.find(name, check)

    def keep(self, name: str, entry: Entry) -> None:
        """See `Store`."""
        self._kept.keep(name, entry)

    def within(self, prefix: str) -> "Store":
        """See `Store`."""
        return _Shared(self._kept.within(prefix), self._processes, c10d.PrefixStore(prefix, self._queues))

    def entry(
        self,
        name: str,
        work: Callable[[], Entry],
        restore: Callable[[Entry], object] | None = None,
        *,
        check: Check | None = None,
        together: bool = False,
    ) -> Entry:
        """See `Store`."""
        found = self._kept.find(name, check) if self._processes.is_main else None
        known: bool = self._processes.send(Entry(found is not None)).values
        if not known and (together or self._processes.is_main):
            found = work()
            if self._processes.is_main:
                self._kept.keep(name, found)
            if together:
                return found
        entry = self._processes.send(found)
        if restore is not None and (known or not self._processes.is_main):
            restore(entry)
        return entry

    def entries(
        self,
        works: Mapping[str, Callable[[], Entry]],
        on_progress: Callable[[int, Entry | None], None],
        checks: Mapping[str, Check] = NO_CHECKS,
    ) -> dict[str, Entry]:
        """See `Store`."""
        kept = self.finished(works, checks) if self._processes.is_main else {}
        names: list[str] = self._processes.send(Entry(list(kept))).values
        entries = {name: self._processes.send(kept.get(name)) for name in names}
        on_progress(len(entries), None)
        left = [name for name in works if name not in entries]
        queue = c10d.PrefixStore("".join(left[:1]), self._queues)  # a name that no other queue of the run has
        while (place := queue.add("next", 1) - 1) < len(left):
            name = left[place]
            entry = works[name]()
            self._kept.keep(name, entry)
            queue.set(f"unit {name}", base64.b64encode(_packed(entry)).decode())
            on_progress(len(entries) + queue.add("finished", 1), entry)
        for name in left:
            entries[name] = _unpacked(base64.b64decode(queue.get(f"unit {name}")))
        return {name: entries[name] for name in works}


def _packed(entry: Entry) -> bytes:
    """A unit as the bytes of a safetensors file, its values as JSON among them."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in entry.tensors.items()}
    tensors["values"] = torch.frombuffer(bytearray(json.dumps(entry.values).encode()), dtype=torch.uint8)
    return save(tensors)


def _unpacked(data: bytes) -> Entry:
    tensors = load(data)
    values = json.loads(tensors.pop("values").numpy().tobytes())
    return Entry(values, tensors)
