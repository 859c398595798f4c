"""The model card: the `README.md` of a saved model, generated from the other files in its folder.

The Hugging Face hub reads its front matter: https://huggingface.co/docs/hub/model-cards.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub import ModelCardData

from dcvit.runtime.files import well_formed

__all__ = ["PartNames", "model_card", "part_names", "pruning_kind", "shared_weights"]

_HUB_LICENSES = ("apache-2.0", "apple-amlr", "apple-ascl", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "gemma", "mit")
"""Licences that timm and the hub call by the same name. The hub lists any other licence as `other`, with its name."""

_LOAD = """\
Where dcvit is installed:

```python
import dcvit, timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
```

Where it is not, use `modeling_dcvit.py` from this folder instead; it needs only torch and timm (1.0.31 or newer):

```python
import sys, timm

sys.path.insert(0, "FOLDER")
import modeling_dcvit  # registers the architecture with timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
```

That file contains only what this model needs; without dcvit, load each model in a separate process.

`FOLDER` is this folder; `huggingface_hub.snapshot_download("OWNER/NAME")` downloads it and returns its path.
"""


def model_card(result: Mapping[str, Any], config: Mapping[str, Any], *, dtype: str = "float32") -> str:
    """Return the text of a model card; names that a file gives appear as words or code, never as markdown or HTML.

    Args:
        result: The contents of `result.json`.
        config: The contents of `config.json`.
        dtype: The dtype in which the weights are stored.
    """
    report, preprocessing = result["report"], config["pretrained_cfg"]
    license_ = preprocessing.get("license")
    license_ = license_ if isinstance(license_, str) and license_ != "unknown" else None  # timm has both
    task = "image-classification" if config["num_classes"] else "image-feature-extraction"
    versions = ", ".join(f"{_name(name)} {_name(version)}" for name, version in report["versions"].items())
    sections = {
        f"# {_name(report['model'])}, compressed": _what(result),
        "## Figures": _figures(result),
        "## How to load": _LOAD,
        "## Images": _images(preprocessing),
        "## Licence": _licence(license_),
        "## Versions": f"Made with {versions}. Weights are stored in {dtype}.\n",
    }
    text = "\n".join(f"{title}\n\n{body}" for title, body in sections.items())
    return well_formed(f"---\n{_front_matter(license_, report.get('base_model'), task).to_yaml()}\n---\n\n{text}")


def _name(text: str) -> str:
    """Return a name from a file as markdown: a plain word unchanged, anything else as code, which escapes markup."""
    return text if re.fullmatch(r"[\w+-]+(\.[\d]+[\w+-]*)*", text) else _code(text)


def _code(text: str) -> str:
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _front_matter(license_: str | None, base_model: str | None, task: str) -> ModelCardData:
    known_to_hub = license_ is None or license_ in _HUB_LICENSES
    return ModelCardData(
        library_name="timm",
        pipeline_tag=task,
        tags=["timm", "dcvit", "vision-transformer", "model-compression", task],
        license=license_ if known_to_hub else "other",
        license_name=None if known_to_hub else license_,
        base_model=base_model,
    )


def pruning_kind(result: Mapping[str, Any]) -> Literal["compressed", "pruned", "mixed", "dropped"]:
    """Return what was removed from a model's blocks.

    Args:
        result: The contents of `result.json`.

    Returns:
        `compressed` if every block lost its attention and hidden units, `pruned` if every block lost only hidden units,
        `mixed` if there are blocks of both kinds, `dropped` if whole blocks were removed.
    """
    kept, pruned = result["plan"]["kept_units"], result["plan"].get("pruned", ())
    if not kept:
        return "dropped"
    return "compressed" if not pruned else "pruned" if len(pruned) == len(kept) else "mixed"


@dataclass(frozen=True)
class PartNames:
    """Names of the two sublayers of a block that can be pruned.

    Attributes:
        mixing: The sublayer that mixes positions.
        pointwise: The sublayer that processes each position separately.
        units: Its hidden units.
        units_of_block: Its hidden units, with the name of the sublayer.
    """

    mixing: str
    pointwise: str
    units: str
    units_of_block: str


def part_names(result: Mapping[str, Any]) -> PartNames:
    """Return the names of the sublayers of a model's blocks, which differ between CNNs and transformers.

    Args:
        result: The contents of `result.json`.
    """
    if result["report"].get("family") == "cnn":
        return PartNames("spatial convolution", "filters", "filters", "filters")
    return PartNames("attention", "MLP", "hidden units", "hidden units of the MLP")


def shared_weights(plan: Mapping[str, Any]) -> list[str]:
    """Describe which blocks share weights: one entry for attention, one for MLPs; an empty list if none are shared.

    Args:
        plan: The plan in `result.json`.
    """
    sentences = []
    for name, part in (("attention_of", "attention"), ("mlp_of", "MLP")):
        runs: dict[int, list[str]] = {}
        for block, owner in plan.get(name, {}).items():
            runs.setdefault(owner, []).append(str(block))
        if runs:
            listed = ", and one for ".join(", ".join(run) for run in runs.values())
            sentences.append(f"one {part} for the blocks {listed}")
    return sentences


def _what(result: Mapping[str, Any]) -> str:
    report, plan = result["report"], result["plan"]
    images, blocks, version = report["num_images"], sorted(plan["blocks"]), _name(report["versions"]["dcvit"])
    made = (
        f"{_code(report['model'])}, made smaller by dcvit {version} from {images} unlabelled "
        f"{'image' if images == 1 else 'images'}"
    )
    if report.get("method", "dcvit") != "dcvit":
        made += f" with the method {_name(report['method'])}"
    if rates := plan.get("token_keep_rates"):
        rate = next(iter(rates.values()))
        return f"{made}: after the attention of the {_named(blocks)}, only {rate:g} of the patch tokens are kept.\n"
    if shared := shared_weights(plan):
        return f"{made}: {'; '.join(shared)}. Blocks count from 0, and each has its own transformation.\n"
    if pruning_kind(result) == "dropped":
        return f"{made}: without the {_named(blocks)}.\n"
    if heads := plan.get("kept_heads"):
        listed = ", ".join(f"{block} ({len(kept)})" for block, kept in heads.items())
        made += f", with fewer attention heads in the {_plural(heads)} {listed}"
    if convolved := plan.get("convolved"):
        listed = ", ".join(map(str, convolved))
        made += f", with a convolution in place of the attention of the {_plural(convolved)} {listed}"
    left = sorted({len(units) for units in plan["kept_units"].values()})
    names = part_names(result)
    units = f"{plan['hidden_features']} {names.units_of_block} are left"
    if len(left) > 1:
        units = f"on average {units} ({left[0]} to {left[-1]})"
    without = [block for block in blocks if block not in plan.get("pruned", ())]
    if not without:
        stays = "" if convolved or names.mixing != "attention" else f"{names.mixing} stays; "
        return f"{made}: {stays}of the {_named(blocks)} {units}.\n"
    if len(without) == len(blocks):
        return f"{made}: without the {names.mixing} of {_named(blocks)}, where {units}.\n"
    return f"{made}: without the {names.mixing} of {_named(without)}; of the {_named(blocks)} {units}.\n"


def _named(blocks: Sequence[int]) -> str:
    """Return the blocks as text."""
    return f"{_plural(blocks)} {', '.join(map(str, blocks))} (counted from 0)"


def _plural(blocks: Collection[Any]) -> str:
    return "block" if len(blocks) == 1 else "blocks"


def _images(preprocessing: Mapping[str, Any]) -> str:
    channels, height, width = preprocessing["input_size"]
    size = f"{channels} {'channel' if channels == 1 else 'channels'}, {height} × {width} px"
    mean, std = (", ".join(f"{value:g}" for value in preprocessing[name]) for name in ("mean", "std"))
    return (
        f"{size}, normalised with mean ({mean}) and standard deviation ({std}). "
        "`timm.data.create_transform(**timm.data.resolve_model_data_config(model))` prepares them.\n"
    )


def _licence(license_: str | None) -> str:
    if license_ is None:
        return (
            "Unknown: the original's configuration names none. The original's terms apply to this model too; look them "
            "up where it came from.\n"
        )
    return f"The original's, as its timm configuration gives it: {_name(license_)}.\n"


def _figures(result: Mapping[str, Any]) -> str:
    teacher, student = result["teacher"], result["student"]
    rows = [
        "| | original | compressed | ratio |",
        "|---|---|---|---|",
        *(
            f"| {label} | {form.format(teacher[name])} | {form.format(student[name])} "
            f"| {student[name] / teacher[name]:.4f} |"
            for label, name, form in (
                ("MACs per image", "macs", "{:,}"),
                ("parameters", "params", "{:,}"),
                (f"latency of {_batch(result['report'])}, ms", "latency_ms", "{:.2f}"),
            )
        ),
    ]
    if teacher["top1"] is not None:
        rows.append(f"| top-1, % | {100 * teacher['top1']:.2f} | {100 * student['top1']:.2f} | |")
    convention = result["plan"]["budget"]["convention"].replace("_", " ")
    agreed = result["agreement"]
    notes = [
        f"MACs are counted {convention}. The latency was measured on the machine that compressed the model; it is a "
        "rough figure.",
        f"The mean squared error between the output tokens of both models on the unlabelled images is "
        f"{result['report']['distillation_loss']:.4g}.",
    ]
    if agreed is not None:
        notes.append(f"Both predict the same class for {100 * agreed:.2f} % of the images that they were compared on.")
    return "\n".join(rows) + "\n\n" + " ".join(notes) + "\n"


def _batch(report: Mapping[str, Any]) -> str:
    """Return a description of the batch that was timed."""
    count = report.get("latency_batch")
    return "a batch" if count is None else f"a batch of {count}"
