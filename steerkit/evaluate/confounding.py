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

import math
import re
import string
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from steerkit.activations.readout import Readout
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import Rendered, render

__all__ = ["Confound", "confounds", "warn_of_confounds"]

LEVEL = 0.01
LARGE = 0.75
APART = 0.1
DRAWS = 20_000

_CHUNK = 1000

_QUOTES = '"“”„«»'
_BULLETS = ("-", "*", "•", "\u2013")
_CLASSES = {"Lu": "a capital letter", "Ll": "a small letter", "Lt": "a capital letter", "Nd": "a digit"}
_SENTENCE_START = re.compile(r"(?:^|[.!?\n])\W*\w")
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


class _Text(NamedTuple):
    """One item: what is compared, and where it stands."""

    text: str
    tokens: int
    start: int
    read: int | None


class _Number(NamedTuple):
    name: str
    kind: Literal["length", "position", "format"]
    phrase: str
    of: Callable[[_Text], float]


class _Category(NamedTuple):
    name: str
    phrase: str
    of: Callable[[_Text], str]


class _Compared(NamedTuple):
    """A feature's values on both sides, compared."""

    auc: float
    p: float
    tied: bool


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
        [_text(item, render(tokenizer, item, chat_template_kwargs=chat_template_kwargs), plan) for item in side]
        for side in (data.positive, data.negative)
    ]
    positive, negative = sides
    found: list[tuple[_Number | _Category, _Compared]] = []
    for feature in _features(plan is not None):
        if isinstance(feature, _Number):
            values = [[feature.of(item) for item in side] for side in sides]
            compared = _compare(values[0], values[1], paired=data.paired)
        else:
            words = [[feature.of(item) for item in side] for side in sides]
            compared = _compare_words(words[0], words[1], paired=data.paired)
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


def _text(item: Conversation, rendered: Rendered, plan: Readout | None) -> _Text:
    read = None if plan is None else plan.tokens(rendered)[0]
    start = rendered.prompt_length
    if item.answer is not None:
        return _Text(item.answer, len(rendered.ids) - start, start, read)
    if isinstance(item.prompt, str):
        parts = [item.prompt] if item.system is None else [item.system, item.prompt]
    else:
        parts = [message["content"] for message in item.prompt]
    return _Text("\n".join(parts), start, start, read)


def _features(is_read: bool) -> list[_Number | _Category]:
    """Everything that is compared, in the order of the kinds."""
    counted = {
        "line breaks": lambda text: text.count("\n"),
        "list lines": _list_lines,
        "digits": lambda text: sum(map(str.isdigit, text)),
        "quotation marks": lambda text: sum(map(text.count, _QUOTES)),
        "question marks": lambda text: text.count("?"),
        "exclamation marks": lambda text: text.count("!"),
        "commas": lambda text: text.count(","),
    }
    found: list[_Number | _Category] = [
        _Number("tokens", "length", "have more tokens", lambda item: item.tokens),
        _Number("characters", "length", "have more characters", lambda item: len(item.text)),
        _Number("answer start", "position", "start at a later token", lambda item: item.start),
    ]
    if is_read:
        found.append(_Number("token read", "position", "are read at a later token", lambda item: item.read or 0))
    found += [_Number(name, "format", f"have more {name}", _of_text(count)) for name, count in counted.items()]
    found += [
        _Number("share of capitals", "format", "have a larger share of capital letters", _of_text(_capitals)),
        _Number("full stop at the end", "format", "more often end with a full stop", _of_text(_ends_in_stop)),
        _Number("other end mark", "format", "more often end with another mark", _of_text(_ends_in_mark)),
        _Category("first character", "starts", lambda item: _class_of(item.text)),
        _Category("first word", "starts", lambda item: _first_word(item.text)),
        _Category("last character", "ends", lambda item: item.text.rstrip()[-1:]),
    ]
    return found


def _of_text(count: Callable[[str], float]) -> Callable[[_Text], float]:
    return lambda item: count(item.text)


def _list_lines(text: str) -> int:
    """Lines that start like those of a list: "- ", "* ", "1. ", "2) "."""
    found = 0
    for line in text.split("\n"):
        mark = line.split(maxsplit=1)[0] if line.strip() else ""
        found += mark in _BULLETS or (mark[-1:] in (".", ")") and mark[:-1].isdigit())
    return found


def _capitals(text: str) -> float:
    """Share of the letters, those that begin a sentence left out: they only say how long sentences are."""
    letters = [character for character in _SENTENCE_START.sub(" ", text) if character.isalpha()]
    return sum(map(str.isupper, letters)) / max(len(letters), 1)


def _ends_in_stop(text: str) -> float:
    return float(text.rstrip().endswith("."))


def _ends_in_mark(text: str) -> float:
    last = text.rstrip()[-1:]
    return float(last != "." and unicodedata.category(last or "a").startswith(("P", "S")))


def _class_of(text: str) -> str:
    first = text.lstrip()[:1]
    category = unicodedata.category(first) if first else ""
    return _CLASSES.get(category, "a mark" if category[:1] in ("P", "S") else "another character")


def _first_word(text: str) -> str:
    """The first word in small letters, without the marks around it, so that "(A)" is "a"."""
    word = (text.split(maxsplit=1) or [""])[0].casefold()
    return word.strip(string.punctuation) or word


def _compare(positive: Sequence[float], negative: Sequence[float], *, paired: bool) -> _Compared | None:
    """AUC and p of numbers; None where the sides have the same."""
    from scipy import stats  # here, because it takes half a second to import

    if paired:
        signs = [(plus > minus) - (plus < minus) for plus, minus in zip(positive, negative, strict=True)]
        wins, losses = signs.count(1), signs.count(-1)
        if wins + losses == 0:
            return None
        p = float(stats.binomtest(wins, wins + losses).pvalue)
        return _Compared((wins + signs.count(0) / 2) / len(signs), p, signs.count(0) > 0)
    if sorted(positive) == sorted(negative) or len({*positive, *negative}) == 1:
        return None
    test = stats.mannwhitneyu(positive, negative, alternative="two-sided")
    tied = bool(set(positive) & set(negative))
    return _Compared(float(test.statistic) / len(positive) / len(negative), float(test.pvalue), tied)


def _compare_words(positive: Sequence[str], negative: Sequence[str], *, paired: bool) -> _Compared | None:
    """AUC and p of predictions from the other items; None where the sides have the same words."""
    if list(positive) == list(negative) if paired else sorted(positive) == sorted(negative):
        return None
    index = {word: number for number, word in enumerate(sorted({*positive, *negative}))}
    plus, minus = (torch.tensor([index[word] for word in side]) for side in (positive, negative))
    generator = torch.Generator().manual_seed(0)
    as_good, observed = 0, math.nan
    for start in range(0, DRAWS, _CHUNK):
        if paired:
            labels = torch.randint(2, (_CHUNK, len(plus)), generator=generator).double() * 2 - 1
            labels[0] = 1.0 if start == 0 else labels[0]
            aucs = _pair_aucs(plus, minus, labels)
        else:
            order = torch.rand(_CHUNK, len(plus) + len(minus), generator=generator).argsort(dim=1)
            labels = (order < len(plus)).double()
            labels[0] = (torch.arange(labels.shape[1]) < len(plus)).double() if start == 0 else labels[0]
            aucs = _side_aucs(torch.cat([plus, minus]), labels)
        observed = float(aucs[0]) if start == 0 else observed
        as_good += int((aucs > observed - 1e-9).sum())
    return _Compared(observed, as_good / DRAWS, tied=True)


def _pair_aucs(plus: Tensor, minus: Tensor, signs: Tensor) -> Tensor:
    """AUC [k] of each row of swaps: signs [k, n], -1 where the pair's words, plus [n] and minus [n], change sides."""
    count = int(torch.maximum(plus.max(), minus.max())) + 1
    rows = one_hot(plus, count).double() - one_hot(minus, count).double()
    margins, own = signs @ rows, signs * (plus != minus)
    said = (margins[:, plus] - own).sign() - (margins[:, minus] + own).sign()
    return ((signs * said).sign().mean(dim=1) + 1) / 2


def _side_aucs(words: Tensor, labels: Tensor) -> Tensor:
    """AUC [k] of each row of labels [k, n], 1 for the positive side, for words [n]."""
    rows = one_hot(words).double()
    positive, every = (labels @ rows)[:, words], rows.sum(dim=0)[words]
    sizes = labels.sum(dim=1, keepdim=True), (1 - labels).sum(dim=1, keepdim=True)
    # Shares and not counts, so that the larger of two unequal sides is not predicted for its size.
    shares = (positive - labels) / (sizes[0] - labels).clamp_min(1)
    others = (every - positive - (1 - labels)) / (sizes[1] - (1 - labels)).clamp_min(1)
    said = (shares - others).sign()
    wins = torch.zeros(len(labels), dtype=torch.double)
    for value in (-1, 0, 1):
        here = (labels * (said == value)).sum(dim=1)
        below, level = (((1 - labels) * chosen).sum(dim=1) for chosen in (said < value, said == value))
        wins += here * (below + level / 2)
    return wins / sizes[0][:, 0] / sizes[1][:, 0]


def _confound(
    feature: _Number | _Category,
    compared: _Compared,
    level: float,
    positive: Sequence[_Text],
    negative: Sequence[_Text],
    among: tuple[str, str],
) -> Confound:
    """One entry with its sentence."""
    auc, p, means = compared.auc, compared.p, None
    notes = (["ties counted half"] if compared.tied else []) + [f"p = {p:.1g}"]
    where = f"in {100 * max(auc, 1 - auc):.0f} % of the {among[1]} ({', '.join(notes)})"
    if isinstance(feature, _Number):
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


def _example(feature: _Category, positive: Sequence[_Text], negative: Sequence[_Text]) -> str:
    """The category whose share differs most between the sides."""
    counts = [Counter(feature.of(item) for item in side) for side in (positive, negative)]
    shares = {
        word: (100 * counts[0][word] / len(positive), 100 * counts[1][word] / len(negative))
        for word in sorted({*counts[0], *counts[1]})
    }
    word = max(shares, key=lambda one: abs(shares[one][0] - shares[one][1]))
    shown = word if feature.name == "first character" else repr(word)
    return f"{shown} {feature.phrase} {shares[word][0]:.0f} % of the positive and {shares[word][1]:.0f} % of the others"
