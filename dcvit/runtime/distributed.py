"""Compression in several processes that torch's launcher starts, on one machine or several.

    torchrun --nproc-per-node 4 -m dcvit compress deit_small_patch16_224 --data photos/ --macs 0.75 --out small/

Every process gets the same model, images and settings, and ends with the same student:

- Probes are taken from one queue in the launcher's c10d store, so that a fast process takes more of them.
- The teacher sees each view once: every process passes its share of the batches, and the drawn tokens are gathered.
- A block's normal equations are summed over each process's share, and then over the processes.
- Gradient steps on a block, and those of the refinement, split each batch (DistributedDataParallel).
- Work that would be equal in all processes, such as the proxy set, is done by the main process and sent to the others.

Probes equal those of one process bit for bit, on equal hardware with as many threads. Sums over processes have another
order than in one process, so weights agree with those of one process only up to rounding. Two runs with the same number
of processes agree bit for bit if all-reduce does (gloo's does).

If a process dies, its group dies too, and torch's launcher restarts all processes (`--max-restarts`). They resume from
the run's folder (`dcvit.runtime.checkpoint`), to which each process writes its finished probes. All processes must
reach that folder.
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
"""The longest time that a process waits for another's result. The launcher notices a dead process much earlier."""

# Torch 2.14 renamed the option, and warns about the old name.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
OWN_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}
"""Options that keep processes from exchanging buffers in every pass, because buffers do not change."""


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of one compression, and the rank of this one.

    Attributes:
        rank: The number of this process, from 0. Rank 0 is the main process.
        size: Number of processes.
        queues: The launcher's store, which holds the queues of probes; `None` for a single process.
    """

    rank: int = 0
    size: int = 1
    queues: c10d.Store | None = field(default=None, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which saves results and reports to the user."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Return this process's part of `count` items. Parts are contiguous, and in the order of the ranks."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def batches(self, count: int, size: int) -> tuple[range, bool]:
        """Return where this process's batches begin, of `count` items in batches of `size`, and whether they count.

        A process without batches gets the first one, which does not count. It shows what the results of the other
        processes look like.
        """
        firsts = range(0, count, size)
        mine = firsts[self.share(len(firsts))]
        return (mine, True) if mine else (firsts[:1], False)

    def gather(self, part: Tensor) -> Tensor:
        """Return the parts of all processes, joined by rank. They may differ only in their first dimension."""
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
        """Return the buffers of all processes, joined by rank, without those that do not count (see `batches`)."""
        return buffer if self.size == 1 else SpilledBuffer([self.gather(buffer[:] if counts else buffer[:0])])

    def sum(self, *values: Tensor) -> None:
        """Add up tensors over all processes, in place. Every process gets the same bits."""
        if self.size > 1:
            for value in values:
                dist.all_reduce(value)

    def parallel(self, module: nn.Module) -> nn.Module:
        """Return a module whose gradients are means over the processes.

        Its trainable parameters become those of the main process.
        """
        return module if self.size == 1 else DistributedDataParallel(module, **OWN_BUFFERS)

    def batch(self, index: Tensor) -> tuple[Tensor, float]:
        """Return this process's part of a batch, and the weight of its mean loss in the mean over the processes.

        Args:
            index: The indices of the whole batch, at least one.
        """
        if self.size == 1:
            return index, 1.0
        mine = index[self.rank :: self.size]
        # A process without any takes part with one of weight 0, because gradients are reduced over all processes.
        return (mine, self.size * len(mine) / len(index)) if len(mine) else (index[:1], 0.0)

    def send(self, entry: Entry | None, source: int = 0) -> Entry:
        """Send an entry from one process to all of them, and return it.

        Args:
            entry: The entry, in the process that sends it; ignored in the others.
            source: The rank of the process that sends it.
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
        """Run work only in the main process, and return its entry in all processes."""
        if self.size == 1:
            return work()
        return self.send(work() if self.is_main else None)

    def require_same(self, values: Mapping[str, Any]) -> None:
        """Refuse, in all processes, values that differ from those of the main process.

        Args:
            values: Plain values for JSON.

        Raises:
            DistributedError: If they differ. The error names the first rank that differs, and its differences.
        """
        expected = self.send(Entry(dict(values))).values
        ours = "; ".join([*differences(expected, json.loads(json.dumps(values)))][:3])
        for rank in range(1, self.size):
            differing = self.send(Entry(ours), rank).values
            if differing:
                raise DistributedError(
                    f"rank {rank} differs from rank 0: {differing}. Start all processes with one command, on machines "
                    "that hold the same files."
                )

    @contextmanager
    def store(self, folder: str | Path | None, fingerprint: Mapping[str, Any]) -> Iterator[Store]:
        """Yield the store of a run in all processes, see `dcvit.runtime.checkpoint.open_run`.

        The main process holds the lock.

        Args:
            folder: The run's folder, which all processes must reach; `None` keeps nothing.
            fingerprint: See `open_run`.

        Raises:
            DistributedError: If the processes have different fingerprints.
            RunStoreError: See `open_run`; only in the main process.
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
            dist.barrier()  # by then the main process has checked the folder
            yield _Shared(NOTHING_KEPT if folder is None else RunStore(Path(folder).absolute()), self, queues)


SINGLE_PROCESS = ProcessGroup()
"""The group of a single process."""


@contextmanager
def launched(device: str | None = None) -> Iterator[ProcessGroup]:
    """Yield the group of this process if torch's launcher started it, else `SINGLE_PROCESS`.

    Args:
        device: The device of this process. `cuda` without a number, or `None` on a machine with GPUs, selects the GPU
            of the process's local rank. It becomes CUDA's current device.

    Raises:
        DistributedError: If this machine has fewer GPUs than processes.
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
                f"local rank {local} has no GPU, this machine has {count}: start {count} processes "
                f"(--nproc-per-node {count})."
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    # The launcher's store outlives a restart; the prefix hides the addresses of the previous processes.
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
    """Start one process for each device of this machine with torch's launcher, and let them share work.

    Args:
        devices: Names such as `"cuda:0"` or `"cpu"`.
        work: Called in each process with its group and device. It and its result must be picklable.

    Returns:
        The result of the main process.

    Raises:
        DistributedError: If a process dies, or no temporary folder can be made.
        DcvitError: If the work raises it.
        KeyboardInterrupt: If it stops this process; the started processes are stopped, too.
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
    """Return the result of each process, by rank. The launcher and the processes write to the folder."""
    refusal = folder / "error"
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=len(devices), run_id=secrets.token_hex(8), rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=1,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
    )  # fmt: skip
    try:
        outcomes: dict[int, T | DcvitError] = elastic_launch(config, _on_device)(work, tuple(devices), threads, refusal)
    except ChildFailedError as error:
        if refusal.is_file():  # the other processes failed because of it
            raise pickle.loads(refusal.read_bytes()) from error
        rank, failure = error.get_first_failure()
        raise DistributedError(
            f"The process on {devices[rank]} died (exit code {failure.exitcode}; what it wrote is above). With "
            "run_dir, the same call resumes from what is finished."
        ) from error
    return outcomes


@contextmanager
def _own_signals() -> Iterator[None]:
    """Restore the caller's signal handlers at the end, because torch's launcher installs its own."""
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
    """Refuse devices that do not exist, before processes start."""
    for name in devices:
        try:
            device = torch.device(name)
            if device.type != "cuda":
                torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise DistributedError(f"devices: {name!r} is not usable here ({str(error).splitlines()[0]}).") from error
        # A tensor on a GPU would take some of its memory, or all of a GPU in exclusive mode, for this process.
        if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
            raise DistributedError(f"devices: {name!r} is not usable here (torch finds {count} GPUs).")


def _on_device(
    work: Callable[[ProcessGroup, str], T], devices: Sequence[str], threads: int, refusal: Path
) -> T | DcvitError:
    """Run one process of `on_devices`. The first that raises a `DcvitError` also writes it to a file."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a terminal interrupts all processes; only their parent reports it
    torch.set_num_threads(threads)
    device = devices[int(os.environ["LOCAL_RANK"])]
    try:
        with launched(device) as processes:
            return work(processes, device)
    except DcvitError as error:  # `on_devices` raises it to its caller
        with suppress(FileExistsError), refusal.open("xb") as file:
            pickle.dump(error, file)
        return error


class _Shared(Store):
    """A store whose entries one process computes, or several processes share.

    Args:
        kept: The store that keeps entries on disk, or `NOTHING_KEPT`.
        processes: The process group.
        queues: The store that holds their queues.
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
        while (index := queue.add("next", 1) - 1) < len(left):
            name = left[index]
            entry = works[name]()
            self._kept.keep(name, entry)
            queue.set(f"entry {name}", base64.b64encode(_packed(entry)).decode())
            on_progress(len(entries) + queue.add("finished", 1), entry)
        for name in left:
            entries[name] = _unpacked(base64.b64decode(queue.get(f"entry {name}")))
        return {name: entries[name] for name in works}


def _packed(entry: Entry) -> bytes:
    """Return an entry as the bytes of a safetensors file, which includes its values as JSON."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in entry.tensors.items()}
    tensors["values"] = torch.frombuffer(bytearray(json.dumps(entry.values).encode()), dtype=torch.uint8)
    return save(tensors)


def _unpacked(data: bytes) -> Entry:
    tensors = load(data)
    values = json.loads(tensors.pop("values").numpy().tobytes())
    return Entry(values, tensors)
