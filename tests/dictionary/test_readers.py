"""Files as their own libraries write them, read to the same latents as the libraries' own `encode` gives."""

from __future__ import annotations

import importlib.util
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from steerkit.dictionary import load_dictionary
from steerkit.dictionary.hook_names import site_of_hook, site_of_module
from steerkit.errors import VectorFileError
from steerkit.network.sites import Site
from tests.dictionary.made import LATENTS, WIDTH, long_form, made, random_parts

TOKENS = torch.randn(10_000, WIDTH, generator=torch.Generator().manual_seed(8)) * 2
PARTS = random_parts()
THRESHOLD = torch.rand(LATENTS, generator=torch.Generator().manual_seed(2)) * 0.5
CLOSE = 1e-5


def lacks(*modules: str) -> bool:
    return any(importlib.util.find_spec(name) is None for name in modules)


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def same_but_at_ties(found: Tensor, expected: Tensor) -> None:
    """Equal but for tokens in which rounding decides which latent is the last that fires."""
    differ = ((found > 0) != (expected > 0)).any(dim=-1)
    assert float(differ.double().mean()) < 1e-3
    assert gap(found[~differ], expected[~differ]) <= CLOSE


# Gemma Scope


def gemma_file(
    folder: Path, where: str = "google/gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_5", **more: Any
) -> Path:
    path = folder / where / "params.npz"
    path.parent.mkdir(parents=True)
    arrays = {
        "W_enc": PARTS["encoder"].T.numpy(),
        "W_dec": PARTS["decoder"].numpy(),
        "b_enc": PARTS["encoder_bias"].numpy(),
        "b_dec": PARTS["decoder_bias"].numpy(),
        "threshold": THRESHOLD.numpy(),
        **more,
    }
    np.savez(path, **arrays)
    return path


def their_jumprelu(h: Tensor) -> Tensor:
    """What Gemma Scope's tutorial computes: `b_dec` is not subtracted."""
    pre = h @ PARTS["encoder"].T + PARTS["encoder_bias"]
    return (pre > THRESHOLD) * torch.nn.functional.relu(pre)


@pytest.mark.parametrize(("name", "kind"), [("res", "resid_post"), ("mlp", "mlp_out"), ("att", "z")])
def test_gemma_scope(name: str, kind: str, tmp_path: Path) -> None:
    path = gemma_file(tmp_path, f"google/gemma-scope-2b-pt-{name}/layer_7/width_16k/average_l0_5")
    for given in (path, path.parent):
        one = load_dictionary(given)
        assert (one.site, one.activation, one.subtract) == (Site(7, kind), "jumprelu", False)
        assert gap(one.encode(TOKENS), their_jumprelu(TOKENS)) <= CLOSE
        assert (
            gap(one.decode(one.encode(TOKENS)), their_jumprelu(TOKENS) @ PARTS["decoder"] + PARTS["decoder_bias"])
            <= CLOSE
        )


def test_gemma_scope_by_either_case_and_without_a_telling_folder(tmp_path: Path) -> None:
    path = gemma_file(tmp_path, "here")
    with pytest.raises(VectorFileError, match="names no site; give it"):
        load_dictionary(path)
    assert load_dictionary(path, site="mlp_out.3").site == Site(3, "mlp_out")
    small = tmp_path / "small.npz"
    np.savez(small, **{name.lower(): value for name, value in np.load(path).items()})
    assert gap(load_dictionary(small, site="resid_post.1").encode(TOKENS), their_jumprelu(TOKENS)) <= CLOSE


def test_gemma_scope_refuses_pickles_transcoders_and_embeddings(tmp_path: Path) -> None:
    with pytest.raises(VectorFileError, match="transcoder"):
        load_dictionary(gemma_file(tmp_path, "gemma-scope-2b-pt-transcoders/layer_1/width_16k/average_l0_5"))
    with pytest.raises(VectorFileError, match="embeddings"):
        load_dictionary(gemma_file(tmp_path, "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_5"))
    objects = gemma_file(tmp_path, "objects/layer_1/a", b_enc=np.array([{"a": 1}], dtype=object))
    with pytest.raises(VectorFileError, match="plain arrays"):
        load_dictionary(objects, site="resid_post.1")


# Llama Scope


def llama_folder(folder: Path, **changes: Any) -> Path:
    folder.joinpath("checkpoints").mkdir(parents=True)
    config = {
        "hook_point_in": "blocks.2.hook_resid_post",
        "hook_point_out": "blocks.2.hook_resid_post",
        "d_model": WIDTH,
        "d_sae": LATENTS,
        "dataset_average_activation_norm": {"in": 9.5, "out": 9.5},
        "norm_activation": "dataset-wise",
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.31,
        "apply_decoder_bias_to_pre_encoder": False,
        **changes,
    }
    (folder / "hyperparams.json").write_text(json.dumps(config))
    tensors = {
        "encoder.weight": PARTS["encoder"],
        "encoder.bias": PARTS["encoder_bias"],
        "decoder.weight": PARTS["decoder"].T.contiguous(),
        "decoder.bias": PARTS["decoder_bias"],
    }
    save_file(tensors, folder / "checkpoints" / "final.safetensors")
    return folder


def test_llama_scope_reads_scaled_activations(tmp_path: Path) -> None:
    one = load_dictionary(llama_folder(tmp_path / "L2R"))
    scale = WIDTH**0.5 / 9.5
    pre = (TOKENS * scale) @ PARTS["encoder"].T + PARTS["encoder_bias"]
    expected = torch.where(pre > 0.31 * scale, pre.relu(), 0)
    assert one.site == Site(2)
    assert gap(one.encode(TOKENS), expected) <= CLOSE
    assert gap(one.decode(expected), (expected @ PARTS["decoder"] + PARTS["decoder_bias"]) / scale) <= CLOSE
    # In the model's own scale: x W + b / s, the threshold as the file has it, and D as it stands.
    own = TOKENS @ PARTS["encoder"].T + PARTS["encoder_bias"] / scale
    assert gap(torch.where(own > 0.31, own.relu(), 0) * scale, expected) <= CLOSE
    rows = one.rows([4])
    assert gap(rows.decoder[0] * scale, PARTS["decoder"][4]) <= 1e-6


def test_llama_scope_topk_and_what_is_refused(tmp_path: Path) -> None:
    one = load_dictionary(llama_folder(tmp_path / "topk", act_fn="topk", top_k=5))
    assert int((one.encode(TOKENS[:50]) > 0).sum(dim=-1).max()) == 5
    with pytest.raises(VectorFileError, match=r"reads blocks.2.hook_resid_post and writes blocks.2.hook_mlp_out"):
        load_dictionary(llama_folder(tmp_path / "tc", hook_point_out="blocks.2.hook_mlp_out"))
    with pytest.raises(VectorFileError, match="dataset_average_activation_norm"):
        load_dictionary(llama_folder(tmp_path / "none", dataset_average_activation_norm=None))
    with pytest.raises(VectorFileError, match="'tanh' is not read"):
        load_dictionary(llama_folder(tmp_path / "tanh", act_fn="tanh"))


# SAELens


def random_sae(kind: str, **config: Any) -> Any:
    """A real model of SAELens with random weights."""
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    about = SAEMetadata(hook_name="blocks.1.hook_resid_post", model_name="gpt2")
    made_of = getattr(sae_lens, f"{kind}SAEConfig")(d_in=WIDTH, d_sae=LATENTS, metadata=about, **config)
    sae = getattr(sae_lens, f"{kind}SAE")(made_of)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, value in sae.named_parameters():
            value.copy_(torch.randn(value.shape, generator=draw) * 0.3)
            if name == "threshold":
                value.abs_()
    return sae


@pytest.mark.skipif(lacks("sae_lens", "wandb", "transformer_lens"), reason="sae-lens is not installed")
@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Standard", {}),
        ("JumpReLU", {}),
        ("JumpReLU", {"normalize_activations": "expected_average_only_in"}),
        ("Gated", {}),
        ("TopK", {"k": 5}),
        ("TopK", {"k": 5, "rescale_acts_by_decoder_norm": True}),
    ],
    ids=str,
)
def test_sae_lens(kind: str, config: dict[str, Any], subtracts: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = random_sae(kind, apply_b_dec_to_input=subtracts, **config)
        if "normalize_activations" in config:  # what `from_pretrained` does with the factor it knows
            sae.fold_activation_norm_scaling_factor(0.7)
        sae.save_model(tmp_path)
    one = load_dictionary(tmp_path)
    assert (one.site, one.model_id, one.subtract) == (Site(1), "gpt2", subtracts)
    with torch.no_grad():
        expected = sae.encode(TOKENS)
        same_but_at_ties(one.encode(TOKENS), expected)
        assert gap(one.decode(expected), sae.decode(expected)) <= CLOSE


@pytest.mark.skipif(lacks("sae_lens", "wandb", "transformer_lens"), reason="sae-lens is not installed")
def test_sae_lens_trained_by_batches_is_read_by_its_threshold(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import SAE as Loaded
        from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
        from sae_lens.saes.sae import SAEMetadata

        about = SAEMetadata(hook_name="blocks.1.hook_mlp_out", model_name="gpt2")
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=WIDTH, d_sae=LATENTS, k=5, metadata=about))
        draw = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for value in sae.parameters():
                value.copy_(torch.randn(value.shape, generator=draw) * 0.3)
            sae.topk_threshold.fill_(0.6)
        sae.save_inference_model(tmp_path / "inference")
        sae.save_model(tmp_path / "training")
        theirs = Loaded.load_from_disk(tmp_path / "inference", device="cpu")
    with torch.no_grad():
        expected = theirs.encode(TOKENS)
    for name in ("inference", "training"):
        one = load_dictionary(tmp_path / name)
        assert (one.site, one.needs_all) == (Site(1, "mlp_out"), False)
        same_but_at_ties(one.encode(TOKENS), expected)


@pytest.mark.skipif(lacks("sae_lens", "wandb", "transformer_lens"), reason="sae-lens is not installed")
@pytest.mark.parametrize("kind", ["gemma_2", "llama_scope"])
def test_files_of_others_by_the_loaders_of_sae_lens(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import SAE as Loaded
        from sae_lens.loading import pretrained_sae_loaders as loaders

        if kind == "gemma_2":
            where, name = "google/gemma-scope-2b-pt-res", "layer_1/width_16k/average_l0_5"
            ours = gemma_file(tmp_path, f"{where}/{name}")
        else:
            where, name = "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L2R-8x"
            ours = llama_folder(tmp_path / where / name)

        def here(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
            return str(tmp_path / repo_id / subfolder / filename)

        monkeypatch.setattr(loaders, "hf_hub_download", here)
        sizes = {"d_in": WIDTH, "d_sae": LATENTS, "dtype": "float32"}
        config, weights, _ = getattr(loaders, f"{kind}_sae_huggingface_loader")(where, name, cfg_overrides=sizes)
        config = loaders.handle_config_defaulting(config)
        shape = Loaded.get_sae_config_class_for_architecture(config["architecture"]).from_dict(config)
        theirs = Loaded.get_sae_class_for_architecture(shape.architecture())(shape)
        theirs.process_state_dict_for_loading(weights)
        theirs.load_state_dict(weights)
        if kind == "llama_scope":  # what `from_pretrained` does with the factor of its list of releases
            theirs.fold_activation_norm_scaling_factor(WIDTH**0.5 / 9.5)
    one = load_dictionary(ours)
    with torch.no_grad():
        expected = theirs.encode(TOKENS)
        same_but_at_ties(one.encode(TOKENS), expected)
        if kind == "gemma_2":  # the other's decoder gives scaled activations
            assert gap(one.decode(expected), theirs.decode(expected)) <= CLOSE


def saelens_folder(folder: Path, **changes: Any) -> Path:
    """What `save_model` writes of a JumpReLU model, without the library."""
    folder.mkdir(parents=True)
    config = {
        "d_in": WIDTH,
        "d_sae": LATENTS,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": "blocks.1.attn.hook_z", "model_name": "gpt2"},
        "architecture": "jumprelu",
        **changes,
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    tensors = {
        "W_enc": PARTS["encoder"].T.contiguous(),
        "W_dec": PARTS["decoder"],
        "b_enc": PARTS["encoder_bias"],
        "b_dec": PARTS["decoder_bias"],
        "threshold": THRESHOLD,
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def test_sae_lens_files_without_the_library(tmp_path: Path) -> None:
    one = load_dictionary(saelens_folder(tmp_path / "one"))
    assert one.site == Site(1, "z")
    expected = long_form(made("jumprelu", threshold=THRESHOLD, subtract=True), TOKENS[:10])
    assert gap(one.encode(TOKENS[:10]).double(), expected) <= CLOSE
    for changes, said in (
        ({"architecture": "transcoder"}, "a transcoder"),
        ({"architecture": "temporal"}, "'temporal' is not read"),
        ({"normalize_activations": "layer_norm"}, "scales each token by itself"),
        ({"normalize_activations": "constant_norm_rescale"}, "scales each token by itself"),
        ({"architecture": "topk"}, "has no k"),
        ({"metadata": {"hook_name": "blocks.1.ln1.hook_normalized"}}, "names no site"),
    ):
        with pytest.raises(VectorFileError, match=said):
            load_dictionary(saelens_folder(tmp_path / "-".join(map(str, changes.values())), **changes))


# sparsify


@pytest.mark.skipif(lacks("sparsify"), reason="eai-sparsify is not installed")
def test_sparsify(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sparsify import SparseCoder, SparseCoderConfig

        coder = SparseCoder(WIDTH, SparseCoderConfig(num_latents=LATENTS, k=5))
        draw = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for value in coder.parameters():
                value.copy_(torch.randn(value.shape, generator=draw) * 0.3)
        coder.save_to_disk(tmp_path / "layers.3")
        skipping = SparseCoder(WIDTH, SparseCoderConfig(num_latents=LATENTS, k=5, skip_connection=True, transcode=True))
        skipping.save_to_disk(tmp_path / "layers.4.mlp")
    one = load_dictionary(tmp_path / "layers.3")
    assert (one.site, one.top_k, one.subtract) == (Site(3), 5, True)
    with torch.no_grad():
        values, places, _ = coder.encode(TOKENS)
        expected = torch.zeros(len(TOKENS), LATENTS).scatter_(-1, places, values)
        same_but_at_ties(one.encode(TOKENS), expected)
        theirs = coder.decode(values, places)
    assert gap(one.decode(expected), theirs) <= CLOSE
    with pytest.raises(VectorFileError, match="transcoder"):
        load_dictionary(tmp_path / "layers.4.mlp")
    with pytest.raises(VectorFileError, match=r"several dictionaries \(layers.3, layers.4.mlp\)"):
        load_dictionary(tmp_path)


# what is no dictionary


def test_pickles_are_refused_and_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return (Path.touch, (tmp_path / "opened",))  # type: ignore[return-value]

    for name in ("ae.pt", "model.bin", "sae.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
        with pytest.raises(VectorFileError, match="a pickle, which can run code"):
            load_dictionary(tmp_path / name)
    assert not (tmp_path / "opened").exists()


def test_what_is_not_there_or_unknown_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no")
    for name, said in (("nowhere", "no such file"), ("empty", "lies there"), ("notes.txt", "known format")):
        with pytest.raises(VectorFileError, match=said):
            load_dictionary(tmp_path / name)
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(VectorFileError, match="no dictionary that steerkit saved"):
        load_dictionary(tmp_path / "other.safetensors")
    broken = saelens_folder(tmp_path / "broken")
    (broken / "cfg.json").write_text("[1")
    with pytest.raises(VectorFileError, match="cannot be read as JSON"):
        load_dictionary(broken)


def test_hooks_and_modules_name_sites() -> None:
    assert site_of_hook("blocks.3.hook_resid_pre") == Site(3, "resid_pre")
    assert site_of_hook("blocks.3.mlp.hook_post") == Site(3, "mlp_post")
    assert site_of_hook("blocks.3.ln1.hook_normalized") is None
    assert site_of_module("model.layers.12") == Site(12)
    assert site_of_module("transformer.h.2.attn") == Site(2, "attn_raw")
    assert site_of_module("embed_tokens") is None
