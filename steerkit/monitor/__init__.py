"""Reading a model that runs: `Monitor` scores prompts and answers and watches generation, `explain` tells what a gate
would decide, `shift` compares a finetuned model or its data with the model before, `token_heat` colours tokens.
"""

from __future__ import annotations

from steerkit.monitor.decisions import explain
from steerkit.monitor.difference import projection_difference
from steerkit.monitor.items import conversation_of
from steerkit.monitor.monitor import Monitor
from steerkit.monitor.shift import finetuning_shift
from steerkit.monitor.watched import Watched
from steerkit.monitor.watched_call import Step

__all__ = ["Monitor", "Step", "Watched", "conversation_of", "explain", "finetuning_shift", "projection_difference"]
