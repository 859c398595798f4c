"""What earlier versions wrote, in the words of this one, so that their folders go on to be of use.

The settings of dcvit's own method had other names: `metric_set`, `metric` and `progressive` lay beside the others, and
`halving` and the fixed views within the recovery.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["run_of_earlier_versions", "settings_of_earlier_versions"]

RANKING_IMAGES = {"synthetic": "synthetic", "images": "few-shot"}


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
    found = dict(settings)
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
    return {**found, "recovery": recovery, "ablation": ablation}
