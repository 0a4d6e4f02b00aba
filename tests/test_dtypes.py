"""Neither torch's default dtype nor autocast changes what is fitted, read and written."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import steerkit
from steerkit.errors import SteerError
from steerkit.fitting.fitting import read
from steerkit.methods import _registry as registry
from steerkit.monitor import Monitor
from steerkit.network.decoder import find_decoder
from tests.choices import needs_bfloat16_attention
from tests.families import VOCAB, build
from tests.methods.test_every_method import data_for, families_of
from tests.ready import ready
from tests.test_house import FILES, PACKAGE
from tests.tiny_tokenizers import CHATML, byte_tokenizer

IDS = torch.arange(2 * 12).mul(7919).remainder(VOCAB).reshape(2, 12)
TOKENIZER = byte_tokenizer(CHATML)
ITEMS = ["hello", "a bad day", "fine"]
NEUTRAL = [
    {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
    for asked, said in [("hi", "good day"), ("what", "is it"), ("who", "are you"), ("why", "not so")]
]

# What torch makes in its default dtype when nobody names another.
MAKERS = {"as_tensor", "asarray", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randn"}
MAKERS |= {"scalar_tensor", "tensor", "zeros"}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def test_no_tensor_is_made_in_the_default_dtype() -> None:
    without = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS:
                home = node.func.value
                if isinstance(home, ast.Name) and home.id == "torch" and "dtype" not in {k.arg for k in node.keywords}:
                    without.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}")
    assert not without


def road(name: str, family: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Fit a method, steer with it in a pass and in `generate`, edit the weights, and watch its direction."""
    model: Any = build(family)
    with default_dtype(dtype):
        return travelled(model, name)


def travelled(model: Any, name: str) -> dict[str, Tensor]:
    method = ready(name)
    vector = steerkit.fit(model, TOKENIZER, data_for(method), method=method)
    found = dict(vector.tensors)
    found["norms"] = torch.tensor(list(vector.norms.values()), dtype=torch.double)
    with torch.no_grad(), steerkit.steer(model, vector, 3.0, prompt_lengths=6):
        found["logits"] = model(input_ids=IDS).logits
    with steerkit.steer(model, vector, [3.0, 1.0]):
        found["tokens"] = model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    with contextlib.suppress(SteerError), steerkit.edited(model, vector.at(scope="all"), 3.0), torch.no_grad():
        found["edited"] = model(input_ids=IDS).logits
    if name in ("caa", "repe"):
        found |= watched(Monitor(model, TOKENIZER, vector, neutral=NEUTRAL, kind="cos" if name == "repe" else "proj"))
    return found


def watched(monitor: Monitor) -> dict[str, Tensor]:
    """All that a monitor reads."""
    with monitor.watch() as seen:
        monitor.model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)  # type: ignore[operator]
    middle = torch.tensor(monitor.middle(), dtype=torch.double)
    return {
        "score": monitor.score(ITEMS),
        "watched": seen.last.tokens,
        "heat": monitor.heat(ITEMS[1]).values,
        "middle": middle,
    }


plain = cache(road)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert found[name].dtype == one.dtype, name
        assert torch.equal(found[name].nan_to_num(7.0), one.nan_to_num(7.0)), name


HALVES_AND_DOUBLE = (torch.bfloat16, torch.float16, torch.float64)
COVERING = {("caa", dtype) for dtype in HALVES_AND_DOUBLE} | {
    (name, HALVES_AND_DOUBLE[place % 3]) for place, name in enumerate(registry.method_names())
}


@pytest.mark.parametrize(("name", "dtype"), sorted(COVERING, key=str), ids=str)
def test_the_default_dtype_changes_nothing(name: str, dtype: torch.dtype) -> None:
    family = families_of(name)[0]
    assert_same(road(name, family, dtype), plain(name, family))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES_AND_DOUBLE, ids=str)
@pytest.mark.parametrize(
    ("name", "family"),
    [
        (name, family)
        for name in registry.method_names()
        for family in ("llama", "gpt2", "mixtral", "gpt_oss")
        # Neurons stand in no one place where tokens are routed, and experts nowhere else.
        if (family in ("mixtral", "gpt_oss")) is (name == "experts") or name not in ("experts", "aura")
    ],
)
def test_the_default_dtype_changes_nothing_anywhere(name: str, family: str, dtype: torch.dtype) -> None:
    assert_same(road(name, family, dtype), plain(name, family))


@pytest.mark.parametrize("name", [name for name in registry.method_names() if name != "experts"])
def test_a_model_in_double_precision_gives_the_same_to_float32_s_rounding(name: str) -> None:
    """But for experts, whose products torch has in single and half precision alone."""
    family = families_of(name)[0]
    model: Any = build(family)
    found, expected = travelled(model.double(), name), plain(name, family)
    assert found.keys() == expected.keys()
    assert found["logits"].dtype == torch.float64
    # What AurA does follows from ranks, and neurons that are nearly alike change places.
    for key in ("tokens", "norms") if name == "aura" else expected:
        one = expected[key].double()
        assert float((found[key].double() - one).abs().max() / one.abs().max().clamp_min(1e-9)) < 1e-4, key


# These run the model while they are fitted, which autocast is there to change.
ASK_THE_MODEL = {"actadd", "conditional", "controller", "latent", "melbo", "refusal", "transport"}


@pytest.mark.parametrize("name", sorted({*registry.method_names()} - ASK_THE_MODEL))
def test_what_is_fitted_does_not_depend_on_autocast(name: str) -> None:
    model: Any = build(families_of(name)[0])
    method = ready(name)
    data, sites = data_for(method), method.sites(find_decoder(model))
    with autocast():
        acts = read(model, TOKENIZER, data, method=method, sites=sites)
        inside = steerkit.fit(model, TOKENIZER, data, method=method, acts=acts)
    outside = steerkit.fit(model, TOKENIZER, data, method=method, acts=acts)
    assert_same(dict(inside.tensors), dict(outside.tensors))
    logits = []
    for context in (autocast(), contextlib.nullcontext()):
        change = steerkit.edited(model, outside.at(scope="all"), 3.0)
        try:
            with context:
                change.__enter__()
        except SteerError:
            continue
        with torch.no_grad():
            logits.append(model(input_ids=IDS).logits)
        change.__exit__(None, None, None)
    assert not logits or torch.equal(*logits)


@needs_bfloat16_attention
def test_a_probe_is_trained_in_full_precision_under_autocast() -> None:
    model: Any = build("llama")
    method = registry.resolve("controller")()
    data, sites = data_for(method), method.sites(find_decoder(model))
    acts = read(model, TOKENIZER, data, method=method, sites=sites)
    outside = steerkit.fit(model, TOKENIZER, data, method=method, acts=acts)
    with autocast():
        inside = steerkit.fit(model, TOKENIZER, data, method=method, acts=acts)
    for name in ("shared/probe_weight", "shared/probe_bias"):
        assert torch.equal(inside.tensors[name], outside.tensors[name]), name


@pytest.mark.parametrize("kind", ["proj", "cos"])
def test_a_monitor_reads_in_full_precision_under_autocast(kind: Any) -> None:
    model: Any = build("llama")
    vector = steerkit.fit(model, TOKENIZER, data_for(registry.resolve("caa")()), method="caa")
    direction = vector.params(vector.sites[0])["direction"]
    with autocast():
        monitor = Monitor(model, TOKENIZER, vector, calibrated=False, kind=kind)
        rows = steerkit.record(model, TOKENIZER, monitor.rendered(ITEMS), vector.sites, readout="prompt_last")
        scores = monitor.score(ITEMS)
        with monitor.watch() as seen:
            model.generate(**TOKENIZER(ITEMS[1], return_tensors="pt"), max_new_tokens=3, do_sample=False)
        read_alone = watched(Monitor(model, TOKENIZER, vector, neutral=NEUTRAL, kind=kind))
    (acts,) = rows.positive.values()
    expected = (acts * direction).sum(-1) / direction.norm()
    expected = expected / acts.norm(dim=-1) if kind == "cos" else expected
    assert torch.allclose(scores, expected, rtol=1e-5, atol=1e-6)
    assert seen.last.tokens.dtype == torch.float32
    assert all(bool(torch.isfinite(one).all()) and one.dtype != torch.bfloat16 for one in read_alone.values())
