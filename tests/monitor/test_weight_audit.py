"""`steerkit audit`: parts and energies against plain decompositions, what a checkpoint may be, and what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steerkit.errors import DataError, ModelError
from steerkit.evaluate.discoveries import directions_of
from steerkit.monitor.adapters import AdapterDifference
from steerkit.monitor.checkpoints import Checkpoint
from steerkit.monitor.weight_audit import audit, leading_parts
from steerkit.network.sites import Site
from tests.families import HIDDEN, VOCAB, build
from tests.modes import vector_for
from tests.program import Cli, plain
from tests.tiny_tokenizers import CHATML, byte_tokenizer

OUT, UP, QUERY = (f"model.layers.1.{name}.weight" for name in ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"))
SITE = Site(1, "resid_post")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def changed(base: Path, how: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a checkpoint whose tensors a function has changed."""
    folder = base.parent / "after"
    folder.mkdir()
    tensors = load_file(base / "model.safetensors")
    how(tensors)
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text((base / "config.json").read_text())
    return folder


def library(count: int = 3) -> dict[str, dict[Site, Tensor]]:
    return {f"v{n}": {SITE: drawn(HIDDEN, seed=10 + n)} for n in range(count)}


def compared(base: Path, after: Path, known: Any = None, **options: Any) -> Any:
    return audit(Checkpoint.of(str(base)), Checkpoint.of(str(after)), known or library(), **options)


def test_leading_parts_are_those_of_the_whole_decomposition() -> None:
    sizes = torch.logspace(0, -3, 20, dtype=torch.float32)
    left, right = torch.linalg.qr(drawn(60, 20)).Q, torch.linalg.qr(drawn(30, 20, seed=1)).Q
    rows = (left * sizes) @ right.T
    found, directions = leading_parts(rows, 4)
    assert found.tolist() == pytest.approx(sizes[:4].tolist(), rel=1e-4)
    assert (directions @ right[:, :4]).diagonal().abs().tolist() == pytest.approx([1.0] * 4, abs=1e-4)
    assert leading_parts(drawn(2, 30), 4)[1].shape == (2, 30)


def test_a_direction_that_was_written_in_is_found_with_its_cosine_and_energy(base: Path) -> None:
    known = library()
    direction, other = known["v1"][SITE], drawn(HIDDEN, seed=99)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[OUT] = tensors[OUT] + 0.3 * torch.outer(direction, drawn(tensors[OUT].shape[1], seed=3))
        tensors[UP] = tensors[UP] + 0.1 * torch.outer(drawn(tensors[UP].shape[0], seed=4), other)

    after = changed(base, change)
    found = compared(base, after, known, parts=2)
    assert {one.tensor for one in found.changed} == {OUT, UP}
    best = found.lies[0]
    assert (best.vector, best.site, best.tensor, best.part, best.beyond) == ("v1", SITE, OUT, 0, 1.0)
    assert best.cosine == pytest.approx(1.0, abs=1e-5)
    assert best.share == pytest.approx(1.0, abs=1e-5)
    assert all(one.cosine < 0.9 for one in found.lies[1:])
    old, new = (load_file(folder / "model.safetensors") for folder in (base, after))
    rows = [(new[OUT] - old[OUT]).T.double(), (new[UP] - old[UP]).double()]
    whole = sum(float(one.square().sum()) for one in rows)
    for lies in found.lies:
        u = known[lies.vector][SITE].double()
        energy = sum(float((one @ (u / u.norm())).square().sum()) for one in rows) * HIDDEN / whole
        assert lies.energy == pytest.approx(energy, rel=1e-4)
        singular = [torch.linalg.svd(one, full_matrices=False).Vh[:1] for one in rows]  # what was added has rank 1
        cosine = max(float((one @ (u / u.norm())).abs().max()) for one in singular)
        assert lies.cosine >= cosine - 1e-4
    # An even spread is 1 on average, and the cosine of a random direction with one of a few parts is far from 1.
    assert float(found.random_energy.mean()) == pytest.approx(1.0, abs=0.5)
    assert float(found.random.max()) < 0.8


def test_both_sides_of_a_square_matrix_and_the_layers_of_stacked_experts(base: Path) -> None:
    known = {"in": {SITE: drawn(HIDDEN, seed=1)}, "out": {SITE: drawn(HIDDEN, seed=2)}}
    both = torch.outer(known["out"][SITE], known["in"][SITE])

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[QUERY] = tensors[QUERY] + both

    found = compared(base, changed(base, change), known, parts=1)
    assert [one.cosine for one in found.lies] == pytest.approx([1.0, 1.0], abs=1e-5)
    stack = torch.zeros(3, HIDDEN, 5, dtype=torch.float32)
    stack[1] = torch.outer(known["out"][SITE], drawn(5, seed=6))
    for folder, one in (("a", torch.zeros_like(stack)), ("b", stack)):
        (base.parent / folder).mkdir()
        save_file({"experts": one}, base.parent / folder / "model.safetensors")
        (base.parent / folder / "config.json").write_text(json.dumps({"text_config": {"hidden_size": HIDDEN}}))
    found = compared(base.parent / "a", base.parent / "b", known, parts=1)
    assert (found.lies[0].vector, found.lies[0].cosine) == ("out", pytest.approx(1.0, abs=1e-5))


def test_a_baked_vector_is_a_bias_that_was_not_there(base: Path, cli: Cli, tmp_path: Path) -> None:
    model = build("llama")
    vector = vector_for(model, scope="all", site=SITE)
    vector.save(tmp_path / "vectors" / "mine.safetensors")
    byte_tokenizer(CHATML).save_pretrained(base)
    words = ("--model", base, "--scope", "all", "--strength", 1, "--out", tmp_path / "baked")
    assert cli("bake", "--vector", tmp_path / "vectors" / "mine.safetensors", *words).code == 0
    found = compared(base, tmp_path / "baked", {"mine": directions_of(vector)})
    assert found.lies[0].cosine == pytest.approx(1.0, abs=1e-5)
    (only,) = [one for one in found.changed if one.size > 1e-6]
    assert (only.tensor, only.relative) == ("model.layers.1.mlp.down_proj.bias", None)
    assert not any("bias" in name for name in found.left_out)  # those that are all zero are no difference
    ended = cli("audit", base, tmp_path / "baked", "--vectors", tmp_path / "vectors")
    assert ended.code == 0
    assert "mine resid_post.1 1.000" in plain(ended.out)


def adapted(model: Any, folder: Path, **options: Any) -> Any:
    """A model with a random LoRA around it, which is written out."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft asks transformers
        made = get_peft_model(model, LoraConfig(init_lora_weights=False, **options))
        made.save_pretrained(folder)
    return made


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_is_what_it_is_merged(family: str, tmp_path: Path, cli: Cli) -> None:
    model: Any = build(family)
    model.save_pretrained(tmp_path / "base")
    targets = ["q_proj", "down_proj", "up_proj"] if family == "llama" else ["c_attn", "c_fc"]
    how = {"r": 2, "lora_alpha": 6, "rank_pattern": {targets[1]: 3}, "fan_in_fan_out": family == "gpt2"}
    tuned = adapted(model, tmp_path / "lora", target_modules=targets, **how)
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    base, known = Checkpoint.of(str(tmp_path / "base")), library()
    # Of as many parts as every product has: what a merged matrix has behind them is rounding.
    wanted = audit(base, Checkpoint.of(str(tmp_path / "merged")), known, parts=2)
    found = audit(base, AdapterDifference(tmp_path / "lora"), known, parts=2)
    assert (found.compared, found.left_out) == (wanted.compared, wanted.left_out)
    assert len(found.changed) == len(wanted.changed) == len(targets) * 4
    for one, other in zip(found.changed, wanted.changed, strict=True):
        assert one.tensor == other.tensor
        assert (one.size, one.relative) == pytest.approx((other.size, other.relative), rel=1e-4)
        assert one.shares[:2] == pytest.approx(other.shares[:2], abs=1e-4)
    for mine, theirs in zip(found.lies, wanted.lies, strict=True):
        assert (mine.vector, mine.tensor, mine.beyond) == (theirs.vector, theirs.tensor, theirs.beyond)
        assert (mine.cosine, mine.energy) == pytest.approx((theirs.cosine, theirs.energy), rel=1e-3)
    torch.testing.assert_close(found.random, wanted.random, rtol=1e-3, atol=1e-4)
    vector_for(build(family), scope="all", site=SITE).save(tmp_path / "vectors" / "v.safetensors")
    ended = cli("audit", tmp_path / "base", tmp_path / "lora", "--vectors", tmp_path / "vectors")
    assert ended.code == 0
    assert ended.out.startswith(f"{len(found.changed)} of {found.compared} tensors differ")


def test_another_model_s_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    adapted(build("gpt2"), tmp_path / "lora", target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(ModelError, match=r"changes transformer.h.0.*and .* has none; give its own base model"):
        audit(Checkpoint.of(str(base)), AdapterDifference(tmp_path / "lora"), library())


def test_nothing_changed(base: Path, cli: Cli, tmp_path: Path) -> None:
    found = compared(base, base)
    assert (found.changed, found.compared) == ((), len(Checkpoint.of(str(base)).files))
    assert {one.cosine for one in found.lies} == {0.0}
    vector_for(build("llama"), scope="all").save(tmp_path / "vectors" / "v.safetensors")
    shown = cli("audit", base, base, "--vectors", tmp_path / "vectors")
    assert shown.out.startswith(f"0 of {found.compared} tensors differ")


def test_new_rows_of_embeddings_other_shapes_and_quantised_numbers_are_told(base: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        (embedding,) = [name for name in tensors if "embed_tokens" in name]
        tensors[embedding] = torch.cat([tensors[embedding], drawn(2, HIDDEN)])
        tensors[OUT] = drawn(HIDDEN, 7)
        tensors[UP] = tensors[UP].to(torch.int8)
        del tensors[QUERY]

    found = compared(base, changed(base, change))
    assert found.changed == ()
    told = {name.rpartition("model.")[2]: why for name, why in found.left_out.items()}
    assert "only its first 320 rows" in told["embed_tokens.weight"]
    assert VOCAB == 320
    assert told[OUT.rpartition("model.")[2]].startswith(f"[{HIDDEN}, 48] became")
    assert "quantised" in told[UP.rpartition("model.")[2]]
    assert "lacks it" in told[QUERY.rpartition("model.")[2]]


def test_a_checkpoint_in_several_files_is_one(base: Path) -> None:
    build("llama").save_pretrained(base.parent / "parts", max_shard_size="20KB")
    assert len(list((base.parent / "parts").glob("*.safetensors"))) > 2
    whole, parts = Checkpoint.of(str(base)), Checkpoint.of(str(base.parent / "parts"))
    assert set(whole.files) == set(parts.files)
    assert all(torch.equal(whole.read(name), parts.read(name)) for name in whole.files)
    assert compared(base, base.parent / "parts").changed == ()
    file = Checkpoint.of(str(base / "model.safetensors"))
    assert (file.width, set(file.files)) == (HIDDEN, set(whole.files))


def test_what_is_no_checkpoint_is_refused_and_never_unpickled(base: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    def folder(name: str, **files: Any) -> str:
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file.replace("__", ".")).write_bytes(content)
        return str(tmp_path / name)

    (tmp_path / "pickle").mkdir()
    torch.save({"w": Trap()}, tmp_path / "pickle" / "pytorch_model.bin")
    for name, message in (
        (str(tmp_path / "pickle"), "only pytorch_model.bin, a pickle"),
        (str(tmp_path / "pickle" / "pytorch_model.bin"), "pickles are not read"),
        (folder("empty"), "there is none"),
        (folder("adapter", adapter_config__json=b"{}", adapter_model__safetensors=b""), "is an adapter"),
        (folder("torn", model__safetensors=b"\x10\x00"), "is no whole safetensors file"),
        (folder("index", **{"model__safetensors__index__json": b"[]"}), "is no index"),
    ):
        with pytest.raises(ModelError, match=message):
            Checkpoint.of(name)
    listed = json.dumps({"weight_map": {"w": "../base/model.safetensors"}}).encode()
    with pytest.raises(ModelError, match="lacks model"):  # never a file outside of the folder
        Checkpoint.of(folder("outside", **{"model__safetensors__index__json": listed}))
    assert not (tmp_path / "sprung").exists()


def test_what_cannot_be_compared(base: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "other").mkdir()
    save_file({"w": drawn(3, HIDDEN)}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(ModelError, match="has no tensor of"):
        compared(base, tmp_path / "other")
    with pytest.raises(ModelError, match="how wide"):
        compared(tmp_path / "other", tmp_path / "other")
    for known in ({"v": {SITE: drawn(HIDDEN + 1)}}, {"v": {Site(1, "z"): drawn(HIDDEN)}}):
        with pytest.raises(DataError, match=f"no vector has a direction of width {HIDDEN}"):
            compared(base, base, known)
    with pytest.raises(DataError, match="give at least 1 and 2"):
        compared(base, base, parts=0)
    ended = cli("audit", base, base)
    assert (ended.code, "no vectors are shipped for" in plain(ended.err)) == (2, True)
