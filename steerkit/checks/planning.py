"""`plan`: what a steering would do, before it is done. Nothing is attached but for the time that is measured.

For every vector and site: the module, the tensor's shape, device and dtype, the scope and the strength in both units.
What the model lacks is reported with the reason instead of raised, so that one run shows every mistake. Memory is
counted from the config, time is measured on a few passes.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from steerkit.errors import DataError, SteerError
from steerkit.methods._registry import default_strength, method_of
from steerkit.network.decoder import Decoder, execution_device, find_decoder, inner_model
from steerkit.network.sites import Site
from steerkit.network.tap import Tap, locate
from steerkit.steering.steering import steer
from steerkit.steering.strengths import Strength, strength_value, vectors_of
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Memory", "PlannedEdit", "SteeringPlan", "Time", "plan"]

TIMED_PROMPT = 16
TIMED_STEPS = 5
ROUNDS = 2


@dataclass(frozen=True)
class PlannedEdit:
    """One vector at one site.

    Attributes:
        vector: which of the vectors given, from 1.
        method: its method.
        site: where it is applied.
        module: name of the hooked module inside the transformers model; None where there is none.
        module_class: its class.
        side: whether its input or its output is written.
        shape: of the tensor in the pass over the prompt, [b, t, d] ([b*t, d] where the module has it flat); a decoding
            step has t = 1.
        device: where the module runs.
        dtype: of the tensor.
        scope: which tokens are written.
        paper: the strength in the method's own unit; a list where every row has its own.
        norm: the same in typical activation norms; None where the file knows no norm or the method no length.
        problem: why this cannot be done; None where it can.
    """

    vector: int
    method: str
    site: str
    module: str | None = None
    module_class: str | None = None
    side: str | None = None
    shape: tuple[int, ...] | None = None
    device: str | None = None
    dtype: str | None = None
    scope: str | None = None
    paper: float | tuple[float, ...] | None = None
    norm: float | tuple[float, ...] | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Memory:
    """A forecast in bytes.

    Attributes:
        parameters: the model's weights.
        vectors: the vectors' tensors.
        cache: keys and values of all rows for prompt and answer.
        activations: what a pass over the prompt holds at once, roughly.
        note: what is not counted; None where nothing is left out.
    """

    parameters: int
    vectors: int
    cache: int
    activations: int
    note: str | None

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.vectors + self.cache + self.activations


@dataclass(frozen=True)
class Time:
    """A forecast in seconds, from passes over a short prompt, for one batch.

    Attributes:
        prefill: the pass over the prompt, unsteered.
        step: one decoding step, unsteered.
        steered_prefill: the pass over the prompt, steered.
        steered_step: one decoding step, steered.
        total: prompt and answer, unsteered.
        steered_total: prompt and answer, steered.
    """

    prefill: float
    step: float
    steered_prefill: float
    steered_step: float
    total: float
    steered_total: float


@dataclass(frozen=True)
class SteeringPlan:
    """What a steering would do.

    Attributes:
        model: the model's class.
        batch_size: rows.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens of each answer.
        edits: every vector at every site, in order.
        problems: why it cannot be done.
        warnings: what may make it do something else than it did where it was fitted.
        memory: a forecast.
        time: a forecast; None where it was not measured.
    """

    model: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    edits: tuple[PlannedEdit, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    memory: Memory
    time: Time | None

    @property
    def ok(self) -> bool:
        """Whether `steer` would take it."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON can hold it, with `ok` and the memory's total."""
        found = asdict(self)
        found["memory"]["total"] = self.memory.total
        return {"ok": self.ok, **found}


def plan(
    model: nn.Module,
    vectors: SteeringVector | Sequence[SteeringVector],
    *,
    strength: Strength | None = None,
    scope: str | None = None,
    unit: Literal["paper", "norm"] | None = None,
    tokenizer: Any = None,
    batch_size: int = 8,
    prompt_tokens: int = 64,
    new_tokens: int = 128,
    measure: bool = True,
) -> SteeringPlan:
    """Find out what `steer` would do with these arguments, and what it would cost.

    Args:
        model: any decoder-only transformers model, wrapped or not.
        vectors: one vector or several.
        strength: as for `steer`.
        scope: as for `steer`.
        unit: as for `steer`.
        tokenizer: the model's, to compare chat templates and for scopes by role.
        batch_size: rows of the forecast.
        prompt_tokens: tokens of each prompt in the forecast.
        new_tokens: tokens of each answer in the forecast.
        measure: measure the time, where there is no problem; runs a few short passes.

    Returns:
        The plan; its `ok` says whether `steer` would take it.

    Raises:
        DataError: a size below 1.
        SiteError: no decoder whose blocks can be found.
        VectorFileError: something else than vectors, or none.
    """
    for name, size in {"batch_size": batch_size, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}.items():
        if size < 1:
            raise DataError(f"{name} is at least 1, got {size}")
    listed, decoder = vectors_of(vectors), find_decoder(model)
    options: dict[str, Any] = {"strength": strength, "scope": scope, "unit": unit, "tokenizer": tokenizer}
    edits: list[PlannedEdit] = []
    problems: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, vector in enumerate(listed, start=1):
            own, found = _edits(model, decoder, vector, number, options, tokenizer)
            edits += [replace(edit, shape=_shape(edit, batch_size, prompt_tokens)) for edit in own]
            problems += found
    timed = None
    if measure and not problems:
        try:
            timed = _time(model, decoder, listed, options, batch_size, prompt_tokens, new_tokens)
        except SteerError as error:  # what only a pass can tell, such as the number of rows
            problems.append(str(error))
    return SteeringPlan(
        model=type(decoder.model).__name__,
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        edits=tuple(edits),
        problems=tuple(dict.fromkeys(problems)),
        warnings=tuple(dict.fromkeys(str(warning.message) for warning in caught)),
        memory=_memory(model, decoder, listed, batch_size, prompt_tokens, new_tokens),
        time=timed,
    )


def _edits(
    model: nn.Module,
    decoder: Decoder,
    vector: SteeringVector,
    number: int,
    options: dict[str, Any],
    tokenizer: Any,
) -> tuple[list[PlannedEdit], list[str]]:
    """One vector at its sites, and what is wrong with it."""
    try:
        vector.check(model, tokenizer)
    except SteerError as error:
        return [PlannedEdit(number, vector.method, str(site), problem=str(error)) for site in vector.sites], [
            str(error)
        ]
    try:
        steer(model, vector, **options)
    except SteerError:
        edits = [_edit(model, decoder, vector, number, site, options) for site in vector.sites]
    else:
        taps = locate(model, vector.sites).values()  # all at once: a pass for each would take its time
        edits = [
            _described(decoder, vector, number, site, tap, options)
            for site, tap in zip(vector.sites, taps, strict=True)
        ]
    problems = [edit.problem for edit in edits if edit.problem is not None]
    if all(edit.module is None for edit in edits):
        problems.append(f"vector {number} matches nothing in {type(decoder.model).__name__}; nothing would be written")
    return edits, problems


def _edit(
    model: nn.Module, decoder: Decoder, vector: SteeringVector, number: int, site: Site, options: dict[str, Any]
) -> PlannedEdit:
    """One vector at one site, by itself, with what is wrong there."""
    try:
        tap = next(iter(locate(model, [site]).values()))
    except SteerError as error:
        return PlannedEdit(number, vector.method, str(site), problem=str(error))
    mine = {name: tensor for name, tensor in vector.tensors.items() if name.startswith((f"{site}/", "shared/"))}
    try:
        steer(model, replace(vector, sites=(site,), tensors=mine), **options)
    except SteerError as error:
        place = _placed(decoder, vector, number, site, tap)
        return replace(place, problem=str(error))
    return _described(decoder, vector, number, site, tap, options)


def _placed(decoder: Decoder, vector: SteeringVector, number: int, site: Site, tap: Tap) -> PlannedEdit:
    """Where one vector would write at one site."""
    device, dtype = _place(decoder, tap.module)
    return PlannedEdit(
        vector=number,
        method=vector.method,
        site=str(site),
        module=tap.name,
        module_class=type(tap.module).__name__,
        side=tap.side,
        shape=(-1, tap.width) if tap.flat else (-1, -1, tap.width),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
    )


def _described(
    decoder: Decoder, vector: SteeringVector, number: int, site: Site, tap: Tap, options: dict[str, Any]
) -> PlannedEdit:
    """The same, with how strongly and on which tokens; `steer` has agreed to it."""
    scope, unit = options["scope"], options["unit"]
    given = vector.strength if vector.strength is not None else options["strength"]
    if given is None:
        given = default_strength(vector)
    value = strength_value(given)
    counted = vector.unit if vector.own_unit or unit is None else unit
    length, norm = method_of(vector).length(vector.params(site)), vector.norms.get(site)
    # One typical norm is `norm / length` of the method's own.
    factor = norm / length if length and norm else None
    paper = value if counted == "paper" else _times(value, factor)
    return replace(
        _placed(decoder, vector, number, site, tap),
        scope=vector.scope if vector.own_scope or scope is None else scope,
        paper=paper,
        norm=value if counted == "norm" else _times(value, None if factor is None else 1 / factor),
    )


def _times(value: float | tuple[float, ...], factor: float | None) -> float | tuple[float, ...] | None:
    if factor is None:
        return None
    return tuple(row * factor for row in value) if isinstance(value, tuple) else value * factor


def _shape(edit: PlannedEdit, rows: int, tokens: int) -> tuple[int, ...] | None:
    """The shape with numbers for rows and tokens."""
    if edit.shape is None:
        return None
    return (rows, tokens, edit.shape[-1]) if len(edit.shape) == 3 else (rows * tokens, edit.shape[-1])


def _place(decoder: Decoder, module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a module runs and in which dtype, as far as its parameters tell, else the model's."""
    first = next((entry for entry in module.parameters() if entry.is_floating_point()), None)
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)  # accelerate's
    if device is None:
        known = first is not None and not first.is_meta
        device = first.device if known and first is not None else execution_device(decoder)
    return torch.device(device), decoder.model.dtype if first is None else first.dtype


def _memory(
    model: nn.Module, decoder: Decoder, vectors: Sequence[SteeringVector], rows: int, prompt: int, new: int
) -> Memory:
    """Count bytes.

    Activations, roughly: for each token of the prompt six tensors of the model's width (stream, norm, query, key,
    value, output) and three of the MLP's, and for each row float32 logits of one token. Attention is taken to need no
    matrix of all pairs of tokens.
    """
    config: Any = decoder.model.config.get_text_config()
    size = decoder.model.dtype.itemsize
    inner = getattr(config, "intermediate_size", None) or 4 * decoder.hidden_size
    tokens = rows * prompt * (6 * decoder.hidden_size + 3 * inner) * size
    cache, note = _cache(decoder, config, rows, prompt + new, size)
    return Memory(
        parameters=sum(entry.numel() * entry.element_size() for entry in model.parameters()),
        vectors=sum(tensor.numel() * tensor.element_size() for one in vectors for tensor in one.tensors.values()),
        cache=cache,
        activations=tokens + rows * config.vocab_size * 4,
        note=note,
    )


def _cache(decoder: Decoder, config: Any, rows: int, tokens: int, size: int) -> tuple[int, str | None]:
    """Bytes of keys and values, a sliding window counted as far as it reaches; and what is not counted."""
    queries = getattr(config, "num_attention_heads", None)
    if not queries:
        return 0, "recurrent layers keep a state of fixed size, which is not counted"
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or queries
    if hasattr(config, "new_decoder_architecture"):  # Falcon; its grouped heads are repeated before they are cached
        heads = 1 if config.multi_query and not config.new_decoder_architecture else queries
    width = getattr(config, "head_dim", None) or decoder.hidden_size // queries
    window = getattr(config, "sliding_window", None)
    default = "sliding_attention" if window else "full_attention"
    types = getattr(config, "layer_types", None) or [default] * decoder.num_layers
    kept = {"full_attention": tokens, "sliding_attention": min(tokens, window or tokens)}
    counted = sum(kept.get(kind, 0) for kind in types)
    others = sorted({kind for kind in types if kind not in kept})
    note = f"the cache of {', '.join(others)} layers is not counted" if others else None
    return 2 * rows * heads * width * size * counted, note


class _Stopwatch:
    """What `generate` streams to: notes when the prompt was taken and when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _value: Any) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing comes after the last token."""


def _time(
    model: nn.Module,
    decoder: Decoder,
    vectors: Sequence[SteeringVector],
    options: dict[str, Any],
    rows: int,
    prompt: int,
    new: int,
) -> Time:
    """Generate a few tokens, steered and not in turns, after a first run that is not counted."""
    short = min(prompt, TIMED_PROMPT)
    columns = torch.arange(short, device=execution_device(decoder)) % 100 + 1
    ids = columns.expand(rows, -1)
    runner: Any = model if hasattr(model, "generate") else inner_model(model)
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for turn in range(1 + ROUNDS):
        for steered in (False, True):
            with steer(model, vectors, **options) if steered else contextlib.nullcontext():
                measured = _generate(runner, ids)
            if turn:
                found[steered].append(measured)
    prefill, step = (statistics.median(column) for column in zip(*found[False], strict=True))
    steered_prefill, steered_step = (statistics.median(column) for column in zip(*found[True], strict=True))
    prefill, steered_prefill = (value * prompt / short for value in (prefill, steered_prefill))
    return Time(
        prefill=prefill,
        step=step,
        steered_prefill=steered_prefill,
        steered_step=steered_step,
        total=prefill + (new - 1) * step,
        steered_total=steered_prefill + (new - 1) * steered_step,
    )


def _generate(runner: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds of the pass over the prompt, and of one decoding step."""
    watch = _Stopwatch()
    with torch.no_grad():
        runner.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1 + TIMED_STEPS,
            min_new_tokens=1 + TIMED_STEPS,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            num_beams=1,
            pad_token_id=0,
            streamer=watch,
        )
    gaps = [later - earlier for earlier, later in zip(watch.times, watch.times[1:], strict=False)]
    return gaps[0], statistics.median(gaps[1:])
