"""What a method is: how it turns activations into tensors, and how those tensors change activations.

Most methods write `fit_site` and nothing else; `AddDirection` brings the plain addition that many papers share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from steerkit._support.plugins import Configured
from steerkit.errors import FitError, SiteError, StrengthError, VectorMismatchError
from steerkit.maths import edits
from steerkit.maths.directions import random_direction
from steerkit.methods._protocols import WeightUpdate
from steerkit.network.decoder import Decoder, find_decoder
from steerkit.network.output_biases import output_biases
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.activations.moments import Accumulator
    from steerkit.activations.recording import Activations
    from steerkit.methods._protocols import Editor, HeatMap, Params, PartsTable, Prepared, Subject
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.tokens.forward_pass import Tokens

__all__ = ["AddDirection", "Method", "check_direction"]


@dataclass(frozen=True)
class Method(Configured):
    """Base of all methods. The dataclass fields of a subclass are its settings.

    Class attributes:
        name: what it is called on the command line and in vector files; the file's name.
        title, paper: how it is shown.
        readout: default tokens read; None where the method records for itself.
        scope, scopes: default tokens written, and all that are allowed.
        neutral: the strength at which it is the exact identity; None where no strength is.
        data: what it is fitted on, for the table of methods.
        sorts_prompts: it is fitted on two kinds of prompts, and what it does shows on the kinds: pairs of answers to
            the same prompts do not measure it.
        default_strength: where neither the user nor the file names one; None where one has to be named.
        strength_unit: what strengths count, in a word for tables: a factor, degrees, a share.
        ladder: strengths on the behaviour's side of neutral, from weak to strong, tried where nobody says which.
        takes_pair: it is fitted on one pair of prompts; held-out items only measure it.
        reads_input: what it adds at a site depends on what the linear layer that writes there reads. It is then called
            at that layer, and `prepared["input"]` is the layer's input [b, t, i]. Where routed experts write, it is
            called at the MLP, and the input is what `expert_gates` find in the experts' inputs [b, t, 1].
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    data: ClassVar[str] = "contrast set"
    sorts_prompts: ClassVar[bool] = False
    readout: ClassVar[str | None] = "last"
    scope: ClassVar[str] = "all"
    scopes: ClassVar[tuple[str, ...]] = (
        "all",
        "prompt",
        "response",
        "generated",
        "first",
        "assistant",
        "answer",
        "after",
    )
    neutral: ClassVar[float | None] = 0.0
    default_strength: ClassVar[float | None] = 1.0
    strength_unit: ClassVar[str] = "factor"
    ladder: ClassVar[tuple[float, ...]] = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
    takes_pair: ClassVar[bool] = False
    reads_input: ClassVar[bool] = False

    @property
    def edit_name(self) -> str:
        """The operation that vector files of this method name."""
        return "add"

    @property
    def default_scope(self) -> str:
        """Tokens written where nobody says otherwise."""
        return self.scope

    @property
    def longest_text(self) -> int | None:
        """Tokens of a text that are read at the most, the rest being cut off at the right; None reads all."""
        return None

    @classmethod
    def _setting_error(cls, message: str) -> FitError:
        return FitError(message)

    def sites(self, decoder: Decoder) -> list[Site]:
        """Where the method reads and writes when nobody says: the output of the block at 40 % of the depth.

        Args:
            decoder: the model's decoder.
        """
        return [Site(round(0.4 * (decoder.num_layers - 1)), "resid_post")]

    def sites_at(self, decoder: Decoder, layers: Sequence[int]) -> list[Site]:
        """The method's own kinds of site at chosen layers.

        Args:
            decoder: the model's decoder.
            layers: blocks counted from 0.
        """
        kinds = dict.fromkeys(site.kind for site in self.sites(decoder))
        return [Site(layer, kind) for layer in layers for kind in kinds]

    def contrast(self, data: ContrastSet) -> ContrastSet:
        """The items as the method reads them, such as balanced or without a chat template; here as they are.

        Args:
            data: what is fitted on.

        Raises:
            DataError: the method cannot be fitted on such items.
        """
        return data

    @classmethod
    def candidates(cls, num_layers: int) -> list[tuple[int, ...]]:
        """Sets of layers worth trying where nobody says which.

        Here: single blocks between a quarter and four fifths of the depth, eight at most.

        Args:
            num_layers: of the model.
        """
        first, last = round(0.25 * (num_layers - 1)), round(0.8 * (num_layers - 1))
        step = max(1, -(-(last - first + 1) // 8))
        return [(layer,) for layer in range(first, last + 1, step)]

    def statistics(self, site: Site) -> Accumulator | None:
        """An accumulator that streams what `fit_site` needs; None keeps the samples.

        Args:
            site: where it will accumulate.
        """
        return None

    def fit_site(self, positive: Tensor, negative: Tensor) -> dict[str, Tensor]:
        """Turn the activations of one site into the tensors to be stored.

        Args:
            positive: [n, d] float32, one row per positive prompt (or what `statistics` gives for them).
            negative: [m, d] float32.

        Returns:
            parameter name to tensor.

        Raises:
            FitError: no direction can be had from these activations.
        """
        raise NotImplementedError

    def fit(self, acts: Activations | None, subject: Subject, sites: list[Site]) -> dict[str, Tensor]:
        """Fit all sites; override where sites are coupled or the model is needed.

        Args:
            acts: activations of both sides at every site; None where `readout` is None.
            subject: the only door to the model.
            sites: where to fit.

        Returns:
            ``"<site>/<param>"`` and ``"shared/<param>"`` to tensor.

        Raises:
            FitError: no direction can be had, with the site named.
        """
        assert acts is not None
        return self._each(sites, lambda site: self.fit_site(acts.positive[site], acts.negative[site]))

    def _each(self, sites: list[Site], fit_one: Callable[[Site], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Fit site by site, naming the site in every error."""
        tensors: dict[str, Tensor] = {}
        for site in sites:
            try:
                params = fit_one(site)
            except FitError as error:
                raise FitError(f"{self.name} at {site}: {error}") from None
            tensors.update({f"{site}/{name}": value for name, value in params.items()})
        return tensors

    def written(self, sites: list[Site], tensors: Mapping[str, Tensor], decoder: Decoder) -> list[Site]:
        """Where the fitted vector is applied; here where it was fitted.

        Args:
            sites: where it was fitted.
            tensors: what `fit` gave.
            decoder: the model's decoder.

        Raises:
            SiteError: the model has no such places.
        """
        return sites

    def extra(self, subject: Subject, sites: Sequence[Site]) -> dict[str, Any]:
        """What the vector's file says besides its tensors.

        Args:
            subject: the only door to the model.
            sites: where the vector is applied.

        Returns:
            Entries of `SteeringVector.extra`. ``{"weights": {name: digest}}`` ties the vector to these weights.
        """
        return {}

    def read_at(self, sites: list[Site], tensors: Mapping[str, Tensor]) -> list[Site]:
        """Where the fitted vector reads; here wherever it was fitted.

        Args:
            sites: where it was fitted.
            tensors: what `fit` gave.
        """
        return sites

    def editor(self, vector: SteeringVector) -> Editor | None:
        """What reads at `vector.reads` and gates the writes at `vector.sites`; None where nothing is gated.

        Args:
            vector: a vector of this method.

        Raises:
            VectorMismatchError: the vector lacks what the gate needs.
        """
        return None

    def measure(self, vector: SteeringVector, held_out: Activations) -> dict[str, Any]:
        """What more than its separation is measured of a vector on held-out items, as JSON can hold it.

        Args:
            vector: a vector of this method.
            held_out: both sides at `vector.reads`, unsteered.
        """
        return {}

    def check(self, site: Site, params: Params) -> None:
        """Refuse tensors that a file may hold but this method cannot apply.

        Args:
            site: whose tensors they are.
            params: the tensors of one site.
        """

    def direction(self, params: Params) -> Tensor | None:
        """The single direction [d] that is written; None where there is none.

        Args:
            params: the tensors of one site.
        """
        direction = params.get("direction")
        return direction if direction is not None and direction.dim() == 1 else None

    def read_direction(self, params: Params) -> Tensor | None:
        """The single direction [d] along which the fitted sides lie apart where the vector reads; None without one.

        Args:
            params: the tensors of one site of `vector.reads`.
        """
        return self.direction(params)

    def check_model(self, vector: SteeringVector, decoder: Decoder) -> None:
        """Refuse a model of the right size that this vector was nevertheless not fitted on.

        Args:
            vector: a vector of this method.
            decoder: of the model to be steered.

        Raises:
            VectorMismatchError: the vector depends on the exact weights, and they are others.
        """

    def length(self, params: Params) -> float | None:
        """How far strength 1 moves a token, in activation units; None where the method has no length.

        Args:
            params: the tensors of one site.
        """
        return None

    def is_neutral(self, strength: float) -> bool:
        """Whether a strength is the exact identity; steering then leaves the row alone, bitwise.

        Args:
            strength: in the method's own unit.
        """
        return self.neutral is not None and strength == self.neutral

    def minimum_prompt(self, params: Params) -> int:
        """Prompt tokens a row needs at the least.

        Args:
            params: the tensors of one site.
        """
        return 0

    def prepare(self, params: Params, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Do once what every pass would repeat. Called when attached and when the strength changes.

        Args:
            params: the tensors of one site, on the CPU.
            strength: float32 on `device`, a single number [] or one per row [b, 1, 1].
            dtype: of the activations.
            device: of the activations.

        Returns:
            name to tensor; the shapes may not depend on the strength's value.
        """
        raise NotImplementedError

    def expert_gates(self, params: Params) -> tuple[Tensor, Tensor | None]:
        """For a method that `reads_input`: what the inputs of routed experts are multiplied with.

        Args:
            params: the tensors of one site.

        Returns:
            [e, i] one gate for each expert, and [j] that of an expert shared by all tokens, where there is one.

        Raises:
            SiteError: the method does not edit experts.
        """
        raise SiteError(f"{self.name} does not edit routed experts; choose other sites")

    def edit(self, h: Tensor, prepared: Prepared, tokens: Tokens) -> Tensor:
        """Change the activations of one pass, without touching `h`.

        Args:
            h: [b, t, d] activations.
            prepared: what `prepare` gave, and `input` where the method `reads_input`.
            tokens: `tokens.position[b, t]` counts from each row's first real token. Which tokens are finally
                written, and the dtype of the result, are the caller's business.

        Returns:
            [b, t, d]
        """
        raise NotImplementedError

    def control(self, vector: SteeringVector, generator: torch.Generator) -> SteeringVector:
        """The same vector with nothing learned in it, the control an effect is shown beside.

        Here: random directions of the same norms. A method whose tensors are no directions says what is random.

        Args:
            vector: what this method fitted.
            generator: what draws, on the CPU; one for all tensors, so that no draw is used twice.

        Raises:
            FitError: the vector has no direction that could be drawn anew.
        """
        directions = [name for name in vector.tensors if name.endswith("/direction")]
        if not directions:
            raise FitError(f"{self.name}: the vector holds no direction, so it has no random control")
        drawn = {name: random_direction(vector.tensors[name], generator) for name in sorted(directions)}
        return replace(vector, tensors={**vector.tensors, **drawn})

    def maps(self, vector: SteeringVector) -> list[HeatMap]:
        """Heat maps of the parts a vector consists of, as `steerkit inspect --plot` draws them; here there are none.

        Args:
            vector: what this method fitted.
        """
        return []

    def table(self, vector: SteeringVector) -> PartsTable | None:
        """The parts a vector consists of, as `steerkit inspect` lists them; None where there is nothing to list.

        Args:
            vector: what this method fitted.
        """
        return None

    @property
    def has_weight_form(self) -> bool:
        """Whether some vectors of this method can be weights."""
        return type(self).weight_updates is not Method.weight_updates

    def weight_updates(self, model: nn.Module, vector: SteeringVector, strength: float) -> list[WeightUpdate]:
        """The same change as weights, where that is exact.

        Args:
            model: the transformers model.
            vector: a vector of this method.
            strength: in the vector's paper unit.

        Raises:
            StrengthError: the method has no exact weight form.
        """
        raise StrengthError(f"{self.name} has no exact weight form; steer with hooks instead")


@dataclass(frozen=True)
class AddDirection(Method):
    """Shared by the methods that add `strength * direction` to every written token."""

    def check(self, site: Site, params: Params) -> None:
        """One direction [d] per site.

        Raises:
            VectorMismatchError: there is none, or it has another shape.
        """
        check_direction(f"{site}: {self.name} adds one direction of shape (width,)", params, dims=1)

    def length(self, params: Params) -> float | None:
        """Norm of the direction."""
        return float(torch.linalg.vector_norm(params["direction"].float()))

    def prepare(self, params: Params, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """`strength * direction`, multiplied in float32 and rounded once."""
        return {"direction": (strength * params["direction"].to(device).float()).to(dtype)}

    def edit(self, h: Tensor, prepared: Prepared, tokens: Tokens) -> Tensor:
        """`h + strength * direction`."""
        return edits.add(h, prepared["direction"])

    def weight_updates(self, model: nn.Module, vector: SteeringVector, strength: float) -> list[WeightUpdate]:
        """A constant at a block's output is a bias of the last linear layer that writes to it, or of every expert.

        Raises:
            SiteError: the block has no such layer behind which nothing changes the sum.
        """
        for site in vector.sites:
            if site.kind != "resid_post":
                raise SiteError(f"{site}: only additions at resid_post have an exact weight form; steer with hooks")
        try:
            names = output_biases(find_decoder(model), {site.layer for site in vector.sites})
        except SiteError as error:
            raise SiteError(f"an addition at a block's output has no exact weight form here ({error})") from None
        updates = []
        for site in vector.sites:
            shift = strength * vector.params(site)["direction"].float()
            updates += [WeightUpdate(name, _shifted(shift)) for name in names[site.layer]]
        return updates


def check_direction(wanted: str, params: Params, *, dims: int) -> None:
    """Refuse a direction of another shape than a method applies.

    Args:
        wanted: what the method applies, to begin the error with.
        params: the tensors of one site.
        dims: dimensions the direction has to have.

    Raises:
        VectorMismatchError: there is no direction, or it has other dimensions.
    """
    direction = params.get("direction")
    if direction is None or direction.dim() != dims:
        got = "none" if direction is None else f"shape {tuple(direction.shape)}"
        raise VectorMismatchError(f"{wanted}, the vector has {got}")


def _shifted(shift: Tensor) -> Callable[[Tensor | None], Tensor]:
    def update(old: Tensor | None) -> Tensor:
        return shift.clone() if old is None else old + shift.to(old.device)  # [out], or of experts [n, out]

    return update
