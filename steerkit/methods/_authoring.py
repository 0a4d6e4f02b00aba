"""What is asked of whoever writes a method: of the class when it is found, of what `fit` gives when it has run.

Each answer is one line for the author: what there is, what is allowed, what to add.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, get_args

import torch
from torch import Tensor

from steerkit.errors import FitError, SteerError, near_miss
from steerkit.methods._base import FittedOn, Method, has_sides
from steerkit.methods._params import form_problem, misfit, undeclared
from steerkit.methods._protocols import Gated
from steerkit.network.sites import Site
from steerkit.tokens.scope import SCOPES

__all__ = ["check_fitted", "class_problem", "fitted_tensors"]


def class_problem(kind: type[Method]) -> str | None:
    """What a method's class lacks.

    Args:
        kind: the class.

    Returns:
        Half a sentence to follow the class's name, with what to write; None where nothing is missing.
    """
    own: Any = kind
    return _class_problem(own)


@functools.cache
def _class_problem(kind: Any) -> str | None:
    facts: Any = vars(kind)
    for name, example in (("name", "the_file_s_name"), ("title", "Head shifts"), ("paper", "Li et al. 2023")):
        value = getattr(kind, name, None)
        if not isinstance(value, str) or not value:
            return f"has no `{name}`; write {name}: ClassVar[str] = {example!r}"
    if not getattr(facts.get("__dataclass_params__"), "frozen", False):
        return "is no frozen dataclass, so its fields are no settings; write @dataclass(frozen=True) over it"
    if not kind.__doc__ or kind.__doc__.startswith(f"{kind.__name__}("):  # what dataclass puts there
        return "has no docstring; say in a line what it does, and what strength 1 is"
    if kind.data not in get_args(FittedOn):
        return f"has data = {kind.data!r}; {near_miss(str(kind.data), get_args(FittedOn))}"
    needed = [one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING]
    if needed:
        return f"has the setting `{needed[0]}` without a default; give it one"
    problem = form_problem(kind.params, "params") or form_problem(kind.also, "also")
    return problem or _scope_problem(kind) or _missing_function(kind)


def _scope_problem(kind: Any) -> str | None:
    known = [scope.partition("(")[0] for scope in SCOPES]
    if isinstance(kind.scopes, str):
        return f"has scopes = {kind.scopes!r}; write a tuple, such as ({kind.scopes!r},)"
    wrong = [scope for scope in kind.scopes if scope not in known]
    if wrong:
        return f"has scopes with {wrong[0]!r}; {near_miss(str(wrong[0]), known)}"
    own = kind.default_scope is Method.default_scope
    if own and str(kind.scope).partition("(")[0] not in kind.scopes:
        return (
            f"has scope = {kind.scope!r}, which is none of its scopes {', '.join(kind.scopes)}; write scope or scopes"
        )
    return None


def _missing_function(kind: type[Method]) -> str | None:
    if kind.fit is Method.fit and kind.fit_site is Method.fit_site:
        return "writes neither `fit_site` nor `fit`; write one of them"
    if kind.fit is Method.fit and kind.readout is None:
        return "has readout = None and no `fit` of its own; write `fit`, and read there by `subject.record`"
    if not has_sides(kind) and kind.readout is not None:
        return "is fitted on prompts, which have no sides to be read beforehand; write readout = None, and `fit`"
    for name in ("prepare", "edit"):
        if getattr(kind, name) is getattr(Method, name) and not issubclass(kind, Gated):
            return f"writes no `{name}`; write it, or derive from AddDirection"
    return None


def fitted_tensors(method: Method, found: Any) -> dict[str, Tensor]:
    """What `fit` gave, as tensors by name.

    Args:
        method: that fitted.
        found: what came back.

    Returns:
        ``"<site>/<name>"`` or ``"shared/<name>"`` to tensor, of any shape.

    Raises:
        FitError: it is something else, nothing, or not finite.
    """
    wanted = "return a dict such as {'resid_post.3/direction': tensor}"
    if not isinstance(found, Mapping):
        raise FitError(f"{method.name}: `fit` gave {type(found).__name__}; {wanted}")
    if not found:
        raise FitError(f"{method.name}: `fit` gave no tensor; {wanted}")
    for name, tensor in found.items():
        if not isinstance(name, str) or "/" not in name:
            shown = f"{type(name).__name__} {name}" if not isinstance(name, str) else repr(name)
            raise FitError(f"{method.name}: `fit` gave a tensor under {shown}; name it '<site>/<name>': {wanted}")
        if not isinstance(tensor, Tensor):
            raise FitError(f"{method.name}: {name} is of type {type(tensor).__name__}; give a tensor")
        if not bool(torch.isfinite(tensor).all()):
            raise FitError(f"{method.name}: {name} is not finite; load the model in float32 or bfloat16")
    return dict(found)


def check_fitted(method: Method, tensors: Mapping[str, Tensor], sites: Sequence[Site]) -> None:
    """Hold what was fitted against what the method declares, and against its own check.

    Args:
        method: that fitted.
        tensors: what `fit` gave, of any shape.
        sites: where the vector will be applied.

    Raises:
        FitError: a tensor is undeclared, missing, or of another shape or dtype than declared.
    """
    schema = {**method.params, **method.also}
    for full, tensor in tensors.items():
        name = full.partition("/")[2]
        if name not in schema:
            raise FitError(f"{method.name} at {full.partition('/')[0]}: {undeclared(name, tensor, schema)}")
    for site in sites:
        mine: dict[str, Tensor] = {}
        for owner in ("shared", str(site)):
            mine |= {full.partition("/")[2]: one for full, one in tensors.items() if full.partition("/")[0] == owner}
        wrong = misfit(
            {name: schema[name] for name in schema if name in method.params or name in mine}, mine, dtypes=True
        )
        if wrong:
            wanted, got = wrong
            given = f"{got or 'none'}; change the one or the other"
            raise FitError(f"{method.name} at {site}: `params` declares {wanted}, `fit` gave {given}")
        try:
            method.check(site, mine)
        except SteerError as error:
            raise FitError(f"{method.name}: what it fitted does not pass its own check ({error})") from None
