"""`merge`: the bytes of what is in memory, killed and resumed, sharded in and out, and in little memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from steerkit.errors import ModelError, StrengthError
from steerkit.export import rewriting
from steerkit.tuning import TaskVector, added, merge
from tests.families import build
from tests.killed import GIGABYTE, killed_and_resumed, started
from tests.tiny_tokenizers import byte_tokenizer
from tests.tuning.large import write_random
from tests.tuning.pairs import finetuned


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A base in one file, what was finetuned from it in several."""
    base = build("llama").to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    finetuned(base).save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    return tmp_path / "base", tmp_path / "tuned"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_it_is_what_the_model_in_memory_becomes(folders: tuple[Path, Path], tmp_path: Path, scale: float) -> None:
    base, tuned = folders
    vector = TaskVector.between(*folders)
    found = merge(base, vector, tmp_path / "out", scale=scale, shard_bytes=20_000)
    model = loaded(base)
    with added(model, vector, scale):
        wanted = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in loaded(tmp_path / "out").state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, wanted[name]), name
        assert scale != 1.0 or torch.equal(value, loaded(tuned).state_dict()[name])
    assert set(found.changed) == set(vector.shapes)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(found.digests) > 2
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_what_does_not_change_goes_over_byte_by_byte(tmp_path: Path) -> None:
    kept = {
        "zero": torch.tensor([-0.0, float("nan")]),
        "flag": torch.tensor([True, False]),
        "steps": torch.tensor(7),
        "none": torch.zeros(0, 3),
        "small": torch.tensor([5e-324, 1.0], dtype=torch.float64),
    }
    (tmp_path / "base").mkdir()
    (tmp_path / "tuned").mkdir()
    save_file({"w": torch.ones(3, 2), "scalar": torch.tensor(2.0), **kept}, tmp_path / "base" / "model.safetensors")
    save_file({"w": torch.zeros(3, 2), "scalar": torch.tensor(5.0)}, tmp_path / "tuned" / "model.safetensors")
    vector = TaskVector.between(tmp_path / "base", tmp_path / "tuned")
    merge(tmp_path / "base", vector, tmp_path / "out", scale=2.0)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["w"], -torch.ones(3, 2))
    assert float(found["scalar"]) == 8.0
    for name, value in kept.items():
        assert found[name].dtype == value.dtype
        assert found[name].numpy().tobytes() == value.numpy().tobytes(), name
    merge(tmp_path / "base", vector, tmp_path / "still", scale=0.0)
    still, base = (load_file(tmp_path / one / "model.safetensors") for one in ("still", "base"))
    assert all(still[name].numpy().tobytes() == base[name].numpy().tobytes() for name in base)


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewriting, "CHUNK", 300)
    base, vector = folders[0], TaskVector.between(*folders)
    merge(base, vector, tmp_path / "whole", shard_bytes=20_000)
    write, left = rewriting._pieces, -1

    def torn(*words: Any) -> Iterator[Any]:
        nonlocal left
        for rows in write(*words):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            yield rows

    work = tmp_path / ".out.unfinished"
    monkeypatch.setattr(rewriting, "_pieces", torn)
    left = 100
    with pytest.raises(KeyboardInterrupt):
        merge(base, vector, tmp_path / "out", shard_bytes=20_000)
    done = sorted(path.name for path in (work / "files").glob("*.safetensors"))
    assert len(done) > 1
    assert len(list((work / "files").glob("*.partial"))) == 1
    assert not (tmp_path / "out").exists()
    (work / "files" / done[0]).write_bytes(b"damaged")  # what is not what was written is written again
    left = -1
    found = merge(base, vector, tmp_path / "out", shard_bytes=20_000)
    assert found.resumed == len(done) - 1
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    left = 100
    with pytest.raises(KeyboardInterrupt):
        merge(base, vector, tmp_path / "other", shard_bytes=20_000)
    left = -1
    assert merge(base, vector, tmp_path / "other", scale=0.5, shard_bytes=20_000).resumed == 0
    assert files(tmp_path / "other") != files(tmp_path / "whole")


def test_what_cannot_be_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    import filelock

    base, vector = folders[0], TaskVector.between(*folders)
    with pytest.raises(StrengthError, match="finite"):
        merge(base, vector, tmp_path / "out", scale=float("nan"))
    with pytest.raises(ModelError, match="is there already"):
        merge(base, vector, folders[1])
    with pytest.raises(ModelError, match="the model itself lies there"):
        merge(base, vector, base, force=True)
    build("gpt2").save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="lacks lm_head"):
        merge(tmp_path / "other", vector, tmp_path / "out")
    model = build("llama")
    with pytest.raises(ModelError, match="between checkpoints on the disk"):
        merge(base, TaskVector.between(model, finetuned(model)), tmp_path / "out")
    (tmp_path / ".out.unfinished").mkdir()
    with filelock.FileLock(tmp_path / ".out.unfinished" / "lock"), pytest.raises(ModelError, match="another process"):
        merge(base, vector, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs prlimit")
def test_four_gigabytes_in_one(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 20 * GIGABYTE:
        pytest.skip("needs 20 GB of disk")
    base, tuned = (
        write_random(tmp_path / name, seed=seed, tensors=40, rows=8192, shards=8)
        for seed, name in enumerate(("base", "tuned"))
    )

    def start(out: Path) -> Any:
        return started("tests.tuning.large", base, tuned, out, 500_000_000, limit=GIGABYTE)

    results = killed_and_resumed(tmp_path, start)
    assert sum(path.stat().st_size for path in (tmp_path / "whole").glob("*.safetensors")) > 4 * GIGABYTE
    two = 2 * 8192 * 4096 * 4
    assert max(result["above"] for result in results) < two
    shutil.rmtree(tmp_path)
