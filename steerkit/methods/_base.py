"""What a method is: how it turns activations into tensors, and how those tensors change activations.

Most methods write `fit_site` and nothing else: `AddDirection` brings the plain addition that many papers share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Final, Literal, TypeAlias

import torch
from torch import Tensor

from steerkit._support.plugins import Configured
from steerkit.errors import FitError, VectorMismatchError
from steerkit.methods._params import misfit
from steerkit.network.decoder import Decoder
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.activations.moments import Accumulator
    from steerkit.activations.recording import Activations
    from steerkit.methods._protocols import Params, Prepared
    from steerkit.methods._subject import Subject
    from steerkit.tokens.forward_pass import Tokens

__all__ = [
    "CONTRAST",
    "ONE_PAIR",
    "PAIRS",
    "PROMPTS",
    "TWO_KINDS",
    "FittedOn",
    "Method",
    "has_sides",
    "sorts_prompts",
    "takes_pair",
    "whole_and_thirds",
]

FittedOn: TypeAlias = Literal[
    "contrast set", "contrast set of pairs", "one pair of prompts", "harmful and harmless prompts", "prompts"
]
CONTRAST: Final = "contrast set"
PAIRS: Final = "contrast set of pairs"
ONE_PAIR: Final = "one pair of prompts"
"""Held-out items then only measure the vector; it is not fitted on more than the pair."""
TWO_KINDS: Final = "harmful and harmless prompts"
"""What such a method does shows on the two kinds of prompts; pairs of answers to one prompt do not measure it."""
PROMPTS: Final = "prompts"
"""Such a method looks for directions that nobody has named; nothing says which behaviour it should find."""


@dataclass(frozen=True)
class Method(Configured):
    """Base of all methods. The dataclass fields of a subclass are its settings.

    A method writes `fit_site` (or `fit`), `prepare` and `edit`, or takes the latter two from `AddDirection`. Whatever
    else it can do, such as gating or going into weights, is a protocol of its own (`steerkit.methods._protocols`).

    Class attributes:
        name: what it is called on the command line and in vector files; the file's name.
        title, paper: how it is shown.
        data: what it is fitted on: `CONTRAST`, `PAIRS`, `ONE_PAIR`, `TWO_KINDS` or `PROMPTS`.
        params: the tensors that each site of a vector has, each with its shape in letters, such as ``"d"`` or
            ``"k d"``; an empty shape is one number. Equal letters are equal sizes. What is no float has its dtype in
            front: ``"int64 k"``.
        also: the tensors that a vector may have besides, at some sites or ``"shared"`` by all; ``"..."`` is any shape.
        readout: tokens read where nobody says otherwise; None where the method records for itself.
        scope, scopes: tokens written where nobody says otherwise, and all that are allowed.
        neutral: the strength at which it is the exact identity; None where no strength is.
        default_strength: where neither the user nor the file names one; None where one has to be named, because what
            1 does depends on model and data.
        strength_unit: what strengths count, in a word for tables: a factor, degrees, a share.
        ladder: strengths on the behaviour's side of neutral, from weak to strong, tried where nobody says which.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    data: ClassVar[FittedOn] = CONTRAST
    params: ClassVar[Mapping[str, str]] = {}
    also: ClassVar[Mapping[str, str]] = {}
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
    default_strength: ClassVar[float | None] = None
    strength_unit: ClassVar[str] = "factor"
    ladder: ClassVar[tuple[float, ...]] = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)

    @property
    def edit_name(self) -> str:
        """The operation that vector files of this method name; the method's own name where it says no other."""
        return self.name

    @property
    def natural_strength(self) -> float | None:
        """The strength where neither the user nor the file names one: `default_strength`, unless settings decide."""
        return self.default_strength

    @property
    def neutral_strength(self) -> float | None:
        """The strength at which it is the exact identity: `neutral`, unless settings decide."""
        return self.neutral

    @property
    def takes_rows(self) -> bool:
        """Whether `edit` takes what `prepare` gives as [b, 1, d] too, a vector of its own for each row."""
        return False

    @property
    def default_scope(self) -> str:
        """Tokens written where nobody says otherwise."""
        return self.scope

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
        raise FitError(f"{type(self).__name__} writes neither `fit_site` nor `fit`; write one of them")

    def fit(self, acts: Activations | None, subject: Subject, sites: list[Site]) -> dict[str, Tensor]:
        """Fit all sites; override where sites are coupled or the model is needed.

        Args:
            acts: activations of both sides at every site; None where `readout` is None.
            subject: the only door to the model.
            sites: where to fit.

        Returns:
            ``"<site>/<param>"`` and ``"shared/<param>"`` to tensor, such as a direction [d].

        Raises:
            FitError: no direction can be had, with the site named.
        """
        if acts is None:
            raise FitError(
                f"{self.name}: readout is None, so nothing was read; write `fit`, and read by `subject.record`"
            )
        return self._each(sites, lambda site: self.fit_site(acts.positive[site], acts.negative[site]))

    def _each(self, sites: list[Site], fit_one: Callable[[Site], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Fit site by site, naming the site in every error."""
        tensors: dict[str, Tensor] = {}
        for site in sites:
            try:
                params = fit_one(site)
            except FitError as error:
                raise FitError(f"{self.name} at {site}: {error}") from None
            if not isinstance(params, Mapping):
                raise FitError(f"{self.name}: `fit_site` gave {type(params).__name__}; return a name to each tensor")
            tensors.update({f"{site}/{name}": value for name, value in params.items()})
        return tensors

    def written(self, sites: list[Site], tensors: Mapping[str, Tensor], decoder: Decoder) -> list[Site]:
        """Where the fitted vector is applied; here where it was fitted.

        Args:
            sites: where it was fitted.
            tensors: what `fit` gave, each of any shape.
            decoder: the model's decoder.

        Returns:
            The sites, all of this model.

        Raises:
            SiteError: the model has no such places.
        """
        return sites

    def read_at(self, sites: list[Site], tensors: Mapping[str, Tensor]) -> list[Site]:
        """Where the fitted vector reads; here wherever it was fitted.

        Args:
            sites: where it was fitted.
            tensors: what `fit` gave, each of any shape.
        """
        return sites

    def check(self, site: Site, params: Params) -> None:
        """Refuse tensors that a file may hold but this method cannot apply: those that are not as `params` says.

        Override it to look at values too, and call this one first.

        Args:
            site: whose tensors they are.
            params: the tensors of one site.

        Raises:
            VectorMismatchError: a tensor is missing or has another shape.
        """
        wrong = misfit(self.params, params)
        if wrong:
            wanted, got = wrong
            found = " has none" if got is None else f"'s is {got}"
            raise VectorMismatchError(f"{site}: {self.name} needs {wanted}, the vector{found}; fit it again")

    def direction(self, params: Params) -> Tensor | None:
        """The single direction [d] that is written; None where there is none.

        Args:
            params: the tensors of one site.
        """
        direction = params.get("direction")
        return direction if direction is not None and direction.dim() == 1 else None

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
        return self.neutral_strength is not None and strength == self.neutral_strength

    def prepare(self, params: Params, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Do once what every pass would repeat. Called when attached and when the strength changes.

        Args:
            params: the tensors of one site, on the CPU.
            strength: float32 on `device`, a single number [] or one per row [b, 1, 1].
            dtype: of the activations.
            device: of the activations.

        Returns:
            name to tensor; the shapes may not depend on the strength's value.

        Raises:
            NotImplementedError: the method writes none.
        """
        raise NotImplementedError(f"{type(self).__name__} writes no `prepare`")

    def edit(self, h: Tensor, prepared: Prepared, tokens: Tokens) -> Tensor:
        """Change the activations of one pass, without touching `h`.

        Args:
            h: [b, t, d] activations.
            prepared: what `prepare` gave, and `input` where the method is a `ReadsInput`.
            tokens: `tokens.position` [b, t] counts from each row's first real token, `tokens.prompt_length` [b, 1] is
                how many real tokens the prompt has. The caller keeps what is written to the tokens of the scope and
                casts it to the dtype of `h`. Of `front`, `mid` and `back` it knows that they lie in the prompt and
                no more: there the method leaves alone every token of the prompt outside its window.

        Returns:
            [b, t, d], finite, of any float dtype.

        Raises:
            NotImplementedError: the method writes none.
        """
        raise NotImplementedError(f"{type(self).__name__} writes no `edit`")

    def control(self, vector: SteeringVector, generator: torch.Generator) -> SteeringVector:
        """The same vector with nothing learned in it, the control an effect is shown beside.

        Here: random directions of the same norms. A method whose tensors are no directions says what is random.

        Args:
            vector: what this method fitted.
            generator: what draws, on the CPU; one for all tensors, so that no draw is used twice.

        Raises:
            FitError: the vector has no direction that could be drawn anew.
        """
        from steerkit.maths.directions import random_direction

        directions = [name for name in vector.tensors if name.endswith("/direction")]
        if not directions:
            raise FitError(f"{self.name}: the vector holds no direction, so it has no random control")
        drawn = {name: random_direction(vector.tensors[name], generator) for name in sorted(directions)}
        return replace(vector, tensors={**vector.tensors, **drawn})


def whole_and_thirds(num_layers: int) -> list[tuple[int, ...]]:
    """All blocks, and each third of them: candidates of methods that rank the parts of several blocks together.

    Args:
        num_layers: of the model.
    """
    ends = [round(part * num_layers / 3) for part in range(4)]
    thirds = [tuple(range(start, stop)) for start, stop in pairwise(ends) if start < stop]
    return list(dict.fromkeys([tuple(range(num_layers)), *thirds]))


def takes_pair(kind: Method | type[Method]) -> bool:
    """Whether a method is fitted on one pair of prompts.

    Args:
        kind: a method or its class.
    """
    return kind.data == ONE_PAIR


def sorts_prompts(kind: Method | type[Method]) -> bool:
    """Whether a method is fitted on two kinds of prompts, which its vectors then treat differently.

    Args:
        kind: a method or its class.
    """
    return kind.data == TWO_KINDS


def has_sides(kind: Method | type[Method]) -> bool:
    """Whether a method is told by two sides which behaviour is meant.

    Args:
        kind: a method or its class.
    """
    return kind.data != PROMPTS
