"""Gates on readings and held readings, in every way to generate, beside hooks written by hand."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import steerkit
from steerkit.composition import Composition
from steerkit.errors import (
    CompositionError,
    DataError,
    ModelError,
    ScopeError,
    SiteError,
    StrengthError,
    VectorFileError,
    VectorMismatchError,
)
from steerkit.methods.selective import SelectiveSteering
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.vector.hold import Hold
from steerkit.vector.steering_vector import SteeringVector
from steerkit.vector.when import When
from tests import gated, modes, rotations, tolerances
from tests.families import FAMILIES, build, shortened
from tests.modes import LONG, SHORT, vector_for
from tests.pairwise import covering
from tests.steering.test_compile import counted, steerkit_compile_config
from tests.tiny_tokenizers import CHATML, byte_tokenizer

STRENGTH = 1.5
SITES = {"early": Site(0), "a": Site(1), "late": Site(3)}  # `a` is written


@functools.cache
def model_of(family: str = "llama") -> Any:
    return build(family).eval()


@dataclass(frozen=True)
class Row:
    """What the hand knows of one unpadded row: readings by name of its prompt, and of each column."""

    prompt: dict[str, float]
    columns: dict[str, list[float]]
    end: int

    def token(self, name: str, column: int) -> float:
        return self.columns[name][column]


# What is added at a column of a row, in words of the rule alone.
def by_prompt(met: Callable[[dict[str, float]], bool]) -> Callable[[Row, int], float]:
    return lambda row, column: STRENGTH if column >= row.end - 1 and met(row.prompt) else 0.0


def by_token(met: Callable[[Row, int], bool]) -> Callable[[Row, int], float]:
    return lambda row, column: STRENGTH if column >= row.end - 1 and met(row, column) else 0.0


def is_held(row: Row, column: int) -> bool:
    """Open above 0.4 until the reading is not above -0.4, told from the answer's beginning on."""
    is_open = False
    for place in range(row.end - 1, column + 1):
        value = row.token("early", place)
        is_open = value > 0.4 or (is_open and value > -0.4)
    return is_open


RULES: dict[str, tuple[str, Callable[[Row, int], float]]] = {
    "prompt": ("a*1.5 when(early > 0)", by_prompt(lambda one: one["early"] > 0)),
    "prompt, later": ("a*1.5 when(late < 0)", by_prompt(lambda one: one["late"] < 0)),
    "prompt, joined": (
        "a*1.5 when(early > 0.2 | ~(late > -0.3))",
        by_prompt(lambda one: one["early"] > 0.2 or not one["late"] > -0.3),
    ),
    "token": ("a*1.5 when(early > 0 per token)", by_token(lambda row, k: row.token("early", k) > 0)),
    "token, own site": ("a@all*1.5 when(a < 0.1 per token)", by_token(lambda row, k: row.token("a", k) < 0.1)),
    "token, joined": (
        "a*1.5 when(~(a > 0.3) & early > 0 per token)",
        by_token(lambda row, k: row.token("early", k) > 0 and not row.token("a", k) > 0.3),
    ),
    "token, held open": ("a*1.5 when(early > 0.4 off -0.4 per token)", by_token(is_held)),
}


def known_of(model: Any, *names: str) -> dict[str, SteeringVector]:
    """Vectors with neutral scales that part the tokens of the prompts: nothing is open, or closed, everywhere."""
    known = {}
    for seed, name in enumerate(names or SITES):
        site = SITES[name]
        vector = vector_for(model, scope="response", site=site, seed=seed)
        unit = torch.nn.functional.normalize(vector.tensors[f"{site}/direction"], dim=0)
        rows = [stream_of(model, prompt, site) @ unit for prompt in (SHORT, LONG, LONG[::-1])]
        ends, tokens = torch.stack([row[-1] for row in rows[:2]]), torch.cat(rows)
        scales = {
            "prompt_last": (float(ends.mean()), float(ends.std())),
            "response_mean": (float(tokens.median()) + 1e-3, float(tokens.std())),
        }
        neutral = {
            read: {"joint": 1.0, "sites": {str(site): {"mean": mean, "deviation": deviation}}}
            for read, (mean, deviation) in scales.items()
        }
        known[name] = replace(vector, neutral=neutral)
    return known


@functools.cache
def known(family: str = "llama") -> dict[str, SteeringVector]:
    return known_of(model_of(family))


def stream_of(model: Any, ids: Sequence[int], site: Site) -> Tensor:
    """[t, d] what a block gives, unsteered, by a hook written out by hand."""
    found: list[Tensor] = []
    handle = (
        find_decoder(model)
        .blocks[site.layer]
        .register_forward_hook(
            lambda _module, _args, output: found.append((output[0] if isinstance(output, tuple) else output).clone())
        )
    )
    modes.plain_logits(model, ids)
    handle.remove()
    return found[0][0].float()


def value_of(vector: SteeringVector, stream: Tensor, column: int, end: int) -> float:
    """The reading of a column: at the prompt's end in the scale of prompts, behind it in that of answers."""
    (site,) = vector.sites
    scale = vector.neutral["prompt_last" if column < end else "response_mean"]["sites"][str(site)]
    direction = vector.tensors[f"{site}/direction"].double()
    return (float(stream[column].double() @ direction / direction.norm()) - scale["mean"]) / scale["deviation"]


@contextlib.contextmanager
def by_hand(
    model: Any, vectors: dict[str, SteeringVector], prompt: Sequence[int], added: Callable[[Row, int], float]
) -> Iterator[None]:
    """One unpadded row in one pass: the direction is added to block 1, column by column."""
    end = len(prompt)
    told = {name: value_of(one, stream_of(model, prompt, SITES[name]), end - 1, end) for name, one in vectors.items()}
    row = Row(told, {}, end)
    direction = vectors["a"].tensors["resid_post.1/direction"]

    def note(name: str, stream: Tensor) -> None:
        row.columns[name] = [value_of(vectors[name], stream, column, end) for column in range(stream.shape[0])]

    def first(_module: Any, _args: Any, output: Any) -> None:
        note("early", (output[0] if isinstance(output, tuple) else output)[0].float())

    def second(_module: Any, _args: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        note("a", stream[0].float())
        steered = stream.clone()
        for column in range(stream.shape[1]):
            steered[:, column] += added(row, column) * direction
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    blocks = find_decoder(model).blocks
    handles = [blocks[0].register_forward_hook(first), blocks[1].register_forward_hook(second)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def held_strength(vectors: dict[str, SteeringVector], low: float, high: float) -> Callable[[Row, int], float]:
    """The strength that brings the reading of `a` to 0.5, tried out by bisection over what it then is."""
    direction = vectors["a"].tensors["resid_post.1/direction"].double()

    def added(row: Row, column: int) -> float:
        if column < row.end - 1:
            return 0.0
        scale = vectors["a"].neutral["prompt_last" if column < row.end else "response_mean"]["sites"]["resid_post.1"]
        less, more = low, high
        for _ in range(60):
            middle = (less + more) / 2
            reading = row.token("a", column) + middle * float(direction.norm()) / scale["deviation"]
            less, more = (middle, more) if reading < 0.5 else (less, middle)
        return less

    return added


HOLD = "a hold(a at 0.5 within -0.1 to 0.15)"
KINDS = (*RULES, "hold")


def run(model: Any, vectors: Any, mode: str) -> list[modes.Ran]:
    lengths = [len(SHORT), len(LONG), 4] if mode == "right_padded_forward" else None
    with torch.no_grad(), steerkit.steer(model, vectors, prompt_lengths=lengths):
        return modes.MODES[mode](model)


def expected(model: Any, vectors: dict[str, SteeringVector], kind: str, one: modes.Ran) -> Tensor:
    added = held_strength(vectors, -0.1, 0.15) if kind == "hold" else RULES[kind][1]
    return modes.reference(model, one, lambda ran: by_hand(model, vectors, ran.prompt, added))


def check(family: str, kind: str, mode: str) -> None:
    model, vectors = model_of(family), known(family)
    if kind == "token, held open" and mode == "beams":
        pytest.skip("refused, see below")
    line = HOLD if kind == "hold" else RULES[kind][0]
    ran = run(model, Composition.parse(line).vectors(vectors), mode)
    for one in ran:
        gap = modes.gap(one, expected(model, vectors, kind, one))
        assert gap < tolerances.of_family(family), (family, kind, mode, gap)


CELLS = [
    (family, kind, mode)
    for family, kind, mode in itertools.product(FAMILIES, KINDS, modes.MODES)
    if (family, mode) not in modes.EXCEPTIONS and not mode.startswith("per_row")
]
# Of each law one kind, in every mode.
LAWS = ("prompt, later", "token, own site", "token, held open", "hold")
CHOICE = {*covering(CELLS, strength=1), *(cell for cell in CELLS if cell[0] == "llama" and cell[1] in LAWS)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_generate_is_the_hook_by_hand(family: str) -> None:
    modes.check_all(check, sorted(cell for cell in CHOICE if cell[0] == family))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_full_product(family: str) -> None:
    modes.check_all(check, (cell for cell in CELLS if cell[0] == family and cell not in CHOICE))


def test_the_rules_part_tokens_and_prompts() -> None:
    """Or the comparisons above would hold for a gate that is always open, or never."""
    model, vectors = model_of(), known()
    for kind in KINDS:
        added = held_strength(vectors, -0.1, 0.15) if kind == "hold" else RULES[kind][1]
        seen: list[float] = []

        def told(row: Row, column: int, added: Any = added, seen: list[float] = seen) -> float:
            strength = added(row, column)
            seen.extend([strength] if column >= row.end - 1 else [])
            return strength

        line = HOLD if kind == "hold" else RULES[kind][0]
        for one in run(model, Composition.parse(line).vectors(vectors), "left_padded"):
            modes.reference(model, one, lambda ran, told=told: by_hand(model, vectors, ran.prompt, told))
        if kind == "hold":
            assert min(seen) < -0.099 and max(seen) > 0.149 and any(-0.09 < one < 0.14 for one in seen)
        else:
            assert {0.0, STRENGTH} <= set(seen), kind
    held = [is_held, lambda row, k: row.token("early", k) > 0.4]
    ids = [*LONG, *SHORT, *LONG[::-1]]
    row = Row(
        {}, {"early": [value_of(vectors["early"], stream_of(model, ids, SITES["early"]), k, 1) for k in range(24)]}, 1
    )
    assert any(held[0](row, k) != held[1](row, k) for k in range(24)), "off changes nothing"


def same(one: modes.Ran, other: modes.Ran) -> bool:
    return one.answer == other.answer and torch.equal(one.logits, other.logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba", "gemma2"])
def test_what_is_closed_is_the_unsteered_model_bitwise(family: str) -> None:
    model, vectors = model_of(family), known(family)
    with torch.no_grad():
        bare = modes.generate(model, [SHORT, LONG])
    for line in ("a@all*2 when(early > 99)", "a@all*2 when(late > 99)", "a@all*2 when(early > 99 per token)"):
        ran = run(model, Composition.parse(line).vectors(vectors), "num_return_sequences")
        with torch.no_grad():
            unsteered = modes.num_return_sequences(model)
        assert all(map(same, ran, unsteered)), line
    for line in ("a*2 when(early > 0)", "a*2 when(late > 0)"):
        with torch.no_grad(), steerkit.steer(model, Composition.parse(line).vectors(vectors)):
            ran = modes.generate(model, [SHORT, LONG])
        closed = [same(one, other) for one, other in zip(ran, bare, strict=True)]
        assert sorted(closed) == [False, True], line


def test_a_prompt_gate_writes_the_prompt_too_where_the_scope_says_so() -> None:
    model, vectors = model_of(), known()
    for reads in ("early", "late"):
        for sign in "><":
            (gatedly,) = Composition.parse(f"a@all*2 when({reads} {sign} 0)").vectors(vectors)
            (plain,) = Composition.parse("a@all*2").vectors(vectors)
            with torch.no_grad():
                with steerkit.steer(model, gatedly):
                    ran = [modes.generate(model, [prompt])[0] for prompt in (SHORT, LONG)]
                with steerkit.steer(model, plain):
                    steered = [modes.generate(model, [prompt])[0] for prompt in (SHORT, LONG)]
                bare = [modes.generate(model, [prompt])[0] for prompt in (SHORT, LONG)]
            opened = [one.answer == other.answer for one, other in zip(ran, steered, strict=True)]
            assert sorted(opened) == [False, True]
            for one, on, off, is_open in zip(ran, steered, bare, opened, strict=True):
                assert torch.allclose(one.logits, (on if is_open else off).logits, atol=1e-5)


def test_readings_are_those_of_a_monitor() -> None:
    """A vector of several sites, read off the model by its tokenizer: the gate opens between two prompts' scores."""
    model, tokenizer = model_of(), byte_tokenizer(CHATML)
    several = two_sites(model)
    monitor = steerkit.Monitor(model, tokenizer, several, neutral=NEUTRAL)
    stored = steerkit.with_neutral(model, tokenizer, several, neutral=NEUTRAL)
    assert SteeringVector.from_bytes(stored.to_bytes()) == stored
    prompts = ["How are you?", "What is the sea?", "Tell me a story."]
    scores = monitor.score(prompts).tolist()
    plain = vector_for(model, scope="response", site=Site(2), seed=3)
    steered, bare = (steerkit.generate(model, tokenizer, prompts, vector=v, max_new_tokens=4) for v in (plain, None))
    order = sorted(range(3), key=lambda place: scores[place])
    for count in range(1, 3):
        threshold = (scores[order[count - 1]] + scores[order[count]]) / 2
        (gatedly,) = Composition.parse(f"a when(b > {threshold!r})").vectors({"a": plain, "b": stored})
        texts = steerkit.generate(model, tokenizer, prompts, vector=gatedly, max_new_tokens=4)
        assert texts == [steered[n] if n in order[count:] else bare[n] for n in range(3)]


NEUTRAL = [
    steerkit.Conversation(f"What is {thing}?", answer=f"It is {kind}.")
    for thing, kind in zip("abcdef", ("red", "a sea", "far", "old", "new", "big"), strict=True)
]


def two_sites(model: Any) -> SteeringVector:
    one, other = (vector_for(model, scope="response", site=Site(layer), seed=9 + layer) for layer in (0, 3))
    return replace(one, sites=(*one.sites, *other.sites), tensors={**one.tensors, **other.tensors})


def test_a_held_reading_is_what_a_monitor_watches() -> None:
    """With limits wide enough, every generated token reads the target; per row, and restarted by each generate."""
    model, tokenizer = model_of(), byte_tokenizer(CHATML)
    stored = steerkit.with_neutral(model, tokenizer, vector_for(model, scope="response"), neutral=NEUTRAL)
    monitor = steerkit.Monitor(model, tokenizer, stored, neutral=NEUTRAL)
    (held,) = Composition.parse("a hold(a at 0.7 within -99 to 99)").vectors({"a": stored})
    turned = -stored.tensors["resid_post.1/direction"].roll(1) - 0.5 * stored.tensors["resid_post.1/direction"]
    across = replace(stored, tensors={"resid_post.1/direction": turned}, neutral={})  # it moves the reading backwards
    (other,) = Composition.parse("b hold(a at -2 within -99 to 99)").vectors({"a": stored, "b": across})
    with torch.no_grad(), steerkit.steer(model, [[held], None, [other]]), monitor.watch() as watched:
        modes.generate(model, [SHORT, LONG, LONG[::-1]])
    tokens, prompt = watched.last.tokens, watched.last.prompt
    assert prompt is not None
    for row, target in ((0, 0.7), (2, -2.0)):
        assert torch.allclose(tokens[row], torch.full_like(tokens[row], target), atol=1e-4)
        assert abs(float(prompt[row]) - target) < 1e-4
    assert (tokens[1] - 0.7).abs().min() > 1e-3


def test_rows_of_their_own_windows_and_fades() -> None:
    model, vectors = model_of(), known()
    lines = ["a*2[1:3] when(early < 9 per token)", "a*2 fade(linear over 3) when(late < 9)", HOLD, None]
    prompts = [SHORT, LONG, LONG[::-1], LONG]
    rows = [None if one is None else Composition.parse(one).vectors(vectors) for one in lines]
    alone = [Composition.parse(one).vectors(vectors) for one in ("a*2[1:3]", "a*2 fade(linear over 3)", HOLD)]
    with torch.no_grad():
        with steerkit.steer(model, rows):
            mixed = modes.generate(model, prompts)
        bare = modes.generate(model, prompts)
        for place, own in enumerate(alone):
            with steerkit.steer(model, own):
                (single,) = modes.generate(model, [prompts[place]])
            assert mixed[place].answer == single.answer
            assert torch.allclose(mixed[place].logits, single.logits, atol=1e-4)
    assert same(mixed[3], bare[3])


@pytest.mark.parametrize("method", ["ablation", "selective", "actadd"])
def test_any_method_is_gated(method: str) -> None:
    model, vectors = model_of(), known()
    rules, scope = ["early < 99", "late < 99", "early < 99 per token"], "response"
    other = rotations.planted(model, SelectiveSteering(), layers=[2]).at(60.0)
    if method == "ablation":
        other = replace(vectors["a"], method="ablation", edit="project_out", settings={"writes": "fitted"}).at(1.0)
    if method == "actadd":  # a window of the prompt, which no token decides
        rules, scope, other = rules[:2], "front", vector_for(model, scope="front")
    for when in rules:
        gatedly = other.at(scope=scope, when=When.parse(when).bound(vectors.__getitem__))
        with torch.no_grad():
            with steerkit.steer(model, gatedly):
                (one,) = modes.generate(model, [LONG])
            with steerkit.steer(model, other.at(scope=scope)):
                (two,) = modes.generate(model, [LONG])
            (bare,) = modes.generate(model, [LONG])
        assert torch.allclose(one.logits, two.logits, atol=1e-5), when
        assert not torch.allclose(one.logits, bare.logits, atol=1e-3), when


def test_assisted_decoding_is_plain_decoding() -> None:
    model, draft = model_of(), shortened(build("llama"), 2)
    for kind in KINDS:
        line = HOLD if kind == "hold" else RULES[kind][0]
        vectors = Composition.parse(line).vectors(known())
        with torch.no_grad(), steerkit.steer(model, vectors):
            (plain,) = modes.generate(model, [LONG])
            (assisted,) = modes.generate(model, [LONG], assistant_model=draft)
        assert assisted.answer == plain.answer, kind
        assert (assisted.logits - plain.logits).abs().max() < 1e-4, kind


def test_a_text_goes_on_in_the_callers_own_loop() -> None:
    """A prompt, then token by token in a cache that the caller hands on: as in one pass over the whole text."""
    model, ids = model_of(), torch.tensor([[*LONG, *SHORT]])
    for kind in ("token", "token, held open", "hold"):
        line = HOLD if kind == "hold" else RULES[kind][0]
        vectors = Composition.parse(line).vectors(known())
        with torch.no_grad(), steerkit.steer(model, vectors, prompt_lengths=[len(LONG)]):
            whole = model(ids, use_cache=False).logits
            out = model(ids[:, : len(LONG)], use_cache=True)
            parts = [out.logits]
            for place in range(len(LONG), ids.shape[1]):
                out = model(ids[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
                parts.append(out.logits)
        assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-4), kind


def test_compiled_decoding_holds_a_reading() -> None:
    torch._dynamo.reset()
    model = shortened(build("llama"), 2)
    backend, calls = counted()
    config = steerkit_compile_config(backend)
    with torch.no_grad(), steerkit.steer(model, Composition.parse(HOLD).vectors(known_of(model, "early", "a"))):
        (eager,) = modes.generate(model, [LONG])
        (compiled,) = modes.generate(model, [LONG], cache_implementation="static", compile_config=config)
    torch._dynamo.reset()
    assert calls
    assert compiled.answer == eager.answer
    assert (compiled.logits - eager.logits).abs().max() < 1e-4


RULES_OF_TWO = ("a when(early > 0)", "a when(early > 0 per token)")


def test_a_compiled_model_refuses_gates() -> None:
    model = shortened(build("llama"), 2)
    vectors = known_of(model, "early", "a")
    model.compile(backend="eager")
    for line in RULES_OF_TWO:
        with pytest.raises(ModelError, match="cannot steer a compiled model"):
            steerkit.steer(model, Composition.parse(line).vectors(vectors))


@pytest.mark.slow
@pytest.mark.parametrize("line", RULES_OF_TWO)
def test_compiled_decoding_refuses_gates(line: str) -> None:
    torch._dynamo.reset()
    model = shortened(build("llama"), 2)
    config = steerkit_compile_config(counted()[0])
    with (
        steerkit.steer(model, Composition.parse(line).vectors(known_of(model, "early", "a"))),
        pytest.raises(ScopeError, match="cannot steer compiled code"),
    ):
        modes.generate(model, [LONG], cache_implementation="static", compile_config=config)
    torch._dynamo.reset()


def refused(line: str, error: type[Exception], match: str, **more: Any) -> None:
    vectors = {**known(), **more}
    with pytest.raises(error, match=match):
        steerkit.steer(model_of(), Composition.parse(line).vectors(vectors))


def test_what_cannot_be_read_or_held_is_refused() -> None:
    model, vectors = model_of(), known()
    bare = replace(vectors["early"], neutral={})
    refused("a when(b > 0)", StrengthError, "^b: the vector file holds no readings of neutral texts", b=bare)
    broken = replace(vectors["early"], neutral={"prompt_last": {"joint": 1.0, "sites": {}}})
    refused("a when(b > 0)", VectorFileError, "^b: its readings of neutral texts lack a site", b=broken)
    refused("a when(w > 0)", DataError, "no single direction", w=vector_for(model, scope="front"))
    refused("a when(late > 0 per token)", ScopeError, "late is read at resid_post.3, later than resid_post.1")
    refused("a hold(early at 1 within 0 to 1)", SiteError, "early has no direction at resid_post.1")
    refused("g when(early > 0)", VectorMismatchError, "a gate of its own", g=gated.gated_vector(model))
    window = vector_for(model, scope="front")
    refused("w when(early > 0 per token)", ScopeError, "per token counts generated tokens", w=window)
    refused("w hold(a at 0 within 0 to 1)", ScopeError, "hold counts generated tokens", w=window)
    b, c = (
        replace(vectors["a"], tensors={"resid_post.1/direction": one})
        for one in torch.eye(len(vectors["a"].tensors["resid_post.1/direction"]))[:2]
    )
    refused("b hold(c at 0 within 0 to 1)", StrengthError, "does not move the reading of c", b=b, c=c)
    ablating = replace(vectors["a"], method="ablation", edit="project_out", settings={"writes": "fitted"})
    refused("b hold(a at 0 within 0 to 1)", StrengthError, "ablation does not add one direction", b=ablating)
    with pytest.raises(StrengthError, match="hold finds the strength itself"):
        vectors["a"].at(1.0, hold=Hold("a", 0.0, (0.0, 1.0), vectors["a"]))
    for line in ("a@all*1 when(early > 0)", "a@all hold(a at 0 within 0 to 1)"):
        (vector,) = Composition.parse(line).vectors(vectors)
        with pytest.raises(StrengthError, match="what differs from token to token"), steerkit.edited(model, vector):
            pass
    with pytest.raises(ScopeError, match="off cannot follow beams"):
        run(model, Composition.parse(RULES["token, held open"][0]).vectors(vectors), "beams")
    for kind in ("token", "hold"):
        line = HOLD if kind == "hold" else RULES[kind][0]
        with (
            steerkit.steer(model, Composition.parse(line.replace("a*", "a@all*")).vectors(vectors)),
            pytest.raises(ScopeError, match="cannot tell where the prompt ends"),
        ):
            model(torch.tensor([LONG]))


def test_the_same_in_python() -> None:
    plain = steerkit.SteeringVector.load("optimism-caa")
    said = plain.at(1.5, when="refusal-caa > 1.5 & optimism-caa < 2")
    assert said == Composition.parse("optimism-caa*1.5 when(refusal-caa > 1.5 & optimism-caa < 2)").vectors()[0]
    assert said != plain.at(1.5)
    held = plain.at(hold="optimism-caa at 2 within 0 to 3")
    assert held == Composition.parse("optimism-caa hold(optimism-caa at 2 within 0 to 3)").vectors()[0]
    with pytest.raises(steerkit.UnknownNameError, match="unknown vector 'refusal-cab'; did you mean 'refusal-caa'"):
        plain.at(when="refusal-cab > 1")
    with pytest.raises(steerkit.UnknownNameError, match=r"^steering, column 36: unknown vector 'refusal-cab'"):
        Composition.parse("formal-persona + optimism-caa when(refusal-cab > 1)").vectors()
    with pytest.raises(CompositionError, match="when 'x', column 2"):
        plain.at(when="x")
