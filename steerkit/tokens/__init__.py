"""Which tokens of a forward pass are written: a scope, and the facts of the pass that it is asked about.

`scope` names the choices, `forward_pass` answers them for one pass, `clock` notes each pass as it begins, and
`transformers_facts` is the only file that knows what transformers keeps to itself.
"""

from __future__ import annotations

from steerkit.tokens.clock import Hook, PassClock
from steerkit.tokens.forward_pass import Pass, Tokens
from steerkit.tokens.scope import PromptLengths, Scope

__all__ = ["Hook", "Pass", "PassClock", "PromptLengths", "Scope", "Tokens"]
