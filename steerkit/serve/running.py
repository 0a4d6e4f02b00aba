"""Running the server in this process: its address is taken before the model is loaded, and Ctrl-C ends it."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from steerkit.errors import SteerError

if TYPE_CHECKING:
    import uvicorn

    from steerkit.serve.engine import Engine
    from steerkit.serve.settings import Settings

__all__ = ["bound", "check_extra", "is_local", "make_server", "running"]

_GRACE_S = 3  # that answers under way get to end in when the server is stopped


def check_extra() -> None:
    """See that what the server is made of is installed.

    Raises:
        SteerError: it is not.
    """
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise SteerError(f"serving needs {' and '.join(missing)}; pip install 'steerkit-hf[serve]'")


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine alone.

    Args:
        host: a name or an address.
    """
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: a name or an address.
        port: 0 takes one that is free.

    Raises:
        SteerError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise SteerError(f"{host}:{port} cannot be listened at ({error}); give another --host or --port") from None


def make_server(
    engine: Engine, settings: Settings, listening: socket.socket, ready: Callable[[str], object]
) -> uvicorn.Server:
    """A server that is not yet running; `run(sockets=[listening])` runs it until the process is told to end.

    Args:
        engine: answers.
        settings: of the server.
        listening: see `bound`.
        ready: called with the server's address when it answers.
    """
    import uvicorn

    from steerkit.serve.app import make_app

    host, port = listening.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready(address)

    options: dict[str, Any] = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": _GRACE_S}
    return Server(uvicorn.Config(make_app(engine, settings), **options))


@contextlib.contextmanager
def running(engine: Engine, settings: Settings, listening: socket.socket) -> Iterator[str]:
    """Serve in a thread during a `with` block.

    Args:
        engine: answers.
        settings: of the server.
        listening: see `bound`.

    Yields:
        The server's address.
    """
    address: Future[str] = Future()
    server = make_server(engine, settings, listening, address.set_result)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield address.result(timeout=60)
    finally:
        server.should_exit = True
        thread.join()
