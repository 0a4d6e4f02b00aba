"""`steerkit lm-eval`: tasks of lm-evaluation-harness, steered where a vector is given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from steerkit._support.progress import status
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import BatchSize, Json, Unit, number, print_json, stdout, table
from steerkit.cli._steering import SteeringOption, check_chosen, chosen
from steerkit.cli._written import check_written

__all__ = ["run"]


TasksOption = Annotated[
    list[str], typer.Option("--tasks", metavar="NAME", help="Tasks; repeat, or separate them by commas.")
]
IncludePathOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Task files of your own; they may run code.")
]
VectorOption = Annotated[
    str | None, typer.Option(metavar="FILE", help="A vector file, a shipped name, or hub:USER/NAME.")
]
LimitOption = Annotated[
    float | None, typer.Option(metavar="N", help="Items of each task at most; below 1 a share of them.")
]
NumFewshotOption = Annotated[int | None, typer.Option(min=0, help="Examples before each item. (default: the task's)")]


@loads_model
def run(
    tasks: TasksOption,
    include_path: IncludePathOption = None,
    vector: VectorOption = None,
    strength: Annotated[float | None, typer.Option(help="(default: the file's suggested strength)")] = None,
    steering: SteeringOption = None,
    unit: Annotated[Unit | None, typer.Option(help="What the strength counts in. (default: the file's)")] = None,
    scope: Annotated[str | None, typer.Option(help="Has to be all, here or in the file.")] = None,
    limit: LimitOption = None,
    num_fewshot: NumFewshotOption = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the chat template.")] = False,
    baseline: Annotated[bool, typer.Option("--baseline", help="Run the unsteered model too.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Fixes few-shot examples and sampling.")] = 0,
    model: ModelChoice = DEFAULT,
    batch_size: BatchSize = 8,
    as_json: Json = False,
) -> None:
    """Run tasks of lm-eval (lm-evaluation-harness), steered where a vector is given.

    Needs the extra lm-eval of steerkit-hf. lm-eval hides where prompts end, so the scope has to be all.
    """
    names = [] if vector is None else [vector]
    if not names and steering is None and (strength is not None or unit or scope or baseline):
        raise typer.BadParameter("--strength, --unit, --scope and --baseline say how a --vector acts; give one")
    check_chosen(names, [] if strength is None else [strength], steering, unit=unit, scope=scope)
    listed = [name for entry in tasks for name in entry.split(",") if name]

    from steerkit.evaluate.lm_eval import check_steering, evaluate_tasks

    check_written(scope=scope, tasks_in=include_path)
    used = chosen(names, None, steering, model.name)
    given: dict[str, Any] = {}
    if used.vectors:
        check_steering(used.vectors, strength=strength, scope=scope)
        given = {"vector": used.vectors, "strength": strength, "unit": unit.value if unit else None, "scope": scope}

    loaded, tokenizer = model.load()
    with status("evaluating"):
        report = evaluate_tasks(
            loaded,
            tokenizer,
            listed,
            **given,
            baseline=baseline,
            limit=int(limit) if limit is not None and limit >= 1 else limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            include_path=include_path,
            apply_chat_template=chat,
            seed=seed,
        )
    if as_json:
        print_json({"model": model.name, "vector": vector, "strength": strength, "steering": steering, **report})
    else:
        _show(report, steered=bool(used.vectors))


def _show(report: Mapping[str, Any], *, steered: bool) -> None:
    """A row for each metric; standard errors stand behind a plus-minus."""
    named = {"tasks": "steered" if steered else "value"}
    if "baseline" in report:
        named = {"baseline": "unsteered", "tasks": "steered", "difference": "difference"}
    shown = table("task", "metric", "n", *named.values(), right=("n", *named.values()))
    for column in shown.columns[:2]:
        column.overflow = "fold"  # names can be long, and their ends tell them apart
    for task, metrics in report["tasks"].items():
        for metric in metrics:
            cells = [_with_error(report[part][task][metric]) for part in named]
            shown.add_row(task, metric, str(report["n"].get(task, "-")), *cells)
    stdout().print(shown)


def _with_error(entry: Mapping[str, float | None]) -> str:
    if entry["value"] is None or entry["stderr"] is None:
        return number(entry["value"])
    return f"{entry['value']:.3g} ± {entry['stderr']:.2g}"
