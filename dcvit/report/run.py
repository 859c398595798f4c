"""The report of one compression, made only from its saved folder."""

import base64
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image
from torch import Tensor

from dcvit.artifacts.card import part_names, pruning_kind, shared_weights
from dcvit.artifacts.result import (
    FAMILY_FILE,
    REPORT_FILE,
    RESULT_FILE,
    ProxyImages,
    Record,
    check_report_file,
    read_json,
    read_record,
)
from dcvit.artifacts.saving import replace_file
from dcvit.errors import DcvitError, SaveFolderError
from dcvit.history import ComparisonRow, ModelFigures, Probe, Report
from dcvit.report.charts import (
    Curve,
    Row,
    amount,
    block_bars,
    block_stages,
    block_structure,
    curves,
    dot_rows,
    number,
    row_bars,
)
from dcvit.report.family import saved_family_page
from dcvit.report.page import Figure, Gallery, Key, Page, Picture, Section, Table, Tile, settings_table
from dcvit.report.svg import Marker
from dcvit.runtime.earlier import in_present_words, settings_of_earlier_versions
from dcvit.serialization import from_plain

__all__ = ["run_page", "write_page", "write_report"]

MOST_POINTS = 60
"""Largest number of points that are all shown. Of longer curves, every n-th point and the last are shown."""

PIXELATED = 64
"""Largest side of images that are shown pixel by pixel. Larger ones become thumbnails of at most twice the side."""

METRICS = {
    "distillation": "relative error of the output tokens",
    "cross_entropy": "cross-entropy of the class distributions",
}


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into the folder of a saved result or family, without running a model.

    Args:
        folder: A folder that `CompressionResult.save`, `Family.save`, `dcvit compress` or `dcvit sweep` wrote.

    Returns:
        The path of the report.

    Raises:
        SaveFolderError: If the folder holds no valid result or family, or a `report.html` that dcvit did not write.
    """
    path = Path(folder) / FAMILY_FILE
    try:
        if os.path.lexists(path):
            return write_page(saved_family_page(in_present_words(read_json(path))), Path(folder) / REPORT_FILE)
        path = Path(folder) / RESULT_FILE
        return write_page(run_page(read_record(folder)), Path(folder) / REPORT_FILE)
    except DcvitError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise SaveFolderError(
            f"{str(path)!r} is inconsistent ({type(error).__name__}: {error}): compress again."
        ) from error


def write_page(page: Page, path: Path) -> Path:
    """Write a page to a file and replace an earlier report.

    Raises:
        SaveFolderError: If the file exists and is not a report, or cannot be written. An existing file is then kept.
    """
    check_report_file(path)
    replace_file(path, page.html())
    return path


def run_page(record: Record) -> Page:
    """Return the page of a saved result. The page lists what the result does not hold."""
    plan, report = record.plan, record.report
    original, used = (_spent(record, figures) for figures in (report.teacher, report.student))
    chosen = f"They were chosen among {len(plan.candidates)} candidates" if report.probes else "They were recovered"
    if report.pruning_probes:
        tried = f"{len(report.probes)} blocks without their attention and of {len(report.pruning_probes)} with it"
        chosen = f"They were chosen by probes of {tried},"
    text = [
        f"{_compressed(record)} {chosen} with {report.num_images} unlabelled images{_by_method(report)}. The budget "
        f"was {_budget(record)}; {_figure(used)} are used.",
    ]
    probes = _probes(record) if report.probes else None
    sections = [_comparison(record), probes, _architecture(record), _recovery(record), _proxy_set(record)]
    return Page(
        title=f"{report.model}, compressed to {100 * used / original:.1f}\N{NO-BREAK SPACE}% of its {_unit(record)}",
        text=text,
        tiles=tuple(_tiles(record)),
        sections=[*(section for section in sections if section is not None), _time(record), _settings(record)],
        not_recorded=tuple(_not_recorded(record)),
    )


def _compressed(record: Record) -> str:
    """Describe in a sentence or two how the blocks were compressed."""
    plan = record.plan
    if plan.token_keep_rates:
        listed = ", ".join(f"{block} ({rate:g})" for block, rate in plan.token_keep_rates.items())
        return f"These blocks keep only a share of the patch tokens behind their attention: {listed}."
    if shared := shared_weights(record.values["plan"]):
        return f"Weights are shared: {'; '.join(shared)}."
    if pruning_kind(record.values) == "dropped":
        return f"These blocks were dropped whole: {', '.join(map(str, sorted(plan.blocks)))}."
    sentences = []
    if plan.kept_heads:
        listed = ", ".join(f"{block} ({len(heads)})" for block, heads in plan.kept_heads.items())
        sentences.append(f"These blocks lost attention heads (heads that each keeps): {listed}.")
    names = part_names(record.values)
    for lost, blocks in (
        (f"lost their {names.mixing}", [block for block in sorted(plan.blocks) if block not in plan.pruned]),
        ("have a convolution instead of their attention", plan.convolved),
        (
            f"lost {names.units} and keep their {names.mixing}",
            [block for block in plan.pruned if block not in plan.convolved],
        ),
    ):
        if blocks:
            listed = ", ".join(f"{block} ({len(plan.kept_units[block]):,})" for block in blocks)
            sentences.append(f"These blocks {lost} ({names.units} that each keeps): {listed}.")
    return f"{' '.join(sentences)} The drop ratio is {plan.drop_ratio:.3f}."


def _by_method(report: Report) -> str:
    """Name the method, unless it is dcvit's own."""
    return "" if report.method == "dcvit" else f" by the method {report.method}"


def _tiles(record: Record) -> Iterator[Tile]:
    report, held_out = record.report, "comparison" in record.values
    teacher, student = report.teacher, report.student
    costs: tuple[tuple[str, Any, Any, Callable[[Any], str]], ...] = (
        ("MACs", teacher.macs, student.macs, amount),
        ("parameters", teacher.params, student.params, amount),
        ("latency, ms", teacher.latency_ms, student.latency_ms, number),
    )
    for name, before, after, form in costs:
        yield Tile(name, f"{100 * after / before:.1f} %", f"{form(before)} → {form(after)}")
    # A demonstration is evaluated on images that no stage has seen; other runs only have the few-shot images.
    evaluated_on = "on held-out images" if held_out else "on the few-shot images"
    if report.agreement is not None:
        yield Tile("agreement", f"{100 * report.agreement:.2f} %", evaluated_on)
    if teacher.top1 is not None and student.top1 is not None:
        before, after = 100 * teacher.top1, 100 * student.top1
        yield Tile("top-1", f"{after:.2f} %", f"original {before:.2f} %, {evaluated_on}")
    if report.refinement is not None:
        detail = "mean squared, output tokens, on validation views"
        yield Tile("distillation error", number(report.refinement.error_after), detail)
    else:
        yield Tile(
            "distillation error",
            number(report.distillation_loss),
            "mean squared, output tokens, on the few-shot images",
        )


def _comparison(record: Record) -> Section | None:
    """Compare the methods of a demonstration over its few-shot sets."""
    if "comparison" not in record.values:
        return None
    methods = _compared(record)
    seeds = len(methods[0].seeds)

    def spread_of(index: int, measure: str) -> _Spread:
        return methods[index].top1 if measure == "top1" else methods[index].agreement

    smaller = [index for index, method in enumerate(methods) if method.macs < record.report.teacher.macs]
    best = {
        measure: max(smaller, key=lambda index: spread_of(index, measure).mean) for measure in ("top1", "agreement")
    }

    def cell(index: int, measure: str) -> str:
        value = spread_of(index, measure)
        spread = f"\N{NO-BREAK SPACE}± {100 * value.std:.2f}" if seeds > 1 else ""
        return f"{100 * value.mean:.2f}{spread}" + ("\N{NO-BREAK SPACE}▲" if best[measure] == index else "")

    def figure(measure: str, name: str) -> Figure:
        rows = []
        for index, method in enumerate(methods):
            values = [100 * (row.top1 if measure == "top1" else row.agreement) for row in method.rows]
            css = "plain" if index not in smaller else "other" if "block dropping" in method.method else "accent"
            rows.append(Row(method.method, css, values, mean(values)))
        table = Table(
            ("method", *(f"few-shot set {seed}" for seed in methods[0].seeds), "mean"),
            [(row.name, *map(number, row.values), number(row.mean)) for row in rows],
            marked=frozenset({best[measure]}),
        )
        winner = rows[best[measure]].name
        text = f"A dot for each few-shot set, a bar for their mean. Highest of the smaller models: {winner}."
        return Figure(name, lambda width: dot_rows(width, rows, name), table, text)

    table = Table(
        ("method", "top-1 %", "agreement with the original %", "MACs", "parameters", "latency, ms"),
        [
            (
                method.method, cell(index, "top1"), cell(index, "agreement"), amount(method.macs),
                amount(method.params), number(method.latency_ms.mean),
            )
            for index, method in enumerate(methods)
        ],
        marked=frozenset(best.values()),
        title="▲ highest of the smaller models",
    )  # fmt: skip
    sets = "one few-shot set" if seeds == 1 else f"{seeds} few-shot sets"
    text = [
        f"On held-out images, from {record.report.num_images} unlabelled images per set, over {sets}. The smaller "
        "models cost the same to within one hidden unit. The sections below show the first set."
    ]
    return Section(
        "Methods compared",
        text,
        [figure("top1", "top-1 %"), figure("agreement", "agreement with the original %"), table],
    )


@dataclass(frozen=True)
class _Spread:
    """Mean and standard deviation of a figure over few-shot sets."""

    mean: float
    std: float


@dataclass(frozen=True)
class _Compared:
    """The figures of one method of a demonstration."""

    method: str
    seeds: tuple[int, ...]
    top1: _Spread
    agreement: _Spread
    latency_ms: _Spread
    macs: int
    params: int
    rows: tuple[ComparisonRow, ...]


@dataclass(frozen=True)
class _Comparison:
    """The figures of all methods of a demonstration."""

    methods: tuple[_Compared, ...]


def _compared(record: Record) -> Sequence[_Compared]:
    """Return the methods of a demonstration.

    Raises:
        SaveFolderError: If the saved values are not those of a demonstration.
    """
    try:
        found = from_plain(_Comparison, {"methods": record.values["comparison"]}).methods
        for method in found:
            if not 0 < len(found[0].seeds) == len(method.seeds) == len(method.rows):
                raise ValueError(
                    f"{method.method} has {len(method.rows)} rows, {found[0].method} {len(found[0].seeds)}"
                )
        if all(method.macs >= record.report.teacher.macs for method in found):
            raise ValueError("no method made the original smaller")
    except (TypeError, ValueError) as error:
        raise SaveFolderError(
            f"The comparison in {RESULT_FILE} is not what a demonstration saves ({error}): run it again."
        ) from error
    return found


def _probes(record: Record) -> Section:
    """Show how well each candidate recovers, and which candidates were chosen."""
    plan, report = record.plan, record.report
    chosen = set(plan.blocks) - set(plan.pruned)
    metric = METRICS.get(str(_ablation(report).get("metric")), "metric loss")
    if report.method == "practise":
        metric = "distillation loss over the share of MACs saved"
    done = "dropped" if pruning_kind(record.values) == "dropped" else "compressed"
    losses = {probe.block: probe.metric_loss for probe in sorted(report.probes, key=lambda probe: probe.block)}
    ranked = Table(
        ("rank", "block", "metric loss", "chosen"),
        [
            (str(rank), str(probe.block), number(probe.metric_loss), "yes" if probe.block in chosen else "")
            for rank, probe in enumerate(report.probes, 1)
        ],
        marked=_marked(report.probes, chosen),
    )
    keys = [Key("chosen", "accent", "circle"), Key("not chosen", "plain", "circle")]
    figures = [
        Figure(
            "Ranking of the candidates",
            lambda width: block_bars(width, losses, chosen, metric),
            ranked,
            f"In each probe, one candidate block is {done} and recovered. Lower is better.",
            keys,
        ),
        _stages_figure(report.probes, chosen, keys),
    ]
    title, hint = "Expected loss by the hidden units that a block keeps", "As the probes of single blocks predict it"
    figures += [
        _profiles_figure(name, probes, prune_mlps, metric, f"{hint}; ✓ marks the {kind} ones.")
        for name, probes, prune_mlps, kind in (
            (title, report.probes, chosen, "chosen"),
            (f"{title}, with attention", report.pruning_probes, set(plan.pruned), "pruned"),
        )
        if any(probe.sensitivity is not None for probe in probes)
    ]
    return Section("Which blocks recover", items=figures)


def _profiles_figure(title: str, probes: Sequence[Probe], chosen: set[int], metric: str, text: str) -> Figure:
    """Draw the sensitivity curve of each block: its expected loss by the hidden units that it keeps."""
    profiles = {probe.block: probe.sensitivity for probe in probes if probe.sensitivity is not None}
    lines = [
        Curve(f"block {block}" + (" ✓" if block in chosen else ""), tuple(zip(it.units, it.losses, strict=True)))
        for block, it in sorted(profiles.items())
    ]
    return _curves(title, lines, "hidden units kept", metric, text)


def _stages_figure(probes: Sequence[Probe], chosen: set[int], keys: Sequence[Key]) -> Figure:
    """Show the loss of each probe before and after its recovery."""
    reconstructed = {probe.block: probe.reconstruction for probe in probes if probe.reconstruction is not None}
    distilled = {probe.block: probe.recovery for probe in probes if probe.recovery is not None}
    stages: dict[str, Marker] = {"before recovery": "ring", "after recovery": "circle"}
    values: dict[int, tuple[float, float]]
    more: dict[int, tuple[str, ...]]
    if reconstructed:
        label = "validation error of the block"
        text = (
            "Share of what the original block adds to its input that stays unexplained on validation images, with the "
            "original weights and in closed form: 0 is perfect, 1 is no better than leaving the block out. λ is the "
            "regularisation."
        )
        values = {block: (one.error_before, one.error_after) for block, one in reconstructed.items()}
        more = {block: (number(one.ridge),) for block, one in reconstructed.items()}
        extra: tuple[str, ...] = ("λ",)
    else:
        label = "distillation loss"
        text = "Mean squared error of the output tokens on the few-shot images, before and after distillation."
        values = {block: (one.loss_before, one.loss_after) for block, one in distilled.items()}
        more = {block: (number(one.learning_rate), str(len(one.losses))) for block, one in distilled.items()}
        extra = ("learning rate", "epochs")
    blocks, seconds = sorted(values), {probe.block: number(probe.seconds) for probe in probes}
    table = Table(
        ("block", *stages, *extra, "seconds", "chosen"),
        [
            (
                str(block), *map(number, values[block]), *more[block], seconds[block],
                "yes" if block in chosen else "",
            )
            for block in blocks
        ],
        marked=frozenset(index for index, block in enumerate(blocks) if block in chosen),
    )  # fmt: skip
    drawn = [
        (name, marker, {block: values[block][index] for block in blocks})
        for index, (name, marker) in enumerate(stages.items())
    ]
    legend = [Key(name, "plain", marker) for name, marker in stages.items()]
    return Figure(
        "Each candidate before and after its recovery",
        lambda width: block_stages(width, drawn, chosen, label),
        table,
        text,
        [*legend, *keys],
    )


def _architecture(record: Record) -> Section | None:
    """Show the blocks before and after compression."""
    if not record.report.blocks:
        return None
    before = [(block.attention, block.hidden_features) for block in record.report.blocks]
    kept = {block: (False, len(units)) for block, units in record.plan.kept_units.items()}
    after = [kept.get(block, shape) for block, shape in enumerate(before)]
    if record.report.blocks_after:
        after = [(block.attention, block.hidden_features) for block in record.report.blocks_after]
    names = part_names(record.values)
    table = Table(
        ("block", *(f"{part} {when}" for part in (names.mixing, names.units) for when in ("before", "after"))),
        [
            (
                str(block), _yes(old[0]), "convolution" if block in record.plan.convolved else _yes(new[0]),
                number(old[1]), number(new[1]),
            )
            for block, (old, new) in enumerate(zip(before, after, strict=True))
        ],
        marked=frozenset(record.plan.blocks),
    )  # fmt: skip
    figure = Figure(
        "Blocks, from the first at the top to the last",
        lambda width: block_structure(width, before, after, (names.mixing, names.pointwise, names.units)),
        table,
        f"The wider a block's {names.pointwise}, the more {names.units}. Dashed: what was removed.",
        [Key("compressed", "accent", "circle"), Key("unchanged", "plain", "circle")],
    )
    return Section("Architecture before and after", items=[figure])


def _recovery(record: Record) -> Section:
    """Show the losses over time of each stage of the recovery."""
    report = record.report
    items: list[Figure | Table] = []
    text: list[str] = []
    if report.reconstructions:
        items.append(
            Table(
                ("block", "before", "closed form", "after", "λ", "best epoch"),
                [
                    (
                        str(one.block), number(one.error_before), number(one.error_closed_form),
                        number(one.error_after), number(one.ridge), str(one.epochs),
                    )
                    for one in report.reconstructions
                ],
                title="Validation error of each chosen block, front to back",
            )
        )  # fmt: skip
        lines = [
            Curve(
                f"block {one.block}",
                tuple(enumerate((_start(one.error_closed_form, one.error_before), *one.errors))),
            )
            for one in report.reconstructions
            if one.errors
        ]
        if lines:
            hint = "Epoch 0 is the closed form. The best epoch is kept."
            items.append(_curves("Gradient steps on single blocks", lines, "epoch", "validation error", hint))
    if report.refinement is not None:
        refinement = report.refinement
        if refinement.step_size == 0:
            text.append(
                "Distillation on the output tokens was left out: no pilot run improved the error on validation views."
            )
        else:
            text.append(
                f"Distillation on the output tokens: validation error {number(refinement.error_before)} before, "
                f"{number(refinement.error_after)} after {refinement.steps} steps, which were kept "
                f"(step size {refinement.step_size:g})."
            )
        if refinement.validations:
            points = ((0, refinement.error_before), *refinement.validations)
            hint = "Mean squared error of the output tokens on validation views. The best state is kept."
            title = "Distillation of the whole student"
            items.append(_curves(title, [Curve("student", points)], "step", "validation error", hint))
    elif report.reconstructions:
        text.append(
            "Distillation on the output tokens was left out: the settings (refinement_steps, refinement_macs) allow "
            "too few steps for a model of this size, or there was no image to validate on."
        )
    if report.steps:
        blocks = record.plan.blocks
        progressive = len(report.steps) == len(blocks)
        names = [f"{index + 1}. block {blocks[index]}" for index in range(len(blocks))] if progressive else ["all"]
        items.append(
            Table(
                ("step", "loss before", "loss after", "learning rate", "seconds"),
                [
                    (name, *map(number, (step.loss_before, step.loss_after, step.learning_rate, step.seconds)))
                    for name, step in zip(names, report.steps, strict=True)
                ],
                title="Distillation loss on the few-shot images, step by step",
            )
        )
        lines = [
            Curve(name, tuple(enumerate(step.losses, 1)))
            for name, step in zip(names, report.steps, strict=True)
            if step.losses
        ]
        if lines:
            hint = "Training loss of each epoch, after each step of compression."
            items.append(
                _curves("Distillation after each step of compression", lines, "epoch", "distillation loss", hint)
            )
    if report.learning_rate:
        rate = "Peak learning rate" if report.steps else "Step size of the gradient steps on blocks"
        text.append(f"{rate}: {number(report.learning_rate)}.")
    return Section("Recovery over time", text, items)


def _proxy_set(record: Record) -> Section | None:
    """Show the synthesised images and the loss that made them."""
    images = record.images
    if images is None:
        return None
    items: list[Figure | Gallery] = [
        Gallery(tuple(_pictures(images)), pixelated=max(images.pixels.shape[2:]) <= PIXELATED)
    ]
    if images.losses:
        line = Curve("loss", tuple(enumerate(images.losses, 1)))
        hint = "Cross-entropy and image prior. The images of the lowest loss are kept."
        items.append(_curves("Synthesis", [line], "iteration", "loss", hint))
    report = record.report
    validates = _ablation(report).get("metric") == "distillation" and report.reconstructions and report.num_images > 1
    ranked = "they and validation views of few-shot images rank the blocks" if validates else "they rank the blocks"
    text = f"{len(images.pixels)} images, made only from the original model, for random classes; {ranked}."
    return Section("Synthesised images", [text], items)


def _time(record: Record) -> Section:
    title, seconds = "Wall-clock time of each stage", record.report.seconds
    texts = {name: f"{value:.2f} s" for name, value in seconds.items()}
    figure = Figure(
        title, lambda width: row_bars(width, seconds, texts, title), Table(("stage", "time"), list(texts.items()))
    )
    return Section("Time", [f"{sum(seconds.values()):.1f} s in all."], [figure])


def _settings(record: Record) -> Section:
    report = record.report
    run = {
        "model": report.model,
        "method": report.method,
        "budget": _budget(record),
        "unlabelled images": report.num_images,
        "seed": report.seed,
        "candidates": record.plan.candidates,
    }
    items = [settings_table(run, "Run")]
    if report.settings:
        items.append(settings_table(report.settings, "Settings"))
    return Section("Settings and versions", items=[*items, settings_table(report.versions, "Versions")])


def _ablation(report: Report) -> Mapping[str, Any]:
    """Return the ablation settings under the names of this version."""
    found = settings_of_earlier_versions(report.settings).get("ablation")
    return found if isinstance(found, Mapping) else {}


def _not_recorded(record: Record) -> Iterator[str]:
    report = record.report
    if not report.settings:
        yield "the settings: the result was saved by an earlier dcvit"
    if not report.blocks:
        yield "the original's blocks, and so the drawing of the architecture: saved by an earlier dcvit"
    if record.images is None and report.method == "dcvit":
        few_shot = _ablation(report).get("ranking_images") == "few-shot"
        reason = "blocks were ranked on the few-shot images, which are never saved" if few_shot else (
            "blocks were ranked on the caller's own images, or the result was saved by an earlier dcvit"
        )  # fmt: skip
        yield f"synthesised images: {reason}"
    refinement = report.refinement
    if any(one.epochs and not one.errors for one in report.reconstructions) or (
        refinement is not None and refinement.steps and not refinement.validations
    ):
        yield "the errors over time: saved by an earlier dcvit"


def _curves(title: str, lines: Sequence[Curve], x_label: str, y_label: str, text: str) -> Figure:
    """Return a figure of curves with a table of their numbers; both show the same points."""
    positions = sorted({position for line in lines for position, _ in line.points})
    every = -(-len(positions) // MOST_POINTS)
    if every > 1:
        shown = {*positions[::every], positions[-1]}
        lines = [Curve(line.name, [point for point in line.points if point[0] in shown]) for line in lines]
        text += f" One {x_label} in {every} is shown, and the last."
    values = [dict(line.points) for line in lines]
    table = Table(
        (x_label, *(line.name for line in lines)),
        [
            (number(position), *(number(value.get(position)) for value in values))
            for position in sorted(set(chain.from_iterable(values)))
        ],
    )
    return Figure(title, lambda width: curves(width, lines, x_label, y_label), table, text)


def _pictures(images: ProxyImages) -> Iterator[Picture]:
    for pixels, target in zip(images.pixels, images.targets.tolist(), strict=True):
        yield Picture(_data_uri(pixels), f"class {target}")


def _data_uri(pixels: Tensor) -> str:
    """Encode a uint8 image `[C, H, W]` as a data URI. One that is neither grey nor RGB is averaged over channels."""
    channels, *size = pixels.shape
    shown = pixels if channels in (1, 3) else pixels.float().mean(0, keepdim=True).round().to(pixels)
    array = shown.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    buffer = io.BytesIO()
    if max(size) <= PIXELATED:
        kind = "png"
        image.save(buffer, kind)
    else:
        kind = "jpeg"
        image.thumbnail((2 * PIXELATED, 2 * PIXELATED))
        image.save(buffer, kind, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


METRIC_NAMES = {
    "macs": "MACs",
    "params": "parameters",
    "file_size": "bytes in a file",
    "activation_memory": "bytes of activations",
    "latency": "milliseconds of latency",
    "latency_ms": "milliseconds of latency",
}


def _spent(record: Record, figures: ModelFigures) -> float:
    """Return the cost of a model in the budget's metric."""
    metric = record.plan.budget.metric
    found: float | None = getattr(figures, "latency_ms" if metric == "latency" else metric)
    assert found is not None, metric
    return found


def _unit(record: Record) -> str:
    return METRIC_NAMES[record.plan.budget.metric]


def _figure(value: float) -> str:
    """Format counts in full, and times with four significant digits."""
    return f"{value:,}" if isinstance(value, int) else number(value)


def _budget(record: Record) -> str:
    budget, plan = record.plan.budget, record.plan
    shared = isinstance(budget.value, float) and budget.metric != "latency_ms"
    fraction = f", {100 * budget.value:g}\N{NO-BREAK SPACE}% of the original" if shared else ""
    convention = f", {budget.convention.replace('_', ' ')}" if budget.metric == "macs" else ""
    return f"{_figure(plan.target)} {_unit(record)}{fraction}{convention}"


def _marked(probes: Sequence[Probe], chosen: set[int]) -> frozenset[int]:
    return frozenset(index for index, probe in enumerate(probes) if probe.block in chosen)


def _start(closed_form: float | None, before: float) -> float:
    return before if closed_form is None else closed_form


def _yes(value: bool) -> str:
    return "yes" if value else "no"
