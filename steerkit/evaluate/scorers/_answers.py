"""What several scorers ask of answers that the model is shown: neutral texts, their likelihood, where two answers part.

What is asked of the unsteered model is kept with the setup, so that scorers and strengths share one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from steerkit.errors import DataError
from steerkit.evaluate.setup import Setup, shared_system
from steerkit.evaluate.trial import Trial
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import Rendered

__all__ = [
    "Fork",
    "activations",
    "calm_texts",
    "fork",
    "fork_logits",
    "log_probs",
    "on_topic_texts",
    "token_counts",
    "token_kl",
]


class Fork(NamedTuple):
    """The place at which two answers to one prompt differ first.

    Attributes:
        text: one of both, cut behind its first token of its own.
        ids: that token in the first answer, and in the second.
    """

    text: Rendered
    ids: tuple[int, int]


def calm_texts(setup: Setup) -> list[Rendered]:
    """The neutral texts as the model reads them.

    Args:
        setup: where they stand.

    Raises:
        DataError: there is none, or one has no answer.
    """
    return _answered(setup, setup.calm, "neutral text")


def on_topic_texts(setup: Setup) -> list[Rendered]:
    """The positive answers of the data; a contrast in the system prompt is left out.

    Args:
        setup: where the data stands.

    Raises:
        DataError: there is no data, or an item's positive side has no answer.
    """
    sides: list[tuple[Conversation, Conversation]] = []
    if setup.data is not None:
        sides = list(zip(setup.data.positive, setup.data.negative, strict=False))
    plain = [replace(side, system=shared_system(side, other)) for side, other in sides]
    return _answered(setup, plain, "positive side of item")


def token_counts(rendered: Sequence[Rendered]) -> Tensor:
    """[n] answer tokens of each text, float32.

    Args:
        rendered: texts with answers.
    """
    return torch.tensor([float(len(text.ids) - text.prompt_length) for text in rendered])


def token_kl(steered: Tensor, baseline: Tensor) -> Tensor:
    """KL divergence of predictions from those of the unsteered model, at every token.

    Args:
        steered: [t, v] log-probabilities.
        baseline: [t, v], of the unsteered model.

    Returns:
        [t] nats.
    """
    # A token that is ruled out altogether counts nothing: 0 * log 0 = 0. Below zero there is rounding only.
    ruled_out = torch.isneginf(baseline)
    return (baseline.exp() * (baseline - steered)).masked_fill(ruled_out, 0.0).sum(dim=-1).clamp_min(0.0)


def log_probs(trial: Trial, rendered: Sequence[Rendered]) -> list[Tensor]:
    """Log-probability of every answer token; that of the unsteered model is computed once for a setup.

    Args:
        trial: steered or the baseline.
        rendered: texts with answers.

    Returns:
        per text [t] float32, nats.
    """
    if trial.vector is not None:
        return trial.log_probs(rendered)
    kept, key = trial.setup.scored, ("log_probs", tuple(rendered))
    if key not in kept:
        kept[key] = trial.log_probs(rendered)
    found: list[Tensor] = kept[key]
    return found


def activations(trial: Trial, rendered: Sequence[Rendered], site: str) -> Tensor:
    """Mean activation over the answer's tokens; that of the unsteered model is read once for a setup.

    Args:
        trial: steered or the baseline.
        rendered: texts with answers.
        site: where to read, such as ``"resid_post.12"``.

    Returns:
        [n, d] float32.
    """
    if trial.vector is not None:
        return trial.record(rendered, [site], readout="response_mean")[site]
    kept, key = trial.setup.scored, ("activations", site, tuple(rendered))
    if key not in kept:
        kept[key] = trial.record(rendered, [site], readout="response_mean")[site]
    found: Tensor = kept[key]
    return found


def fork(first: Rendered, second: Rendered) -> Fork | None:
    """Find where two answers to one prompt part.

    Args:
        first: the prompt with one answer.
        second: the same prompt with another.

    Returns:
        The fork; None where one answer is the other one, or its beginning.

    Raises:
        DataError: they differ before the answer begins.
    """
    pairs = zip(first.ids, second.ids, strict=False)
    place = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
    if place is None:
        return None
    # Where a tokenizer joins the prompt's end with one of the answers, that answer begins a token earlier.
    shown = first if first.prompt_length <= second.prompt_length else second
    if place < shown.prompt_length:
        raise DataError(
            f"{first.text[-40:]!r} and {second.text[-40:]!r} differ in token {place}, before the answer begins; "
            "give both the same prompt"
        )
    cut = replace(shown, ids=shown.ids[: place + 1], offsets=shown.offsets[: place + 1])
    return Fork(cut, (first.ids[place], second.ids[place]))


def fork_logits(trial: Trial, forks: Sequence[Fork]) -> Tensor:
    """Logits of both tokens of each fork, given all that stands before it.

    Args:
        trial: steered or the baseline.
        forks: where answers part.

    Returns:
        [n, 2] float32 on the CPU.
    """
    found = torch.empty(len(forks), 2)
    for answer in trial.answers([one.text for one in forks]):
        found[answer.row] = answer.logits[-1, list(forks[answer.row].ids)].cpu()
    return found


def _answered(setup: Setup, items: Sequence[Conversation], kind: str) -> list[Rendered]:
    for number, item in enumerate(items):
        if item.answer is None:
            raise DataError(f"{kind} {number} has no answer, whose tokens are scored; give one")
    if not items:
        raise DataError(f"there is no {kind}; give some, with answers")
    return [setup.render(item) for item in items]
