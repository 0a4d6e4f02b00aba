"""`Admission`: what a request asks for, checked, and sent to the workers with all that they need.

A request names its composition under `steering`, in vLLM's `extra_args` (over HTTP: `vllm_xargs`): its text, its JSON,
or its JSON as text. What goes on to the workers stands under `CARRIED`: the composition as plain data, and the vector
files' bytes by name, so that no worker depends on files that may be gone.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerkit._support.hub import PREFIX
from steerkit._support.shipped import named_file, vector_names, vector_path
from steerkit.composition.terms import Composition
from steerkit.engines.vllm.plan import Served, TermPlan, digest_of, key_of, planned
from steerkit.engines.vllm.settings import Settings
from steerkit.errors import CompositionError, SiteError, SteerError, VectorFileError
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["ADMISSION", "ASKED", "CARRIED", "READ", "Admission", "carried_plans"]

ASKED, CARRIED, READ = "steering", "steerkit", "steerkit_read"
ADMISSION = "_steerkit"
"""Under which what makes requests keeps its `Admission`."""
_KEPT = 256


class Admission:
    """Reads and checks what requests ask for.

    Args:
        settings: of the server.
        served: the model.

    Raises:
        SteerError: the default composition cannot be had.
    """

    def __init__(self, settings: Settings, served: Served) -> None:
        self._settings, self._served = settings, served
        self._files: OrderedDict[Path, tuple[tuple[int, int], SteeringVector]] = OrderedDict()
        self._plans: OrderedDict[Any, tuple[tuple[TermPlan, ...], dict[str, bytes]]] = OrderedDict()
        self._lock = threading.Lock()
        if settings.default is not None:
            self._carried(Composition.parse(settings.default), 1)

    def admitted(self, extra: Mapping[str, Any] | None, prompt: int) -> dict[str, Any] | None:
        """The `extra_args` of a request as the workers get them.

        Args:
            extra: as the request has them.
            prompt: tokens of its prompt.

        Raises:
            SteerError: the request asks for what cannot be done.
        """
        found = dict(extra or {})
        found.pop(CARRIED, None)
        composition = _composition(found.get(ASKED, self._settings.default))
        if composition is not None:
            carried = self._carried(composition, prompt)
            if carried is not None:
                found[CARRIED] = carried
        if READ in found:
            self.check_reading(found[READ], prompt)
        return found or None

    def no_beams(self) -> str | None:
        """Why beams are not searched for; None where they are steered as any answer.

        Each step of a beam search is a request whose prompt holds what has been answered so far, so only what does not
        depend on the prompt's end is steered alike. And such requests have no words of their own.
        """
        composition = _composition(self._settings.default)
        if composition is None or not any(plan.counts_from_end for plan in self._planned(composition)[0]):
            return None
        return (
            "the default steering of this server counts from the prompt's end, which a beam search moves; sample "
            "instead, or start vLLM without setting 'default'"
        )

    def check_reading(self, asked: Any, prompt: int) -> None:
        """Hold what is to be read to what there is.

        Args:
            asked: under `READ` of a request.
            prompt: tokens of its prompt.

        Raises:
            SiteError: a place that the server does not know.
            CompositionError: something else than what `recording` asks for.
        """
        try:
            sites = [Site.parse(site) for site in asked["sites"]]
            spans = [span for part in asked["sites"].values() for kind in part for span in kind]
            is_whole = isinstance(asked["name"], str) and bool(spans)
            is_whole &= all(0 <= start < end <= prompt for start, end in spans)
        except (AttributeError, KeyError, TypeError, ValueError):
            is_whole = False
        if not is_whole:
            raise CompositionError(f"{READ}: got {repr(asked)[:60]}; give name, and sites with spans")
        for site in sites:
            if site.kind not in self._served.kinds or site.layer >= self._served.num_layers or not self._served.whole:
                known = f"{', '.join(self._served.kinds)} of {self._served.num_layers} blocks"
                raise SiteError(f"{site}: the server knows {known}; see setting 'kinds'")

    def _carried(self, composition: Composition, prompt: int) -> dict[str, Any] | None:
        plans, files = self._planned(composition)
        if not plans:
            return None
        key, first = key_of(plans, prompt)
        whole = any(plan.gate is not None and plan.gate.readout == "mean" for plan in plans)
        facts = {"digest": digest_of(plans), "key": key, "first": first, "whole": whole}
        return {"composition": composition.as_json(), "vectors": files, **facts}

    def _planned(self, composition: Composition) -> tuple[tuple[TermPlan, ...], dict[str, bytes]]:
        """The plans of a composition, and its vectors' bytes by name."""
        names = dict.fromkeys(name for term in composition.terms for name in term.names)
        known = {name: self._vector(name) for name in names}
        made = json.dumps(composition.as_json()), tuple(vector.digest for vector in known.values())
        with self._lock:
            kept = self._plans.get(made)
        if kept is None:
            plans = planned(composition.vectors(known), self._served)
            kept = plans, {name: vector.to_bytes() for name, vector in known.items()}
            with self._lock:
                _keep(self._plans, made, kept)
        return kept

    def _vector(self, name: str) -> SteeringVector:
        """A vector by its name; a file is read again only when it has changed."""
        path = self._path(name)
        try:
            facts = path.stat()
        except OSError:
            raise VectorFileError(f"{name}: there is no such vector file (any more)") from None
        mark = facts.st_mtime_ns, facts.st_size
        with self._lock:
            kept = self._files.get(path)
            if kept is None or kept[0] != mark:
                kept = mark, SteeringVector.load(path)
            _keep(self._files, path, kept)
            return kept[1]

    def _path(self, name: str) -> Path:
        if name.startswith(PREFIX) and not self._settings.hub:
            raise VectorFileError(f"{name}: this server takes nothing from the Hub; start it with setting 'hub'")
        if name.startswith(PREFIX):
            return vector_path(name)
        folder = self._settings.folder
        files = {} if folder is None else {path.stem: path for path in Path(folder).glob("*.safetensors")}
        return named_file(name, {**vector_names(), **files})


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    """Keep something as the newest, and only so many."""
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > _KEPT:
        kept.popitem(last=False)


def _composition(asked: Any) -> Composition | None:
    """The composition of a request; None for a plain one.

    Raises:
        CompositionError: what was asked is none.
    """
    if asked is None or (isinstance(asked, str) and not asked.strip()):
        return None
    if isinstance(asked, str):
        if not asked.lstrip().startswith("{"):
            return Composition.parse(asked)
        try:
            asked = json.loads(asked)
        except ValueError as error:
            raise CompositionError(f"steering: {error} in the JSON of a composition") from None
    if not isinstance(asked, Mapping):
        raise CompositionError(f"steering: got {repr(asked)[:40]}; give a composition's text, or its JSON")
    return Composition.from_json(asked)


def carried_plans(carried: Mapping[str, Any], served: Served) -> tuple[TermPlan, ...]:
    """The plans of what a request carries.

    Args:
        carried: under `CARRIED`.
        served: the model.

    Raises:
        SteerError: it is not what `Admission` made.
    """
    known = {name: SteeringVector.from_bytes(bytes(data), name) for name, data in carried["vectors"].items()}
    try:
        return planned(Composition.from_json(carried["composition"]).vectors(known), served)
    except SteerError as error:
        raise type(error)(f"a request that was admitted cannot be served: {error}") from None
