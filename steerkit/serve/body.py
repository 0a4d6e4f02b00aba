"""The body of a request: read up to a limit, and its fields taken one by one, so that none goes unnoticed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from steerkit.composition.terms import Composition
from steerkit.serve.settings import RefusedError, Settings

if TYPE_CHECKING:
    from fastapi import Request as HttpRequest

__all__ = ["Fields", "asked_model", "read_body"]


# So many times the limit is read and thrown away, since many clients only read an answer when they have sent all.
_PATIENCE = 16


async def read_body(http: HttpRequest, limit: int) -> Fields:
    """The fields of a request's body.

    Args:
        http: the request.
        limit: bytes at most.

    Raises:
        RefusedError: it is larger (413), or no JSON object (400).
    """
    parts, size = [], 0
    async for part in http.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        elif size > _PATIENCE * limit:
            break
    if size > limit:
        raise RefusedError(413, f"the request has more than {limit} bytes; shorten it", code="request_too_large")
    try:
        given = json.loads(b"".join(parts), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise RefusedError(400, "the body is no JSON; send a JSON object") from None
    if not isinstance(given, dict):
        raise RefusedError(400, f"the body is a JSON {type(given).__name__}; send an object")
    return Fields(given)


def _no_constant(name: str) -> Any:
    raise ValueError(name)


class Fields:
    """Fields of a body, which are taken out one by one.

    Args:
        given: the body.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._left = dict(given)

    def has(self, name: str) -> bool:
        """Whether a field is there and was not taken.

        Args:
            name: of it.
        """
        return name in self._left

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A field's value; null counts as left out.

        Args:
            name: of it.
            kind: what it has to be.
            default: where it is left out.

        Raises:
            RefusedError: it is something else.
        """
        value = self._left.pop(name, None)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(dict.fromkeys(_NAMES.get(one, one.__name__) for one in kinds))
            raise RefusedError(400, f"{name}: got {repr(value)[:40]}; give {wanted}", param=name)
        return value

    def messages(self) -> list[Any]:
        """The messages of a chat.

        Raises:
            RefusedError: there are none.
        """
        found: list[Any] = self.take("messages", list)
        if not found:
            raise RefusedError(400, "messages: give at least one", param="messages")
        return found

    def unused(self, name: str, allowed: Callable[[Any], bool], why: str) -> None:
        """Take a field that only has an effect-free value here.

        Args:
            name: of it.
            allowed: whether a value changes nothing.
            why: what the server does not do, for the message.

        Raises:
            RefusedError: it has another value.
        """
        value = self._left.pop(name, None)
        if value is not None and not allowed(value):
            raise RefusedError(400, f"{name}: {why}; leave it out", code="unsupported_value", param=name)

    def end(self) -> None:
        """See that nothing is left.

        Raises:
            RefusedError: there is a field that nobody took.
        """
        if self._left:
            name = sorted(self._left)[0]
            raise RefusedError(400, f"{name[:60]!r} is no field that is known here; leave it out", param=name[:60])

    def steering(self, settings: Settings, named: Composition | None) -> Composition | None:
        """How the request is steered: by its field, by the model's name, or as the operator has set.

        The field `steering` is a composition's text or JSON; null or an empty text is unsteered.

        Args:
            settings: of the server.
            named: what the model's name says.

        Raises:
            RefusedError: both say something, or the field is no composition.
            SteerError: the text is no composition.
        """
        if not self.has("steering"):
            return settings.default if named is None else named
        given = self._left.pop("steering")
        if named is not None:
            raise RefusedError(400, "the model's name and `steering` both steer; give one of both", param="steering")
        if given is None or given == "":
            return None
        if not isinstance(given, str | dict):
            raise RefusedError(400, f"steering: got {repr(given)[:40]}; give a text or an object", param="steering")
        return Composition.parse(given) if isinstance(given, str) else Composition.from_json(given)


_NAMES: dict[type, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def asked_model(name: str | None, settings: Settings) -> Composition | None:
    """What a model's name says of steering: ``smollm2-135m+optimism-caa*1.5``.

    Args:
        name: as the request gives it; None is the model that is served.
        settings: of the server.

    Raises:
        RefusedError: no such model (404).
        SteerError: what stands behind the plus is no composition.
    """
    if name is None or name in (settings.model, f"{settings.model}:latest"):
        return None
    behind = name.removeprefix(settings.model)
    if behind == name or not behind.startswith("+"):
        raise RefusedError(
            404,
            f"there is no model {name[:60]!r}; ask for {settings.model!r}, or for "
            f"'{settings.model}+' and a composition",
            code="model_not_found",
            param="model",
        )
    return Composition.parse(behind[1:])
