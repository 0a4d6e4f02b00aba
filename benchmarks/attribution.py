"""Slopes at strength 0 against measured effects, and calibration by them: `python -m benchmarks.attribution`.

For each model and recipe CAA is fitted at single blocks; the slope of the preference margin at each, from one forward
and one backward pass over the held-out items, stands beside the change that is measured at some strengths. Then
`calibrate` runs twice on the same items, ranking blocks by steering at each and by slopes: what it finds, and what each
costs in CPU seconds and in tokens that go forward through the model, before the confirmation and in all.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from scipy.stats import pearsonr, spearmanr

import steerkit
from benchmarks.results import recorded
from steerkit.evaluate.attribution import attribute_all
from steerkit.evaluate.calibration import Calibration, Search, calibrate
from steerkit.evaluate.fits import Fits
from steerkit.evaluate.scoring import measure
from steerkit.evaluate.setup import Setup
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.recipe import find_recipe

RECIPES = ("enthusiasm-caa", "formality-caa", "imagery-caa", "optimism-caa", "refusal-caa", "warmth-caa")
MODELS = ("smollm2-135m", "gemma3-270m")
SCREENS = ("steering", "attribution")
CONFIRMS = "fitting on all items"


def main() -> None:
    """Print both comparisons as Markdown tables."""
    options = arguments()
    title = "Attribution: slopes against measured effects"
    with recorded("attribution", title, "benchmarks.attribution", wanted=options.write) as facts:
        for name in options.model or MODELS:
            model, tokenizer = steerkit.load_model(name, device="cpu")
            facts.setdefault("model", model)
            if not options.no_slopes:
                slopes(name, model, tokenizer, options)
            if not options.no_calibrate:
                calibrations(name, model, tokenizer, options)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attribution")
    parser.add_argument("recipe", nargs="*", default=list(RECIPES), help="whose pairs and readout are used")
    parser.add_argument("--model", action="append", help="repeatable (default: smollm2-135m and gemma3-270m)")
    parser.add_argument("--blocks", type=int, default=10, help="blocks that are compared, evenly over the depth")
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--train", type=int, help="fit on so many pairs only")
    parser.add_argument("--items", type=int, default=16, help="held-out pairs that are measured")
    parser.add_argument("--neutral", type=int, default=40, help="neutral texts of the calibrations")
    parser.add_argument("--texts", type=int, default=8, help="prompts answered in the calibrations")
    parser.add_argument("--every-block", action="store_true", help="calibrate over every middle block")
    parser.add_argument("--screen", action="append", choices=SCREENS, help="of the calibrations (default: both)")
    parser.add_argument("--no-slopes", action="store_true", help="leave the first comparison out")
    parser.add_argument("--no-calibrate", action="store_true", help="leave the second comparison out")
    parser.add_argument("--write", action="store_true", help="make the page in docs/results of it too")
    return parser.parse_args()


def items_of(name: str, options: argparse.Namespace) -> tuple[Any, ContrastSet, ContrastSet]:
    """A recipe with its training and its held-out items, as many as are wanted."""
    recipe = find_recipe(name)
    train, held_out = recipe.split()
    return recipe, first(train, options.train), first(held_out, options.items)


def first(data: ContrastSet, count: int | None) -> ContrastSet:
    """The first pairs of a set."""
    return data if count is None else replace(data, positive=data.positive[:count], negative=data.negative[:count])


@dataclass
class Spent:
    """What something cost so far: CPU seconds, and tokens that went forward through the model."""

    seconds: float = 0.0
    tokens: int = 0


@contextmanager
def counted(model: Any) -> Iterator[Callable[[], Spent]]:
    """Ask what has been spent since the beginning."""
    tokens, started = [0], time.process_time()

    def seen(_module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        tokens[0] += 0 if ids is None else ids.numel()

    handle = model.register_forward_pre_hook(seen, with_kwargs=True)
    try:
        yield lambda: Spent(time.process_time() - started, tokens[0])
    finally:
        handle.remove()


def slopes(name: str, model: Any, tokenizer: Any, options: argparse.Namespace) -> None:
    """Slopes beside measured effects at single blocks."""
    columns = [f"at {strength:g}" for strength in options.strengths]
    print(
        f"\nSlopes on {name}: Pearson's and Spearman's correlation over blocks with the measured change, by strength.\n"
    )
    print(f"| recipe | blocks | items | {' | '.join(columns)} | CPU s of slopes | of one strength |")
    print(f"| --- | --- | --- | {' | '.join('---' for _ in columns)} | --- | --- |", flush=True)
    for one in options.recipe:
        recipe, train, held_out = items_of(one, options)
        depth = find_depth(model)
        blocks = sorted({round(place * (depth - 1) / (options.blocks + 1)) for place in range(1, options.blocks + 1)})
        setup = Setup(model, tokenizer, held_out)
        fits = Fits(setup, train, "caa", blocks, readout=recipe.method.readout)
        vectors = [fits.at([block]) for block in blocks]
        measure(setup.baseline)
        with counted(model) as spent:
            found = [slope.total.estimate.mean for slope in attribute_all(setup, vectors, in_parts=False)]
            of_slopes = spent()
        cells, of_one = [], Spent()
        for strength in options.strengths:
            with counted(model) as spent:
                trials = setup.trials([(vector, strength) for vector in vectors])
                effects = [measured_effect(trial) for trial in trials]
                of_one = spent()
            cells.append(f"{pearsonr(found, effects).statistic:.3f}, {spearmanr(found, effects).statistic:.3f}")
        times = f"{of_slopes.seconds:.0f} | {of_one.seconds:.0f}"
        print(f"| `{one}` | {len(blocks)} | {len(held_out)} | {' | '.join(cells)} | {times} |", flush=True)


def measured_effect(trial: Any) -> float:
    """The change of the preference margin."""
    change = measure(trial)["preference_margin"].change
    assert change is not None
    return change.mean


def find_depth(model: Any) -> int:
    """How many blocks a model has."""
    return int(model.config.get_text_config().num_hidden_layers)


def calibrations(name: str, model: Any, tokenizer: Any, options: argparse.Namespace) -> None:
    """`calibrate` by steering and by slopes, one after the other."""
    print(f"\nCalibration on {name}, blocks ranked by steering at each and by slopes. Effect: the change of the")
    print("preference margin that is confirmed on held-out items. Cost until the choice, and with its confirmation.\n")
    print("| recipe | screen | candidates | layers | strength | effect (95 %) | CPU s until chosen | in all | tokens |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for one in options.recipe:
        recipe, train, held_out = items_of(one, options)
        depth = find_depth(model)
        candidates: Sequence[Sequence[int]] = recipe.candidates(depth, "caa")
        if options.every_block:
            candidates = [(block,) for block in range(round(0.2 * (depth - 1)), round(0.8 * (depth - 1)) + 1)]
        for screen in options.screen or SCREENS:
            search = Search(candidates=candidates, controls=3, screen=screen)
            marks: dict[str, Spent] = {}
            setup = Setup(model, tokenizer, held_out, texts=options.texts).first_neutral(options.neutral)
            with counted(model) as spent:

                def step(note: str, marks: dict[str, Spent] = marks, spent: Callable[[], Spent] = spent) -> None:
                    if note == CONFIRMS:
                        marks["chosen"] = spent()

                found = calibrate(setup, train, readout=recipe.method.readout, search=search, step=step)
                whole = spent()
            row(one, screen, len(candidates), found, marks.get("chosen", whole), whole)


def row(recipe: str, screen: str, candidates: int, found: Calibration, chosen: Spent, whole: Spent) -> None:
    """Print what one calibration found and cost."""
    effect = "-"
    if found.confirmed:
        own = found.confirmed[found.effect].effect
        effect = f"{own.mean:+.3f} ({own.low:+.3f} to {own.high:+.3f})" + ("" if found.works else ", not confirmed")
    layers = "+".join(map(str, found.layers)) or "-"
    strength = "-" if found.strength is None else f"{found.strength:g}"
    cells = [f"`{recipe}`", screen, str(candidates), layers, strength, effect]
    cells += [f"{chosen.seconds:.0f}", f"{whole.seconds:.0f}", f"{chosen.tokens}, {whole.tokens}"]
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
