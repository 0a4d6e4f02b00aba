"""lm-evaluation-harness on a steered model: its tasks, its prompts, its metrics, inside steerkit's own context.

The harness (`pip install 'steerkit-hf[lm-eval]'`) is given the model as it is, wrapped by its `HFLM`, so that every
method works and nothing is translated into a foreign format. What it does with the model decides what can be right:

    loglikelihood, loglikelihood_rolling, multiple_choice    model(ids): right-padded rows, no attention mask
    generate_until                                           model.generate(ids, mask): left-padded rows, masked

Without a mask nobody can tell a prompt from its continuation, nor a pad from a token, so the one scope that is known
is `all`. That the pads behind a row are written too is harmless: no token looks ahead. Other scopes are refused.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib.metadata
import logging
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from torch import nn

from steerkit.errors import DataError, ScopeError, SteerError, StrengthError, UnknownNameError, unknown_name
from steerkit.prompts.batching import pad_token_id
from steerkit.steering.steering import steer
from steerkit.steering.strengths import strength_value, vectors_of
from steerkit.tokens.scope import Scope
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["check_steering", "evaluate_tasks"]


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    vector: SteeringVector | Sequence[SteeringVector] | None = None,
    strength: float | None = None,
    unit: Literal["paper", "norm"] | None = None,
    scope: str | None = None,
    baseline: bool = False,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    include_path: str | Path | None = None,
    apply_chat_template: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness, steered where a vector is given.

    The model, the tokenizer, the random states and the environment are left as they were.

    Args:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer; never changed.
        tasks: names of tasks, groups or tags.
        vector: one vector or several; None runs the baseline model.
        strength: one number; None takes each vector's own, else its suggested one, else 1.
        unit: what the strength counts in; None takes each vector's own.
        scope: has to be `all`, here or in each vector.
        baseline: run the unsteered model too, and give the differences.
        limit: at most so many items of each task; below 1 a share of them.
        num_fewshot: examples before each item; None takes each task's own number.
        batch_size: rows per pass.
        include_path: a folder of task files. They may name Python code that is run, so only one that you trust.
        apply_chat_template: put prompts into the tokenizer's chat template.
        seed: of few-shot examples and of sampling tasks, 0 to 2**32 - 1.

    Returns:
        JSON-like: `tasks` (task to metric to `value` and `stderr`, null where the harness gives no finite number; a
        metric behind a filter is called ``metric,filter``), `n` (items of each task), `num_fewshot`, `versions`; with
        `baseline` also `baseline` (as `tasks`) and `difference` (steered - unsteered; its `stderr` is that of the
        paired differences, null for metrics that are no mean over items).

    Raises:
        ScopeError: a scope other than `all`.
        StrengthError: one strength per row, or what `steer` refuses.
        DataError: no tasks, a baseline where there is no vector, an argument out of range, or the harness refuses a task.
        UnknownNameError: no task of that name.
        SteerError: lm-eval is not installed, or the model cannot be steered (see `steer`).
    """
    vectors = [] if vector is None else check_steering(vector, strength=strength, scope=scope)
    names = _checked(tasks, limit, batch_size, seed)
    if baseline and not vectors:
        raise DataError("baseline: there is no vector to compare with the unsteered model; give one")
    with _left_as_it_was(model):
        evaluate = _harness()
        if apply_chat_template:
            for one in vectors:
                one.check_template(tokenizer)
        steering = steer(model, vectors, strength, scope=scope, unit=unit) if vectors else contextlib.nullcontext()
        manager = _manager(names, include_path)
        settings = {
            "tasks": names,
            "task_manager": manager,
            "limit": limit,
            "num_fewshot": num_fewshot,
            "apply_chat_template": apply_chat_template,
            "random_seed": seed,
            "numpy_random_seed": seed,
            "torch_random_seed": seed,
            "fewshot_random_seed": seed,
        }
        wrapped = _wrapped(model, tokenizer, batch_size)
        before = _run(evaluate, wrapped, settings) if baseline else None
        with steering:
            after = _run(evaluate, wrapped, settings)
    return _report(after, before)


def check_steering(
    vector: SteeringVector | Sequence[SteeringVector],
    *,
    strength: float | None = None,
    scope: str | None = None,
) -> list[SteeringVector]:
    """Refuse what cannot be right under the harness, before anything is loaded.

    Args:
        vector: one vector or several.
        strength: for those without their own.
        scope: for those without their own.

    Returns:
        The vectors as a list.

    Raises:
        ScopeError: a scope other than `all`.
        StrengthError: one strength per row.
    """
    vectors = vectors_of(vector)
    for one in vectors:
        written = Scope.parse(one.scope if one.own_scope or scope is None else scope)
        if written.kind != "all":
            raise ScopeError(
                f"scope '{written}': lm-eval does not tell the model where a prompt ends, so only every token can be "
                "meant; give scope='all'"
            )
        own = one.strength if one.strength is not None else strength
        if own is not None and isinstance(strength_value(own), tuple):
            raise StrengthError("strength: lm-eval makes its own batches; give one number, not one per row")
    return vectors


def _checked(tasks: Sequence[str], limit: float | None, batch_size: int, seed: int) -> list[str]:
    """The names of the tasks.

    Raises:
        DataError: none, one string, or an argument out of range.
    """
    if isinstance(tasks, str) or not tasks:
        raise DataError(f"tasks: got {tasks!r}; give a list of names, at least one")
    if limit is not None and not limit > 0:
        raise DataError(f"limit: got {limit}; give a number of items, or a share below 1")
    if batch_size < 1:
        raise DataError(f"batch_size is at least 1, got {batch_size}")
    if not 0 <= seed < 2**32:
        raise DataError(f"seed: got {seed}; give a whole number from 0 to 2**32 - 1")
    return list(dict.fromkeys(tasks))


def _harness() -> Any:
    """The harness's `simple_evaluate`.

    Raises:
        SteerError: it is not installed.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
    except ImportError as error:
        raise SteerError(
            f"tasks of lm-evaluation-harness need lm-eval ({error}); pip install 'steerkit-hf[lm-eval]'"
        ) from None
    return simple_evaluate


def _manager(names: Sequence[str], include_path: str | Path | None) -> Any:
    """What knows the task files.

    Raises:
        DataError: there is no such folder.
        UnknownNameError: no task of that name.
    """
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else str(include_path)
    if folder is not None:
        if not Path(folder).is_dir():
            raise DataError(f"{folder}: is no folder; give one with task files (.yaml)")
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own  # the harness's own files need not be read, which takes seconds
    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            if close:
                raise unknown_name("task", name, close)
            raise UnknownNameError(f"unknown task {name!r}; `lm-eval ls tasks` lists lm-eval's own")
    return manager


def _wrapped(model: nn.Module, tokenizer: Any, batch_size: int) -> Any:
    """The model as the harness wants it, with a copy of the tokenizer, whose pad token it sets.

    Raises:
        DataError: a tokenizer without an end-of-text token, which the harness needs.
    """
    from lm_eval.models.huggingface import HFLM

    if tokenizer.eos_token_id is None:
        raise DataError("lm-eval needs a tokenizer with an end-of-text token; set tokenizer.eos_token")
    own = copy.deepcopy(tokenizer)
    own.pad_token_id = pad_token_id(tokenizer)
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of being given a model instead of a name
    try:
        return HFLM(pretrained=model, tokenizer=own, backend="causal", batch_size=batch_size)
    finally:
        logger.setLevel(level)


def _run(evaluate: Any, wrapped: Any, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """One run of all tasks.

    Raises:
        DataError: a task that cannot be loaded or run.
    """
    try:
        results: Mapping[str, Any] = evaluate(model=wrapped, log_samples=True, **settings)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"lm-eval cannot run {', '.join(settings['tasks'])} ({reason})") from error
    return results


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back what the harness sets: random states, variables of the environment, whether modules train."""
    import numpy

    environment = dict(os.environ)
    states = random.getstate(), numpy.random.get_state()
    training = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            for module, was_training in training:
                module.training = was_training
            random.setstate(states[0])
            numpy.random.set_state(states[1])
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)


def _report(after: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """Plain data for JSON."""
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
    """A finite number, else None; the harness writes "N/A" where it has none."""
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
