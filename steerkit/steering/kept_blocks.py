"""`KeptBlocks`: the blocks before the first steered one give the same at every strength, so they run once.

    block 0 ... block n-1   |   block n ... the last one
    run once and kept       |   run at every strength

Steering changes nothing before the first block that is written: inside it, or at what leaves it (`resid_post`). What
leaves block n-1 unsteered is kept for each batch of texts and given again instead of being computed. The later blocks
read the very same numbers, so what comes out is the same, bitwise. A family in which a block reads more than the stream
(keys that an earlier block left behind) is found out once, by a pass over three tokens, and runs as it is.
"""

from __future__ import annotations

import contextlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from steerkit.errors import SiteError
from steerkit.network.block_trace import run_body, tensor_of
from steerkit.network.residual_form import plain_tokens

if TYPE_CHECKING:
    from steerkit.network.decoder import Decoder
    from steerkit.steering.steering import Steering

__all__ = ["KeptBlocks", "can_spare", "given", "moved_to", "noted"]

# By the last block that is left out: whether the blocks behind it need nothing but what it gives.
_SPARES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class _Stop(BaseException):
    """Ends a pass of which nothing more is wanted. Not an `Exception`, so that nothing eats it."""


@dataclass(eq=False)
class KeptBlocks:
    """What leaves the blocks before the first steered one, by batch of texts.

    Attributes:
        budget: bytes that may be kept; what was used longest ago goes first.
    """

    budget: int = 512 * 2**20
    _kept: OrderedDict[tuple[Hashable, int], Any] = field(init=False, default_factory=OrderedDict, repr=False)
    _used: int = field(init=False, default=0)

    def learn(
        self, decoder: Decoder, steering: Steering | None, texts: Hashable, run: Callable[[], Any], rows: int
    ) -> None:
        """Run only the blocks before the first steered one, where it is not known what leaves them.

        For a batch that holds texts more than once: what is the same in all their rows is computed once.

        Args:
            decoder: the model's decoder.
            steering: what is going to be active; None for the unsteered model.
            texts: what identifies the texts.
            run: a pass over each text once, unsteered; it is broken off.
            rows: of that pass.
        """
        count = 0 if steering is None else steering.untouched
        if (texts, count) in self._kept or count < 1 or not can_spare(decoder, count):
            return
        known, seen = self._known(texts, count), list[Any]()
        with contextlib.ExitStack() as stack:
            if known:
                stack.enter_context(given(decoder, known, self._kept[texts, known]))
            if "torch._dynamo" in sys.modules:  # a compiled block would not stop
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(noted(decoder.blocks[count - 1], seen, stops=True))
            with contextlib.suppress(_Stop):
                run()
        if seen and _has_rows(seen[0], rows):
            self._keep((texts, count), seen[0])

    @contextlib.contextmanager
    def around(
        self, decoder: Decoder, steering: Steering | None, texts: Hashable, again: Tensor | None = None
    ) -> Iterator[None]:
        """One pass over some texts in which known blocks do not run, and after which those of a steering are known.

        Args:
            decoder: the model's decoder.
            steering: active at present, or later; None where none will be.
            texts: what identifies the whole input of the pass.
            again: by row [b] which of the texts it is, where they stand there more than once (see `learn`).
        """
        count = self._known(texts, len(decoder.blocks)) if steering is None else steering.untouched
        if count < 1 or not can_spare(decoder, count):
            yield
            return
        known = self._known(texts, count)
        seen: list[Any] = []
        with contextlib.ExitStack() as stack:
            if known:
                self._kept.move_to_end((texts, known))
                stack.enter_context(given(decoder, known, self._kept[texts, known], again))
            if known < count and again is None:
                stack.enter_context(noted(decoder.blocks[count - 1], seen))
            yield
        if seen:
            self._keep((texts, count), seen[0])

    def _known(self, texts: Hashable, count: int) -> int:
        """How many of so many blocks need not run."""
        return next((n for n in range(count, 0, -1) if (texts, n) in self._kept), 0)

    def _keep(self, key: tuple[Hashable, int], output: Any) -> None:
        """Keep what left a block, and drop what was used longest ago where there is no room."""
        size = _size(output)
        if size > self.budget:
            return
        self._kept[key] = output
        self._used += size
        while self._used > self.budget:
            self._used -= _size(self._kept.popitem(last=False)[1])


def can_spare(decoder: Decoder, count: int) -> bool:
    """Whether the first blocks can be left out here: nobody else watches or replaces anything in them.

    Args:
        decoder: the model's decoder.
        count: how many blocks.
    """
    blocks = decoder.blocks[:count]
    if decoder.entry is not decoder.body:  # FSDP gathers the weights block by block
        return False
    for number, block in enumerate(blocks):
        for module in block.modules():
            # On the last block itself stand the hooks that write what leaves it; they run as always.
            watched = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
            if (watched and not (module is block and number == count - 1)) or "forward" in vars(module):
                return False
    if blocks[-1] not in _SPARES:
        _SPARES[blocks[-1]] = _is_enough(decoder, count)
    return _SPARES[blocks[-1]]


def _is_enough(decoder: Decoder, count: int) -> bool:
    """Whether a pass over three tokens ends as it should when the first blocks only give what the last of them gave."""
    last = decoder.blocks[-1]
    ends: list[Any] = []
    with plain_tokens(decoder) as input_ids, contextlib.ExitStack() as stack:
        seen: list[Any] = []
        with noted(last, ends), noted(decoder.blocks[count - 1], seen):
            run_body(decoder.entry, input_ids)
        if not seen or not ends:
            return False
        stack.enter_context(given(decoder, count, seen[0]))
        with noted(last, ends):
            try:
                run_body(decoder.entry, input_ids)
            except SiteError:
                return False
    return all(torch.equal(tensor_of(one), tensor_of(other)) for one, other in pairwise(ends)) and len(ends) == 2


@contextlib.contextmanager
def given(decoder: Decoder, count: int, output: Any, again: Tensor | None = None) -> Iterator[None]:
    """Let the first blocks give an output without running, or for each row of a pass one of its rows.

    Args:
        decoder: the model's decoder.
        count: how many blocks.
        output: what the last of them gives.
        again: [b] which of its rows each row is; None gives them as they are.
    """

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        return _copied(output) if again is None else _mapped(output, lambda tensor: tensor[again])

    blocks = list(decoder.blocks[:count])
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@contextlib.contextmanager
def noted(block: nn.Module, seen: list[Any], *, stops: bool = False, edited: bool = False) -> Iterator[None]:
    """Note what leaves a block.

    Args:
        block: the block.
        seen: what it gives is appended here, copied.
        stops: end the pass there.
        edited: note it as it flows on, hooks attached before this included; else before anybody changes it.
    """

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(_copied(output))
        if stops:
            raise _Stop

    handle = block.register_forward_hook(hook, prepend=not edited)
    try:
        yield
    finally:
        handle.remove()


def _has_rows(output: Any, rows: int) -> bool:
    """Whether every tensor of an output has so many rows, and can be given row by row."""
    if isinstance(output, Tensor):
        return output.dim() > 0 and len(output) == rows
    return not isinstance(output, (tuple, list)) or all(_has_rows(part, rows) for part in output)


def _copied(output: Any) -> Any:
    """The output with copies of its tensors: some blocks write into what they are given."""
    return _mapped(output, lambda tensor: tensor.detach().clone())


def moved_to(device: str | torch.device, output: Any) -> Any:
    """The output with its tensors on a device.

    Args:
        device: where.
        output: a module's, with tensors of any shape.
    """
    return _mapped(output, lambda tensor: tensor.to(device))


def _size(output: Any) -> int:
    """Bytes of the tensors in an output."""
    if isinstance(output, Tensor):
        return output.nbytes
    return sum(_size(part) for part in output) if isinstance(output, (tuple, list)) else 0


def _mapped(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A module's output with every tensor in it changed."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, (tuple, list)):
        return type(output)(_mapped(part, change) for part in output)
    return output
