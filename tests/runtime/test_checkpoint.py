"""Work that is stopped goes on: units on disk, the lock, the fingerprint, and the same weights in the end."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dcvit
from dcvit.cli import main
from dcvit.errors import DamagedEntryWarning, RunStoreError
from dcvit.runtime import checkpoint as run_store
from dcvit.runtime.checkpoint import Entry, delete_run, digest_images, digest_model, open_run
from tests.conftest import CUT, CUT_REFINED, slow_but
from tests.variants import EVA_VARIANTS, VARIANTS

OF = {"settings": {"seed": 0}}


def counted(calls: list[str], name: str) -> Callable[[], Entry]:
    def work() -> Entry:
        calls.append(name)
        return Entry({"loss": 0.1 + 0.2, "order": (1, 2)}, {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)})

    return work


def test_a_unit_is_computed_once_and_comes_back_as_it_was(tmp_path: Path) -> None:
    calls: list[str] = []
    with open_run(tmp_path / "run", OF) as store:
        first = store.entry("trial-3", counted(calls, "a"))
    with open_run(tmp_path / "run", OF) as store:
        again = store.entry("trial-3", counted(calls, "b"))
        store.within("size-1").entry("trial-3", counted(calls, "c"))
    assert calls == ["a", "c"]
    assert again.values == {"loss": first.values["loss"], "order": [1, 2]}
    assert again.tensors.keys() == {"w", "n"}
    assert all(torch.equal(again.tensors[name], first.tensors[name]) for name in first.tensors)
    assert not list((tmp_path / "run" / "units").glob("*.part"))


def test_finished_entries_are_reported_at_once_and_the_others_are_computed(tmp_path: Path) -> None:
    calls: list[str] = []
    told: list[tuple[int, bool]] = []
    works = {name: counted(calls, name) for name in ("a", "b", "c")}
    with open_run(tmp_path / "run", OF) as store:
        store.entry("b", works["b"])
    with open_run(tmp_path / "run", OF) as store:
        entries = store.entries(works, lambda count, entry: told.append((count, entry is None)))
    assert calls == ["b", "a", "c"]
    assert list(entries) == ["a", "b", "c"]
    assert told == [(1, True), (2, False), (3, False)]


def test_without_a_folder_nothing_is_kept() -> None:
    calls: list[str] = []
    with open_run(None, {}) as store:
        for name in ("a", "b"):
            store.within("x").entry("unit", counted(calls, name))
    assert calls == ["a", "b"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda entries: (entries / "t.json").write_text((entries / "t.json").read_text().replace("0.3", "0.4")),
        lambda entries: (entries / "t.json").write_text("{"),
        lambda entries: (entries / "t.json").write_text("[]"),
        lambda entries: (entries / "t.json").write_bytes(b"\xff\xfe\x00"),
        lambda entries: (entries / "t.safetensors").unlink(),
        lambda entries: (entries / "t.safetensors").write_bytes(
            (entries / "t.safetensors").read_bytes()[:-1] + b"\x07"
        ),
        lambda entries: (entries / "t.safetensors").write_bytes(b""),
    ],
)
def test_a_damaged_unit_is_computed_again_and_said_so(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    calls: list[str] = []
    with open_run(tmp_path, OF) as store:
        store.entry("t", counted(calls, "a"))
    damage(tmp_path / "units")
    with open_run(tmp_path, OF) as store, pytest.warns(DamagedEntryWarning, match=r"t\.json' is damaged"):
        store.entry("t", counted(calls, "b"))
    with open_run(tmp_path, OF) as store:
        store.entry("t", counted(calls, "c"))
    assert calls == ["a", "b"]


def test_what_a_killed_process_left_half_written_is_no_unit(tmp_path: Path) -> None:
    calls: list[str] = []
    with open_run(tmp_path, OF) as store:
        store.entry("t", counted(calls, "a"))
    (tmp_path / "units" / "t.json").rename(tmp_path / "units" / "t.json.part")  # its tensors are there already
    with open_run(tmp_path, OF) as store:
        store.entry("t", counted(calls, "b"))
    assert calls == ["a", "b"]
    assert sorted(path.name for path in (tmp_path / "units").iterdir()) == ["t.json", "t.safetensors"]


def test_a_run_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    for name, left in (("a", False), ("b", True)):
        with open_run(tmp_path / name, OF) as store:
            store.keep("unit", Entry(1))
        if left:
            (tmp_path / name / "notes.txt").write_text("precious")
        delete_run(tmp_path / name)
        assert (tmp_path / name).exists() == left
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["notes.txt"]
    delete_run(tmp_path / "never")


def test_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    with open_run(tmp_path, {"settings": {"seed": 9}, "model": "a"}):
        pass  # nothing was finished, so the next may be another
    with open_run(tmp_path, {"settings": {"seed": 0, "views": (1, 2)}, "model": "a"}) as store:
        store.keep("unit", Entry(1))
    with open_run(tmp_path, {"settings": {"seed": 0, "views": [1, 2]}, "model": "a"}):
        pass
    with (
        pytest.raises(RunStoreError, match=r"another run: settings\.seed was 0 there and is 1 here\. Name another"),
        open_run(tmp_path, {"settings": {"seed": 1, "views": (1, 2)}, "model": "a"}),
    ):
        pass


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ({"photo.png": ""}, r"holds something else \(photo\.png\)"),
        ({"run.json": "{"}, r"run\.json' cannot be read"),
        ({"run.json": "[]"}, r"run\.json' cannot be read \(it holds a list instead of a table\)"),
        ({"run.json": '{"name": "mine"}'}, r"holds another run"),
        ({"units/t.json": "{}"}, r"has entries but no run\.json"),
    ],
)
def test_a_foreign_or_broken_folder_is_refused_and_not_changed(
    present: dict[str, str], message: str, tmp_path: Path
) -> None:
    for name, text in present.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(RunStoreError, match=message), open_run(tmp_path, OF):
        pass
    assert {name: (tmp_path / name).read_text() for name in present} == present


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunStoreError, match="is a regular file, not a folder"), open_run(tmp_path / "run", OF):
        pass
    assert (tmp_path / "run").read_text() == "mine"


def hold(folder: str, ready: Any) -> None:
    with open_run(folder, OF):
        ready.set()
        signal.pause()


def test_two_processes_are_kept_apart_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(str(tmp_path), ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(RunStoreError, match=rf"in use by process {process.pid} on "), open_run(tmp_path, OF):
        pass
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with open_run(tmp_path, OF) as store:
        store.entry("t", counted([], "a"))


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with open_run(tmp_path, OF) as store:
        store.entry("first", counted(calls, "a"))
        monkeypatch.setattr(run_store.os, "fsync", full)
        with pytest.raises(RunStoreError, match=r"cannot be written \(.*No space left on device\).*before is kept"):
            store.entry("second", counted(calls, "b"))
        monkeypatch.undo()
        assert sorted(path.name for path in (tmp_path / "units").iterdir()) == ["first.json", "first.safetensors"]
    with open_run(tmp_path, OF) as store:
        for name in ("first", "second"):
            store.entry(name, counted(calls, name))
    assert calls == ["a", "b", "second"]


def test_a_name_that_could_leave_the_folder_is_a_mistake(tmp_path: Path) -> None:
    with open_run(tmp_path, OF) as store:
        for name in ("../x", "a/b", "", "a..b", ".a", "A"):
            with pytest.raises(ValueError, match="lower-case letters"):
                store.entry(name, counted([], name))


def test_digests_tell_values_shapes_names_and_dtypes_apart() -> None:
    images = torch.arange(12.0).view(1, 3, 2, 2)
    assert digest_images(images) == digest_images(images.clone())
    assert len({digest_images(x) for x in (images, images + 1, images.view(3, 1, 2, 2), images.double())}) == 4
    a, b = VARIANTS["plain"].create(), VARIANTS["plain"].create()
    assert digest_model(a, {"depth": 4}) == digest_model(b, {"depth": 4}) != digest_model(b, {"depth": 5})
    with torch.no_grad():
        b.blocks[0].attn.proj.bias[0] += 1  # type: ignore[index, operator, union-attr]
    assert digest_model(a, {}) != digest_model(b, {})
    # Equal in every weight: what is not saved tells them apart.
    near, far = (EVA_VARIANTS["dinov3"].create(rope_temperature=t, rope_type="cat") for t in (10.0, 100.0))
    assert all(torch.equal(x, y) for x, y in zip(near.parameters(), far.parameters(), strict=True))
    assert digest_model(near, {}) != digest_model(far, {})


class Stopped(Exception):
    pass


PUBLISHED = dcvit.DCViT.paper(
    recovery=dcvit.config.DistillationConfig(epochs=2, warmup_epochs=0),
    synthesis=dcvit.config.SynthesisConfig(num_images=4, iterations=3, warmup_iterations=1),
)
SEARCHED = dcvit.DCViT(
    recovery=dcvit.config.ReconstructionConfig(num_views=20, num_rows=128, epochs=1, refinement_steps=0),
    synthesis=dcvit.config.SynthesisConfig(num_images=4, iterations=3, warmup_iterations=1),
)


@pytest.mark.parametrize(
    ("config", "macs"),
    slow_but([(SEARCHED, 0.7), (CUT, 0.7), (CUT_REFINED, 0.7), (PUBLISHED, 0.62)], (SEARCHED, 0.7)),
    ids=["searched", "cut", "refined", "published"],
)
def test_a_run_that_stops_after_each_unit_ends_with_the_same_weights(
    config: dcvit.DCViT, macs: float, model: nn.Module, images: Tensor, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    budget = dcvit.Budget(macs=macs)
    expected = dcvit.compress(model, images, budget, config)
    write, written = run_store.RunStore.keep, list[str]()

    def stopping(self: run_store.RunStore, name: str, entry: Entry) -> None:
        write(self, name, entry)
        written.append(self.prefix + name)
        raise Stopped(name)

    monkeypatch.setattr(run_store.RunStore, "keep", stopping)
    result = None
    while result is None:
        try:
            result = dcvit.compress(model, images, budget, config, run_dir=tmp_path)
        except Stopped:
            assert len(written) < 40
    assert len(written) == len(set(written)) > 3  # nothing was done twice
    assert result.plan == expected.plan
    wanted = expected.model.state_dict()
    assert result.model.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in result.model.state_dict().items())
    assert [probe.block for probe in result.report.probes] == [probe.block for probe in expected.report.probes]
    assert result.report.distillation_loss == expected.report.distillation_loss


@pytest.mark.slow
def test_a_sweep_goes_on_too(model: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = dcvit.sweep(model, images, (0.9, 0.8, 0.7), SEARCHED)
    write = run_store.RunStore.keep

    def stopping(self: run_store.RunStore, name: str, entry: Entry) -> None:
        write(self, name, entry)
        if self.prefix == "size-2.":
            raise Stopped(name)

    monkeypatch.setattr(run_store.RunStore, "keep", stopping)
    with pytest.raises(Stopped):
        dcvit.sweep(model, images, (0.9, 0.8, 0.7), SEARCHED, run_dir=tmp_path)
    monkeypatch.undo()
    family = dcvit.sweep(model, images, (0.9, 0.8, 0.7), SEARCHED, run_dir=tmp_path)
    for member, wanted in zip(family.members, expected.members, strict=True):
        of = wanted.model.state_dict()
        assert all(torch.equal(tensor, of[name]) for name, tensor in member.model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"budget": dcvit.Budget(macs=0.8)}, r"budget\.macs was 0\.7 there and is 0\.8 here"),
        ({"config": SEARCHED.with_(seed=1)}, r"settings\.seed was 0 there and is 1 here"),
        ({"images": 1}, "images was "),
        ({"model": 1}, "model was "),
    ],
)
def test_changed_input_is_refused(
    change: dict[str, Any], named: str, model: nn.Module, images: Tensor, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    keep = run_store.RunStore.keep

    def stopping(self: run_store.RunStore, name: str, entry: Entry) -> None:
        keep(self, name, entry)
        raise Stopped(name)

    monkeypatch.setattr(run_store.RunStore, "keep", stopping)
    with pytest.raises(Stopped):
        dcvit.compress(model, images, dcvit.Budget(macs=0.7), SEARCHED, run_dir=tmp_path)
    monkeypatch.undo()
    if "images" in change:
        images = images.flip(0)
    if "model" in change:
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
    with pytest.raises(RunStoreError, match=named):
        dcvit.compress(
            model, images, change.get("budget", dcvit.Budget(macs=0.7)), change.get("config", SEARCHED),
            run_dir=tmp_path,
        )  # fmt: skip


def test_a_method_that_keeps_nothing_refuses(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(dcvit.DcvitError, match=r"run_dir with method='practise': only dcvit can resume"):
        dcvit.compress(model, images, dcvit.Budget(macs=0.7), method="practise", run_dir=tmp_path)


COMMAND = ["compress", "demo", "--data", "digits", "--macs", "0.8", "--epochs", "1", "--synthesis-iterations", "3"]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run on the command line that has finished two units."""
    command = [sys.executable, "-m", "dcvit", *COMMAND, "--out", str(tmp_path / "out")]

    def interruptible() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background job has ignored

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible) as process:
        entries = tmp_path / "out.run" / "units"
        while process.poll() is None and len(list(entries.glob("*.json"))) < 2:
            time.sleep(0.05)
        assert process.poll() is None
        yield process
        process.kill()


@pytest.mark.slow
def test_an_interrupt_on_the_command_line_says_how_to_go_on(started: subprocess.Popen[str], tmp_path: Path) -> None:
    started.send_signal(signal.SIGINT)
    assert started.stderr is not None
    error = started.stderr.read()
    assert started.wait() == 130
    assert f"The same command resumes from the checkpoints in {str(tmp_path / 'out.run')!r}." in error
    assert not (tmp_path / "out").exists()
    kept = json.loads((tmp_path / "out.run" / "run.json").read_text())
    assert kept["budget"]["macs"] == 0.8


def on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line compresses with few views."""

    def quickly(*args: Any, **kwargs: Any) -> dcvit.CompressionResult:
        *given, config = args
        if isinstance(config.recovery, dcvit.config.ReconstructionConfig):
            config = config.with_(recovery=SEARCHED.recovery)
        return dcvit.compress(*given, config, **kwargs)

    monkeypatch.setattr("dcvit.cli.compress.compress", quickly)


@pytest.mark.slow
@pytest.mark.parametrize("named", slow_but([False, True], False))
def test_the_folder_is_deleted_in_the_end_unless_it_was_named(
    named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_command_line(monkeypatch)
    mine = tmp_path / ("mine" if named else "out.run")
    options = ["--run-dir", str(mine)] if named else []
    assert main([*COMMAND, "--out", str(tmp_path / "out"), *options]) == 0
    assert (tmp_path / "out" / "report.html").is_file()
    assert mine.exists() == named
    assert sorted(path.name for path in tmp_path.iterdir()) == (["mine", "out"] if named else ["out"])


def test_other_methods_need_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def caught(*args: Any, **kwargs: Any) -> None:
        seen.append(kwargs["run_dir"])
        raise KeyboardInterrupt

    monkeypatch.setattr("dcvit.cli.compress.compress", caught)
    command = ["compress", "demo", "--data", "digits", "--macs", "0.8", "--method", "fskd"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 130
    assert seen == [None]


@pytest.mark.slow
def test_the_current_folder_has_one_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_command_line(monkeypatch)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main([*COMMAND, "--out", "."]) == 0
    assert (tmp_path / "here" / "result.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_saved_folder_is_there_whole_or_not_at_all(
    model: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, or out of room, at any moment of a save."""
    result = dcvit.compress(model, images, dcvit.Budget(macs=0.8), SEARCHED)
    seen: list[bool] = []

    def full(*args: Any, **kwargs: Any) -> None:
        seen.append((tmp_path / "small").exists())
        raise OSError(28, "No space left on device")

    for name in ("result.save_file", "result.write_text", "saving.os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(f"dcvit.artifacts.{name}", full)
            with pytest.raises(dcvit.errors.SaveFolderError, match="No space left on device"):
                result.save(tmp_path / "small")
    assert seen == [False] * 3
    assert not list(tmp_path.iterdir())
    result.save(tmp_path / "small")
    assert dcvit.load(tmp_path / "small").plan == result.plan
