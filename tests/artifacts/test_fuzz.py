"""Whatever a file or a caller says, a reader returns or raises a dcvit error; DCVIT_FUZZ sets how often it is asked."""

import copy
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dcvit
from dcvit.artifacts.result import PROXY_SET_FILE, RESULT_FILE, original_name, read_json, read_record
from dcvit.cli.arguments import amount
from dcvit.compression.sweep import load_family
from dcvit.errors import DamagedEntryWarning, DcvitError, RunStoreError
from dcvit.report import run_page, saved_family_page
from dcvit.runtime.checkpoint import Entry, open_run
from tests.conftest import CUT_REFINED

Changed = Callable[[Any, st.DataObject], Any]

SPREAD = {"mean": 0.5, "std": 0.1}
COMPARISON = [
    {
        "method": method, "seeds": [0, 1], "macs": macs, "params": 5,
        "top1": SPREAD, "agreement": SPREAD, "latency_ms": SPREAD,
        "rows": [
            {"method": method, "seed": seed, "top1": 0.5, "agreement": 0.5, "macs": macs, "params": 5,
             "latency_ms": 2.0, "blocks": [1, 2]}
            for seed in (0, 1)
        ],
    }
    for method, macs in (("original", 2**40), ("block dropping (PRACTISE)", 500), ("dcvit", 500))
]  # fmt: skip
"""As `dcvit demo` adds it to a result."""

fuzz = settings(
    max_examples=int(os.environ.get("DCVIT_FUZZ", "100")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where values lie in nested tables and lists; of a long list its first and last."""
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += places(inner, (*path, key))
    elif isinstance(value, list):
        for i in {0, len(value) - 1} if value else ():
            found += places(value[i], (*path, i))
    return found


def mutated(values: Any, draw: st.DataObject) -> Any:
    """Values of which one to three were replaced, deleted or moved."""
    values = copy.deepcopy(values)
    for _ in range(draw.draw(st.integers(1, 3))):
        spots = [path for path in places(values) if path]
        if not spots:
            return values
        *way, last = draw.draw(st.sampled_from(spots))
        holder = values
        for step in way:
            holder = holder[step]
        if draw.draw(st.booleans()):
            holder[last] = draw.draw(anything)
        else:
            del holder[last]
    return values


def contradicting(values: Any, draw: st.DataObject) -> Any:
    """Values of which each fits its place, and one to three do not fit the others.

    A list is cut, or holds an entry twice or in another order; a number or a block's name is one of another place.
    """
    values = copy.deepcopy(values)
    for _ in range(draw.draw(st.integers(1, 3))):
        spots = [path for path in places(values) if path]
        *way, last = draw.draw(st.sampled_from(spots))
        holder = values
        for step in way:
            holder = holder[step]
        found = holder[last]
        if isinstance(found, list) and found:
            i, j = (draw.draw(st.integers(0, len(found) - 1)) for _ in range(2))
            holder[last] = draw.draw(
                st.sampled_from([found[:i], found[i:], [*found, found[i]], found[::-1], found * 2])
            )
            holder[last][j : j + 1] = [] if draw.draw(st.booleans()) else holder[last][j : j + 1]
        elif isinstance(holder, dict) and str(last).isdigit():
            holder[str(draw.draw(st.integers(0, 99)))] = holder.pop(last)
        elif isinstance(found, int | float) and not isinstance(found, bool):
            other = draw.draw(st.sampled_from([0, 1, -1, 2, 7, 99, 2**62, found + 1, found - 1]))
            holder[last] = other if isinstance(found, int) else draw.draw(st.sampled_from([other, 1e308, 5e-324, -0.5]))
    return values


def bytes_like(valid: bytes) -> st.SearchStrategy[bytes]:
    """Bytes from anywhere, and a valid file with some of them changed, or cut off."""

    def changed(edits: list[tuple[int, int]], length: int) -> bytes:
        content = bytearray(valid)
        for at, byte in edits:
            content[at % len(content)] = byte
        return bytes(content[: length % (len(content) + 1)])

    edits = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=4)
    return st.binary(max_size=64) | st.builds(changed, edits, st.integers(0, 2**20))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fuzz") / "small"
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    dcvit.compress("demo", images, dcvit.Budget(macs=0.7), CUT_REFINED).save(place)
    return place


def refused_or_done(call: Callable[[], object]) -> bool:
    """Whether a call returned; any error but dcvit's own goes through."""
    try:
        call()
    except DcvitError:
        return False
    return True


@fuzz
@given(st.dictionaries(st.sampled_from([*dcvit.budget.METRICS, "batch_size", "convention"]), scalars, max_size=3))
def test_budgets(fields: dict[str, Any]) -> None:
    refused_or_done(lambda: dcvit.Budget(**fields))


@fuzz
@given(st.data(), st.sampled_from([mutated, contradicting]))
def test_results(folder: Path, data: st.DataObject, changed: Changed) -> None:
    """Of a demonstration, too: what is read is checked before a page is drawn, which then needs no net."""
    file = folder / RESULT_FILE
    valid = file.read_bytes()
    values = json.loads(valid)
    if data.draw(st.booleans()):
        values["comparison"] = COMPARISON
    try:
        file.write_text(json.dumps(changed(values, data)))
        refused_or_done(lambda: run_page(read_record(folder)).html().encode())
        refused_or_done(lambda: original_name(folder))
    finally:
        file.write_bytes(valid)


@fuzz
@given(st.data())
def test_bytes_of_results_and_metric_sets(folder: Path, data: st.DataObject) -> None:
    file = folder / data.draw(st.sampled_from([RESULT_FILE, PROXY_SET_FILE]))
    valid = file.read_bytes()
    try:
        file.write_bytes(data.draw(bytes_like(valid)))
        refused_or_done(lambda: run_page(read_record(folder)).html())
    finally:
        file.write_bytes(valid)


@settings(fuzz, max_examples=fuzz.max_examples // 10)  # each builds a model
@given(st.data())
def test_model_folders(folder: Path, data: st.DataObject) -> None:
    """Whatever a config says: no code of the folder runs, and no more memory is taken than its weights are worth."""
    file = folder / data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    valid = file.read_bytes()
    try:
        if file.suffix == ".json" and data.draw(st.booleans()):
            file.write_text(json.dumps(mutated(json.loads(valid), data)))
        else:
            file.write_bytes(data.draw(bytes_like(valid)))
        refused_or_done(lambda: dcvit.load(folder))
    finally:
        file.write_bytes(valid)


@fuzz
@given(st.data())
def test_units(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A unit is what was written, or it is computed again."""
    place = tmp_path_factory.getbasetemp() / "units"
    entry = Entry({"loss": 0.5, "order": [1, 2]}, {"w": torch.ones(2)})
    with open_run(place, {}) as store:
        store.entry("u", lambda: entry)
    file = data.draw(st.sampled_from(["u.json", "u.safetensors"]))
    valid = (place / "units" / file).read_bytes()
    (place / "units" / file).write_bytes(data.draw(bytes_like(valid)))
    with warnings.catch_warnings(), open_run(place, {}) as store:
        warnings.simplefilter("ignore", DamagedEntryWarning)
        found = store.entry("u", lambda: entry)
    assert found.values == entry.values
    assert torch.equal(found.tensors["w"], entry.tensors["w"])


@fuzz
@given(st.data())
def test_run_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    place = tmp_path_factory.getbasetemp() / "run-files"
    of = {"settings": {"seed": 0, "views": [1, 2]}}
    if not place.exists():
        with open_run(place, of) as store:
            store.keep("unit", Entry(1))  # or there would be nothing to mix with another run's
    valid = json.dumps({"format": 1, **of}).encode()
    content = data.draw(bytes_like(valid) | anything.map(lambda values: json.dumps(values).encode()))
    (place / "run.json").write_bytes(content)
    try:
        with open_run(place, of):
            assert json.loads(content) == json.loads(valid)
    except RunStoreError:
        assert (place / "run.json").read_bytes() == content


@fuzz
@given(st.data(), st.sampled_from([mutated, contradicting]))
def test_indices_of_families(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, data: st.DataObject, changed: Changed
) -> None:
    place = tmp_path_factory.getbasetemp() / "family"
    place.mkdir(exist_ok=True)
    figures = json.loads((folder / RESULT_FILE).read_text())["teacher"]
    point = {"name": "original", "kind": "original", "macs": 9, "params": 9, "latency_ms": 2.0}
    points = [point, *({**point, "kind": "dcvit", "name": f"{n}", "macs": n, "agreement": n / 9} for n in (8, 7, 6))]
    index = {
        "format": 1, "original": figures, "members": [{"folder": "macs-8"}, {"folder": "macs-7"}], "points": points,
        "model": "demo", "num_images": 4, "evaluated_on": "images", "settings": {"a": {"b": [1]}},
        "versions": {"a": "1"},
    }  # fmt: skip
    (place / "family.json").write_text(json.dumps(changed(index, data)))
    assert not refused_or_done(lambda: load_family(place))  # there is no member
    refused_or_done(lambda: saved_family_page(read_json(place / "family.json")).html().encode())


@fuzz
@given(st.text(max_size=12))
def test_amounts_on_the_command_line(text: str) -> None:
    import argparse

    try:
        amount(text)
    except (argparse.ArgumentTypeError, DcvitError):
        return
