"""A judge by its name, and its scores of many prompts as one tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from steerkit.errors import DataError, SteerError
from steerkit.evaluate.judges.endpoint import EndpointJudge
from steerkit.evaluate.judges.judge import Judge
from steerkit.evaluate.judges.local import LocalJudge
from steerkit.model import load_model

__all__ = ["check_judge", "judge_of", "rate"]


def rate(judge: Judge, prompts: Sequence[str], *, low: int, high: int, partly: bool = False) -> Tensor:
    """Let a judge score prompts.

    Args:
        judge: any judge.
        prompts: filled rubrics.
        low: lower end of the scale.
        high: upper end.
        partly: these are some of many prompts, so that it may be that none of them can be scored.

    Returns:
        [n], nan where the judge gave no score.

    Raises:
        DataError: the judge gave another number of scores, one beyond the scale, or, unless `partly`, none at all.
    """
    scores = judge.score(prompts, low=low, high=high)
    if len(scores) != len(prompts):
        raise DataError(
            f"judge {judge.name} gave {len(scores)} scores for {len(prompts)} prompts; it has to give one each"
        )
    given = [score for score in scores if score is not None and not math.isnan(score)]
    beyond = [score for score in given if not low <= score <= high]
    if beyond:
        raise DataError(f"judge {judge.name} gave {beyond[0]!r}; allowed are numbers from {low} to {high}, and None")
    if prompts and not given and not partly:
        raise DataError(
            f"judge {judge.name} scored none of {len(prompts)} prompts; it has to answer with one number from {low} to "
            f"{high} and nothing else: change the rubric or the judge"
        )
    return torch.tensor([math.nan if score is None else float(score) for score in scores], dtype=torch.float32)


def check_judge(spec: str | Judge) -> None:
    """Refuse what names no judge, without loading anything.

    Args:
        spec: as for `judge_of`.

    Raises:
        SteerError: it is empty, or no judge.
    """
    ways = "give an endpoint (https://host/v1#model-name), a model's name or folder, or an object with a method score"
    if not isinstance(spec, str | Judge):
        raise SteerError(f"judge: got {type(spec).__name__}; {ways}")
    if isinstance(spec, str) and not spec.strip():
        raise SteerError(f"judge: none is named; {ways}")


def judge_of(spec: str | Judge) -> Judge:
    """A judge from its text form, or as it is.

    Args:
        spec: ``https://host/v1#model-name`` for an endpoint; anything else is a model's name or folder, as for
            `steerkit.load_model`. A local model is loaded once as long as somebody holds its judge.

    Raises:
        SteerError: no judge is named, the address has no model, or what it is given is no judge.
        UnknownNameError: no model of that name.
        ModelError: it cannot be loaded.
    """
    check_judge(spec)
    if not isinstance(spec, str):
        return spec
    if spec.lower().startswith(("http://", "https://")):
        base_url, _, model = spec.partition("#")
        return EndpointJudge(base_url, model)
    judge = _LOADED.get(spec)
    if judge is None:
        judge = _LOADED[spec] = LocalJudge(*load_model(spec), name=spec)
    return judge


_LOADED: WeakValueDictionary[str, LocalJudge] = WeakValueDictionary()
