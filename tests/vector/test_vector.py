"""SteeringVector: construction, the file and everything that may be wrong with one, and the check against a model."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import steerkit
from steerkit import vector as vector_room
from steerkit.composition.rows import vectors_by_row
from steerkit.errors import (
    ScopeError,
    SiteError,
    SteerError,
    StrengthError,
    VectorFileError,
    VectorMismatchError,
)
from steerkit.evaluate import sweeps
from steerkit.evaluate.store import Store
from steerkit.network.sites import Site
from steerkit.tokens.fade import Fade
from steerkit.vector.hold import Hold
from steerkit.vector.model_identity import model_facts
from steerkit.vector.steering_vector import SteeringVector
from steerkit.vector.when import When
from tests.families import build

ROOT = Path(steerkit.__file__).parents[1]
POST, HEADS = Site(1, "resid_post"), Site(2, "z")
DESIGNED = {  # design section 4
    *("format", "method", "edit", "scope", "unit", "sites", "layer_counting", "model_type", "hidden_size"),
    *("num_layers", "digest", "steerkit_version", "norms", "model_id", "model_revision", "chat_template_sha256"),
    *("readout", "data_digest", "data_source", "seed", "settings", "paper", "held_out", "suggested_strength"),
    "tokenizer_sha256",
}
REQUIRED = [
    *("format", "method", "edit", "scope", "unit", "sites", "layer_counting", "model_type", "hidden_size"),
    *("num_layers", "digest"),
]


def small(**changes: Any) -> SteeringVector:
    """The least that is a vector: one direction of four numbers."""
    values: dict[str, Any] = {
        "method": "caa",
        "tensors": {"resid_post.1/direction": torch.tensor([1.0, 2.0, 2.0, 4.0])},
        "sites": (POST,),
        "edit": "add",
        "scope": "response",
        "unit": "paper",
        "model_type": "llama",
        "hidden_size": 4,
        "num_layers": 3,
    }
    return SteeringVector(**{**values, **changes})


def full(**changes: Any) -> SteeringVector:
    """Every field set, several dtypes and shapes, two sites of different widths."""
    values: dict[str, Any] = {
        "tensors": {
            "resid_post.1/direction": torch.tensor([[1.0, -0.0, 1e-42, 3.0]]),
            "z.2/direction": torch.arange(6).to(torch.bfloat16),
            "z.2/heads": torch.tensor([3, 1], dtype=torch.int64),
            "z.2/mask": torch.tensor([True, False]),
            "shared/theta": torch.tensor(0.5, dtype=torch.float64),
            "shared/half": torch.tensor([[[65504.0]]], dtype=torch.float16),
            "shared/byte": torch.tensor([255], dtype=torch.uint8),
        },
        "sites": (HEADS, POST),
        "settings": {"layers": [1, 2], "normalise": True, "alpha": 0.1, "name": "ü", "nested": {"b": None, "a": [{}]}},
        "norms": {POST: 52.5, HEADS: 0.1},
        "widths": {HEADS: 6},
        "suggested_strength": 2.5,
        "model_id": "org/model",
        "model_revision": "abc",
        "chat_template_sha256": "1" * 64,
        "tokenizer_sha256": "2" * 64,
        "readout": "response_mean",
        "data_digest": "3" * 64,
        "data_source": "prompts/optimism.jsonl",
        "seed": 7,
        "paper": "Rimsky et al. 2024",
        "held_out": {"items": 8, "sites": {"resid_post.1": {"auc": 0.9375}}},
        "steerkit_version": "0.1.0",
        "recipe": 'format = 1\n[model]\nid = "x"\n',
        "extra": {"weights": "4" * 64},
    }
    return small(**{**values, **changes})


def assert_same(one: SteeringVector, other: SteeringVector) -> None:
    for entry in fields(SteeringVector):
        if entry.name != "tensors":
            assert getattr(one, entry.name) == getattr(other, entry.name), entry.name
    assert list(one.tensors) == list(other.tensors)
    for name, tensor in one.tensors.items():
        assert tensor.dtype == other.tensors[name].dtype, name
        assert torch.equal(raw(tensor), raw(other.tensors[name])), name


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes, so that -0.0 is not 0.0."""
    return tensor.reshape(-1).view(torch.uint8)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def header_of(data: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


def packed(header: Any, tail: bytes = b"") -> bytes:
    """A container with any header."""
    head = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + tail


def resealed(data: bytes, change: Callable[[dict[str, Any]], Any], tail: bytes | None = None) -> bytes:
    """The file with another header (and tensor data) and a digest that fits: what a forger would write."""
    header = header_of(data)
    change(header)
    metadata = header.get("__metadata__")
    has_digest = False
    if isinstance(metadata, dict) and "digest" in metadata:
        has_digest, metadata["digest"] = True, "0" * 64
    if tail is None:
        tail = data[8 + int.from_bytes(data[:8], "little") :]
    forged = packed(header, tail)
    if has_digest:
        forged = forged.replace(b"0" * 64, hashlib.sha256(forged).hexdigest().encode(), 1)
    return forged


def with_metadata(name: str, text: Any) -> bytes:
    return resealed(small().to_bytes(), lambda header: header["__metadata__"].update({name: text}))


def refused(data: bytes, message: str | None = None) -> str:
    with pytest.raises(VectorFileError, match=message) as caught:
        SteeringVector.from_bytes(data, source="some file")
    text = str(caught.value)
    assert text.startswith("some file: ")
    assert "\n" not in text
    assert message == "altered file" or "altered" not in text  # else the forger's digest is all that was found wrong
    return text


# The round trip.


@pytest.mark.parametrize("make", [small, full])
def test_round_trip(make: Callable[[], SteeringVector], tmp_path: Path) -> None:
    vector = make()
    path = tmp_path / "a" / "b" / "v.safetensors"
    assert vector.save(str(path)) == path
    loaded = SteeringVector.load(path)
    assert_same(vector, loaded)
    assert loaded == vector
    assert loaded.digest == vector.digest
    assert loaded.to_bytes() == path.read_bytes() == vector.to_bytes()
    assert not loaded.own_scope
    assert names(path.parent) == ["v.safetensors"]


def test_metadata_is_what_the_design_names(tmp_path: Path) -> None:
    path = full().save(tmp_path / "v.safetensors")
    with safetensors.safe_open(path, "pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
    assert set(metadata) == DESIGNED | {"widths", "recipe", "extra"}
    assert set(header_of(small().to_bytes())["__metadata__"]) == {*REQUIRED, "settings", "steerkit_version"}
    assert metadata["format"] == "1"
    assert metadata["layer_counting"] == "blocks from 0, resid_post.N is the output of block N"
    assert json.loads(metadata["sites"]) == ["z.2", "resid_post.1"]
    assert json.loads(metadata["norms"]) == {"resid_post.1": 52.5, "z.2": 0.1}
    assert json.loads(metadata["settings"])["name"] == "ü"
    assert (metadata["hidden_size"], metadata["num_layers"], metadata["suggested_strength"]) == ("4", "3", "2.5")
    for name, tensor in full().tensors.items():
        assert torch.equal(tensors[name], tensor)
    assert tensors.keys() == full().tensors.keys()


def test_digest_is_the_sha256_with_zeros_in_its_place() -> None:
    data = full().to_bytes()
    stored = header_of(data)["__metadata__"]["digest"]
    assert stored == full().digest
    assert hashlib.sha256(data.replace(stored.encode(), b"0" * 64)).hexdigest() == stored


def test_same_vector_same_bytes_whatever_the_order() -> None:
    vector = full()
    backwards: dict[str, Any] = {
        name: dict(reversed(list(getattr(vector, name).items())))
        for name in ("tensors", "settings", "norms", "held_out", "extra")
    }
    assert replace(vector, **backwards).to_bytes() == vector.to_bytes()
    assert replace(vector, sites=(POST, HEADS)).to_bytes() != vector.to_bytes()  # an order that means something


def test_same_vector_same_bytes_in_another_process() -> None:
    script = (
        "import sys; from steerkit.vector import SteeringVector\n"
        "sys.stdout.buffer.write(SteeringVector.from_bytes(sys.stdin.buffer.read()).to_bytes())"
    )
    data = full().to_bytes()
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", script]
    assert (
        subprocess.run(command, cwd=ROOT, env=environment, input=data, stdout=subprocess.PIPE, check=True).stdout
        == data
    )


CHANGED: dict[str, Any] = {
    "method": "repe",
    "tensors": {**full().tensors, "shared/theta": torch.tensor(0.5000001, dtype=torch.float64)},
    "sites": (POST, HEADS),
    "edit": "add_window",
    "scope": "all",
    "unit": "norm",
    "model_type": "qwen2",
    "num_layers": 4,
    "settings": {"layers": [1, 3]},
    "norms": {POST: 52.500001},
    "spreads": {POST: 31.25},
    "massive": {POST: {3: 0.875}},
    "suggested_strength": 2.0,
    "calibration": {"by": "calibrate", "confirmed": True},
    "model_id": "org/model2",
    "answer_separator": " ",
    "model_revision": "abd",
    "chat_template_sha256": "5" * 64,
    "tokenizer_sha256": "6" * 64,
    "readout": "last",
    "data_digest": "7" * 64,
    "data_source": "other",
    "seed": 8,
    "paper": "other",
    "held_out": {"items": 9},
    "neutral": {"prompt_last": {"joint": 1.0, "sites": {"resid_post.1": {"mean": 0.5, "deviation": 2.0}}}},
    "steerkit_version": "0.1.1",
    "recipe": "format = 1",
    "extra": {"weights": "8" * 64},
    "fitted_at": (POST,),
}


@pytest.mark.parametrize("name", CHANGED)
def test_every_stored_field_is_part_of_the_identity(name: str) -> None:
    vector, other = full(), full(**{name: CHANGED[name]})
    assert other.digest != vector.digest
    assert other != vector
    assert_same(SteeringVector.from_bytes(other.to_bytes()), other)


APPLIED: dict[str, Any] = {
    "strength": 3.0,
    "own_scope": True,
    "own_unit": True,
    "fade": Fade.parse("linear over 4"),
    "when": When.parse("optimism-caa > 1.5"),
    "hold": Hold.parse("optimism-caa at 2 within 0 to 3"),
    "rows": (True, False),
}


@pytest.mark.parametrize("name", APPLIED)
def test_every_field_that_is_not_stored_tells_vectors_as_they_are_applied(name: str) -> None:
    vector, other = full(), replace(full(), **{name: APPLIED[name]})
    assert other.digest == vector.digest
    assert other != vector
    assert (other.application == vector.application) is (name in ("strength", "rows"))
    if name != "rows":
        assert [one.rows for one in vectors_by_row([[vector], [other]])] == [(True, False), (False, True)]


@pytest.mark.parametrize("name", APPLIED)
def test_figures_of_a_vector_are_not_taken_for_those_of_one_applied_in_another_way(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[SteeringVector] = []
    setup = SimpleNamespace(trial=lambda vector, _strength: asked.append(vector))
    monkeypatch.setattr(sweeps, "measure", lambda *_, **__: {})
    store, vectors = Store(None), [full(), replace(full(), **{name: APPLIED[name]})]
    for vector in [*vectors, *vectors]:
        sweeps.measure_point(setup, vector, 1.0, [], identity="one", store=store)  # type: ignore[arg-type]
    assert asked == vectors


def test_every_field_is_stored_or_said_not_to_be() -> None:
    told = CHANGED.keys() | APPLIED.keys() | {"hidden_size", "widths"}
    assert {entry.name for entry in fields(SteeringVector)} == told
    changed = full(hidden_size=6, widths={POST: 4})
    assert_same(SteeringVector.from_bytes(changed.to_bytes()), changed)
    applied = full().at(strength=3.0)
    assert applied != full()
    assert applied.to_bytes() == full().to_bytes()


TEXT = st.text(min_size=1).filter(str.strip)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    text=st.fixed_dictionaries(
        {name: TEXT for name in ("method", "edit", "scope", "model_type", "recipe", "data_source")}
    ),
    mappings=st.fixed_dictionaries(
        {name: st.dictionaries(st.text(), JSON, max_size=3) for name in ("settings", "held_out", "extra")}
    ),
    numbers=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9),
    strength=st.floats(allow_nan=False, allow_infinity=False),
    seed=st.integers(-(2**63), 2**63),
)
def test_whatever_is_stored_comes_back(
    text: dict[str, str], mappings: dict[str, Any], numbers: list[float], strength: float, seed: int
) -> None:
    tensors = {"resid_post.1/direction": torch.tensor(numbers)}
    more = {"tensors": tensors, "hidden_size": len(numbers), "suggested_strength": strength, "seed": seed}
    vector = small(**text, **mappings, **more)
    loaded = SteeringVector.from_bytes(vector.to_bytes())
    assert_same(loaded, vector)
    assert loaded.to_bytes() == vector.to_bytes()


def test_text_that_is_no_unicode_is_refused_before_it_is_written(tmp_path: Path) -> None:
    vector = small(data_source="file-\udcff")
    with pytest.raises(VectorFileError, match="no Unicode"):
        vector.save(tmp_path / "v.safetensors")
    assert not list(tmp_path.iterdir())


def test_header_that_begins_like_a_pickle_is_still_read() -> None:
    """A header of 640 bytes puts 0x80 0x02 first, as a pickle does."""
    vectors = (small(recipe="x" * length) for length in range(1, 800))
    vector = next(vector for vector in vectors if vector.to_bytes()[:2] == b"\x80\x02")
    assert_same(SteeringVector.from_bytes(vector.to_bytes()), vector)


# Files that are not what `save` wrote.


def test_any_altered_byte_is_refused() -> None:
    data = small(recipe="r", norms={POST: 1.5}).to_bytes()
    for place in range(len(data)):
        for mask in (1, 0x80):
            altered = bytearray(data)
            altered[place] ^= mask
            with pytest.raises(SteerError):
                SteeringVector.from_bytes(bytes(altered))


def test_any_missing_or_added_end_is_refused() -> None:
    data = small().to_bytes()
    for length in range(len(data)):
        refused(data[:length])
    for extra in (b"\0", b"\0" * 8, data):
        refused(data + extra, "damaged")
    refused(data[:-3], "truncated")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64) | st.binary(max_size=64).map(packed))
def test_any_bytes_are_refused(data: bytes) -> None:
    refused(data)


class Trap:
    """Touches a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrapped", [False, True])
def test_pickles_are_never_read(tmp_path: Path, protocol: int, wrapped: bool) -> None:
    path, trapped = tmp_path / "v.safetensors", tmp_path / "ran"
    if wrapped:
        torch.save({"direction": torch.ones(3), "trap": Trap(trapped)}, path, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps(Trap(trapped), protocol=protocol))
    with pytest.raises(VectorFileError, match="pickles are never read"):
        SteeringVector.load(path)
    assert not trapped.exists()


def test_no_source_file_reads_pickles() -> None:
    for path in Path(vector_room.__file__).parent.glob("*.py"):
        source = path.read_text()
        assert "torch.load" not in source.replace("safetensors.torch.load", "")
        assert "import pickle" not in source


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"GGUF\x03\0\0\0" + b"x" * 100, "a GGUF file, no vector file of steerkit's; `steerkit import"),
        (b"just text, longer than a header", "no safetensors file"),
        (b"{}", "JSON text, no vector file of steerkit's"),
        ((2**62).to_bytes(8, "little") + b"{}", "header of 4611686018427387904"),
        ((100).to_bytes(8, "little") + b"{}", "header of 100 announced"),
        (packed(b"{" + b" " * 17 * 2**20), "is too long"),
        (packed(b"{nonsense}"), "not JSON"),
        (packed(b"\xff\xfe"), "not JSON"),
        (packed(b'{"a":' * 200_000), "not JSON"),
        (packed(b'{"a":' + b"9" * 10_000 + b"}"), "not JSON"),
        (packed([1]), "no JSON object"),
        (packed({"__metadata__": []}), "metadata is not text"),
        (packed({"__metadata__": {"format": 1}}), "metadata is not text"),
        (packed({}), "without steerkit's metadata"),
        (packed({"__metadata__": {"format": "pt"}}), "without steerkit's metadata"),
        (safetensors.torch.save({"x": torch.ones(2)}), "without steerkit's metadata"),
        (safetensors.torch.save({"x": torch.ones(2)}, {"format": "pt"}), "without steerkit's metadata"),
    ],
    ids=range(18),
)
def test_other_files(data: bytes, message: str) -> None:
    refused(data, message)


def entry(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header["resid_post.1/direction"].update(changes)


CANNOT, UNFIT, BEGIN, LACKS = "cannot be read", "does not fit its bytes", "should begin at byte", "bytes of tensor data"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry(shape=[2**40, 2**40]), UNFIT),
        (entry(shape=[2**62]), CANNOT),
        (entry(shape=[0, 2**60], data_offsets=[0, 0]), CANNOT),
        (entry(shape=[4.0]), CANNOT),
        (entry(shape=[True, 4]), CANNOT),
        (entry(shape=[-4]), CANNOT),
        (entry(shape="4"), CANNOT),
        (entry(shape=None), CANNOT),
        (entry(shape=[1] * 9), CANNOT),
        (entry(shape=[3]), UNFIT),
        (entry(dtype="F8_E4M3"), CANNOT),
        (entry(dtype="C64"), CANNOT),
        (entry(dtype=[]), CANNOT),
        (entry(dtype="BF16"), UNFIT),
        (entry(data_offsets=[0, 15]), UNFIT),
        (entry(data_offsets=[0, 17]), UNFIT),
        (entry(shape=[5], data_offsets=[0, 20]), LACKS),
        (entry(shape=[3], data_offsets=[0, 12]), LACKS),
        (entry(shape=[2**40], data_offsets=[0, 2**42]), LACKS),
        (entry(data_offsets=[0, 2**60]), CANNOT),
        (entry(data_offsets=[-16, 0]), CANNOT),
        (entry(data_offsets=[16, 0]), UNFIT),
        (entry(data_offsets=[16, 32]), BEGIN),
        (entry(data_offsets=[0]), CANNOT),
        (entry(data_offsets=[0, 16, 16]), CANNOT),
        (entry(data_offsets={}), CANNOT),
        (entry(surprise=1), CANNOT),
        (lambda header: header.update({"resid_post.1/direction": 5}), CANNOT),
        (lambda header: header.update({"resid_post.1/direction": None}), CANNOT),
        (lambda header: header.pop("resid_post.1/direction"), LACKS),
        (lambda header: header["resid_post.1/direction"].pop("dtype"), CANNOT),
        (lambda header: header.update({"shared/x": header["resid_post.1/direction"]}), BEGIN),  # the same bytes again
        (
            lambda header: header.update(
                {f"shared/{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(4096)}
            ),
            "4097 tensors are too many",
        ),
    ],
    ids=range(33),
)
def test_lies_in_the_header(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    refused(resealed(small().to_bytes(), change), message)


def test_a_file_without_a_version_does_not_get_the_present_one() -> None:
    data = resealed(small().to_bytes(), lambda header: header["__metadata__"].pop("steerkit_version"))
    assert SteeringVector.from_bytes(data).steerkit_version is None


@pytest.mark.parametrize("name", REQUIRED)
def test_required_metadata(name: str) -> None:
    data = resealed(small().to_bytes(), lambda header: header["__metadata__"].pop(name))
    assert name in refused(data, "missing")


def test_all_missing_metadata_is_listed() -> None:
    def change(header: dict[str, Any]) -> None:
        for name in ("unit", "sites", "digest"):
            del header["__metadata__"][name]

    assert "unit, sites, digest" in refused(resealed(small().to_bytes(), change))


@pytest.mark.parametrize(
    ("version", "install"), [("0.9.1", "'steerkit-hf>=0.9.1'"), ("0.9; rm -rf /", "steerkit-hf"), (None, "steerkit-hf")]
)
def test_newer_format_names_what_to_install(version: str | None, install: str) -> None:
    header = header_of(small().to_bytes())
    header["__metadata__"] |= {"format": "12", "digest": "made in another way"}
    del header["__metadata__"]["scope"], header["__metadata__"]["steerkit_version"]  # it may need other things
    if version is not None:
        header["__metadata__"]["steerkit_version"] = version
    text = refused(packed(header, b"\0" * 16), "format 12 is newer than 1")
    assert text.endswith(f"pip install --upgrade {install}")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("format", "0"),
        ("format", "one"),
        ("format", "1.0"),
        ("format", ""),
        ("format", "9" * 5000),
        ("layer_counting", "blocks from 1"),
        ("unit", "furlong"),
        ("method", " "),
        ("scope", ""),
        ("edit", ""),
        ("model_type", ""),
        ("hidden_size", "four"),
        ("hidden_size", "-4"),
        ("hidden_size", "0"),
        ("hidden_size", "4.0"),
        ("hidden_size", "9" * 5000),
        ("hidden_size", "5"),
        ("num_layers", "1"),
        ("sites", "[]"),
        ("sites", "resid_post.1"),
        ("sites", '"resid_post.1"'),
        ("sites", "3"),
        ("sites", "[1]"),
        ("sites", '["resid_post.1", "resid_post.1"]'),
        ("sites", '["resid_post.2"]'),
        ("sites", '["nowhere.1"]'),
        ("sites", '["resid_post.1", "resid_post.2"]'),
        ("settings", "[]"),
        ("settings", "{"),
        ("settings", '{"a": NaN}'),
        ("settings", '{"a": 1e999}'),
        ("settings", '{"a": ' * 100_000),
        ("settings", '{"a": ' + "[" * 900 + "]" * 900 + "}"),
        ("norms", '{"resid_post.1": "1"}'),
        ("norms", '{"resid_post.1": Infinity}'),
        ("norms", '{"nowhere": 1}'),
        ("norms", "[]"),
        ("widths", '{"resid_post.1": 0}'),
        ("widths", '{"resid_post.1": 5}'),
        ("suggested_strength", "nan"),
        ("suggested_strength", "inf"),
        ("suggested_strength", "much"),
        ("seed", "x"),
        ("held_out", "8"),
        ("model_id", ""),
    ],
)
def test_metadata_that_means_nothing(name: str, text: str) -> None:
    assert len(refused(with_metadata(name, text))) < 400


def test_a_forged_file_that_is_right_is_read() -> None:
    """The forger's tool works, so that the refusals above are for the reason tested."""
    assert_same(SteeringVector.from_bytes(with_metadata("seed", "3")), small(seed=3))


@pytest.mark.parametrize(
    "name", ["direction", "resid_post.1", "resid_post.1/", "/direction", "resid_post.2/x", "resid_post.1/a/b", "x y/z"]
)
def test_tensor_names(name: str) -> None:
    def change(header: dict[str, Any]) -> None:
        header[name] = header.pop("resid_post.1/direction")

    assert repr(name) in refused(resealed(small().to_bytes(), change))
    with pytest.raises(VectorFileError, match="tensor"):
        small(tensors={name: torch.ones(4)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_non_finite_tensors(value: float, dtype: torch.dtype) -> None:
    bad = torch.tensor([1.0, value, 1.0, 1.0], dtype=dtype)
    with pytest.raises(VectorFileError, match=r"resid_post\.1/direction is not finite"):
        small(tensors={"resid_post.1/direction": bad})
    good = small(tensors={"resid_post.1/direction": torch.ones(4, dtype=dtype)}).to_bytes()
    tail = bad.view(torch.uint8).numpy().tobytes()
    refused(resealed(good, lambda header: None, tail), r"resid_post\.1/direction is not finite")


def test_digest_of_another_file_is_refused() -> None:
    one, other = small(), small(scope="all")
    data = one.to_bytes().replace(one.digest.encode(), other.digest.encode())
    refused(data, "altered file")
    refused(one.to_bytes().replace(one.digest.encode(), b"0" * 64), "altered file")


def test_digest_written_in_another_way_is_refused() -> None:
    """The digest is searched for as text: a file where it is not found must not pass."""
    header = header_of(small().to_bytes())
    loose = json.dumps(header).encode()
    loose += b" " * (-len(loose) % 8)
    refused(len(loose).to_bytes(8, "little") + loose + small().to_bytes()[-16:], "altered file")


# Reading and writing on a real disk.


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path / "missing.safetensors", "no such file"),
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "no regular file"),
        (Path("/dev/zero"), "no regular file"),
        (Path("nul\0byte"), "no such file|cannot be read"),
        (tmp_path / ("x" * 300), "no such file|cannot be read"),
    ]:
        with pytest.raises(VectorFileError, match=message) as caught:
            SteeringVector.load(path)
        assert str(path) in str(caught.value)


def test_a_file_of_absurd_size_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as handle:
        handle.truncate(5 * 2**30)  # sparse: takes no room
    with pytest.raises(VectorFileError, match="too many for a vector"):
        SteeringVector.load(path)


def test_load_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    path.write_bytes(small().to_bytes()[:-1])
    with pytest.raises(VectorFileError, match=r"v\.safetensors: truncated"):
        SteeringVector.load(path)


@pytest.mark.parametrize("where", ["folder", "file as folder", "device", "nul", "long name"])
def test_paths_that_cannot_be_written(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("old")
    path = {
        "folder": tmp_path,
        "file as folder": tmp_path / "file" / "v.safetensors",
        "device": Path("/proc/v.safetensors"),
        "nul": tmp_path / "nul\0byte",
        "long name": tmp_path / ("x" * 300),
    }[where]
    with pytest.raises(VectorFileError) as caught:
        small().save(path)
    assert str(path) in str(caught.value)
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), MemoryError])
@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("old", [True, False])
def test_interrupted_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any, moment: str, old: bool) -> None:
    path = tmp_path / "v.safetensors"
    if old:
        small().save(path)

    def stopped(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        owner: Any = os if moment == "fsync" else Path
        patch.setattr(owner, moment, stopped)
        kind = VectorFileError if isinstance(error, OSError) else error
        with pytest.raises(kind) as caught:
            full().save(path)
    if kind is VectorFileError:
        assert "No space left on device" in str(caught.value)
    assert names(tmp_path) == (["v.safetensors"] if old else [])
    if old:
        assert SteeringVector.load(path) == small()
    full().save(path)
    assert SteeringVector.load(path) == full()


@pytest.mark.parametrize("old", [True, False])
def test_killed_save(tmp_path: Path, old: bool) -> None:
    path = tmp_path / "v.safetensors"
    if old:
        small().save(path)
    script = (
        "import os, signal, sys; from steerkit.vector import SteeringVector\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"SteeringVector.from_bytes(sys.stdin.buffer.read()).save({str(path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, input=full().to_bytes(), check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.exists() == old
    if old:
        assert SteeringVector.load(path) == small()
    full().save(path)
    assert SteeringVector.load(path) == full()


def test_save_follows_links_and_keeps_to_the_umask(tmp_path: Path) -> None:
    target, link = tmp_path / "target.safetensors", tmp_path / "link.safetensors"
    link.symlink_to(target)
    umask = os.umask(0o027)
    try:
        assert small().save(link) == link
    finally:
        os.umask(umask)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    assert SteeringVector.load(link) == small()


# Construction.


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"method": ""}, VectorFileError, "method"),
        ({"scope": "  "}, VectorFileError, "scope"),
        ({"scope": None}, VectorFileError, "scope"),
        ({"edit": 3}, VectorFileError, "edit"),
        ({"unit": "metre"}, StrengthError, "metre"),
        ({"sites": ()}, VectorFileError, "sites"),
        ({"sites": ("resid_post.1",)}, VectorFileError, "sites"),
        ({"sites": (POST, POST)}, VectorFileError, "sites"),
        ({"sites": (POST, HEADS)}, VectorFileError, r"z\.2: the vector holds no tensor"),
        ({"num_layers": 1}, VectorFileError, r"resid_post\.1: layer 1 is outside 0\.\.0"),
        ({"num_layers": 3.0}, VectorFileError, "num_layers"),
        ({"hidden_size": True}, VectorFileError, "hidden_size"),
        ({"hidden_size": 5}, VectorFileError, r"shape \[4\]; it must be \[5\] or \[k, 5\]"),
        ({"tensors": {}}, VectorFileError, "1 to 4096 tensors"),
        ({"tensors": {f"shared/{n}": torch.ones(1) for n in range(4097)}}, VectorFileError, "4097"),
        ({"tensors": {"resid_post.1/direction": torch.ones(1, 1, 4)}}, VectorFileError, r"\[1, 1, 4\]"),
        ({"tensors": {"resid_post.1/direction": torch.tensor(1.0)}}, VectorFileError, r"\[\]"),
        ({"tensors": {"shared/direction": torch.ones(3)}}, VectorFileError, "shared/direction"),
        ({"tensors": {"resid_post.1/x": torch.ones(0, 4)}}, VectorFileError, r"\[0, 4\]"),
        ({"tensors": {"resid_post.1/x": torch.ones(2, dtype=torch.complex64)}}, VectorFileError, "complex64"),
        ({"tensors": {"resid_post.1/x": [1.0]}}, VectorFileError, "list, not a tensor"),
        ({"tensors": {"resid_post.1/x": np.ones(3)}}, VectorFileError, "ndarray, not a tensor"),
        ({"norms": {"resid_post.1": 1.0}}, VectorFileError, "norms"),
        ({"norms": {POST: float("nan")}}, VectorFileError, "norms"),
        ({"suggested_strength": float("inf")}, StrengthError, "suggested_strength"),
        ({"suggested_strength": [1.0]}, StrengthError, "suggested_strength"),
        ({"strength": float("nan")}, StrengthError, "finite"),
        ({"strength": [1.0, float("inf")]}, StrengthError, "finite"),
        ({"strength": []}, StrengthError, "finite"),
        ({"strength": "12"}, StrengthError, "finite"),
        ({"strength": True}, StrengthError, "finite"),
        ({"strength": 10**400}, StrengthError, "finite"),
        ({"settings": {"x": object()}}, VectorFileError, "settings"),
        ({"settings": {"x": float("nan")}}, VectorFileError, "settings"),
        ({"settings": {1: 2}}, VectorFileError, "settings"),
        ({"settings": {"x": torch.ones(1)}}, VectorFileError, "settings"),
        ({"settings": None}, VectorFileError, "settings"),
        ({"norms": None}, VectorFileError, "norms"),
        ({"seed": 1.5}, VectorFileError, "seed"),
        ({"seed": 10**30}, VectorFileError, "seed"),
    ],
)
def test_construction_is_checked(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        small(**changes)
    assert "\n" not in str(caught.value)


def test_nothing_mutable_travels() -> None:
    direction = torch.ones(4, requires_grad=True)
    given_settings = {"layers": [1, 2], "nested": {"a": 1}}
    vector = small(tensors={"resid_post.1/direction": direction}, settings=given_settings, norms={POST: 1})
    before = vector.to_bytes()
    with torch.no_grad():
        direction.mul_(2)
    given_settings["layers"].append(3)  # type: ignore[attr-defined]
    given_settings["nested"]["a"] = 2  # type: ignore[index]
    assert vector.to_bytes() == before
    frozen: Any = vector
    with pytest.raises(FrozenInstanceError):
        frozen.scope = "all"
    for mapping in (
        frozen.tensors,
        frozen.settings,
        frozen.settings["nested"],
        frozen.norms,
        frozen.widths,
        frozen.extra,
    ):
        with pytest.raises(TypeError):
            mapping["x"] = 1
    frozen.params(POST).clear()
    assert vector.params(POST).keys() == {"direction"}
    assert not vector.tensors["resid_post.1/direction"].requires_grad


def test_tensors_are_plain_cpu_copies() -> None:
    with torch.inference_mode():
        wide = torch.arange(8.0).reshape(2, 4).t()[:, 1]
        vector = small(tensors={"resid_post.1/direction": wide})
    kept = vector.tensors["resid_post.1/direction"]
    assert kept.is_contiguous()
    assert not kept.is_inference()
    assert kept.untyped_storage().nbytes() == 16
    assert kept.tolist() == [4, 5, 6, 7]


def test_copies_and_other_processes() -> None:
    for vector in (full(), full().at(strength=[1, 2], scope="all")):
        for other in (copy.copy(vector), copy.deepcopy(vector), pickle.loads(pickle.dumps(vector))):
            assert other == vector
            assert_same(other, vector)
    assert len({full(), full(), small()}) == 2
    assert full() != "a text"


def test_repr_is_short() -> None:
    assert repr(small()) == f"SteeringVector(caa at resid_post.1; llama, {small().digest[:12]})"


def test_model_id_never_tells_the_folder() -> None:
    assert small(model_id="/home/somebody/models/smol").model_id == "smol"
    assert small(model_id="C:\\Users\\somebody\\smol").model_id == "smol"
    assert small(model_id="org/smol").model_id == "org/smol"
    assert small(model_id="/x/hub/models--org--smol/snapshots/abc123").model_id == "org/smol"
    assert small(model_id=str(Path.cwd())).model_id == Path.cwd().name


# Use.


def test_params() -> None:
    vector = full()
    assert vector.params(POST).keys() == {"direction", "theta", "half", "byte"}
    assert vector.params(HEADS).keys() == {"direction", "heads", "mask", "theta", "half", "byte"}
    own = small(tensors={"shared/x": torch.tensor(1.0), "resid_post.1/x": torch.tensor(2.0)})
    assert own.params(POST)["x"].item() == 2.0
    with pytest.raises(SiteError, match=r"resid_post\.2: this vector acts at resid_post\.1"):
        small().params(Site(2))
    shared = small(sites=(POST, Site(2)), tensors={"shared/direction": torch.ones(4)})
    assert shared.params(Site(2)).keys() == {"direction"}


def test_prefixes_of_sites_are_not_mixed_up() -> None:
    tensors = {"resid_post.1/direction": torch.ones(4), "resid_post.11/direction": torch.zeros(4)}
    vector = small(sites=(POST, Site(11)), num_layers=12, tensors=tensors)
    assert vector.params(POST)["direction"].sum() == 4
    assert vector.params(Site(11))["direction"].sum() == 0


def test_at() -> None:
    vector = small()
    assert (vector.strength, vector.own_scope, vector.own_unit) == (None, False, False)
    applied = vector.at(strength=2, scope="first(3)", unit="norm")
    assert (applied.strength, applied.scope, applied.unit) == (2.0, "first(3)", "norm")
    assert (applied.own_scope, applied.own_unit) == (True, True)
    assert vector.scope == "response"
    assert vector.at(scope="all").strength is None
    assert vector.at(strength=1).at(scope="all").strength == 1.0
    assert vector.at(strength=[1, 2.5]).strength == (1.0, 2.5)
    assert vector.at(strength=torch.tensor([1, 2])).strength == (1.0, 2.0)
    assert vector.at(strength=torch.tensor(0.5)).strength == 0.5
    float32: Any = np.float32(0.5)
    assert vector.at(strength=float32).strength == 0.5
    assert vector.at(strength=np.array([1.0, 2.0]).tolist()).strength == (1.0, 2.0)
    wrong: Any = "metre"
    with pytest.raises(StrengthError, match="metre"):
        vector.at(unit=wrong)
    with pytest.raises(ScopeError, match="did you mean 'response'"):
        vector.at(scope="responce")
    with pytest.raises(StrengthError, match="finite"):
        vector.at(strength=float("nan"))


def test_another_unit_does_not_inherit_the_suggestion() -> None:
    vector = small(suggested_strength=2.0)
    with pytest.raises(StrengthError, match="counts in unit 'paper'; give a strength too"):
        vector.at(unit="norm")
    assert vector.at(strength=0.5, unit="norm").suggested_strength is None
    assert vector.at(strength=0.5).at(unit="norm").strength == 0.5
    assert vector.at(unit="paper").suggested_strength == 2.0


def test_with_held_out() -> None:
    vector = small().with_held_out({"items": 8, "sites": {}})
    assert vector.held_out["items"] == 8
    with pytest.raises(VectorFileError, match="held_out"):
        small().with_held_out({"auc": float("nan")})


def test_describe() -> None:
    facts = full(tensors={"resid_post.1/direction": torch.tensor([3.0, 4.0, 0, 0]), "z.2/x": torch.ones(1)}).describe()
    assert facts == json.loads(json.dumps(facts))
    assert DESIGNED - facts.keys() == {"norms"}  # by site
    assert facts["held_out"]["sites"] == {"resid_post.1": {"auc": 0.9375}}
    heads, post = facts["sites"]
    assert post["site"] == "resid_post.1"
    assert post["params"] == {"direction": ["F32", [4]]}
    assert (post["width"], heads["width"]) == (4, 6)
    assert post["direction_norm"] == pytest.approx(5.0)
    assert post["activation_norm"] == 52.5
    assert post["strength"] == {"paper": 2.5, "norm": pytest.approx(2.5 * 5 / 52.5)}
    assert heads["direction_norm"] is None
    assert heads["strength"] == {"paper": 2.5, "norm": None}


def test_describe_strength_in_both_units() -> None:
    vector = small(norms={POST: 10.0})  # the direction is 5 long
    assert vector.describe()["sites"][0]["strength"] == {"paper": None, "norm": None}, "none is given or suggested"
    assert vector.at(strength=4).describe()["sites"][0]["strength"] == {"paper": 4.0, "norm": 2.0}
    assert vector.at(strength=4, unit="norm").describe()["sites"][0]["strength"] == {"norm": 4.0, "paper": 8.0}
    assert vector.at(strength=[1, 2]).describe()["sites"][0]["strength"] == {"paper": [1.0, 2.0], "norm": [0.5, 1.0]}
    assert small().describe()["sites"][0]["strength"]["norm"] is None
    rotated = small(edit="rotate", norms={POST: 10.0})
    assert rotated.describe()["sites"][0]["strength"]["norm"] is None


def test_describe_length_of_a_window_leaves_the_zero_row_out() -> None:
    rows = torch.tensor([[0.0, 0, 0, 0], [3.0, 4.0, 0, 0], [6.0, 8.0, 0, 0], [5.0, 12.0, 0, 0]])
    vector = small(tensors={"resid_post.1/direction": rows})
    assert vector.describe()["sites"][0]["direction_norm"] == pytest.approx(10.0)


# Against a model.


@pytest.fixture(scope="module")
def llama() -> Any:
    return build("llama")


def fitted_on(model: Any, **changes: Any) -> SteeringVector:
    facts = model_facts(model)
    tensors = {"resid_post.1/direction": torch.ones(facts["hidden_size"])}
    return small(tensors=tensors, **{**facts, **changes})


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_vlm", "mamba", "llama_peft"])
def test_check_accepts_its_own_model(family: str) -> None:
    model = build(family)
    vector = fitted_on(model)
    assert (vector.num_layers, vector.hidden_size) == (4, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vector.check(model)


def test_check_refuses_another_size(llama: Any) -> None:
    wider = small()
    with pytest.raises(VectorMismatchError) as caught:
        wider.check(llama)
    text = str(caught.value)
    assert text.startswith(
        "vector fitted on llama (3 layers, width 4) cannot steer LlamaForCausalLM (4 layers, width 32): "
    )
    with pytest.raises(VectorMismatchError, match="5 layers"):
        fitted_on(llama, num_layers=5).check(llama)
    with pytest.raises(VectorMismatchError, match="no config"):
        small().check(torch.nn.Linear(2, 2))


def test_check_names_the_model_inside_a_wrapper() -> None:
    with pytest.raises(VectorMismatchError, match="cannot steer LlamaForCausalLM"):
        small().check(build("llama_peft"))


class Chat:
    def __init__(self, template: Any) -> None:
        self.chat_template = template


def test_check_warns_of_another_model() -> None:
    model: Any = build("llama")
    model.config._name_or_path, model.config._commit_hash = "org/one", "rev1"
    vector = fitted_on(model, chat_template_sha256=hashlib.sha256(b"T").hexdigest())
    assert (vector.model_id, vector.model_revision) == ("org/one", "rev1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vector.check(model)
        vector.check(model, Chat("T"))
        vector.check(model, Chat(None))
        unknown: dict[str, Any] = {"model_id": None, "model_revision": None, "chat_template_sha256": None}
        replace(vector, **unknown).check(model, Chat("U"))
    with pytest.warns(UserWarning, match="the chat template"):
        vector.check(model, Chat("U"))
    model.config._name_or_path = "org/two"
    with pytest.warns(UserWarning, match="fitted on model 'org/one', this is 'org/two'") as caught:
        vector.check(model)
    assert caught[0].filename == __file__
    model.config._name_or_path, model.config._commit_hash = "org/one", "rev2"
    with pytest.warns(UserWarning, match="revision 'rev1'"):
        vector.check(model)
    with pytest.warns(UserWarning, match="model type 'gpt2'"):
        replace(vector, model_type="gpt2", model_revision=None).check(model)


def test_a_local_copy_is_the_same_model() -> None:
    model: Any = build("llama")
    model.config._name_or_path = "org/one"
    vector = fitted_on(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("/data/models/one", "/x/models--org--one/snapshots/123"):
            model.config._name_or_path = name
            vector.check(model)
    for name in ("/data/models/two", "other/one"):
        model.config._name_or_path = name
        with pytest.warns(UserWarning, match="fitted on model"):
            vector.check(model)


def test_facts_of_a_model(llama: Any) -> None:
    assert model_facts(llama, Chat("T")) == {
        "model_type": "llama",
        "hidden_size": 32,
        "num_layers": 4,
        "model_id": None,
        "model_revision": None,
        "chat_template_sha256": hashlib.sha256(b"T").hexdigest(),
    }
    assert model_facts(build("gemma3_vlm"))["model_type"] == "gemma3_text"


def test_a_file_of_format_1_is_read_for_ever() -> None:
    """Written once by the first version that had this format; never written again."""
    path = Path(__file__).parents[1] / "golden" / "vector_format_1.safetensors"
    vector = SteeringVector.load(path)
    assert vector.method == "caa"
    assert [str(site) for site in vector.sites] == ["resid_post.1", "attn_out.2"]
    assert torch.equal(vector.params(Site(1))["direction"], torch.tensor([0.5, -1.0, 2.0, 0.25]))
    assert torch.equal(vector.params(Site(2, "attn_out"))["direction"], torch.tensor([1.0, 0.0, -1.0, 4.0]))
    assert vector.norms == {Site(1): 10.0, Site(2, "attn_out"): 2.5}
    assert (vector.scope, vector.unit, vector.suggested_strength) == ("response", "paper", 1.5)
