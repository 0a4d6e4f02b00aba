"""Confounds: does length, position or format alone tell the two sides of a contrast set apart?

A direction fitted on such a set may be one of length or punctuation. Each feature is one number per item and side:

    auc   paired: share of the pairs in which the positive side has more, ties counted half;
          unpaired: the same over all (positive, negative) couples
    p     paired: exact sign test on the pairs that differ; unpaired: Mann and Whitney's test; both two-sided

A category, such as the first word, becomes a number by what the other items say of it: 1 where it is commoner on their
positive sides, -1 where it is commoner on their negative sides, 0 where it is new or even. An item's own pair is left
out of the count, so that rare words predict nothing. Such predictions depend on one another, so p is the share of
20 000 draws in which labels swapped within pairs (unpaired: permuted) at random are predicted as well.

A warning needs an AUC of 0.75 or more (or 0.25 or less) and p below 0.01 divided by the number of features compared;
of lengths also means a tenth apart, because pairs that always differ by one token of thirty are as good as matched.

No feature here has to be a mistake: exclamation marks belong to enthusiasm. A warning says what to look at.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from steerkit.activations.readout import Readout
from steerkit.evaluate.label_tests import Compared, compare_numbers, compare_words
from steerkit.evaluate.text_features import Category, Item, Number, features, item_of
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.rendering import render

__all__ = ["Confound", "confounds", "warn_of_confounds"]

LEVEL = 0.01
LARGE = 0.75
APART = 0.1
_HINTS = {
    "length": "match both sides' length",
    "position": "let both sides be read at the same place",
    "format": "write both sides in the same form",
}


@dataclass(frozen=True)
class Confound:
    """How well one plain feature of the texts tells the sides apart.

    Attributes:
        feature: what was compared.
        kind: length, position or format.
        auc: 0.5 says nothing of the label, 1 always has more on the positive side, 0 always less.
        p: how often chance alone separates as well.
        level: below which p is taken seriously, the number of features allowed for.
        means: of the positive and the negative side; None for a category.
        message: one line for people.
    """

    feature: str
    kind: Literal["length", "position", "format"]
    auc: float
    p: float
    level: float
    means: tuple[float, float] | None
    message: str

    @property
    def warns(self) -> bool:
        """Whether the feature alone predicts the label."""
        if max(self.auc, 1 - self.auc) < LARGE or self.p >= self.level:
            return False
        if self.kind != "length" or self.means is None:
            return True
        return max(self.means) >= (1 + APART) * min(self.means)

    def as_row(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "feature": self.feature,
            "kind": self.kind,
            "auc": self.auc,
            "p": self.p,
            "means": None if self.means is None else list(self.means),
            "warns": self.warns,
            "message": self.message,
        }


def confounds(
    tokenizer: Any,
    data: ContrastSet,
    *,
    readout: str | int | tuple[int, int] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Confound]:
    """Compare plain features of the two sides: length, position and format.

    Args:
        tokenizer: the model's tokenizer.
        data: the contrast set. The answers are compared; where an item has none, its prompt with its system prompt.
        readout: the tokens that will be read, to compare where they stand; None leaves that out.
        chat_template_kwargs: passed on to the chat template.

    Returns:
        One entry per feature that differs between the sides, the clearest first.

    Raises:
        DataError: an item cannot be rendered, or has no token to be read.
    """
    plan = None if readout is None else Readout.parse(readout)
    sides = [
        [item_of(item, render(tokenizer, item, chat_template_kwargs=chat_template_kwargs), plan) for item in side]
        for side in (data.positive, data.negative)
    ]
    positive, negative = sides
    found: list[tuple[Number | Category, Compared]] = []
    for feature in features(plan is not None):
        if isinstance(feature, Number):
            values = [[feature.of(item) for item in side] for side in sides]
            compared = compare_numbers(values[0], values[1], paired=data.paired)
        else:
            words = [[feature.of(item) for item in side] for side in sides]
            compared = compare_words(words[0], words[1], paired=data.paired)
        if compared is not None:
            found.append((feature, compared))
    level = LEVEL / max(len(found), 1)
    noun = "answers" if any(item.answer is not None for item in (*data.positive, *data.negative)) else "prompts"
    among = (noun, "pairs" if data.paired else "couples")
    listed = [_confound(feature, compared, level, positive, negative, among) for feature, compared in found]
    return sorted(listed, key=lambda one: (not one.warns, one.p, -abs(one.auc - 0.5)))


def warn_of_confounds(
    tokenizer: Any,
    data: ContrastSet,
    *,
    readout: str | int | tuple[int, int] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Confound]:
    """Warn of every plain feature that predicts the label by itself.

    Args:
        tokenizer: the model's tokenizer.
        data: the contrast set.
        readout: the tokens that will be read; None leaves their place out.
        chat_template_kwargs: passed on to the chat template.

    Returns:
        Those warned of.

    Raises:
        DataError: see `confounds`.

    Warns:
        UserWarning: one for each of them.
    """
    found = confounds(tokenizer, data, readout=readout, chat_template_kwargs=chat_template_kwargs)
    warned = [confound for confound in found if confound.warns]
    for confound in warned:
        warnings.warn(confound.message, stacklevel=2)
    return warned


def _confound(
    feature: Number | Category,
    compared: Compared,
    level: float,
    positive: Sequence[Item],
    negative: Sequence[Item],
    among: tuple[str, str],
) -> Confound:
    """One entry with its sentence."""
    auc, p, means = compared.auc, compared.p, None
    notes = (["ties counted half"] if compared.tied else []) + [f"p = {p:.1g}"]
    where = f"in {100 * max(auc, 1 - auc):.0f} % of the {among[1]} ({', '.join(notes)})"
    if isinstance(feature, Number):
        kind = feature.kind
        means = (sum(map(feature.of, positive)) / len(positive), sum(map(feature.of, negative)) / len(negative))
        more, less = (0, 1) if auc >= 0.5 else (1, 0)
        said = f"{('positive', 'negative')[more]} {among[0]} {feature.phrase} {where}"
        said += f", on average {means[more]:.3g} against {means[less]:.3g}"
    else:
        kind = "format"
        said = f"the {feature.name} tells the sides apart {where}: {_example(feature, positive, negative)}"
    made = Confound(feature.name, kind, auc, p, level, means, said)
    if not made.warns:
        return made
    return replace(made, message=f"{kind} alone predicts the label: {said}; {_HINTS[kind]}")


def _example(feature: Category, positive: Sequence[Item], negative: Sequence[Item]) -> str:
    """The category whose share differs most between the sides."""
    counts = [Counter(feature.of(item) for item in side) for side in (positive, negative)]
    shares = {
        word: (100 * counts[0][word] / len(positive), 100 * counts[1][word] / len(negative))
        for word in sorted({*counts[0], *counts[1]})
    }
    word = max(shares, key=lambda one: abs(shares[one][0] - shares[one][1]))
    shown = word if feature.name == "first character" else repr(word)
    return f"{shown} {feature.phrase} {shares[word][0]:.0f} % of the positive and {shares[word][1]:.0f} % of the others"
