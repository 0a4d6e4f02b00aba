"""LoRA adapters for llama.cpp and the JSON of other programs: what the files hold, and what they cannot hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as tf

from steerkit.errors import ModelError, ScopeError, SiteError, StrengthError, VectorFileError
from steerkit.export import gguf_lora, write_control_vector, write_gguf_lora, write_svec
from steerkit.export.adapter_parts import AdapterParts, parts_for
from steerkit.export.gguf import IGNORED, PARTLY
from steerkit.network.sites import Site
from steerkit.vector.foreign.importing import read_foreign
from steerkit.vector.steering_vector import SteeringVector
from tests.export.test_baking import added
from tests.export.test_gguf import vector_at
from tests.families import GROUPED, QUIET, build
from tests.methods import test_ablation
from tests.program import Cli


@pytest.mark.parametrize("family", sorted([*IGNORED, *PARTLY]))
def test_a_warning_where_llama_cpp_leaves_control_vectors_out(family: str, tmp_path: Path) -> None:
    said = "adds them nowhere" if family in IGNORED else "behind MLP blocks only"
    with pytest.warns(UserWarning, match=said):
        path = write_control_vector(vector_at(2, model_type=family), tmp_path / "v.gguf")
    assert path.exists()  # another build may read it


def test_svec_comes_back_exactly(tmp_path: Path) -> None:
    numbers = {0: torch.tensor([0.1, -2e-30, 3.0, 1e30]), 3: torch.tensor([1.0, 2.0, 3.0, 4.0])}
    tensors = {f"resid_post.{layer}/direction": direction for layer, direction in numbers.items()}
    vector = vector_at(0, 3, tensors=tensors)
    path = write_svec(vector, tmp_path / "new" / "v.svec", strength=2.0)
    content = json.loads(path.read_text())
    assert (content["model_type"], list(content["directions"])) == ("llama", ["0", "3"])
    found = read_foreign(path)
    assert list(found.by_layer) == [0, 3]
    for layer, direction in numbers.items():
        assert torch.equal(found.by_layer[layer], 2.0 * direction)
    assert write_svec(vector, tmp_path / "again.svec", strength=2.0).read_bytes() == path.read_bytes()
    for wrong, error in (
        (vector_at(2, edit="project_out"), VectorFileError),
        (vector_at(2, scope="response"), ScopeError),
        (vector_at(2, kind="mlp_out"), SiteError),
        (vector_at(2).at(strength=[1.0, 2.0]), StrengthError),
    ):
        with pytest.raises(error, match=r"this format|one per row"):
            write_svec(wrong, tmp_path / "w.svec")
    assert not (tmp_path / "w.svec").exists()


def test_what_an_adapter_of_llama_cpp_holds(tmp_path: Path) -> None:
    model = build("llama")
    vector = test_ablation.vector_for(model, writes=("mlp_out.1",))
    lora = write_gguf_lora(model, None, vector, tmp_path / "new" / "l.gguf", strength=0.5)
    reader = gguf.GGUFReader(lora.file)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,  # every pair is used as it is
    }
    pair = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert list(pair) == ["blk.1.ffn_down.weight.lora_a", "blk.1.ffn_down.weight.lora_b"]
    a, b = (torch.from_numpy(one) for one in pair.values())
    assert (a.shape, b.shape) == ((1, 48), (32, 1))
    weight = model.model.layers[1].mlp.down_proj.weight.detach()
    u = vector.tensors["shared/direction"] / vector.tensors["shared/direction"].norm()
    torch.testing.assert_close(b @ a, -0.5 * torch.outer(u, u @ weight), atol=1e-6, rtol=1e-5)
    assert lora.verification.holds and lora.verification.effect > 1e-3
    second = write_gguf_lora(model, None, vector, tmp_path / "m.gguf", strength=0.5)
    assert second.file.read_bytes() == lora.file.read_bytes()


def halved(parts: AdapterParts) -> AdapterParts:
    return AdapterParts(linear={name: (left / 2, right) for name, (left, right) in parts.linear.items()})


def tied() -> Any:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED, **QUIET, tie_word_embeddings=True)).eval()


def test_what_an_adapter_of_llama_cpp_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "l.gguf"
    model = build("llama")
    with pytest.raises(SiteError, match=r"gains a bias, which llama.cpp's adapters have not; .*--to gguf"):
        write_gguf_lora(model, None, added(model), path)
    with pytest.raises(SiteError, match=r"gemma2: whether llama\.cpp has the same matrices is known of llama, mistral"):
        write_gguf_lora(build("gemma2"), None, test_ablation.vector_for(build("gemma2"), writes=("attn_raw.1",)), path)
    both = tied()
    with pytest.raises(SiteError, match=r"`model.embed_tokens` is the head of this model as well"):
        write_gguf_lora(both, None, test_ablation.vector_for(both, writes="every", untie=True), path)
    inside = write_gguf_lora(both, None, test_ablation.vector_for(both, writes=("mlp_out.1",)), path)
    assert inside.tensors == ("blk.1.ffn_down.weight",)
    before = path.read_bytes()
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ModelError, match="its logits are not those of the hooks"),
    ):
        patch.setattr(gguf_lora, "parts_for", lambda *given: halved(parts_for(*given)))
        write_gguf_lora(both, None, test_ablation.vector_for(both, writes=("mlp_out.1",)), path)
    assert path.read_bytes() == before
    (tmp_path / "folder").mkdir()
    with pytest.raises(VectorFileError, match="is a folder; give the name of a file"):
        write_gguf_lora(both, None, test_ablation.vector_for(both, writes=("mlp_out.1",)), tmp_path / "folder")


def test_the_commands(cli: Cli, here: Path, tiny: Path) -> None:
    ended = cli("export", "v.safetensors", "--to", "svec", "--scope", "all", "--out", "v.json", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["layers"] == [1]
    loaded = SteeringVector.load("v.safetensors").tensors["resid_post.1/direction"]
    assert torch.equal(read_foreign("v.json").by_layer[1], 1.5 * loaded)
    model = tf.AutoModelForCausalLM.from_pretrained(tiny)
    test_ablation.vector_for(model, writes=("mlp_out.1", "attn_out.2")).save("a.safetensors")
    words = ("export", "a.safetensors", "--to", "gguf-lora", "--model", tiny)
    ended = cli(*words, "--json")
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert (told["file"], told["rank"], told["adapts"]) == ("a-lora.gguf", 1, 2)
    assert "llama-cli -m MODEL.gguf --lora a-lora.gguf" in cli(*words, "--force").out
    assert "is there already" in cli(*words).err
    assert Site(1) in SteeringVector.load("v.safetensors").sites
