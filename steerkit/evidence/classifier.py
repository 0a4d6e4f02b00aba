"""A classifier of texts that needs no judge: word and character n-grams, weighed by logistic regression.

It is trained on what the unsteered model answered under opposite system prompts, and where the recipe has written
answers of both sides, on those too. Its accuracy is that on answers to questions it was not trained on, by folds over
questions; the interval is Wilson's with as many trials as questions, since answers to one question are alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from steerkit.errors import SteerError
from steerkit.evaluate.intervals import Estimate, wilson

__all__ = ["Accuracy", "Classifier", "Labelled", "trained"]

FOLDS = 5


class Labelled(NamedTuple):
    """One text with its side.

    Attributes:
        text: the answer.
        positive: whether it shows the behaviour.
        question: what it answers.
    """

    text: str
    positive: bool
    question: str


@dataclass(frozen=True)
class Accuracy:
    """How often a classifier is right on answers to questions that it was not trained on.

    A small model hardly follows some system prompts: then its answers cannot show how good the classifier is, and
    the recipe's own held-out answers may.

    Attributes:
        prompted: on the model's answers under system prompts.
        written: on the recipe's held-out answers; None where there are none.
        trained_on: what it learns from.
    """

    prompted: Estimate
    written: Estimate | None
    trained_on: str

    @property
    def stated(self) -> Estimate:
        """The accuracy that counts: on the model's answers, unless only that on written ones is clear of one half."""
        is_written = not self.prompted.low > 0.5 and self.written is not None and self.written.low > 0.5
        return self.written if is_written and self.written is not None else self.prompted

    @property
    def measured_on(self) -> str:
        """What `stated` was measured on."""
        return "prompted answers" if self.stated is self.prompted else "written answers"

    @property
    def is_told(self) -> bool:
        """Whether it tells the sides apart: one of both intervals is above one half."""
        return self.stated.low > 0.5


@dataclass(frozen=True, eq=False)
class Classifier:
    """Probability that a text shows the behaviour."""

    accuracy: Accuracy
    _fitted: Any

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """Score texts.

        Args:
            texts: any.

        Returns:
            From 0 to 1; a text without a word in it is 0.
        """
        said = [text.strip() for text in texts]
        found = self._fitted.predict_proba([text or "-" for text in said])[:, 1] if said else []
        return [float(one) if text else 0.0 for one, text in zip(found, said, strict=True)]


def trained(
    prompted: Sequence[Labelled], written: Sequence[Labelled] = (), written_held_out: Sequence[Labelled] = ()
) -> Classifier:
    """Train a classifier, and measure it.

    Args:
        prompted: the model's answers under opposite system prompts.
        written: answers of the recipe's training items; they are learned from too.
        written_held_out: those of its held-out items.

    Raises:
        SteerError: scikit-learn is not installed.
    """
    plain = [one for one in prompted if one.text.strip()]
    questions = sorted({one.question for one in plain})
    folds = [set(questions[start::FOLDS]) for start in range(FOLDS)]
    right: dict[str, list[float]] = {question: [] for question in questions}
    for fold in folds:
        model = _fit([*(one for one in plain if one.question not in fold), *written])
        kept = [one for one in plain if one.question in fold]
        for one, is_right in zip(kept, _right(model, kept), strict=True):
            right[one.question].append(is_right)
    shares = [sum(found) / len(found) for found in right.values()]
    fitted = _fit([*plain, *written])
    accuracy = Accuracy(
        wilson(math.fsum(shares) / len(shares), len(shares)),
        _written_accuracy(fitted, written_held_out),
        "prompted and written answers" if written else "prompted answers",
    )
    return Classifier(accuracy, fitted)


def _written_accuracy(model: Any, held_out: Sequence[Labelled]) -> Estimate | None:
    if not held_out:
        return None
    found = _right(model, held_out)
    return wilson(sum(found) / len(found), len({one.question for one in held_out}))


def _right(model: Any, texts: Sequence[Labelled]) -> list[float]:
    if not texts:
        return []
    found = model.predict([one.text.strip() for one in texts])
    return [float(bool(said) == one.positive) for said, one in zip(found, texts, strict=True)]


def _fit(texts: Sequence[Labelled]) -> Any:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline, make_union
    except ModuleNotFoundError:
        raise SteerError("classifiers of texts need scikit-learn; pip install 'steerkit-hf[evidence]'") from None
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b|[!?]"),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True),
    )
    model = make_pipeline(features, LogisticRegression(C=10.0, solver="liblinear", class_weight="balanced"))
    return model.fit([one.text.strip() for one in texts], [one.positive for one in texts])
