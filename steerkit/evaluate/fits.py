"""One method fitted at any layers of one model, with the activations read once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from steerkit.activations.recording import Activations
from steerkit.errors import SiteError
from steerkit.evaluate.setup import Setup
from steerkit.fitting.fitting import fit, read
from steerkit.methods._base import Method
from steerkit.methods._protocols import PreparesData
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
        whole: the same on a set that `train` is a part of: then it is read once for both.
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
    whole: Fits | None = None
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

    def part(self, train: ContrastSet) -> Fits:
        """The method fitted on some of the items, whose activations are read once for these and for all of them.

        Args:
            train: made of items of `self.train` (the very objects).
        """
        method = self.method_object
        is_read = self.rows and method.readout is not None and not isinstance(method, PreparesData)
        return replace(self, train=train, whole=self if is_read else None, rows=is_read)

    def at(self, layers: Sequence[int]) -> SteeringVector:
        """The vector fitted at some layers.

        Args:
            layers: blocks counted from 0, all of them among `self.layers`.

        Raises:
            SteerError: see `steerkit.fit`.
        """
        key = tuple(sorted(set(layers)))
        if key not in self._fitted:
            self._read_once(key)
            vector = fit(data=self.train, sites=self.sites(key), acts=self._acts, **self._options())
            self._fitted[key] = vector if self.scope is None else replace(vector, scope=self.scope)
        return self._fitted[key]

    def _options(self) -> dict[str, Any]:
        return {
            "model": self.setup.model,
            "tokenizer": self.setup.tokenizer,
            "method": self.method,
            "settings": self.settings,
            "batch_size": self.setup.batch_size,
            "chat_template_kwargs": self.setup.chat_template_kwargs,
        }

    def _read_once(self, layers: Sequence[int]) -> None:
        """Read at all layers that will be asked for, and at these."""
        if self._read:
            return
        if self.whole is not None:
            self.whole._read_once(layers)
            self._acts = None if self.whole.acts is None else _some(self.whole.acts, self.whole.train, self.train)
        else:
            every = self._possible(self.sites({*self.layers, *layers}))
            how: dict[str, Any] = {**self._options(), "readout": self.readout, "progress": self.progress}
            how |= {"rows": self.rows}
            self._acts = read(data=self.train, sites=every, **how)
        self._read = True

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


def _some(acts: Activations, whole: ContrastSet, part: ContrastSet) -> Activations:
    """Of what was read of a set, the rows of a part of it; how long activations are is told of the whole."""
    sides = []
    for every, some, rows in (
        (whole.positive, part.positive, acts.positive),
        (whole.negative, part.negative, acts.negative),
    ):
        places = {id(item): row for row, item in enumerate(every)}
        taken = torch.tensor([places[id(item)] for item in some], dtype=torch.long)
        sides.append({site: found[taken] for site, found in rows.items()})
    return replace(acts, positive=sides[0], negative=sides[1], paired=part.paired)
