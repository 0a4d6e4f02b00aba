"""vLLM, steered: vectors by request, beside plain ones, in vLLM's own graph. vLLM loads it by an entry point.

front end      `requests` reads what a request asks, `plan` checks it, `prefixes` says which blocks it may share
each worker    `places` finds blocks and their halves, `points` are the hooks on them, `board` holds all numbers on
the device, `steps` fills them for the tokens of a step, `gates` decides by prompts
both           `names` alone knows how vLLM calls its parts; `plugin` hangs the others on them
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Have vLLM steer: what its entry point calls in each of its processes, once or again.

    Raises:
        ModelError: this vLLM has other parts than those that are known.
    """
    from steerkit.engines.vllm.plugin import register as hang

    hang()
