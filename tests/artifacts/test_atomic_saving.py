"""What is saved is the old or the new, whole: at every failure, at every kill, beside readers, on a full disk.

Savers run in a forked process. An audit hook counts the calls by which Python changes files; the n-th of them fails or
ends the process. A limit on the size of files does the same to what native code writes.
"""

import copy
import errno
import functools
import io
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dcvit
from dcvit.artifacts import export
from dcvit.cli import main
from dcvit.errors import SaveFolderError
from dcvit.models import compressible
from dcvit.report import run_page, write_report
from tests.conftest import QUICK, slow_but
from tests.variants import VARIANTS

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning"),
]

DONE, REFUSED, BROKEN = 0, 3, 4


@dataclass(frozen=True)
class Child:
    """How a forked process ended: its exit code, `-signal` if one ended it; how many calls changed files."""

    code: int
    calls: int
    error: str


def in_child(
    action: Callable[[], object],
    *,
    at: int = 0,
    kill: bool = False,
    most_bytes: int | None = None,
    umask: int | None = None,
    directory: Path | None = None,
) -> Child:
    """Run something in a forked process whose `at`-th call that changes files fails, or kills it.

    Args:
        action: What to run.
        at: From 1; none if 0.
        kill: Whether the process is killed; else the call fails.
        most_bytes: What a file may hold; a longer one fails or kills.
        umask: Of the process.
        directory: Its current folder.
    """
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        with os.fdopen(reader, encoding="utf-8") as pipe:
            text = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        calls, _, error = text.partition("\n")
        return Child(code, int(calls or 0), error)
    code, error, calls = BROKEN, "", 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, "No space left on device")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        renamed = event == "ctypes.dlsym" and arguments[1] in ("renameat2", "renamex_np")
        if opened or renamed or event in ("os.mkdir", "os.rename", "os.chmod", "os.remove", "os.rmdir"):
            count()

    fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:
        count()
        fsync(descriptor)

    try:
        if umask is not None:
            os.umask(umask)
        if directory is not None:
            os.chdir(directory)
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)
        os.fsync = counted_fsync
        sys.addaudithook(hook)
        action()
        code = DONE
    except SaveFolderError as refusal:
        code, error = REFUSED, str(refusal)
    except BaseException:
        error = traceback.format_exc()
    finally:
        at = 0
        os.write(writer, f"{calls}\n{error}"[:4000].encode())
        os._exit(code)


def snapshot(path: Path) -> dict[str, bytes]:
    """Every file of a folder, but for those of hidden folders and hidden files, which are drafts."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    }


def snapshot_of_export(path: Path) -> dict[str, bytes]:
    """The same without weights that no model names, and which the next export deletes."""
    found = snapshot(path)
    models = [content for name, content in found.items() if not name.endswith(".data")]
    return {
        name: content
        for name, content in found.items()
        if not name.endswith(".data") or any(name.encode() in model for model in models)
    }


def leftovers(path: Path) -> list[str]:
    return [str(found) for found in path.rglob(".*")]


def marked(result: dcvit.CompressionResult, seed: int) -> dcvit.CompressionResult:
    """A result whose model and report both say which it is."""
    model: Any = copy.deepcopy(result.model)
    with torch.no_grad():
        model.head.bias.fill_(seed)
    return replace(result, model=model, report=replace(result.report, seed=seed))


@pytest.fixture
def config_known(results: tuple[dcvit.CompressionResult, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves need not find out the model's config, which takes much longer than writing the files."""
    found = compressible(results[0].model).config()
    known = SimpleNamespace(config=lambda: found)
    monkeypatch.setattr("dcvit.artifacts.result.compressible", lambda model: known)


@pytest.fixture(scope="module")
def results() -> tuple[dcvit.CompressionResult, dcvit.CompressionResult]:
    """Two that fit into one another's files: the same shapes, other weights."""
    result = dcvit.compress(VARIANTS["plain"].create(), torch.randn(2, 3, 32, 32), dcvit.Budget(macs=0.8), QUICK)
    return marked(result, 1), marked(result, 2)


@pytest.fixture(scope="module")
def families(results: tuple[dcvit.CompressionResult, ...]) -> tuple[dcvit.Family, dcvit.Family]:
    """Two of one and of two members, the first of which have one name."""
    one, two = results
    smaller = replace(two, report=replace(two.report, student=replace(two.report.student, macs=1000)))
    return dcvit.Family(one.report.teacher, [one]), dcvit.Family(two.report.teacher, [two, smaller])


@dataclass(frozen=True)
class Saver:
    """A way to save, of an old and a new version, to a folder."""

    old: Callable[[Path], object]
    new: Callable[[Path], object]


def always_old_or_new(
    saver: Saver, tmp_path: Path, snapshot: Callable[[Path], dict[str, bytes]] = snapshot, *, step: int = 1
) -> int:
    """Fail and kill at each `step`-th call that changes files, and at files of each size; how many kills that were."""
    saver.old(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    saver.new(tmp_path / "new")
    old, new = snapshot(tmp_path / "old"), snapshot(tmp_path / "new")
    assert old != new
    shutil.copytree(tmp_path / "old", tmp_path / "count" / "out")
    counted = in_child(lambda: saver.new(tmp_path / "count" / "out"))
    assert (counted.code, counted.error) == (DONE, "")
    assert not leftovers(tmp_path / "count")
    largest = max(len(content) for name, content in new.items() if old.get(name) != content)
    cases: list[dict[str, Any]] = [{"at": at} for at in {*range(1, counted.calls + 1, step), counted.calls}]
    cases += [{"most_bytes": int(largest * share)} for share in (0, 0.01, 0.1, 0.5, 0.9, 0.999)]
    kills, seen, top = 0, set(), tmp_path / "case"
    for kill in (False, True):
        for case in cases:
            shutil.copytree(tmp_path / "old", top / "out")
            child = in_child(lambda: saver.new(top / "out"), kill=kill, **case)
            assert child.code in ((-signal.SIGKILL, -signal.SIGXFSZ) if kill else (DONE, REFUSED)), (case, child)
            assert kill or child.error.count("\n") == 0
            kills += kill
            found = snapshot(top / "out")
            assert found in (old, new), (case, child, sorted(found))
            assert {path.name for path in top.iterdir() if not path.name.startswith(".")} == {"out"}
            seen.add(found == new)
            if kill and kills % 8 == 0:  # what was left blocks nothing, and goes
                saver.new(top / "out")
                assert snapshot(top / "out") == new
                assert not any(map(os.path.isdir, leftovers(top)))
            shutil.rmtree(top)
    assert seen == {False, True}
    return kills


@pytest.mark.usefixtures("config_known")
@pytest.mark.parametrize("step", slow_but([4, 1], 4), ids=["each fourth call", "each call"])
def test_overwriting_a_result_is_all_or_nothing(
    step: int, results: tuple[dcvit.CompressionResult, ...], tmp_path: Path
) -> None:
    one, two = results
    page = run_page(dcvit.artifacts.result.Record(one.plan, one.report, None, one.to_dict())).html()
    saver = Saver(lambda out: one.save(out, page=lambda record: page), lambda out: two.save(out, overwrite=True))
    assert always_old_or_new(saver, tmp_path, step=step) > 40 / step


@pytest.mark.slow
@pytest.mark.usefixtures("config_known")
def test_overwriting_a_family_is_all_or_nothing(families: tuple[dcvit.Family, ...], tmp_path: Path) -> None:
    one, two = families
    saver = Saver(one.save, lambda out: two.save(out, overwrite=True))
    assert always_old_or_new(saver, tmp_path) > 60


def test_a_report_is_all_or_nothing(results: tuple[dcvit.CompressionResult, ...], tmp_path: Path) -> None:
    page = run_page(
        dcvit.artifacts.result.Record(results[0].plan, results[0].report, None, results[0].to_dict())
    ).html()
    saver = Saver(lambda out: results[0].save(out, page=lambda record: f"{page}<!-- old -->"), write_report)
    assert always_old_or_new(saver, tmp_path) > 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_but(["torch-export", "onnx", "onnx and weights"], "torch-export"))
def test_an_export_is_all_or_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    format: Any = kind.split()[0]
    if format == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    if kind == "onnx and weights":
        monkeypatch.setattr(export, "SINGLE_FILE_BYTES", 0)
    model = VARIANTS["plain"].create()
    program = export._trace(export._plain(model, torch.float32))
    monkeypatch.setattr(export, "_trace", lambda model: program)  # traced once, for time
    name = "model" + export.SUFFIXES[format]
    monkeypatch.setattr(export, "_compare", lambda *arguments: {})
    for reader in ("_read_onnx", "_read_program"):
        monkeypatch.setattr(export, reader, lambda *arguments: None)
    monkeypatch.setattr(export.secrets, "token_hex", lambda size: "0" * 2 * size)  # so that files compare
    if format == "onnx":
        converted = torch.onnx.export(program, (), dynamo=True, dynamic_shapes=export._dynamic_shapes(), verbose=False)
        monkeypatch.setattr(torch.onnx, "export", lambda *arguments, **options: converted)
    else:
        save = torch.export.save

        @functools.cache
        def archived(told: str) -> bytes:
            archive = io.BytesIO()
            save(program, archive, extra_files={"dcvit.json": told})
            return archive.getvalue()

        monkeypatch.setattr(
            torch.export, "save", lambda program, file, extra_files: file.write(archived(extra_files["dcvit.json"]))
        )

    def put(out: Path, version: str) -> None:
        out.mkdir(exist_ok=True)
        monkeypatch.setattr(export, "__version__", version)
        monkeypatch.setattr(export.secrets, "token_hex", lambda size: version * 2 * size)
        export.export_model(model, out / name, format=format, overwrite=True)

    saver = Saver(lambda out: put(out, "1"), lambda out: put(out, "2"))
    assert always_old_or_new(saver, tmp_path, snapshot_of_export) > 10


# In place: a mount point and the current folder cannot be exchanged for others.


@pytest.mark.slow
@pytest.mark.usefixtures("config_known")
def test_the_current_folder_holds_the_old_or_the_new_or_does_not_load(
    results: tuple[dcvit.CompressionResult, ...], tmp_path: Path
) -> None:
    one, two = results
    one.save(tmp_path / "old")
    two.save(tmp_path / "new")
    old, new = snapshot(tmp_path / "old"), snapshot(tmp_path / "new")
    top = tmp_path / "case"
    shutil.copytree(tmp_path / "old", top)
    before = top.stat().st_ino
    calls = in_child(lambda: two.save(".", overwrite=True), directory=top).calls
    assert snapshot(top) == new
    assert top.stat().st_ino == before  # whoever is in it stays in it
    assert not leftovers(top)
    parts = 0
    for kill in (False, True):
        for at in range(1, calls + 1):
            shutil.rmtree(top)
            shutil.copytree(tmp_path / "old", top)
            child = in_child(lambda: two.save(".", overwrite=True), at=at, kill=kill, directory=top)
            found = snapshot(top)
            if found in (old, new):
                continue
            assert kill, (at, child, sorted(found))
            assert found.items() < old.items() or found.items() < new.items(), "a mixture"
            parts += 1
            with pytest.raises(SaveFolderError):
                dcvit.load(top)
            assert main(["info", f"local-dir:{top}"]) == 2
    assert parts > 5
    two.save(top, overwrite=True)
    assert snapshot(top) == new
    assert not leftovers(top)


def test_files_of_two_saves_do_not_load(
    results: tuple[dcvit.CompressionResult, ...], families: tuple[dcvit.Family, ...], tmp_path: Path
) -> None:
    for name, result in zip(("one", "two"), results, strict=True):
        result.save(tmp_path / name)
    shutil.copy(tmp_path / "two" / "model.safetensors", tmp_path / "one")
    with pytest.raises(SaveFolderError, match=r"model\.safetensors' is not the file that result\.json was saved with"):
        dcvit.load(tmp_path / "one")
    values = json.loads((tmp_path / "one" / "result.json").read_text())
    del values["digests"]  # as earlier versions saved it
    (tmp_path / "one" / "result.json").write_text(json.dumps(values))
    assert dcvit.load(tmp_path / "one").report.seed == 1

    for number, family in enumerate(families):
        family.save(tmp_path / f"family-{number}")
    name = families[0].name(families[0].members[0])
    shutil.rmtree(tmp_path / "family-0" / name)
    shutil.copytree(tmp_path / "family-1" / name, tmp_path / "family-0" / name)
    with pytest.raises(SaveFolderError, match=r"is not the member that family\.json was saved with"):
        dcvit.load_family(tmp_path / "family-0")


@pytest.mark.parametrize("digests", [[1], "x", None, 1, {}])
def test_digests_of_another_type_are_refused(
    digests: Any, results: tuple[dcvit.CompressionResult, ...], tmp_path: Path
) -> None:
    results[0].save(tmp_path / "out")
    values = json.loads((tmp_path / "out" / "result.json").read_text())
    (tmp_path / "out" / "result.json").write_text(json.dumps({**values, "digests": digests}))
    with pytest.raises(SaveFolderError, match="copy the whole folder again, or compress again"):
        dcvit.load(tmp_path / "out")


@pytest.mark.slow
def test_a_reader_beside_a_writer_sees_one_version(
    results: tuple[dcvit.CompressionResult, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    results[0].save(out)
    writer = os.fork()
    if not writer:
        try:
            while os.getppid() != 1:
                for result in reversed(results):
                    result.save(out, overwrite=True)
        finally:
            os._exit(1)
    try:
        seen = set()
        for _ in range(15):
            loaded: Any = dcvit.load(out)
            assert loaded.model.head.bias[0] == loaded.report.seed
            seen.add(loaded.report.seed)
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    assert seen == {1, 2}


# Permissions.


def modes(path: Path) -> dict[str, int]:
    return {found.name: stat.S_IMODE(found.stat().st_mode) for found in (path, *path.rglob("*"))}


@pytest.mark.parametrize("umask", slow_but([0o077, 0o022, 0o002], 0o022))
def test_the_umask_decides_who_may_read(
    umask: int, families: tuple[dcvit.Family, ...], results: tuple[dcvit.CompressionResult, ...], tmp_path: Path
) -> None:
    def save() -> None:
        families[0].save(tmp_path / "family")
        write_report(tmp_path / "family")

    assert in_child(save, umask=umask).code == DONE
    for path in (tmp_path / "family", *(tmp_path / "family").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_a_replaced_folder_keeps_its_permissions(
    results: tuple[dcvit.CompressionResult, ...], families: tuple[dcvit.Family, ...], tmp_path: Path
) -> None:
    for name, saver in (("out", results[0]), ("family", families[0])):
        saver.save(tmp_path / name)
        (tmp_path / name).chmod(0o2750)
        saver.save(tmp_path / name, overwrite=True)
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o2750
    (tmp_path / "empty").mkdir(mode=0o700)
    results[0].save(tmp_path / "empty")
    assert stat.S_IMODE((tmp_path / "empty").stat().st_mode) == 0o700
    write_report(tmp_path / "out").chmod(0o640)
    assert stat.S_IMODE(write_report(tmp_path / "out").stat().st_mode) == 0o640


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may give files away")
def test_what_is_replaced_keeps_its_owner(
    results: tuple[dcvit.CompressionResult, ...], families: tuple[dcvit.Family, ...], tmp_path: Path
) -> None:
    def owners(path: Path) -> set[tuple[int, int, int]]:
        return {(found.stat().st_uid, found.stat().st_gid, found.is_dir()) for found in (path, *path.rglob("*"))}

    for name, saver in (("out", results[0]), ("family", families[0])):
        saver.save(tmp_path / name)
        os.chown(tmp_path / name, 1234, 2345)
        (tmp_path / name).chmod(0o2770)
        saver.save(tmp_path / name, overwrite=True)
        assert owners(tmp_path / name) == {(1234, 2345, False), (1234, 2345, True)}
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o2770
    assert in_child(lambda: results[1].save(".", overwrite=True), directory=tmp_path / "out").code == DONE  # in place
    assert owners(tmp_path / "out") == {(1234, 2345, False), (1234, 2345, True)}
    page = write_report(tmp_path / "out")
    model = dcvit.export_model(results[0].model, tmp_path / "model.pt2", format="torch-export").path
    for file, write in (
        (page, lambda: write_report(tmp_path / "out")),
        (model, lambda: dcvit.export_model(results[0].model, model, format="torch-export", overwrite=True)),
    ):
        os.chown(file, 3456, 4567)
        file.chmod(0o640)
        write()
        assert (file.stat().st_uid, file.stat().st_gid, stat.S_IMODE(file.stat().st_mode)) == (3456, 4567, 0o640)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL])
def test_who_may_give_nothing_away_can_still_save(
    number: int, results: tuple[dcvit.CompressionResult, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dcvit.runtime import files

    def refuse(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "file").write_text("")
    found = list((tmp_path / "file").stat())
    found[4] += 1
    monkeypatch.setattr(os, "chown", refuse)
    files.take_owner(tmp_path / "file", os.stat_result(found))


# Links.


def test_a_link_to_a_folder_stays_and_the_folder_is_replaced(
    results: tuple[dcvit.CompressionResult, ...], tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    results[0].save(tmp_path / "disk" / "out")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    results[1].save(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert dcvit.load(tmp_path / "disk" / "out").report.seed == 2
    (tmp_path / "dangling").symlink_to(tmp_path / "unmounted" / "out")
    with pytest.raises(SaveFolderError, match="which is not a folder: create it, or name another"):
        results[0].save(tmp_path / "dangling")
    assert not (tmp_path / "unmounted").exists()


def test_what_is_not_a_file_of_dcvits_is_not_deleted(
    results: tuple[dcvit.CompressionResult, ...], families: tuple[dcvit.Family, ...], tmp_path: Path
) -> None:
    results[0].save(tmp_path / "out")
    (tmp_path / "out" / "model.onnx").mkdir()
    (tmp_path / "out" / "model.onnx" / "mine").write_text("mine")
    with pytest.raises(SaveFolderError, match=r"holds something else \(model\.onnx\)"):
        results[0].save(tmp_path / "out", overwrite=True)
    families[0].save(tmp_path / "family")
    (tmp_path / "family" / "notes.txt").write_text("mine")
    with pytest.raises(SaveFolderError, match=r"something else beside an earlier family \(notes\.txt\)"):
        families[1].save(tmp_path / "family", overwrite=True)
    assert (tmp_path / "family" / "notes.txt").read_text() == "mine"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(SaveFolderError, match=r"holds something else \(thesis\.txt\)"):
        dcvit.artifacts.result.save_model(results[0].model, tmp_path / "mine")


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.pt2", "model.onnx.data", "model-0123456789abcdef.onnx.data", "report.html"]
)
def test_a_file_of_the_user_s_with_a_name_of_dcvit_s_is_not_deleted(
    name: str, results: tuple[dcvit.CompressionResult, ...], tmp_path: Path
) -> None:
    results[0].save(tmp_path / "out")
    (tmp_path / "out" / name).write_bytes(b"mine")
    with pytest.raises(SaveFolderError, match=rf"holds something else \({name}\)"):
        results[0].save(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / name).read_bytes() == b"mine"


@pytest.mark.slow
def test_exports_in_a_folder_go_with_its_result(
    results: tuple[dcvit.CompressionResult, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    out = tmp_path / "out"
    for limit in (0, export.SINGLE_FILE_BYTES):
        results[0].save(out, overwrite=True)
        saved = {path.name for path in out.iterdir()}
        monkeypatch.setattr(export, "SINGLE_FILE_BYTES", limit)
        dcvit.export_model(results[0].model, out / "model.onnx")
        dcvit.export_model(results[0].model, out / "model.pt2", format="torch-export")
        assert len(list(out.iterdir())) == len(saved) + (2 if limit else 3)
        (out / "model.onnx.data").write_bytes(b"mine")  # which the export does not name
        with pytest.raises(SaveFolderError, match=r"holds something else \(model\.onnx\.data\)"):
            results[0].save(out, overwrite=True)
        (out / "model.onnx.data").unlink()
        results[0].save(out, overwrite=True)
        assert {path.name for path in out.iterdir()} == saved


def test_an_onnx_model_of_the_user_s_is_not_deleted(
    results: tuple[dcvit.CompressionResult, ...], tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    out = tmp_path / "out"
    results[0].save(out)
    graph = onnx.helper.make_graph([], "dcvit", [], [])
    onnx.save(onnx.helper.make_model(graph, producer_name="dcvit"), out / "model.onnx")
    with pytest.raises(SaveFolderError, match=r"holds something else \(model\.onnx\)"):
        results[0].save(out, overwrite=True)
    with pytest.raises(SaveFolderError, match="is not a file that dcvit exported"):
        dcvit.export_model(results[0].model, out / "model.onnx", overwrite=True)
    assert (out / "model.onnx").is_file()


def test_a_family_without_a_page_keeps_no_earlier_page(families: tuple[dcvit.Family, ...], tmp_path: Path) -> None:
    families[0].save(tmp_path / "family")
    write_report(tmp_path / "family")
    families[1].save(tmp_path / "family", overwrite=True)
    assert not (tmp_path / "family" / "report.html").exists()


# Exports.


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_an_export_replaces_only_exports(format: Any, tmp_path: Path) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    path = tmp_path / f"model{export.SUFFIXES[format]}"
    path.write_bytes(b"a file of mine")
    with pytest.raises(SaveFolderError, match="is not a file that dcvit exported"):
        dcvit.export_model(VARIANTS["plain"].create(), path, format=format, overwrite=True)
    assert path.read_bytes() == b"a file of mine"
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SaveFolderError, match="is a link"):
        dcvit.export_model(VARIANTS["plain"].create(), path, format=format, overwrite=True)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, export.SINGLE_FILE_BYTES])
def test_an_export_deletes_only_the_weights_of_the_one_it_replaces(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export, "SINGLE_FILE_BYTES", limit)
    mine = {tmp_path / "model.onnx.data", tmp_path / "model-0123456789abcdef.onnx.data"}
    for path in mine:
        path.write_bytes(b"mine")
    for overwrite in (False, True):
        dcvit.export_model(VARIANTS["plain"].create(), tmp_path / "model.onnx", overwrite=overwrite)
        assert all(path.read_bytes() == b"mine" for path in mine)
        assert len(list(tmp_path.iterdir())) == (3 if limit else 4)


def test_the_folder_of_a_killed_export_can_be_overwritten(
    results: tuple[dcvit.CompressionResult, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results[0].save(tmp_path / "out")

    def die(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(export, "_trace", lambda model: None)
    monkeypatch.setattr(export, "_write_program", die)
    asked = ["export", str(tmp_path / "out"), "--format", "torch-export"]
    assert in_child(lambda: main(asked)).code == -signal.SIGKILL
    assert leftovers(tmp_path / "out")
    results[1].save(tmp_path / "out", overwrite=True)
    assert not leftovers(tmp_path / "out")


# Places that take no file.


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root can write to")
@pytest.mark.parametrize(
    "command",
    [
        ["compress", "demo", "--data", "digits", "--macs", "0.9", "--out", "/proc/out"],
        ["sweep", "demo", "--out", "/proc/out"],
        ["demo", "--out", "/proc/out"],
        ["synthesize", "demo", "--out", "/proc/out"],
        ["latency", "demo", "--json", "/proc/out.json"],
        ["export", "FOLDER", "--format", "timm", "--out", "/proc/out"],
        ["export", "FOLDER", "--format", "torch-export", "--out", "/proc/out/model.pt2"],
    ],
    ids=lambda command: " ".join(command[:1] + command[-3:-2]),
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    command: list[str],
    results: tuple[dcvit.CompressionResult, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the work began")

    for name in (
        "compress.compress", "sweep.sweep", "demo.compare", "synthesize.synthesize", "latency.compare_latency",
        "export.compare_rounded",
    ):  # fmt: skip
        monkeypatch.setattr(f"dcvit.cli.{name}", work)
    monkeypatch.setattr(export, "_trace", work)
    results[0].save(tmp_path / "small")
    assert main([str(tmp_path / "small") if part == "FOLDER" else part for part in command]) == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_what_was_computed_is_saved_elsewhere_when_its_place_is_gone(
    results: tuple[dcvit.CompressionResult, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "disk" / "out"
    out.parent.mkdir()
    run = out.with_name("out.run")

    def compress(*arguments: Any, **options: Any) -> dcvit.CompressionResult:
        run.mkdir()
        (run / "run.json").write_text("{}")
        out.parent.rename(tmp_path / "gone")
        out.parent.write_text("the disk is gone, and a file is in its place")
        return results[0]

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("dcvit.cli.compress.compress", compress)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert main(["compress", "demo", "--data", "digits", "--macs", "0.9", "--num-images", "2", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "What was computed is saved as '" in error
    (saved,) = (tmp_path / "temporary").glob("dcvit-*/out")
    assert repr(str(saved)) in error
    assert dcvit.load(saved).report.seed == 1
    assert (tmp_path / "gone" / "out.run" / "run.json").is_file()  # the run is kept too


# A full disk, and one of its own.


@pytest.mark.slow
@pytest.mark.parametrize("number", slow_but([errno.ENOSPC, errno.EROFS, errno.EIO], errno.ENOSPC))
@pytest.mark.parametrize("command", ["report", "torch-export", "timm"])
def test_a_disk_that_fails_is_no_bad_input(
    command: str, number: int, results: tuple[dcvit.CompressionResult, ...], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    results[0].save(tmp_path / "out")
    for module in ("runtime.files", "artifacts.saving", "artifacts.export"):
        monkeypatch.setattr(f"dcvit.{module}.sync", fail)
    asked = ["report"] if command == "report" else ["export", "--format", command]
    assert main([*asked, str(tmp_path / "out")]) == 1
    assert f"cannot be written ({os.strerror(number)})" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["timm", "torch-export"])
def test_weights_that_do_not_fit_are_no_bad_input(
    format: str, results: tuple[dcvit.CompressionResult, ...], tmp_path: Path
) -> None:
    results[0].save(tmp_path / "out")
    asked = ["export", str(tmp_path / "out"), "--format", format]
    # The whole of config.json fits; weights do not, which safetensors says in words of its own.
    assert in_child(lambda: os._exit(main(asked)), most_bytes=20_000).code == 1
    assert not (tmp_path / "out-float32").exists()
    assert not (tmp_path / "out" / "model.pt2").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["report", "report of a family", "onnx", "push"])
def test_every_writer_says_in_one_sentence_that_the_disk_is_full(
    command: str, results: tuple[dcvit.CompressionResult, ...], families: tuple[dcvit.Family, ...], tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What native code writes fails for real: a limit on the size of files stands for the full disk."""
    if command == "onnx":
        pytest.importorskip("onnxscript")
    place = tmp_path / "out"
    (families if command == "report of a family" else results)[0].save(place)
    asked = {"report": ["report"], "report of a family": ["report"], "push": ["push"]}.get(
        command, ["export", "--format", command]
    )
    asked += [str(place), *(["someone/small"] if command == "push" else [])]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capfd.readouterr()

    def run() -> None:
        code = main(asked)
        sys.stderr.flush()
        os._exit(code)

    assert in_child(run, most_bytes=5_000).code == 1
    error = capfd.readouterr().err
    assert "Traceback" not in error
    sentences = [line for line in error.splitlines() if line.startswith("dcvit: ")]
    assert len(sentences) == 1, error
    assert re.search(r"cannot be written|no copy can be made", sentences[0])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


ON_A_SMALL_DISK = """
import sys, torch, dcvit
from pathlib import Path
torch.set_num_threads(1)
result = dcvit.load(sys.argv[1])
disk = Path(sys.argv[2])
before = {path.name: path.read_bytes() for path in disk.iterdir()}
for save in (
    lambda: result.save(disk, overwrite=True),
    lambda: dcvit.export_model(result.model, disk / "model.pt2", format="torch-export"),
):
    try:
        save()
    except dcvit.errors.SaveFolderError as error:
        print(error)
    assert {path.name: path.read_bytes() for path in disk.iterdir()} == before
dcvit.load(disk)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's mount namespaces")
def test_a_full_disk_that_is_mounted_keeps_what_it_holds(
    results: tuple[dcvit.CompressionResult, ...], tmp_path: Path
) -> None:
    results[0].save(tmp_path / "small")
    size = sum(path.stat().st_size for path in (tmp_path / "small").iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size={size * 3 // 2} none {disk} && cp {tmp_path}/small/* {disk} && exec "$@"'
    unshare = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a disk of his own")
    command = [*unshare, sys.executable, "-c", ON_A_SMALL_DISK, str(tmp_path / "small"), str(disk)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 2
    assert all("cannot be written (" in line and line.endswith((" folder.", " file.")) for line in said)
