"""From the name of a trait to a vector for it.

`traits` is the specification and `drafting` has one written, `rollouts` lets the model play the trait, `scores` and
`filtering` keep the answers that show it, `vector_choice` fits the vector, `watching` one that sees the trait coming;
`pipeline` does all of it in one folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from steerkit._support.lazy import lazily

if TYPE_CHECKING:
    from steerkit.persona.choice import Choice
    from steerkit.persona.drafting import draft, skeleton
    from steerkit.persona.extraction import Extraction
    from steerkit.persona.filtering import Filtered, Rules, filtered
    from steerkit.persona.pairs import pairs_jsonl
    from steerkit.persona.pipeline import Pipeline, extract
    from steerkit.persona.rollout_plan import RolloutPlan
    from steerkit.persona.rollouts import Rollout, roll_out
    from steerkit.persona.scores import Scores, margin_scores
    from steerkit.persona.traits import TraitSpec, slug
    from steerkit.persona.watching import watchpoint

__all__ = [
    "Choice",
    "Extraction",
    "Filtered",
    "Pipeline",
    "Rollout",
    "RolloutPlan",
    "Rules",
    "Scores",
    "TraitSpec",
    "draft",
    "extract",
    "filtered",
    "margin_scores",
    "pairs_jsonl",
    "roll_out",
    "skeleton",
    "slug",
    "watchpoint",
]

__getattr__ = lazily(
    __name__,
    {
        "Choice": "choice",
        "Extraction": "extraction",
        "Filtered": "filtering",
        "Pipeline": "pipeline",
        "Rollout": "rollouts",
        "RolloutPlan": "rollout_plan",
        "Rules": "filtering",
        "Scores": "scores",
        "TraitSpec": "traits",
        "draft": "drafting",
        "extract": "pipeline",
        "filtered": "filtering",
        "margin_scores": "scores",
        "pairs_jsonl": "pairs",
        "roll_out": "rollouts",
        "skeleton": "drafting",
        "slug": "traits",
        "watchpoint": "watching",
    },
)
