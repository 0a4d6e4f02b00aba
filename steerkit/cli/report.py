"""`steerkit report`: everything about one vector on one model, in one HTML file."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit._support.progress import status
from steerkit.cli._data import NO_DATA, DataChoice, takes_data
from steerkit.cli._evidence import data_of, numbers
from steerkit.cli._files import check_writable
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import (
    BatchSize,
    Json,
    print_json,
)

if TYPE_CHECKING:
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.report.evidence import Evidence
    from steerkit.report.evidence_parts import EvidencePlan
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["run"]

QUESTIONS = 3
QUICK: Mapping[str, Any] = {"controls": 2, "texts": 4, "neutral": 6, "new_tokens": 24}


StrengthOption = Annotated[
    list[str] | None, typer.Option(help="Repeatable, or -1,0,1. (default: the recipe's, and the suggested one)")
]


QuickOption = Annotated[
    bool, typer.Option("--quick", help="About two minutes: fits nothing again, and measures on less.")
]
ControlsOption = Annotated[
    int | None, typer.Option(min=0, help="Random directions, and fits on shuffled labels. (default: 5, quick 2)")
]
TextsOption = Annotated[
    int | None, typer.Option(min=1, help="Prompts answered for repetition and length. (default: 6, quick 4)")
]
NeutralOption = Annotated[
    int | None, typer.Option(min=2, help="Neutral texts read for KL and perplexity. (default: 12, quick 6)")
]
LongestOption = Annotated[int | None, typer.Option(min=1, help="The longest answer. (default: 40 tokens, quick 24)")]


@loads_model
@takes_data
def run(
    vector: Annotated[str, typer.Option(metavar="FILE", help="A vector file, a shipped name, or hub:USER/NAME.")],
    given: DataChoice = NO_DATA,
    strength: StrengthOption = None,
    quick: QuickOption = False,
    controls: ControlsOption = None,
    texts: TextsOption = None,
    neutral: NeutralOption = None,
    max_new_tokens: LongestOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Fixes controls and intervals.")] = 0,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page to be.")] = Path("report.html"),
    model: ModelChoice = DEFAULT,
    batch_size: BatchSize = 16,
    as_json: Json = False,
) -> None:
    """Write one HTML page about a vector: effect, costs, controls, separation by layer, texts, how to repeat it.

    The page holds everything in itself and works without JavaScript. What needs the training items is left out, with
    the reason, where the recipe of the vector is not known; with --quick it is left out too.
    """
    from steerkit._support.shipped import vector_path
    from steerkit.errors import DataError
    from steerkit.report.evidence_parts import EvidencePlan
    from steerkit.report.gather import gather
    from steerkit.report.plots.drawing import ready
    from steerkit.vector.steering_vector import SteeringVector

    ready()
    given.check()
    file = vector_path(vector, model.name)
    loaded_vector = SteeringVector.load(file)
    strengths = numbers(strength, "--strength")
    train, held_out = data_of(loaded_vector, given)
    if held_out is None:
        raise DataError(f"{vector}: its recipe's held-out items are not known here; give --data")
    check_writable(out)
    asked, usual = _recipe_of(loaded_vector)
    extent = {"controls": controls, "texts": texts, "neutral": neutral, "new_tokens": max_new_tokens}
    plan = EvidencePlan(
        strengths=strengths or (None if quick else usual),
        questions=asked or _questions(held_out),
        refitted=not quick,
        seed=seed,
        batch_size=batch_size,
        **_extent(extent, quick),
    )
    command = _command(vector, given, strengths, plan, model)
    loaded, tokenizer = model.load()
    with status("measuring") as step:
        sides: dict[str, Any] = {"train": train, "held_out": held_out}
        evidence = gather(
            loaded, tokenizer, loaded_vector, name=file.stem, plan=plan, command=command, step=step, **sides
        )
    _write(evidence, out)
    if as_json:
        print_json({"report": str(out), **evidence.as_json()})
        return
    _show(evidence, out)


def _extent(given: Mapping[str, int | None], quick: bool) -> dict[str, Any]:
    """On how much is measured: what was given, the rest as for a quick report or a full one."""
    return {**(QUICK if quick else {}), **{name: number for name, number in given.items() if number is not None}}


def _recipe_of(vector: SteeringVector) -> tuple[list[str], list[float] | None]:
    """The questions and strengths of the recipe that travels in the vector's file."""
    part = dict(vector.extra.get("recipe") or {}).get("evaluate") or {}
    return list(part.get("questions", ())), list(part["strengths"]) if part.get("strengths") else None


def _questions(held_out: ContrastSet) -> list[str]:
    """The first held-out prompts that are plain text, where no recipe has questions."""
    prompts = [item.prompt for item in held_out.positive if isinstance(item.prompt, str)]
    return list(dict.fromkeys(prompts))[:QUESTIONS]


def _write(evidence: Evidence, out: Path) -> None:
    """Write the page.

    Raises:
        SteerError: it cannot be written.
    """
    from steerkit._support.files import write_whole
    from steerkit.errors import SteerError
    from steerkit.report.html import report_html

    try:
        write_whole(out, report_html(evidence).encode())
    except OSError as error:
        raise SteerError(f"{out}: cannot be written ({error.strerror}); choose another folder") from None


def _command(vector: str, given: DataChoice, strengths: list[float], plan: EvidencePlan, model: ModelChoice) -> str:
    """The command line that gives the same page, with every option that changes it."""
    options: dict[str, Any] = {"controls": plan.controls, "texts": plan.texts, "neutral": plan.neutral}
    options |= {"max-new-tokens": plan.new_tokens, "seed": plan.seed, "batch-size": plan.batch_size}
    words = ["steerkit", "report", "--vector", vector, *given.words(), *([] if plan.refitted else ["--quick"])]
    words += [f"--strength={','.join(f'{one:g}' for one in strengths)}"] if strengths else []
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return shlex.join([*words, *model.words(every=True)])


def _show(evidence: Evidence, out: Path) -> None:
    typer.echo(f"wrote {out}")
    typer.echo(" ".join(evidence.verdict).strip())
    for warning in evidence.warnings:
        typer.echo(f"warning: {warning}")
    for section, reason in evidence.missing.items():
        typer.echo(f"left out, {section}: {reason}")
