"""From vectors to numbers: what one request is steered with, checked as far as it can be without the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from steerkit.errors import ScopeError, SiteError, StrengthError, VectorMismatchError
from steerkit.maths.rank_two import TURNS, RankTwo
from steerkit.methods._base import Method
from steerkit.methods._gate import Gate
from steerkit.methods._protocols import HasRankTwoForm, editor_of
from steerkit.methods._registry import default_strength, method_of
from steerkit.network.sites import Site
from steerkit.steering.edits_at_sites import norm_factor
from steerkit.tokens.fade import Fade
from steerkit.tokens.scope import ANSWER, Scope
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["NEVER", "Served", "TermPlan", "digest_of", "key_of", "planned", "span"]

NEVER = 2**31 - 1
_COUNTED = ("all", "prompt", "first", *ANSWER)


class Served(NamedTuple):
    """What has to be known of the model that is served.

    Attributes:
        hidden_size: width of its residual stream.
        num_layers: its blocks.
        kinds: of sites that can be written.
        levels: vectors that one site takes.
        terms: vectors that one request takes.
        whole: whether one process holds all its blocks, as gates need.
    """

    hidden_size: int
    num_layers: int
    kinds: tuple[str, ...]
    levels: int
    terms: int
    whole: bool = True


@dataclass(frozen=True)
class TermPlan:
    """One vector of a request.

    Attributes:
        digest: what tells its numbers from those of others.
        scope: which tokens it writes.
        strength: with which it begins.
        fade: how that goes on; None where it stays.
        neutral: the strength that changes nothing; None where none does.
        edits: by written site the numbers.
        factors: by written site what the strength is multiplied with, where `edits` do not hold that already.
        gate: what decides by the prompt; None where nothing does.
    """

    digest: str
    scope: Scope
    strength: float
    fade: Fade | None
    neutral: float | None
    edits: Mapping[Site, RankTwo]
    factors: Mapping[Site, float]
    gate: Gate | None

    @property
    def counts_from_end(self) -> bool:
        """Whether what it does at a token depends on where the prompt ends."""
        return self.scope.kind not in ("all", "first") or self.fade is not None or self.gate is not None


def planned(vectors: Sequence[SteeringVector], served: Served) -> tuple[TermPlan, ...]:
    """The plans of a request's vectors; those that change nothing are left out.

    Args:
        vectors: in their order, each as it is to be applied.
        served: the model.

    Raises:
        VectorMismatchError: a vector of another model, or of a method that cannot be served.
        SiteError: a site that cannot be written, or by too many vectors.
        ScopeError: a scope that cannot be served, or that the method does not allow.
        StrengthError: a strength per row, or a unit that the vector does not know.
    """
    plans = [plan for plan in (_plan(vector, served) for vector in vectors) if plan is not None]
    if len(plans) > served.terms:
        raise SiteError(
            f"{len(plans)} vectors in one request, and the server takes {served.terms}; see setting 'terms'"
        )
    for site in dict.fromkeys(site for plan in plans for site in plan.edits):
        count = sum(site in plan.edits for plan in plans)
        if count > served.levels:
            raise SiteError(
                f"{site}: {count} vectors, and the server takes {served.levels} a site; see setting 'levels'"
            )
    return tuple(plans)


def _plan(vector: SteeringVector, served: Served) -> TermPlan | None:
    method = method_of(vector)
    _check_model(vector, served)
    if not isinstance(method, HasRankTwoForm):
        raise VectorMismatchError(
            f"{method.name}: its edit moves tokens in more than a plane, which vLLM is not steered with; bake the "
            "vector into a checkpoint (steerkit bake), or serve it with steerkit serve"
        )
    if vector.hold is not None or vector.when is not None:
        word = "hold" if vector.when is None else "when"
        raise VectorMismatchError(f"{word}: readings along other vectors do not steer vLLM; leave it out")
    if isinstance(vector.strength, tuple) or vector.rows is not None:
        raise StrengthError("strength: a request has one strength for each vector, not one per row")
    gate = _gate(method, vector, served)
    scope = _scope(method, vector, gate)
    strength = default_strength(vector) if vector.strength is None else vector.strength
    ends = [strength] if vector.fade is None else [strength, vector.fade.to]
    edits: dict[Site, RankTwo] = {}
    factors: dict[Site, float] = {}
    for site in vector.sites:
        if site.kind not in served.kinds:
            raise SiteError(f"{site}: the server writes {', '.join(served.kinds)}; fit the vector there")
        params = vector.params(site)
        method.check(site, params)
        factor = 1.0 if vector.unit == "paper" else norm_factor(method, vector, site, params)
        edits[site] = method.rank_two(params)
        if gate is None:
            edits[site].weights[..., TURNS.index("strength")] *= factor
        else:  # whose limit counts in the method's own unit
            factors[site] = factor
    weights = [edit.weights[:, 1:] for edit in edits.values()]
    if not all(torch.equal(one, weights[0]) for one in weights):
        raise VectorMismatchError(f"{method.name}: its edit reads tokens otherwise at each site; serve another vector")
    if all(method.is_neutral(end) for end in ends) and len(set(ends)) == 1:
        return None
    digest = hashlib.sha256(f"{vector.digest} {vector.unit}".encode()).hexdigest()
    return TermPlan(digest, scope, strength, vector.fade, method.neutral_strength, edits, factors, gate)


def _check_model(vector: SteeringVector, served: Served) -> None:
    if (vector.hidden_size, vector.num_layers) != (served.hidden_size, served.num_layers):
        raise VectorMismatchError(
            f"vector fitted on {vector.model_type} ({vector.num_layers} layers, width {vector.hidden_size}) cannot "
            f"steer a model of {served.num_layers} layers and width {served.hidden_size}: fit one on this model"
        )


def _gate(method: Method, vector: SteeringVector, served: Served) -> Gate | None:
    editor = editor_of(method, vector)
    if editor is None:
        return None
    if not isinstance(editor, Gate) or editor.follows:
        raise VectorMismatchError(
            f"{method.name}: its gate decides anew at every token, which vLLM is not steered with"
        )
    if vector.fade is not None:
        raise StrengthError(f"{method.name}: a gated vector does not fade in vLLM; leave fade out")
    wrong = [site for site in editor.reads if site.kind not in served.kinds]
    if wrong:
        raise SiteError(f"{wrong[0]}: the gate reads there, and the server knows {', '.join(served.kinds)}")
    if not served.whole:
        raise VectorMismatchError(f"{method.name}: gates need all blocks in one process; start without pipeline stages")
    return editor


def _scope(method: Method, vector: SteeringVector, gate: Gate | None) -> Scope:
    scope = Scope.parse(vector.scope)
    if scope.kind not in method.scopes:
        raise ScopeError(f"{method.name}: scope '{scope}' is not one of its own: {', '.join(method.scopes)}")
    if scope.kind not in _COUNTED:
        raise ScopeError(f"scope '{scope}' does not steer vLLM; use {', '.join(_COUNTED[:-1])} or generated")
    if gate is not None and scope.kind not in ANSWER:
        raise ScopeError(
            f"scope '{scope}': prompt tokens would be written before the gate of {method.name} has read them; use "
            "@response"
        )
    return scope


def span(scope: Scope, prompt: int) -> tuple[int, int]:
    """Which positions a scope writes, as the first one and the one behind the last.

    Args:
        scope: of a plan.
        prompt: tokens of the request's prompt.
    """
    if scope.kind in ANSWER:
        begin = prompt - (scope.kind == "response")
        return begin + scope.start, begin + scope.count if scope.count else NEVER
    return 0, {"all": NEVER, "prompt": prompt, "first": scope.count}[scope.kind]


def digest_of(plans: Sequence[TermPlan]) -> str:
    """What tells the steering of a request from that of others.

    Args:
        plans: of the request.
    """
    said = "\n".join(f"{one.digest} {one.scope} {one.strength!r} {one.fade}" for one in plans)
    return hashlib.sha256(said.encode()).hexdigest()


def key_of(plans: Sequence[TermPlan], prompt: int) -> tuple[str, int]:
    """What tells the cached keys and values of a request from those of others, and the first token that differs.

    Args:
        plans: of the request.
        prompt: tokens of its prompt.
    """
    # Where steering counts from the prompt's end, the same tokens are steered otherwise behind another prompt.
    ends = f" {prompt}" if any(one.counts_from_end for one in plans) else ""
    return f"{digest_of(plans)}{ends}", min(span(one.scope, prompt)[0] for one in plans)
