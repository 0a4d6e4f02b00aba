"""What is done when memory runs out."""

from __future__ import annotations

__all__ = ["is_out_of_memory"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or this machine, has no memory left.

    Args:
        error: somebody's.
    """
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # accelerate knows what the allocators without an error class of their own say.
    return isinstance(error, RuntimeError) and should_reduce_batch_size(error)
