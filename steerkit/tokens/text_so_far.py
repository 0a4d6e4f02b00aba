"""The ids of the whole text that a forward pass goes on with, which scopes by role need in every pass.

A chat's turns are told from the ids up to a token (see `steerkit.prompts.marks`), but a pass that goes on from a cache
carries only what is new. Inside `generate` the text so far is a local variable of the frame that decodes; in the
caller's own loop the ids of earlier passes are kept with the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steerkit.errors import ScopeError
from steerkit.tokens.transformers_facts import is_static

if TYPE_CHECKING:
    from steerkit.tokens.forward_pass import Pass
    from steerkit.tokens.generate_call import GenerateCall
    from steerkit.tokens.scope import Scope

__all__ = ["text_so_far"]

_IDS = "ids"  # where the ids of a text are kept among what goes with its cache


def text_so_far(facts: Pass, scope: Scope) -> tuple[Tensor, int | Tensor]:
    """The ids of the whole text so far, and the column among them at which a pass begins.

    Args:
        facts: the pass.
        scope: what needs them, for the error.

    Returns:
        [b, past + t] and a number; inside compiled decoding a longer tensor and the one column of this pass.

    Raises:
        ScopeError: nobody can tell them.
    """
    given, past = facts.given, facts.past
    if given is None:
        raise ScopeError(f"scope '{scope}': this pass has no token ids (inputs_embeds); give input_ids")
    if not isinstance(past, int):
        if facts.call is None or facts.call.text is None or facts.width > 1:
            raise ScopeError(
                f"scope '{scope}': compiled code and static caches outside of generate do not tell the text so "
                "far; use a dynamic cache, or pass disable_compile=True to generate()"
            )
        column = past.reshape(1)
        return facts.call.text.index_copy_(1, column, given), column
    if facts.call is not None:
        return _text_of_call(facts, facts.call, given, past, scope), past
    if past == 0:
        whole = facts.store[_IDS] = given
        return whole, past
    kept = facts.store.get(_IDS)
    if kept is None or kept.shape[0] != facts.batch or kept.shape[1] < past:
        raise ScopeError(
            f"scope '{scope}': the cache of this pass was not filled under it, so the text so far is not "
            "known; run the whole text inside steer()"
        )
    whole = facts.store[_IDS] = torch.cat([kept[:, :past], given], dim=1)
    return whole, past


def _text_of_call(facts: Pass, call: GenerateCall, given: Tensor, past: int, scope: Scope) -> Tensor:
    """The text [b, past + t] of a pass inside `generate`."""
    whole: Tensor | None = given
    if past > 0:
        whole = None if call.starts_late or call.running is None else call.running()
    if whole is None or whole.shape[0] != facts.batch or whole.shape[1] < past + facts.width:
        raise ScopeError(
            f"scope '{scope}': this generate call does not tell the ids of the text so far; give it the whole "
            "text and not only what is new, and one of transformers' own ways to decode"
        )
    whole = whole[:, : past + facts.width].to(facts.device)
    if not facts.decode and is_static(facts.cache):
        call.keep_text(whole)
    return whole
