"""The doctor passes healthy models of every family, and says of a broken one what is wrong with it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from typer.testing import CliRunner

from steerkit.checks.doctor import checks as doctoring
from steerkit.checks.doctor import cost_checks
from steerkit.checks.doctor.checks import CHECKS, doctor
from steerkit.checks.fitted_method import Finding
from steerkit.cli import doctor as command
from steerkit.errors import SiteError, SteerError
from steerkit.tokens.transformers_facts import cache_of
from tests.families import FAMILIES, FORMS, FURTHER, build
from tests.program import apart_from_loaded
from tests.tiny_tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()
# Compiling takes seconds a model: the default run compiles these, every other family is compiled under slow.
COMPILED = ("llama", "gpt2", "gemma2", "falcon", "phi3")
WITHOUT_SPEED = tuple(check for check in CHECKS if check is not cost_checks.speed)
QUICK = tuple(check for check in WITHOUT_SPEED if check is not cost_checks.compile)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def examine(model: Any, checks: Any = QUICK) -> dict[str, Finding]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctoring, "CHECKS", tuple(checks))
        return {finding.check: finding for finding in doctor(model, TOKENIZER)}


def failed(findings: dict[str, Finding]) -> set[str]:
    return {name for name, finding in findings.items() if not finding.passed}


def check_healthy(family: str, checks: Any) -> None:
    model = build(family)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    findings = examine(model, checks)
    assert list(findings) == [check.__name__ for check in checks]
    assert not failed(findings), [finding for finding in findings.values() if not finding.passed]
    assert not any("the model itself" in finding.reason for finding in findings.values()), findings
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def marked(family: str) -> Any:
    return pytest.param(family, marks=[] if family in COMPILED else [pytest.mark.slow])


@pytest.mark.parametrize("family", [marked(family) for family in FAMILIES])
def test_a_healthy_model_passes(family: str) -> None:
    check_healthy(family, WITHOUT_SPEED)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in COMPILED])
def test_a_healthy_model_passes_uncompiled(family: str) -> None:
    check_healthy(family, QUICK)


@pytest.mark.parametrize("family", ["gemma3n", "qwen4_exp", "longcat_flash"])
def test_healthy_models_of_other_forms_pass(family: str) -> None:
    """Where several streams pass between the blocks, the direction is added inside one."""
    check_healthy(family, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FURTHER, *FORMS])
def test_further_families_pass_or_it_is_said_in_one_line_what_is_wrong_with_the_model(family: str) -> None:
    try:
        findings = examine(build(family))
    except SteerError as error:
        assert "\n" not in str(error)
        return
    for finding in findings.values():
        assert "\n" not in finding.reason
        assert finding.passed or "the model itself" in finding.reason or "came from" in finding.reason, finding


def test_a_model_s_own_faults_are_told_from_steering_s() -> None:
    """RWKV reads pads as text, and its cached steps mix the rows of a batch; single rows are right."""
    findings = examine(build("rwkv"))
    assert failed(findings) == {"cache", "pads", "rows"}
    for check in ("pads", "rows"):
        assert "the model itself is wrong there" in findings[check].reason
    assert "[2, 2, 32] came from rwkv.blocks.1 in a pass of 2 rows and 1 tokens" in findings["cache"].reason


class HookShy(LlamaForCausalLM):
    """Gives other logits when somebody has hooked a block."""

    only_steps = False

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if any(block._forward_hooks for block in self.model.layers) and (
            not self.only_steps or out.logits.shape[1] == 1
        ):
            out.logits = out.logits.roll(1, dims=-1)
        return out


class HookShySteps(HookShy):
    """The same, in passes over one token only."""

    only_steps = True


class Sticky(LlamaForCausalLM):
    """Hooks itself when somebody has hooked a block, for good."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if any(block._forward_hooks for block in self.model.layers):
            self.lm_head.register_forward_hook(lambda *_: None)
        return super().forward(*args, **kwargs)


class StickyAfterErrors(LlamaForCausalLM):
    """Hooks itself, for good, when a pass ends in an error."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().forward(*args, **kwargs)
        except ZeroDivisionError:
            self.lm_head.register_forward_hook(lambda *_: None)
            raise


class Counting(LlamaForCausalLM):
    """Keeps a state from call to call; no two calls have the same one."""

    calls = 0

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        self.calls += 1
        out.logits = out.logits * (1 + self.calls / 50)
        return out


class Noisy(LlamaForCausalLM):
    """Draws at random, though in evaluation mode."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + torch.randn_like(out.logits)
        return out


class PadBlind(LlamaForCausalLM):
    """Forgets in cached steps which tokens are pads."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        past = cache_of(kwargs)
        if past is not None and past.get_seq_length() > 0:
            kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])
        return super().forward(*args, **kwargs)


class Beamless(LlamaForCausalLM):
    """Lacks beam search, as some recurrent models do."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        if kwargs.get("num_beams", 1) > 1:
            raise NotImplementedError("no beams with this cache\nand a second line")
        return super().generate(*args, **kwargs)  # type: ignore[operator]


class Rounding(LlamaForCausalLM):
    """Cached steps are computed in another form, a little off."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if out.logits.shape[1] == 1:
            out.logits = out.logits * 1.001
        return out


class HookBlindBlock(LlamaDecoderLayer):
    """Calls its forward itself, so that no hook of it runs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


def llama_as(kind: type) -> Any:
    model = build("llama")
    model.__class__ = kind
    return model


def hook_blind() -> Any:
    model = build("llama")
    for block in model.model.layers:
        block.__class__ = HookBlindBlock
    return model


EVERYTHING_BUT_SITES = {"runs", "changes", "neutral", "removal", "cache", "pads", "rows", "beams"}
BROKEN: dict[str, tuple[Callable[[], Any], set[str], dict[str, str]]] = {
    "hook shy": (
        lambda: llama_as(HookShy),
        {"changes"},  # at strength 0 there is no hook to be shy of
        {"changes": "tokens before the scope change"},
    ),
    "hook shy in steps": (
        lambda: llama_as(HookShySteps),
        {"cache", "beams"},
        {"cache": "steering is wrong there", "beams": "steering is wrong there"},
    ),
    "hook blind": (hook_blind, {"sites", "changes"}, {"sites": "never ran", "changes": "the edit has no effect"}),
    "sticky": (lambda: llama_as(Sticky), {"removal"}, {"removal": "a hook stayed after the context"}),
    "sticky after errors": (
        lambda: llama_as(StickyAfterErrors),
        {"removal"},
        {"removal": "a hook stayed after an error inside the context"},
    ),
    "counting": (lambda: llama_as(Counting), EVERYTHING_BUT_SITES, {"runs": "keeps a state"}),
    "noisy": (lambda: llama_as(Noisy), EVERYTHING_BUT_SITES, {"runs": "draws at random"}),
    "pad blind": (
        lambda: llama_as(PadBlind),
        {"cache", "beams"},
        {"cache": "the model itself is wrong there", "beams": "the model itself is wrong there"},
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_fails_with_the_reason(name: str) -> None:
    make, expected, reasons = BROKEN[name]
    findings = examine(make())
    assert list(findings) == [check.__name__ for check in QUICK], "later checks still run"
    assert failed(findings) == expected, findings
    for check, words in reasons.items():
        assert words in findings[check].reason
        assert "\n" not in findings[check].reason


def test_what_the_model_itself_lacks_is_no_failure() -> None:
    findings = examine(llama_as(Beamless))
    assert not failed(findings)
    assert findings["beams"].reason == (
        "the model itself cannot do this, unsteered: NotImplementedError: no beams with this cache"
    )


def test_what_the_model_itself_rounds_is_no_failure() -> None:
    findings = examine(llama_as(Rounding))
    assert not failed(findings)
    for check in ("cache", "beams"):
        assert "the model itself differs by" in findings[check].reason
        assert "steering adds nothing to it" in findings[check].reason
    assert "allowed" in findings["pads"].reason


def test_half_types_are_allowed_their_own_rounding() -> None:
    findings = examine(build("llama").to(torch.bfloat16))
    assert not failed(findings), findings
    assert "allowed 6.2e-02" in findings["cache"].reason


def wrapped(how: str) -> Any:
    model = build("llama")
    if how == "compiled":
        return torch.compile(model, backend="eager")
    if how == "offloaded":
        from accelerate import cpu_offload

        return cpu_offload(model, execution_device=torch.device("cpu"))
    return model.to(torch.float16)


@pytest.mark.parametrize("how", ["compiled", "offloaded", "float16"])
def test_wrapped_and_half_models_pass(how: str) -> None:
    findings = examine(wrapped(how), WITHOUT_SPEED)
    assert not failed(findings), findings


def test_exceptions_are_findings() -> None:
    model = build("llama")
    findings = doctor(model, object())
    assert {finding.passed for finding in findings} == {False}
    assert all(finding.reason.startswith("AttributeError: ") for finding in findings), findings


def test_no_decoder_is_an_error() -> None:
    with pytest.raises(SiteError, match="get_decoder"):
        doctor(nn.Linear(2, 2), TOKENIZER)


def test_training_mode_is_put_back() -> None:
    model = build("gpt2").train()  # with dropout
    assert not failed(examine(model, (doctoring.runs, doctoring.pads)))
    assert model.training
    assert model.transformer.drop.training


# --- compile and speed -----------------------------------------------------------------------------------------------


class Breaking(LlamaForCausalLM):
    """Leaves the graph in its own forward."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return super().forward(*args, **kwargs)


def test_a_model_that_does_not_compile_is_no_failure() -> None:
    finding = examine(llama_as(Breaking), [cost_checks.compile])["compile"]
    assert finding.passed
    assert finding.reason.startswith("the model itself does not compile in one graph: ")


def spoilt(case: Any, spoil: Callable[[torch.Tensor, list[int]], torch.Tensor]) -> Any:
    run, graphs = ORIGINAL(case)
    return lambda: spoil(run(), graphs), graphs


ORIGINAL = cost_checks.compiled_model


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda logits, graphs: (graphs.append(1), logits)[1], "a changed strength compiled 1 times anew"),
        (lambda logits, graphs: logits.roll(1, -1), "compiled, the steered logits are off by"),
        (lambda logits, graphs: (graphs.clear(), logits)[1], "the model ran without being compiled"),
    ],
)
def test_wrongly_compiled_code_fails(spoil: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_checks, "compiled_model", lambda case: spoilt(case, spoil))
    finding = examine(build("llama"), [cost_checks.compile])["compile"]
    assert not finding.passed
    assert words in finding.reason


@pytest.mark.slow
def test_compiled_for_real() -> None:
    found = {finding.check: finding for finding in doctor(build("llama"), TOKENIZER, compiled=True)}
    assert found["compile"].passed, found["compile"]


def test_speed_is_a_ratio() -> None:
    finding = examine(build("llama"), [cost_checks.speed])["speed"]
    assert finding.passed, finding
    assert "times as long (median of" in finding.reason


def test_slow_steering_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def seconds(_case: Any, strength: Any) -> float:
        calls.append(strength)
        return 1.0 if strength is None else 2.0

    monkeypatch.setattr(cost_checks, "seconds", seconds)
    finding = examine(build("llama"), [cost_checks.speed])["speed"]
    assert finding == Finding("speed", False, "steered decoding takes 2.00 times as long as unsteered; allowed 1.5")
    assert calls == [None, 1.0] * (1 + 3 * cost_checks.PAIRS), "interleaved, and tried again before it fails"


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build("llama").save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def invoke(*words: object, monkeypatch: pytest.MonkeyPatch) -> Any:
    app = typer.Typer()
    app.command("doctor")(command.run)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(doctoring, "CHECKS", (doctoring.runs, doctoring.changes, doctoring.cache))
    return CliRunner().invoke(app, list(map(str, words)))


def test_the_command_shows_a_table(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = invoke("--model", tiny, monkeypatch=monkeypatch)
    assert (ended.exit_code, apart_from_loaded(ended.stderr)) == (0, "")
    lines = ended.stdout.splitlines()
    assert lines[-1] == f"{tiny}: 3 of 3 checks passed; steering holds what it promises"
    assert max(map(len, lines[:-1])) <= 80
    assert [line.split()[1] for line in lines if line.split()[:1] == ["cache"]] == ["pass"]
    assert "\x1b" not in ended.stdout


def test_the_command_s_json_and_nothing_else(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = invoke("--model", tiny, "--json", monkeypatch=monkeypatch)
    assert (ended.exit_code, apart_from_loaded(ended.stderr)) == (0, "")
    found = json.loads(ended.stdout)
    assert [entry["check"] for entry in found] == ["runs", "changes", "cache"]
    assert all(entry.keys() == {"check", "passed", "reason"} and entry["passed"] is True for entry in found)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_s_exit_code_says_that_something_failed(
    as_json: bool, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import steerkit

    monkeypatch.setattr(steerkit, "load_model", lambda name: (llama_as(PadBlind), TOKENIZER), raising=False)
    ended = invoke("--model", tiny, *["--json"] * as_json, monkeypatch=monkeypatch)
    assert ended.exit_code == 1
    assert apart_from_loaded(ended.stderr) == ""
    if as_json:
        assert [entry["passed"] for entry in json.loads(ended.stdout)] == [True, True, False]
    else:
        assert ended.stdout.splitlines()[-1].endswith("2 of 3 checks passed; cache failed")
        assert any(line.split()[:2] == ["cache", "fail"] for line in ended.stdout.splitlines())


@pytest.mark.embedded
def test_the_embedded_model_passes(embedded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctoring, "CHECKS", QUICK)
    findings = doctor(*embedded)
    assert all(finding.passed for finding in findings), findings


@pytest.mark.slow
@pytest.mark.embedded
def test_the_embedded_model_passes_everything(embedded: tuple[Any, Any]) -> None:
    findings = doctor(*embedded)
    assert all(finding.passed for finding in findings), findings
