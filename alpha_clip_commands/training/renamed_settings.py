"""Settings of earlier versions: renamed keys and values are still read, removed keys are errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {"eval_pictures": "eval_images"}
_METRICS = {"exactly right": "literal_match", "CIDEr": "cider"}
REMOVED = {"patch_weight": "the loss on patch tokens improved nothing (docs/ablations.md)"}


def current_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with today's keys and values. A removed key stays if it was in use, so that it is an error."""
    current = {RENAMED.get(key, key): value for key, value in settings.items() if key not in REMOVED or value}
    if (metrics := current.get("eval_metrics")) is not None:
        names = metrics if isinstance(metrics, list) else [metrics]
        current["eval_metrics"] = [_METRICS.get(name, name) if isinstance(name, str) else name for name in names]
    if isinstance(best := current.get("metric_for_best_model"), str):
        current["metric_for_best_model"] = best.replace("exactly_right", "literal_match")
    return current
