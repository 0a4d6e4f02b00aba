"""vLLM, steered: vectors by request, beside plain ones, in vLLM's own graph. vLLM loads it by an entry point.

use        `fit` learns a vector on the engine, `recording` reads activations of texts, `verify` tests an installation
front end      `requests` reads what a request asks, `plan` checks it, `prefixes` says which blocks it may share
each worker    `places` finds blocks and their halves, `points` are the hooks on them, `board` holds all numbers on
the device, `steps` fills them for the tokens of a step, `gates` decides by prompts
both           `names` alone knows how vLLM calls its parts; `plugin` hangs the others on them
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from steerkit._support.lazy import lazily

if TYPE_CHECKING:
    from steerkit.engines.vllm.fitting import fit

__all__ = ["fit", "register"]
__getattr__ = lazily(__name__, {"fit": "fitting"})


def register() -> None:
    """Have vLLM steer: what its entry point calls in each of its processes, once or again.

    Raises:
        ModelError: this vLLM has other parts than those that are known.
    """
    from steerkit.engines.vllm.plugin import register as hang

    hang()
