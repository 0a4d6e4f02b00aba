"""`SteeringVector`: what a fit leaves behind, frozen, with everything that is needed to apply it right."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

from steerkit import __version__
from steerkit.errors import SiteError, StrengthError, VectorFileError, VectorMismatchError
from steerkit.network.sites import Site
from steerkit.vector.container import REQUIRED
from steerkit.vector.description import described
from steerkit.vector.fields import BY_SITE, CODECS, MAPPING, checked_strength
from steerkit.vector.frozen import thawed
from steerkit.vector.model_identity import model_facts, public_id, template_digest
from steerkit.vector.stored_form import StoredForm
from steerkit.vector.tensors import Tensors, checked_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from steerkit.tokens.fade import Fade
    from steerkit.vector.hold import Hold
    from steerkit.vector.when import When

__all__ = ["SteeringVector"]

UNITS = ("paper", "norm")


@dataclass(frozen=True, eq=False, repr=False)
class SteeringVector(StoredForm):
    """The result of a fit. Two vectors are equal when they would be stored as the same bytes and applied the same.

    Attributes:
        method: name of the method that fitted it and applies it.
        tensors: ``"<site>/<param>"`` and ``"shared/<param>"`` to tensor; kept as copies, detached, contiguous, on the
            CPU, in their own dtype. A param named ``direction`` is [d] or [k, d], d being the width of its site.
        sites: where it is applied, in order.
        edit: the operation, such as ``"add"``.
        scope: which tokens are written when nobody says otherwise.
        unit: what `suggested_strength` and `strength` count in.
        model_type: family of the model it was fitted on, from its text config.
        hidden_size: width of that model's residual stream.
        num_layers: number of its blocks.
        settings: the method's settings. Lists become tuples here and in the other free mappings.
        norms: median token norm per site.
        spreads: how far tokens spread at each site, which is what ``unit="norm"`` counts in; where a file has none, as
            old ones, that unit counts in `norms`.
        massive: per site the dimensions that hold most of the squared norm, with their shares of it.
        widths: width of each site that is not `hidden_size` wide, such as `z`.
        suggested_strength: strength to use when nobody gives one.
        calibration: where that strength comes from: ``{"by": "suggest_strength", "confirmed": False, "kl": ...}``.
        model_id: hub id or folder name of the model; of an absolute path only the last part is kept.
        model_revision: commit of the hub repository.
        chat_template_sha256: digest of the chat template the prompts were rendered with.
        tokenizer_sha256: digest of the vocabulary.
        answer_separator: what stood between prompt and answer where there was no chat template; None where there was
            one, and in files from before it was recorded, whose answers followed at once.
        readout: which tokens were read.
        data_digest: digest of the contrast set.
        data_source: where the contrast set came from.
        seed: of everything random in the fit.
        paper: what the method implements.
        held_out: figures measured on items it was not fitted on.
        neutral: mean and standard deviation of readings of neutral texts, see `steerkit.with_neutral`.
        steerkit_version: that fitted it.
        recipe: the exact recipe it was made by.
        extra: what a method wants to add; ``{"weights": {name: digest}}`` ties the vector to those weights.
        fitted_at: where it was fitted; None where that is where it is applied. See `reads`.
        strength: how strongly it is to be applied this time, one number or one per row of the batch; never stored.
        own_scope: whether `at` set the scope, so that it comes before one given for several vectors; never stored.
        own_unit: whether `at` set the unit; never stored.
        fade: how the strength goes on from its value to another while tokens are generated; never stored.
        when: on which readings it is applied, with the vectors that are read; never stored.
        hold: which reading the strength is found by; never stored.
        rows: which rows of the batch it acts on; None for all; never stored.

    Raises:
        VectorFileError: a field of the wrong type, or a tensor with a wrong name, shape, dtype or value.
        StrengthError: a strength that is not a finite number, or an unknown unit.

    Example:
        >>> import torch
        >>> vector = SteeringVector(
        ...     method="caa", tensors={"resid_post.1/direction": torch.ones(4)}, sites=(Site(1),), edit="add",
        ...     scope="response", unit="paper", model_type="llama", hidden_size=4, num_layers=2,
        ... )
        >>> SteeringVector.from_bytes(vector.to_bytes()) == vector
        True
    """

    method: str
    tensors: Mapping[str, Tensor]
    sites: tuple[Site, ...]
    edit: str
    scope: str
    unit: Literal["paper", "norm"]
    model_type: str
    hidden_size: int
    num_layers: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    norms: Mapping[Site, float] = field(default_factory=dict)
    spreads: Mapping[Site, float] = field(default_factory=dict)
    massive: Mapping[Site, Mapping[int, float]] = field(default_factory=dict)
    widths: Mapping[Site, int] = field(default_factory=dict)
    suggested_strength: float | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)
    model_id: str | None = None
    model_revision: str | None = None
    chat_template_sha256: str | None = None
    tokenizer_sha256: str | None = None
    answer_separator: str | None = None
    readout: str | None = None
    data_digest: str | None = None
    data_source: str | None = None
    seed: int | None = None
    paper: str | None = None
    held_out: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, Any] = field(default_factory=dict)
    steerkit_version: str | None = __version__
    recipe: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    fitted_at: tuple[Site, ...] | None = None
    strength: float | tuple[float, ...] | None = None
    own_scope: bool = False
    own_unit: bool = False
    fade: Fade | None = None
    when: When | None = None
    hold: Hold | None = None
    rows: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        for name, codec in CODECS.items():
            value = getattr(self, name)
            if value is None and name not in REQUIRED and codec not in (MAPPING, *BY_SITE):
                continue  # not known
            try:
                object.__setattr__(self, name, codec.clean(value))
            except (TypeError, ValueError) as error:
                raise VectorFileError(f"{name}: {error}") from None
        if self.unit not in UNITS:
            raise StrengthError(f"unit {self.unit!r} is unknown; allowed are 'paper' and 'norm'")
        object.__setattr__(self, "strength", checked_strength("strength", self.strength))
        if self.model_id is not None:
            object.__setattr__(self, "model_id", public_id(self.model_id))
        for site in (*self.sites, *self.reads):
            if site.layer >= self.num_layers:
                raise VectorFileError(f"{site}: layer {site.layer} is outside 0..{self.num_layers - 1}")
        widths = {site: self.widths.get(site, self.hidden_size) for site in self.sites}
        object.__setattr__(self, "tensors", checked_tensors(self.tensors, widths))

    @classmethod
    def from_directions(
        cls,
        directions: Mapping[int, Tensor] | Mapping[str, Tensor] | Mapping[Site, Tensor],
        model: nn.Module,
        tokenizer: Any = None,
        *,
        scope: str = "response",
        data_source: str | None = None,
    ) -> Self:
        """Make a vector of directions that were found elsewhere: a plain addition, at strength 1 what they are.

        Args:
            directions: where to add to a direction [d], a tensor, an array or a list, kept in float32. Where is the
                number of a block, counted from 0, at whose output it is added, a site or its name (`mlp_out.12`).
            model: the transformers model they are for.
            tokenizer: its tokenizer, whose chat template is noted.
            scope: which tokens are written.
            data_source: where they come from.

        Raises:
            VectorMismatchError: a direction is not as wide as the model, or of a block that it has not.
            VectorFileError: there is no direction, or one is not finite.
            SiteError: a key that is no place.
            ScopeError: no scope of that name.

        Warns:
            UserWarning: a direction has length 0 and adds nothing.

        Example:
            >>> import torch
            >>> from transformers import GPT2Config, GPT2LMHeadModel
            >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16))
            >>> vector = SteeringVector.from_directions({1: torch.ones(8)}, model)
            >>> vector.method, [str(site) for site in vector.sites]
            ('caa', ['resid_post.1'])
        """
        from steerkit.tokens.scope import Scope
        from steerkit.vector.foreign.directions import as_direction

        facts = model_facts(model, tokenizer)
        placed = {Site.of(place): as_direction(f"direction of {place}", one) for place, one in directions.items()}
        for site, direction in sorted(placed.items()):
            if tuple(direction.shape) != (facts["hidden_size"],) or site.layer >= facts["num_layers"]:
                raise VectorMismatchError(
                    f"the direction of {site} has shape {list(direction.shape)}, this model blocks 0 to "
                    f"{facts['num_layers'] - 1} of width {facts['hidden_size']}; give the model it was made for"
                )
            if not bool(direction.any()):
                warnings.warn(f"the direction of {site} has length 0 and adds nothing", stacklevel=2)
        return cls(
            method="caa",
            tensors={f"{site}/direction": direction for site, direction in placed.items()},
            sites=tuple(sorted(placed)),
            edit="add",
            scope=str(Scope.parse(scope)),
            unit="paper",
            data_source=data_source,
            **facts,
        )

    @cached_property
    def _names(self) -> dict[str, dict[str, str]]:
        """Names of tensors by the site whose they are, or "shared", so that no site looks through those of all."""
        found: dict[str, dict[str, str]] = {str(site): {} for site in (*self.sites, *self.reads)}
        for name in self.tensors:
            owner, _, param = name.partition("/")
            found.setdefault(owner, {})[param] = name
        return found

    def _named(self, site: Site) -> dict[str, str]:
        """Under which names of `tensors` the parameters of one site stand: the shared ones and its own.

        Raises:
            SiteError: the vector is neither applied nor fitted there.
        """
        if str(site) not in self._names:
            raise SiteError(f"{site}: this vector acts at {', '.join(map(str, self.sites))}")
        return {**self._names.get("shared", {}), **self._names[str(site)]}

    def __repr__(self) -> str:
        places = ", ".join(map(str, self.sites))
        return f"SteeringVector({self.method} at {places}; {self.model_type}, {self.digest[:12]})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        return self._told_by() == other._told_by()

    def __hash__(self) -> int:
        return hash(self._told_by())

    def __reduce__(self) -> tuple[Any, ...]:
        # Read-only mappings can neither be copied nor sent to another process.
        return _rebuild, ({entry.name: thawed(getattr(self, entry.name)) for entry in fields(self)},)

    def _told_by(self) -> tuple[Any, ...]:
        return self.application, self.strength, self.rows

    @property
    def application(self) -> tuple[Any, ...]:
        """What tells the vector from others as it is applied, but for its strength and its rows.

        It is the digest of all that is stored, and every field that is not.
        """
        apart = {*CODECS, "tensors", "strength", "rows"}
        return self.digest, *(getattr(self, entry.name) for entry in fields(self) if entry.name not in apart)

    @property
    def reads(self) -> tuple[Site, ...]:
        """Where it was fitted, and where its directions separate activations: `fitted_at`, else `sites`."""
        return self.sites if self.fitted_at is None else self.fitted_at

    def params(self, site: Site) -> dict[str, Tensor]:
        """The tensors that act at one site: the shared ones and its own.

        Args:
            site: one of `sites`, or of `reads`.

        Returns:
            parameter name to tensor [...], a direction being [d] or [k, d]; where both exist, the site's own.

        Raises:
            SiteError: the vector is neither applied nor fitted there.
        """
        return {param: self.tensors[name] for param, name in self._named(site).items()}

    def at(
        self,
        strength: float | Sequence[float] | Tensor | None = None,
        scope: str | None = None,
        unit: Literal["paper", "norm"] | None = None,
        fade: str | Fade | None = None,
        when: str | When | None = None,
        hold: str | Hold | None = None,
    ) -> SteeringVector:
        """The same vector, to be applied in a given way.

        Args:
            strength: one number, or one per row of the batch (a sequence or a tensor [b]); None leaves it.
            scope: which tokens are written; None leaves it.
            unit: what the strength counts in; None leaves it.
            fade: how the strength goes on while tokens are generated, such as ``"linear over 40"`` (to 0) or ``"cosine
                over 40 to 0.5"``; None leaves it.
            when: on which readings it is applied, such as ``"refusal-caa > 1.5"`` or, for each token by itself,
                ``"refusal-caa > 1.5 per token"``; None leaves it.
            hold: which reading the strength is found by, such as ``"optimism-caa at 2 within 0 to 3"``; None leaves it.

        Returns:
            A copy. With another unit it has no suggested strength: that one counts in the old unit.

        Raises:
            StrengthError: a strength that is not finite, an unknown unit, another unit without a strength in it, no
                fade, or a strength or a fade beside `hold`.
            ScopeError: no scope of that name.
            CompositionError: `when` or `hold` is none.
            UnknownNameError: what they read is neither a file nor a shipped vector.
        """
        from steerkit.vector.applying import changes_of

        given = {"strength": strength, "scope": scope, "unit": unit, "fade": fade, "when": when, "hold": hold}
        return replace(self, **changes_of(self, **given))

    def with_held_out(self, figures: Mapping[str, Any]) -> SteeringVector:
        """The same vector with figures measured on items it was not fitted on.

        Args:
            figures: JSON-like, such as ``{"items": 8, "sites": {...}}``.

        Raises:
            VectorFileError: a value that JSON cannot hold.
        """
        return replace(self, held_out=figures)

    def typical(self, site: Site) -> float | None:
        """How long one unit of ``unit="norm"`` is at a site: the spread there, in older files the median norm.

        Args:
            site: one of `sites`.
        """
        return self.spreads.get(site, self.norms.get(site))

    def check(self, model: nn.Module, tokenizer: Any = None) -> None:
        """Refuse a model that this vector cannot steer; warn of one it was not fitted on.

        Args:
            model: a transformers model, wrapped or not.
            tokenizer: its tokenizer, to compare chat templates.

        Raises:
            VectorMismatchError: the model has another width or depth, or other weights than the vector is tied to.
        """
        from steerkit.vector.model_check import check_model

        check_model(self, model, tokenizer)

    def check_template(self, tokenizer: Any) -> None:
        """Warn of another chat template than the vector was fitted with, where both are known.

        Args:
            tokenizer: of the model to be steered.
        """
        from steerkit.vector.model_check import warn_of_difference

        warn_of_difference(self, "chat_template_sha256", template_digest(tokenizer), stacklevel=3)

    def describe(self) -> dict[str, Any]:
        """The facts of this vector as JSON can hold them.

        Returns:
            All that is stored except the numbers of the tensors; per site the tensors' shapes, the direction's norm
            and the activation norm; for edits that add a direction, the strength in both units (the one set, else the
            suggested one).
        """
        assert isinstance(self.tensors, Tensors)
        stored = self.tensors.stored
        params = {site: {param: stored[name] for param, name in self._named(site).items()} for site in self.sites}
        return described(self, params)


def _rebuild(values: dict[str, Any]) -> SteeringVector:
    return SteeringVector(**values)
