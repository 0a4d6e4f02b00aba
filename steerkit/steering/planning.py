"""From a vector to its edits: all that can be checked is checked, before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from steerkit.errors import ScopeError, VectorMismatchError
from steerkit.methods._protocols import Gated, LayerInput, ReadsInput, TiedToWeights
from steerkit.methods._registry import method_of
from steerkit.network.decoder import Decoder, find_decoder
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.prompts.chat_roles import Roles
from steerkit.steering.edits_at_sites import Edit, GuidedEdit, RowStrengths, norm_factor
from steerkit.steering.holding import HeldStrength
from steerkit.steering.readings import VectorReading
from steerkit.steering.replay import GatePlan
from steerkit.steering.stacked_edits import share_rows, stacked
from steerkit.steering.strengths import warn_beyond
from steerkit.steering.when_gates import gate_of
from steerkit.tokens.scope import PromptLengths, Scope
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Target", "joined", "planned", "with_row_strengths"]


@dataclass(frozen=True)
class Target:
    """What vectors are planned for.

    Attributes:
        model: the transformers model, wrapped or not.
        decoder: its decoder.
        lengths: prompt tokens of each row, where the caller told them.
        roles: of the model's tokenizer, for scopes by role.
        only_all: why only scope `all` is known on this model, if so.
    """

    model: nn.Module
    decoder: Decoder
    lengths: PromptLengths | None
    roles: Roles | None
    only_all: str | None

    @classmethod
    def of(cls, model: nn.Module, lengths: PromptLengths | None = None, tokenizer: Any = None) -> Target:
        """Find what has to be known of a model.

        Args:
            model: any decoder-only transformers model, wrapped by PEFT or not.
            lengths: prompt tokens of each row, where the caller told them.
            tokenizer: the model's, or its roles.

        Raises:
            SiteError: this is no model that can be steered.
        """
        roles = None if tokenizer is None else Roles.of(tokenizer)
        return cls(model, find_decoder(model), lengths, roles, _prompt_learning(model))


def planned(
    target: Target,
    vector: SteeringVector,
    row_strengths: RowStrengths,
    scope: str | None = None,
    unit: str | None = None,
) -> list[Edit]:
    """Turn one vector into edits, checking all that can be checked.

    Args:
        target: the model.
        vector: the vector.
        row_strengths: its strength.
        scope: which tokens are written; None takes the vector's own.
        unit: what the strength counts in; None takes the vector's own.

    Raises:
        ScopeError: a scope that the method does not allow, or that this model cannot know.
        SteerError: see `steerkit.steer`.
    """
    vector.check(target.model)
    decoder, lengths, only_all = target.decoder, target.lengths, target.only_all
    method = method_of(vector)
    written = Scope.parse(vector.scope if vector.own_scope or scope is None else scope)
    if written.kind not in method.scopes:
        raise ScopeError(f"{method.name}: scope '{written}' is not one of its own: {', '.join(method.scopes)}")
    written = written.among(method.scopes)
    if only_all is not None and written.kind != "all":
        raise ScopeError(f"scope '{written}': {only_all}{written.instead('; ', 'all')}")
    _refuse_window(vector, written)
    written = written.marked(target.roles)
    counted = vector.unit if vector.own_unit or unit is None else unit
    warn_beyond(vector, row_strengths.value, counted)
    sources: Mapping[Site, LayerInput] = method.inputs_at(decoder, vector) if isinstance(method, ReadsInput) else {}
    taps = {site: one.tap for site, one in sources.items()} or locate(decoder.model, vector.sites)
    edits: list[Edit] = []
    if isinstance(method, TiedToWeights):
        method.check_model(vector, decoder)
    tokenizer = None if target.roles is None else target.roles.tokenizer
    editor = gate_of(decoder.model, vector, method, tuple(taps), tokenizer)
    if (editor is not None or vector.hold is not None) and only_all is not None:
        raise ScopeError(f"{method.name}: {only_all}, so a gate cannot find the prompt's end; leave the adapter out")
    guide = None
    if editor is not None:
        guide = GatePlan(editor, written, lengths, vector.sites, locate(decoder.model, editor.reads))
    hold = None if vector.hold is None else vector.hold.bound(SteeringVector.load)
    reading = None
    if hold is not None and hold.vector is not None:
        reading = VectorReading(decoder.model, hold.reading, hold.vector, tokenizer)
    for site, tap in zip(vector.sites, taps.values(), strict=True):
        params = vector.params(site)
        method.check(site, params)
        factor = 1.0 if counted == "paper" else norm_factor(method, vector, site, params)
        block = None if site.kind in ("resid_pre", "resid_post") else decoder.blocks[site.layer]
        more: dict[str, Any] = {"source": sources.get(tap.site)}
        if hold is not None and reading is not None:
            more["held"] = HeldStrength(hold, reading, tap.site, method, params, factor)
        plan = (method, params, tap, written, row_strengths, factor, lengths, block)
        edits.append(Edit(*plan, **more) if guide is None else GuidedEdit(*plan, **more, guide=guide))
    return _siblings(edits)


def with_row_strengths(edits: Sequence[Edit], row_strengths: RowStrengths) -> list[Edit]:
    """The edits of a vector for other rows and strengths, without planning them again.

    Args:
        edits: what `planned` gave.
        row_strengths: the strengths.
    """
    return _siblings([replace(edit, row_strengths=row_strengths) for edit in edits])


def joined(edits: Sequence[Edit]) -> list[Edit]:
    """The edits of all vectors of one steering, those that differ in their rows alone as one.

    Args:
        edits: in the order of their vectors.

    Raises:
        VectorMismatchError: two gates add one direction at one site.
    """
    _refuse_twice(edits)
    return stacked(edits)


def _siblings(edits: list[Edit]) -> list[Edit]:
    """Tell the edits of one gate of each other."""
    for edit in edits:
        if isinstance(edit, GuidedEdit):
            edit.siblings = edits
    return edits


def _refuse_window(vector: SteeringVector, written: Scope) -> None:
    """Refuse what counts from the prompt's end on where a window of the prompt is written.

    Raises:
        ScopeError: with what counts.
    """
    per_token = vector.when is not None and vector.when.per_token
    counts = {"a fade": vector.fade is not None, "hold": vector.hold is not None, "per token": per_token}
    for name, is_set in counts.items():
        if is_set and written.is_window:
            raise ScopeError(
                f"scope '{written}' lies in the prompt, and {name} counts generated tokens; leave one of them out"
            )


def _refuse_twice(edits: Sequence[Edit]) -> None:
    """Refuse two gates that add one direction at one site: a row that opens both would get it twice."""
    gated = [edit for edit in edits if isinstance(edit, GuidedEdit) and isinstance(edit.method, Gated)]
    for number, edit in enumerate(gated):
        for other in gated[:number]:
            is_there = edit.tap.site == other.tap.site and share_rows(edit, other)
            if is_there and torch.equal(edit.params["direction"], other.params["direction"]):
                raise VectorMismatchError(
                    f"{edit.tap.site}: two gated vectors add the same direction, twice to a row that opens both; join "
                    "their conditions with | (steerkit.methods.conditional.combine)"
                )


def _prompt_learning(model: nn.Module) -> str | None:
    """Why only scope `all` is known on this model, if so: virtual tokens stand before the text."""
    config: Any = getattr(model, "active_peft_config", None)
    if config is not None and getattr(config, "is_prompt_learning", False):
        return f"a {config.peft_type} adapter puts virtual tokens before the text, so positions are not known"
    return None
