"""Which site, head or neuron to steer, before any sweep: slopes of effects, what they cost, and patching.

`gradients` runs the passes, `slopes` attributes a vector's effect, `costs` what it begins to cost; `patching` asks the
same of two prompts' activations.
"""

from __future__ import annotations

from steerkit.evaluate.attribution.costs import kl_curvatures
from steerkit.evaluate.attribution.patching import Node, Patched, attribution_patching, exact_patching
from steerkit.evaluate.attribution.prompt_pairs import PromptPairs, logit_difference
from steerkit.evaluate.attribution.slopes import Attribution, Part, Slope, attribute, attribute_all

__all__ = [
    "Attribution",
    "Node",
    "Part",
    "Patched",
    "PromptPairs",
    "Slope",
    "attribute",
    "attribute_all",
    "attribution_patching",
    "exact_patching",
    "kl_curvatures",
    "logit_difference",
]
