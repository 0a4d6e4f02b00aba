"""How vLLM calls its parts: the only file that knows. Read in vLLM 0.32.0.

Nothing of vLLM is imported before `parts` is asked. A vLLM in which a part is not found is refused in one line, since
steering that is hung on nothing would be silently absent.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from steerkit.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "READ_IN",
    "ModelFacts",
    "Parts",
    "Step",
    "beam_requests",
    "beam_searches",
    "extra_of",
    "has_attention",
    "is_graphed",
    "is_one_graph",
    "longest",
    "model_facts",
    "parts",
    "processor_of",
    "run_eagerly",
    "shut",
    "step_of",
    "unread",
    "unsteered",
    "wrap",
    "writes_text",
]

READ_IN = "0.32.0"
_HOMES = {
    "processor": "vllm.v1.engine.input_processor:InputProcessor",
    "runner": "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
    "cpu_runner": "vllm.v1.worker.cpu_model_runner:CPUModelRunner",
    "worker": "vllm.v1.worker.worker_base:WorkerBase",
    "attention": "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase",
    "wrong_request": "vllm.exceptions:VLLMValidationError",
    "context": "vllm.forward_context:get_forward_context",
    "keys": "vllm.v1.core.kv_cache_utils:_gen_prompt_embeds_extra_hash_keys",
}
# What is wrapped or called, with the arguments that are counted on.
_CALLED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "processor": {"process_inputs": ("self", "request_id", "prompt", "params")},
    "runner": {"load_model": ("self",), "_model_forward": ("self", "input_ids", "positions")},
    "cpu_runner": {"load_model": ("self",)},
    "keys": {"": ("request", "start_token_idx", "end_token_idx")},
}


class Parts(NamedTuple):
    """The parts of vLLM that steering is hung on.

    Attributes:
        processor: class; makes of what a caller asks a request to the engine, in the front end.
        runner: class; runs the model, in each worker.
        cpu_runner: class; the same on CPUs, with a `load_model` of its own.
        worker: class; base of what holds a runner and answers calls to all workers.
        attention: class; base of all layers that keep keys and values.
        wrong_request: error; answered with 400 over HTTP.
        context: gives what is known of the forward pass under way.
        keys: function; what a block of a request is keyed by besides its tokens.
    """

    processor: Any
    runner: Any
    cpu_runner: Any
    worker: Any
    attention: Any
    wrong_request: Any
    context: Any
    keys: Any


class Step(NamedTuple):
    """The requests of one step, as their tokens lie in it.

    Attributes:
        requests: ids, in the order of their tokens.
        starts: where each one's tokens begin, and behind the last one the number of all; whole numbers.
        positions: [n] place of each token in its request, counted from 0, on the device.
        first: position of each request's first token in this step, as far as the host knows.
    """

    requests: tuple[str, ...]
    starts: tuple[int, ...]
    positions: Tensor
    first: tuple[int, ...]


@functools.cache
def parts() -> Parts:
    """Find all parts.

    Raises:
        ModelError: one is not there, or takes other arguments.
    """
    found: dict[str, Any] = {}
    for name, home in _HOMES.items():
        module, _, attribute = home.partition(":")
        try:
            found[name] = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise _strange(home, str(error)) from None
        for method, wanted in _CALLED.get(name, {}).items():
            function = getattr(found[name], method, None) if method else found[name]
            given = () if function is None else tuple(inspect.signature(function).parameters)
            if given[: len(wanted)] != wanted:
                raise _strange(f"{home}.{method}".rstrip("."), f"takes {', '.join(given) or 'nothing'}")
    return Parts(**found)


def _strange(what: str, why: str) -> ModelError:
    import vllm

    return ModelError(
        f"vLLM {vllm.__version__} is not steered: {what}: {why}; this steerkit knows vLLM {READ_IN}, install that one, "
        "a newer steerkit, or start vLLM without this plug-in (VLLM_PLUGINS)"
    )


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Put a function around another one, once.

    Args:
        owner: class or module that holds it.
        name: under which it is held.
        around: called with the function and its arguments.
    """
    inner = getattr(owner, name)
    if getattr(inner, "__steerkit__", False):
        return

    @functools.wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(inner, *args, **kwargs)

    wrapped.__steerkit__ = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def step_of(runner: Any) -> Step:
    """What a step holds, once the runner has prepared it.

    Args:
        runner: that is about to run the model.
    """
    batch = runner.input_batch
    count = batch.num_reqs
    starts = tuple(runner.query_start_loc.np[: count + 1].tolist())
    first = tuple(batch.num_computed_tokens_cpu[:count].tolist())
    return Step(tuple(batch.req_ids[:count]), starts, runner.positions[: starts[-1]], first)


def extra_of(runner: Any, request: str) -> tuple[Mapping[str, Any], int] | None:
    """What a request carries, and how many tokens its prompt has; None for one that the runner no longer knows.

    Args:
        runner: of the model.
        request: its id.
    """
    known = runner.requests.get(request)
    if known is None:
        return None
    params = known.sampling_params
    return (params.extra_args or {}) if params is not None else {}, known.num_prompt_tokens


def beam_requests() -> list[Any]:
    """The classes of requests over HTTP that may ask for beams, of which vLLM then drops all extra arguments.

    Returns:
        Those that a server has loaded; none in other processes.
    """
    homes = ("chat_completion.protocol:ChatCompletionRequest", "completion.protocol:CompletionRequest")
    return _loaded("vllm.entrypoints.openai", homes, "to_beam_search_params")


def beam_searches() -> list[Any]:
    """The classes that search by beams: each step of theirs is a request of its own, whose prompt has grown.

    Returns:
        Those that are loaded; none where there is no front end.
    """
    homes = ("online:BeamSearchOnlineMixin", "offline:BeamSearchOfflineMixin")
    return _loaded("vllm.entrypoints.generate.beam_search", homes, "beam_search")


def _loaded(package: str, homes: Sequence[str], method: str) -> list[Any]:
    """Those of some classes that this process has loaded, each of which must have a method."""
    found = []
    for home in homes:
        module, _, name = home.partition(":")
        loaded = sys.modules.get(f"{package}.{module}")
        if loaded is not None:
            if not hasattr(getattr(loaded, name, None), method):
                raise _strange(f"{package}.{home}", f"has no {method}")
            found.append(getattr(loaded, name))
    return found


def processor_of(search: Any) -> Any:
    """What makes the requests of one that searches by beams.

    Args:
        search: `LLM`, or what serves a route.
    """
    return (getattr(search, "engine_client", None) or search.llm_engine).input_processor


def unsteered(config: Any) -> str | None:
    """Why no request is steered under a configuration; None where requests are.

    Args:
        config: vLLM's.
    """
    if config.use_v2_model_runner:
        return "this vLLM runs its second model runner; start it with VLLM_USE_V2_MODEL_RUNNER=0"
    # In these a module sees a part of a step's tokens, and which they are is not known here.
    if config.parallel_config.use_ubatching or config.parallel_config.prefill_context_parallel_size > 1:
        return "microbatches and context parallelism are not steered; start without them"
    if config.cache_config.kv_sharing_fast_prefill:
        return "with kv_sharing_fast_prefill blocks see a part of the prompt only; start without it"
    return None


def writes_text(runner: Any) -> bool:
    """Whether a runner generates, and does not pool.

    Args:
        runner: of a model.
    """
    return not runner.is_pooling_model


def is_graphed(config: Any) -> bool:
    """Whether the model is compiled or captured, so that Python runs only once.

    Args:
        config: vLLM's.
    """
    compilation = config.compilation_config
    return bool(compilation.mode) or bool(getattr(compilation.cudagraph_mode, "value", 0))


def is_one_graph(config: Any) -> bool:
    """Whether torch compiles the model as a whole, and vLLM does not cut it into pieces.

    Args:
        config: vLLM's.
    """
    return getattr(config.compilation_config.mode, "name", "") == "DYNAMO_TRACE_ONCE"


@contextlib.contextmanager
def run_eagerly() -> Iterator[None]:
    """Have the pass under way run as Python, as vLLM itself does with encoder inputs."""
    context = parts().context()
    before = context.skip_compiled, context.cudagraph_runtime_mode
    context.skip_compiled, context.cudagraph_runtime_mode = True, type(before[1])(0)
    try:
        yield
    finally:
        context.skip_compiled, context.cudagraph_runtime_mode = before


def has_attention(module: nn.Module) -> bool:
    """Whether a module holds a layer that keeps keys and values.

    Args:
        module: of vLLM's model.
    """
    return any(isinstance(one, parts().attention) for one in module.modules())


def shut(llm: Any) -> None:
    """End an engine.

    Args:
        llm: vLLM's `LLM`.
    """
    llm.llm_engine.engine_core.shutdown()


class ModelFacts(NamedTuple):
    """What an engine says of its model.

    Attributes:
        text: config of its decoder, of transformers.
        path: where it came from.
        commit: of the repository that it came from, where that is known.
        trusted: whether code of its repository may run.
    """

    text: Any
    path: str
    commit: str | None
    trusted: bool


def model_facts(llm: Any) -> ModelFacts:
    """What is known of an engine's model.

    Args:
        llm: vLLM's `LLM`.
    """
    config = llm.llm_engine.vllm_config.model_config
    commit = getattr(config.hf_config, "_commit_hash", None)
    return ModelFacts(config.hf_text_config, config.model, commit, config.trust_remote_code)


def longest(llm: Any) -> int:
    """How many tokens an engine takes, with what it answers.

    Args:
        llm: vLLM's `LLM`.
    """
    return int(llm.llm_engine.vllm_config.model_config.max_model_len)


def unread(llm: Any) -> str | None:
    """Why activations of an engine's model are not read; None where they are.

    Args:
        llm: vLLM's `LLM`.
    """
    engine = llm.llm_engine
    if not getattr(type(engine.input_processor).process_inputs, "__steerkit__", False):
        return "this vLLM runs without the plug-in of steerkit; see VLLM_PLUGINS, and install both together"
    if engine.vllm_config.parallel_config.pipeline_parallel_size > 1:
        return "activations are read where one process holds all blocks; start vLLM without pipeline stages"
    return unsteered(engine.vllm_config)
