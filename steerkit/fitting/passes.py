"""Passes that only some methods need in their fit: steered ones, next tokens, and ones that carry gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.activations.expert_activations import ExpertMeans, expert_means
from steerkit.activations.reading import forward_body, position_inputs
from steerkit.activations.recording import Activations
from steerkit.errors import ModelError
from steerkit.fitting.held_out import record_steered
from steerkit.methods._subject import Read
from steerkit.network.context import check_lengths, named
from steerkit.network.decoder import Decoder, execution_device
from steerkit.network.experts import Experts
from steerkit.network.sites import Site
from steerkit.network.tap import Tap, locate
from steerkit.prompts.batching import Batch, batches, pad_token_id, run_batches
from steerkit.prompts.chat_roles import Roles
from steerkit.prompts.rendering import Rendered
from steerkit.steering.steering import steer
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Passes", "output_embedding"]


class Passes:
    """Runs texts through a model for `ModelSubject`.

    Args:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer.
        decoder: the model's decoder.
        batch_size: rows per pass.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, decoder: Decoder, batch_size: int) -> None:
        self._model, self._tokenizer, self._decoder, self._batch_size = model, tokenizer, decoder, batch_size
        self._roles = Roles(tokenizer)

    def record(
        self, rendered: Sequence[Rendered], sites: Sequence[Site], readout: Any, under: SteeringVector
    ) -> Activations:
        """Read activations of texts under a vector.

        Args:
            rendered: the texts.
            sites: where to read.
            readout: which tokens.
            under: the vector.

        Returns:
            One row [d] per text and site.
        """
        return record_steered(
            self._model,
            self._tokenizer,
            rendered,
            sites,
            readout=readout,
            batch_size=self._batch_size,
            steering=lambda lengths: steer(self._model, under, prompt_lengths=lengths, tokenizer=self._roles),
        )

    def advance(
        self,
        rendered: Sequence[Rendered],
        sites: Sequence[Site],
        fit_one: Callable[[Site, Read], Mapping[str, Tensor]],
        vector: Callable[[Mapping[str, Tensor], Sequence[Site]], SteeringVector],
        *,
        progress: bool,
    ) -> dict[str, Tensor]:
        """Fit site by site, see `steerkit.fitting.advancing`.

        Args:
            rendered: the texts.
            sites: where.
            fit_one: from a site and what reads it to its tensors, of any shape.
            vector: makes what steers of the tensors of some sites.
            progress: show a progress bar on stderr.
        """
        from steerkit.fitting.advancing import Advance

        run = Advance(self._model, self._tokenizer, self._decoder, self._roles, rendered, self._batch_size)
        return run.fitted(sites, fit_one, vector, progress=progress)

    def logits(self, rendered: Sequence[Rendered], under: SteeringVector | None) -> Tensor:
        """Next-token logits behind each text.

        Args:
            rendered: the texts.
            under: a vector to steer with meanwhile.

        Returns:
            [n, v] float32, on the CPU, in the order of the texts.
        """
        check_lengths(self._decoder, rendered, named("text", rendered))
        device = execution_device(self._decoder)
        rows: list[Tensor] = [torch.empty(0, dtype=torch.float32)] * len(rendered)

        def run(batch: Batch) -> Tensor:
            context: Any = torch.no_grad()
            if under:
                context = steer(self._model, under, prompt_lengths=batch.prompt_lengths, tokenizer=self._roles)
            mask = batch.attention_mask.to(device)
            with context, torch.no_grad():
                out = self._model(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False)
            last = mask.sum(dim=1) - 1
            picked = out.logits[torch.arange(len(batch.rows), device=out.logits.device), last.to(out.logits.device)]
            return picked.float().cpu()  # type: ignore[no-any-return]

        work = batches(rendered, self._batch_size, pad_id=pad_token_id(self._tokenizer))
        for batch, found in run_batches(work, run):
            for row, logits in zip(batch.rows, found, strict=True):
                rows[row] = logits
        return torch.stack(rows)

    def shifted(
        self, rendered: Sequence[Rendered], shifts: Mapping[Site, Tensor], *, prompts: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run texts with answers in one pass, written with shifts that carry gradients.

        Args:
            rendered: the texts.
            shifts: per site [b, d] float32, one row per text, from its last prompt token on.
            prompts: write the prompts' other tokens too.

        Returns:
            Logits [b, t, v], ids [b, t], and [b, t] which positions' logits predict a token of the answer.
        """
        ids, mask, lengths = self._one_batch(rendered)
        place = torch.arange(ids.shape[1], device=ids.device)
        written = (((place >= lengths - 1) | prompts) & (mask != 0))[..., None]
        with contextlib.ExitStack() as stack:
            for site, tap in locate(self._model, list(shifts)).items():
                stack.callback(_attach_shift(tap, shifts[site], written).remove)
            inputs = {"input_ids": ids, "attention_mask": mask, **position_inputs(self._decoder.model, mask)}
            logits: Tensor = self._decoder.model(**inputs, use_cache=False).logits
        predicts = (place >= lengths - 1) & (place < mask.sum(dim=1, keepdim=True) - 1)
        return logits, ids, predicts

    def read_shifted(
        self, rendered: Sequence[Rendered], shifts: Mapping[Site, Tensor], site: Site
    ) -> tuple[Tensor, Tensor]:
        """Read texts in one pass whose every token is written with a shift, where gradients are on with gradients.

        Args:
            rendered: the texts.
            shifts: per site [b, d] float32, one row per text; none runs the model as it is.
            site: where to read; the pass ends there.

        Returns:
            Activations [b, t, d] float32, and [b, t] which positions are no pads.
        """
        ids, mask, _ = self._one_batch(rendered)
        found: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            for written, tap in locate(self._model, list(shifts)).items():
                stack.callback(_attach_shift(tap, shifts[written], (mask != 0)[..., None]).remove)
            taps = locate(self._model, [site])
            # A copy: Falcon adds into such a tensor in place afterwards.
            keep = lambda _, h: found.append(h.to(torch.float32, copy=True))  # noqa: E731
            forward_body(self._decoder, taps, ids, mask, keep, gradients=True)
        return found[0], (mask != 0).to(found[0].device)

    def _one_batch(self, rendered: Sequence[Rendered]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids [b, t], mask [b, t] and prompt lengths [b, 1] of texts in one batch, in their order, on the device."""
        check_lengths(self._decoder, rendered, named("text", rendered))
        batch = batches(rendered, len(rendered), pad_id=pad_token_id(self._tokenizer))[0]
        order = torch.tensor(batch.rows, dtype=torch.long).argsort()
        device = execution_device(self._decoder)
        ids, mask = batch.input_ids[order].to(device), batch.attention_mask[order].to(device)
        return ids, mask, batch.prompt_lengths[order].to(device)[:, None]

    def experts(
        self, sides: tuple[Sequence[Rendered], Sequence[Rendered]], found: Mapping[Site, Experts], readout: Any
    ) -> dict[Site, ExpertMeans]:
        """What routed experts read, in one pass over both sides.

        Args:
            sides: the positive and the negative texts.
            found: site to the experts that write there.
            readout: which tokens.

        Returns:
            By site the means of both sides, of each expert over the tokens that are routed to it.
        """
        pad_id = pad_token_id(self._tokenizer)
        return expert_means(self._decoder, sides, found, readout=readout, batch_size=self._batch_size, pad_id=pad_id)


def output_embedding(decoder: Decoder) -> Tensor:
    """The matrix that reads logits off the residual stream.

    Args:
        decoder: the model's decoder.

    Returns:
        [v, d] float32, on the CPU.

    Raises:
        ModelError: the model has no such matrix, or one of another width than the stream.
    """
    model = decoder.model
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if weight is None or weight.dim() != 2 or weight.shape[1] != decoder.hidden_size:
        raise ModelError(
            f"{type(model).__name__} has no output embedding as wide as its residual stream "
            f"({decoder.hidden_size}); use a direction that is read from activations"
        )
    found: Tensor = weight.detach().float().cpu()
    return found


def _attach_shift(tap: Tap, shift: Tensor, written: Tensor) -> Any:
    """Add a shift [b, d] to the written tokens [b, t, 1] of a block's output or input, gradients and all."""

    def moved(h: Tensor) -> Tensor:
        return torch.where(written.to(h.device), h + shift.to(h.device, h.dtype)[:, None, :], h)

    return tap.attach(moved)
