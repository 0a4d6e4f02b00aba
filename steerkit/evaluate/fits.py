"""One method fitted at any layers of one model, with the activations read once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from steerkit.activations.recording import Activations
from steerkit.errors import SiteError
from steerkit.evaluate.setup import Setup
from steerkit.fitting.fitting import fit, read
from steerkit.methods._base import Method
from steerkit.methods._registry import resolve
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Fits"]


@dataclass
class Fits:
    """One method fitted on one contrast set at any layers; the activations are read once for all of them.

    Attributes:
        setup: gives model, tokenizer and batch size.
        train: what is fitted on.
        method: a name, or a method with its settings.
        layers: every block that will be asked for.
        settings: the method's settings where `method` is a name.
        readout: which tokens are read; None takes the method's own.
        scope: which tokens are written; None takes the method's own.
        kinds: kinds of site, such as ``["mlp_out"]``; None takes those of the method.
        progress: show a progress bar while reading.
        rows: keep every row that is read (`acts`), even where the method needs no more than sums.
    """

    setup: Setup
    train: ContrastSet
    method: str | Method
    layers: Sequence[int]
    settings: Mapping[str, Any] | None = None
    readout: str | int | None = None
    scope: str | None = None
    kinds: Sequence[str] | None = None
    progress: bool = False
    rows: bool = False
    _acts: Activations | None = field(default=None, init=False, repr=False)
    _read: bool = field(default=False, init=False, repr=False)
    _fitted: dict[tuple[int, ...], SteeringVector] = field(default_factory=dict, init=False, repr=False)

    @property
    def kind(self) -> type[Method]:
        """The method's class."""
        return resolve(self.method) if isinstance(self.method, str) else type(self.method)

    @property
    def acts(self) -> Activations | None:
        """What was read; None before the first fit, and where the method reads for itself."""
        return self._acts

    @property
    def method_object(self) -> Method:
        """The method with its settings."""
        return self.kind.from_settings(self.settings or {}) if isinstance(self.method, str) else self.method

    def varied(self, settings: Mapping[str, Any]) -> Fits:
        """The same by the method with some settings changed; the method itself where there are none.

        Args:
            settings: name to value.

        Raises:
            UnknownNameError: the method has no such setting.
            FitError: a value that it does not take.
        """
        if not settings:
            return self
        own = self.method_object.settings
        return replace(self, method=self.kind.from_settings({**own, **settings}), settings=None)

    def sites(self, layers: Iterable[int]) -> list[Site]:
        """The method's own sites at some layers, or those of the kinds asked for.

        Args:
            layers: blocks counted from 0.
        """
        chosen = sorted(set(layers))
        if self.kinds is None:
            return self.method_object.sites_at(self.setup.decoder, chosen)
        return [Site(layer, kind) for layer in chosen for kind in dict.fromkeys(self.kinds)]

    def at(self, layers: Sequence[int]) -> SteeringVector:
        """The vector fitted at some layers.

        Args:
            layers: blocks counted from 0, all of them among `self.layers`.

        Raises:
            SteerError: see `steerkit.fit`.
        """
        key = tuple(sorted(set(layers)))
        if key not in self._fitted:
            common: dict[str, Any] = {
                "method": self.method,
                "settings": self.settings,
                "batch_size": self.setup.batch_size,
                "chat_template_kwargs": self.setup.chat_template_kwargs,
            }
            model, tokenizer = self.setup.model, self.setup.tokenizer
            if not self._read:
                every = self._possible(self.sites({*self.layers, *key}))
                options: dict[str, Any] = {"readout": self.readout, "progress": self.progress, "rows": self.rows}
                self._acts = read(model, tokenizer, self.train, sites=every, **options, **common)
                self._read = True
            vector = fit(model, tokenizer, self.train, sites=self.sites(key), acts=self._acts, **common)
            self._fitted[key] = vector if self.scope is None else replace(vector, scope=self.scope)
        return self._fitted[key]

    def _possible(self, sites: list[Site]) -> list[Site]:
        """The sites that this model has: a layer without one must not spoil the others."""
        try:
            locate(self.setup.model, sites)
        except SiteError:
            return [site for site in sites if self._is_there(site)]
        return sites

    def _is_there(self, site: Site) -> bool:
        try:
            locate(self.setup.model, [site])
        except SiteError:
            return False
        return True
