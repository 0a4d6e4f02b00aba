"""The figures that are kept are those of the answers that are kept: rows computed again, without the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steerkit.evidence.behaviours import behaviours
from steerkit.evidence.folder import Folder, part_of_behaviour, texts_of
from steerkit.evidence.scoring import classifier_of
from tests.program import ROOT

MODELS = sorted(file.parent for file in (ROOT / "vectors").glob("*/evidence.json"))
SAMPLES = {"smollm2-135m": "poetic-persona", "gemma3-270m": "optimism-caa"}
of_a_model = pytest.mark.parametrize("folder", MODELS, ids=lambda path: path.name)


def repeated(text: str) -> float:
    """Share of 4-grams that stood there before, the slow obvious form."""
    words = text.split()
    grams = [tuple(words[start : start + 4]) for start in range(len(words) - 3)]
    return sum(gram in grams[:place] for place, gram in enumerate(grams)) / len(grams) if grams else 0.0


@of_a_model
def test_a_row_of_the_table_is_that_of_the_answers(folder: Path) -> None:
    sample = SAMPLES[folder.name]
    told = json.loads((folder / "evidence.json").read_text("utf-8"))["vectors"][sample]
    kept = Folder(folder)
    part, behaviour = kept.read(sample), told["behaviour"]
    texts = texts_of(kept, part)
    assert told["repetition"]["mean"] == pytest.approx(
        sum(repeated(row.text) for row in texts["+"]) / len(texts["+"]), abs=1e-4
    )
    classifier = classifier_of(behaviours()[behaviour], kept.read(part_of_behaviour(behaviour)))
    assert told["judged_by"]["accuracy_prompted"]["mean"] == pytest.approx(classifier.accuracy.prompted.mean, abs=1e-3)
    for condition, rows in texts.items():
        found = [
            score if row.text.strip() else 0.0
            for row, score in zip(rows, classifier([row.text for row in rows]), strict=True)
        ]
        assert told["texts"][condition]["concept"]["mean"] == pytest.approx(sum(found) / len(found), abs=1e-3)


@of_a_model
def test_every_vector_s_answers_are_of_one_model_and_all_there(folder: Path) -> None:
    content = json.loads((folder / "evidence.json").read_text("utf-8"))
    assert content["commit"]
    assert content["model"]["digest"]
    kept = Folder(folder)
    for name, told in content["vectors"].items():
        part = kept.read(name)
        assert (part.facts["digest"], part.facts["strength"]) == (told["digest"], told["strength"])
        assert {len(rows) for rows in texts_of(kept, part).values()} == {40}
        assert told["verdict"] in ("shows", "weak", "nothing")
        assert told["why"]
