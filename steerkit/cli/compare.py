"""`steerkit compare`: every method on one behaviour, each calibrated to the same budget."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit.cli._evidence import jsonable, status
from steerkit.cli._files import check_writable
from steerkit.cli._shared import DEFAULT_MODEL, BatchSize, Json, print_json, stdout, table

if TYPE_CHECKING:
    from steerkit.evaluate.compare import Row
    from steerkit.recipe import Recipe

__all__ = ["run"]


def run(
    behaviour: Annotated[str, typer.Argument(help="A behaviour that recipes are shipped for.")] = "optimism",
    method: Annotated[list[str] | None, typer.Option(help="Repeatable. (default: every method)")] = None,
    max_kl: Annotated[float, typer.Option(min=0, help="Nats per token on neutral texts.")] = 0.3,
    max_ppl_ratio: Annotated[float, typer.Option(min=0, help="Perplexity of neutral texts, over unsteered.")] = 1.3,
    max_repetition: Annotated[
        float, typer.Option(min=0, help="Rise of the share of repeated 4-grams in generated texts.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Fixes splits, controls and search.")] = 0,
    model: Annotated[
        str | None,
        typer.Option(help=f"Alias, hub id, folder or .gguf file. (default: the recipe's, else {DEFAULT_MODEL})"),
    ] = None,
    batch_size: BatchSize = 16,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where table and report go.")] = Path("out/compare"),
    as_json: Json = False,
) -> None:
    """Compare the methods on one behaviour: effect, controls, KL, perplexity ratio, repetition, time.

    Every method is calibrated to the same budget on the same training items and measured on the same held-out ones. A
    method without a recipe of its own for the behaviour is fitted by the behaviour's default recipe. Writes
    <out>/<behaviour>.json, .md (the table) and .html (the report).
    """
    import steerkit
    from steerkit.evaluate.calibrate import Budget
    from steerkit.evaluate.compare import markdown
    from steerkit.evaluate.sweep import Store
    from steerkit.evaluate.trial import Setup
    from steerkit.export.report import comparison_html
    from steerkit.files import write_whole
    from steerkit.recipe import find_recipe
    from steerkit.registry import method_names

    default = find_recipe(behaviour)
    budget = Budget(max_kl, max_ppl_ratio, max_repetition)
    check_writable(out / f"{default.behaviour}.json")
    _, held_out = default.split()
    name = model or default.model.name
    loaded, tokenizer = steerkit.load_model(name)
    setup = Setup(loaded, tokenizer, held_out, batch_size=batch_size, texts=12)
    store = Store(out / f"{default.behaviour}.rows.jsonl")
    with status("comparing") as step:
        rows = [
            row
            for one in method or method_names()
            if (row := _row(one, default, setup, budget, seed, store, step)) is not None
        ]
    content = _content(rows, default, name, setup, budget, seed)
    files = {
        "json": json.dumps(content, indent=2) + "\n",
        "md": markdown(rows),
        "html": comparison_html(content),
    }
    for ending, text in files.items():
        write_whole(out / f"{default.behaviour}.{ending}", text.encode())
    (out / f"{default.behaviour}.rows.jsonl").unlink(missing_ok=True)
    if as_json:
        print_json(content)
        return
    _show(rows, default.behaviour)
    typer.echo(f"wrote {out / default.behaviour}.json, .md and .html")


def _row(name: str, default: Recipe, setup: Any, budget: Any, seed: int, store: Any, step: Any) -> Row | None:
    """One method calibrated and measured; None, with a note, where there is nothing to fit it on."""
    from steerkit.evaluate.calibrate import Search, calibrate
    from steerkit.evaluate.compare import compared
    from steerkit.recipe import of_behaviour
    from steerkit.registry import resolve

    kind = resolve(name)
    own = [recipe for recipe in of_behaviour(default.behaviour) if recipe.method.name == name]
    if not own and kind.readout is None:
        typer.echo(f"note: {name} is left out: no recipe of {default.behaviour} says what it is fitted on", err=True)
        return None
    recipe = own[0] if own else default
    part = recipe.method_part(name)
    found = calibrate(
        setup,
        recipe.split()[0],
        method=name,
        settings=dict(part.settings),
        readout=part.readout,
        budget=budget,
        search=Search(candidates=recipe.candidates(setup.decoder.num_layers), seed=seed),
        store=store,
        scope=recipe.apply.scope if own else None,
        step=lambda note: step(f"{name}: {note}"),
    )
    step(f"{name}: time and texts")
    return compared(setup, kind, recipe.name, found, default.evaluate.questions)


def _content(rows: list[Row], default: Recipe, model: str, setup: Any, budget: Any, seed: int) -> dict[str, Any]:
    """Everything needed to show the comparison and to repeat it."""
    from steerkit.evaluate.identity import environment, setup_identity

    identity = setup_identity(setup)
    digests = {name: identity[name] for name in ("weights", "data", "neutral", "tokenizer_sha256")}
    limits = " ".join(f"--{key.replace('_', '-')} {value:g}" for key, value in asdict(budget).items())
    plain: dict[str, Any] = jsonable(
        {
            "behaviour": default.behaviour,
            "model": model,
            "items": len(setup.data),
            "budget": asdict(budget),
            "rows": [row.as_json() for row in rows],
            "environment": environment(),
            "digests": digests,
            "command": f"steerkit compare {default.behaviour} {limits} --seed {seed}",
        }
    )
    return plain


def _show(rows: list[Row], behaviour: str) -> None:
    columns = ("method", "strength", "effect", "controls up to", "KL", "ppl ratio", "rep.", "time", "clear")
    shown = table(*columns, right=columns[1:-1], title=f"{behaviour}: change against the unsteered model")
    for row in rows:
        costs = row.costs or {}
        figures = [costs.get(name) for name in ("kl", "perplexity_ratio", "repetition")]
        shown.add_row(
            row.method,
            "-" if row.strength is None else f"{row.strength:g}",
            "-" if row.effect is None else f"{row.effect.mean:+.2f} ({row.effect.low:+.2f}, {row.effect.high:+.2f})",
            "-" if row.controls is None else f"{row.controls[1]:+.2f}",
            *("-" if one is None else f"{one.mean:.2f}" for one in [*figures, row.overhead]),
            "yes" if row.works else "no",
        )
    stdout().print(shown)
    for row in rows:
        typer.echo(f"{row.method}: {row.verdict}")
