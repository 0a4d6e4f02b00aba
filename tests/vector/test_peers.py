"""Files that other steering libraries write, imported: steering with them is what these libraries do with them.

Of each library its own code writes the file and its own code steers; both on a tiny random Llama, by this version of
transformers. The extra `peers` names their versions; `pip install --no-deps`, for their own wishes are older.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import steerkit
from steerkit.errors import VectorFileError
from steerkit.export.gguf import write_control_vector
from steerkit.export.svec import write_svec
from steerkit.network.sites import Site
from steerkit.vector.foreign.importing import import_vector
from steerkit.vector.steering_vector import SteeringVector
from tests.families import BLOCKS, build
from tests.tiny_tokenizers import byte_tokenizer

# Left-padded rows; pads see nothing and are seen by nothing.
IDS = torch.tensor([[0, 0, 5, 17, 44, 9], [101, 63, 7, 80, 12, 33]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
POSITIONS = (MASK.cumsum(1) - 1).clamp(min=0)
TEXTS = [("I love this", "I hate this"), ("What joy", "What pain"), ("Good!", "Bad!"), ("A gift", "A theft")]


def peer(name: str, *modules: str) -> list[Any]:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed; the extra `peers` says which version")
    return [importlib.import_module(module) for module in modules]


@pytest.fixture
def model() -> Any:
    return build("llama")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = byte_tokenizer()
    made.pad_token = made.bos_token
    return made


@pytest.fixture(scope="module")
def repeng() -> Iterator[Any]:
    """repeng; it names `numpy.float_`, which NumPy 2 has under another name, and nothing else of the old one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numpy, "float_", numpy.float64, raising=False)
        yield peer("repeng", "repeng")[0]


def logits(model: Any) -> torch.Tensor:
    """Logits of the real tokens."""
    with torch.no_grad():
        found = model(input_ids=IDS, attention_mask=MASK, position_ids=POSITIONS).logits
    return found[MASK.bool()]


def steered(model: Any, vector: SteeringVector, strength: float) -> torch.Tensor:
    with steerkit.steer(model, vector.at(scope="all"), strength):
        return logits(model)


def assert_same(found: torch.Tensor, theirs: torch.Tensor, plain: torch.Tensor) -> None:
    assert float((theirs - plain).abs().max()) > 0.01, "the peer steers nothing"
    assert float((found - theirs).abs().max()) < 1e-5


def test_repeng(repeng: Any, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    plain = logits(model)
    entries = [repeng.DatasetEntry(*pair) for pair in TEXTS]
    theirs = repeng.ControlVector.train(model, tokenizer, entries)
    assert sorted(theirs.directions) == [1, 2, 3]  # blocks counted from 0, without the first
    theirs.export_gguf(tmp_path / "v.gguf")
    for layers, strength in (([1, 2, 3], 1.5), ([2], -2.0)):
        imported = import_vector(tmp_path / "v.gguf", model, tokenizer, layers=layers)
        assert (imported.scope, imported.sites) == ("all", tuple(map(Site, layers)))
        found = steered(model, imported, strength)
        control = repeng.ControlModel(model, layers)
        control.set_control(theirs, strength)
        expected = logits(control)
        control.unwrap()
        assert_same(found, expected, plain)
    assert torch.equal(logits(model), plain)


def test_repeng_reads_our_export(repeng: Any, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = torch.randn(BLOCKS, 32, generator=torch.Generator().manual_seed(1))
    vector = SteeringVector.from_directions({1: rows[1], 3: rows[3]}, model, tokenizer, scope="all")
    write_control_vector(vector, tmp_path / "v.gguf", strength=1.5)
    theirs = repeng.ControlVector.import_gguf(tmp_path / "v.gguf")
    plain, found = logits(model), steered(model, vector, 1.5)
    control = repeng.ControlModel(model, [1, 3])
    control.set_control(theirs)
    expected = logits(control)
    control.unwrap()
    assert_same(found, expected, plain)


def test_dialz(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """It loads models itself, in half precision; both sides steer what it has loaded, in full precision."""
    (library,) = peer("dialz", "dialz")
    model.save_pretrained(tmp_path / "model")
    rows = torch.randn(BLOCKS, 32, generator=torch.Generator().manual_seed(4)).numpy()
    theirs = library.SteeringVector("llama", {1: rows[1], 2: rows[2]})
    theirs.export_gguf(tmp_path / "v.gguf")
    control = library.SteeringModel(str(tmp_path / "model"), [1, 2])
    control.model.float()
    plain = logits(control)
    control.set_control(theirs, 1.5)
    expected = logits(control)
    own = control.unwrap()
    imported = import_vector(tmp_path / "v.gguf", own, tokenizer)
    assert_same(steered(own, imported, 1.5), expected, plain)


def test_steering_vectors(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    (library,) = peer("steering_vectors", "steering_vectors")
    plain = logits(model)
    theirs = library.train_steering_vector(model, tokenizer, TEXTS, layers=[1, 2], move_to_cpu=True)
    torch.save(theirs.layer_activations, tmp_path / "v.pt")
    imported = import_vector(tmp_path / "v.pt", model, tokenizer)
    assert imported.sites == (Site(1), Site(2))
    torch.save({"layer_activations": theirs.layer_activations, "layer_type": theirs.layer_type}, tmp_path / "whole.pt")
    named = import_vector(tmp_path / "whole.pt", model, tokenizer)
    assert named.scope == "all" and named.tensors.keys() == imported.tensors.keys()
    assert all(torch.equal(named.tensors[name], tensor) for name, tensor in imported.tensors.items())
    with theirs.apply(model, multiplier=1.5):
        expected = logits(model)
    assert_same(steered(model, imported, 1.5), expected, plain)
    torch.save(theirs, tmp_path / "object.pt")
    with pytest.raises(VectorFileError, match=r"it holds steering_vectors\.steering_vector\.SteeringVector, an object"):
        import_vector(tmp_path / "object.pt", model, tokenizer)


def test_hidden_directions_matrix(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    load, pref = peer("hidden_directions", "hidden_directions.load", "hidden_directions.extract.pref")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = pref.PrefRecipe("joy", "You love all.", ["Yes!"], "You hate all.", ["No!"], ["And?", "Why?"])
    pref.extract_pref(str(tmp_path / "model"), recipe, dtype=torch.float32, device_map="cpu", out=tmp_path / "v.pt")
    imported = import_vector(tmp_path / "v.pt", model, tokenizer, layers="2")
    matrix = torch.load(tmp_path / "v.pt", weights_only=True)
    assert matrix.shape == (BLOCKS, 32) and imported.sites == (Site(2),)
    other = copy.deepcopy(model)
    load.patch_down_proj_bias(other, 2, 3.0 * matrix[2])
    assert_same(steered(model, imported, 3.0), logits(other), logits(model))


def test_hidden_directions_baked_and_converted(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    bake, load, convert = peer(
        "hidden_directions", "hidden_directions.bake", "hidden_directions.load", "hidden_directions.import_vector"
    )
    row = torch.randn(32, generator=torch.Generator().manual_seed(2))
    convert.import_to_pt(row, tmp_path / "v.pt", layer=2, n_layers=BLOCKS)
    imported = import_vector(tmp_path / "v.pt", model, tokenizer, layers="2")
    assert torch.equal(imported.tensors["resid_post.2/direction"], row)
    bake.bake_advocate(tmp_path / "baked", "x/y", 2, v_pref=row, alpha_pref=1.5, dtype=torch.float32)
    baked = import_vector(tmp_path / "baked" / "advocate_bias.pt", model, tokenizer)
    other = copy.deepcopy(model)
    load.patch_down_proj_bias(other, 2, torch.load(tmp_path / "baked" / "advocate_bias.pt", weights_only=True)["bias"])
    expected = logits(other)
    assert_same(steered(model, imported, 1.5), expected, logits(model))
    assert_same(steered(model, baked, 1.0), expected, logits(model))


def test_generation_is_the_same_as_theirs(repeng: Any, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Token by token with a cache, the prompt included."""
    rows = 4 * torch.randn(BLOCKS, 32, generator=torch.Generator().manual_seed(3))
    theirs = repeng.ControlVector("llama", {2: rows[2].numpy()})
    theirs.export_gguf(tmp_path / "v.gguf")
    imported = import_vector(tmp_path / "v.gguf", model, tokenizer)
    how = {"max_new_tokens": 12, "do_sample": False}
    plain = model.generate(IDS[1:], **how)
    with steerkit.steer(model, imported, 1.0):
        found = model.generate(IDS[1:], **how)
    control = repeng.ControlModel(model, [2])
    control.set_control(theirs)
    expected = control.generate(IDS[1:], **how)
    control.unwrap()
    assert found.tolist() == expected.tolist() != plain.tolist()


def test_hidden_directions_reads_our_json(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    load, convert = peer("hidden_directions", "hidden_directions.load", "hidden_directions.import_vector")
    row = torch.randn(32, generator=torch.Generator().manual_seed(5))
    vector = SteeringVector.from_directions({2: row}, model, tokenizer, scope="all")
    write_svec(vector, tmp_path / "v.json", strength=1.5)
    convert.import_to_pt(tmp_path / "v.json", tmp_path / "v.pt", n_layers=BLOCKS)
    other = copy.deepcopy(model)
    load.patch_down_proj_bias(other, 2, torch.load(tmp_path / "v.pt", weights_only=True)[2])
    assert_same(steered(model, vector, 1.5), logits(other), logits(model))
    again = import_vector(tmp_path / "v.json", model, tokenizer)
    assert torch.equal(again.tensors["resid_post.2/direction"], 1.5 * row)
