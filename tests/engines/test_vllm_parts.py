"""What steers vLLM, without vLLM: steps over two blocks that do nothing, admission, settings, keys of prefixes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steerkit.engines.vllm.board import Board
from steerkit.engines.vllm.names import Step, parts, wrap
from steerkit.engines.vllm.places import places
from steerkit.engines.vllm.plan import Served, key_of, planned, span
from steerkit.engines.vllm.points import Point
from steerkit.engines.vllm.prefixes import steering_keys
from steerkit.engines.vllm.requests import CARRIED, Admission
from steerkit.engines.vllm.settings import Settings
from steerkit.engines.vllm.steps import Steerer
from steerkit.errors import CompositionError, ModelError, SiteError, SteerError
from steerkit.network.sites import Site
from steerkit.tokens.scope import Scope
from steerkit.vector.steering_vector import SteeringVector

WIDTH = 8
SERVED = Served(WIDTH, 2, ("resid_post",), 2, 4)


def addition(number: float, layer: int = 0) -> SteeringVector:
    """Adds a number to every dimension after a block."""
    return SteeringVector(
        method="caa",
        tensors={f"resid_post.{layer}/direction": torch.full((WIDTH,), number)},
        sites=(Site(layer),),
        edit="add",
        scope="response",
        unit="paper",
        model_type="llama",
        hidden_size=WIDTH,
        num_layers=2,
        suggested_strength=1.0,
    )


class Worker:
    """Blocks that hand on what they get, requests, and what steers them."""

    def __init__(self, folder: Path, rows: int, entries: int = 8) -> None:
        self.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])
        shapes = {"places": 2, "rows": rows, "tokens": 32, "width": WIDTH, "entries": entries, "levels": 2, "terms": 4}
        board = Board(**shapes, device=torch.device("cpu"))
        points = [Point(Site(number), number, board) for number in range(2)]
        for point, block in zip(points, self.blocks, strict=True):
            point.hang(block)
        self.eager = 0
        self.board, self.steerer = board, Steerer(points, board, SERVED, rows=rows, eagerly=self.eagerly, graphed=True)
        self.admission = Admission(Settings(folder=str(folder)), SERVED)
        self.requests: dict[str, tuple[Any, int]] = {}

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        self.eager += 1
        yield

    def add(self, name: str, steering: str | None, prompt: int) -> None:
        self.requests[name] = (self.admission.admitted({"steering": steering}, prompt) or {}, prompt)

    def step(self, **tokens: tuple[int, int]) -> dict[str, list[float]]:
        """What a step adds to the tokens from one position to before another of some requests."""
        counts = [end - first for first, end in tokens.values()]
        starts = tuple(sum(counts[:number]) for number in range(len(counts) + 1))
        positions = torch.cat([torch.arange(*one) for one in tokens.values()])
        step = Step(tuple(tokens), starts, positions, tuple(first for first, _ in tokens.values()))

        def forward() -> Tensor:
            h: Tensor = torch.zeros(starts[-1], WIDTH)
            for block in self.blocks:
                h = block(h)
            return h

        found = self.steerer.run(step, self.requests.get, forward)[:, 0].tolist()
        return {name: found[starts[number] : starts[number + 1]] for number, name in enumerate(tokens)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, vector in {"one": addition(1.0), "ten": addition(10.0), "late": addition(100.0, 1)}.items():
        vector.save(tmp_path / f"{name}.safetensors")
    return tmp_path


def test_tokens_are_written_by_their_place_in_the_request(folder: Path) -> None:
    worker = Worker(folder, rows=4)
    worker.add("a", "one + ten@generated + late@all*2", 3)
    worker.add("b", None, 5)
    worker.add("c", "one@first(2)*4 fade(linear over 2)", 2)
    assert worker.step(a=(0, 2), b=(0, 5)) == {"a": [200.0, 200.0], "b": [0.0] * 5}
    assert worker.step(b=(5, 6), a=(2, 3), c=(0, 4)) == {"b": [0.0], "a": [201.0], "c": [4.0, 4.0, 0.0, 0.0]}
    assert worker.step(a=(3, 6)) == {"a": [211.0] * 3}
    assert worker.step(b=(6, 7)) == {"b": [0.0]}
    assert worker.step(a=(2, 4)) == {"a": [201.0, 211.0]}  # computed again


def test_rows_and_entries_are_given_back(folder: Path) -> None:
    worker = Worker(folder, rows=1, entries=3)
    for number in range(5):
        name = f"request{number}"
        worker.add(name, "one*1" if number % 2 else "ten + late", 1)
        assert worker.step(**{name: (0, 1)}) == {name: [1.0 if number % 2 else 110.0]}
        del worker.requests[name]
    assert worker.eager == 0
    assert worker.board.entries == 3


def test_a_request_that_waits_lends_its_row(folder: Path) -> None:
    worker = Worker(folder, rows=1)
    worker.add("a", "one", 1)
    worker.add("b", "ten", 1)
    for _ in range(2):
        assert worker.step(a=(0, 1)) == {"a": [1.0]}
        assert worker.step(b=(0, 1)) == {"b": [10.0]}


def test_a_board_that_grows_is_read_by_python(folder: Path) -> None:
    worker = Worker(folder, rows=4, entries=2)
    worker.add("a", "one", 1)
    worker.add("b", "ten", 1)
    assert worker.step(a=(0, 1), b=(0, 1)) == {"a": [1.0], "b": [10.0]}
    assert worker.eager == 1
    assert worker.board.entries == 4


def test_readings_over_chunks(folder: Path) -> None:
    worker = Worker(folder, rows=2)
    part = [[[1, 4]], [[1, 5]]]  # what is meant, and what is counted
    asked = {"name": "x", "sites": {"resid_post.1": part}}
    worker.requests["a"] = (worker.admission.admitted({"steering": "one@first(2)", "steerkit_read": asked}, 5) or {}, 5)
    worker.step(a=(0, 2))
    worker.step(a=(2, 5))
    assert worker.eager == 2
    found = worker.steerer.take(["x", "y"])
    assert list(found) == ["x"]
    mean, norms, middle, power = (
        torch.frombuffer(bytearray(one), dtype=torch.float32) for one in found["x"]["resid_post.1"]
    )
    assert mean.tolist() == [pytest.approx(1 / 3)] * WIDTH  # of tokens that the first block wrote 1, 0 and 0
    assert norms.tolist() == [pytest.approx(WIDTH**0.5), 0.0, 0.0, 0.0]
    assert middle.tolist() == [pytest.approx(0.25)] * WIDTH
    assert power.tolist() == [pytest.approx(0.75**2 + 3 * 0.25**2)] * WIDTH
    for sites in ({}, {"resid_post.1": [[[1, 9]], []]}, {"z.1": part}, {"resid_post.7": part}, ["resid_post.1"]):
        with pytest.raises(SteerError):
            worker.admission.admitted({"steerkit_read": {**asked, "sites": sites}}, 5)
    with pytest.raises(SteerError):
        worker.admission.admitted({"steerkit_read": {}}, 5)


@pytest.mark.parametrize(
    ("scope", "wanted"),
    [("all", (0, 2**31 - 1)), ("prompt", (0, 7)), ("response", (6, 2**31 - 1)), ("generated(2:5)", (9, 12))],
)
def test_spans(scope: str, wanted: tuple[int, int]) -> None:
    assert span(Scope.parse(scope), 7) == wanted


def keys(vectors: Sequence[SteeringVector], prompt: int) -> tuple[str, int]:
    return key_of(planned(vectors, SERVED), prompt)


def test_keys_of_prefixes() -> None:
    one = addition(1.0)
    everywhere = one.at(scope="all", strength=1.0)
    assert keys([everywhere], 5) == keys([everywhere], 9)
    # As an answer the same tokens are steered elsewhere.
    assert keys([one], 5)[0] != keys([one], 9)[0]
    assert keys([one], 5)[1] == 4
    assert keys([everywhere.at(fade="linear over 4")], 5)[0] != keys([everywhere.at(fade="linear over 4")], 9)[0]
    others = [
        one.at(strength=2.0),
        one.at(scope="generated"),
        addition(2.0),
        replace(one, unit="norm", norms={Site(0): 3.0}),
    ]
    assert len({keys([vector], 5)[0] for vector in (one, *others)}) == 5
    assert steering_keys(None, 100) == []
    assert steering_keys({"other": 1}, 100) == []


def test_a_neutral_composition_is_a_plain_request(folder: Path) -> None:
    admission = Admission(Settings(folder=str(folder)), SERVED)
    assert admission.admitted({"steering": "one*0", "mine": 3}, 4) == {"steering": "one*0", "mine": 3}
    assert admission.admitted(None, 4) is None


def test_a_default_and_what_comes_before_it(folder: Path) -> None:
    admission = Admission(Settings(folder=str(folder), default="one"), SERVED)
    found = admission.admitted({}, 4)
    assert found is not None
    assert found[CARRIED]["vectors"].keys() == {"one"}
    assert CARRIED not in (admission.admitted({"steering": ""}, 4) or {})
    assert json.dumps(found[CARRIED]["composition"])
    with pytest.raises(SteerError, match="nothing"):
        Admission(Settings(folder=str(folder), default="nothing"), SERVED)


def test_a_name_is_no_path(folder: Path) -> None:
    admission = Admission(Settings(folder=str(folder)), SERVED)
    for name in (f'"{folder}/one.safetensors"', "./one", "../one"):
        with pytest.raises(SteerError):
            admission.admitted({"steering": name}, 4)
    with pytest.raises(SteerError, match="a request names vectors, and no files"):
        Admission(Settings(), SERVED).admitted({"steering": f'"{folder}/one.safetensors"'}, 4)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"level": 1}, "unknown setting 'level'"),
        ({"levels": 0}, "at least 1"),
        ({"kinds": ["z"]}, "unknown kind 'z'"),
        ({"folder": "/nowhere"}, "folder"),
        (3, "an object"),
    ],
)
def test_wrong_settings(given: Any, why: str) -> None:
    with pytest.raises(CompositionError, match=why):
        Settings.of({"steerkit": given})
    assert Settings.of({}) == Settings.of(None) == Settings()


def test_blocks_that_cannot_be_told() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

    def block(**halves: nn.Module) -> nn.Module:
        made = nn.Module()
        for name, half in halves.items():
            setattr(made, name, half)
        return made

    def is_attention(module: nn.Module) -> bool:
        return any(getattr(one, "attends", False) for one in module.modules())

    attention = Half()
    attention.attends = True  # type: ignore[assignment]
    model = nn.Module()
    model.layers = nn.ModuleList([block(self_attn=attention, mlp=Half(), norm=nn.LayerNorm(2)) for _ in range(2)])
    found = places(model, 2, ("resid_post", "attn_out", "mlp_out"), is_attention)
    assert [str(one.site) for one in found[:3]] == ["resid_post.0", "attn_out.0", "mlp_out.0"]
    assert found[2].module is model.layers[0].mlp
    for post in ("post_attention_layernorm", "post_feedforward_layernorm"):
        for one in model.layers:
            setattr(one, post, nn.LayerNorm(2))
    found = places(model, 2, ("attn_out",), is_attention)
    assert found[0].module is model.layers[0].post_attention_layernorm
    model.layers[1].experts = Half()
    with pytest.raises(SiteError, match="block 1"):
        places(model, 2, ("mlp_out",), is_attention)
    with pytest.raises(SiteError, match="3 blocks are wanted"):
        places(model, 3, ("resid_post",), is_attention)


def test_a_vllm_without_the_parts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType

    for name in ("vllm", "vllm.v1", "vllm.v1.engine", "vllm.v1.engine.input_processor"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "99.0", raising=False)
    parts.cache_clear()
    with pytest.raises(ModelError, match=r"vLLM 99.0 is not steered: .*InputProcessor.*knows vLLM 0.32.0"):
        parts()
    parts.cache_clear()


def test_wrapping_twice_is_wrapping_once() -> None:
    class Owner:
        def double(self, number: int) -> int:
            return 2 * number

    for _ in range(2):
        wrap(Owner, "double", lambda inner, *args: inner(*args) + 1)
    assert Owner().double(3) == 7
