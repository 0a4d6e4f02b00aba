"""What is hung on vLLM's parts: admission in the front end, hooks and steps in the workers, keys in the scheduler."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from steerkit.engines.vllm import names
from steerkit.engines.vllm.board import Board
from steerkit.engines.vllm.places import places
from steerkit.engines.vllm.plan import Served
from steerkit.engines.vllm.points import Point
from steerkit.engines.vllm.prefixes import steering_keys
from steerkit.engines.vllm.recording import TAKEN
from steerkit.engines.vllm.requests import ADMISSION, ASKED, CARRIED, READ, Admission
from steerkit.engines.vllm.settings import Settings
from steerkit.engines.vllm.steps import Steerer
from steerkit.errors import ModelError, SteerError

__all__ = ["register"]

_KEPT = "_steerkit"


def register() -> None:
    """Hang steering on vLLM's parts, once.

    Raises:
        ModelError: this vLLM has other parts than those that are known.
    """
    parts = names.parts()
    names.wrap(parts.processor, "__init__", _open)
    names.wrap(parts.processor, "process_inputs", _admit)
    for runner in (parts.runner, parts.cpu_runner):
        names.wrap(runner, "load_model", _place)
    names.wrap(parts.runner, "_model_forward", _run)
    setattr(parts.worker, TAKEN, _take)
    names.wrap(sys.modules[parts.keys.__module__], parts.keys.__name__, _key)


def _served(config: Any, settings: Settings) -> Served:
    text = config.model_config.hf_text_config
    whole = config.parallel_config.pipeline_parallel_size == 1
    width, blocks = (getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers"))
    if not isinstance(width, int) or not isinstance(blocks, int):
        raise ModelError(
            f"{text.model_type}: its config names no width and number of blocks, so it is not steered; start vLLM "
            "without this plug-in (VLLM_PLUGINS)"
        )
    return Served(width, blocks, settings.kinds, settings.levels, settings.terms, whole)


def _admit(inner: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
    """Make a request, and refuse it alone where its steering cannot be had."""
    request = inner(processor, *args, **kwargs)
    params = request.sampling_params
    if params is None:
        return request
    try:
        prompt = len(request.prompt_token_ids or request.prompt_embeds or ())
        extra = getattr(processor, ADMISSION).admitted(params.extra_args, prompt)
        why = names.unsteered(processor.vllm_config) if {CARRIED, READ} & set(extra or ()) else None
        if why is not None:
            raise ModelError(why)
    except SteerError as error:
        raise names.parts().wrong_request(str(error), parameter=ASKED) from None
    params.extra_args = extra
    if extra and (READ in extra or extra.get(CARRIED, {}).get("whole")):
        params.skip_reading_prefix_cache = True  # what reads the whole prompt has to see all of it
    return request


def _open(inner: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> None:
    """Make a front end, and what admits its requests; settings that cannot be are refused here."""
    inner(processor, *args, **kwargs)
    config = processor.vllm_config
    if config.model_config.runner_type == "pooling":
        return
    settings = Settings.of(config.additional_config)
    setattr(processor, ADMISSION, Admission(settings, _served(config, settings)))
    for kind in names.beam_requests():
        names.wrap(kind, "to_beam_search_params", _refuse_beams)
    for kind in names.beam_searches():
        names.wrap(kind, "beam_search", _refuse_default)


def _refuse_beams(inner: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    if (getattr(request, "vllm_xargs", None) or {}).get(ASKED) is not None:
        raise names.parts().wrong_request("vLLM's beam search is not steered; sample instead", parameter=ASKED)
    return inner(request, *args, **kwargs)


def _refuse_default(inner: Callable[..., Any], search: Any, *args: Any, **kwargs: Any) -> Any:
    admission: Admission | None = getattr(names.processor_of(search), ADMISSION, None)
    why = None if admission is None else admission.no_beams()
    if why is not None:
        raise names.parts().wrong_request(why, parameter=ASKED)
    return inner(search, *args, **kwargs)


def _place(inner: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Load a model, and hook it before it is compiled."""
    result = inner(runner, *args, **kwargs)
    if getattr(runner, _KEPT, None) is None and names.writes_text(runner):
        setattr(runner, _KEPT, _steerer(runner))
    return result


def _steerer(runner: Any) -> Steerer:
    """What steers a runner's model, hung on its places."""
    config = runner.vllm_config
    settings = Settings.of(config.additional_config)
    served = _served(config, settings)
    found = places(runner.get_model(), served.num_layers, served.kinds, names.has_attention)
    rows = config.scheduler_config.max_num_seqs
    board = Board(
        places=len(found),
        rows=rows,
        tokens=runner.max_num_tokens,
        width=served.hidden_size,
        entries=settings.vectors * served.num_layers + 1,
        levels=served.levels,
        terms=served.terms,
        device=runner.device,
    )
    nests = names.is_one_graph(config)
    points = [Point(place.site, number, board, nests=nests) for number, place in enumerate(found)]
    for point, place in zip(points, found, strict=True):
        point.hang(place.module)
    # What vLLM compiled without hooks before, it may not take for this: the key of its cache holds this mapping.
    if isinstance(config.additional_config, dict):
        config.additional_config["steerkit-graph"] = [str(point.site) for point in points] + [served.levels]
    graphed = names.is_graphed(config)
    return Steerer(points, board, served, rows=rows, eagerly=names.run_eagerly, graphed=graphed)


def _run(inner: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the model for a step, steered."""
    steerer = getattr(runner, _KEPT, None)
    if steerer is None:
        return inner(runner, *args, **kwargs)

    def extra(request: str) -> Any:
        return names.extra_of(runner, request)

    return steerer.run(names.step_of(runner), extra, lambda: inner(runner, *args, **kwargs))


def _take(worker: Any, wanted: list[str]) -> dict[str, dict[str, list[bytes]]]:
    """What was read, by the names of `recording.ask`; a worker's answer to it."""
    steerer: Steerer = getattr(worker.model_runner, _KEPT)
    return steerer.take(wanted)


def _key(inner: Callable[..., Any], request: Any, start: int, end: int) -> list[Any]:
    """What a block is keyed by, with its steering."""
    params = request.sampling_params
    return [*inner(request, start, end), *steering_keys(None if params is None else params.extra_args, end)]
