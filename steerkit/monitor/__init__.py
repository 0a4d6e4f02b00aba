"""Reading a model along a vector's direction, while it runs and after finetuning.

`monitor` scores prompts and answers, `watched` reads while the model generates, `decisions` tells what a gate would
decide and `operating` how seldom it opens, `shift` compares a finetuned model with the model before, `difference` a
data set with the model's own answers, `token_heat` gives every token its number. `weight_audit` compares the weights of
two checkpoints with known directions, `checkpoints` and `adapters` read them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from steerkit._support.lazy import lazily

if TYPE_CHECKING:
    from steerkit.monitor.adapters import AdapterDifference
    from steerkit.monitor.checkpoints import Checkpoint
    from steerkit.monitor.decisions import explain
    from steerkit.monitor.difference import projection_difference
    from steerkit.monitor.items import conversation_of
    from steerkit.monitor.monitor import Monitor
    from steerkit.monitor.operating import operating_points
    from steerkit.monitor.shift import finetuning_shift
    from steerkit.monitor.watched import Watched
    from steerkit.monitor.watched_call import Step
    from steerkit.monitor.weight_audit import audit

__all__ = [
    "AdapterDifference",
    "Checkpoint",
    "Monitor",
    "Step",
    "Watched",
    "audit",
    "conversation_of",
    "explain",
    "finetuning_shift",
    "operating_points",
    "projection_difference",
]

__getattr__ = lazily(
    __name__,
    {
        "AdapterDifference": "adapters",
        "Checkpoint": "checkpoints",
        "Monitor": "monitor",
        "Step": "watched_call",
        "Watched": "watched",
        "audit": "weight_audit",
        "conversation_of": "items",
        "explain": "decisions",
        "finetuning_shift": "shift",
        "operating_points": "operating",
        "projection_difference": "difference",
    },
)
