"""Groups of options that many commands have: a dataclass says which, a decorator puts them in a command's parameter."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_args, get_type_hints

__all__ = ["spread"]


def spread(
    run: Callable[..., Any], kind: type, more: Callable[[tuple[Any, ...]], dict[str, Any]] = lambda texts: {}
) -> Callable[..., Any]:
    """Put the options of a group in the place of a command's parameter of the group's type.

    Args:
        run: the command.
        kind: the group: a dataclass whose fields are annotated as typer's options are.
        more: annotations that take the place of the group's own, from what the parameter itself is annotated with.

    Returns:
        The command as typer reads it.
    """
    hints = get_type_hints(run, include_extras=True)
    place = next(name for name, hint in hints.items() if kind in (hint, *get_args(hint)))
    annotated = get_type_hints(kind, include_extras=True) | more(get_args(hints[place])[1:])
    options = [
        inspect.Parameter(
            field.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=field.default, annotation=annotated[field.name]
        )
        for field in fields(kind)
    ]
    parameters: list[inspect.Parameter] = []
    for name, one in inspect.signature(run).parameters.items():
        parameters += options if name == place else [one.replace(annotation=hints[name])]

    @functools.wraps(run)
    def command(**given: Any) -> Any:
        chosen = kind(**{one.name: given.pop(one.name) for one in options})
        return run(**given, **{place: chosen})

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command
