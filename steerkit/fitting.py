"""`fit`: a method, a contrast set and a model in; a `SteeringVector` out, with what is needed to use it right."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import steerkit
from steerkit.activations import (
    Activations,
    Readout,
    position_inputs,
    record,
    record_ids,
    stream,
)
from steerkit.anatomy import Anatomy
from steerkit.data import ContrastSet, Conversation, Rendered, batches, pad_token_id, render
from steerkit.errors import DataError, FitError, ModelError, SiteError, UnknownNameError
from steerkit.experts import experts_at
from steerkit.generation import generate
from steerkit.linears import linears_at, weight_digests
from steerkit.methods._base import Method
from steerkit.moments import NormMedian
from steerkit.probe_block import evaluation_mode
from steerkit.registry import resolve
from steerkit.roles import Roles
from steerkit.routing import ExpertMeans, expert_means
from steerkit.sites import Decoder, Site, Tap, anatomies, execution_device, find_decoder, locate, parse_layers
from steerkit.steering import steer
from steerkit.training import minimise
from steerkit.vector import SteeringVector, model_facts

__all__ = ["Subject", "apart", "fit", "read", "record_steered", "separation", "tokenizer_digest"]


def fit(
    model: nn.Module,
    tokenizer: Any,
    data: ContrastSet,
    *,
    method: str | Method = "caa",
    layers: str | int | Sequence[int] | None = None,
    sites: Sequence[Site | str] | Site | str | None = None,
    readout: str | int | tuple[int, int] | None = None,
    batch_size: int = 16,
    held_out: ContrastSet | None = None,
    settings: Mapping[str, Any] | None = None,
    acts: Activations | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> SteeringVector:
    """Learn a steering vector from a contrast set.

    Args:
        model: any decoder-only transformers model; unchanged afterwards.
        tokenizer: its tokenizer; unchanged afterwards.
        data: the contrast set (for `actadd`: one pair of raw prompts).
        method: a name of `steerkit methods`, or a method with its settings.
        layers: blocks counted from 0, such as ``[11, 12]`` or ``"11-13"`` (both ends included), at the method's own
            kind of site.
        sites: exact sites instead of layers, such as ``["attn_out.4"]``.
        readout: which tokens are read; None takes the method's own.
        batch_size: rows per pass.
        held_out: items to measure the separation on; the figures go into the file.
        settings: the method's settings where `method` is a name.
        acts: what `read` gave for this model, data and method, at these sites and perhaps others; saves the pass.
        chat_template_kwargs: passed on to the chat template.
        progress: show a progress bar on stderr.

    Returns:
        The fitted vector, with norms, digests and settings.

    Raises:
        UnknownNameError: no such method or setting.
        SiteError: a layer or site does not exist in this model, or both were given.
        DataError: the data has no token to read, or `actadd` got more than one pair.
        FitError: the sides do not differ, or activations are not finite; the site is named.
    """
    chosen = _method(method, settings)
    if not isinstance(data, ContrastSet):
        raise DataError(
            f"fit: got {type(data).__name__} for data; make a ContrastSet of it (from_prompts, from_answers, ...)"
        )
    decoder = find_decoder(model)
    taps = locate(model, _sites(chosen, decoder, layers, sites))
    places = list(taps)
    subject = Subject(model, tokenizer, data, decoder, batch_size, chat_template_kwargs, chosen.name, progress=progress)
    if chosen.readout is not None and acts is None:
        reading = chosen.readout if readout is None else readout
        acts = _read(model, tokenizer, data, chosen, places, reading, batch_size, chat_template_kwargs, progress)
    elif readout is not None and acts is None:
        raise DataError(f"{chosen.name} reads for itself; leave readout={readout!r} out")
    elif held_out is not None and acts is None:
        raise DataError(f"{chosen.name} has no direction to separate held-out items by; leave held_out out")
    missing = [site for site in places if acts is not None and site not in acts.positive]
    if missing:
        raise FitError(f"{chosen.name}: acts were not read at {', '.join(map(str, missing))}; read them there too")
    tensors = chosen.fit(acts, subject, places)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise FitError(f"{chosen.name}: {name} is not finite; load the model in float32 or bfloat16")
    written = chosen.written(places, tensors, decoder)
    if written != places:
        taps = locate(model, written)
        written = list(taps)
    reads = chosen.read_at(places, tensors)
    norms = {site: acts.norms[site] for site in places} if acts is not None else {}
    norms = {**subject.norms([*reads, *written]), **{site: norms[site] for site in reads if site in norms}}
    vector = SteeringVector(
        method=chosen.name,
        tensors=tensors,
        sites=tuple(written),
        fitted_at=None if written == reads else tuple(reads),
        edit=chosen.edit_name,
        scope=chosen.default_scope,
        unit="paper",
        settings=chosen.settings,
        norms={site: norm for site, norm in norms.items() if math.isfinite(norm)},
        widths={site: tap.width for site, tap in taps.items() if tap.width != decoder.hidden_size},
        tokenizer_sha256=tokenizer_digest(tokenizer),
        readout=acts.readout if acts is not None else None,
        data_digest=data.digest,
        data_source=data.source or None,
        paper=chosen.paper,
        extra=chosen.extra(subject, written),
        steerkit_version=steerkit.__version__,
        **model_facts(decoder.model, tokenizer),
    )
    if held_out is None or acts is None:
        return vector
    measured = separation(
        model, tokenizer, held_out, vector, batch_size=batch_size, chat_template_kwargs=chat_template_kwargs
    )
    return vector.with_held_out(measured)


def read(
    model: nn.Module,
    tokenizer: Any,
    data: ContrastSet,
    *,
    method: str | Method = "caa",
    settings: Mapping[str, Any] | None = None,
    sites: Sequence[Site | str],
    readout: str | int | tuple[int, int] | None = None,
    batch_size: int = 16,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Activations | None:
    """Read once what `fit` needs at many sites, to fit at some of them again and again.

    Args:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer.
        data: the contrast set.
        method: a name, or a method with its settings.
        settings: the method's settings where `method` is a name.
        sites: where to read.
        readout: which tokens are read; None takes the method's own.
        batch_size: rows per pass.
        chat_template_kwargs: passed on to the chat template.
        progress: show a progress bar on stderr.

    Returns:
        What `fit` takes as `acts`; None where the method reads for itself.

    Raises:
        SteerError: see `fit`.
    """
    chosen = _method(method, settings)
    if chosen.readout is None:
        return None
    places = list(locate(model, _sites(chosen, find_decoder(model), None, sites)))
    reading = chosen.readout if readout is None else readout
    return _read(model, tokenizer, data, chosen, places, reading, batch_size, chat_template_kwargs, progress)


def separation(
    model: nn.Module,
    tokenizer: Any,
    held_out: ContrastSet,
    vector: SteeringVector,
    *,
    batch_size: int = 16,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """How well each site's direction separates items it was not fitted on.

    Args:
        model: the model the vector was fitted on, unsteered.
        tokenizer: its tokenizer.
        held_out: items the vector has not seen.
        vector: the vector.
        batch_size: rows per pass.
        chat_template_kwargs: passed on to the chat template.

    Returns:
        ``{"items": n, "data_digest": ..., "sites": {site: {"auc", "cohens_d"}}}``, and under ``"gate"`` what a gated
        method measures of itself; `auc` is the share of (positive,
        negative) couples in which the positive one lies further along the direction, ties counted half.

    Raises:
        DataError: an item has no token to be read.
    """
    method = resolve(vector.method).from_settings(vector.settings)
    acts = record(
        model,
        tokenizer,
        held_out,
        vector.reads,
        readout=Readout.parse(vector.readout or "last"),  # type: ignore[arg-type]
        batch_size=batch_size,
        chat_template_kwargs=chat_template_kwargs,
    )
    sites: dict[str, dict[str, float]] = {}
    for site in vector.reads:
        direction = method.read_direction(vector.params(site))
        if direction is None:
            continue
        along = direction.float() / torch.linalg.vector_norm(direction.float())
        positive, negative = acts.positive[site] @ along, acts.negative[site] @ along
        auc, distance = apart(positive, negative)
        sites[str(site)] = {"auc": round(auc, 4), "cohens_d": round(distance, 3)}
    measured = {"items": len(held_out), "data_digest": held_out.digest, "sites": sites}
    more = method.measure(vector, acts)
    return {**measured, "gate": more} if more else measured


def apart(positive: Tensor, negative: Tensor) -> tuple[float, float]:
    """How far two sides of projections lie apart.

    Args:
        positive: [n].
        negative: [m].

    Returns:
        The AUC (share of couples in which the positive one is larger, ties counted half), and Cohen's d, 0 where
        nothing spreads.
    """
    wins = (positive[:, None] > negative[None, :]).float() + 0.5 * (positive[:, None] == negative[None, :]).float()
    spread = 0.0
    if min(len(positive), len(negative)) > 1:
        spread = math.sqrt((float(positive.var()) + float(negative.var())) / 2)
    gap = float(positive.mean() - negative.mean())
    return float(wins.mean()), gap / spread if spread > 0 else 0.0


def record_steered(
    model: nn.Module,
    tokenizer: Any,
    rendered: Sequence[Rendered],
    sites: Sequence[Site | str],
    *,
    readout: Any,
    batch_size: int,
    steering: Callable[[Tensor], contextlib.AbstractContextManager[Any]],
) -> Activations:
    """Read activations of texts under steering whose scope may depend on where each prompt ends.

    Args:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer.
        rendered: the texts.
        sites: where to read; a site that is written gives the value after the edit.
        readout: which tokens.
        batch_size: rows per pass.
        steering: from the prompt lengths [b] of a pass's rows to the context it runs in.

    Returns:
        One row per text and site, in their order.
    """
    parts: list[tuple[tuple[int, ...], Activations]] = []
    # One batch at a time, so that every pass has the prompt lengths of its own rows.
    for batch in batches(rendered, batch_size, pad_id=pad_token_id(tokenizer)):
        rows = [rendered[row] for row in batch.rows]
        with steering(batch.prompt_lengths):
            part = record(model, tokenizer, rows, sites, readout=readout, batch_size=len(rows))
        parts.append((batch.rows, part))
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    joined = {site: torch.cat([part.positive[site] for _, part in parts])[order] for site in parts[0][1].sites}
    return Activations(positive=joined, negative={}, readout=parts[0][1].readout)


class Subject:
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
        raw = [replace(side, raw=True) if _is_bare(side) else side for side in sides]
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


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of a model takes gradients meanwhile.

    Args:
        model: the model.
    """
    taking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in taking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in taking:
            parameter.requires_grad_(True)


def _is_bare(side: Conversation) -> bool:
    return isinstance(side.prompt, str) and side.system is None and side.answer is None


def _method(method: str | Method, settings: Mapping[str, Any] | None) -> Method:
    if isinstance(method, str):
        return resolve(method).from_settings(settings or {})
    if isinstance(method, type) and issubclass(method, Method):
        return method.from_settings(settings or {})
    if settings:
        raise UnknownNameError(f"{method.name}: give settings to the method itself, not beside it")
    return method


def _sites(
    method: Method,
    decoder: Decoder,
    layers: str | int | Sequence[int] | None,
    sites: Sequence[Site | str] | Site | str | None,
) -> list[Site]:
    if layers is not None and sites is not None:
        raise SiteError("fit: got both layers and sites; give one of them")
    if isinstance(sites, str | Site):
        sites = [sites]
    if sites is not None:
        chosen = [Site.parse(site) if isinstance(site, str) else site for site in sites]
    elif layers is not None:
        listed = [layers] if isinstance(layers, int) else layers
        chosen = method.sites_at(decoder, parse_layers(listed, decoder.num_layers))
    else:
        chosen = method.sites(decoder)
    if not chosen:
        raise SiteError("fit: got no site; give at least one layer")
    return chosen


def _read(
    model: nn.Module,
    tokenizer: Any,
    data: ContrastSet,
    method: Method,
    places: Sequence[Site],
    readout: Any,
    batch_size: int,
    chat_template_kwargs: Mapping[str, Any] | None,
    progress: bool,
) -> Activations:
    """Stream where the method needs only statistics, keep the samples where it needs them."""
    common: dict[str, Any] = {
        "readout": readout,
        "batch_size": batch_size,
        "chat_template_kwargs": chat_template_kwargs,
        "max_tokens": method.longest_text,
        "progress": progress,
    }
    data = method.contrast(data)
    streams = {site: method.statistics(site) for site in places}
    kept = {site: accumulator for site, accumulator in streams.items() if accumulator is not None}
    if len(kept) == len(places):
        return stream(model, tokenizer, data, kept, **common)
    return record(model, tokenizer, data, places, **common)


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of the vocabulary, the one thing every tokenizer has.

    Args:
        tokenizer: a transformers tokenizer.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return hashlib.sha256("\n".join(f"{index} {token}" for token, index in vocabulary).encode()).hexdigest()
