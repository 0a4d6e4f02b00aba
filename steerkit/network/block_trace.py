"""One pass over a few tokens that notes what every module of some blocks reads and gives.

Only watching happens here; `anatomy.py` says what it means.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.errors import SiteError

__all__ = ["Call", "Seen", "Trace", "argument_of", "probe_blocks", "run_body", "tensor_of"]


def tensor_of(output: Any) -> Any:
    """The tensor a module gives: its output, or the first entry of a tuple, a list or a ModelOutput."""
    if isinstance(output, Mapping):
        return next(iter(output.values()), None)
    if isinstance(output, (tuple, list)):
        return output[0] if output else None
    return output


def argument_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The tensor a module reads: its first positional argument, or the keyword `hidden_states`."""
    return args[0] if args else kwargs.get("hidden_states")


@dataclass(frozen=True, eq=False)
class Seen:
    """A tensor as a hook saw it.

    Attributes:
        tensor: the object itself, kept so that its memory is not used again and it can be recognised.
        values: a float32 copy on the CPU, because some blocks overwrite theirs in place (Falcon).
    """

    tensor: Tensor
    values: Tensor

    @classmethod
    def of(cls, value: Any) -> Seen | None:
        """Note a floating-point tensor; None for anything else."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return None
        return cls(value, value.detach().to("cpu", torch.float32, copy=True))

    def same_as(self, other: Seen | None) -> bool:
        """Whether both are the same numbers in the same memory; views of another shape count."""
        if other is None or self.tensor.numel() != other.tensor.numel():
            return False
        if self.tensor.device != other.tensor.device:  # accelerate moved it between two devices
            return torch.equal(self.values.flatten(), other.values.flatten())
        return self.tensor.data_ptr() == other.tensor.data_ptr()


@dataclass(frozen=True, eq=False)
class Call:
    """One call of one module inside a block.

    Attributes:
        name: the module's name inside the block.
        module: the module itself.
        read: the tensor it was given.
        made: the tensor it put out.
        gave: what flowed on, after the hooks of others; `made` itself where there are none.
        several: all that flowed on, where that is several tensors; None where it is one.
    """

    name: str
    module: nn.Module
    read: Seen | None
    made: Seen | None
    gave: Seen | None
    several: tuple[Tensor, ...] | None = None

    def inside(self, other: Call) -> bool:
        """Whether this module stands inside the other one."""
        return self.name.startswith(f"{other.name}.")


@dataclass(eq=False)
class Trace:
    """What one block did in the probe; `entered` and `left` are its input and output, None if it did not run."""

    calls: list[Call] = field(default_factory=list)
    entered: Seen | None = None
    left: Seen | None = None


class _Stop(BaseException):
    """Ends the probe once the deepest block asked about has run."""


def probe_blocks(
    body: nn.Module, blocks: Mapping[int, nn.Module], input_ids: Tensor, *, to_the_end: bool = False
) -> dict[int, Trace]:
    """Run the decoder body once and note what the modules of some blocks read and give.

    Hooks of others stay in force; the probe sees values as they flow on inside a block, and the block's own output
    before anybody else changes it.

    Args:
        body: the decoder without its head, or the whole model.
        blocks: the blocks to watch, by layer; later blocks than the deepest of them do not run.
        input_ids: token ids `[1, t]`, on the device where the embedding runs.
        to_the_end: run the later blocks too, where a pass that is broken off would leave weights gathered (FSDP).

    Returns:
        One trace for each block asked.

    Raises:
        SiteError: the body fails on plain token ids.
    """
    traces = {layer: Trace() for layer in blocks}
    notes = _Notes()
    with contextlib.ExitStack() as stack:
        for layer, block in blocks.items():
            last = layer == max(blocks) and not to_the_end
            stack.enter_context(_watch(block, traces[layer], notes, last=last))
        run_body(body, input_ids)
    return traces


def run_body(body: nn.Module, input_ids: Tensor) -> None:
    """Run the decoder body once, for what hooks see. It is left as it was: training flags, random state, gradients.

    Args:
        body: the decoder without its head, or the whole model.
        input_ids: token ids `[1, t]`, on the device where the embedding runs.

    Raises:
        SiteError: the body fails on plain token ids.
    """
    devices = {parameter.device.index for parameter in body.parameters() if parameter.device.type == "cuda"}
    options = {"output_hidden_states": False} if getattr(body.config, "output_hidden_states", False) else {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=sorted(device or 0 for device in devices)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation_mode(body))
        if "torch._dynamo" in sys.modules:  # otherwise nothing can have been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            body(input_ids=input_ids, use_cache=False, **options)
        except _Stop:
            pass
        except Exception as error:
            what = f"{type(body).__name__} does not run on {input_ids.shape[1]} plain tokens"
            raise SiteError(f"{what}, so its sites cannot be found: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def evaluation_mode(body: nn.Module) -> Iterator[None]:
    """Switch dropout off, flag by flag: `train()` and `eval()` are overridden by some modules."""
    training = [module for module in body.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Notes:
    """What was seen in a pass. Most tensors are seen several times, and are copied once unless written into since."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Seen, int]] = {}

    def __call__(self, value: Any) -> Seen | None:
        """Note a tensor; None for anything else."""
        is_counted = isinstance(value, Tensor) and not value.is_inference()  # how often it was written into
        if is_counted and id(value) in self._seen and self._seen[id(value)][1] == value._version:
            return self._seen[id(value)][0]
        found = Seen.of(value)
        if is_counted and found is not None:
            self._seen[id(value)] = found, value._version  # which keeps the tensor, so that no other can get its id
        return found


@contextlib.contextmanager
def _watch(block: nn.Module, trace: Trace, note: _Notes, *, last: bool) -> Iterator[None]:
    """Attach the probe's hooks to one block and everything in it."""
    made: dict[str, Seen | None] = {}

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace.entered = note(argument_of(args, kwargs))

    def leave(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        trace.left = note(tensor_of(output))
        if last:
            raise _Stop

    def note_made(name: str) -> Callable[..., None]:
        """A hook that notes what a module gave."""

        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            made[name] = note(tensor_of(output))

        return hook

    def note_call(name: str) -> Callable[..., None]:
        """A hook that notes one call of a module: what it read and gave."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            read, gave = note(argument_of(args, kwargs)), note(tensor_of(output))
            parts = tuple(output) if isinstance(output, (tuple, list)) else ()
            several = parts if len(parts) > 1 and all(isinstance(one, Tensor) for one in parts) else None
            trace.calls.append(Call(name, module, read, made[name], gave, several))

        return hook

    handles = [
        block.register_forward_pre_hook(enter, with_kwargs=True),
        block.register_forward_hook(leave, prepend=True),
    ]
    for name, module in block.named_modules():
        if module is not block:
            handles.append(module.register_forward_hook(note_made(name), prepend=True))
            handles.append(module.register_forward_hook(note_call(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
