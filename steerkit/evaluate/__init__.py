"""What steering did and cost, with intervals and controls.

`setup` and `trial` hold model and items, `scorers` and `judges` grade, `scoring` measures. `blocks` compares places by
steering, `attribution` by gradients; `suggesting`, `curve`, `sweeps`, `calibration`, `bisection` look for a strength;
`controls`, `confounding`, `refit_intervals`, `removal` and `answer_likeness` doubt the result; `prompting` measures
system prompts, `compare` sets methods side by side, `together` tells whether several vectors disturb each other,
`lm_eval` runs tasks of the LM Evaluation Harness.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from steerkit._support.lazy import lazily

if TYPE_CHECKING:
    from steerkit.evaluate.answer_likeness import answer_likeness
    from steerkit.evaluate.bisection import FoundStrength, find_strength
    from steerkit.evaluate.blocks import best_layer, effect_by_block, find_layer
    from steerkit.evaluate.by_prompt_kind import by_kind
    from steerkit.evaluate.calibration import Budget, Calibration, Search, calibrate
    from steerkit.evaluate.compare import compared
    from steerkit.evaluate.confounding import confounds
    from steerkit.evaluate.controls import refits
    from steerkit.evaluate.curve import strength_response
    from steerkit.evaluate.intervals import Estimate, interval, separability
    from steerkit.evaluate.prompting import Prompting, measure_prompting
    from steerkit.evaluate.refit_intervals import refit_interval
    from steerkit.evaluate.removal import probe_after_removal
    from steerkit.evaluate.scorers.refusal import stated_accuracy
    from steerkit.evaluate.scoring import Measured, measure, scorer_of
    from steerkit.evaluate.setup import Setup
    from steerkit.evaluate.suggesting import suggest_strength
    from steerkit.evaluate.sweeps import sweep
    from steerkit.evaluate.together import interference
    from steerkit.evaluate.trial import Trial

__all__ = [
    "Budget",
    "Calibration",
    "Estimate",
    "FoundStrength",
    "Measured",
    "Prompting",
    "Search",
    "Setup",
    "Trial",
    "answer_likeness",
    "best_layer",
    "by_kind",
    "calibrate",
    "compared",
    "confounds",
    "effect_by_block",
    "find_layer",
    "find_strength",
    "interference",
    "interval",
    "measure",
    "measure_prompting",
    "probe_after_removal",
    "refit_interval",
    "refits",
    "scorer_of",
    "separability",
    "stated_accuracy",
    "strength_response",
    "suggest_strength",
    "sweep",
]

__getattr__ = lazily(
    __name__,
    {
        "Budget": "calibration",
        "Calibration": "calibration",
        "Estimate": "intervals",
        "FoundStrength": "bisection",
        "Measured": "scoring",
        "Prompting": "prompting",
        "Search": "calibration",
        "Setup": "setup",
        "Trial": "trial",
        "answer_likeness": "answer_likeness",
        "best_layer": "blocks",
        "by_kind": "by_prompt_kind",
        "calibrate": "calibration",
        "compared": "compare",
        "confounds": "confounding",
        "effect_by_block": "blocks",
        "find_layer": "blocks",
        "find_strength": "bisection",
        "interference": "together",
        "interval": "intervals",
        "measure": "scoring",
        "measure_prompting": "prompting",
        "probe_after_removal": "removal",
        "refit_interval": "refit_intervals",
        "refits": "controls",
        "scorer_of": "scoring",
        "separability": "intervals",
        "stated_accuracy": "scorers.refusal",
        "strength_response": "curve",
        "suggest_strength": "suggesting",
        "sweep": "sweeps",
    },
)
