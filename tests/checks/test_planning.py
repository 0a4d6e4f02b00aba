"""A plan says what `steer` does, reports every mistake at once, and leaves the model alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import DynamicCache
from typer.testing import CliRunner

import steerkit
from steerkit.checks.planning import SteeringPlan, plan
from steerkit.cli import plan as command
from steerkit.errors import DataError, SiteError, VectorFileError
from steerkit.network.decoder import find_decoder, inner_model
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.steering.steering import Steering, steer
from steerkit.vector.steering_vector import SteeringVector
from tests.families import BLOCKS, FAMILIES, HIDDEN, VOCAB, build
from tests.modes import vector_for
from tests.program import apart_from_loaded
from tests.tiny_tokenizers import CHATML, LLAMA3, byte_tokenizer

IDS = torch.tensor([[5, 17, 44, 9, 101, 63], [7, 23, 42, 88, 15, 3]])


def vector_at(model: Any, *sites: str, widths: dict[str, int] | None = None, **more: Any) -> SteeringVector:
    """A random addition at several sites, of length 3 where the activations have a norm of 6."""
    generator = torch.Generator().manual_seed(0)
    kept = [Site.parse(site) for site in sites]
    wide = {Site.parse(site): width for site, width in (widths or {}).items()}
    drawn = {site: torch.randn(wide.get(site, HIDDEN), generator=generator) for site in kept}
    single = vector_for(model, scope="response")
    return replace(
        single,
        sites=tuple(kept),
        tensors={f"{site}/direction": 3 * one / one.norm() for site, one in drawn.items()},
        norms=dict.fromkeys(kept, 6.0),
        widths=wide,
        **more,
    )


def hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def dry(model: Any, vectors: Any, **options: Any) -> SteeringPlan:
    return plan(model, vectors, measure=False, **options)


def test_what_is_planned_is_what_steer_does() -> None:
    model = build("llama")
    vectors = [vector_at(model, "resid_post.1", "mlp_in.2", suggested_strength=1.5), vector_at(model, "resid_pre.3")]
    vectors[1] = vectors[1].at(strength=2.0, scope="all", unit="norm")
    found = dry(model, vectors, scope="first(3)", batch_size=2, prompt_tokens=7)
    assert (found.ok, found.problems, found.warnings, found.time) == (True, (), (), None)
    first, second, third = found.edits
    assert (first.vector, first.method, first.site, first.side) == (1, "caa", "resid_post.1", "output")
    assert (first.module, first.module_class) == ("model.layers.1", "LlamaDecoderLayer")
    assert (first.shape, first.device, first.dtype) == ((2, 7, HIDDEN), "cpu", "float32")
    assert (second.module, second.module_class) == ("model.layers.2.post_attention_layernorm", "LlamaRMSNorm")
    assert (third.vector, third.module, third.side) == (2, "model.layers.3", "input")
    assert [edit.scope for edit in found.edits] == ["first(3)", "first(3)", "all"]
    assert (first.paper, first.norm) == (1.5, pytest.approx(0.75))
    assert (third.paper, third.norm) == (pytest.approx(4.0), 2.0)
    # The same from what `steer` would attach.
    planned = steer(model, vectors, scope="first(3)")._edits
    assert [edit.module for edit in found.edits] == [one.tap.name for one in planned]
    assert [edit.scope for edit in found.edits] == [str(one.scope) for one in planned]
    in_paper_units = [one.row_strengths.value * one.factor for one in planned]
    assert [edit.paper for edit in found.edits] == pytest.approx(in_paper_units)


def test_the_shape_and_dtype_are_those_that_are_written() -> None:
    for family, site in (("llama", "z.1"), ("opt", "mlp_post.1"), ("gpt2", "attn_out.1"), ("falcon", "block_in.2")):
        model = build(family).to(torch.bfloat16)
        tap = next(iter(locate(model, [Site.parse(site)]).values()))
        vector = vector_at(model, site, widths={site: tap.width})
        (edit,) = dry(model, vector, batch_size=IDS.shape[0], prompt_tokens=IDS.shape[1]).edits
        seen: list[Any] = []
        module = model.get_submodule(edit.module)

        def note(_: Any, args: Any, kwargs: Any, out: Any = None, tap: Any = tap, seen: Any = seen) -> None:
            seen.append(tap.read(args, kwargs, out))

        attach = module.register_forward_pre_hook if edit.side == "input" else module.register_forward_hook
        attach(note, with_kwargs=True)
        with torch.no_grad():
            model(IDS)
        assert (tuple(seen[0].shape), str(seen[0].dtype)) == (edit.shape, f"torch.{edit.dtype}"), (family, site)


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("llama", "model.layers.1"),
        ("gpt2", "transformer.h.1"),
        ("gemma3_vlm", "model.language_model.layers.1"),
        ("llama_peft", "model.layers.1"),
        ("mamba", "backbone.layers.1"),
    ],
)
def test_families(family: str, module: str) -> None:
    model = build(family)
    found = dry(model, vector_at(model, "resid_post.1"))
    assert found.ok
    assert [edit.module for edit in found.edits] == [module]
    inner = inner_model(model)
    assert inner.get_submodule(module) is find_decoder(model).blocks[1]
    assert found.model == type(inner).__name__


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("family", ["llama", "llama_peft"])
def test_nothing_stays(family: str, measure: bool) -> None:
    model = build(family)
    with torch.no_grad():
        baseline = model(input_ids=IDS).logits
    before = hooks(model)
    found = plan(model, vector_at(model, "resid_post.1", "attn_out.2"), measure=measure, batch_size=2)
    assert found.ok
    assert hooks(model) == before
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, baseline)


def test_nothing_is_attached_unless_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []
    monkeypatch.setattr(Steering, "__enter__", lambda self: entered.append(1))
    monkeypatch.setattr(Steering, "__exit__", lambda self, *_: None)
    model = build("llama")
    dry(model, vector_at(model, "resid_post.1"))
    assert not entered
    plan(model, vector_at(model, "resid_post.1"), batch_size=1, prompt_tokens=4)
    assert entered


# --- problems and warnings -------------------------------------------------------------------------------------------


def test_a_vector_of_another_width() -> None:
    model = build("llama")
    tensors = {"resid_post.1/direction": torch.ones(HIDDEN + 1)}
    wrong = replace(vector_for(model, scope="all"), hidden_size=HIDDEN + 1, tensors=tensors)
    found = plan(model, [wrong, vector_at(model, "resid_post.1")])
    assert not found.ok
    assert f"width {HIDDEN + 1}) cannot steer LlamaForCausalLM ({BLOCKS} layers, width {HIDDEN})" in found.problems[0]
    assert [edit.module for edit in found.edits] == [None, "model.layers.1"]
    assert found.time is None, "what cannot be done is not measured"


def test_a_site_that_the_model_lacks() -> None:
    model = build("llama")
    found = plan(model, vector_at(model, "resid_post.1", "mixer_out.2"))
    here, gone = found.edits
    assert (here.module, here.problem, here.paper) == ("model.layers.1", None, 1.0)
    assert (gone.module, gone.shape, gone.paper) == (None, None, None)
    assert gone.problem is not None
    assert "mixer_out.2: `self_attn` is attention" in gone.problem
    assert (found.ok, found.problems) == (False, (gone.problem,))


def test_a_vector_that_matches_nothing() -> None:
    model = build("llama")
    found = dry(model, [vector_at(model, "resid_post.1"), vector_at(model, "mixer_out.2", "block_in.1")])
    assert not found.ok
    assert found.problems[-1] == "vector 2 matches nothing in LlamaForCausalLM; nothing would be written"
    assert len(found.problems) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scope": "front"}, "scope 'front' is not one of its own"),
        ({"scope": "nonsense"}, "unknown scope 'nonsense'"),
        ({"unit": "norm", "strength": 1.0}, "holds no activation norm"),
        ({"unit": "metres"}, "unknown unit 'metres'"),
        ({"strength": float("nan")}, "give a finite number"),
    ],
)
def test_what_steer_would_refuse(options: dict[str, Any], words: str) -> None:
    model = build("llama")
    found = dry(model, vector_for(model, scope="all"), **options)
    assert not found.ok
    (edit,) = found.edits
    assert edit.problem is not None
    assert words in edit.problem
    assert (edit.module, edit.scope, edit.paper) == ("model.layers.1", None, None)


def test_rows_of_their_own() -> None:
    model = build("llama")
    vector = vector_at(model, "resid_post.1")
    found = plan(model, vector, strength=[1.0, -2.0], batch_size=2, prompt_tokens=4)
    assert found.ok
    assert (found.edits[0].paper, found.edits[0].norm) == ((1.0, -2.0), pytest.approx((0.5, -1.0)))
    other = plan(model, vector, strength=[1.0, -2.0], batch_size=3, prompt_tokens=4)
    assert not other.ok
    assert "got 2 values for a pass of 3 rows" in other.problems[0]


def test_other_models_and_templates_are_warned_of() -> None:
    model = build("llama")
    fitted = steerkit.vector.model_facts(model, byte_tokenizer(CHATML))["chat_template_sha256"]
    vector = replace(vector_at(model, "resid_post.1"), model_type="qwen2", chat_template_sha256=fitted)
    found = dry(model, vector, tokenizer=byte_tokenizer(LLAMA3))
    assert found.ok
    assert len(found.warnings) == 2
    assert "the vector was fitted on model type 'qwen2', this is 'llama'" in found.warnings[0]
    assert "chat template" in found.warnings[1]
    assert not dry(model, vector_at(model, "resid_post.1"), tokenizer=byte_tokenizer()).warnings


@pytest.mark.parametrize("size", ["batch_size", "prompt_tokens", "new_tokens"])
def test_sizes_are_checked(size: str) -> None:
    model = build("llama")
    with pytest.raises(DataError, match=f"{size} is at least 1, got 0"):
        dry(model, vector_at(model, "resid_post.1"), **{size: 0})


def test_wrong_arguments() -> None:
    model = build("llama")
    with pytest.raises(VectorFileError, match="no such file"):
        dry(model, "v.safetensors")
    with pytest.raises(SiteError, match="get_decoder"):
        dry(torch.nn.Linear(2, 2), vector_at(model, "resid_post.1"))


# --- forecasts -------------------------------------------------------------------------------------------------------


def bytes_of(cache: Any) -> int:
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"mamba", "qwen3_next"}))
def test_the_cache_is_as_large_as_counted(family: str) -> None:
    model = build(family)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache, use_cache=True)
    memory = dry(model, vector_at(model, "resid_post.1"), batch_size=2, prompt_tokens=5, new_tokens=1).memory
    assert memory.cache == bytes_of(cache)
    assert memory.note is None


def test_a_sliding_window_does_not_grow() -> None:
    model = build("mistral")  # a window of 8
    vector = vector_at(model, "resid_post.1")
    sizes = [dry(model, vector, prompt_tokens=1, new_tokens=count).memory.cache for count in (3, 7, 15, 31)]
    assert sizes == [sizes[0], 2 * sizes[0], 2 * sizes[0], 2 * sizes[0]]


@pytest.mark.parametrize("family", ["mamba", "qwen3_next"])
def test_what_is_not_counted_is_said(family: str) -> None:
    model = build(family)
    memory = dry(model, vector_at(model, "resid_post.1")).memory
    assert memory.note is not None
    assert "not counted" in memory.note


def test_the_rest_of_the_memory() -> None:
    model = build("llama").to(torch.bfloat16)
    vector = vector_at(model, "resid_post.1", "resid_post.2")
    memory = dry(model, [vector, vector], batch_size=3, prompt_tokens=5).memory
    assert memory.parameters == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert memory.vectors == 2 * 2 * HIDDEN * 4
    assert memory.activations == 3 * 5 * (6 * HIDDEN + 3 * 48) * 2 + 3 * VOCAB * 4
    assert memory.total == memory.parameters + memory.vectors + memory.cache + memory.activations


def test_the_time_is_of_the_whole_answer() -> None:
    model = build("gpt2")
    timed = plan(model, vector_at(model, "resid_post.1"), batch_size=2, prompt_tokens=32, new_tokens=11).time
    assert timed is not None
    assert min(timed.prefill, timed.step, timed.steered_prefill, timed.steered_step) > 0
    assert timed.total == pytest.approx(timed.prefill + 10 * timed.step)
    assert timed.steered_total == pytest.approx(timed.steered_prefill + 10 * timed.steered_step)


def test_json_holds_all_of_it() -> None:
    model = build("llama")
    found = plan(model, vector_at(model, "resid_post.1", "mixer_out.1"), batch_size=2)
    read = json.loads(json.dumps(found.as_json()))
    assert read.keys() == {
        "ok", "model", "batch_size", "prompt_tokens", "new_tokens", "edits", "problems", "warnings", "memory", "time",
    }  # fmt: skip
    assert read["ok"] is False
    assert read["edits"][0]["shape"] == [2, 64, HIDDEN]
    assert read["memory"]["total"] == found.memory.total
    assert read["problems"] == [read["edits"][1]["problem"]]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def invoke(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    app = typer.Typer()
    app.command("plan")(command.run)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.chdir(tmp_path)
    model = build("llama")
    vector_at(model, "resid_post.1", suggested_strength=1.5).save("v.safetensors")
    vector_at(model, "resid_post.1", "mixer_out.2").save("wrong.safetensors")

    def run(*words: object) -> Any:
        return CliRunner().invoke(app, ["--model", str(tiny), *map(str, words)])

    return run


def test_the_command_shows_a_table(invoke: Callable[..., Any]) -> None:
    ended = invoke("--vector", "v.safetensors", "--batch-size", 2)
    assert (ended.exit_code, apart_from_loaded(ended.stderr)) == (0, "")
    lines = ended.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for words in ("resid_post.1", "model.layers.1", "LlamaDecoderLayer", "2 x 64 x 32", "response", "1.5", "0.75"):
        assert words in ended.stdout
    assert "memory: parameters" in ended.stdout
    assert "time: 2 prompts of 64 tokens" in ended.stdout
    assert lines[-1] == "LlamaForCausalLM: 1 of 1 edits fit; can be steered so"


def test_the_command_s_options_and_json(invoke: Callable[..., Any]) -> None:
    ended = invoke(
        "--vector", "v.safetensors", "--vector", "v.safetensors", "--strength", 1, "--strength", -2, "--scope", "all",
        "--unit", "norm", "--batch-size", 3, "--prompt-tokens", 4, "--new-tokens", 5, "--no-measure", "--json",
    )  # fmt: skip
    assert (ended.exit_code, apart_from_loaded(ended.stderr)) == (0, ""), ended
    found = json.loads(ended.stdout)
    assert found["ok"] is True
    assert found["vectors"] == ["v.safetensors"] * 2
    assert [(edit["vector"], edit["norm"], edit["paper"]) for edit in found["edits"]] == [
        (1, 1.0, 2.0),
        (2, -2.0, -4.0),
    ]
    assert {edit["scope"] for edit in found["edits"]} == {"all"}
    assert (found["batch_size"], found["prompt_tokens"], found["new_tokens"], found["time"]) == (3, 4, 5, None)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_s_exit_code_says_that_it_cannot_be(invoke: Callable[..., Any], as_json: bool) -> None:
    ended = invoke("--vector", "wrong.safetensors", *["--json"] * as_json)
    assert (ended.exit_code, apart_from_loaded(ended.stderr)) == (1, "")
    if as_json:
        assert json.loads(ended.stdout)["ok"] is False
    else:
        lines = ended.stdout.splitlines()
        assert lines[-1] == "LlamaForCausalLM: 1 of 2 edits fit; cannot be steered so"
        assert lines[-2].startswith("problem: mixer_out.2: ")


def test_as_many_strengths_as_vectors(invoke: Callable[..., Any]) -> None:
    ended = invoke("--vector", "v.safetensors", "--strength", 1, "--strength", 2)
    assert ended.exit_code == 2
