"""From the arguments of a forward pass to its facts: its columns, which of them are real, where the prompt ends."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.errors import ScopeError
from steerkit.tokens.decoding import Decoding
from steerkit.tokens.forward_pass import PACKED, Pass
from steerkit.tokens.generate_call import GenerateCall
from steerkit.tokens.generate_frames import GenerateFrames
from steerkit.tokens.texts import Texts
from steerkit.tokens.transformers_facts import (
    cache_of,
    columns_cached,
    first_of_real,
    is_packed,
    is_static,
    mask_of_layers,
    real_of_diagonal,
)

__all__ = ["PassReader"]

_UNCOUNTED = "a recurrent cache does not say how many tokens it has seen; pass attention_mask over all of them"
_UNSEEN = "generate feeds this model only what is new, and its cache is no argument that is known; pass use_cache=False"


class PassReader:
    """Reads the facts of one model's passes.

    Args:
        model: the transformers model itself; a weak reference is kept.
        body: its decoder body, which some models let generate.
        frames: finds the `generate` call of this model that a pass is in.
        texts: what goes on from pass to pass.
        local: the switches of each thread: `rows`, `suspended`, `aside` and `decoding`, see `PassClock`.
    """

    def __init__(
        self, model: nn.Module, body: nn.Module, frames: GenerateFrames, texts: Texts, local: threading.local
    ) -> None:
        self._model = weakref.ref(model)
        self._frames, self._texts, self._local = frames, texts, local
        # `generate` always says how many logits it wants, where the forward of the model that generates can be told.
        generating = body if hasattr(body, "generate") else model
        self._tells = "logits_to_keep" in inspect.signature(generating.forward).parameters

    # See the table of modes in the tests for what each branch is for.
    def read(self, tokens: Tensor, given: Mapping[str, Any]) -> Pass:
        """The facts of a pass.

        Args:
            tokens: its ids [b, t] or embeddings [b, t, d].
            given: its arguments by name.

        Raises:
            ScopeError: a loop told of other rows than the pass has.
        """
        batch, width = tokens.shape[0], tokens.shape[1]
        packed, mask = is_packed(given), given.get("attention_mask")
        cache = None if packed else cache_of(given)  # one that requests share says nothing of a row
        compiling = torch.compiler.is_compiling()
        decoding: Decoding | None = getattr(self._local, "decoding", None)
        prompt, settings = (None, None) if compiling or decoding is not None else self._frames.prompt()
        call = self._texts.call_of(prompt, settings, cache, compiling)
        ids = given.get("input_ids")
        past = columns_cached(cache, mask, width, decoding or call, compiling)
        facts: dict[str, Any] = {"batch": batch, "width": width, "device": tokens.device}
        facts["rows"] = getattr(self._local, "rows", None)
        facts["suspended"] = getattr(self._local, "suspended", False)
        facts["given"] = ids if isinstance(ids, Tensor) and ids.shape[:2] == (batch, width) else None
        facts["is_compiled"] = compiling
        facts["expands"] = compiling or call is not None or cache is not None
        if past is None:
            return Pass(**facts, past=0, only_all=_UNCOUNTED)
        facts["past"] = past
        if packed:
            return Pass(**facts, only_all=PACKED)
        if decoding is not None and isinstance(past, int):
            return self._read_decoding(facts, decoding, cache, mask)
        own_sequence = call is not None and not compiling and given.get("logits_to_keep") is None and self._tells
        if cache is None and call is not None and not compiling and not own_sequence and self._goes_on(width):
            return Pass(**facts, only_all=_UNSEEN)
        facts["is_apart"] = own_sequence
        self._read_end(facts, cache, None if own_sequence else call, given)
        if not compiling:
            if facts["given"] is None and call is not None and not own_sequence:
                facts["given"] = self._ids_of(facts)
            facts["store"] = self._texts.store_of(None if own_sequence else call, cache, past)
            facts |= getattr(self._local, "aside", None) or {}
        self._read_pads(facts, mask, cache, call, given)
        return Pass(**facts)

    def _read_decoding(self, facts: dict[str, Any], decoding: Decoding, cache: Any, mask: Any) -> Pass:
        """The facts of a pass whose rows a loop of the caller's has told of.

        Raises:
            ScopeError: the pass has another number of rows.
        """
        past, width, device = facts["past"], facts["width"], facts["device"]
        if facts["batch"] != decoding.rows:
            raise ScopeError(f"decoding: told of {decoding.rows} rows, and this pass has {facts['batch']}")
        decoding.columns = past + width
        facts |= {"boundary": decoding.boundary, "decode": cache is not None and decoding.is_step(past, width)}
        facts |= {"ends": None if decoding.boundary is not None else decoding.ends_on(device), "decoding": decoding}
        facts |= {"first": decoding.first_on(device), "store": decoding.store, "cache": cache}
        facts |= getattr(self._local, "aside", None) or {}
        return Pass(**facts, attention=mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)

    def _goes_on(self, width: int) -> bool:
        """Whether a pass without a cache carries less than the text of its `generate` call."""
        text = self._frames.text()
        return text is not None and width < text.shape[1]

    def _ids_of(self, facts: dict[str, Any]) -> Tensor | None:
        """The ids [b, t] that embeddings stand for, where `generate` was given both; None where it knows none."""
        text, end = self._frames.text(), facts["past"] + facts["width"]
        if text is None or not isinstance(facts["past"], int) or text.shape != (facts["batch"], end):
            return None
        return text[:, facts["past"] :]

    def _read_end(self, facts: dict[str, Any], cache: Any, call: GenerateCall | None, given: Mapping[str, Any]) -> None:
        """Where the prompt ends, and whether this is a decoding step."""
        past, width, keep = facts["past"], facts["width"], given.get("logits_to_keep")
        if torch.compiler.is_compiling():
            facts["decode"] = call is not None and cache is not None and width == 1
            facts["call"] = call if facts["decode"] else None
        elif call is not None:
            call.note(past, width, keep)
            facts["boundary"] = call.boundary
            facts["decode"] = cache is not None and width == 1 and call.past_prompt(past)
            facts |= {"call": call, "cache": cache}
            if not facts["decode"] and is_static(cache):
                call.keep_edge(facts["device"])
            call.running = self._frames.text
        else:
            facts["boundary"] = self._texts.boundary_of_cache(
                cache, past, width, keep=keep, use_cache=bool(given.get("use_cache")), own_sequence=facts["is_apart"]
            )

    def _read_pads(
        self, facts: dict[str, Any], mask: Any, cache: Any, call: GenerateCall | None, given: Mapping[str, Any]
    ) -> None:
        """Which tokens are real."""
        layer = 0
        if isinstance(mask, Mapping):
            mask, layer = mask_of_layers(mask, self._model())
        if isinstance(mask, Tensor) and mask.dim() == 2:
            facts["attention"] = mask
        elif isinstance(mask, Tensor) and mask.dim() == 4:
            if not facts.get("decode"):
                facts["real"] = real_of_diagonal(mask, facts["past"], facts["width"], cache, layer, facts["batch"])
            facts["first"] = first_of_real(facts.get("real"), facts["past"], call)
        elif mask is None and facts["batch"] == 1 and facts["width"] > 1 and call is None:
            facts["position_ids"] = given.get("position_ids")
