"""What is done when memory runs out: the smaller half is tried, with nothing of the failed pass left.

accelerate's `find_executable_batch_size` does not fit: it runs the whole work anew with every size, so that what was
counted before is counted twice, it collects garbage before every call, and it frees memory while the error still holds
the tensors of the failed pass. What it knows is used: which errors mean this, and how a device's cache is emptied.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["is_out_of_memory", "unless_too_large"]

T = TypeVar("T")
_SAID_BY_CUDA = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or this machine, has no memory left.

    Args:
        error: somebody's.
    """
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # Those without an error class of their own, by what they say; accelerate leaves out what CUDA's own calls say.
    told = str(error)
    return isinstance(error, RuntimeError) and (
        should_reduce_batch_size(error) or any(one in told for one in _SAID_BY_CUDA)
    )


def unless_too_large(run: Callable[[], T]) -> tuple[T] | None:
    """Run something that may need more memory than there is.

    Args:
        run: what is run; it must leave nothing behind where it fails.

    Returns:
        What it gave, alone in a tuple; None where memory ran out. Then its tensors are freed, and random numbers are
        drawn from where they stood before.
    """
    before = _random_states()
    try:
        return (run(),)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # its frames hold what the pass had made
    # Behind the handler, where the error itself is gone.
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)
    for restore, state in before:
        restore(state)
    return None


def _random_states() -> list[tuple[Callable[[Any], None], Any]]:
    """What puts every generator of random numbers back to where it stands now."""
    import torch

    found: list[tuple[Callable[[Any], None], Any]] = [(torch.set_rng_state, torch.get_rng_state())]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    if torch.backends.mps.is_available():
        found.append((torch.mps.set_rng_state, torch.mps.get_rng_state()))
    if torch.xpu.is_initialized():  # type: ignore[no-untyped-call]
        found.append((torch.xpu.set_rng_state_all, torch.xpu.get_rng_state_all()))
    return found
