"""`steerkit evidence`: what a reader sees of every vector, beside a system prompt that asks for the same."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit._support.progress import bar, status
from steerkit.cli._files import check_writable
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import Json, number, print_json, stdout, table

if TYPE_CHECKING:
    from steerkit.evidence.answering import Bench

__all__ = ["run"]


@loads_model
def run(
    model: ModelChoice = DEFAULT,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the answers go. (default: evidence-MODEL)")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="This vector only; may be given again.")] = None,
    traits: Annotated[
        bool, typer.Option(help="Vectors of traits too; where none ships, each takes 10 minutes to make.")
    ] = True,
    judge: Annotated[
        str | None, typer.Option(help="Scores the answers: https://host/v1#model-name, or a model's name or folder.")
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Say how long it would take, and leave.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers per pass.")] = 120,
    as_json: Json = False,
) -> None:
    """Show what a reader sees of every vector: answers, and scores of them, beside a system prompt that asks for it.

    Every vector answers 40 questions that nothing was fitted on at its suggested strength, at minus it, under a system
    prompt, and both. A model for which no vectors ship gets them made first. Killed at any moment, it goes on where it
    was. Answers are in FOLDER/evidence, figures in FOLDER/evidence.json.
    """
    from steerkit.evidence import Bench, Folder, names_of
    from steerkit.model import ALIASES

    alias = model.name if model.name in ALIASES else ""
    names = names_of(only or [], with_traits=traits)
    target = out or Path(f"evidence-{Path(model.name).name}")
    check_writable(target / "evidence.json")
    loaded, tokenizer = model.load()
    bench = Bench(loaded, tokenizer, batch_size)
    folder = Folder(target)
    _tell_time(bench, folder, names)
    if estimate:
        return
    found = _measured(bench, folder, alias, names, judge)
    if as_json:
        print_json(found)
    else:
        _show(found, target)


def _tell_time(bench: Bench, folder: Any, names: list[str]) -> None:
    """How long the parts take that are not there, said on stderr."""
    from steerkit.evidence import behaviour_of, forecast, rows_of

    chosen = {name: behaviour_of(name) for name in names}
    there = set(folder.names())
    rows = {name: count for name, count in rows_of(chosen).items() if name not in there}
    with status("measuring how long an answer takes"):
        each = forecast(bench)
    minutes = max(1, round(each * sum(rows.values()) / 60))
    typer.echo(
        f"{_count(len(names), 'vector')}, {_count(len(rows), 'part')} to measure: at most about "
        f"{_count(minutes, 'minute')} here ({each:.2f} s an answer); vectors that have to be made come on top",
        err=True,
    )


def _count(number: int, what: str) -> str:
    """A number of things, in words."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _measured(bench: Bench, folder: Any, alias: str, names: list[str], judge: str | None) -> dict[str, Any]:
    from steerkit.evidence import Run, behaviour_of, behaviours, subject, summary, usable, weights_facts, write_summary

    every = behaviours()
    chosen = list(dict.fromkeys(behaviour_of(name) for name in names))
    asked = dict.fromkeys(["questions", *(every[name].asked for name in chosen)])
    with bar("parts", len(names) + len(chosen) + len(asked)) as step:
        run = Run(bench, folder, lambda name: typer.echo(f"measuring {name}", err=True))
        for questions in asked:
            run.unsteered(questions)
            step()
        for name in chosen:
            run.prompted(every[name])
            step()

        def made(name: str) -> Any:
            return subject(name, alias, bench.model, bench.tokenizer, folder.path)

        for one in usable(names, made):
            run.steered(one, every[one.behaviour].prompting)
            step()
    if judge is not None:
        from steerkit.evidence import judge_all

        judge_all(folder, every, names, judge)
    command = shlex.join(["steerkit", *sys.argv[1:]])
    found = {**weights_facts(bench.model, alias, command), **summary(folder, every, names)}
    write_summary(folder, found)
    return found


def _show(found: Mapping[str, Any], target: Path) -> None:
    console = stdout()
    shown = table("vector", "verdict", "concept\n0", "\n+", "\nprompt", "overall\n+", "\nprompt", "wins", right=())
    for name, entry in found["vectors"].items():
        texts = entry["texts"]
        shown.add_row(
            name,
            entry["verdict"] if entry["told"] else "cannot be told",
            *(number(texts[one]["concept"]["mean"], ".2f") for one in ("0", "+", "prompt")),
            *(number(texts[one]["overall"]["mean"], ".2f") for one in ("+", "prompt")),
            entry["against prompting"]["wins"],
        )
    console.print(shown)
    also = table("vector", "also moves")
    for name, entry in found["vectors"].items():
        if entry["also_moves"]:
            also.add_row(name, ", ".join(f"{one['trait']} {one['mean']:+.2f}" for one in entry["also_moves"]))
    if also.row_count:
        console.print(also)
    told = table("behaviour", "classifier right", right=("classifier right",))
    for name, entry in found["classifiers"].items():
        right = entry["accuracy"]
        told.add_row(name, f"{right['mean']:.2f} ({right['low']:.2f} to {right['high']:.2f})")
    console.print(told)
    console.print(f"wrote {target / 'evidence.json'}; the answers are in {target / 'evidence'}")
