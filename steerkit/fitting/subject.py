"""`ModelSubject`: what a method's `fit` may ask of the model, and nothing more.

What only some methods ask for (answers, training, weights, experts, steered passes) is imported where it is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steerkit.activations.reading import Reads, read_passes
from steerkit.activations.recording import Activations, record, record_ids
from steerkit.activations.token_scale import TokenScale, scale_of
from steerkit.errors import FitError
from steerkit.fitting.data_subject import DataSubject
from steerkit.network.decoder import Decoder
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.prompt_set import PromptSet
from steerkit.vector.model_identity import model_facts
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.activations.expert_activations import ExpertMeans
    from steerkit.fitting.passes import Passes
    from steerkit.methods._base import Method
    from steerkit.methods._subject import Read, Schedule
    from steerkit.network.anatomy import Anatomy

__all__ = ["BEYOND", "ModelSubject"]

BEYOND = (
    "asks more of the model than activations of texts, and its engine gives no more (no answers, logits, gradients or "
    "weights); load the model in transformers, and fit it there"
)


class ModelSubject(DataSubject):
    """The only door through which a method's `fit` reaches the model.

    Args:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer.
        data: what the method is fitted on: a contrast set, or prompts without sides.
        decoder: the model's decoder.
        batch_size: rows per pass.
        chat_template_kwargs: passed on to the chat template.
        name: what errors call the method.
        readout: which tokens `record` reads where it is not told.
        progress: show a progress bar of training on stderr.
        reads: what runs texts where `record` reads them; what else is asked of the model is then refused, unless it is
            the model itself.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        data: ContrastSet | PromptSet,
        decoder: Decoder,
        batch_size: int,
        chat_template_kwargs: Mapping[str, Any] | None,
        name: str = "this method",
        *,
        readout: Any = None,
        progress: bool = False,
        reads: Reads = read_passes,
    ) -> None:
        super().__init__(tokenizer, data, chat_template_kwargs, name)
        self._readout, self._progress = "last" if readout is None else readout, progress
        self._given, self._reads, self._batch_size, self._decoder = model, reads, batch_size, decoder
        self._running: Passes | None = None
        self._scales: dict[Site, TokenScale] = {}
        self._anatomies: dict[int, Anatomy] | None = None

    @property
    def decoder(self) -> Decoder:
        """The model's decoder."""
        return self._decoder

    @property
    def _whole(self) -> Decoder:
        """The decoder where its weights are used, and not its structure alone.

        Raises:
            FitError: something else runs them.
        """
        if self._reads is not read_passes:
            raise FitError(f"{self._name}: {BEYOND}")
        return self._decoder

    @property
    def _model(self) -> nn.Module:
        """The model where it is run."""
        _ = self._whole
        return self._given

    @property
    def batch_size(self) -> int:
        """Rows per pass that the user wants at the most."""
        return self._batch_size

    def unembedding(self) -> Tensor:
        """The output embedding [v, d], float32, on the CPU: row `t` reads the logit of token `t` off the stream.

        Raises:
            ModelError: the model has no such matrix, or one of another width than the stream.
        """
        from steerkit.fitting.passes import output_embedding

        return output_embedding(self._whole)

    def answers(self, items: Sequence[Any], *, max_new_tokens: int) -> list[str]:
        """What the model, unsteered and greedy, answers to each item.

        Args:
            items: prompts or conversations without answers.
            max_new_tokens: the longest answer, in tokens.
        """
        from steerkit.generation import generate

        how: dict[str, Any] = {"batch_size": self._batch_size, "chat_template_kwargs": self._chat}
        return generate(self._model, self._tokenizer, items, max_new_tokens=max_new_tokens, **how)

    def record(
        self, items: Sequence[Any], sites: Sequence[Site], *, readout: Any = None, under: SteeringVector | None = None
    ) -> Activations:
        """Read activations of texts.

        Args:
            items: prompts, conversations or rendered texts.
            sites: where to read.
            readout: which tokens; None reads what `fit` was told to, else the method's own.
            under: a vector to steer with meanwhile (see `vector`); the prompt's ends are known.

        Returns:
            One row [d] per item and site.

        Raises:
            DataError: an item has no token to be read.
            SiteError: the model lacks a site.
        """
        reading = self._readout if readout is None else readout
        rendered = self.rendered(items)
        if under is not None:
            return self._passes.record(rendered, sites, reading, under)
        how: dict[str, Any] = {"readout": reading, "batch_size": self._batch_size, "reads": self._reads}
        found = record(self._given, self._tokenizer, rendered, sites, **how)
        self._scales.update(found.scales)
        return found

    def vector(
        self, method: Method, tensors: Mapping[str, Tensor], sites: Sequence[Site], *, scope: str | None = None
    ) -> SteeringVector:
        """Make a vector to try on this model at strength 1, for `under=` of `record` and `logits`.

        Args:
            method: that applies it.
            tensors: ``"<site>/<param>"`` and ``"shared/<param>"`` to tensor, as `Method.fit` returns them.
            sites: where it is applied.
            scope: which tokens are written; None takes the method's own.

        Raises:
            VectorFileError: a tensor has a wrong name, shape or value.
            SiteError: the model lacks a site.
        """
        taps = locate(self._model, sites)
        facts = model_facts(self._decoder.model)
        return SteeringVector(
            method=method.name,
            tensors=tensors,
            sites=tuple(sites),
            edit=method.edit_name,
            scope=method.default_scope if scope is None else scope,
            unit="paper",
            suggested_strength=1.0,
            settings=method.settings,
            widths={site: tap.width for site, tap in taps.items() if tap.width != self._decoder.hidden_size},
            **{name: facts[name] for name in ("model_type", "hidden_size", "num_layers")},
        )

    def advance(
        self, method: Method, sites: Sequence[Site], fit_one: Callable[[Site, Read], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Fit site by site in the order of a pass, each on the data as all sites before it have changed it.

        Args:
            method: applies what has been fitted, at strength 1 and in its own scope.
            sites: where.
            fit_one: from a site, and what reads it, to the site's tensors by name, of any shape.

        Returns:
            ``"<site>/<name>"`` to tensor.

        Raises:
            DataError: an item has no token to be read.
            SiteError: the model lacks a site.
            FitError: an activation is not finite, with the site named; or what `fit_one` raises.
        """
        items = self.rendered((*self.data.positive, *self.data.negative))
        return self._passes.advance(
            items, sites, fit_one, lambda tensors, some: self.vector(method, tensors, some), progress=self._progress
        )

    def logits(self, items: Sequence[Any], *, under: SteeringVector | None = None) -> Tensor:
        """Next-token logits behind each item.

        Args:
            items: prompts, conversations or rendered texts.
            under: a vector to steer with meanwhile.

        Returns:
            [n, v] float32, on the CPU, in the order of the items.
        """
        return self._passes.logits(self.rendered(items), under)

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
        return self._passes.shifted(self.rendered(items), shifts, prompts=prompts)

    def read_shifted(self, items: Sequence[Any], shifts: Mapping[Site, Tensor], site: Site) -> tuple[Tensor, Tensor]:
        """Read texts in one pass whose every token is written with a shift, gradients and all.

        Args:
            items: prompts, conversations or rendered texts.
            shifts: per site [b, d] float32, one row per item.
            site: where to read.

        Returns:
            Activations [b, t, d] float32, and [b, t] which positions are no pads.
        """
        return self._passes.read_shifted(self.rendered(items), shifts, site)

    @property
    def _passes(self) -> Passes:
        from steerkit.fitting.passes import Passes

        if self._running is None:
            self._running = Passes(self._model, self._tokenizer, self._decoder, self._batch_size)
        return self._running

    def train(
        self,
        parameters: Sequence[Tensor],
        loss: Callable[[Tensor], Tensor],
        items: int,
        schedule: Schedule,
        *,
        judge: Callable[[], float] | None = None,
        title: str = "training",
    ) -> list[float]:
        """Train parameters in place, the model frozen and in evaluation mode meanwhile.

        Args:
            parameters: leaves that need gradients.
            loss: from the indices of a batch of items to a scalar; it may run the model.
            items: how many there are.
            schedule: how long and how fast.
            judge: asked after each epoch; lower is better, and the best state stays.
            title: what the progress bar says, where one is shown.

        Returns:
            The judgement after each epoch, or the mean loss.
        """
        from steerkit.fitting.training import frozen, minimise
        from steerkit.network.block_trace import evaluation_mode

        model = self._whole.model
        with frozen(model), evaluation_mode(model), torch.enable_grad():
            return minimise(parameters, loss, items, schedule, judge=judge, progress=title if self._progress else None)

    def record_ids(self, rows: Sequence[tuple[int, ...]], sites: Sequence[Site]) -> dict[Site, list[Tensor]]:
        """Activations of every token of each row of ids, none of them masked.

        Args:
            rows: token ids.
            sites: where to read.

        Returns:
            Per site one [t, d] for each row.

        Raises:
            SiteError: the model lacks a site.
        """
        found = record_ids(self._model, rows, sites)
        self._scales.update({site: scale_of(tensors) for site, tensors in found.items()})
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
        from steerkit.network.linears import linears_at

        (linear,) = linears_at(self._whole, [site], found=self._found).values()
        return linear.weight(self._decoder.model.dtype).cpu()

    @property
    def _found(self) -> dict[int, Anatomy]:
        """What every block is made of, found out once."""
        from steerkit.network.tap import anatomies

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
        from steerkit.network.experts import experts_at

        found = {site: experts_at(self._whole, self._found[site.layer], site) for site in sites}
        sides = self.rendered(self.data.positive), self.rendered(self.data.negative)
        return self._passes.experts(sides, {site: one for site, one in found.items() if one is not None}, readout)

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
        from steerkit.network.weight_digests import weight_digests

        return weight_digests(self._whole, sites)

    def norms(self, sites: Sequence[Site]) -> dict[Site, float]:
        """Median token norms at those of the sites that have been read, unsteered."""
        return {site: scale.norm for site, scale in self.scales(sites).items()}

    def scales(self, sites: Sequence[Site]) -> dict[Site, TokenScale]:
        """How long activations are at those of the sites that have been read, unsteered."""
        return {site: self._scales[site] for site in sites if site in self._scales}
