"""Several processes that share one piece of work: each runs a part of the passes, and all get what every pass gave.

Every process runs the same program on the same data, with a whole model of its own. Where batches are run (one place,
`prompts.batching`), each process runs its share of them, and what they gave is exchanged: so all go on with the same
numbers, which are those of one process. The first process alone writes files and asks endpoints.

Nothing is split unless it was asked for: of processes that hold parts of one model each has to see every row.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

from steerkit.errors import ModelError

__all__ = ["Processes", "from_first", "is_first", "processes", "split_between_processes"]

T = TypeVar("T")


class Processes:
    """The processes that share the work.

    Args:
        group: of torch.distributed, whose backend carries tensors of the CPU.

    Attributes:
        rank: which of them this is, from 0.
        count: how many there are.
    """

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        self._group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)

    def gathered(self, make: Callable[[], T], about: Hashable = None) -> list[T]:
        """What each process makes, in their order; an error of one is raised in all.

        Args:
            make: makes the part of this process.
            about: what the work is about, the same in all processes.

        Raises:
            ModelError: the processes are at different work.
        """
        import torch.distributed as dist

        error: Exception | None = None
        mine: Any = None
        try:
            mine = _on_cpu(make())
        except Exception as failed:  # noqa: BLE001  # raised below, when the others have heard of it
            error = failed
        every: list[Any] = [None] * self.count
        dist.all_gather_object(every, (about, mine, _told(error)), group=self._group)
        if error is not None:
            raise error
        for _, _, raised in every:
            if raised is not None:
                raise raised
        if any(one[0] != about for one in every):
            raise ModelError(
                "processes: they are at different work; give all of them the same program, data and settings (and "
                "PYTHONHASHSEED)"
            )
        return [one[1] for one in every]

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them.

        Args:
            make: runs in the first process alone.
        """
        return self.gathered(lambda: make() if self.rank == 0 else None)[0]  # type: ignore[return-value]


_shared: Processes | None = None


def processes() -> Processes | None:
    """The processes that share the work now; None where this one is alone."""
    return _shared


def is_first() -> bool:
    """Whether this process writes files: the first of several, or the only one."""
    return _shared is None or _shared.rank == 0


def from_first(make: Callable[[], T]) -> T:
    """What the first of several processes makes, in all of them.

    Args:
        make: reads what another process may be writing, or asks somebody who need not be asked twice.
    """
    return make() if _shared is None else _shared.from_first(make)


@contextlib.contextmanager
def split_between_processes() -> Iterator[None]:
    """Share the passes of `fit`, `record`, `generate` and all scores between the processes of `torchrun`.

    All processes run the block, with the same data and settings and each with a whole model; all get the same results,
    which are those of one process. The first one alone writes files. A process on its own runs the block as ever.

    Raises:
        ModelError: torch.distributed cannot be started, or the processes do different work in the block.

    Example:
        with steerkit.split_between_processes():  # under torchrun --nproc_per_node 4 or accelerate launch
            vector = steerkit.fit(model, tokenizer, data)
            vector.save("joy.safetensors")
    """
    global _shared
    if _shared is not None or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    import torch.distributed as dist

    is_ours = not dist.is_initialized()
    try:
        if is_ours:
            dist.init_process_group("gloo")
        group = dist.new_group(backend="gloo")
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"processes: torch.distributed cannot be started ({str(error).splitlines()[0]})") from None
    _shared = Processes(group)
    try:
        yield
    finally:
        _shared = None
        if is_ours:
            dist.destroy_process_group()


def _on_cpu(found: Any) -> Any:
    """The same with its tensors on the CPU, where every process can take them."""
    import torch

    if isinstance(found, torch.Tensor):
        return found.detach().cpu()
    if isinstance(found, dict):
        return {key: _on_cpu(value) for key, value in found.items()}
    if isinstance(found, tuple) and hasattr(found, "_fields"):
        return type(found)(*map(_on_cpu, found))
    return type(found)(map(_on_cpu, found)) if isinstance(found, list | tuple) else found


def _told(error: Exception | None) -> Exception | None:
    """An error as other processes can have it."""
    import pickle

    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  # whatever a class of errors does when it is copied
        return ModelError(f"another process: {type(error).__name__}: {error}")
    return error
