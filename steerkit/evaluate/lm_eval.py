"""The LM Evaluation Harness on a steered model: its tasks, its prompts, its metrics, inside a steering context.

It (`pip install 'steerkit-hf[lm-eval]'`) is given the model as it is, wrapped by its `HFLM`, so that every
method works and nothing is translated into a foreign format. What it does with the model decides what can be right:

    loglikelihood, loglikelihood_rolling, multiple_choice    model(ids): right-padded rows, no attention mask
    generate_until                                           model.generate(ids, mask): left-padded rows, masked

Without a mask nobody can tell a prompt from its continuation, nor a pad from a token, so the one scope that is known
is `all`. That the pads behind a row are written too is harmless: no token looks ahead. Other scopes are refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from steerkit.errors import DataError, ScopeError, StrengthError
from steerkit.evaluate.lm_eval_figures import report_of
from steerkit.evaluate.lm_eval_library import left_as_it_was, load_evaluator, task_manager, wrapped_model
from steerkit.methods._registry import can_write_all
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
    """Run tasks of the LM Evaluation Harness, steered where a vector is given.

    The model, the tokenizer, the random states and the environment are left as they were.

    Args:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer; never changed.
        tasks: names of tasks, groups or tags.
        vector: one vector or several; None runs the baseline model.
        strength: one number; None takes each vector's own, else its suggested one.
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
        JSON-like: `tasks` (task to metric to `value` and `stderr`, null where lm_eval gives no finite number; a
        metric behind a filter is called ``metric,filter``), `n` (items of each task), `num_fewshot`, `versions`; with
        `baseline` also `baseline` (as `tasks`) and `difference` (steered - unsteered; its `stderr` is that of the
        paired differences, null for metrics that are no mean over items).

    Raises:
        ScopeError: a scope other than `all`.
        StrengthError: one strength per row, or what `steer` refuses.
        DataError: no tasks, a baseline where there is no vector, an argument out of range, or lm_eval refuses a task.
        UnknownNameError: no task of that name.
        SteerError: lm-eval is not installed, or the model cannot be steered (see `steer`).
    """
    vectors = [] if vector is None else check_steering(vector, strength=strength, scope=scope)
    names = _checked(tasks, limit, batch_size, seed)
    if baseline and not vectors:
        raise DataError("baseline: there is no vector to compare with the unsteered model; give one")
    with left_as_it_was(model):
        evaluate = load_evaluator()
        if apply_chat_template:
            for one in vectors:
                one.check_template(tokenizer)
        steering = steer(model, vectors, strength, scope=scope, unit=unit) if vectors else contextlib.nullcontext()
        manager = task_manager(names, include_path)
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
        wrapped = wrapped_model(model, tokenizer, batch_size)
        before = _run(evaluate, wrapped, settings) if baseline else None
        with steering:
            after = _run(evaluate, wrapped, settings)
    return report_of(after, before)


def check_steering(
    vector: SteeringVector | Sequence[SteeringVector],
    *,
    strength: float | None = None,
    scope: str | None = None,
) -> list[SteeringVector]:
    """Refuse what cannot be right under lm_eval, before anything is loaded.

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
            advice = "; give scope='all'" if can_write_all(one) else f", which {one.method} does not do"
            raise ScopeError(
                f"scope '{written}': lm-eval does not tell the model where a prompt ends, so only every token can be "
                f"meant{advice}"
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
