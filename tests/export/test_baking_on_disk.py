"""`bake_on_disk`: the bytes of `bake`, of a checkpoint that is never loaded, killed and resumed, in little memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import steerkit
from steerkit.errors import ModelError, ScopeError, SiteError, StrengthError, VectorMismatchError
from steerkit.export import baking, baking_on_disk, rewriting, weight_changes
from steerkit.export.baking import bake
from steerkit.export.baking_on_disk import bake_on_disk
from steerkit.export.checkpoint_plan import untied_parameters
from steerkit.methods.selective import SelectiveSteering
from steerkit.steering.weights import exact_updates
from steerkit.vector.steering_vector import SteeringVector
from tests.export.test_baking import added, left_in, loaded, stored, tied_llama
from tests.families import build
from tests.killed import GIGABYTE, killed_and_resumed, started
from tests.methods import test_ablation, test_aura, test_transport
from tests.methods.test_weights_of_methods import units
from tests.program import Cli
from tests.rotations import planted
from tests.tiny_tokenizers import CHATML, byte_tokenizer

Made = tuple[Any, SteeringVector | list[SteeringVector], float]


def addition(family: str) -> Made:
    model = build(family)
    return model, added(model), 0.7


def at_neurons(family: str) -> Made:
    model = build(family)
    vector = steerkit.fit(model, byte_tokenizer(CHATML), test_ablation.data(), method="caa", sites=["mlp_post.1"])
    return model, vector.at(scope="all"), 2.0


def ablation(family: str) -> Made:
    model = tied_llama() if family == "tied_llama" else build(family)
    return model, test_ablation.vector_for(model, writes="every"), 1.0


def of_writes(family: str) -> Made:
    model = build(family)
    return model, test_ablation.vector_for(model, writes=("attn_raw.1",)), 0.6


def rotation(family: str) -> Made:
    model = build(family)
    return model, planted(model, SelectiveSteering()), 40.0


def scaled(family: str) -> Made:
    return *units(family), 1.0


def damped(family: str) -> Made:
    sites = None if family == "llama" else ["mlp_out.1", "attn_in.2", "z.2"]
    return test_aura.model_of(family), test_aura.fitted(family, sites), 0.7


def moved(family: str) -> Made:
    """Rows, columns and biases of one layer at once, the biases by what the matrices make of a shift."""
    kinds = ("z", "attn_out", "mlp_post", "mlp_out") if family == "llama" else ("attn_in", "mlp_in", "mlp_post")
    sites = [f"{kind}.{layer}" for layer in (1, 2) for kind in kinds]
    return test_transport.model_of(family), test_transport.fitted(family, sites=sites), 0.7


def several(family: str) -> Made:
    model = build(family)
    return model, [added(model, strength=0.5), test_ablation.vector_for(model, writes="every")], 1.0


CASES = [
    (addition, "llama"),  # a switch of the config, and eleven biases that are zero
    (addition, "gpt2"),
    (addition, "mamba"),
    (addition, "falcon"),
    (at_neurons, "llama"),
    (at_neurons, "gpt2"),
    (ablation, "llama"),
    (ablation, "tied_llama"),  # untied
    (ablation, "gpt2"),
    (ablation, "gpt_neox"),
    (of_writes, "gemma2"),
    (rotation, "gemma2"),
    (rotation, "gpt2"),
    (rotation, "cohere"),
    (scaled, "llama"),
    (scaled, "qwen3"),
    (scaled, "gpt2"),
    (damped, "llama"),
    (damped, "gpt2"),
    (moved, "llama"),
    (moved, "gpt2"),
    (several, "gpt2"),
]
cases = pytest.mark.parametrize(("make", "family"), CASES, ids=lambda value: getattr(value, "__name__", value))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[str, bytes]]:
    return {name: (str(value.dtype), value.view(torch.uint8).numpy().tobytes()) for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("make", "family", "dtype"),
    [(*case, "float32") for case in CASES]
    + [(addition, "llama", "bfloat16"), (ablation, "gpt2", "bfloat16"), (scaled, "qwen3", "bfloat16")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_bytes_are_those_of_the_model_in_memory(
    make: Callable[[str], Made], family: str, dtype: str, tmp_path: Path
) -> None:
    model, vectors, strength = make(family)
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "base", max_shard_size="30KB")
    model.float()
    memory = loaded(tmp_path / "base", type(model))
    wanted = bake(memory, None, vectors, tmp_path / "memory", strength=strength, untie=True)
    found = bake_on_disk(
        tmp_path / "base", vectors, tmp_path / "disk", strength=strength, untie=True, shard_bytes=40_000
    )
    one, other = stored(tmp_path / "memory"), stored(tmp_path / "disk")
    assert one.keys() == other.keys()
    assert bits(other) == bits(one)
    assert len(list((tmp_path / "disk").glob("*.safetensors"))) > 1
    for name in ("changed", "added", "untied", "switches"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert found.changed
    assert found.verification is not None
    assert found.verification.holds
    configs = [json.loads((tmp_path / where / "config.json").read_text()) for where in ("memory", "disk")]
    assert configs[0] == configs[1]
    assert not any(tmp_path.glob(".*"))


@cases
def test_what_is_called_separable_is_changed_slice_by_slice(make: Callable[[str], Made], family: str) -> None:
    model, vectors, strength = make(family)
    weights, seen = dict(model.named_parameters(remove_duplicate=False)), 0
    with untied_parameters(model):
        updates = exact_updates(model, vectors, strength)
    for update in updates:
        old = weights.get(update.name)
        if update.separable is None or old is None or old.dim() <= update.separable:
            continue
        whole = update.update(old.detach().float())
        parts = [update.update(part.detach().float()) for part in old.split(3, update.separable)]
        torch.testing.assert_close(torch.cat(parts, update.separable), whole, rtol=1e-5, atol=1e-6)
        seen += 1
    assert seen or make in (addition, at_neurons, moved)


@pytest.mark.parametrize("differs", [False, True])
def test_files_that_hold_both_of_two_tied_weights(differs: bool, tmp_path: Path) -> None:
    """What transformers makes of them, which takes each as it is there."""
    model, vector, _ = ablation("tied_llama")
    model.save_pretrained(tmp_path / "one")
    embedding = model.get_input_embeddings().weight.detach()
    head = embedding + 0.1 * embedding.roll(1, 0) if differs else embedding.clone()
    both = broken(tmp_path / "one", "both", lambda tensors: tensors.update({"lm_head.weight": head}))
    memory = tf.AutoModelForCausalLM.from_pretrained(both)
    bake(memory, None, vector, tmp_path / "memory", untie=True)
    bake_on_disk(both, vector, tmp_path / "disk", untie=True)
    found = stored(tmp_path / "disk")
    assert bits(found) == bits(stored(tmp_path / "memory"))
    assert torch.equal(found["lm_head.weight"], head)


def test_large_weights_are_changed_in_parts_on_both_roads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, vectors, strength = ablation("llama")
    model.save_pretrained(tmp_path / "base")
    bake(model, None, vectors, tmp_path / "whole", strength=strength)
    monkeypatch.setattr(weight_changes, "PART", 200)
    sizes: list[int] = []
    real = weight_changes.Change.__call__

    def counted(change: Any, old: Tensor | None) -> Tensor:
        sizes.append(0 if old is None else old.numel())
        return real(change, old)

    monkeypatch.setattr(weight_changes.Change, "__call__", counted)
    bake(model, None, vectors, tmp_path / "memory", strength=strength)
    bake_on_disk(tmp_path / "base", vectors, tmp_path / "disk", strength=strength)
    assert max(sizes) <= 200
    whole, memory, disk = (stored(tmp_path / where) for where in ("whole", "memory", "disk"))
    assert bits(memory) == bits(disk)
    for name, value in whole.items():
        torch.testing.assert_close(disk[name], value, rtol=1e-5, atol=1e-6)


# killed and resumed


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer(CHATML).save_pretrained(tmp_path / "base")
    vector = added(model)
    whole = bake_on_disk(tmp_path / "base", vector, tmp_path / "whole", shard_bytes=30_000)
    pieces, left = rewriting._pieces, -1

    def torn(*words: Any) -> Iterator[Tensor]:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return iter(pieces(*words))

    def stops(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rewriting, "_pieces", torn)
    left = 20
    with pytest.raises(KeyboardInterrupt):
        bake_on_disk(tmp_path / "base", vector, tmp_path / "out", shard_bytes=30_000)
    done = len(list((tmp_path / ".out.unfinished" / "files").glob("*.safetensors")))
    assert done > 1
    assert not (tmp_path / "out").exists()
    left = -1
    with monkeypatch.context() as patch:  # stopped again while logits are compared
        patch.setattr(baking_on_disk, "compared", stops)
        with pytest.raises(KeyboardInterrupt):
            bake_on_disk(tmp_path / "base", vector, tmp_path / "out", shard_bytes=30_000)
    found = bake_on_disk(tmp_path / "base", vector, tmp_path / "out", shard_bytes=30_000)
    assert found.resumed == len(list((tmp_path / "out").glob("*.safetensors"))) > done
    assert whole.resumed == 0
    one, other = files(tmp_path / "whole"), files(tmp_path / "out")
    cards = [listed.pop("README.md").decode() for listed in (one, other)]
    assert other == one
    assert cards[1] == cards[0].replace("whole", "out")
    # Another strength is another checkpoint, which does not go on with these files.
    left = 20
    with pytest.raises(KeyboardInterrupt):
        bake_on_disk(tmp_path / "base", vector, tmp_path / "other", shard_bytes=30_000)
    left = -1
    assert bake_on_disk(tmp_path / "base", vector, tmp_path / "other", strength=2.0, shard_bytes=30_000).resumed == 0


def test_what_lies_beside_goes_over_as_it_is(tmp_path: Path) -> None:
    model = build("gpt2")
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer(CHATML).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("mine")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"pickle")
    bake_on_disk(tmp_path / "base", added(model), tmp_path / "out")
    base, out = files(tmp_path / "base"), files(tmp_path / "out")
    assert {name for name in base if base[name] == out.get(name)} == base.keys() - {
        "README.md",
        "pytorch_model.bin",
        "model.safetensors",
    }
    assert "pytorch_model.bin" not in out
    record = json.loads(out["steerkit.json"])
    assert record["identity"]["vectors"] == [[added(model).digest, 1.0]]


def test_weights_that_are_not_those_on_the_disk_are_baked_from_memory(tmp_path: Path) -> None:
    """`bake` reads the model that it was given, whatever lies where that came from."""
    build("gpt2").save_pretrained(tmp_path / "base")
    model: Any = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
    bake(model, None, added(model), tmp_path / "out")
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(stored(tmp_path / "out")[name], model.get_parameter(name))


# the comparison, and doing without it


def test_a_checkpoint_that_differs_is_withdrawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    real = baking.exact_updates
    monkeypatch.setattr(baking, "exact_updates", lambda inner, vectors, _: real(inner, vectors, 1.2))
    with pytest.raises(ModelError, match="not those of the hooks"):
        bake_on_disk(tmp_path / "base", added(model), tmp_path / "out", strength=1.0)
    assert left_in(tmp_path) == ["base"]


def test_without_the_comparison_the_card_says_so_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("gpt2")
    model.save_pretrained(tmp_path / "base")
    wanted = bake_on_disk(tmp_path / "base", added(model), tmp_path / "compared")
    monkeypatch.setattr(baking_on_disk, "compared", None)
    monkeypatch.setattr(baking_on_disk, "expected", None)
    found = bake_on_disk(tmp_path / "base", added(model), tmp_path / "out", verify=False)
    assert found.verification is None
    assert wanted.verification is not None
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "compared" / name).read_bytes()
    cards = [(tmp_path / where / "README.md").read_text() for where in ("out", "compared")]
    assert "**Not compared.**" in cards[0]
    assert "--no-verify" in cards[0]
    assert wanted.verification.sentence() in cards[1]
    assert cards[0].partition("## The same")[0].replace("out", "compared") == cards[1].partition("## The same")[0]


# what cannot be is refused


def broken(base: Path, name: str, how: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a checkpoint whose tensors a function has changed."""
    from safetensors.torch import load_file, save_file

    folder = base.parent / name
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    how(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_what_cannot_be_baked_from_the_disk_is_refused(tmp_path: Path) -> None:
    model = build("gpt2")
    model.save_pretrained(base := tmp_path / "base")
    vector, out = added(model), tmp_path / "out"
    name = "transformer.h.1.mlp.c_fc.weight"
    lacking = broken(base, "lacking", lambda tensors: tensors.pop(name))
    eight = broken(base, "eight", lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    narrow = broken(base, "narrow", lambda tensors: tensors.update({name: tensors[name][:3].clone()}))
    bare = broken(base, "bare", lambda _: None)
    (bare / "config.json").unlink()
    quantised = broken(base, "quantised", lambda _: None)
    said = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (quantised / "config.json").write_text(json.dumps(said))
    build("llama_peft").save_pretrained(tmp_path / "adapter")
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "pytorch_model.bin").write_bytes(b"pickle")
    for folder, match in [
        (lacking, f"lacks {name}"),
        (eight, "is quantised .torch.int8"),
        (narrow, r"\[3, 128\] and the model's \[32, 128\]"),
        (bare, "no config.json"),
        (quantised, "bake the unquantised model"),
        (tmp_path / "adapter", "merge it first"),
        (tmp_path / "pickles", "a pickle"),
    ]:
        with pytest.raises(ModelError, match=match):
            bake_on_disk(folder, vector, out)
    with pytest.raises(ModelError, match="the model itself lies there"):
        bake_on_disk(base, vector, base, force=True)
    with pytest.raises(ModelError, match="is there already"):
        bake_on_disk(base, vector, lacking)
    with pytest.raises(ScopeError, match="--scope all"):
        bake_on_disk(base, vector.at(scope="response"), out)
    with pytest.raises(StrengthError, match="finite"):
        bake_on_disk(base, vector, out, strength=float("nan"))
    with pytest.raises(VectorMismatchError, match="cannot steer"):
        bake_on_disk(base, added(model, num_layers=7), out)
    with pytest.raises(SiteError, match="--untie"):
        bake_on_disk(base, test_ablation.vector_for(model, writes="every"), out)
    build("mixtral").save_pretrained(tmp_path / "pieces")
    with pytest.raises(ModelError, match=r"experts.*in another form than the model.*load the model and bake"):
        bake_on_disk(tmp_path / "pieces", test_ablation.vector_for(build("mixtral"), writes="every"), out)
    build("gpt_oss").save_pretrained(tmp_path / "stacks")
    for vector in (added(build("gpt_oss")), test_ablation.vector_for(build("gpt_oss"), writes="every")):
        with pytest.raises(SiteError, match=r"experts whose weights are offloaded.*load the model into memory"):
            bake_on_disk(tmp_path / "stacks", vector, out)
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


# the command


def test_the_command(cli: Cli, here: Path, tiny: Path) -> None:
    words = ("bake", "--vector", "v.safetensors", "--model", tiny, "--scope", "all", "--strength", 2)
    assert cli(*words, "--out", "memory").code == 0
    ended = cli(*words, "--from-disk", "--out", "out")
    assert (ended.code, ended.err) == (0, "")
    assert max(map(len, ended.out.splitlines())) <= 80
    assert "same likeliest token" in ended.out
    assert bits(stored(Path("out"))) == bits(stored(Path("memory")))
    ended = cli(*words, "--from-disk", "--no-verify", "--out", "unseen", "--json")
    found = json.loads(ended.out)
    assert (found["compared"], found["files_resumed"]) == ("no, as asked (--no-verify)", 0)
    assert "**Not compared.**" in Path("unseen", "README.md").read_text()
    for more, said in [
        (("--no-verify",), "goes with --from-disk"),
        (("--from-disk", "--dtype", "bfloat16", "--device", "cpu"), "leave --device, --dtype out"),
    ]:
        ended = cli(*words, *more, "--out", "none")
        assert ended.code == 2
        assert said in " ".join(ended.err.replace("│", "").split())
    assert not Path("none").exists()


# larger than memory


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs prlimit")
def test_four_gigabytes_in_one(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 15 * GIGABYTE:
        pytest.skip("needs 15 GB of disk")
    from tests.export.large import LARGEST, large_vector, write_large

    base = write_large(tmp_path / "base")
    large_vector().save(tmp_path / "v.safetensors")
    assert sum(path.stat().st_size for path in base.glob("*.safetensors")) > 4 * GIGABYTE

    def start(out: Path) -> Any:
        return started("tests.export.large", base, tmp_path / "v.safetensors", out, limit=GIGABYTE, builds_models=True)

    results = killed_and_resumed(tmp_path, start)
    assert max(result["above"] for result in results) < 2 * LARGEST
    shutil.rmtree(tmp_path)
