"""`fit`: a method, a contrast set and a model in; a `SteeringVector` out, with what is needed to use it right."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

import steerkit
from steerkit.activations.reading import Reads, read_passes
from steerkit.activations.readout import NO_MASSIVE
from steerkit.activations.recording import Activations, record
from steerkit.activations.streaming import stream
from steerkit.activations.token_scale import TokenScale
from steerkit.errors import DataError, FitError, SiteError, UnknownNameError
from steerkit.fitting.subject import BEYOND, ModelSubject
from steerkit.methods._authoring import check_fitted, class_problem, fitted_tensors
from steerkit.methods._base import Method, has_sides
from steerkit.methods._protocols import AddsFacts, PreparesData, SetsOperatingPoint, TiedToWeights
from steerkit.methods._registry import method_names, registration_problem, resolve
from steerkit.network.decoder import Decoder, find_decoder
from steerkit.network.kernel_share import PROJECTED, seen_shares
from steerkit.network.sites import Site, parse_layers
from steerkit.network.tap import Tap, locate
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Prompt
from steerkit.prompts.prompt_set import PromptSet
from steerkit.prompts.rendering import answer_separator, warn_of_separator
from steerkit.prompts.splitting import warn_of_known_items
from steerkit.vector.model_identity import model_facts
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["fit", "read", "tokenizer_digest"]

_HALF = 0.5
_DIGESTS: WeakKeyDictionary[Any, tuple[int, str]] = WeakKeyDictionary()


def fit(
    model: nn.Module,
    tokenizer: Any,
    data: ContrastSet | PromptSet | Sequence[Prompt],
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
    shares: bool = True,
    reads: Reads = read_passes,
) -> SteeringVector:
    """Learn a steering vector from a contrast set.

    Args:
        model: any decoder-only transformers model; unchanged afterwards.
        tokenizer: its tokenizer; unchanged afterwards.
        data: the contrast set (for `actadd`: one pair of raw prompts), or, for methods without sides (`melbo`), a list
            of prompts; of a contrast set they take the prompts of both sides.
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
        shares: run what texts have in common once (a system prompt, the prompt of two answers), where the model can go
            on from a cache: fewer tokens, and the same up to rounding. False runs every text as a whole, to the bit.
        reads: what runs the texts, such as an engine with the model's weights; the model itself where nothing else is
            named. Methods that ask more of the model than activations then fail.

    Returns:
        The fitted vector, with norms, digests and settings.

    Raises:
        UnknownNameError: no such method or setting.
        SiteError: a layer or site does not exist in this model, or both were given.
        DataError: the data has no token to read, or `actadd` got more than one pair.
        FitError: the sides do not differ, or activations are not finite; the site is named. Or the method asks more of
            the model than `reads` gives.

    Warns:
        UserWarning: a held-out item asks what an item of the data asks; the model has no chat template and items have
            answers: it says what stands before them; or the edit reads along a direction at the heads or neurons of
            which the projection behind them sees less than half.
    """
    chosen = _method(method, settings)
    data = _data(chosen, data)
    decoder = find_decoder(model)
    taps = locate(model, _sites(chosen, decoder, layers, sites))
    reading = chosen.readout if readout is None else readout
    common: dict[str, Any] = {"chat_template_kwargs": chat_template_kwargs, "batch_size": batch_size, "reads": reads}
    told: dict[str, Any] = {"name": chosen.name, "readout": reading, "progress": progress}
    subject = ModelSubject(model, tokenizer, data, decoder, **common, **told)
    if isinstance(data, ContrastSet):  # prompts have no answers to stand before
        warn_of_separator(tokenizer, (*data.positive, *data.negative), chat_template_kwargs)
    if acts is None:
        _refuse_unread(chosen, readout, held_out, reads)
        if isinstance(data, ContrastSet) and chosen.readout is not None:
            how: dict[str, Any] = {"progress": progress, "shares": shares, **common}
            acts = _read(model, tokenizer, data, chosen, list(taps), reading, **how)
    vector = _vector(chosen, subject, acts, model, taps, tokenizer, data)
    if isinstance(data, ContrastSet) and isinstance(chosen, SetsOperatingPoint) and acts is not None:
        vector = chosen.settled(vector, data, acts)
    vector = replace(vector, answer_separator=answer_separator(tokenizer, chat_template_kwargs))
    if held_out is None or acts is None or not isinstance(data, ContrastSet):
        return vector
    from steerkit.fitting.held_out import separation

    warn_of_known_items(data.sides, held_out.sides)
    measured = separation(model, tokenizer, held_out, vector, shares=shares, **common)
    return vector.with_held_out(measured)


def _data(method: Method, data: Any) -> ContrastSet | PromptSet:
    """What the method is fitted on, in its form.

    Raises:
        DataError: it has no sides and the method needs them, or it is no data.
    """
    if not has_sides(method):
        return PromptSet.of(data)
    if not isinstance(data, ContrastSet):
        raise DataError(
            f"fit: got {type(data).__name__} for data; make a ContrastSet of it (from_prompts, from_answers, ...)"
        )
    return data


def _refuse_unread(method: Method, readout: Any, held_out: ContrastSet | None, reads: Reads) -> None:
    """Refuse what a method that records for itself has no use for, and a method that has no use for an engine.

    Raises:
        DataError: a readout, or held-out items to be separated.
        FitError: the method's vectors hold something of the weights, and an engine has them.
    """
    if reads is not read_passes and isinstance(method, TiedToWeights):
        raise FitError(f"{method.name}: {BEYOND}")
    if method.readout is None and readout is not None:
        raise DataError(f"{method.name} reads for itself; leave readout={readout!r} out")
    if method.readout is None and held_out is not None:
        raise DataError(f"{method.name} has no direction to separate held-out items by; leave held_out out")


def _vector(
    method: Method,
    subject: ModelSubject,
    acts: Activations | None,
    model: nn.Module,
    taps: Mapping[Site, Tap],
    tokenizer: Any,
    data: ContrastSet | PromptSet,
) -> SteeringVector:
    """Fit the method at the sites of the taps, and put what it found together with all that a file says.

    Raises:
        FitError: activations are missing at a site, or what was fitted is not finite or not what the method declares.
    """
    places, decoder = list(taps), subject.decoder
    missing = [site for site in places if acts is not None and site not in acts.positive]
    if missing:
        raise FitError(f"{method.name}: acts were not read at {', '.join(map(str, missing))}; read them there too")
    tensors = fitted_tensors(method, method.fit(acts, subject, places))
    written = method.written(places, tensors, decoder)
    check_fitted(method, tensors, written)
    if written != places:
        taps = locate(model, written)
        written = list(taps)
    reads = method.read_at(places, tensors)
    scales = {site: acts.scales[site] for site in places if site in reads} if acts is not None else {}
    facts = method.extra(subject, written) if isinstance(method, AddsFacts) else {}
    if acts is not None and acts.readout.endswith(NO_MASSIVE):
        left_out = {str(site): scale.left_out for site, scale in scales.items()}
        facts = {**facts, "massive_tokens_left_out": left_out}
    if seen := _seen_shares(method, decoder, tensors, written):
        facts = {**facts, "seen_share": seen}
    scales = {**subject.scales([*reads, *written]), **scales}
    return SteeringVector(
        method=method.name,
        tensors=tensors,
        sites=tuple(written),
        fitted_at=None if written == reads else tuple(reads),
        edit=method.edit_name,
        scope=method.default_scope,
        unit="paper",
        settings=method.settings,
        norms={site: scale.norm for site, scale in scales.items() if math.isfinite(scale.norm)},
        spreads=_spreads(method, tensors, written, scales),
        massive={site: scale.massive for site, scale in scales.items() if scale.massive},
        widths={site: tap.width for site, tap in taps.items() if tap.width != decoder.hidden_size},
        tokenizer_sha256=tokenizer_digest(tokenizer),
        readout=acts.readout if acts is not None else None,
        data_digest=data.digest,
        data_source=data.source or None,
        paper=method.paper,
        extra=facts,
        steerkit_version=steerkit.__version__,
        **model_facts(decoder.model, tokenizer),
    )


def _seen_shares(
    method: Method, decoder: Decoder, tensors: Mapping[str, Tensor], written: Sequence[Site]
) -> dict[str, float]:
    """How much of each direction the one matrix behind its site sees.

    Warns:
        UserWarning: less than half of a direction along which the edit reads a coordinate.
    """
    directions = {site: tensors.get(f"{site}/direction") for site in written if site.kind in PROJECTED}
    vectors = {site: one for site, one in directions.items() if one is not None and one.dim() == 1}
    found = seen_shares(decoder, vectors) if vectors else {}
    low = [site for site, share in found.items() if share < _HALF]
    if low and not method.edit_name.startswith("add"):
        warnings.warn(
            f"{method.name} at {low[0]}: the projection behind it sees {found[low[0]]:.0%} of the direction, and the "
            "edit sets a coordinate that is measured along all of it, dormant parts too; fit at "
            f"{PROJECTED[low[0].kind]}, or compare with the seen part alone (steerkit.network.kernel_share)",
            stacklevel=4,
        )
    return {str(site): round(share, 4) for site, share in found.items()}


def _spreads(
    method: Method, tensors: Mapping[str, Tensor], written: Sequence[Site], scales: Mapping[Site, TokenScale]
) -> dict[Site, float]:
    """How far tokens spread at each written site, along what the method adds there."""
    found = {}
    for site in written:
        direction = tensors.get(f"{site}/direction")
        if site in scales and direction is not None and direction.shape[-1] == len(scales[site].deviation):
            found[site] = scales[site].spread(direction)
    return {site: spread for site, spread in found.items() if math.isfinite(spread)}


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
    rows: bool = False,
    shares: bool = True,
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
        rows: keep every row, even where the method needs no more than sums.
        shares: see `fit`.

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
    how: dict[str, Any] = {"progress": progress, "rows": rows, "shares": shares}
    how |= {"batch_size": batch_size, "chat_template_kwargs": chat_template_kwargs}
    return _read(model, tokenizer, data, chosen, places, reading, **how)


def _method(method: str | Method, settings: Mapping[str, Any] | None) -> Method:
    """The method with its settings, its class found good.

    Raises:
        FitError: it is no method, lacks what every method has, or another class answers to its name.
        UnknownNameError: no such method, or settings beside a method that has its own.
    """
    if isinstance(method, str):
        return resolve(method).from_settings(settings or {})
    kind: Any = method if isinstance(method, type) else type(method)
    if not issubclass(kind, Method):
        given = f"the class {kind.__name__}" if isinstance(method, type) else kind.__name__
        raise FitError(f"fit: got {given} for method; give a name of `steerkit methods`, or a Method such as CAA()")
    problem = class_problem(kind)
    if problem:
        raise FitError(f"{kind.__name__} {problem}")
    if isinstance(method, Method) and settings:
        raise UnknownNameError(f"{method.name}: give settings to the method itself, not beside it")
    taken = registration_problem(kind) if kind.name in method_names() else None
    if taken:
        raise FitError(taken)
    return method if isinstance(method, Method) else kind.from_settings(settings or {})


def _sites(
    method: Method,
    decoder: Decoder,
    layers: str | int | Sequence[int] | None,
    sites: Sequence[Site | str] | Site | str | None,
) -> list[Site]:
    """Where to fit: the sites or layers that were asked for, else the method's own."""
    if layers is not None and sites is not None:
        raise SiteError("fit: got both layers and sites; give one of them")
    if isinstance(sites, str | int | Site):
        sites = [sites]
    if sites is not None:
        chosen = list(map(Site.of, sites))
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
    *,
    batch_size: int,
    chat_template_kwargs: Mapping[str, Any] | None,
    progress: bool,
    shares: bool,
    rows: bool = False,
    reads: Reads = read_passes,
) -> Activations:
    """Stream where the method needs only statistics, keep the samples where it needs them."""
    common: dict[str, Any] = {
        "readout": readout,
        "batch_size": batch_size,
        "chat_template_kwargs": chat_template_kwargs,
        "max_tokens": method.longest_text if isinstance(method, PreparesData) else None,
        "progress": progress,
        "shares": shares,
        "reads": reads,
    }
    data = method.contrast(data) if isinstance(method, PreparesData) else data
    streams = {site: method.statistics(site) for site in places}
    kept = {site: accumulator for site, accumulator in streams.items() if accumulator is not None}
    if len(kept) == len(places) and not rows:
        return stream(model, tokenizer, data, kept, **common)
    return record(model, tokenizer, data, places, **common)


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of the vocabulary, the one thing every tokenizer has; made anew where tokens have been added since.

    Args:
        tokenizer: a transformers tokenizer.
    """
    size = len(tokenizer)
    if _DIGESTS.get(tokenizer, (None, ""))[0] != size:
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        text = "\n".join(f"{index} {token}" for token, index in vocabulary)
        _DIGESTS[tokenizer] = size, hashlib.sha256(text.encode()).hexdigest()
    return _DIGESTS[tokenizer][1]
