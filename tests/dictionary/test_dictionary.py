"""`Dictionary`: latents as the formulas say, rows that stand for themselves, files that come back as they went."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steerkit.dictionary import Dictionary, load_dictionary
from steerkit.dictionary.activation import ACTIVATIONS
from steerkit.errors import VectorFileError, VectorMismatchError
from steerkit.network.sites import Site
from tests.dictionary.made import WIDTH, long_form, made
from tests.families import build

SHAPES = [
    pytest.param({"activation": name, **changes}, id=f"{name}{'-moved' if changes else ''}")
    for name in ACTIVATIONS
    for changes in ({}, {"subtract": True, "input_scale": 1.7})
]
ROWS = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(3)) * 2


@pytest.mark.parametrize("shape", SHAPES)
def test_latents_are_those_of_the_formula(shape: dict[str, object]) -> None:
    one = made(**shape)  # type: ignore[arg-type]
    found = one.encode(ROWS)
    assert 0 < int((found > 0).sum()) < found.numel()
    torch.testing.assert_close(found.double(), long_form(one, ROWS), atol=1e-5, rtol=0)
    back = torch.stack([(row @ one.decoder.double() + one.decoder_bias) / one.input_scale for row in found.double()])
    torch.testing.assert_close(one.decode(found).double(), back, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if not made(**shape.values[0]).needs_all])
def test_rows_read_what_the_whole_reads(shape: dict[str, object]) -> None:
    one = made(**shape)  # type: ignore[arg-type]
    chosen = [7, 3, 31, 12]
    rows = one.rows(chosen)
    product = ROWS @ rows.encoder.T
    if rows.gate_scale is None:
        pre = product + rows.bias
        found = torch.where(pre > rows.threshold, pre.relu(), 0)
    else:
        found = torch.where(product + rows.gate_bias > 0, (product * rows.gate_scale + rows.bias).relu(), 0)
    torch.testing.assert_close(found, one.encode(ROWS)[:, chosen], atol=1e-5, rtol=0)
    only = torch.zeros(one.num_latents)
    only[7] = 1.0
    moved = one.decode(only) - one.decode(torch.zeros(one.num_latents))
    torch.testing.assert_close(rows.decoder[0], moved, atol=1e-6, rtol=0)


def test_batchtopk_without_a_threshold_reads_each_row_alone() -> None:
    one = made("batchtopk", threshold=None)
    assert one.needs_all
    assert torch.equal(one.encode(ROWS)[:1] > 0, one.encode(ROWS[:1]) > 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_file_comes_back_as_it_went(shape: dict[str, object], tmp_path: Path) -> None:
    one = made(**shape, model_type="llama", provenance={"format": "made", "tokens": 7})  # type: ignore[arg-type]
    path, again = one.save(tmp_path / "inner" / "one.safetensors"), tmp_path / "again.safetensors"
    found = load_dictionary(path)
    assert torch.equal(found.encode(ROWS), one.encode(ROWS))
    assert (found.digest, found.site, found.model_type, found.provenance) == (
        one.digest,
        one.site,
        "llama",
        {"format": "made", "tokens": 7},
    )
    assert found.save(again).read_bytes() == path.read_bytes()
    assert load_dictionary(path, site="mlp_out.0").site == Site(0, "mlp_out")


def test_altered_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = made().save(tmp_path / "one.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(VectorFileError, match="altered file"):
        load_dictionary(path)
    path.write_bytes(data[:-100])
    with pytest.raises(VectorFileError, match="damaged"):
        load_dictionary(path)
    with pytest.raises(VectorFileError, match="no such file"):
        Dictionary.load(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decoder": torch.ones(3, WIDTH)}, "decoder has shape"),
        ({"encoder_bias": torch.full((40,), float("nan"))}, "not finite"),
        ({"threshold": None}, "needs threshold"),
        ({"input_scale": 0.0}, "over 0"),
        ({"top_k": 41}, "1 to 40"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(VectorFileError, match=said):
        made(**changes)  # type: ignore[arg-type]


def test_an_unknown_activation_is_refused() -> None:
    one = made("relu")
    with pytest.raises(VectorFileError, match=r"did you mean|allowed"):
        Dictionary(one.encoder, one.decoder, one.encoder_bias, one.decoder_bias, "jumprel", Site(0))  # type: ignore[arg-type]


def test_a_model_of_another_width_is_refused() -> None:
    model = build("llama")
    with pytest.raises(VectorMismatchError, match="reads width 16"):
        made().check(model)
    made(width=model.config.hidden_size).check(model)
    with pytest.raises(VectorMismatchError, match="latents 0 to 39"):
        made().rows([40])
    with pytest.raises(VectorMismatchError, match="16"):
        made().encode(torch.ones(2, 3))
    with pytest.raises(VectorMismatchError, match="40"):
        made().decode(torch.ones(2, 3))
