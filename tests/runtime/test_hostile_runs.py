"""Run folders that someone else made or changed: nothing outside is touched, nothing forged is used, nothing hangs."""

import copy
import hashlib
import json
import multiprocessing
import os
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dcvit
from dcvit.errors import DamagedEntryWarning, DcvitWarning, RunStoreError
from dcvit.history import Plan
from dcvit.runtime.checkpoint import Check, Entry, RunStore, delete_run, open_run
from dcvit.search.latency import plan_latency, require_planned
from tests.conftest import CUT_REFINED, PUBLISHED, QUICK, slow_but
from tests.metrics.test_latency import MODEL, Clock

OF = {"settings": {"seed": 0}}

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs the files and locks of a POSIX system")


@pytest.fixture(autouse=True)
def _not_for_ever() -> Iterator[None]:
    """Opening a FIFO waits for its other end; a test that hangs fails."""

    def hangs(signum: int, frame: Any) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(240)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of the user's with a file that no run may touch."""
    folder = tmp_path / "outside"
    (folder / "inside").mkdir(parents=True)
    for path in (folder / "precious", folder / "t.json", folder / "inside" / "t.json.part"):
        path.write_text("precious")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished(folder: Path) -> Path:
    with open_run(folder, OF) as store:
        store.keep("t", Entry([1], {"w": torch.ones(2)}))
    return folder


NAMES = ["lock", "run.json", "run.json.part", "units", "units/t.json", "units/t.safetensors"]


def in_place_of(path: Path, make: Callable[[Path], object]) -> None:
    """Put something else where a run has a file or folder."""
    if path.is_dir():
        path.rename(path.parent.parent / "units before")
    else:
        path.unlink(missing_ok=True)
    make(path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ["precious", "inside", "nowhere"])
def test_no_link_is_followed(name: str, target: str, tmp_path: Path, outside: Path) -> None:
    run, before = finished(tmp_path / "run"), contents(outside)
    in_place_of(run / name, lambda path: path.symlink_to(outside / target))
    refused = pytest.raises(RunStoreError, match=rf"holds something else \({name} is a link\): name a folder")
    with refused, open_run(run, OF) as store:
        store.entry("t", lambda: Entry(2, {"w": torch.zeros(2)}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DcvitWarning)
        delete_run(run)
    assert contents(outside) == before
    assert not (outside / "nowhere").exists()
    assert (run / name).is_symlink()  # dcvit did not make it


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["FIFO", "folder"])
def test_special_files_are_named_and_nothing_hangs(
    name: str, make: Callable[[Path], None], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if name == "units" and make is os.mkdir:
        pytest.skip("it is a folder")
    run, kind = finished(tmp_path / "run"), request.node.callspec.id.split("-")[0]
    in_place_of(run / name, make)
    with pytest.raises(RunStoreError, match=rf"holds something else \({name} is a {kind}\)"), open_run(run, OF):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DcvitWarning)
        delete_run(run)
    assert (run / name).exists()


def test_a_link_in_place_of_the_folder_itself_is_refused(tmp_path: Path, outside: Path) -> None:
    before = contents(outside)
    for target in ("inside", "nowhere", "precious"):
        link = tmp_path / target
        link.symlink_to(outside / target)
        with pytest.raises(RunStoreError, match="is a link, not a folder: name the fol"), open_run(link, OF):
            pass
        with pytest.warns(DcvitWarning, match=r"not deleted.* is a link"):
            delete_run(link)
    assert contents(outside) == before
    assert not (outside / "nowhere").exists()


@pytest.mark.parametrize("text", ["my notes\n", "process\n", "process 7 on here\nmore", "x" * 10_000])
def test_a_users_own_file_named_lock_stays_as_it_is(text: str, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(text)
    with pytest.raises(RunStoreError, match=r"holds something else \(lock\)"), open_run(tmp_path, OF):
        pass
    with pytest.warns(DcvitWarning, match=r"not deleted.*something else \(lock\)"):
        delete_run(tmp_path)
    assert (tmp_path / "lock").read_text() == text


def test_a_lock_that_is_another_file_too_stays_as_it_is(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "run").mkdir()
    os.link(outside / "precious", tmp_path / "run" / "lock")
    with pytest.raises(RunStoreError, match=r"holds something else \(lock\)"), open_run(tmp_path / "run", OF):
        pass
    assert (outside / "precious").read_text() == "precious"


@pytest.mark.parametrize(
    "present",
    [
        ["run.json.part"],
        ["lock", "run.json.part"],
        [".holiday.dcvit-draft-0123456789abcdef"],
        ["units/my.json.part"],
        ["units/notes.txt", "units/my.json.part"],
        ["units/notes.txt"],
        ["units/.t.json.dcvit-draft-0123456789abcdef"],
    ],
)
def test_a_users_own_files_with_the_names_of_leftovers_stay(present: list[str], tmp_path: Path) -> None:
    """Only a folder in which a run began, by its `run.json` or what its lock says, can have leftovers of one."""
    for name in present:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name == "lock" else "precious")
    with pytest.raises(RunStoreError, match=r"holds something else \("), open_run(tmp_path, OF):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DcvitWarning)
        delete_run(tmp_path)
    assert all((tmp_path / name).read_text() == "precious" for name in present if name != "lock")


def test_foreign_files_among_the_units_of_a_run_are_refused(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    for name in ("notes.txt", ".My notes.dcvit-draft-0123456789abcdef"):
        (run / "units" / name).write_text("precious")
        with (
            pytest.raises(RunStoreError, match=rf"holds something else \(units/{re.escape(name)}\)"),
            open_run(run, OF),
        ):
            pass
        assert (run / "units" / name).read_text() == "precious"
        (run / "units" / name).unlink()


def test_leftovers_of_a_killed_run_are_deleted(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    left = [".run.json", "units/.t.json", "units/.probe", f"units/.{'long.' * 20}"]
    left = [run / f"{name}.dcvit-draft-0123456789abcdef" for name in left] + [run / "units" / "u.safetensors.part"]
    for path in left:
        path.write_text("unfinished")
    with open_run(run, OF):
        assert not any(path.exists() for path in left)


def test_an_empty_file_of_another_name_is_no_lock(tmp_path: Path) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    run.mkdir()
    mine.touch()
    os.link(mine, run / "lock")
    with pytest.raises(RunStoreError, match=r"holds something else \(lock\)"), open_run(run, OF):
        pass
    assert mine.read_text() == ""


def test_a_refusal_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to("elsewhere")
    with pytest.raises(RunStoreError) as refusal, open_run(tmp_path, OF):
        pass
    assert str(refusal.value) == (
        f"run_dir={str(tmp_path)!r} holds something else (lock is a link): name a folder that is empty or does not "
        "exist."
    )


def test_a_users_own_run_json_is_neither_replaced_nor_deleted(tmp_path: Path) -> None:
    for text in ('{"name": "mine"}', '{"format": "png"}', '{"format": 1}', '{"format": 1, "settings": "mine"}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(RunStoreError, match="holds another run"), open_run(tmp_path, OF):
            pass
        with pytest.warns(DcvitWarning, match=r"not deleted.*something else \(run\.json\)"):
            delete_run(tmp_path)
        assert (tmp_path / "run.json").read_text() == text


def test_only_what_a_run_wrote_is_deleted(tmp_path: Path, outside: Path) -> None:
    run = finished(tmp_path / "run")
    (run / "units" / "notes.txt").write_text("precious")
    (run / "units" / "link.json").symlink_to(outside / "t.json")
    (run / "units" / ".t.json.dcvit-draft-0123456789abcdef").write_text("unfinished")
    delete_run(run)
    assert sorted(path.name for path in run.rglob("*")) == ["link.json", "notes.txt", "units"]
    assert (outside / "t.json").read_text() == "precious"
    # Units without a `run.json` may be anyone's.
    (run / "units" / "u.json").write_text("{}")
    delete_run(run)
    assert (run / "units" / "u.json").exists()


def hold(folder: str, ready: Any) -> None:
    with open_run(folder, OF):
        ready.set()
        signal.pause()


def test_a_run_that_is_in_use_is_not_deleted(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(str(run), ready))
    process.start()
    assert ready.wait(60)
    before = contents(run)
    with pytest.warns(DcvitWarning, match=rf"not deleted\. .*in use by process {process.pid} on "):
        delete_run(run)
    assert contents(run) == before
    process.kill()
    process.join()
    delete_run(run)
    assert not run.exists()


def test_a_relative_folder_is_the_same_one_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with open_run("run", OF) as store:
        monkeypatch.chdir(tmp_path / "elsewhere")
        store.keep("t", Entry(1))
    assert (tmp_path / "run" / "units" / "t.json").is_file()
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"format": ' + "9" * 5000 + "}", '{"settings": ' + "[" * 900 + "]" * 900 + "}"],
    ids=["nested", "digits", "nested value"],
)
def test_a_hostile_run_json_is_a_sentence(text: str, tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    (run / "run.json").write_text(text)
    with pytest.raises(RunStoreError, match=r"cannot be read|holds another run") as refusal, open_run(run, OF):
        pass
    assert len(str(refusal.value)) < 1000


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("name", [".", "units", "lock", "run.json"])
def test_no_permission_is_a_sentence(name: str, tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    (run / name).chmod(0)
    try:
        with pytest.raises(RunStoreError, match="Permission denied"), open_run(run, OF):
            pass
        with pytest.warns(DcvitWarning, match=r"not deleted.*Permission denied"):
            delete_run(run)
    finally:
        (run / name).chmod(0o700)


def test_a_folder_that_takes_no_file_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished(tmp_path / "run")

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dcvit.runtime.checkpoint.probe_folder", full)
    with pytest.raises(RunStoreError, match="No space left on device"), open_run(run, OF):
        pass


def test_a_unit_is_no_copy_of_another(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    for ending in ("json", "safetensors"):
        (run / "units" / f"u.{ending}").write_bytes((run / "units" / f"t.{ending}").read_bytes())
    with open_run(run, OF) as store, pytest.warns(DamagedEntryWarning, match="it is a copy of 't'"):
        assert store.find("u") is None


# Forged units, with digests that fit


def digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def forge(entry: Path, values: Any, tensors: dict[str, Tensor] | None) -> None:
    """Write a unit as an attacker would who knows how its digests are made."""
    of_tensors = None
    if tensors is not None:
        save_file(tensors, entry.with_suffix(".safetensors"))
        of_tensors = hashlib.sha256(entry.with_suffix(".safetensors").read_bytes()).hexdigest()
    kept = {"name": entry.name.removesuffix(".json"), "values": values, "tensors": of_tensors}
    entry.write_text(json.dumps({"entry": kept, "sha256": digest(kept)}))


Place = tuple[Any, ...]


def places(values: Any, at: Place = ()) -> Iterator[Place]:
    """Every place in plain values; of a list the first."""
    yield at
    if isinstance(values, dict):
        for key, value in values.items():
            yield from places(value, (*at, key))
    elif isinstance(values, list) and values:
        yield from places(values[0], (*at, 0))


def changed(values: Any, at: Place, change: Callable[[Any], Any]) -> Any:
    if not at:
        return change(values)
    new = copy.copy(values)
    new[at[0]] = changed(values[at[0]], at[1:], change)
    return new


HOSTILE = [None, True, "x", [], {}, [[]], -1, 10**6, 2**62, float("nan"), [0, 0], [-1], [10**6]]

REPORTED = {
    "seconds", "loss_before", "loss_after", "losses", "ridge", "error_before", "error_closed_form", "error_after",
    "errors", "epochs", "validations", "loss", "steps", "step_size",
}  # fmt: skip
"""What a unit tells of how its work went: some of it decides, but one number is as likely as another there."""


def forged_values(values: Any) -> Iterator[tuple[Place, str, Any]]:
    """Values that are forged in one place: the place, in words what is forged, and the values."""
    for at in places(values):
        for hostile in HOSTILE:
            yield at, f"is {hostile}", changed(values, at, lambda _, new=hostile: new)
        if isinstance(found := _at(values, at), dict):
            yield at, "has a key more", changed(values, at, lambda old: {**old, "more": 1})
            for key in found:
                without = {other: value for other, value in found.items() if other != key}
                yield (*at, key), "is missing", changed(values, at, lambda _, new=without: new)
        elif isinstance(found, list) and found:
            for shown, new in (
                ("repeats", [found[-1], *found[1:]]),
                ("is longer", [*found, found[-1]]),
                ("is shorter", found[:-1]),
            ):
                if new != found:
                    yield at, shown, changed(values, at, lambda _, new=new: new)


def _at(values: Any, at: Place) -> Any:
    for key in at:
        values = values[key]
    return values


def forged_tensors(tensors: dict[str, Tensor] | None) -> Iterator[tuple[str, dict[str, Tensor] | None]]:
    if tensors is None:
        yield "tensors where there are none", {"weight": torch.ones(2)}
        return
    yield "no tensors", None
    yield "a tensor more", {**tensors, "more": torch.ones(2)}
    for name in (min(tensors), max(tensors)):
        tensor = tensors[name]
        yield f"{name} is missing", {key: of for key, of in tensors.items() if key != name} or None
        for shown, other in (
            ("of another shape", tensor[..., None].clone()),
            ("empty", tensor.new_empty(0)),
            ("of another dtype", tensor.to(torch.float16 if tensor.is_floating_point() else torch.int32)),
            ("huge", torch.full_like(tensor, 2**62 if tensor.dtype == torch.int64 else float("inf"))),
            ("NaN or negative", torch.full_like(tensor, -1 if tensor.dtype == torch.int64 else float("nan"))),
        ):
            yield f"{name} is {shown}", {**tensors, name: other}


@dataclass(frozen=True)
class Forgery:
    """A unit with something forged in it.

    Attributes:
        name: The unit's.
        at: The place among its values; empty where a tensor is forged.
        shown: What is forged, in words.
        values: The unit's values then.
        tensors: Its tensors then, if it has any.
    """

    name: str
    at: Place
    shown: str
    values: Any
    tensors: dict[str, Tensor] | None


def forgeries(entries: Path) -> Iterator[Forgery]:
    """Forgeries of a unit of each kind of a finished run."""
    kinds = {re.sub("[0-9]+", "N", path.stem): path for path in sorted(entries.glob("*.json"), reverse=True)}
    for path in kinds.values():
        values = json.loads(path.read_text())["entry"]["values"]
        tensors = load_file(path.with_suffix(".safetensors")) if path.with_suffix(".safetensors").exists() else None
        for at, shown, forged in forged_values(values):
            yield Forgery(path.stem, at, shown, forged, tensors)
        for shown, others in forged_tensors(tensors):
            yield Forgery(path.stem, (), shown, values, others)


def alike(found: nn.Module, wanted: nn.Module) -> bool:
    states = found.state_dict(), wanted.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(x, states[1][name]) for name, x in states[0].items()
    )


def checks_of(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[RunStore, str, Check]]:
    """By the name of each unit the store that it is asked of, its name there, and the check that it must pass."""
    found: dict[str, tuple[RunStore, str, Check]] = {}
    find = RunStore.find

    def asked(self: RunStore, name: str, check: Check | None = None) -> Entry | None:
        assert check is not None, f"{name} is restored unchecked"
        found[self.prefix + name] = self, name, check
        return find(self, name, check)

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "find", asked)
        run()
    return found


Case = Callable[[Path | None], list[nn.Module]]


def compressed(config: dcvit.DCViT, macs: float, model: nn.Module, images: Tensor) -> Case:
    return lambda run_dir: [dcvit.compress(model, images, dcvit.Budget(macs=macs), config, run_dir=run_dir).model]


def swept(model: nn.Module, images: Tensor) -> Case:
    return lambda run_dir: [
        member.model for member in dcvit.sweep(model, images, (0.9, 0.7), QUICK, run_dir=run_dir).members
    ]


@pytest.fixture(params=slow_but(["refined", "published", "sweep"], "published"))
def case(request: pytest.FixtureRequest, model: nn.Module, images: Tensor) -> Case:
    """Something that restores units; between them all kinds but a measured plan."""
    return {
        "refined": compressed(CUT_REFINED, 0.7, model, images),
        "published": compressed(PUBLISHED, 0.62, model, images),
        "sweep": swept(model, images),
    }[request.param]


@pytest.mark.filterwarnings("ignore::dcvit.errors.DamagedEntryWarning")
def test_forged_units_are_computed_again(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is forged is refused where it is read, or changes nothing but what the report tells."""
    wanted = case(tmp_path)
    checks = checks_of(lambda: case(tmp_path), monkeypatch)
    entries = tmp_path / "units"
    honest = contents(entries)
    assert {f"{name}.json" for name in checks} == {name for name in honest if name.endswith(".json")}
    refused: dict[str, Forgery] = {}
    for forgery in forgeries(entries):
        name = forgery.name
        forge(entries / f"{name}.json", forgery.values, forgery.tensors)
        store, of_store, check = checks[name]
        if store.find(of_store, check) is None:
            refused[name] = forgery
        elif not REPORTED & {*map(str, forgery.at)}:
            found = case(tmp_path)
            assert all(map(alike, found, wanted)), forgery
        for suffix in ("json", "safetensors"):
            (entries / f"{name}.{suffix}").unlink(missing_ok=True)
            if f"{name}.{suffix}" in honest:
                (entries / f"{name}.{suffix}").write_bytes(honest[f"{name}.{suffix}"])
    for name, forgery in refused.items():  # all at once
        forge(entries / f"{name}.json", forgery.values, forgery.tensors)
    with pytest.warns(DamagedEntryWarning) as told:
        found = case(tmp_path)
    assert len(told) == len(refused) >= 3
    assert all(map(alike, found, wanted))
    with warnings.catch_warnings():
        warnings.simplefilter("error", DamagedEntryWarning)
        case(tmp_path)  # they are mended


@pytest.mark.slow
def test_a_forged_measured_plan_is_refused() -> None:
    config, budget = dcvit.DCViT(), dcvit.Budget(latency=0.75)
    honest = plan_latency(MODEL, budget, config, stopwatch=Clock()).to_dict()
    honest = json.loads(json.dumps(honest))
    require_planned(Plan.from_dict(honest), MODEL, budget, config)
    for at, shown, forged in forged_values(honest):
        if "timings" in at or {"depth", "block_ms", "compressed_ms"} & {*at} or forged == honest:
            continue  # what was measured on the way is for the report
        try:
            require_planned(Plan.from_dict(forged), MODEL, budget, config)
        except (ValueError, TypeError):
            continue
        assert Plan.from_dict(forged) == Plan.from_dict(honest), (at, shown)
