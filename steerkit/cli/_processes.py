"""`--processes N`: a command that runs in several processes of this machine, which share its passes.

The command is started N times as torchrun would start it, and each run joins the others; so under torchrun or
`accelerate launch` it does the same. The first process speaks and writes, the others are silent unless they fail.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Annotated, Any

import typer

__all__ = ["shares_work"]

ProcessesOption = Annotated[
    int | None,
    typer.Option(min=1, help="Share the passes between so many processes of this machine, each with a whole model."),
]
_ENDS = 10.0  # seconds that a process has to end once another one has


def shares_work(run: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the option `--processes`, and have it join the processes that run it with it.

    Args:
        run: the command as typer reads it.

    Returns:
        The same, with the option behind its own.
    """
    option = inspect.Parameter(
        "processes", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=ProcessesOption
    )

    @functools.wraps(run)
    def command(*, processes: int | None = None, **given: Any) -> Any:
        if processes is not None and processes > 1 and "WORLD_SIZE" not in os.environ:
            code = _in_processes(processes, sys.argv[1:])
            if code:
                raise typer.Exit(code)
            return None
        with _joined():
            return run(**given)

    signature = inspect.signature(run)
    command.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), option]
    )
    command.__annotations__ = {**run.__annotations__, "processes": ProcessesOption}
    return command


@contextlib.contextmanager
def _joined() -> Iterator[None]:
    """Join the processes that run this command, if there are others; all but the first say nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    import torch

    from steerkit._support.processes import is_first, split_between_processes

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    with contextlib.ExitStack() as stack:
        stack.enter_context(split_between_processes())
        if not is_first():
            nothing = stack.enter_context(pathlib.Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nothing))
            stack.enter_context(contextlib.redirect_stderr(nothing))
        yield


def _in_processes(count: int, words: Sequence[str]) -> int:
    """Run the program in some processes.

    Args:
        count: how many.
        words: of the command line.

    Returns:
        The exit code: the first process's, or the one of a process that failed by itself.
    """
    shared = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "PYTHONHASHSEED": "0",  # sets are gone through in one order in all of them
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count))),
    }
    command = [sys.executable, "-m", "steerkit", *words]
    with contextlib.ExitStack() as stack:
        told = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count - 1)]
        running: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(count):
                env = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                quiet = {} if rank == 0 else {"stdin": subprocess.DEVNULL, "stderr": told[rank - 1]}
                running.append(subprocess.Popen(command, env=env, **quiet))  # type: ignore[call-overload]
            return _waited(running, told)
        finally:
            for process in running:
                process.kill()
                process.wait()


def _waited(running: Sequence[subprocess.Popen[bytes]], told: Sequence[IO[bytes]]) -> int:
    """The exit code of processes that run together, once all have ended."""
    failed: int | None = None
    since = 0.0
    while True:
        codes = [process.poll() for process in running]
        if None not in codes:
            break
        if failed is None and any(codes):
            failed, since = next(rank for rank, code in enumerate(codes) if code), time.monotonic()
        if failed is not None and time.monotonic() - since > _ENDS:
            break  # the others wait for it
        time.sleep(0.05)
    first = running[0].poll()
    if first is not None and (first or failed is None):
        return first if first >= 0 else 128 - first
    assert failed is not None
    told[failed - 1].seek(0)
    lines = told[failed - 1].read().decode(errors="replace").strip().splitlines()
    typer.echo(f"error: process {failed} ended ({lines[-1] if lines else 'without a word'}); see its memory", err=True)
    return 1


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
