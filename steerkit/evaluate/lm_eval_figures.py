"""The results of the LM Evaluation Harness as plain data: metrics, standard errors, paired differences."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

__all__ = ["report_of"]


def report_of(after: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """Bring the results of one run, or of a steered and an unsteered one, into plain data for JSON.

    Args:
        after: what lm_eval gave for the steered model.
        before: the same for the unsteered model; None where it was not run.
    """
    metrics = _metrics(after)
    report: dict[str, Any] = {"tasks": metrics}
    if before is not None:
        baseline = _metrics(before)
        paired = _paired(after, before)
        report["baseline"] = baseline
        report["difference"] = {
            task: {
                metric: {
                    "value": _minus(entry["value"], baseline[task][metric]["value"]),
                    "stderr": paired.get((task, metric)),
                }
                for metric, entry in found.items()
            }
            for task, found in metrics.items()
        }
    versions = {name: importlib.metadata.version(name) for name in ("lm-eval", "transformers", "torch")}
    return report | {
        "n": {task: count["effective"] for task, count in after["n-samples"].items()},
        "num_fewshot": dict(after["n-shot"]),
        "versions": {**versions, "tasks": dict(after["versions"])},
    }


def _metrics(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Task to metric to value and standard error."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for task, entries in results["results"].items():
        found[task] = {}
        for key, value in entries.items():
            metric, comma, chosen = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                stderr = entries.get(f"{metric}_stderr,{chosen}")
                found[task][_name(metric, chosen)] = {"value": _number(value), "stderr": _number(stderr)}
    return found


def _name(metric: str, chosen: str) -> str:
    return metric if chosen == "none" else f"{metric},{chosen}"


def _number(value: Any) -> float | None:
    """A finite number, else None; lm_eval writes "N/A" where it has none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _minus(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def _paired(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Standard errors of the mean paired difference, for the metrics that are means over items."""
    steered, baseline = _by_item(after), _by_item(before)
    means = _metrics(after)
    found = {}
    for (task, metric), values in steered.items():
        others = baseline.get((task, metric), {})
        mean = means[task].get(metric, {}).get("value")
        if mean is None or len(values) < 2 or values.keys() != others.keys():
            continue
        if math.isclose(mean, fmean(values.values()), rel_tol=1e-9, abs_tol=1e-12):
            found[task, metric] = stdev(values[item] - others[item] for item in values) / math.sqrt(len(values))
    return found


def _by_item(results: Mapping[str, Any]) -> dict[tuple[str, str], dict[Any, float]]:
    """Task and metric to item to its number, for metrics that give every item one."""
    found: dict[tuple[str, str], dict[Any, float]] = {}
    for task, samples in results["samples"].items():
        for sample in samples:
            for metric in sample["metrics"]:
                value = _number(sample[metric])
                if value is not None:
                    found.setdefault((task, _name(metric, sample["filter"])), {})[sample["doc_id"]] = value
    return found
