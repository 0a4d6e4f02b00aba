"""Which tokens of a forward pass are written: a scope, and the facts of the pass that it is asked about.

`scope` names the choices. `clock` hooks the model and has every pass noted as it begins (`pass_reader`) as a
`forward_pass.Pass`, which answers what a scope writes in it (`written`). `texts`, `generate_call` and `text_so_far`
know what goes on from pass to pass, `decoding` what a loop other than `generate` tells of its rows.
`transformers_facts` and `generate_frames` alone know what transformers keeps to itself.
"""

from __future__ import annotations

from steerkit.tokens.clock import Hook, PassClock
from steerkit.tokens.decoding import Decoding
from steerkit.tokens.forward_pass import Pass
from steerkit.tokens.scope import PromptLengths, Scope
from steerkit.tokens.written import Tokens

__all__ = ["Decoding", "Hook", "Pass", "PassClock", "PromptLengths", "Scope", "Tokens"]
