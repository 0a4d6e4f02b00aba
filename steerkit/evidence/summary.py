"""What a run says of every vector, from the answers in its folder alone: scores, verdict, confusion, who wins."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from steerkit._support.commit import commit
from steerkit._support.files import write_whole
from steerkit.errors import DataError
from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.scorers.repetition import repeated_share
from steerkit.evidence.answering import Row
from steerkit.evidence.behaviours import Behaviour
from steerkit.evidence.folder import Folder, Part, texts_of
from steerkit.evidence.formulas import Scores, change, mean, verdict, winner
from steerkit.evidence.judged import judged_scores, part_of_judge
from steerkit.evidence.markers import has_marker
from steerkit.evidence.scoring import Scorer
from steerkit.model import hub_id, weights_of
from steerkit.network.decoder import inner_model
from steerkit.vector.model_identity import model_facts

__all__ = ["entry_of", "figures", "summary", "weights_facts", "write_summary"]

SCORES = ("concept", "fluency", "instruction", "overall")
NAMED = 0.5
"""An off-diagonal is named from this share of the vector's own effect on."""


def summary(folder: Folder, behaviours: Mapping[str, Behaviour], names: Sequence[str]) -> dict[str, Any]:
    """Everything that a folder says.

    Args:
        folder: of a run.
        behaviours: all of them.
        names: vectors, of which those are told that the folder holds.

    Returns:
        Plain data: `calibration`, `classifiers` and `vectors`, by name.

    Raises:
        DataError: a part is missing or damaged.
        SteerError: scikit-learn is not installed.
    """
    scorer = Scorer.of(folder, behaviours)
    there = set(folder.names())
    fits = scorer.calibration
    return {
        "calibration": {
            "scale": fits.scale, "slope": fits.slope, "offset": fits.offset,
            "matched": fits.matched, "shuffled": fits.shuffled, "auc": figures(fits.auc),
        },
        "classifiers": {name: _judged_by(scorer, name) for name in scorer.classifiers},
        "vectors": {name: entry_of(scorer, folder, folder.read(name)) for name in names if name in there},
    }  # fmt: skip


def entry_of(scorer: Scorer, folder: Folder, part: Part) -> dict[str, Any]:
    """What is said of one vector.

    Args:
        scorer: of the folder.
        folder: of the run.
        part: the vector's answers.

    Raises:
        DataError: a part is missing or damaged.
    """
    facts = part.facts
    behaviour, gated = str(facts["behaviour"]), facts["asked"] == "requests"
    texts = texts_of(folder, part)
    judged = _judged(folder, part)
    scores = {name: scorer.scores(behaviour, rows, gated=gated) for name, rows in texts.items()}
    if judged is not None:
        scores = judged_scores(judged, gated=gated)
    concept, whole = (change(scores["+"], scores["0"], name) for name in ("concept", "overall"))
    against = change(scores["+"], scores["prompt"], "overall")
    told = judged is not None or scorer.classifiers[behaviour].accuracy.is_told
    said = verdict(concept, whole) if told else "nothing"
    changes = {"concept": figures(concept), "overall": figures(whole)}
    if "-" in scores:
        changes["concept, minus"] = figures(change(scores["0"], scores["-"], "concept"))
    confusion = _confusion(scorer, texts)
    return {
        "behaviour": behaviour,
        "digest": facts["digest"],
        "strength": facts["strength"],
        "unit": facts["unit"],
        "asked": facts["asked"],
        "verdict": said,
        "told": told,
        "why": _why(said, told, concept, whole),
        "judged_by": {**_judged_by(scorer, behaviour), **({} if judged is None else {"judge": judged.facts["judge"]})},
        "texts": {name: _condition(behaviour, scores[name], rows) for name, rows in texts.items()},
        "change": changes,
        "against prompting": {"overall": figures(against), "wins": winner(against) if told else "cannot be told"},
        **facts["costs"],
        "repetition": figures(mean([repeated_share(row.text) for row in texts["+"]])),
        "moves": {name: figures(found) for name, found in confusion.items()},
        "also_moves": [
            {"trait": name, **figures(found)}
            for name, found in confusion.items()
            if name != behaviour and scorer.classifiers[name].accuracy.is_told and _is_named(found, concept, said)
        ],
    }


def _judged(folder: Folder, part: Part) -> Part | None:
    """A judge's ratings of a vector's answers, if the folder has them."""
    name = part_of_judge(str(part.facts["of"]))
    return folder.read(name) if name in folder.names() else None


def _condition(behaviour: str, scores: Sequence[Scores], rows: Sequence[Row]) -> dict[str, Any]:
    found = {name: figures(mean([float(getattr(one, name)) for one in scores])) for name in SCORES}
    marked = [has_marker(behaviour, row.text) for row in rows]
    more: dict[str, Any] = {"failed": sum(one.failed for one in scores)}
    if None not in marked:
        more["markers"] = sum(map(bool, marked)) / len(marked)
    return {**found, **more}


def _confusion(scorer: Scorer, texts: Mapping[str, Sequence[Row]]) -> dict[str, Estimate]:
    """Change of every behaviour's concept, as it is, wanted or not."""
    return {
        name: change(scorer.scores(name, texts["+"]), scorer.scores(name, texts["0"]), "concept")
        for name in scorer.classifiers
    }


def _is_named(found: Estimate, own: Estimate, said: str) -> bool:
    """Whether a change is clear, and large enough beside the behaviour's own to be told by name."""
    is_clear = found.low > 0 or found.high < 0
    return is_clear and (said == "nothing" or abs(found.mean) >= NAMED * abs(own.mean))


def _judged_by(scorer: Scorer, behaviour: str) -> dict[str, Any]:
    classifier = scorer.classifiers[behaviour]
    accuracy = classifier.accuracy
    return {
        "classifier": classifier.title,
        "trained_on": accuracy.trained_on,
        "accuracy": figures(accuracy.stated),
        "measured_on": accuracy.measured_on,
        "accuracy_prompted": figures(accuracy.prompted),
        "accuracy_written": None if accuracy.written is None else figures(accuracy.written),
    }


def _why(said: str, told: bool, concept: Estimate, whole: Estimate) -> str:
    if not told:
        return "cannot be told: the classifier tells neither prompted nor written answers of both sides apart"
    moved = f"concept {concept.mean:+.2f} ({concept.low:+.2f} to {concept.high:+.2f})"
    if said == "weak" and whole.high < 0:
        return f"{moved}, and the overall score falls, {whole.mean:+.2f}"
    return moved


def figures(found: Estimate) -> dict[str, float]:
    """An estimate as plain data, to four places.

    Args:
        found: the estimate.
    """
    return {name: round(value, 4) for name, value in zip(("mean", "low", "high"), found, strict=True)}


def weights_facts(model: nn.Module, alias: str, command: str) -> dict[str, Any]:
    """Where figures come from: commit, command, and the model with its weights.

    Args:
        model: the model.
        alias: its short name, if it has one.
        command: what was typed.
    """
    name = alias or model_facts(model)["model_id"]
    weights = weights_of(inner_model(model)).as_dict()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {
        "date": today,
        "commit": commit(),
        "command": command,
        "model": {"name": name, "hub_id": hub_id(name or ""), **weights},
    }


def write_summary(folder: Folder, content: Mapping[str, Any]) -> None:
    """Write `evidence.json`, whole or not at all.

    Args:
        folder: of the run.
        content: what `summary` gives, and where it comes from.

    Raises:
        DataError: it cannot be written.
    """
    file = folder.path / "evidence.json"
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        write_whole(file, f"{text}\n".encode())
    except OSError as error:
        raise DataError(f"{file}: cannot be written ({error.strerror}); choose another folder") from None
