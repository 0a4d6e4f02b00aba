"""What several scorers ask of answers that the model is shown: neutral texts, their likelihood, where two answers part.

What is asked of the unsteered model is kept with the setup, so that scorers and strengths share one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from steerkit.errors import DataError
from steerkit.evaluate.setup import Setup, shared_system
from steerkit.evaluate.trial import Answer, Trial
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import Rendered

__all__ = [
    "activations",
    "answer_kl",
    "calm_pairs",
    "calm_texts",
    "expected",
    "log_probs",
    "on_topic_texts",
    "tiles",
    "token_counts",
    "token_kl",
]

_TILE = 2**16  # logits


def calm_texts(setup: Setup) -> list[Rendered]:
    """The neutral texts as the model reads them.

    Args:
        setup: where they stand.

    Raises:
        DataError: there is none, or one has no answer.
    """
    return _answered(setup, setup.calm, "neutral text")


def calm_pairs(setup: Setup) -> tuple[list[Rendered], list[Rendered]]:
    """The neutral texts as the model reads them under the setup's system prompt, and as the unsteered model does.

    Args:
        setup: where they stand.

    Raises:
        DataError: there is none, or one has no answer.
    """
    texts = calm_texts(setup)
    return texts, texts if setup.system is None else calm_texts(setup.plain)


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
    return torch.tensor([float(len(text.ids) - text.prompt_length) for text in rendered], dtype=torch.float32)


def token_kl(steered: Tensor, baseline: Tensor) -> Tensor:
    """KL divergence of predictions from those of the unsteered model, at every token.

    Args:
        steered: [t, v] log-probabilities.
        baseline: [t, v], of the unsteered model.

    Returns:
        [t] nats.
    """
    # Below zero there is rounding only.
    return expected(baseline, baseline - steered).clamp_min(0.0)


def expected(logs: Tensor, values: Tensor) -> Tensor:
    """What values are on average under a prediction, at every token.

    Args:
        logs: [t, v] log-probabilities.
        values: [t, v]; what they are of a token that is ruled out altogether counts nothing, be it infinite.

    Returns:
        [t]
    """
    # Looking is cheap beside masking, which is nearly always for nothing.
    if bool(torch.isneginf(logs.amin())):
        values = values.masked_fill(torch.isneginf(logs), 0.0)
    found: Tensor = torch.linalg.vecdot(logs.exp(), values)
    return found


def tiles(answer: Answer) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One answer in pieces that a CPU keeps in its cache while they are looked at several times; else in one piece.

    Args:
        answer: with what the unsteered model predicts.

    Yields:
        Log-probabilities [t, v] with and without steering, and the tokens [t].
    """
    assert answer.baseline is not None
    count, width = answer.logits.shape
    size = max(1, _TILE // width) if answer.logits.device.type == "cpu" else count
    for start in range(0, count, size):
        part = slice(start, start + size)
        yield torch.log_softmax(answer.logits[part], dim=-1), answer.baseline[part], answer.targets[part]


def answer_kl(answer: Answer) -> Tensor:
    """KL divergence from the unsteered model at every token of one answer.

    Args:
        answer: with what the unsteered model predicts.

    Returns:
        [t] nats, on the CPU.
    """
    return torch.cat([token_kl(steered, base) for steered, base, _ in tiles(answer)]).cpu()


def log_probs(trial: Trial, rendered: Sequence[Rendered]) -> list[Tensor]:
    """Log-probability of every answer token; that of the unsteered model is computed once for a setup.

    Args:
        trial: steered or the baseline.
        rendered: texts with answers.

    Returns:
        per text [t] float32, nats.
    """
    if not trial.is_baseline:
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
    if not trial.is_baseline:
        return trial.record(rendered, [site], readout="response_mean")[site]
    kept, key = trial.setup.scored, ("activations", site, tuple(rendered))
    if key not in kept:
        kept[key] = trial.record(rendered, [site], readout="response_mean")[site]
    found: Tensor = kept[key]
    return found


def _answered(setup: Setup, items: Sequence[Conversation], kind: str) -> list[Rendered]:
    for number, item in enumerate(items):
        if item.answer is None:
            raise DataError(f"{kind} {number} has no answer, whose tokens are scored; give one")
    if not items:
        raise DataError(f"there is no {kind}; give some, with answers")
    return [setup.render(item) for item in items]
