"""Cards: a verdict first, costs and weights named, and every shipped one made of its files and of nothing else."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cards
from steerkit.report.card import vector_card
from steerkit.vector.steering_vector import SteeringVector
from tests import modes
from tests.families import build

CALIBRATION: dict[str, Any] = {
    "effect": "preference_margin",
    "layers": [1],
    "verdict": "preference_margin changes by 0.5 (0.4 to 0.6) on 28 held-out items, clear of 6 controls",
    "budget": {"max_kl": 0.3, "max_ppl_ratio": 1.3, "max_repetition": 0.1},
    "validation": [
        {
            "layers": [1],
            "strength": strength,
            "scores": {"preference_margin": {"change": 0.2}, "kl": {"mean": kl}, "perplexity_ratio": {"mean": 1.1}},
        }
        for strength, kl in ((1.0, 0.1), (2.0, 0.25), (3.0, 0.62))
    ],
    "confirmation": {
        "preference_margin": {"items": 28, "mean": 0.5},
        "kl": {"mean": 0.26, "low": 0.21, "high": 0.31},
        "perplexity_ratio": {"mean": 1.2, "low": 1.1, "high": 1.3},
        "repetition": {"mean": 0.1, "change": 0.02, "change_low": -0.01, "change_high": 0.05},
    },
    "curve": [{"strength": 2.0, "effect": 0.5, "low": 0.4, "high": 0.6, "random": [0.01, 0.04]}],
}


@pytest.fixture
def vector() -> SteeringVector:
    found = {"by": "calibrate", "confirmed": True, "verdict": CALIBRATION["verdict"]}
    return replace(
        modes.vector_for(build("llama"), scope="response"),
        suggested_strength=2.0,
        calibration=found,
        held_out={"calibration": CALIBRATION},
    )


def entry_of(vector: SteeringVector, said: str) -> dict[str, Any]:
    def score(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}

    return {
        "digest": vector.digest,
        "strength": 2.0,
        "verdict": said,
        "judged_by": {"classifier": "n-grams", "accuracy": score(0.93), "measured_on": "written answers"},
        "texts": {at: {"concept": score(one), "overall": score(one)} for at, one in (("0", 0.3), ("+", 0.6))},
        "change": {"concept": {"mean": 0.3, "low": 0.2, "high": 0.4}},
        "also_moves": [{"trait": "formal", "mean": 0.2, "low": 0.1, "high": 0.3}],
    }


def first_words(card: str) -> str:
    return card.split("\n# joy\n\n")[1].splitlines()[0]


@pytest.mark.parametrize("said", ["shows", "weak", "nothing"])
def test_a_card_opens_with_the_verdict_on_generated_text(vector: SteeringVector, said: str) -> None:
    card = vector_card("joy", vector, entry=entry_of(vector, said))
    opening = first_words(card)
    assert opening.startswith(f"**{said.capitalize()}** in generated text at strength 2: concept 0.30 to 0.60")
    assert "judged by a classifier, right on 93% of held-out written answers" in opening
    assert "| also moves | formal +0.20 (+0.10 to +0.30) |" in card


def test_a_card_names_the_scorer_that_judged(vector: SteeringVector) -> None:
    by = {"classifier": "the scorer `refusal`", "accuracy": {"mean": 0.99}, "measured_on": "335 labelled answers"}
    opening = first_words(vector_card("joy", vector, entry={**entry_of(vector, "shows"), "judged_by": by}))
    assert "judged by the scorer `refusal`, right on 99% of 335 labelled answers" in opening


def test_what_was_measured_of_another_vector_does_not_count(vector: SteeringVector) -> None:
    stale = {**entry_of(vector, "shows"), "digest": "0" * 64}
    for entry in (None, stale):
        card = vector_card("joy", vector, entry=entry)
        assert first_words(card).startswith("**Not measured on generated text.** On held-out pairs: ")
        assert "| also moves | not measured |" in card


def test_costs_range_and_weights_are_named(vector: SteeringVector) -> None:
    card = vector_card("joy", vector, weights="4-bit GGUF file, weights `48f5`")
    assert (
        "| costs there | KL divergence 0.26 (0.21 to 0.31) nats per token; perplexity ratio 1.2 (1.1 to 1.3); "
        "repeated 4-grams +0.02 (-0.01 to +0.05) against the unsteered model |"
    ) in card
    assert "up to 2, the strongest tried inside the budget; 3 is outside (kl 0.62)" in card
    (base,) = [line for line in card.splitlines() if line.startswith("base_model")]
    assert "not as it stands there, but as 4-bit GGUF file" in base
    assert "| weights | 4-bit GGUF file, weights `48f5` |" in card
    assert "| 2 | 0.500 | 0.400 to 0.600 | 0.01 to 0.04 |" in card


def test_what_was_not_measured_is_no_zero(vector: SteeringVector) -> None:
    card = vector_card("joy", replace(vector, held_out={}))
    assert "KL divergence not measured; perplexity ratio not measured; repetition not measured" in card


def test_a_null_says_so_and_suggests_nothing(vector: SteeringVector) -> None:
    null = {"by": "calibrate", "confirmed": False, "verdict": "nothing works: -0.014"}
    card = vector_card("joy", replace(vector, suggested_strength=None, calibration=null))
    assert first_words(card).startswith("**Nothing.** Calibration confirmed no effect, so no strength is suggested.")
    assert "| suggested strength | none |" in card
    assert "costs there" not in card


def test_the_shipped_cards_are_what_their_files_say() -> None:
    assert cards.stale(cards.FOLDER) == []


def test_a_stale_card_is_named(tmp_path: Path) -> None:
    for name in ("optimism-caa.safetensors", "optimism-caa.md", "formality-caa.safetensors", "formality-caa.md"):
        shutil.copy(cards.FOLDER / name, tmp_path)
    kept = json.loads((cards.FOLDER / "cards.json").read_text(encoding="utf-8"))
    evidence = cards.FOLDER / "evidence.json"
    if evidence.exists():
        shutil.copy(evidence, tmp_path)
    (tmp_path / "cards.json").write_text(json.dumps(kept), encoding="utf-8")
    assert cards.stale(tmp_path) == []

    card = tmp_path / "optimism-caa.md"
    card.write_text(card.read_text(encoding="utf-8").replace("optimism", "cheer", 1), encoding="utf-8")
    assert cards.stale(tmp_path) == ["optimism-caa.md: not what its vector, evidence.json and cards.json say"]

    file = tmp_path / "formality-caa.safetensors"
    replace(SteeringVector.load(file), seed=99).save(file)
    assert "formality-caa.md: its answers are of another vector than formality-caa.safetensors" in cards.stale(tmp_path)

    (tmp_path / "grumpy-caa.md").write_text("by hand", encoding="utf-8")
    assert "grumpy-caa.md: no vector" in cards.stale(tmp_path)
