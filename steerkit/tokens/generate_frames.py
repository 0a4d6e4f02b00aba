"""Where a prompt ends and what was written since, read off the frames of transformers' `generate` on the stack.

No public interface of transformers says either. Both can be had:

* The prompt, repeated for beams and returned sequences, is the local variable `input_ids` of the outermost `generate`
  frame on the Python stack, in every mode of decoding.
* The ids of the text so far are a local variable of the loop that decodes, whichever rows beams and rejected
  candidates have moved.

When transformers renames one of these, this file changes and no other.
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["GenerateFrames"]

_PROMPT, _SETTINGS = "input_ids", "generation_config"  # locals of `generate`
# What the loop that decodes calls the ids of the whole text: with candidates, of beams, else.
_TEXT = ("candidate_input_ids", "flat_running_sequences", "input_ids")
_LOOPS = ("_sample", "_beam_search", "_assisted_decoding")
_DRAFTING = "get_candidates"


class _Known(NamedTuple):
    """What was found from the frame of a loop: its number, which no other frame has while the call's settings live."""

    frame: int
    prompt: weakref.ref[Tensor]
    settings: weakref.ref[Any]


class GenerateFrames:
    """Finds the frames of one model's `generate` on the Python stack of this thread.

    Args:
        model: the transformers model itself; a weak reference is kept, as of the body.
        body: its decoder body: a model around a language model (BLIP-2, KOSMOS-2) may call that one's own `generate`.
    """

    def __init__(self, model: nn.Module, body: nn.Module) -> None:
        from transformers.generation.utils import GenerationMixin

        self._models = weakref.ref(model), weakref.ref(body)
        self._generate = inspect.unwrap(GenerationMixin.generate).__code__
        loops = (getattr(GenerationMixin, name, None) for name in _LOOPS)
        # By identity: the hash of a code object is that of all it holds.
        self._loops = {id(code): code for code in (inspect.unwrap(loop).__code__ for loop in loops if loop is not None)}
        self._local = threading.local()

    def prompt(self) -> tuple[Tensor | None, Any]:
        """The prompt of the `generate` call that this thread is in, and the call's settings.

        The innermost call on the stack, unless a draft is being made for an outer one: a model that drafts for itself
        calls its own `generate` on prompt and answer so far, whose prompt is the outer one's.

        Returns:
            [b, t] and the settings; None and None outside of `generate`.
        """
        nearest, known = self._nearest(), getattr(self._local, "known", None)
        if nearest is None:
            return None, None
        if known is not None and known.frame == id(nearest):
            found, settings = known.prompt(), known.settings()
            if found is not None and settings is not None:
                return found, settings
        found, settings = self._search()
        self._local.known = None
        if id(nearest.f_code) in self._loops and found is not None and settings is not None:
            self._local.known = _Known(id(nearest), weakref.ref(found), weakref.ref(settings))
        return found, settings

    def _nearest(self) -> Any:
        """The innermost frame of `generate`, or of one of its loops; None where no model generates.

        Nothing around a loop changes while it runs: what was found from it once is found from it in each of its steps.
        """
        frame: Any = sys._getframe(2)
        while frame is not None and frame.f_code is not self._generate and id(frame.f_code) not in self._loops:
            frame = frame.f_back
        return frame

    def _search(self) -> tuple[Tensor | None, Any]:
        """See `prompt`; goes through the whole stack."""
        found, settings, drafts = None, None, False
        frame: Any = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if code is self._generate:
                if (found is None or drafts) and self._is_own(frame):
                    names = frame.f_locals
                    found, settings, drafts = names.get(_PROMPT), names.get(_SETTINGS), False
            elif code.co_name == _DRAFTING:
                drafts = True
            frame = frame.f_back
        return (found, settings) if isinstance(found, Tensor) else (None, None)

    def _is_own(self, frame: Any) -> bool:
        """Whether a frame of `generate` or of a loop is this model's."""
        caller = frame.f_locals.get("self")
        return any(model() is caller for model in self._models)

    def text(self) -> Tensor | None:
        """The ids [b, t] of the whole text in the innermost decoding of this model on the stack; None outside of one.

        Innermost, because a model that drafts for itself decodes inside its own decoding.
        """
        frame: Any = sys._getframe(1)
        while frame is not None:
            if id(frame.f_code) in self._loops and self._is_own(frame):
                names = frame.f_locals
                return next((names[name] for name in _TEXT if isinstance(names.get(name), Tensor)), None)
            frame = frame.f_back
        return None
