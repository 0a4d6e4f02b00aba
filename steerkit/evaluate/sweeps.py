"""Sweeps: the same figures at many layers and strengths, kept row by row so that a killed sweep goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steerkit._support.files import write_whole
from steerkit.activations.recording import Activations
from steerkit.errors import DataError, SiteError, SteerError
from steerkit.evaluate.curve import random_like
from steerkit.evaluate.scorers._base import Scorer
from steerkit.evaluate.scoring import Measured, identity_of, measure, scorer_of
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.store_identity import digest_of, setup_identity
from steerkit.fitting.fitting import fit, read
from steerkit.methods._base import Method
from steerkit.methods._registry import resolve
from steerkit.network.sites import Site, parse_layers
from steerkit.network.tap import locate
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Fits", "Point", "Store", "measure_point", "parse_candidates", "save_table", "sweep"]


@dataclass(frozen=True)
class Point:
    """One place of a sweep.

    Attributes:
        layers: where the vector acts; empty for the unsteered model.
        strength: how strongly, in the vector's unit; None for the unsteered model.
        scores: column name to figure.
        random: the first figure under each of some random directions of the same norm.
    """

    layers: tuple[int, ...]
    strength: float | None
    scores: Mapping[str, Measured]
    random: tuple[float, ...] = ()

    def as_row(self) -> dict[str, Any]:
        """Plain data for JSON."""
        scores = {name: measured.as_row() for name, measured in self.scores.items()}
        return {"layers": list(self.layers), "strength": self.strength, "scores": scores, "random": list(self.random)}


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
    _acts: Activations | None = field(default=None, init=False, repr=False)
    _read: bool = field(default=False, init=False, repr=False)
    _fitted: dict[tuple[int, ...], SteeringVector] = field(default_factory=dict, init=False, repr=False)

    @property
    def kind(self) -> type[Method]:
        """The method's class."""
        return resolve(self.method) if isinstance(self.method, str) else type(self.method)

    @property
    def method_object(self) -> Method:
        """The method with its settings."""
        return self.kind.from_settings(self.settings or {}) if isinstance(self.method, str) else self.method

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
                readout, progress = self.readout, self.progress
                self._acts = read(
                    model, tokenizer, self.train, sites=every, readout=readout, progress=progress, **common
                )
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


class Store:
    """Rows of figures by what they depend on, in a file that grows line by line.

    A line that a killed run left torn is not read. A row is found again only if nothing it depends on has changed:
    weights, precision, revision, template, vocabulary, library versions, every text, the vector, the strength, the
    scorers and their settings.

    Args:
        path: a JSONL file, made when the first row is kept; None keeps rows in memory only.

    Raises:
        SteerError: the file cannot be read.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._rows: dict[str, dict[str, Any]] = {}
        if path is None or not path.exists():
            return
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise SteerError(f"{path}: cannot be read ({error.strerror}); choose another folder") from None
        for line in lines:
            try:
                entry = json.loads(line)
                self._rows[entry["key"]] = entry["scores"]
            except (ValueError, KeyError, TypeError):
                continue
        if lines[-1]:  # a torn line: what follows must not be glued to it
            self._append(b"\n")

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: str) -> dict[str, Any] | None:
        """The row kept under a key, if there is one.

        Args:
            key: a digest.
        """
        return self._rows.get(key)

    def put(self, key: str, scores: Mapping[str, Any], **notes: Any) -> None:
        """Keep a row, on the disk before this returns.

        Args:
            key: a digest.
            scores: plain data.
            notes: what people who look into the file want to see.

        Raises:
            SteerError: the file cannot be written.
        """
        self._rows[key] = dict(scores)
        self._append(json.dumps({"key": key, **notes, "scores": scores}).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as handle:
                handle.write(line)
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise SteerError(f"{self._path}: cannot be written ({error.strerror}); choose another folder") from None


def measure_point(
    setup: Setup,
    vector: SteeringVector | None,
    strength: float | None,
    scorers: Sequence[Scorer],
    *,
    identity: str,
    store: Store,
    seed: int = 0,
) -> dict[str, Measured]:
    """Measure one trial, or take its figures from the store.

    Args:
        setup: model, tokenizer and items.
        vector: what steers; None measures the unsteered model.
        strength: in the vector's unit.
        scorers: what is measured.
        identity: digest of `setup_identity(setup)`.
        store: where figures are kept.
        seed: fixes the intervals.
    """
    used = None if vector is None else [vector.digest, vector.scope, vector.unit, vector.strength]
    key = digest_of([identity, used, strength, [identity_of(scorer) for scorer in scorers], seed])
    kept = store.get(key)
    if kept is not None:
        columns = {name: column for scorer in scorers for name, column in scorer.columns.items()}
        return {name: Measured.from_row(columns[name], row) for name, row in kept.items()}
    trial = setup.baseline if vector is None else setup.trial(vector, strength)
    found = measure(trial, scorers, seed=seed)
    layers = [] if vector is None else [site.layer for site in vector.sites]
    store.put(key, {name: one.as_row() for name, one in found.items()}, layers=layers, strength=strength)
    return found


def sweep(
    setup: Setup,
    fits: Fits,
    candidates: Sequence[Sequence[int]],
    strengths: Sequence[float],
    *,
    scorers: Sequence[str | Scorer] = ("preference_margin", "divergence", "repetition"),
    store: Store | None = None,
    controls: int = 1,
    seed: int = 0,
    step: Callable[[], None] = lambda: None,
) -> Iterator[Point]:
    """Measure a method at every set of layers and every strength, the unsteered model first.

    Args:
        setup: model, tokenizer and held-out items.
        fits: the method and what it is fitted on.
        candidates: sets of layers.
        strengths: in the vectors' unit; at the method's neutral strength the unsteered figures are given.
        scorers: what is measured.
        store: figures already there are not measured again; None keeps none.
        controls: random directions beside every point, on which the first scorer runs.
        seed: fixes the random directions and the intervals.
        step: called after each point, for a progress bar.

    Yields:
        The points, in the order of the candidates and of the strengths.

    Raises:
        DataError: no candidates or strengths, or the items lack what a scorer needs.
    """
    if not candidates or not strengths:
        raise DataError(f"sweep: got {len(candidates)} sets of layers and {len(strengths)} strengths; give both")
    chosen, kept = [scorer_of(scorer) for scorer in scorers], Store() if store is None else store
    identity = digest_of(setup_identity(setup))
    common: dict[str, Any] = {"identity": identity, "store": kept, "seed": seed}
    baseline = measure_point(setup, None, None, chosen, **common)
    yield Point((), None, baseline)
    step()
    for layers in candidates:
        vector = fits.at(layers)
        randoms = [random_like(vector, seed=seed + 1 + number) for number in range(controls)]
        for strength in strengths:
            key = tuple(sorted(set(layers)))
            if strength == fits.kind.neutral:
                yield Point(key, strength, baseline)
            else:
                scores = measure_point(setup, vector, strength, chosen, **common)
                others = [measure_point(setup, one, strength, chosen[:1], **common) for one in randoms]
                random = tuple(next(iter(other.values())).estimate.mean for other in others)
                yield Point(key, strength, scores, random)
            step()


def parse_candidates(text: str, num_layers: int) -> list[tuple[int, ...]]:
    """Read sets of layers as the command line writes them.

    Args:
        text: sets parted by commas: ``8`` one block, ``8-12`` each of them on its own (both ends included), ``12+14``
            both together.
        num_layers: of the model.

    Returns:
        The sets, none twice.

    Raises:
        SiteError: it means nothing, or a block does not exist.
    """
    found: list[tuple[int, ...]] = []
    for part in text.replace(" ", "").split(","):
        if "+" in part:
            found.append(tuple(sorted({layer for one in part.split("+") for layer in parse_layers(one, num_layers)})))
        else:
            found += [(layer,) for layer in parse_layers(part, num_layers)]
    return list(dict.fromkeys(found))


def save_table(points: Sequence[Point], path: Path) -> Path:
    """Write points as a table, one line per point and column, whole or not at all.

    Args:
        points: the points.
        path: a .jsonl or .parquet file.

    Returns:
        The path.

    Raises:
        SteerError: another ending, pyarrow is missing, or it cannot be written.
    """
    rows = [
        {
            "layers": "+".join(map(str, point.layers)),
            "strength": point.strength,
            "column": name,
            **measured.as_row(),
            "random": list(point.random) if place == 0 else [],
        }
        for point in points
        for place, (name, measured) in enumerate(point.scores.items())
    ]
    if path.suffix == ".parquet":
        import io

        try:
            from pyarrow import Table, parquet
        except ImportError:
            raise SteerError(f"{path}: parquet needs pyarrow; pip install 'steerkit-hf[datasets]'") from None

        names = list(dict.fromkeys(name for row in rows for name in row))
        buffer = io.BytesIO()
        parquet.write_table(Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), buffer)
        data = buffer.getvalue()
    elif path.suffix == ".jsonl":
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        raise SteerError(f"{path}: a table is a .jsonl or a .parquet file")
    try:
        write_whole(path, data)
    except OSError as error:
        raise SteerError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None
    return path
