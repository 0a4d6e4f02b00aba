"""SteeringVector: what a fit leaves behind, frozen, with everything needed to use it right; and its file.

The file is safetensors: 8 bytes header length, a JSON header, raw tensors named ``<site>/<param>`` or
``shared/<param>``. Steerkit writes the container itself because the same vector must give the same bytes (the
safetensors writer orders metadata at random), and because the digest covers every byte: it is the sha256 of the whole
file with 64 zeros in the digest's place. Reading checks the container first and then goes through safetensors.
Pickles are neither written nor read.
"""

from __future__ import annotations

import hashlib
import json
import math
import numbers
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PureWindowsPath
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from steerkit import __version__
from steerkit.errors import SiteError, SteerError, StrengthError, VectorFileError, VectorMismatchError
from steerkit.files import write_whole
from steerkit.linears import check_weights
from steerkit.sites import Site, inner_model
from steerkit.tokens import Scope

__all__ = ["SteeringVector", "model_facts"]

FORMAT = 1
LAYER_COUNTING = "blocks from 0, resid_post.N is the output of block N"
UNITS = ("paper", "norm")
MAX_HEADER_BYTES = 16 * 2**20
MAX_FILE_BYTES = 4 * 2**30
MAX_TENSORS = 4096
MAX_DIMENSIONS = 8
MAX_NESTING = 32

_EMPTY: Mapping[Any, Any] = MappingProxyType({})
_BLANK_DIGEST = "0" * 64
_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
_DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in _DTYPES.items()})


@dataclass(frozen=True, eq=False, repr=False)
class SteeringVector:
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
        norms: typical activation norm per site (median over tokens).
        widths: width of each site that is not `hidden_size` wide, such as `z`.
        suggested_strength: strength to use when nobody gives one.
        model_id: hub id or folder name of the model; of an absolute path only the last part is kept.
        model_revision: commit of the hub repository.
        chat_template_sha256: digest of the chat template the prompts were rendered with.
        tokenizer_sha256: digest of the vocabulary.
        readout: which tokens were read.
        data_digest: digest of the contrast set.
        data_source: where the contrast set came from.
        seed: of everything random in the fit.
        paper: what the method implements.
        held_out: figures measured on items it was not fitted on.
        steerkit_version: that fitted it.
        recipe: the exact recipe it was made by.
        extra: what a method wants to add; ``{"weights": {name: digest}}`` ties the vector to those weights.
        fitted_at: where it was fitted; None where that is where it is applied. See `reads`.
        strength: how strongly it is to be applied this time, one number or one per row of the batch; never stored.
        own_scope: whether `at` set the scope, so that it comes before one given for several vectors; never stored.
        own_unit: whether `at` set the unit; never stored.

    Raises:
        VectorFileError: a field of the wrong type, or a tensor with a wrong name, shape, dtype or value.
        StrengthError: a strength that is not a finite number, or an unknown unit.

    Example:
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
    widths: Mapping[Site, int] = field(default_factory=dict)
    suggested_strength: float | None = None
    model_id: str | None = None
    model_revision: str | None = None
    chat_template_sha256: str | None = None
    tokenizer_sha256: str | None = None
    readout: str | None = None
    data_digest: str | None = None
    data_source: str | None = None
    seed: int | None = None
    paper: str | None = None
    held_out: Mapping[str, Any] = field(default_factory=dict)
    steerkit_version: str | None = __version__
    recipe: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    fitted_at: tuple[Site, ...] | None = None
    strength: float | tuple[float, ...] | None = None
    own_scope: bool = False
    own_unit: bool = False

    def __post_init__(self) -> None:
        for name, codec in _CODECS.items():
            value = getattr(self, name)
            if value is None and name not in _REQUIRED and codec not in (_MAPPING, _NORMS, _WIDTHS):
                continue  # not known
            try:
                object.__setattr__(self, name, codec.clean(value))
            except (TypeError, ValueError) as error:
                raise VectorFileError(f"{name}: {error}") from None
        if self.unit not in UNITS:
            raise StrengthError(f"unit {self.unit!r} is unknown; allowed are 'paper' and 'norm'")
        object.__setattr__(self, "strength", _strength("strength", self.strength))
        if self.model_id is not None:
            object.__setattr__(self, "model_id", _public_id(self.model_id))
        for site in (*self.sites, *self.reads):
            if site.layer >= self.num_layers:
                raise VectorFileError(f"{site}: layer {site.layer} is outside 0..{self.num_layers - 1}")
        object.__setattr__(self, "tensors", MappingProxyType(self._checked_tensors()))

    def _checked_tensors(self) -> dict[str, Tensor]:
        """Copies of the tensors, in the order of their names.

        Raises:
            VectorFileError: too many, a wrong name, dtype, shape or value, or a site without any.
        """
        if not 1 <= len(self.tensors) <= MAX_TENSORS:
            raise VectorFileError(f"a vector holds 1 to {MAX_TENSORS} tensors, not {len(self.tensors)}")
        owners = {str(site): (site,) for site in self.sites} | {"shared": self.sites}
        kept: dict[str, Tensor] = {}
        for name in sorted(self.tensors):
            owner, slash, param = name.partition("/")
            if not slash or owner not in owners or re.fullmatch(r"[A-Za-z0-9_.-]+", param) is None:
                listed = ", ".join(owners)
                raise VectorFileError(f"tensor {name!r}: its name must be <site>/<param>, the site one of {listed}")
            kept[name] = _kept(name, self.tensors[name])
            if param == "direction":
                for site in owners[owner]:
                    _check_direction(name, kept[name], self.widths.get(site, self.hidden_size))
        for site in self.sites:
            if not any(name.startswith((f"{site}/", "shared/")) for name in kept):
                raise VectorFileError(f"{site}: the vector holds no tensor for this site")
        return kept

    def __repr__(self) -> str:
        places = ", ".join(map(str, self.sites))
        return f"SteeringVector({self.method} at {places}; {self.model_type}, {self.digest[:12]})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __reduce__(self) -> tuple[Any, ...]:
        # Read-only mappings can neither be copied nor sent to another process.
        return _rebuild, ({entry.name: _thawed(getattr(self, entry.name)) for entry in fields(self)},)

    def _identity(self) -> tuple[Any, ...]:
        return self.digest, self.strength, self.own_scope, self.own_unit

    @property
    def reads(self) -> tuple[Site, ...]:
        """Where it was fitted, and where its directions separate activations: `fitted_at`, else `sites`."""
        return self.sites if self.fitted_at is None else self.fitted_at

    def params(self, site: Site) -> dict[str, Tensor]:
        """The tensors that act at one site: the shared ones and its own.

        Args:
            site: one of `sites`, or of `reads`.

        Returns:
            parameter name to tensor; where both exist, the site's own.

        Raises:
            SiteError: the vector is neither applied nor fitted there.
        """
        if site not in self.sites and site not in self.reads:
            raise SiteError(f"{site}: this vector acts at {', '.join(map(str, self.sites))}")
        found = {}
        for prefix in ("shared/", f"{site}/"):
            found.update({name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)})
        return found

    def at(
        self,
        strength: float | Sequence[float] | Tensor | None = None,
        scope: str | None = None,
        unit: Literal["paper", "norm"] | None = None,
    ) -> SteeringVector:
        """The same vector, to be applied in a given way.

        Args:
            strength: one number, or one per row of the batch; None leaves it.
            scope: which tokens are written; None leaves it.
            unit: what the strength counts in; None leaves it.

        Returns:
            A copy. With another unit it has no suggested strength: that one counts in the old unit.

        Raises:
            StrengthError: a strength that is not finite, an unknown unit, or another unit without a strength in it.
            ScopeError: no scope of that name.
        """
        changes: dict[str, Any] = {}
        if strength is not None:
            changes["strength"] = strength
        if scope is not None:
            changes.update(scope=str(Scope.parse(scope)), own_scope=True)
        if unit is not None:
            changes.update(unit=unit, own_unit=True)
        if unit not in (None, self.unit) and self.suggested_strength is not None:
            if strength is None and self.strength is None:
                raise StrengthError(
                    f"unit {unit!r}: the suggested strength {self.suggested_strength:g} counts in unit {self.unit!r}; "
                    "give a strength too"
                )
            changes["suggested_strength"] = None
        return replace(self, **changes)

    def with_held_out(self, figures: Mapping[str, Any]) -> SteeringVector:
        """The same vector with figures measured on items it was not fitted on.

        Args:
            figures: JSON-like, such as ``{"items": 8, "sites": {...}}``.

        Raises:
            VectorFileError: a value that JSON cannot hold.
        """
        return replace(self, held_out=figures)

    @property
    def digest(self) -> str:
        """What identifies the stored vector: the sha256 of its file with 64 zeros in the digest's place."""
        return hashlib.sha256(self._unsigned()).hexdigest()

    def to_bytes(self) -> bytes:
        """The file's content; the same vector gives the same bytes.

        Raises:
            VectorFileError: text that is no Unicode, or more metadata than a header may hold.
        """
        return _signed(self._unsigned())

    def _unsigned(self) -> bytes:
        metadata = {"format": str(FORMAT), "layer_counting": LAYER_COUNTING, "digest": _BLANK_DIGEST}
        for name, codec in _CODECS.items():
            value = getattr(self, name)
            if name in _REQUIRED or name == "settings" or (value is not None and value != _EMPTY):
                metadata[name] = codec.encode(value)
        return _container(metadata, self.tensors)

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "vector") -> SteeringVector:
        """Read a file's content. Nothing in it is executed.

        Args:
            data: the bytes.
            source: what to call them in messages.

        Raises:
            VectorFileError: anything about the bytes is not as `to_bytes` left it, or they are of a newer format.
        """
        try:
            metadata = _open(data)
            _check_readable(metadata)
            _check_digest(data, metadata["digest"])
            values = {name: _decoded(name, metadata[name]) for name in _CODECS if name in metadata}
            # An older file without a version must not get the present one.
            values.setdefault("steerkit_version", None)
            return cls(tensors=safetensors.torch.load(data), **values)
        except (SteerError, SafetensorError) as error:
            raise VectorFileError(f"{source}: {error}") from None

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all; folders on the way are made.

        Args:
            path: where; a file there is replaced only when the new one is complete on the disk.

        Returns:
            The path.

        Raises:
            VectorFileError: it cannot be written there, or the vector cannot be stored.
        """
        data = self.to_bytes()
        path = Path(path)
        try:
            target = path.resolve()  # a link stays a link
            if target.is_dir():
                raise VectorFileError(f"{path}: is a folder; give the name of a file, such as {path / 'x.safetensors'}")
            write_whole(target, data)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise VectorFileError(f"{path}: cannot be written ({reason}); choose another folder") from None
        return path

    @classmethod
    def load(cls, path: str | Path) -> SteeringVector:
        """Read a vector file.

        Args:
            path: a file that `save` wrote.

        Raises:
            VectorFileError: there is no such file, or it is not exactly what `save` wrote.
        """
        path = Path(path)
        try:
            if path.is_dir():
                raise VectorFileError(f"{path}: is a folder; give a .safetensors file")
            if not path.exists():
                raise VectorFileError(f"{path}: no such file; give a .safetensors file that steerkit saved")
            if not path.is_file():
                raise VectorFileError(f"{path}: is no regular file; give a .safetensors file")
            size = path.stat().st_size
            if size > MAX_FILE_BYTES:
                raise VectorFileError(f"{path}: {size} bytes are too many for a vector (at most {MAX_FILE_BYTES})")
            data = path.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise VectorFileError(f"{path}: cannot be read ({reason})") from None
        return cls.from_bytes(data, source=str(path))

    def check(self, model: nn.Module, tokenizer: Any = None) -> None:
        """Refuse a model that this vector cannot steer; warn of one it was not fitted on.

        Args:
            model: a transformers model, wrapped or not.
            tokenizer: its tokenizer, to compare chat templates.

        Raises:
            VectorMismatchError: the model has another width or depth, or other weights than the vector is tied to.
        """
        inner = inner_model(model)
        facts = model_facts(model, tokenizer)
        width, layers = facts["hidden_size"], facts["num_layers"]
        if (width, layers) != (self.hidden_size, self.num_layers):
            raise VectorMismatchError(
                f"vector fitted on {self.model_type} ({self.num_layers} layers, width {self.hidden_size}) cannot steer "
                f"{type(inner).__name__} ({layers} layers, width {width}): fit one on this model, or load the other"
            )
        if self.extra.get("weights"):
            check_weights(model, self.extra["weights"])
        for name in _COMPARED:
            self._compare(name, facts.get(name))

    def check_template(self, tokenizer: Any) -> None:
        """Warn of another chat template than the vector was fitted with, where both are known.

        Args:
            tokenizer: of the model to be steered.
        """
        self._compare("chat_template_sha256", _template_digest(tokenizer))

    def _compare(self, name: str, theirs: str | None) -> None:
        mine = getattr(self, name)
        if mine is None or theirs is None or mine == theirs or (name == "model_id" and _same_id(mine, theirs)):
            return
        warnings.warn(
            f"the vector was fitted on {_COMPARED[name]} {mine!r}, this is {theirs!r}; "
            "steering may do something else here",
            stacklevel=3,
        )

    def describe(self) -> dict[str, Any]:
        """The facts of this vector as JSON can hold them.

        Returns:
            All that is stored except the numbers of the tensors; per site the tensors' shapes, the direction's norm
            and the activation norm; for edits that add a direction, the strength in both units (the one set, else the
            suggested one, else 1).
        """
        apart = ("sites", "norms", "widths", "fitted_at")
        facts = {name: _json_like(getattr(self, name)) for name in _CODECS if name not in apart}
        return {
            **facts,
            "format": FORMAT,
            "digest": self.digest,
            "layer_counting": LAYER_COUNTING,
            "strength": _json_like(self.strength),
            "sites": [self._describe_site(site) for site in self.sites],
            "fitted_at": [str(site) for site in self.reads],
        }

    def _describe_site(self, site: Site) -> dict[str, Any]:
        params = self.params(site)
        length, norm = _length(params.get("direction")), self.norms.get(site)
        given = self.strength if self.strength is not None else self.suggested_strength
        adds = self.edit.startswith("add")
        strengths: dict[str, Any] = {"paper": None, "norm": None}
        strengths[self.unit] = _json_like(1.0 if given is None and adds else given)
        if adds and length and norm:
            factor = length / norm if self.unit == "paper" else norm / length
            values = strengths[self.unit]
            other = "norm" if self.unit == "paper" else "paper"
            strengths[other] = [value * factor for value in values] if isinstance(values, list) else values * factor
        return {
            "site": str(site),
            "width": self.widths.get(site, self.hidden_size),
            "params": {name: [_DTYPE_NAMES[t.dtype], list(t.shape)] for name, t in sorted(params.items())},
            "direction_norm": length,
            "activation_norm": norm,
            "strength": strengths,
        }


def model_facts(model: nn.Module, tokenizer: Any = None) -> dict[str, Any]:
    """What a vector file says about the model and tokenizer it belongs to.

    Args:
        model: a transformers model, wrapped or not.
        tokenizer: its tokenizer.

    Returns:
        `model_type`, `hidden_size`, `num_layers`, `model_id`, `model_revision` and `chat_template_sha256`, under the
        names of `SteeringVector`'s fields; None where unknown.

    Raises:
        VectorMismatchError: the model has no transformers config.
    """
    config: Any = getattr(inner_model(model), "config", None)
    if not hasattr(config, "get_text_config"):
        raise VectorMismatchError(f"{type(model).__name__} has no config of transformers; pass a model of transformers")
    text = config.get_text_config()
    name = getattr(config, "_name_or_path", None)
    return {
        "model_type": text.model_type,
        "hidden_size": text.hidden_size,
        "num_layers": text.num_hidden_layers,
        "model_id": _public_id(name) if name else None,
        "model_revision": getattr(config, "_commit_hash", None),
        "chat_template_sha256": _template_digest(tokenizer),
    }


def _template_digest(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(str(template).encode()).hexdigest() if template else None


_COMPARED: Mapping[str, str] = MappingProxyType(
    {
        "model_type": "model type",
        "model_id": "model",
        "model_revision": "revision",
        "chat_template_sha256": "the chat template with digest",
    }
)


def _public_id(name: str) -> str:
    """A model's name without the place on this machine: a path gives its last part, a hub snapshot its repository."""
    path = Path(name)
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    if path.is_absolute() or name.startswith((".", "~")):
        return path.resolve().name or name
    return PureWindowsPath(name).name if PureWindowsPath(name).is_absolute() else name


def _same_id(one: str, other: str) -> bool:
    """Whether two ids may be one model: `org/name`, and a local copy called `name`."""
    return ("/" not in one or "/" not in other) and one.rsplit("/", 1)[-1] == other.rsplit("/", 1)[-1]


class _Codec(NamedTuple):
    clean: Callable[[Any], Any]
    """Check and normalise a Python value; TypeError or ValueError says what is wrong."""
    encode: Callable[[Any], str]
    decode: Callable[[str], Any]


def _clean_text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must be a text that is not empty, got {value!r}")
    return value


def _clean_number(value: Any) -> float:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        number = float(value) if is_number else math.nan
    except OverflowError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"must be a finite number, got {value!r}")
    return number


def _clean_whole(value: Any) -> int:
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or abs(value) >= 2**64:
        raise ValueError(f"must be a whole number of at most 64 bits, got {value!r}")
    return int(value)


def _clean_count(value: Any) -> int:
    if _clean_whole(value) < 1:
        raise ValueError(f"must be at least 1, got {value!r}")
    return int(value)


def _clean_sites(value: Any) -> tuple[Site, ...]:
    sites = tuple(value)
    if not sites or len(set(sites)) < len(sites) or not all(isinstance(site, Site) for site in sites):
        raise ValueError(f"must be one or more different sites, got {value!r}")
    return sites


def _by_site(clean: Callable[[Any], Any]) -> Callable[[Any], Mapping[Site, Any]]:
    def cleaned(value: Any) -> Mapping[Site, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(site, Site) for site in value):
            raise ValueError(f"must map sites to numbers, got {value!r}")
        return MappingProxyType({site: clean(number) for site, number in sorted(value.items())})

    return cleaned


def _clean_mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"must be a mapping, got {value!r}")
    frozen: Mapping[str, Any] = _frozen(value)
    return frozen


def _frozen(value: Any, depth: int = 0) -> Any:
    """A JSON-like value that nobody can change."""
    if depth > MAX_NESTING:
        raise ValueError(f"is nested more than {MAX_NESTING} deep")
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"keys must be text, got {wrong[0]!r}")
        return MappingProxyType({key: _frozen(value[key], depth + 1) for key in sorted(value)})
    if isinstance(value, list | tuple):
        return tuple(_frozen(entry, depth + 1) for entry in value)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Real):
        return _clean_whole(value) if isinstance(value, numbers.Integral) else _clean_number(value)
    raise ValueError(f"must hold text, finite numbers, lists and mappings only, got {value!r}")


def _thawed(value: Any) -> Any:
    """The value with plain dicts in place of read-only ones."""
    if isinstance(value, Mapping):
        return {key: _thawed(entry) for key, entry in value.items()}
    return tuple(map(_thawed, value)) if isinstance(value, tuple) else value


def _json_like(value: Any) -> Any:
    """The value with dicts and lists, as JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): _json_like(entry) for key, entry in value.items()}
    return [_json_like(entry) for entry in value] if isinstance(value, tuple) else value


def _rebuild(values: dict[str, Any]) -> SteeringVector:
    return SteeringVector(**values)


def _to_json(value: Any) -> str:
    return json.dumps(_json_like(value), ensure_ascii=False, sort_keys=True, allow_nan=False)


def _site_keys(text: str) -> dict[Site, Any]:
    return {Site.parse(name): value for name, value in json.loads(text).items()}


_TEXT = _Codec(_clean_text, str, str)
_WHOLE = _Codec(_clean_whole, str, int)
_COUNT = _Codec(_clean_count, str, int)
_STRENGTH = _Codec(lambda value: _strength("suggested_strength", value), repr, float)
_MAPPING = _Codec(_clean_mapping, _to_json, json.loads)
_SITES = _Codec(
    _clean_sites,
    lambda sites: json.dumps([str(site) for site in sites]),
    lambda text: tuple(Site.parse(name) for name in json.loads(text)),
)
_NORMS = _Codec(_by_site(_clean_number), _to_json, _site_keys)
_WIDTHS = _Codec(_by_site(_clean_count), _to_json, _site_keys)

_REQUIRED = ("method", "edit", "scope", "unit", "sites", "model_type", "hidden_size", "num_layers")
_CODECS: Mapping[str, _Codec] = MappingProxyType(
    {
        "method": _TEXT,
        "edit": _TEXT,
        "scope": _TEXT,
        "unit": _TEXT,
        "sites": _SITES,
        "model_type": _TEXT,
        "hidden_size": _COUNT,
        "num_layers": _COUNT,
        "settings": _MAPPING,
        "norms": _NORMS,
        "widths": _WIDTHS,
        "suggested_strength": _STRENGTH,
        "model_id": _TEXT,
        "model_revision": _TEXT,
        "chat_template_sha256": _TEXT,
        "tokenizer_sha256": _TEXT,
        "readout": _TEXT,
        "data_digest": _TEXT,
        "data_source": _TEXT,
        "seed": _WHOLE,
        "paper": _TEXT,
        "held_out": _MAPPING,
        "steerkit_version": _TEXT,
        "recipe": _TEXT,
        "extra": _MAPPING,
        "fitted_at": _SITES,
    }
)


def _decoded(name: str, text: str) -> Any:
    """Read one field's text.

    Raises:
        VectorFileError: it is not the text of such a field.
    """
    try:
        return _CODECS[name].decode(text)
    except (TypeError, ValueError, AttributeError, RecursionError, SiteError) as error:
        raise VectorFileError(f"metadata {name!r} cannot be read ({error})") from None


def _strength(name: str, value: Any) -> float | tuple[float, ...] | None:
    """One finite number, or one per row; None stays None.

    Raises:
        StrengthError: anything else.
    """
    if value is None:
        return None
    value = value.tolist() if isinstance(value, Tensor) else value
    try:
        if isinstance(value, Sequence) and not isinstance(value, str) and name == "strength" and len(value):
            return tuple(_clean_number(row) for row in value)
        return _clean_number(value)
    except ValueError as error:
        raise StrengthError(f"{name} {error}") from None


def _kept(name: str, tensor: Any) -> Tensor:
    """A copy of one tensor that nobody else holds.

    Raises:
        VectorFileError: no tensor, an unknown dtype, no numbers, too many dimensions, or one is not finite.
    """
    if not isinstance(tensor, Tensor):
        raise VectorFileError(f"{name} is {type(tensor).__name__}, not a tensor")
    if tensor.dtype not in _DTYPE_NAMES:
        raise VectorFileError(f"{name} has dtype {tensor.dtype}; allowed are floats, integers and bool")
    if tensor.numel() == 0 or tensor.dim() > MAX_DIMENSIONS:
        raise VectorFileError(f"{name} has shape {list(tensor.shape)}; it must hold numbers in 0 to 8 dimensions")
    with torch.inference_mode(mode=False):  # a tensor made in inference mode could not be trained through later
        copy = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(copy).all()):
        raise VectorFileError(f"{name} is not finite; fit again in float32 or bfloat16")
    return copy


def _check_direction(name: str, direction: Tensor, width: int) -> None:
    """Raise VectorFileError where a direction is not as wide as its site."""
    if direction.dim() not in (1, 2) or direction.shape[-1] != width:
        raise VectorFileError(f"{name} has shape {list(direction.shape)}; it must be [{width}] or [k, {width}]")


def _length(direction: Tensor | None) -> float | None:
    """Norm of a direction [d]; of several [k, d] the median of those that are not zero."""
    if direction is None:
        return None
    norms = torch.linalg.vector_norm(direction.float(), dim=-1).reshape(-1)
    norms = norms[norms > 0]
    return float(norms.median()) if len(norms) else 0.0


def _container(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bytes:
    """Lay out a safetensors file, widest dtypes first so that every tensor is aligned.

    Raises:
        VectorFileError: text that is no Unicode, or too much of it.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    parts: list[bytes] = []
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda entry: (-entry[1].dtype.itemsize, entry[0])):
        parts.append(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        begin, end = end, end + len(parts[-1])
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    try:
        head = json.dumps(header, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise VectorFileError(
            f"the metadata holds {error.object[error.start : error.end]!r}, which is no Unicode"
        ) from None
    head += b" " * (-len(head) % 8)
    if len(head) > MAX_HEADER_BYTES:
        raise VectorFileError(f"{len(head)} bytes of metadata are too many (at most {MAX_HEADER_BYTES}); store less")
    return b"".join([len(head).to_bytes(8, "little"), head, *parts])


def _digest_entry(digest: str) -> bytes:
    # Quotes inside JSON text are escaped, so these bytes can stand nowhere else in the header.
    return f'"digest":"{digest}"'.encode()


def _signed(unsigned: bytes) -> bytes:
    """Put the digest in its place."""
    digest = hashlib.sha256(unsigned).hexdigest()
    return unsigned.replace(_digest_entry(_BLANK_DIGEST), _digest_entry(digest), 1)


def _check_digest(data: bytes, stored: str) -> None:
    """Raise VectorFileError where any byte is not as it was when the digest was written."""
    unsigned = data.replace(_digest_entry(stored), _digest_entry(_BLANK_DIGEST), 1)
    if hashlib.sha256(unsigned).hexdigest() != stored:
        raise VectorFileError("altered file: its content does not match its digest; get it anew or fit again")


def _open(data: bytes) -> dict[str, str]:
    """Check the container.

    Returns:
        The metadata.

    Raises:
        VectorFileError: not a safetensors file, or its parts do not fill it exactly.
    """
    header = _header(data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise VectorFileError("its metadata is not text")
    if len(header) > MAX_TENSORS:
        raise VectorFileError(f"{len(header)} tensors are too many (at most {MAX_TENSORS})")
    spans = sorted(_span(name, entry) for name, entry in header.items())
    end = 0
    for begin, stop in spans:
        if begin != end:
            raise VectorFileError(f"damaged: tensor data should begin at byte {end}, the header says {begin}")
        end = stop
    present = len(data) - 8 - int.from_bytes(data[:8], "little")
    if end != present:
        what = "truncated" if present < end else "damaged"
        raise VectorFileError(f"{what}: {present} bytes of tensor data where {end} are expected; get it anew")
    return metadata


def _header(data: bytes) -> dict[str, Any]:
    """The JSON header of a safetensors file.

    Raises:
        VectorFileError: there is none.
    """
    if not data:
        raise VectorFileError("empty file; give a .safetensors file that steerkit saved")
    # A header of 640 bytes begins with 0x80 too; what follows tells it from a pickle.
    if data[8:9] != b"{" and (data[:2] == b"PK" or (data[0] == 0x80 and data[1:2] in (b"\2", b"\3", b"\4", b"\5"))):
        raise VectorFileError("looks like a pickle or a zip of one; pickles are never read, they can run code")
    size = int.from_bytes(data[:8], "little")
    if len(data) < 10 or size > len(data) - 8:
        raise VectorFileError(f"truncated, or no safetensors file: {len(data)} bytes, a header of {size} announced")
    if size > MAX_HEADER_BYTES:
        raise VectorFileError(f"its header of {size} bytes is too long (at most {MAX_HEADER_BYTES})")
    try:
        header = json.loads(data[8 : 8 + size].decode())
    except (ValueError, RecursionError):
        raise VectorFileError("damaged, or no safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise VectorFileError("damaged, or no safetensors file: its header is no JSON object")
    return header


def _span(name: str, entry: Any) -> tuple[int, int]:
    """First byte of a tensor's data and the one after its last.

    Raises:
        VectorFileError: the header's entry for it contradicts itself.
    """
    known = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
    dtype = _DTYPES.get(entry["dtype"]) if known and isinstance(entry["dtype"], str) else None
    shape = _whole_numbers(entry["shape"]) if known else None
    span = _whole_numbers(entry["data_offsets"]) if known else None
    if dtype is None or shape is None or span is None or len(span) != 2 or len(shape) > MAX_DIMENSIONS:
        raise VectorFileError(f"damaged: the header's entry for tensor {name[:80]!r} cannot be read")
    if math.prod(shape) * dtype.itemsize != span[1] - span[0]:
        raise VectorFileError(f"damaged: tensor {name[:80]!r} has a shape that does not fit its bytes")
    return span[0], span[1]


def _whole_numbers(values: Any) -> list[int] | None:
    """The list, if it holds whole numbers from 0 that a file can have."""
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 2**48 for value in values):
        return None
    return values


def _check_readable(metadata: Mapping[str, str]) -> None:
    """Raise VectorFileError for files of other programs, of newer formats, or without what a vector needs."""
    missing = [name for name in ("format", *_REQUIRED, "layer_counting", "digest") if name not in metadata]
    if "layer_counting" in missing and "method" in missing:
        raise VectorFileError("a safetensors file without steerkit's metadata; give one that steerkit saved")
    if "format" in missing:
        raise VectorFileError(f"metadata is missing: {', '.join(missing)}; fit again and save")
    if re.fullmatch("[1-9][0-9]{0,5}", metadata["format"]) is None:
        raise VectorFileError(f"format {metadata['format'][:20]!r} is unknown; this steerkit reads format {FORMAT}")
    if int(metadata["format"]) > FORMAT:
        writer = re.fullmatch(r"[0-9]+(\.[0-9A-Za-z]+)*", metadata.get("steerkit_version", ""))
        wanted = f"'steerkit-hf>={writer[0]}'" if writer else "steerkit-hf"
        raise VectorFileError(
            f"format {metadata['format']} is newer than {FORMAT}, the newest that steerkit {__version__} reads; "
            f"pip install --upgrade {wanted}"
        )
    if missing:
        raise VectorFileError(f"metadata is missing: {', '.join(missing)}; fit again and save")
    if metadata["layer_counting"] != LAYER_COUNTING:
        raise VectorFileError(
            f"layer_counting {metadata['layer_counting'][:80]!r} is unknown; it must be {LAYER_COUNTING!r}"
        )
