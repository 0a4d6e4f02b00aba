"""The persona vector at the layer that is chosen: by calibration where enough pairs are left, else unconfirmed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from steerkit.errors import VectorFileError
from steerkit.evaluate.calibration.budget import Search
from steerkit.evaluate.calibration.result import Calibration
from steerkit.evaluate.calibration.search import calibrate
from steerkit.evaluate.controls import FEWEST
from steerkit.evaluate.scorers._base import Scorer
from steerkit.evaluate.scoring import scorer_of
from steerkit.evaluate.store import Store
from steerkit.evaluate.store_identity import digest_of, weights_digest
from steerkit.evaluate.suggesting import with_suggestion
from steerkit.fitting.fitting import fit
from steerkit.network.decoder import inner_model
from steerkit.persona.choice import most_answers
from steerkit.persona.filtering import Filtered
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.persona.pipeline import Pipeline

__all__ = ["METHOD", "steering_vector"]

METHOD = "persona"


def steering_vector(
    pipeline: Pipeline, train: ContrastSet, choosing: ContrastSet | None, confirming: ContrastSet | None, kept: Filtered
) -> tuple[SteeringVector, str]:
    """Fit the vector at the layer that is chosen, or load it where nothing it depends on has changed.

    Args:
        pipeline: the extraction.
        train: pairs to extract from.
        choosing: pairs to choose the layer on.
        confirming: pairs to confirm it on.
        kept: which pairs were kept, for the vector's notes.

    Returns:
        The vector, and how its layer was chosen in one line.
    """
    identity = _identity(pipeline, kept)
    with contextlib.suppress(VectorFileError):
        made = SteeringVector.load(pipeline.file)
        if made.extra.get(METHOD, {}).get("identity") == identity:
            return made, made.extra[METHOD]["verdict"]
    with pipeline.line("choosing a layer") as step:
        found = _searched(pipeline, train, choosing, confirming, step)
        verdict = found.verdict if isinstance(found, Calibration) else found
        vector = found.vector if isinstance(found, Calibration) else None
        if vector is None:
            best = most_answers(found) if isinstance(found, Calibration) else None
            vector = _unconfirmed(pipeline, train, confirming, best)
            verdict += f"; layer {vector.sites[0].layer} {'changed most' if best else 'is taken unchosen'}"
        if isinstance(found, Calibration):  # what was tried stays, found or not
            vector = replace(vector, held_out={**vector.held_out, "calibration": found.as_json()})
    about = {
        "identity": identity,
        "trait": pipeline.spec.trait,
        "spec": pipeline.spec.digest,
        "judge": None if pipeline.judge is None else pipeline.judge.name,
        "system_turn": not pipeline.folded,
        "plan": asdict(pipeline.plan),
        "rules": asdict(pipeline.rules),
        "rows": kept.rows,
        "kept": len(kept.kept),
        "dropped": dict(kept.reasons),
        "verdict": verdict,
    }
    vector = replace(vector, seed=pipeline.plan.seed, extra={**vector.extra, METHOD: about})
    vector.save(pipeline.file)
    return vector, verdict


def _identity(pipeline: Pipeline, kept: Filtered) -> str:
    """Digest of what the vector and its card depend on."""
    pairs = (pipeline.folder / "pairs.jsonl").read_bytes().decode()
    judge = None if pipeline.judge is None else pipeline.judge.name
    model = weights_digest(inner_model(pipeline.model))
    told = [asdict(pipeline.choice), asdict(pipeline.plan), asdict(pipeline.rules), dict(kept.reasons)]
    return digest_of([pairs, judge, model, pipeline.spec.digest, *told])


def _searched(
    pipeline: Pipeline,
    train: ContrastSet,
    choosing: ContrastSet | None,
    confirming: ContrastSet | None,
    step: Callable[[str], None],
) -> Calibration | str:
    """What `calibrate` found; or why there is nothing to choose on."""
    sizes = [len(part or ()) for part in (train, choosing, confirming)]
    if choosing is None or confirming is None or sizes[0] < FEWEST or min(sizes[1:]) < 2:
        return (
            f"layer not chosen: {sizes[0]} pairs to extract from, {sizes[1]} to choose on and {sizes[2]} to "
            f"confirm on are left; at least {FEWEST}, 2 and 2 are needed"
        )
    search = Search(
        candidates=None if pipeline.choice.layers is None else [(layer,) for layer in pipeline.choice.layers],
        strengths=pipeline.choice.strengths,
        finalists=pipeline.choice.finalists,
        screened_items=pipeline.choice.screened,
        controls=pipeline.choice.controls,
        seed=pipeline.plan.seed,
        together=False,
    )
    return calibrate(
        replace(pipeline.setup, data=confirming),
        train,
        method=METHOD,
        readout=pipeline.choice.readout,
        budget=pipeline.choice.budget,
        search=search,
        effect=_effect(pipeline),
        store=Store(pipeline.folder / "choice.jsonl"),
        validation=choosing,
        step=step,
    )


def _effect(pipeline: Pipeline) -> Scorer:
    """What shows the trait: a judge's score, or the preference margin."""
    if pipeline.judge is None:
        return scorer_of("preference_margin")
    return scorer_of("judge", {"judge": pipeline.judge, "rubric": pipeline.spec.rubric, "low": 0, "high": 100})


def _unconfirmed(
    pipeline: Pipeline, train: ContrastSet, held_out: ContrastSet | None, layers: Sequence[int] | None = None
) -> SteeringVector:
    """The vector at a layer that nothing confirms: that given, the middle of those allowed, the method's own."""
    if layers is None and pipeline.choice.layers is not None:
        layers = [pipeline.choice.layers[len(pipeline.choice.layers) // 2]]
    common: dict[str, Any] = {
        "batch_size": pipeline.batch_size,
        "chat_template_kwargs": pipeline.plan.chat_template_kwargs,
    }
    model, tokenizer, readout = pipeline.model, pipeline.tokenizer, pipeline.choice.readout
    vector = fit(model, tokenizer, train, method=METHOD, layers=layers, readout=readout, held_out=held_out, **common)
    return with_suggestion(model, tokenizer, vector, **common)
