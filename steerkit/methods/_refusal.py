"""What the methods about refusal share: openings, directions that are read from them, and a score of one position.

    response contrast:  v = mean over answer tokens of h (refusing opening) - the same of complying openings
    unembedding:        v = mean of W_U[t] over tokens t of refusals - mean of W_U[t] over tokens of compliance
    refusal score:      log P - log(1 - P),   P = probability that the answer begins as a refusal does

The contrast of refusing and complying openings, read over the answer's tokens, is the behaviour vector of Lee, Padhi,
Ramamurthy, Miehling, Dognin, Nagireddy, Dhurandhar (2024), "Programming Refusal with Conditional Activation Steering",
arXiv 2409.05907. The unembedding direction is that of "Guiding Giants: Lightweight Controllers for Weighted Activation
Steering in LLMs" (2025), arXiv 2505.20309. The score is that of Arditi et al. (2024), arXiv 2406.11717.

Where this file departs. All texts are our own. The unembedding direction reads the output embedding, as the paper says
(its code reads the input embedding), counts every token once, and drops tokens that both sides have: with repeats kept,
"I" makes up most of both means. The score is exact (the paper's code adds 1e-8 inside both logarithms), and counts
beginnings of several tokens by the product of their probabilities.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from steerkit.errors import FitError
from steerkit.maths.directions import mean_difference
from steerkit.methods._subject import Subject
from steerkit.network.sites import Site
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import Rendered, spread
from steerkit.vector.steering_vector import SteeringVector

__all__ = [
    "COMPLYING",
    "REFUSING",
    "first_log_probs",
    "log_odds",
    "response_contrast",
    "unembedding_direction",
]

_PROMPTS = 80  # that are answered, at most

# Refusals all begin alike, as a model's own do: openings of many forms give a direction that makes the embedded
# model deny, apologise and fear in turn, and soon babble. Both sides are alike in length.
REFUSING = (
    "I'm sorry, but I can't assist with that request.",
    "I'm sorry, but I can't help you with that.",
    "I'm sorry, but I cannot fulfil this request.",
    "I'm sorry, but I'm not able to help with this.",
    "I'm sorry, I can't provide that information.",
    "I'm sorry, but I won't help with anything harmful.",
)
COMPLYING = (
    "Sure, here is the answer to your request.",
    "Of course! Here's how you can do that.",
    "Certainly, here is what you asked me for.",
    "Yes, let's go through it step by step.",
    "Here's a simple guide for you to follow.",
    "Absolutely, this is how you can get started.",
)

# What the unembedding direction is made of: words by which answers of either side begin or go on.
REFUSAL_WORDS = (
    "I'm sorry",
    "Sorry",
    "I apologise",
    "I cannot",
    "I can't",
    "I won't",
    "I'm unable",
    "I'm not able",
    "I must decline",
    "I refuse",
    "Unfortunately",
    "it is not possible",
    "it would be harmful",
)
COMPLIANCE_WORDS = (
    "Sure",
    "Of course",
    "Certainly",
    "Absolutely",
    "Yes",
    "Here is",
    "Here are",
    "Happy to help",
    "Let me show you",
    "First",
    "I can help",
    "I will explain",
)


def response_contrast(subject: Subject, prompts: Sequence[Conversation], sites: Sequence[Site]) -> dict[Site, Tensor]:
    """Refusing minus complying openings, as answers to given prompts, read over the answer's tokens.

    Each prompt gets one opening of either side, in turn; a few prompts get all of them. Of many prompts some are taken,
    evenly over the list: the means have long settled by then.

    Args:
        subject: the door to the model.
        prompts: what is answered, harmful requests as a rule; their own answers are left out.
        sites: where to read.

    Returns:
        site to [d] float32.

    Raises:
        FitError: there is no prompt, or both sides have the same mean; the site is named.
    """
    if not prompts:
        raise FitError("there is no prompt to be answered with refusals; give at least one")
    prompts = spread(prompts, _PROMPTS)
    rounds = -(-len(REFUSING) // len(prompts))
    texts = []
    for number, prompt in enumerate([*prompts] * rounds):
        texts += [replace(prompt, answer=side[number % len(side)]) for side in (REFUSING, COMPLYING)]
    read = subject.record(texts, sites, readout="response_mean")
    found = {}
    for site in sites:
        try:
            found[site] = mean_difference(read[site][0::2], read[site][1::2])
        except FitError as error:
            raise FitError(f"{site}: {error}") from None
    return found


def unembedding_direction(subject: Subject) -> Tensor:
    """Mean output embedding of the tokens of refusals minus that of the tokens of compliance.

    Args:
        subject: the door to the model.

    Returns:
        [d] float32, of its own length; the paper scales it to length 1.

    Raises:
        FitError: one side has no token of its own, or both have the same mean.
        ModelError: the model has no output embedding of the stream's width.
    """
    refusing, complying = (
        {token for text in texts for token in subject.token_ids(text)} for texts in (REFUSAL_WORDS, COMPLIANCE_WORDS)
    )
    sides = [sorted(refusing - complying), sorted(complying - refusing)]
    if not all(sides):
        raise FitError(
            "the tokenizer writes the words of refusals and of compliance with the same tokens, so there is no "
            "direction between them; read one from activations instead"
        )
    matrix = subject.unembedding()
    return mean_difference(*(matrix[ids] for ids in sides))


def first_log_probs(
    subject: Subject,
    items: Sequence[Rendered],
    logits: Tensor,
    beginnings: Sequence[tuple[int, ...]],
    *,
    under: SteeringVector | None = None,
) -> Tensor:
    """Log-probability that an answer begins with one of some rows of tokens.

    Args:
        subject: the door to the model.
        items: prompts as the model reads them.
        logits: [n, v] of the first token of their answers, under the same vector.
        beginnings: token ids; one that goes on from another adds nothing to it.
        under: a vector to steer with.

    Returns:
        [n] float64.
    """
    kept = {ids for ids in beginnings if not any(ids[:end] in beginnings for end in range(1, len(ids)))}
    ends: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for ids in kept:
        for end in range(len(ids)):
            ends[ids[:end]].add(ids[end])
    reached: dict[tuple[int, ...], Tensor] = {(): torch.zeros(len(items), dtype=torch.float64)}
    for stem in sorted(ends, key=len):
        if stem:
            logits = subject.logits([replace(item, ids=item.ids + stem) for item in items], under=under)
        chances = torch.log_softmax(logits.double(), dim=-1)
        for token in ends[stem]:
            reached[*stem, token] = reached[stem] + chances[:, token]
    return torch.logsumexp(torch.stack([reached[ids] for ids in sorted(kept)]), dim=0)


def log_odds(log_probs: Tensor) -> Tensor:
    """`log P - log(1 - P)`, without the rounding of 1 - P.

    Args:
        log_probs: [n] float64, log P; what rounding lifts over 0 counts as just below.
    """
    below = log_probs.double().clamp_max(-1e-15)
    return below - torch.log(-torch.expm1(below))
