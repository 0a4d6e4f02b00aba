"""`steerkit demo`: the main job in one go. Look at the answers, then measure what changed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from steerkit._support.progress import bar
from steerkit._support.shipped import recipes, vectors
from steerkit.cli import _demo_tables as tables
from steerkit.cli._files import check_writable
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import BatchSize, Json, print_json

if TYPE_CHECKING:
    from steerkit.evaluate.by_prompt_kind import Kind
    from steerkit.evaluate.curve import Curve
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.recipe import Recipe
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["run"]

CONTROLS = 5
MAX_NEW_TOKENS = 40


class Extent(NamedTuple):
    """On how much a demo measures.

    Attributes:
        pairs: held-out pairs at most; None takes all.
        kind: prompts answered of each of two kinds.
        ends_only: random directions stand beside the lowest and the highest strength only.
    """

    pairs: int | None
    kind: int
    ends_only: bool


BRIEF = Extent(pairs=14, kind=20, ends_only=True)
FULL = Extent(pairs=None, kind=60, ends_only=False)


@loads_model
def run(
    recipe: Annotated[str, typer.Option(help="A recipe's name, behaviour or file.")] = "optimism",
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the vector and the picture go.")] = Path("out"),
    full: Annotated[
        bool,
        typer.Option("--full", help="Fit the vector even if it is shipped; measure on everything that is held out."),
    ] = False,
    strength: Annotated[float | None, typer.Option(help="At which to answer. (default: the suggested one)")] = None,
    model: ModelChoice = DEFAULT,
    batch_size: BatchSize = 16,
    as_json: Json = False,
) -> None:
    """Do the main job in one go: take or fit a recipe's vector, steer both ways, measure the effect, draw it.

    Of a recipe of two kinds of prompts, answers of either kind are counted: how many refuse, how many stay as they
    were. Writes <out>/<recipe>.safetensors, its card <out>/<recipe>.md and, of a curve, <out>/<recipe>.png.
    """
    from steerkit.model import weights_of
    from steerkit.network.decoder import inner_model
    from steerkit.recipe import find_recipe

    chosen = find_recipe(recipe)
    target = out / f"{chosen.name}.safetensors"
    train, held_out = chosen.split()
    check_writable(target)
    model = model.of(chosen.model)
    name = model.name
    shipped = None if full else _shipped(chosen, name, train)
    if shipped is not None:
        _strength(shipped, strength)  # before the model is loaded for nothing
    loaded, tokenizer = model.load()
    vector = shipped or chosen.extract(loaded, tokenizer, batch_size=batch_size, progress=True)
    vector.save(target)
    used = _strength(vector, strength)
    answers = _answers(loaded, tokenizer, chosen, vector, used)
    if not as_json:
        tables.show_answers(chosen, name, vector, answers, is_shipped=shipped is not None)
    curve, kinds = _measure(loaded, tokenizer, held_out, chosen, vector, used, FULL if full else BRIEF, batch_size)
    weights = str(weights_of(inner_model(loaded)))
    card = _write_card(target.with_suffix(".md"), vector, curve, kinds, answers, chosen.evaluate.questions, weights)
    picture = None if curve is None else _draw(curve, target.with_suffix(".png"), chosen, vector)
    if as_json:
        found = _Findings(chosen, name, target, vector, shipped is not None, answers, curve, kinds, card, picture)
        print_json(found.as_json())
        return
    if curve is None:
        tables.show_kinds(kinds, chosen)
    else:
        tables.show_curve(curve, len(held_out))
    tables.show_files(chosen, model, target, max(answers), picture, is_drawn=curve is not None, is_full=full)


@dataclass(frozen=True)
class _Findings:
    """What a demo leaves behind; `answers` are by strength, in the order of the recipe's questions."""

    recipe: Recipe
    model: str
    file: Path
    vector: SteeringVector
    is_shipped: bool
    answers: Mapping[float, Sequence[str]]
    curve: Curve | None
    kinds: Sequence[Kind]
    card: Path
    picture: Path | None

    def as_json(self) -> dict[str, Any]:
        """Everything, as one JSON object."""
        return {
            "recipe": self.recipe.name,
            "model": self.model,
            "vector": {"file": str(self.file), "shipped": self.is_shipped, **self.vector.describe()},
            "answers": [
                {"prompt": question, "strength": strength, "text": texts[number]}
                for number, question in enumerate(self.recipe.evaluate.questions)
                for strength, texts in self.answers.items()
            ],
            **self._measured(),
            "card": str(self.card),
            "picture": None if self.picture is None else str(self.picture),
        }

    def _measured(self) -> dict[str, Any]:
        """The curve, or what each kind of prompts got."""
        if self.curve is None:
            return {"kinds": [kind.as_json() for kind in self.kinds]}
        return {
            "curve": self.curve.as_rows(),
            "items": self.curve.items,
            "rises": self.curve.rises,
            "clear_of_controls": self.curve.clear_of_controls,
        }


def _shipped(recipe: Recipe, model: str, train: ContrastSet) -> SteeringVector | None:
    """The shipped vector of a shipped recipe, if it was fitted on this model and on the recipe's items of today."""
    from steerkit.vector.steering_vector import SteeringVector

    file = vectors().get(f"{model}/{recipe.name}")
    if file is None or recipe.source != recipes().get(recipe.name):
        return None
    vector = SteeringVector.load(file)
    return vector if vector.data_digest == train.digest else None


def _strength(vector: SteeringVector, given: float | None) -> float:
    """The strength given, else the suggested one.

    Raises:
        StrengthError: there is none of both.
    """
    from steerkit.methods._registry import default_strength

    return default_strength(vector) if given is None else given


def _answers(
    model: Any, tokenizer: Any, recipe: Recipe, vector: SteeringVector, strength: float
) -> dict[float, list[str]]:
    """The recipe's questions answered at strength 0, at the given one and, if it has two ways, at minus it."""
    import steerkit

    shown = (0.0, strength) if recipe.data.positive is not None else (-strength, 0.0, strength)
    answers = {}
    with bar("answering", len(shown)) as step:
        for one in shown:
            answers[one] = steerkit.generate(
                model, tokenizer, recipe.evaluate.questions, vector=vector, strength=one, max_new_tokens=MAX_NEW_TOKENS
            )
            step()
    return answers


def _measure(
    model: Any,
    tokenizer: Any,
    held_out: ContrastSet,
    recipe: Recipe,
    vector: SteeringVector,
    strength: float,
    extent: Extent,
    batch_size: int,
) -> tuple[Curve | None, Sequence[Kind]]:
    """The curve over strengths or, of a recipe of two kinds of prompts, what each kind got."""
    from steerkit.evaluate.by_prompt_kind import by_kind
    from steerkit.evaluate.curve import strength_response
    from steerkit.evaluate.setup import Setup

    setup = Setup(model, tokenizer, held_out, batch_size=batch_size)
    if recipe.data.positive is not None:
        setup = replace(setup, texts=extent.kind, max_new_tokens=MAX_NEW_TOKENS)
        with bar("measuring", 2) as step:
            return None, by_kind(setup, vector, strength, step=step)
    strengths = recipe.evaluate.strengths
    beside = tuple(dict.fromkeys((strengths[0], strengths[-1]))) if extent.ends_only else strengths
    setup = replace(setup, data=_evenly(held_out, extent.pairs))
    with bar("measuring", len(strengths) + CONTROLS * len(beside)) as step:
        curve = strength_response(setup, vector, strengths, controls=CONTROLS, control_strengths=beside, step=step)
    return curve, ()


def _evenly(data: ContrastSet, pairs: int | None) -> ContrastSet:
    """At most so many of the pairs, evenly over all of them."""
    from steerkit.prompts.rendering import spread

    if pairs is None or not data.paired:
        return data
    return data.items_at(spread(range(len(data)), pairs))


def _write_card(
    path: Path,
    vector: SteeringVector,
    curve: Curve | None,
    kinds: Sequence[Kind],
    answers: Mapping[float, Sequence[str]],
    questions: Sequence[str],
    weights: str,
) -> Path:
    from steerkit.report.card import Answer, vector_card

    listed = [
        Answer(question, strength, texts[number])
        for number, question in enumerate(questions)
        for strength, texts in answers.items()
    ]
    card = vector_card(
        path.stem, vector, curve=curve, kinds=kinds, answers=listed, new_tokens=MAX_NEW_TOKENS, weights=weights
    )
    path.write_text(card, encoding="utf-8")
    return path


def _draw(curve: Curve, path: Path, recipe: Recipe, vector: SteeringVector) -> Path | None:
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from steerkit.report.plots.curves import plot_curve

    return plot_curve(curve, path, title=recipe.title or recipe.name, unit=vector.unit)
