"""Gathering: everything a report shows of one vector on one model, measured once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from steerkit.evaluate.confounding import confounds
from steerkit.evaluate.store_identity import environment, setup_identity
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.report.before_after import BeforeAndAfter
from steerkit.report.block_separation import BlockSeparation
from steerkit.report.effect_and_controls import EffectAndControls
from steerkit.report.evidence import Evidence
from steerkit.report.evidence_parts import EvidencePlan
from steerkit.report.workbench import Workbench
from steerkit.vector.model_identity import model_facts
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["gather"]


def gather(
    model: nn.Module,
    tokenizer: Any,
    vector: SteeringVector,
    *,
    name: str,
    held_out: ContrastSet,
    train: ContrastSet | None = None,
    plan: EvidencePlan | None = None,
    command: str = "",
    step: Callable[[str], None] = lambda note: None,
) -> Evidence:
    """Measure everything a report shows.

    Args:
        model: the model, unsteered.
        tokenizer: its tokenizer.
        vector: the vector.
        name: of the vector.
        held_out: items the vector was not fitted on.
        train: what it was fitted on; None leaves out what needs it.
        plan: how much is measured.
        command: that repeats it, for the report.
        step: called with a few words before each measurement, for a progress line.

    Returns:
        The evidence.

    Raises:
        DataError: an item has no token to be read, or `train` is not what the vector was fitted on.
        SteerError: the vector does not fit the model (see `steerkit.steer`).
    """
    bench = Workbench(model, tokenizer, vector, held_out, train, plan or EvidencePlan(), step)
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", category=UserWarning)
        vector.check(model, tokenizer)
        confounded = _confounds(bench)
        found = _measured(bench, name, command)
    told = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    for one in caught:
        if not issubclass(one.category, UserWarning):  # of libraries, not for readers of a report
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return replace(found, warnings=tuple(dict.fromkeys([*told, *confounded])))


def _measured(bench: Workbench, name: str, command: str) -> Evidence:
    """All measurements, in the order of the report."""
    separation, effect, answers = BlockSeparation(bench), EffectAndControls(bench), BeforeAndAfter(bench)
    return Evidence(
        name=name,
        title=bench.method.title,
        vector=bench.vector.describe(),
        model=_facts(bench),
        strength=bench.strength,
        neutral=bench.neutral,
        items=len(bench.held_out),
        layers=tuple(separation.layers()),
        projections=separation.projections,
        curve=effect.curve(),
        calibration=bench.vector.held_out.get("calibration"),
        refits=None if effect.refits is None else effect.refits.as_json(),
        shuffled=tuple(effect.shuffled()),
        texts=tuple(answers.texts()),
        heat=answers.heat(separation.projections),
        digests=_digests(bench),
        versions=environment(),
        missing=dict(bench.missing),
        plan=bench.plan,
        command=command,
    )


def _facts(bench: Workbench) -> dict[str, Any]:
    """What the model is called, how deep and how wide it is."""
    model = bench.setup.decoder.model
    return {
        "class": type(model).__name__,
        "name": model_facts(model)["model_id"],
        "type": bench.vector.model_type,
        "blocks": bench.depth,
        "width": bench.vector.hidden_size,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _confounds(bench: Workbench) -> list[str]:
    """Plain features that predict the label."""
    bench.step("looking for confounds")
    readout = bench.vector.readout
    which, data = ("held-out", bench.held_out) if bench.train is None else ("training", bench.train)
    if bench.method.readout is None:  # fitted on prompts alone: what was held out only measures
        which, data, readout = "held-out", bench.held_out, None
    found = confounds(bench.tokenizer, data, readout=readout)
    return [f"{which} items: {one.message}" for one in found if one.warns]


def _digests(bench: Workbench) -> dict[str, str | None]:
    """Of everything the figures depend on."""
    identity = setup_identity(bench.setup)
    return {
        "vector": bench.vector.digest,
        "training data": bench.vector.data_digest,
        "held-out data": bench.held_out.digest,
        "neutral texts": identity["neutral"],
        "chat template": identity["chat_template_sha256"],
        "tokenizer": identity["tokenizer_sha256"],
        "weights": identity["weights"],
    }
