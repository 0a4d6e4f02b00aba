"""TODO fitting.subject."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.activations.expert_activations import ExpertMeans, expert_means
from steerkit.activations.moments import NormMedian
from steerkit.activations.reading import position_inputs
from steerkit.activations.recording import Activations, record, record_ids
from steerkit.errors import DataError, ModelError
from steerkit.fitting.held_out import record_steered
from steerkit.fitting.training import frozen, minimise
from steerkit.generation import generate
from steerkit.network.anatomy import Anatomy
from steerkit.network.block_trace import evaluation_mode
from steerkit.network.decoder import Decoder, execution_device
from steerkit.network.experts import experts_at
from steerkit.network.linears import linears_at
from steerkit.network.sites import Site
from steerkit.network.tap import Tap, anatomies, locate
from steerkit.network.weight_digests import weight_digests
from steerkit.prompts.batching import batches, pad_token_id
from steerkit.prompts.chat_roles import Roles
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import Rendered, render
from steerkit.steering.steering import steer
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["ModelSubject"]


class ModelSubject:
    """The only door through which a method's `fit` reaches the model."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        data: ContrastSet,
        decoder: Decoder,
        batch_size: int,
        chat_template_kwargs: Mapping[str, Any] | None,
        name: str = "this method",
        *,
        progress: bool = False,
    ) -> None:
        self._progress = progress
        self._name = name
        self._model, self._tokenizer, self._data = model, tokenizer, data
        self._roles = Roles(tokenizer)
        self._batch_size, self._chat = batch_size, chat_template_kwargs
        self._decoder = decoder
        self._norms: dict[Site, float] = {}
        self._anatomies: dict[int, Anatomy] | None = None

    @property
    def decoder(self) -> Decoder:
        """The model's decoder."""
        return self._decoder

    @property
    def data(self) -> ContrastSet:
        """What the method is fitted on."""
        return self._data

    def rendered(self, items: Sequence[Any]) -> list[Rendered]:
        """Items as the model reads them.

        Args:
            items: prompts, conversations or rendered texts.
        """
        return [
            item
            if isinstance(item, Rendered)
            else render(self._tokenizer, Conversation.of(item), chat_template_kwargs=self._chat)
            for item in items
        ]

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a text, without special tokens.

        Args:
            text: such as the beginning of an answer.
        """
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def unembedding(self) -> Tensor:
        """The output embedding [v, d], float32, on the CPU: row `t` reads the logit of token `t` off the stream.

        Raises:
            ModelError: the model has no such matrix, or one of another width than the stream.
        """
        model = self._decoder.model
        weight = getattr(model.get_output_embeddings(), "weight", None)
        if weight is None or weight.dim() != 2 or weight.shape[1] != self._decoder.hidden_size:
            raise ModelError(
                f"{type(model).__name__} has no output embedding as wide as its residual stream "
                f"({self._decoder.hidden_size}); use a direction that is read from activations"
            )
        found: Tensor = weight.detach().float().cpu()
        return found

    def answers(self, items: Sequence[Any], *, max_new_tokens: int) -> list[str]:
        """What the model, unsteered and greedy, answers to each item.

        Args:
            items: prompts or conversations without answers.
            max_new_tokens: the longest answer, in tokens.
        """
        return generate(
            self._model,
            self._tokenizer,
            items,
            max_new_tokens=max_new_tokens,
            batch_size=self._batch_size,
            chat_template_kwargs=self._chat,
        )

    def record(
        self, items: Sequence[Any], sites: Sequence[Site], *, readout: Any = "last", under: SteeringVector | None = None
    ) -> Activations:
        """Read activations of texts.

        Args:
            items: prompts, conversations or rendered texts.
            sites: where to read.
            readout: which tokens.
            under: a vector to steer with meanwhile; the prompt's ends are known.

        Returns:
            One row per item and site.
        """
        rendered = self.rendered(items)
        if under is None:
            found = record(self._model, self._tokenizer, rendered, sites, readout=readout, batch_size=self._batch_size)
            self._norms.update(found.norms)
            return found
        return record_steered(
            self._model,
            self._tokenizer,
            rendered,
            sites,
            readout=readout,
            batch_size=self._batch_size,
            steering=lambda lengths: steer(self._model, under, prompt_lengths=lengths, tokenizer=self._roles),
        )

    def logits(self, items: Sequence[Any], *, under: SteeringVector | None = None) -> Tensor:
        """Next-token logits behind each item.

        Args:
            items: prompts, conversations or rendered texts.
            under: a vector to steer with meanwhile.

        Returns:
            [n, v] float32, on the CPU, in the order of the items.
        """
        rendered = self.rendered(items)
        device = execution_device(self._decoder)
        rows: list[Tensor] = [torch.empty(0)] * len(rendered)
        for batch in self._batches(rendered):
            context: Any = torch.no_grad()
            if under:
                context = steer(self._model, under, prompt_lengths=batch.prompt_lengths, tokenizer=self._roles)
            mask = batch.attention_mask.to(device)
            with context, torch.no_grad():
                out = self._model(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False)
            last = mask.sum(dim=1) - 1
            picked = out.logits[torch.arange(len(batch.rows), device=out.logits.device), last.to(out.logits.device)]
            for row, logits in zip(batch.rows, picked.float().cpu(), strict=True):
                rows[row] = logits
        return torch.stack(rows)

    def shifted(
        self, items: Sequence[Any], shifts: Mapping[Site, Tensor], *, prompts: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run texts with answers in one pass, from the last prompt token on written with shifts that carry gradients.

        Args:
            items: conversations with answers, or rendered texts.
            shifts: per site [b, d] float32, one row per item; none runs the model as it is.
            prompts: write the prompts' other tokens too.

        Returns:
            Logits [b, t, v], ids [b, t], and [b, t] which positions' logits predict a token of the answer.
        """
        rendered = self.rendered(items)
        batch = batches(rendered, len(rendered), pad_id=pad_token_id(self._tokenizer))[0]
        order = torch.tensor(batch.rows).argsort()
        device = execution_device(self._decoder)
        ids, mask = batch.input_ids[order].to(device), batch.attention_mask[order].to(device)
        lengths = batch.prompt_lengths[order].to(device)[:, None]
        place = torch.arange(ids.shape[1], device=device)
        written = (((place >= lengths - 1) | prompts) & (mask != 0))[..., None]
        with contextlib.ExitStack() as stack:
            for site, tap in locate(self._model, list(shifts)).items():
                stack.callback(_attach_shift(tap, shifts[site], written).remove)
            inputs = {"input_ids": ids, "attention_mask": mask, **position_inputs(self._decoder.model, mask)}
            logits: Tensor = self._decoder.model(**inputs, use_cache=False).logits
        predicts = (place >= lengths - 1) & (place < mask.sum(dim=1, keepdim=True) - 1)
        return logits, ids, predicts

    def train(
        self,
        parameters: Sequence[Tensor],
        loss: Callable[[Tensor], Tensor],
        items: int,
        *,
        epochs: int,
        batch_size: int = 32,
        rate: float = 1e-3,
        decay: float = 0.0,
        seed: int = 0,
        judge: Callable[[], float] | None = None,
        patience: int | None = None,
        title: str = "training",
    ) -> list[float]:
        """Train parameters in place, the model frozen and in evaluation mode meanwhile.

        Args:
            parameters: leaves that need gradients.
            loss: from the indices of a batch of items to a scalar; it may run the model.
            items: how many there are.
            epochs: passes over them.
            batch_size: items in a batch.
            rate: learning rate.
            decay: weight decay.
            seed: of the order.
            judge: asked after each epoch; lower is better, and the best state stays.
            patience: epochs without a better judgement before it ends.
            title: what the progress bar says, where one is shown.

        Returns:
            The judgement after each epoch, or the mean loss.
        """
        model = self._decoder.model
        with frozen(model), evaluation_mode(model), torch.enable_grad():
            return minimise(
                parameters,
                loss,
                items,
                epochs=epochs,
                batch_size=batch_size,
                rate=rate,
                decay=decay,
                seed=seed,
                judge=judge,
                patience=patience,
                progress=title if self._progress else None,
            )

    def pair_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids of the one pair of prompts the method is fitted on.

        Raises:
            DataError: the data is not exactly one pair of prompts.
        """
        if len(self._data.positive) != 1 or len(self._data.negative) != 1:
            raise DataError(
                f"{self._name} takes one pair of prompts, got {len(self._data.positive)} positive and "
                f"{len(self._data.negative)} negative ones; give one of each"
            )
        sides = (self._data.positive[0], self._data.negative[0])
        # A bare string is meant as it stands: with a chat template around it, most of the window would be template.
        raw = [replace(side, raw=True) if _is_plain_text(side) else side for side in sides]
        plus, minus = self.rendered(raw)
        return plus.ids, minus.ids

    def filler_id(self, text: str) -> int:
        """Id of the one token that `text` is.

        Raises:
            DataError: the tokenizer makes none or several tokens of it.
        """
        ids = self.token_ids(text)
        if len(ids) != 1:
            raise DataError(
                f"filler {text!r} is {len(ids)} tokens for this tokenizer; choose one that is a single token"
            )
        return ids[0]

    def record_ids(self, rows: Sequence[tuple[int, ...]], sites: Sequence[Site]) -> dict[Site, list[Tensor]]:
        """Activations [t, d] of every token of each row of ids, none of them masked.

        Args:
            rows: token ids.
            sites: where to read.
        """
        found = record_ids(self._model, rows, sites)
        for site, tensors in found.items():
            median = NormMedian()
            for tensor in tensors:
                counted = torch.ones(1, len(tensor))
                counted[0, 0] = 0.0
                median.update(tensor[None], counted)
            self._norms[site] = median.result()
        return found

    def weight(self, site: Site) -> Tensor:
        """The matrix by which the linear layer that writes at a site acts.

        Args:
            site: of kind attn_out, attn_raw, mlp_out, mlp_raw or mixer_out.

        Returns:
            [o, i] float32, whatever way the layer stores it; an adapter around it is included.

        Raises:
            SiteError: no one linear layer writes there, or its weight cannot be read.
        """
        (linear,) = linears_at(self._decoder, [site], found=self._found).values()
        return linear.weight(self._decoder.model.dtype).cpu()

    @property
    def _found(self) -> dict[int, Anatomy]:
        if self._anatomies is None:  # one pass for all sites
            self._anatomies = anatomies(self._decoder, set(range(self._decoder.num_layers)))
        return self._anatomies

    def experts(self, sites: Sequence[Site], readout: Any) -> dict[Site, ExpertMeans]:
        """What the experts read at those of the sites where routed ones write, in one pass over the data.

        Args:
            sites: of kind attn_out, attn_raw, mlp_out, mlp_raw or mixer_out.
            readout: which tokens.

        Returns:
            By site the means of both sides, of each expert over the tokens that are routed to it.

        Raises:
            SiteError: what writes at a site is neither one linear layer nor experts that can be told apart.
            DataError: an item has no token to be read.
        """
        found = {site: experts_at(self._decoder, self._found[site.layer], site) for site in sites}
        return expert_means(
            self._decoder,
            (self.rendered(self._data.positive), self.rendered(self._data.negative)),
            {site: one for site, one in found.items() if one is not None},
            readout=readout,
            batch_size=self._batch_size,
            pad_id=pad_token_id(self._tokenizer),
        )

    def weight_digests(self, sites: Sequence[Site]) -> dict[str, str]:
        """What identifies the matrices of the linear layers and routed experts that write at some sites.

        Args:
            sites: of kind attn_out, attn_raw, mlp_out, mlp_raw or mixer_out.

        Returns:
            Name of the weight to its digest, for `SteeringVector.extra`.

        Raises:
            SiteError: neither writes there.
            ModelError: a weight is offloaded.
        """
        return weight_digests(self._decoder, sites)

    def norms(self, sites: Sequence[Site]) -> dict[Site, float]:
        """Median token norms at sites this subject has read at, unsteered."""
        return {site: self._norms[site] for site in sites if site in self._norms}

    def _batches(self, rendered: Sequence[Rendered]) -> list[Any]:
        return batches(rendered, self._batch_size, pad_id=pad_token_id(self._tokenizer))


def _attach_shift(tap: Tap, shift: Tensor, written: Tensor) -> Any:
    """Add a shift [b, d] to the written tokens [b, t, 1] of a block's output or input, gradients and all."""

    def moved(h: Tensor) -> Tensor:
        return torch.where(written.to(h.device), h + shift.to(h.device, h.dtype)[:, None, :], h)

    if tap.side == "input":
        return tap.module.register_forward_pre_hook(
            lambda _module, args, kwargs: tap.write_input(args, kwargs, moved(tap.read(args, kwargs))), with_kwargs=True
        )
    return tap.module.register_forward_hook(
        lambda _module, args, output: tap.write_output(output, moved(tap.read(args, {}, output)))
    )


def _is_plain_text(side: Conversation) -> bool:
    return isinstance(side.prompt, str) and side.system is None and side.answer is None
