"""Translation of what earlier versions wrote, so that their folders stay usable.

Some fields of results, families and checkpoint entries had other names, see `NAMES`.

The settings of dcvit's own method were arranged differently. `metric_set`, `metric` and `progressive` were top-level
fields, `halving` belonged to the recovery, and the number of fixed views to the recovery's augmentation.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["entry_of_earlier_versions", "in_present_words", "run_of_earlier_versions", "settings_of_earlier_versions"]

RANKING_IMAGES = {"synthetic": "synthetic", "images": "few-shot"}

NAMES = {
    "judged_on": "evaluated_on",
    "judgements": "validations",
    "kept_nodes": "kept_units",
    "mimic_loss": "distillation_loss",
    "nodes": "units",
    "pruning_trials": "pruning_probes",
    "recoverability": "sensitivity",
    "trial": "probe",
    "trials": "probes",
}
"""Present names of fields, by their former names."""

DEPTH = 16
"""Levels of tables and lists in which fields are renamed; those of results are fewer."""


def in_present_words(values: Any, depth: int = DEPTH) -> Any:
    """Return plain values with each field under its present name.

    Args:
        values: Plain values of any kind.
        depth: Levels in which fields are renamed. Deeper ones hold no fields of dcvit and stay as they are.
    """
    if not depth:
        return values
    if isinstance(values, dict):
        return {NAMES.get(name, name): in_present_words(value, depth - 1) for name, value in values.items()}
    return [in_present_words(value, depth - 1) for value in values] if isinstance(values, list) else values


def entry_of_earlier_versions(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint entry's file. Earlier versions called the entry a unit.

    Args:
        table: Plain values of any kind.
    """
    return {"entry" if name == "unit" else name: value for name, value in table.items()}


def run_of_earlier_versions(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a `run.json`, with the fields of an earlier version under their present names.

    Args:
        run: Plain values of any kind.
    """
    found = dict(run)
    if "metric_set" in found:
        found["proxy_set"] = found.pop("metric_set")
    if isinstance(found.get("settings"), dict):
        found["settings"] = settings_of_earlier_versions(found["settings"])
    return found


def settings_of_earlier_versions(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of dcvit's own method, with those of an earlier version in their present form.

    Args:
        settings: Plain values, as `DCViT.to_dict` of this or an earlier version returns them.
    """
    found: dict[str, Any] = in_present_words(settings)
    if isinstance(found.get("ablation"), dict):
        found["ablation"] = _ablation(found["ablation"])
    recovery = found.get("recovery")
    if "metric_set" not in found or not isinstance(recovery, dict):
        return found
    ablation = {
        "ranking_images": RANKING_IMAGES.get(str(found.pop("metric_set"))),
        "metric": found.pop("metric", None),
        "progressive": found.pop("progressive", None),
        "halving": recovery.get("halving", False),
    }
    recovery = {name: value for name, value in recovery.items() if name != "halving"}
    fixed_views = None
    if isinstance(recovery.get("augmentation"), dict):
        augmentation = dict(recovery["augmentation"])
        fixed_views = augmentation.pop("num_views", None)
        recovery["augmentation"] = augmentation
    if recovery.get("method") == "mimicking":
        recovery |= {"method": "distillation", "fixed_views": fixed_views}
    return {**found, "recovery": recovery, "ablation": _ablation(ablation)}


def _ablation(ablation: Mapping[str, Any]) -> dict[str, Any]:
    metric = ablation.get("metric")
    return {**ablation, "metric": "distillation" if metric == "mimicking" else metric}
