"""llama.cpp's control vector file: what it holds, byte for byte, and what it refuses to hold."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

import steerkit
from steerkit._support.shipped import vector_path
from steerkit.cli import export
from steerkit.errors import ScopeError, SiteError, StrengthError, VectorFileError
from steerkit.export.gguf import write_control_vector
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector
from tests.families import build

GOLDEN = Path(__file__).parents[1] / "golden" / "control_vector.gguf"
IDS = torch.tensor([[5, 17, 44, 9, 101, 63]])


def vector_at(*layers: int, kind: str = "resid_post", **changes: Any) -> SteeringVector:
    """A plain addition of width 4 for a model of 4 blocks; numbers that float32 holds exactly."""
    sites = tuple(Site(layer, kind) for layer in layers)
    tensors = {f"{site}/direction": torch.arange(4.0) + site.layer for site in sites}
    facts: dict[str, Any] = {"edit": "add", "scope": "all", "unit": "paper", "model_type": "llama"}
    facts |= {"hidden_size": 4, "num_layers": 4, "suggested_strength": 1.5, "steerkit_version": None}
    return SteeringVector(method="caa", sites=sites, **{"tensors": tensors, **facts, **changes})


def read_as_repeng(path: Path) -> tuple[str, int, dict[int, np.ndarray[Any, Any]]]:
    """Model hint, layer count and directions, each by the key an importer asks for."""
    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        found = reader.get_field(name)
        assert found is not None, name
        return found.parts[-1]

    assert bytes(field("general.architecture")) == b"controlvector"
    directions = {}
    for tensor in reader.tensors:
        word, _, layer = tensor.name.partition(".")
        assert word == "direction" and int(layer) >= 1
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert len(tensor.shape) == 1
        directions[int(layer)] = np.array(tensor.data)
    return bytes(field("controlvector.model_hint")).decode(), int(field("controlvector.layer_count")[0]), directions


def test_bug_19_round_trip_with_the_strength_in_it(tmp_path: Path) -> None:
    path = write_control_vector(vector_at(3, 1), tmp_path / "new" / "folder" / "v.gguf")
    hint, count, directions = read_as_repeng(path)
    assert (hint, count, list(directions)) == ("llama", 2, [1, 3])
    for layer, direction in directions.items():
        assert direction.dtype == np.float32
        assert direction.tolist() == [1.5 * (layer + place) for place in range(4)]
    assert [entry.name for entry in path.parent.iterdir()] == ["v.gguf"]


@pytest.mark.parametrize("strength", [np.float64(2.0), np.float32(2.0), torch.tensor(2.0, dtype=torch.float64), 2])
def test_bug_19_float32_whatever_the_strength_is(strength: Any, tmp_path: Path) -> None:
    _, _, directions = read_as_repeng(write_control_vector(vector_at(2), tmp_path / "v.gguf", strength=strength))
    assert directions[2].dtype == np.float32 and directions[2].tolist() == [4.0, 6.0, 8.0, 10.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_bug_19_float32_whatever_the_vector_is(dtype: torch.dtype, tmp_path: Path) -> None:
    vector = vector_at(2, tensors={"resid_post.2/direction": torch.tensor([0.1, -2.0, 3.0, 4.0], dtype=dtype)})
    _, _, directions = read_as_repeng(write_control_vector(vector, tmp_path / "v.gguf", strength=0.7))
    expected = torch.tensor([0.1, -2.0, 3.0, 4.0], dtype=dtype).to(torch.float32) * torch.tensor(0.7)
    assert directions[2].tolist() == expected.tolist()


def test_which_strength_is_baked_in(tmp_path: Path) -> None:
    def first(vector: SteeringVector, **options: Any) -> float:
        return float(read_as_repeng(write_control_vector(vector, tmp_path / "v.gguf", **options))[2][1][0])

    with pytest.raises(StrengthError, match="suggests no strength"):
        first(vector_at(1, suggested_strength=None))
    assert first(vector_at(1)) == 1.5
    assert first(vector_at(1).at(strength=2.5)) == 2.5
    assert first(vector_at(1).at(strength=2.5), strength=-3.0) == -3.0


def test_unit_norm_is_converted_with_the_norms_of_the_file(tmp_path: Path) -> None:
    lengths = {1: float(np.linalg.norm([1, 2, 3, 4])), 2: float(np.linalg.norm([2, 3, 4, 5]))}
    norms = {Site(1): 8.0, Site(2): 20.0}
    vector = vector_at(1, 2, norms=norms, unit="norm", suggested_strength=0.25)
    _, _, directions = read_as_repeng(write_control_vector(vector, tmp_path / "v.gguf"))
    for layer, norm in ((1, 8.0), (2, 20.0)):
        assert float(np.linalg.norm(directions[layer])) == pytest.approx(0.25 * norm, rel=1e-6)
        assert directions[layer].tolist() == pytest.approx(
            [0.25 * norm / lengths[layer] * (layer + place) for place in range(4)], rel=1e-6
        )


def adds(direction: Tensor, _module: Any, _args: Any, output: Tensor) -> Tensor:
    return output + direction


@pytest.mark.parametrize("unit", ["paper", "norm"])
def test_the_tensors_are_what_steer_adds(unit: Any, tmp_path: Path) -> None:
    """`direction.N` added by hand to the output of block N (counted from 0) is the steered model."""
    model = build("llama")
    generator = torch.Generator().manual_seed(0)
    sites = (Site(1), Site(3))
    vector = vector_at(
        1,
        3,
        hidden_size=32,
        tensors={f"{site}/direction": torch.randn(32, generator=generator) for site in sites},
        norms={Site(1): 3.0, Site(3): 5.0},
        unit=unit,
        suggested_strength=0.8,
    )
    _, _, directions = read_as_repeng(write_control_vector(vector, tmp_path / "v.gguf"))
    with torch.no_grad(), steerkit.steer(model, vector):
        steered = model(IDS).logits
    handles = [
        model.model.layers[layer].register_forward_hook(partial(adds, torch.tensor(added)))
        for layer, added in directions.items()
    ]
    with torch.no_grad():
        by_hand = model(IDS).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(by_hand, steered)
    with torch.no_grad():
        assert not torch.allclose(model(IDS).logits, steered)


def test_golden_bytes(tmp_path: Path) -> None:
    written = write_control_vector(vector_at(1, 3), tmp_path / "v.gguf").read_bytes()
    assert written == GOLDEN.read_bytes()
    again = write_control_vector(vector_at(3, 1), tmp_path / "w.gguf").read_bytes()
    assert again == written  # the order of the sites is no part of the file


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def refused(vector: SteeringVector, kind: type[Exception], words: str, folder: Path, **options: Any) -> None:
    with pytest.raises(kind, match=words) as error:
        write_control_vector(vector, folder / "v.gguf", **options)
    one_line(error)
    assert list(folder.iterdir()) == []


def test_bug_19_refuses_edits_that_are_no_plain_addition(tmp_path: Path) -> None:
    refused(vector_at(1, edit="add_keep_norm"), VectorFileError, "only adds.*'add_keep_norm'", tmp_path)
    refused(vector_at(1, edit="project_out"), VectorFileError, "only adds.*'project_out'", tmp_path)


def test_bug_19_refuses_layer_0_and_layers_outside(tmp_path: Path) -> None:
    refused(vector_at(0), SiteError, "resid_post.0: llama.cpp has no direction.0", tmp_path)
    refused(vector_at(2, 0), SiteError, "no direction.0", tmp_path)
    with pytest.raises(VectorFileError, match=r"outside 0\.\.3"):
        vector_at(4)
    with pytest.raises(SiteError):
        Site(-1)


@pytest.mark.parametrize("kind", ["resid_pre", "mlp_out", "attn_out"])
def test_bug_19_refuses_other_sites(kind: str, tmp_path: Path) -> None:
    refused(vector_at(1, kind=kind), SiteError, f"{kind}.1: llama.cpp adds at block outputs only", tmp_path)


@pytest.mark.parametrize("scope", ["response", "prompt", "generated", "first(3)"])
def test_bug_19_refuses_other_scopes_until_all_is_asked_for(scope: str, tmp_path: Path) -> None:
    refused(vector_at(1, scope=scope), ScopeError, "every token.*scope=.all.. or --scope all", tmp_path)
    asked = write_control_vector(vector_at(1, scope=scope).at(scope="all"), tmp_path / "v.gguf")
    assert asked.read_bytes() == write_control_vector(vector_at(1), tmp_path / "w.gguf").read_bytes()


@pytest.mark.parametrize("tensor", [torch.ones(2, 4), torch.ones(1, 4)])
def test_bug_19_refuses_directions_that_are_not_one(tensor: Tensor, tmp_path: Path) -> None:
    refused(vector_at(1, tensors={"resid_post.1/direction": tensor}), VectorFileError, r"shape \[4\]", tmp_path)


def test_refuses_a_vector_without_a_direction(tmp_path: Path) -> None:
    refused(vector_at(1, tensors={"resid_post.1/weight": torch.ones(4)}), VectorFileError, "has none", tmp_path)


def test_bug_19_refuses_what_is_no_strength(tmp_path: Path) -> None:
    refused(vector_at(1, unit="norm"), StrengthError, "no norm to convert", tmp_path)
    refused(vector_at(1).at(strength=[1.0, 2.0]), StrengthError, "2 strengths", tmp_path)
    refused(vector_at(1), StrengthError, "finite", tmp_path, strength=float("nan"))
    refused(vector_at(1), StrengthError, "too large", tmp_path, strength=3e38)


def test_nothing_is_left_where_it_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(VectorFileError, match="is a folder") as error:
        write_control_vector(vector_at(1), tmp_path)
    one_line(error)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(VectorFileError, match="cannot be written"):
        write_control_vector(vector_at(1), tmp_path / "file" / "v.gguf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def command() -> typer.Typer:
    app = typer.Typer()
    app.command("export")(export.run)
    return app


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    replace(vector_at(1, 3), scope="response").save("warm.safetensors")
    done = CliRunner().invoke(
        command(), ["warm.safetensors", "--to", "gguf", "--scope", "all", "--strength", "2", "--json"]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["file"] == "warm.gguf" and told["layers"] == [1, 3] and told["strength"] == 2.0
    assert read_as_repeng(tmp_path / "warm.gguf")[2][3].tolist() == [6.0, 8.0, 10.0, 12.0]
    assert told["norms"] == pytest.approx([float(np.linalg.norm(np.arange(4) + n)) * 2 for n in (1, 3)])

    shown = CliRunner().invoke(command(), ["warm.safetensors", "--to", "gguf", "--scope", "all", "--out", "x.gguf"])
    assert shown.exit_code == 0, shown.output
    assert "--control-vector x.gguf" in shown.stdout and "1.5" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_what_stands_there_stays_unless_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vector_at(1).save("warm.safetensors")
    (tmp_path / "warm.gguf").write_text("mine", encoding="utf-8")
    words = ["warm.safetensors", "--to", "gguf", "--scope", "all"]
    refused = CliRunner().invoke(command(), words)
    assert isinstance(refused.exception, VectorFileError)
    assert "warm.gguf: is there already; choose another name, or replace it with --force" in str(refused.exception)
    assert (tmp_path / "warm.gguf").read_text(encoding="utf-8") == "mine"
    assert CliRunner().invoke(command(), [*words, "--force"]).exit_code == 0
    assert list(read_as_repeng(tmp_path / "warm.gguf")[2]) == [1]


def test_the_command_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    replace(vector_at(1), scope="response").save("warm.safetensors")
    asked = CliRunner().invoke(command(), ["warm.safetensors", "--to", "gguf"])
    assert isinstance(asked.exception, ScopeError)
    assert CliRunner().invoke(command(), ["warm.safetensors", "--to", "onnx"]).exit_code == 2
    idle = CliRunner().invoke(command(), ["warm.safetensors", "--to", "gguf", "--scope", "all", "--model", "gpt2"])
    assert idle.exit_code == 2
    assert "without a model" in idle.output
    assert [entry.name for entry in tmp_path.iterdir()] == ["warm.safetensors"]


def test_a_shipped_vector(tmp_path: Path) -> None:
    vector = SteeringVector.load(vector_path("optimism-caa"))
    _, _, directions = read_as_repeng(write_control_vector(vector.at(scope="all"), tmp_path / "v.gguf"))
    assert vector.suggested_strength is not None
    assert list(directions) == sorted(site.layer for site in vector.sites)
    for site in vector.sites:
        expected = torch.tensor(vector.suggested_strength) * vector.params(site)["direction"].float()
        np.testing.assert_array_equal(directions[site.layer], expected.numpy())
