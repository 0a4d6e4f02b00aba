"""`steerkit discover`: directions that nobody has named, and what each of them does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit._support.files import write_whole
from steerkit._support.progress import status
from steerkit.cli._data import ColumnsOption, EscapesOption, check_reading, columns_of
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import BatchSize, Json, number, print_json, stdout, table, usage_line

if TYPE_CHECKING:
    from steerkit.evaluate.discoveries import Discovery
    from steerkit.evaluate.setup import Setup
    from steerkit.prompts.conversation import Conversation
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["run"]

FACTS = "discovered.json"
_OF_A_RECIPE = 4

PromptsOption = Annotated[
    str | None, typer.Option(metavar="FILE", help="What is learned on: prompts or chats, any format; - reads stdin.")
]
RecipeOption = Annotated[
    str | None, typer.Option(metavar="RECIPE", help="Learn on the prompts of a recipe's training items instead.")
]
LimitOption = Annotated[
    int | None, typer.Option(min=1, help=f"The first prompts only. (default: all; {_OF_A_RECIPE} of a recipe)")
]
NormOption = Annotated[
    float | None,
    typer.Option(help="Length of each direction. (default: an eighth of the activations' median norm)"),
]
SourceOption = Annotated[int | None, typer.Option(min=0, help="Block whose output is pushed. (default: at a quarter)")]
TargetOption = Annotated[
    int | None, typer.Option(min=0, help="Block whose output is to change most. (default: at three quarters)")
]
LastOption = Annotated[
    int, typer.Option(min=0, help="Count only so many tokens at a prompt's end. (default: all but the first)")
]
KnownOption = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE", help="Vectors to lie beside. (default: those shipped for the model)"),
]


@loads_model
def run(
    out: Annotated[Path, typer.Option(metavar="PACK", help="Folder for the vectors; it must not hold files yet.")],
    prompts: PromptsOption = None,
    recipe: RecipeOption = None,
    limit: LimitOption = None,
    columns: ColumnsOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Leave prompts as they are, without the chat template.")] = False,
    escapes: EscapesOption = False,
    count: Annotated[int, typer.Option(min=1, help="How many directions, orthogonal to each other.")] = 8,
    norm: NormOption = None,
    source_block: SourceOption = None,
    target_block: TargetOption = None,
    last: LastOption = 0,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimiser.")] = 60,
    controls: Annotated[int, typer.Option(min=0, help="Random directions of the same length, shown beside.")] = 3,
    known: KnownOption = None,
    neutral: Annotated[int, typer.Option(min=2, help="Neutral texts that the KL divergence is measured on.")] = 16,
    ask: Annotated[str, typer.Option(help="What the steered model answers to.")] = "How was your day?",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answers, in tokens.")] = 24,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 2, help="Of the directions that it starts from.")] = 0,
    model: ModelChoice = DEFAULT,
    batch_size: BatchSize = 16,
    as_json: Json = False,
) -> None:
    """Find directions that nobody has named (MELBO), write them as a pack of vectors, and show what each does.

    Pushes of one length at one block are learned on a few prompts, so that they change a later block most. Nothing says
    what they should do: each is shown with its change, the KL divergence on neutral texts, the known vector that it
    lies along and a steered answer, beside random directions of the same length.
    """
    _check(prompts, recipe, norm)
    check_reading(prompts, columns, raw=raw, escapes=escapes)

    from steerkit.evaluate.discoveries import looked_at
    from steerkit.fitting.discovering import discover
    from steerkit.network.sites import Site
    from steerkit.vector.pack import check_pack, save_pack

    check_pack(out)
    learned_on, model = _prompts(prompts, recipe, model, columns, raw=raw, escapes=escapes)
    learned_on = learned_on[: limit or (len(learned_on) if recipe is None else _OF_A_RECIPE)]
    beside = _known(known, model.name)
    loaded, tokenizer = model.load()
    settings: dict[str, Any] = {"count": count, "norm": norm or 0.0, "last": last, "steps": steps, "seed": seed}
    settings["target"] = -1 if target_block is None else target_block
    how: dict[str, Any] = {"site": None if source_block is None else Site(source_block), "batch_size": batch_size}
    found = discover(loaded, tokenizer, learned_on, settings=settings, progress=True, **how)
    named = {f"melbo-{place}": vector for place, vector in enumerate(found, start=1)}
    files = save_pack(named, out)
    with status("random directions") as step:
        drawn = {}
        if controls:  # of another seed: the same one would draw what the found ones started from
            settings |= {"count": controls, "steps": 0, "seed": seed + 1}
            made = discover(loaded, tokenizer, learned_on, settings=settings, **how)
            drawn = {f"random-{place}": vector for place, vector in enumerate(made, start=1)}
        step("KL divergence and answers")
        setup = _setup(loaded, tokenizer, ask, neutral, max_new_tokens, batch_size)
        seen, plain = looked_at(setup, {**named, **drawn}, beside), setup.baseline.texts[0]
    answer = {**_shared(found[0], out, learned_on, setup), "ask": ask, "unsteered": plain}
    answer["vectors"] = [{"file": str(file), **one.as_json()} for file, one in zip(files, seen, strict=False)]
    answer["random"] = [one.as_json() for one in seen[len(files) :]]
    write_whole(out / FACTS, (json.dumps(answer, indent=2, ensure_ascii=False) + "\n").encode())
    if as_json:
        print_json(answer)
    else:
        _show(answer, seen, usage_line(ask, str(files[0]), model=model))


def _check(prompts: str | None, recipe: str | None, norm: float | None) -> None:
    """Refuse options that do not go together or mean nothing, before anything is read.

    Raises:
        BadParameter: one of these.
    """
    if (prompts is None) == (recipe is None):
        raise typer.BadParameter("give one of: --prompts, --recipe")
    if norm is not None and norm <= 0:
        raise typer.BadParameter(f"--norm {norm:g}: a length is above 0; without it, it is an eighth of a token's")


def _setup(model: Any, tokenizer: Any, ask: str, neutral: int, max_new_tokens: int, batch_size: int) -> Setup:
    """What the vectors are looked at on."""
    from steerkit.evaluate.setup import Setup
    from steerkit.prompts.conversation import Conversation

    how: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    return Setup(model, tokenizer, prompts=[Conversation(ask)], **how).first_neutral(neutral)


def _prompts(
    file: str | None, recipe: str | None, model: ModelChoice, columns: list[str] | None, *, raw: bool, escapes: bool
) -> tuple[Sequence[Conversation], ModelChoice]:
    """What is learned on, and the model, which a recipe may name."""
    if file is not None:
        from steerkit.prompts.files.prompts import read_prompts
        from steerkit.prompts.prompt_set import PromptSet

        return PromptSet(tuple(read_prompts(file, columns_of(columns), raw=raw, escapes=escapes))).prompts, model
    from steerkit.prompts.prompt_set import PromptSet
    from steerkit.recipe import find_recipe

    chosen = find_recipe(str(recipe))
    return PromptSet.of(chosen.split()[0]).prompts, model.of(chosen.model)


def _known(names: Sequence[str] | None, model: str) -> dict[str, SteeringVector]:
    """Vectors to lie beside: those named, else the shipped ones of the model."""
    from steerkit._support.shipped import shipped_vectors, vector_path
    from steerkit.vector.steering_vector import SteeringVector

    if names is None:
        shipped = {name.rpartition("/")[2]: name for name in shipped_vectors(model)}
    else:
        shipped = {name: name for name in names}
    return {shown: SteeringVector.load(vector_path(name, model)) for shown, name in shipped.items()}


def _shared(vector: SteeringVector, out: Path, prompts: Sequence[Any], setup: Setup) -> dict[str, Any]:
    """What all directions have in common."""
    from steerkit.methods.melbo import MELBO

    (site,) = vector.sites
    return {
        "pack": str(out),
        "source": str(site),
        "target": str(MELBO.from_settings(vector.settings).target_site(setup.decoder)),
        "norm": float(vector.params(site)["direction"].norm()),
        "prompts": len(prompts),
        "neutral_texts": len(setup.calm),
    }


def _show(answer: Mapping[str, Any], seen: Sequence[Discovery], usage: str) -> None:
    """A table of figures, and under it what the model says under each."""
    columns = ("vector", "change", "KL (95 %)", "nearest", "cosine")
    shown = table(*columns, right=("change", "KL (95 %)", "cosine"))
    shown.columns[0].no_wrap = True
    for one in seen:
        beside = one.nearest
        kl = f"{one.kl.mean:.3f} ({one.kl.low:.3f} to {one.kl.high:.3f})"
        cells = ("-", "-") if beside is None else (beside.vector, f"{beside.cosine:+.2f}")
        shown.add_row(one.name, number(one.change, ".4g"), kl, *cells)
    console = stdout()
    where = f"length {answer['norm']:.3g} at {answer['source']}, to change {answer['target']}"
    typer.echo(f"wrote {answer['pack']}: {where}")
    console.print(shown)
    console.print(f"> {answer['ask']}")
    texts = table("vector", "answer")
    texts.columns[0].no_wrap = True
    for name, text in (("unsteered", answer["unsteered"]), *((one.name, one.text) for one in seen)):
        texts.add_row(name, " ".join(text.split()))
    console.print(texts)
    console.print(
        f"change: mean over {answer['prompts']} prompts; KL: nats a token, {answer['neutral_texts']} neutral texts"
    )
    typer.echo(f"use one:\n  {usage}")
