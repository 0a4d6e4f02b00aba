"""A classifier of texts that needs no judge: word and character n-grams, weighed by logistic regression.

It is trained on what the unsteered model answered under opposite system prompts, and where the recipe has written
answers of both sides, on those too. Where the model does not follow the prompts, which side an answer was asked for
says nothing about it: then it learns from the written ones alone. Its accuracy is that on answers to questions it was
not trained on, by folds over questions; the interval is Wilson's with as many trials as questions, since answers to one
question are alike.

Refusal has a scorer of its own, read against labelled answers; that one finds refusals here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from steerkit.errors import DataError, SteerError
from steerkit.evaluate.intervals import Estimate, wilson
from steerkit.evaluate.scorers.refusal import accuracy_of
from steerkit.methods._declining import is_refusal

__all__ = ["Accuracy", "Classifier", "Labelled", "finds_refusals", "trained"]

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
        prompted: on the model's answers under system prompts, or `on` others.
        written: on the recipe's held-out answers; None where there are none.
        trained_on: what it learns from.
        on: which answers of models `prompted` is about.
    """

    prompted: Estimate
    written: Estimate | None
    trained_on: str
    on: str = "prompted answers"

    @property
    def stated(self) -> Estimate:
        """The accuracy that counts: on the model's answers, unless only that on written ones is clear of one half."""
        is_written = not self.prompted.low > 0.5 and self.written is not None and self.written.low > 0.5
        return self.written if is_written and self.written is not None else self.prompted

    @property
    def measured_on(self) -> str:
        """What `stated` was measured on."""
        return self.on if self.stated is self.prompted else "written answers"

    @property
    def is_told(self) -> bool:
        """Whether it tells the sides apart: one of both intervals is above one half."""
        return self.stated.low > 0.5


@dataclass(frozen=True, eq=False)
class Classifier:
    """Probability that a text shows the behaviour.

    Attributes:
        accuracy: how often it is right.
        title: what it is, in a few words.
    """

    accuracy: Accuracy
    title: str
    _probabilities: Callable[[Sequence[str]], Sequence[float]]

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """Score texts.

        Args:
            texts: any.

        Returns:
            From 0 to 1; a text without a word in it is 0.
        """
        said = [text.strip() for text in texts]
        found = self._probabilities([text or "-" for text in said]) if said else []
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
        DataError: the model answered nothing under any system prompt.
        SteerError: scikit-learn is not installed.
    """
    plain = [one for one in prompted if one.text.strip()]
    if not plain:
        raise DataError(f"none of {len(prompted)} answers under system prompts holds a word; generate with this model")
    questions = sorted({one.question for one in plain})
    folds = [set(questions[start::FOLDS]) for start in range(FOLDS)]
    right: dict[str, list[float]] = {question: [] for question in questions}
    for fold in folds:
        model = _fit([*(one for one in plain if one.question not in fold), *written])
        kept = [one for one in plain if one.question in fold]
        for one, is_right in zip(kept, _right(model, kept), strict=True):
            right[one.question].append(is_right)
    shares = [sum(found) / len(found) for found in right.values()]
    followed = wilson(math.fsum(shares) / len(shares), len(shares))
    learned = {"prompted": plain if followed.low > 0.5 or not written else (), "written": written}
    fitted = _fit([one for part in learned.values() for one in part])
    trained_on = f"{' and '.join(name for name, part in learned.items() if part)} answers"
    accuracy = Accuracy(followed, _written_accuracy(fitted, written_held_out), trained_on)
    title = "word and character n-grams, logistic regression"
    return Classifier(accuracy, title, lambda texts: fitted.predict_proba(texts)[:, 1])


def finds_refusals() -> Classifier:
    """The scorer of refusals, as a classifier that says 0 or 1."""
    right, answers = accuracy_of("refusal")
    accuracy = Accuracy(right, None, "no answers: a grammar of declining", f"{answers} labelled answers")
    return Classifier(accuracy, "the scorer `refusal`", lambda texts: [float(is_refusal(text)) for text in texts])


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
