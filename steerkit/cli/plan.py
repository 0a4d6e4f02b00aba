"""`steerkit plan`: what a steering would do and cost, before it is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit._support.progress import status
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import BatchSize, Json, Unit, print_json, stdout, table
from steerkit.cli._steering import SteeringOption, check_chosen, chosen
from steerkit.cli._written import check_written

if TYPE_CHECKING:
    from steerkit.checks.planned_edits import PlannedEdit
    from steerkit.checks.planning import SteeringPlan
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["run"]


@loads_model
def run(
    vector: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="A vector file, a shipped name, or hub:USER/NAME; repeatable."),
    ] = None,
    strength: Annotated[
        list[float] | None, typer.Option(help="One for each vector. Without it, the file's suggested one.")
    ] = None,
    steering: SteeringOption = None,
    scope: Annotated[
        str | None,
        typer.Option(help="Tokens written, such as all, response, first(4), answer. Without it, the file's."),
    ] = None,
    unit: Annotated[Unit | None, typer.Option(help="What strengths count in. Without it, the file's.")] = None,
    model: ModelChoice = DEFAULT,
    batch_size: BatchSize = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of each prompt in the forecast.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Length of each answer in the forecast.")] = 128,
    measure: Annotated[bool, typer.Option(help="Measure the time on a few short passes.")] = True,
    as_json: Json = False,
) -> None:
    """Show what a steering would do: modules, shapes, scopes, strengths in both units, memory and time.

    Nothing is written. Exit code 1 if the model lacks a site or cannot be steered this way.
    """
    if not vector and steering is None:
        raise typer.BadParameter("give a --vector, or several in one line with --steering")
    check_written(scope=scope)
    check_chosen(vector, strength, steering, unit=unit, scope=scope)
    used = chosen(vector, strength, steering, model.name)

    from steerkit.checks.planning import plan

    loaded, tokenizer = model.load()
    with status("planning"):
        found = plan(
            loaded,
            used.vectors,
            scope=scope,
            unit=unit.value if unit else None,
            tokenizer=tokenizer,
            batch_size=batch_size,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            measure=measure,
        )
    if as_json:
        print_json({"vectors": used.names, **found.as_json()})
    else:
        _print(used.names, used.vectors, found)
    if not found.ok:
        raise typer.Exit(1)


def _print(names: Sequence[str], vectors: Sequence[SteeringVector], found: SteeringPlan) -> None:
    console = stdout()
    shown = table("vector\nsite", "module", "tensor", "scope", "strength")
    for column in shown.columns:
        column.overflow = "fold"
    for edit in found.edits:
        name = names[edit.vector - 1] if len(names) > 1 else vectors[edit.vector - 1].method
        shown.add_row(
            f"{name}\n{edit.site}",
            f"{edit.module}\n{edit.module_class}" if edit.module else "none",
            _tensor(edit),
            edit.scope or "-",
            f"{_strength(edit.paper)} paper\n{_strength(edit.norm)} norm" if edit.scope else "-",
        )
    console.print(shown)
    console.print(_memory(found))
    if found.time is not None:
        console.print(_time(found))
    for kind, lines in (("warning", found.warnings), ("problem", found.problems)):
        for line in lines:
            console.print(f"{kind}: {line}", soft_wrap=True)
    places = sum(edit.problem is None for edit in found.edits)
    verdict = "can be steered so" if found.ok else "cannot be steered so"
    console.print(f"{found.model}: {places} of {len(found.edits)} edits fit; {verdict}")


def _tensor(edit: PlannedEdit) -> str:
    if edit.shape is None:
        return "-"
    return f"{edit.side}\n{' x '.join(map(str, edit.shape))}\n{edit.dtype}, {edit.device}"


def _strength(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(f"{row:.3g}" for row in value) if isinstance(value, tuple) else f"{value:.3g}"


def _memory(found: SteeringPlan) -> str:
    memory, tokens = found.memory, found.prompt_tokens + found.new_tokens
    note = f" ({memory.note})" if memory.note else ""
    return (
        f"memory: parameters {_bytes(memory.parameters)}, vectors {_bytes(memory.vectors)}, cache of "
        f"{found.batch_size} x {tokens} tokens {_bytes(memory.cache)}, activations about "
        f"{_bytes(memory.activations)}; together {_bytes(memory.total)}{note}"
    )


def _bytes(count: int) -> str:
    """A size for people, in powers of 1024."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def _time(found: SteeringPlan) -> str:
    timed = found.time
    assert timed is not None
    return (
        f"time: {found.batch_size} prompts of {found.prompt_tokens} tokens {timed.prefill:.2g} s (steered "
        f"{timed.steered_prefill:.2g} s), one more token {timed.step:.2g} s (steered {timed.steered_step:.2g} s), "
        f"{found.new_tokens} new tokens {timed.total:.2g} s (steered {timed.steered_total:.2g} s)"
    )
