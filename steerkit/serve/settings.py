"""What an operator sets of a server, and the errors that it answers with."""

from __future__ import annotations

from dataclasses import dataclass

from steerkit.composition.terms import Composition
from steerkit.errors import SteerError

__all__ = ["RefusedError", "Settings"]


@dataclass(frozen=True)
class Settings:
    """What an operator sets.

    Attributes:
        model: what the model is called in requests.
        default: how requests are steered that say nothing of it; None leaves them unsteered.
        api_key: what requests have to bring; None asks for nothing.
        max_body: bytes of a request at most.
        local: whether only this machine can reach the server, so that other host names in requests are refused: a page
            in a browser could otherwise reach it under a name of its own.
    """

    model: str
    default: Composition | None = None
    api_key: str | None = None
    max_body: int = 4 * 2**20
    local: bool = True


class RefusedError(SteerError):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: one line.
        code: what programs tell it by.
        param: the field at fault.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def as_json(self) -> dict[str, object]:
        """The error in OpenAI's form."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
