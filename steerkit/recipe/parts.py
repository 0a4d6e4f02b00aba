"""The tables of a recipe file: model, data, method, apply, evaluate, prompting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["PARTS", "ApplyPart", "DataPart", "EvaluatePart", "MethodPart", "ModelPart", "PromptingPart"]


@dataclass(frozen=True)
class ModelPart:
    """Which model the recipe was made on, and how it is loaded, as for `steerkit.load_model`.

    `num_layers` is how many blocks it has: on a model of another depth the recipe's blocks are scaled by it.
    `trust_remote_code` says that the model needs it; whoever runs the recipe still has to allow it.
    """

    name: str = "smollm2-135m"
    num_layers: int | None = None
    revision: str | None = None
    device: str | None = None
    device_map: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    attn: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class DataPart:
    r"""Which prompts, relative to the recipe's folder, and how much of them is held out.

    The file has any format that `ContrastSet.from_file` reads; `columns` names columns that are not the usual ones.
    `against` is a second file, whose prompts are the negative side. `raw` leaves prompts without the chat template, and
    `escapes` reads a written ``\n`` in them as a line break. `marked` holds out what the file marks instead of a share.
    `pair` is one positive and one negative prompt, for methods fitted on one pair of raw prompts; the file's held-out
    items then only measure. `positive` makes it a file of labelled prompts: the label of the positive side, and where
    the file has more than two `negative`, the other. `held_out_sources` holds out whole sources instead of a share.
    """

    file: str
    held_out: float = 0.25
    seed: int = 0
    pair: tuple[str, ...] | None = None
    positive: str | None = None
    negative: str | None = None
    held_out_sources: tuple[str, ...] | None = None
    against: str | None = None
    columns: Mapping[str, str] | None = None
    raw: bool | None = None
    escapes: bool | None = None
    marked: bool | None = None


@dataclass(frozen=True)
class MethodPart:
    """How the vector is fitted."""

    name: str = "caa"
    layers: tuple[int, ...] | None = None
    sites: tuple[str, ...] | None = None
    readout: str | int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ApplyPart:
    """How the vector is meant to be used: suggested strength, useful range, tokens, unit, and beside which others.

    Where no strength is named, `steerkit extract` measures one (`steerkit.suggest_strength`), unless `no_effect` says
    that calibration found no effect on the recipe's own model: then none is suggested. `steering` is a composition
    (`steerkit.Composition`) that the vector is meant to be part of.
    """

    strength: float | None = None
    range: tuple[float, float] | None = None
    scope: str | None = None
    unit: Literal["paper", "norm"] = "paper"
    no_effect: bool = False
    steering: str | None = None


@dataclass(frozen=True)
class EvaluatePart:
    """What shows its effect: strengths at which it is measured, and questions answered before and after."""

    strengths: tuple[float, ...] = (-2.0, -1.0, 0.0, 1.0, 2.0)
    questions: tuple[str, ...] = ("How was your day?",)


@dataclass(frozen=True)
class PromptingPart:
    """System prompts that ask for the behaviour and for its opposite: wordings, or a TOML file with the two lists.

    The file is relative to the recipe's folder, so that recipes of one behaviour share it.
    """

    positive: tuple[str, ...] | None = None
    negative: tuple[str, ...] | None = None
    file: str | None = None


PARTS: dict[str, type] = {
    "model": ModelPart,
    "data": DataPart,
    "method": MethodPart,
    "apply": ApplyPart,
    "evaluate": EvaluatePart,
}
