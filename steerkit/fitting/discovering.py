"""`discover`: prompts and a model in, several vectors out that nobody has asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from steerkit.errors import FitError
from steerkit.fitting.fitting import fit
from steerkit.methods._base import Method
from steerkit.methods._protocols import FindsSeveral
from steerkit.methods._registry import method_of, resolve
from steerkit.network.sites import Site
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Prompt
from steerkit.prompts.prompt_set import PromptSet
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["discover"]


def discover(
    model: nn.Module,
    tokenizer: Any,
    prompts: ContrastSet | PromptSet | Sequence[Prompt],
    *,
    method: str | Method = "melbo",
    site: Site | str | None = None,
    batch_size: int = 16,
    settings: Mapping[str, Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> list[SteeringVector]:
    """Find several vectors in one fit, with nothing said of what they should do.

    Args:
        model: any decoder-only transformers model; unchanged afterwards.
        tokenizer: its tokenizer.
        prompts: a list of prompts, or a contrast set, of which both sides' prompts are taken.
        method: one that finds several, such as ``"melbo"``, or such a method with its settings.
        site: where it acts; None takes the method's own.
        batch_size: rows per pass.
        settings: the method's settings where `method` is a name, such as ``{"count": 16, "norm": 8.0}``.
        chat_template_kwargs: passed on to the chat template.
        progress: show a progress bar on stderr.

    Returns:
        One vector for each direction, in the method's order; of `melbo` the largest change first.

    Raises:
        FitError: the method finds one vector only, or see `fit`.
        SteerError: see `fit`.

    Example:
        vectors = steerkit.discover(model, tokenizer, ["How was your day?"], settings={"count": 4})
    """
    kind = resolve(method) if isinstance(method, str) else type(method)
    if not issubclass(kind, FindsSeveral):
        raise FitError(f"{kind.name} finds one vector; use `fit`, or give a method that finds several, such as melbo")
    vector = fit(
        model,
        tokenizer,
        prompts,
        method=method,
        sites=site,
        batch_size=batch_size,
        settings=settings,
        chat_template_kwargs=chat_template_kwargs,
        progress=progress,
    )
    found: Any = method_of(vector)
    return list(found.apart(vector))
