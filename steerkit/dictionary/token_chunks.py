"""Activations of every token of many texts, a chunk at a time, in memory that does not grow with the texts.

Pads, each text's first token, and tokens more than ten times as long as the median of their text are left out: a few
massive tokens would be most of what a dictionary is trained to explain.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from steerkit._support.files import write_whole
from steerkit.activations.reading import forward_body
from steerkit.activations.readout import cut_to
from steerkit.activations.recording import check_finite
from steerkit.activations.token_scale import massive_tokens
from steerkit.errors import DataError
from steerkit.network.decoder import execution_device, find_decoder
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.prompts.batching import Batch, batches, pad_token_id, run_batches
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import Rendered, render

__all__ = ["Chunk", "TokenChunks"]

GROUP = 4  # batches of texts that are sorted by length together
_TOKENS = "tokens"


class Chunk(NamedTuple):
    """Some tokens.

    Attributes:
        rows: [n, d] bfloat16 on the CPU.
        texts: how many texts were read by its end, counted from the first.
    """

    rows: Tensor
    texts: int


@dataclass(frozen=True, eq=False)
class TokenChunks:
    """The activations of texts, chunk by chunk, from the model or from what was kept of an earlier pass.

    Attributes:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer.
        texts: gone through again for each pass that is read from the model.
        site: where to read.
        size: tokens of a chunk, at least.
        batch_size: texts per pass.
        max_tokens: tokens of a text that are read.
        folder: where chunks are kept; None keeps none.
    """

    model: nn.Module
    tokenizer: Any
    texts: Iterable[Conversation]
    site: Site
    size: int = 1 << 14
    batch_size: int = 16
    max_tokens: int = 256
    folder: Path | None = None

    def read(self, first: int = 0, after: int = 0) -> Iterator[Chunk]:
        """Read the texts, and keep each chunk where there is a folder for them.

        Args:
            first: number of the first chunk.
            after: texts that are left out at the beginning.

        Yields:
            Chunks; the last one may be smaller.

        Raises:
            DataError: a text cannot be rendered, or a chunk not be kept.
            FitError: an activation is not finite.
        """
        rows, found, texts = list[Tensor](), 0, after
        number = itertools.count(first)
        for group in _groups(itertools.islice(iter(self.texts), after, None), GROUP * self.batch_size):
            texts += len(group)
            for part in self._read(group):
                rows.append(part)
                found += len(part)
            if found >= self.size:
                yield self._kept(next(number), Chunk(torch.cat(rows), texts))
                rows, found = [], 0
        if found:
            yield self._kept(next(number), Chunk(torch.cat(rows), texts))

    def kept(self, number: int) -> Chunk:
        """A chunk of an earlier pass.

        Args:
            number: which.

        Raises:
            DataError: it is not there, or damaged.
        """
        path = self._path(number)
        try:
            with safe_open(path, framework="pt") as file:
                return Chunk(file.get_tensor(_TOKENS), int((file.metadata() or {})["texts"]))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error}); delete the folder to begin anew") from None

    def _read(self, group: list[Conversation]) -> Iterator[Tensor]:
        """The tokens of some texts, [n, d] bfloat16 by pass."""
        decoder = find_decoder(self.model)
        taps = locate(self.model, [self.site])
        device = execution_device(decoder)
        texts = [cut_to(render(self.tokenizer, one), self.max_tokens) for one in group]
        # What has no second token has none to be read.
        work = batches([one for one in texts if _has_tokens(one)], self.batch_size, pad_id=pad_token_id(self.tokenizer))

        def run(batch: Batch) -> Tensor:
            mask = batch.attention_mask.to(device)
            found: list[Tensor] = []

            def keep(_site: Site, h: Tensor) -> None:
                counted = (mask * (mask.cumsum(dim=1) > 1)).float()
                norms = torch.linalg.vector_norm(h.float(), dim=-1)
                counted = counted * ~massive_tokens(norms, counted, counted > 0)
                found.append(h[counted > 0].detach().to("cpu", torch.bfloat16, copy=True))

            forward_body(decoder, taps, batch.input_ids.to(device), mask, keep)
            check_finite({self.site: found[0]})
            return found[0]

        for _, rows in run_batches(work, run, is_split=False):
            yield rows

    def _kept(self, number: int, chunk: Chunk) -> Chunk:
        if self.folder is not None:
            path = self._path(number)
            try:
                write_whole(path, save({_TOKENS: chunk.rows.contiguous()}, {"texts": str(chunk.texts)}))
            except OSError as error:
                raise DataError(
                    f"{path}: cannot be written ({error.strerror}); choose another folder, or keep no activations"
                ) from None
        return chunk

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number:06d}.safetensors"


def _has_tokens(text: Rendered) -> bool:
    return len(text.ids) > 1


def _groups(texts: Iterator[Conversation], size: int) -> Iterator[list[Conversation]]:
    while group := list(itertools.islice(texts, size)):
        yield group
