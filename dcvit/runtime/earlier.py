"""What earlier versions wrote, in the words of this one, so that their folders go on to be of use.

Results, families and checkpoint entries had other names for some of their fields, see `NAMES`.

The settings of dcvit's own method had other names: `metric_set`, `metric` and `progressive` lay beside the others, and
`halving` and the fixed views within the recovery.
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
"""What a field was called, and what it is called now."""


def in_present_words(values: Any) -> Any:
    """Return plain values with each field under its present name.

    Args:
        values: Plain values, which may be anything.
    """
    if isinstance(values, dict):
        return {NAMES.get(name, name): in_present_words(value) for name, value in values.items()}
    return [in_present_words(value) for value in values] if isinstance(values, list) else values


def entry_of_earlier_versions(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint entry's file holds; earlier versions called the entry a unit.

    Args:
        table: Plain values, which may be anything.
    """
    return {"entry" if name == "unit" else name: value for name, value in table.items()}


def run_of_earlier_versions(run: Mapping[str, Any]) -> dict[str, Any]:
    """What a `run.json` says, that of an earlier version in the words of this one.

    Args:
        run: Plain values, which may be anything.
    """
    found = dict(run)
    if "metric_set" in found:
        found["proxy_set"] = found.pop("metric_set")
    if isinstance(found.get("settings"), dict):
        found["settings"] = settings_of_earlier_versions(found["settings"])
    return found


def settings_of_earlier_versions(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of dcvit's own method, those of an earlier version in the words of this one.

    Args:
        settings: Plain values as `DCViT.to_dict` gives them, or an earlier version gave them.
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
