"""Several processes share one compression: what each does, that they end alike, and that a dead one costs little."""

import os
import signal
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dcvit
from dcvit import cli
from dcvit.errors import DistributedError
from dcvit.runtime.checkpoint import Entry
from dcvit.runtime.distributed import ProcessGroup, on_devices
from tests.conftest import CUT_REFINED, PUBLISHED, QUICK, slow_but

BUDGET = dcvit.Budget(macs=0.7)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_contiguous_and_cover_everything(size: int) -> None:
    things = list(range(5))
    parts = [things[ProcessGroup(rank, size).share(5)] for rank in range(size)]
    assert [thing for part in parts for thing in part] == things
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("size", "count"), [(1, 5), (2, 5), (3, 5), (4, 2), (8, 1)])
def test_a_batch_in_parts_has_the_mean_of_the_whole(size: int, count: int) -> None:
    values = torch.arange(10.0).square()
    index = torch.tensor([7, 1, 8, 2, 9])[:count]
    parts = [ProcessGroup(rank, size).batch(index) for rank in range(size)]
    assert sum(share * float(values[part].mean()) for part, share in parts) / size == pytest.approx(
        float(values[index].mean())
    )


def collectives(processes: ProcessGroup, device: str) -> dict[str, object]:
    """What the processes tell each other, with parts of different length."""
    assert device == "cpu"
    part = torch.full((processes.rank, 2), float(processes.rank), dtype=torch.float64)  # the first has none
    total = torch.tensor([processes.rank + 1.0])
    processes.sum(total)
    entry = Entry({"of": processes.rank, "pair": (1, 2)}, {"w": torch.full((2,), float(processes.rank))})
    sent = processes.send(entry if processes.rank == 1 else None, source=1)
    return {
        "gathered": processes.gather(part).tolist(),
        "total": total.tolist(),
        "sent": (sent.values, sent.tensors["w"].tolist()),
        "first": processes.of_first(lambda: Entry(processes.rank)).values,
    }


@pytest.mark.parametrize("size", slow_but([2, 3], 2))
def test_what_ranks_tell_each_other(size: int) -> None:
    assert on_devices(["cpu"] * size, collectives) == {
        "gathered": [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]][: sum(range(size))],
        "total": [sum(range(size + 1))],
        "sent": ({"of": 1, "pair": [1, 2]}, [1.0, 1.0]),
        "first": 0,
    }


def queued(folder: Path, processes: ProcessGroup, device: str) -> dict[str, Any]:
    """Units from a queue: a slow rank takes fewer, all get all, and no unit is worked out twice."""
    done: list[str] = []

    def work(name: str) -> Entry:
        time.sleep(2.0 if processes.rank == 0 else 0.01)
        done.append(name)
        return Entry(name.upper(), {"by": torch.tensor(processes.rank)})

    names = [f"u{i}" for i in range(6)]
    told: list[tuple[int, bool]] = []

    def tell(count: int, entry: Entry | None) -> None:
        told.append((count, entry is None))

    with processes.store(folder, {"of": "queue"}) as store:
        entries = store.entries({name: partial(work, name) for name in names}, tell)
        later = store.entries({"u6": partial(work, "u6")}, tell)
    with processes.store(folder, {"of": "queue"}) as store:
        again = store.entries({name: partial(work, name) for name in names}, tell)
    mine = processes.send(Entry(done), source=1).values
    told_there = processes.send(Entry(told), source=1).values
    return {
        "values": [entry.values for entry in (*entries.values(), *later.values(), *again.values())],
        "of_the_slow": len(done),
        "of_the_fast": len(mine),
        "twice": len(set(done + mine)) < len(done + mine),
        "begun": [[count for count, begins in each if begins] for each in (told, told_there)],
        "finished": sorted(count for each in (told, told_there) for count, begins in each if not begins),
    }


@pytest.mark.slow
def test_a_queue_gives_a_fast_rank_more(tmp_path: Path) -> None:
    found = on_devices(["cpu", "cpu"], partial(queued, tmp_path / "run"))
    assert found["values"] == [f"U{i}" for i in range(7)] + [f"U{i}" for i in range(6)]
    assert found["of_the_slow"] + found["of_the_fast"] == 7
    assert found["of_the_fast"] > found["of_the_slow"] > 0
    assert not found["twice"]
    assert found["begun"] == [[0, 0, 6]] * 2
    assert found["finished"] == sorted([*range(1, 7), 1])
    assert len(list((tmp_path / "run" / "units").glob("*.json"))) == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", slow_but([QUICK, CUT_REFINED, PUBLISHED], QUICK), ids=["searched", "refined", "published"]
)
def test_two_processes_end_as_one_does(config: dcvit.DCViT, model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    alone = dcvit.compress(model, images, BUDGET, config)
    shared = dcvit.compress(model, images, BUDGET, config, devices=["cpu", "cpu"], run_dir=tmp_path / "run")
    assert [(t.block, t.metric_loss) for t in shared.report.probes] == [
        (t.block, t.metric_loss) for t in alone.report.probes
    ]
    assert shared.plan == alone.plan
    assert shared.report.distillation_loss == pytest.approx(alone.report.distillation_loss, rel=0.05)
    # All is kept: one process goes on from it, and has nothing left to do.
    resumed = dcvit.compress(model, images, BUDGET, config, run_dir=tmp_path / "run")
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, shared.model.state_dict()[name]), name


def test_one_device_starts_no_process(model: nn.Module, images: Tensor) -> None:
    alone = dcvit.compress(model, images, BUDGET, QUICK)
    on_one = dcvit.compress(model, images, BUDGET, QUICK, devices=["cpu"])
    for name, tensor in on_one.model.state_dict().items():
        assert torch.equal(tensor, alone.model.state_dict()[name]), name


def test_what_cannot_be_shared_is_refused(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(dcvit.DcvitError, match=r"method='practise' on several devices: only dcvit can use several"):
        dcvit.compress(model, images, BUDGET, method="practise", devices=["cpu", "cpu"])
    halving = PUBLISHED.with_(ablation=dcvit.config.Ablation(halving=True))
    with pytest.raises(dcvit.DcvitError, match=r"halving=True on several devices"):
        dcvit.compress(model, images, BUDGET, halving, devices=["cpu", "cpu"])
    with pytest.raises(dcvit.DcvitError, match=r"devices=\['cpu'\] with 2 processes: each of them has a device"):
        dcvit.compress(model, images, BUDGET, QUICK, devices=["cpu"], processes=ProcessGroup(0, 2))


@pytest.mark.slow
def test_what_a_process_refuses_the_caller_sees(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(dcvit.errors.BudgetError, match=r"macs=0\.01"):
        dcvit.compress(model, images, dcvit.Budget(macs=0.01), QUICK, devices=["cpu", "cpu"])


@pytest.mark.slow
def test_the_caller_sees_what_only_the_first_process_refuses(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """While the others wait for it."""
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(dcvit.errors.RunStoreError, match=r"holds something else \(notes\.txt\)"):
        dcvit.compress(model, images, BUDGET, QUICK, devices=["cpu", "cpu"], run_dir=tmp_path)


def other_settings(processes: ProcessGroup, device: str) -> str:
    """Give each process its own settings, and return the error that the process gets."""
    try:
        processes.require_same({"seed": processes.rank})
    except DistributedError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_processes_with_different_inputs_are_reported() -> None:
    assert on_devices(["cpu", "cpu"], other_settings) == (
        "rank 1 differs from rank 0: seed was 0 there and is 1 here. Start all processes with one command, on machines "
        "that hold the same files."
    )


@pytest.mark.slow
def test_a_process_that_dies_is_named() -> None:
    with pytest.raises(DistributedError, match=r"The process on cpu died \(exit code -9"):
        on_devices(["cpu", "cpu"], die)


def die(processes: ProcessGroup, device: str) -> None:
    if processes.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    processes.sum(torch.zeros(1))


def test_only_compress_is_shared_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "launched", lambda device: nullcontext(ProcessGroup(0, 2)))
    assert cli.main(["methods"]) == cli.EXIT_BAD_INPUT
    assert "methods: only compress shares its work; start one process, not 2." in capsys.readouterr().err
