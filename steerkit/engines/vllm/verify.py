"""Whether a vLLM steers as it should, found out on the machine at hand: `steerkit vllm-verify`.

Everything goes through vLLM's own `LLM`, as a user's program would. Two random directions are added after a middle
block; what comes out is held to what the same engine answers to each request alone, and to transformers with hooks.
"""

from __future__ import annotations

import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from steerkit.activations.recording import record_ids
from steerkit.checks.fitted_method import Finding
from steerkit.engines.vllm import names
from steerkit.engines.vllm.recording import record
from steerkit.errors import ModelError
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["CHECKS", "verify"]

CHECKS = (
    "steers",
    "plain_is_plain",
    "rows_are_apart",
    "prefixes_are_apart",
    "names_are_no_paths",
    "reads",
    "as_transformers",
    "cost",
)
_SIZES = tuple(2.0**power for power in range(0, 14, 2))
_ROUNDING = 1e-3
_MOST = 1.1
Answer = tuple[list[int], list[float]]


class _Engine:
    """A vLLM that is asked with steering."""

    def __init__(self, path: str, folder: Path, options: dict[str, Any]) -> None:
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ModelError(f"vLLM cannot be imported here ({error}); install it beside steerkit") from None
        self._params = SamplingParams
        config = {"steerkit": {"folder": str(folder)}}
        self.llm = LLM(path, additional_config=config, enable_prefix_caching=True, seed=0, **options)
        text = self.llm.llm_engine.vllm_config.model_config.hf_text_config
        self.sizes = {"hidden_size": text.hidden_size, "num_layers": text.num_hidden_layers}
        self.kind, self.vocabulary = text.model_type, text.vocab_size

    def ask(self, prompts: Sequence[Sequence[int]], said: Sequence[str | None], count: int = 8) -> list[Answer]:
        """Answers to requests that are there together."""
        wanted = {"temperature": 0.0, "max_tokens": count, "ignore_eos": True, "logprobs": 0, "detokenize": False}
        params = [self._params(**wanted, extra_args=None if one is None else {"steering": one}) for one in said]
        inputs: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        found = []
        for output in self.llm.generate(inputs, params, use_tqdm=False):
            tokens = list(output.outputs[0].token_ids)
            logs = [place[token].logprob for place, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
            found.append((tokens, logs))
        return found

    def alone(self, prompt: Sequence[int], said: str | None, count: int = 8) -> Answer:
        """The answer to one request, nothing cached before it."""
        self.llm.reset_prefix_cache()
        return self.ask([prompt], [said], count)[0]


def verify(
    path: str,
    *,
    compared: bool = True,
    options: dict[str, Any] | None = None,
    step: Callable[[], None] = lambda: None,
) -> list[Finding]:
    """Start vLLM on a model and check that it steers.

    Args:
        path: of the model, as vLLM takes it.
        compared: whether transformers loads the model too, to compare with; needs memory for it.
        options: of vLLM's `LLM`.
        step: called after each check.

    Returns:
        One finding per check.

    Raises:
        ModelError: vLLM is not there.
    """
    with tempfile.TemporaryDirectory() as folder:
        engine = _Engine(path, Path(folder), options or {})
        try:
            return _findings(engine, path, Path(folder), compared, step)
        finally:
            names.shut(engine.llm)


def _findings(engine: _Engine, path: str, folder: Path, compared: bool, step: Callable[[], None]) -> list[Finding]:
    for name, seed in (("one", 1), ("other", 2)):
        _direction(engine, seed).save(folder / f"{name}.safetensors")
    prompts = _prompts(engine.vocabulary)
    size, reason = _size(engine, prompts[0])
    found = [Finding("steers", size is not None, reason)]
    step()
    if size is None:
        return found
    said = [None, f"one*{size:g}", f"other@all*{-size:g}", f"one[2:5]*{size:g} + other*{size:g}"] * 2
    beside = functools.cache(lambda: _beside(engine, path))
    checks: dict[str, Callable[[], tuple[bool, str]]] = {
        "plain_is_plain": lambda: _apart(engine, prompts, said, [row for row, one in enumerate(said) if not one]),
        "rows_are_apart": lambda: _apart(engine, prompts, said, [row for row, one in enumerate(said) if one]),
        "prefixes_are_apart": lambda: _prefixes(engine, size),
        "names_are_no_paths": lambda: _names(engine, prompts[0], folder / "one.safetensors"),
        "reads": lambda: _reads(engine, beside if compared else None, prompts[:4]),
        "as_transformers": lambda: _as_transformers(engine, beside, folder, prompts[:4], said[:4]),
        "cost": lambda: _cost(engine, prompts, f"one*{size:g}"),
    }
    for name, check in checks.items():
        if compared or name != "as_transformers":
            found.append(Finding(name, *check()))
        step()
    return found


def _direction(engine: _Engine, seed: int) -> SteeringVector:
    site = Site(engine.sizes["num_layers"] // 2)
    draw = torch.Generator().manual_seed(seed)
    direction = torch.randn(engine.sizes["hidden_size"], generator=draw, dtype=torch.float32)
    return SteeringVector(
        method="caa",
        tensors={f"{site}/direction": direction / direction.norm()},
        sites=(site,),
        edit="add",
        scope="response",
        unit="paper",
        model_type=engine.kind,
        **engine.sizes,
    )


def _prompts(vocabulary: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    lengths = (5, 19, 8, 40, 2, 27, 12, 33)
    return [torch.randint(0, vocabulary, (length,), generator=draw).tolist() for length in lengths]


def _size(engine: _Engine, prompt: Sequence[int]) -> tuple[float | None, str]:
    """The smallest strength tried that changes an answer."""
    plain = engine.alone(prompt, None)
    for size in _SIZES:
        if engine.alone(prompt, f"one*{size:g}")[0] != plain[0]:
            return size, f"a random direction of length {size:g} changes the answer"
    return None, f"a random direction of length {_SIZES[-1]:g} changes nothing: steering does not reach the model"


def _gap(one: Answer, other: Answer) -> float:
    """How far log-probabilities are apart, as far as the tokens are the same."""
    same = next((n for n, pair in enumerate(zip(one[0], other[0], strict=True)) if pair[0] != pair[1]), len(one[0]))
    near = [abs(a - b) for a, b in zip(one[1][:same], other[1][:same], strict=True)]
    return max(near, default=float("inf"))


def _apart(
    engine: _Engine, prompts: Sequence[Sequence[int]], said: Sequence[str | None], rows: Sequence[int]
) -> tuple[bool, str]:
    """Whether rows of a mixed batch get what they get alone."""
    engine.llm.reset_prefix_cache()
    together = engine.ask(prompts, said)
    # In low precision, batches of another size round differently, whether steered or not.
    usual = max(_gap(*pair) for pair in zip(*_twice(engine, prompts), strict=True))
    gaps = [_gap(engine.alone(prompts[row], said[row]), together[row]) for row in rows]
    limit = max(2 * usual, _ROUNDING)
    return max(gaps) <= limit, f"log-probabilities differ by {max(gaps):.1e} from those alone (at most {limit:.1e})"


def _twice(engine: _Engine, prompts: Sequence[Sequence[int]]) -> tuple[list[Answer], list[Answer]]:
    """Plain answers, alone and together."""
    alone = [engine.alone(prompt, None) for prompt in prompts]
    engine.llm.reset_prefix_cache()
    return alone, engine.ask(prompts, [None] * len(prompts))


def _prefixes(engine: _Engine, size: float) -> tuple[bool, str]:
    """Whether steered and plain requests with one long prompt in common leave each other's caches alone."""
    draw = torch.Generator().manual_seed(5)
    prompt = torch.randint(0, engine.vocabulary, (300,), generator=draw).tolist()
    order = [f"one@all*{size:g}", None, f"one@all*{size:g}", f"other@all*{size:g}", None]
    cold = {said: engine.alone(prompt, said) for said in dict.fromkeys(order)}
    engine.llm.reset_prefix_cache()
    gaps = [_gap(cold[said], engine.ask([prompt], [said])[0]) for said in order]
    return max(gaps) <= 0.05, f"log-probabilities differ by {max(gaps):.1e} from those with nothing cached"


def _names(engine: _Engine, prompt: Sequence[int], file: Path) -> tuple[bool, str]:
    """Whether a request that names a file is refused."""
    said = json.dumps({"format": 1, "terms": [{"vector": str(file), "strength": 1}]})
    try:
        engine.ask([prompt], [said], 1)
    except names.parts().wrong_request:
        return True, "a request that names a file is refused"
    return False, "a request that names a file got an answer"


def _beside(engine: _Engine, path: str) -> Any:
    """The model in transformers."""
    from transformers import AutoModelForCausalLM

    dtype = engine.llm.llm_engine.vllm_config.model_config.dtype
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def _reads(engine: _Engine, beside: Callable[[], Any] | None, prompts: Sequence[Sequence[int]]) -> tuple[bool, str]:
    """Whether activations read off a batch are those of each text alone, and of transformers."""
    site, spans = Site(engine.sizes["num_layers"] // 2), [(1, len(prompt)) for prompt in prompts]
    found = record(engine.llm, prompts, [site], spans)[site]
    pairs = zip(prompts, spans, strict=True)
    wanted = {"alone": torch.cat([record(engine.llm, [one], [site], [span])[site] for one, span in pairs])}
    if beside is not None:
        rows = record_ids(beside(), prompts, [site])[site]
        wanted["in transformers"] = torch.stack([row[1:].mean(dim=0) for row in rows])
    # Rounding adds up over blocks as steps in random directions do; a block more or less is a share of about 1.
    rounding = torch.finfo(engine.llm.llm_engine.vllm_config.model_config.dtype).eps
    limit = max(4 * rounding * engine.sizes["num_layers"] ** 0.5, _ROUNDING)
    gaps = {name: float(((found - one).norm(dim=-1) / one.norm(dim=-1)).max()) for name, one in wanted.items()}
    said = ", ".join(f"{gap:.1e} from those {name}" for name, gap in gaps.items())
    return max(gaps.values()) <= limit, f"activations differ by {said}, as shares (at most {limit:.1e})"


def _as_transformers(
    engine: _Engine,
    beside: Callable[[], Any],
    folder: Path,
    prompts: Sequence[Sequence[int]],
    said: Sequence[str | None],
) -> tuple[bool, str]:
    """Whether steered answers are as near to those of transformers as plain ones are."""
    from steerkit.composition.terms import Composition
    from steerkit.steering.steering import steer

    model = beside()
    known = {name: SteeringVector.load(folder / f"{name}.safetensors") for name in ("one", "other")}
    gaps: dict[bool, list[float]] = {True: [], False: []}
    for prompt, one in zip(prompts, said, strict=True):
        for steering in {None, one}:
            tokens, logs = engine.alone(prompt, steering)
            ids = torch.tensor([[*prompt, *tokens]], dtype=torch.long)
            vectors = [] if steering is None else Composition.parse(steering).vectors(known)
            with torch.no_grad():
                if vectors:
                    with steer(model, vectors, prompt_lengths=[len(prompt)]):
                        logits = model(ids).logits
                else:
                    logits = model(ids).logits
            chosen = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            wanted = [float(row[token]) for row, token in zip(chosen, tokens, strict=True)]
            gaps[steering is not None] += [abs(a - b) for a, b in zip(logs, wanted, strict=True)]
    steered, plain = max(gaps[True]), max(gaps[False])
    limit = max(4 * plain, _ROUNDING)
    return (
        steered <= limit,
        f"log-probabilities differ by {steered:.1e} steered, {plain:.1e} plain (at most {limit:.1e})",
    )


def _cost(engine: _Engine, prompts: Sequence[Sequence[int]], said: str) -> tuple[bool, str]:
    """How much longer a steered batch takes than a plain one, interleaved."""

    def seconds(steering: str | None) -> float:
        engine.llm.reset_prefix_cache()
        start = time.perf_counter()
        engine.ask(prompts, [steering] * len(prompts), 24)
        return time.perf_counter() - start

    seconds(None), seconds(said)
    ratio = statistics.median(seconds(said) / seconds(None) for _ in range(7))
    return ratio <= _MOST, f"a batch of {len(prompts)} steered takes {ratio:.3f} of the time of a plain one"
