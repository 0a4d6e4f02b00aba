"""What an author of a method is told where something is missing or wrong: what there is and what to write, in a line.

Each case is a class, or a tensor, with one mistake; the slow way to know them is to make them.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import steerkit
from steerkit.checks import conformance
from steerkit.cli import app
from steerkit.errors import FitError, ScopeError, UnknownNameError
from steerkit.methods import CONTRAST, ONE_PAIR, PAIRS, TWO_KINDS, MeanDifference, Method, Subject
from steerkit.methods import _registry as registry
from steerkit.methods._authoring import class_problem
from steerkit.methods._params import read_declared
from steerkit.methods.caa import ContrastiveActivationAddition
from steerkit.network import Site
from steerkit.prompts import ContrastSet
from tests.families import build
from tests.plugged import plug_in, register
from tests.tiny_tokenizers import CHATML, byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Good(MeanDifference):
    """Nothing is wrong with it: its class variables may name what only mypy imports."""

    name: ClassVar[str] = "good"
    title: ClassVar[str] = "Good"
    paper: ClassVar[str] = "nobody, arXiv 0000.00000"
    listed: ClassVar[Sequence[int]] = ()

    heads: int = 4
    scale: float | None = None


def contrast() -> ContrastSet:
    return ContrastSet.from_prompts(["a bright day", "what joy"], ["a dull day", "what grief"], raw=True)


def pair() -> ContrastSet:
    return ContrastSet.from_prompts(["joy"], ["woe is"], raw=True)


def fit(method: Any, data: ContrastSet | None = None) -> steerkit.SteeringVector:
    return steerkit.fit(build("llama"), byte_tokenizer(CHATML), data or contrast(), method=method)


def checked(method: Any, data: ContrastSet | None = None) -> dict[str, Any]:
    found = conformance(method, build("llama"), byte_tokenizer(CHATML), data or contrast(), strength=3.0)
    assert all("\n" not in finding.reason for finding in found)
    return {finding.check: finding for finding in found}


def derived(base: type[Method] = Good, **changes: Any) -> Any:
    """A subclass with some changes."""
    facts = {"__doc__": "One thing is wrong with it.", "__module__": __name__, **changes}
    return dataclass(frozen=True)(type("Changed", (base,), facts))


def test_what_a_method_is_fitted_on_is_exported() -> None:
    assert (CONTRAST, PAIRS) == ("contrast set", "contrast set of pairs")
    assert (ONE_PAIR, TWO_KINDS) == ("one pair of prompts", "harmful and harmless prompts")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"title": ""}, "has no `title`; write title: ClassVar"),
        ({"paper": None}, "has no `paper`; write paper: ClassVar"),
        ({"name": ""}, "has no `name`; write name: ClassVar"),
        ({"__doc__": None}, "has no docstring"),
        ({"data": "one pair"}, "has data = 'one pair'; did you mean 'one pair of prompts'"),
        ({"scopes": "response"}, "write a tuple, such as ('response',)"),
        ({"scopes": ("middle",)}, "has scopes with 'middle'"),
        ({"scope": "mid"}, "has scope = 'mid', which is none of its scopes"),
        ({"params": {"direction": "w, d"}}, "one letter for each dimension, parted by single blanks"),
        ({"params": {"direction": "wd"}}, "one letter for each dimension"),
        ({"params": {"direction": "w  d"}}, "one letter for each dimension"),
        ({"params": {"resid_post.1/direction": "d"}}, "give a tensor's name without its site"),
        ({"params": ("direction",)}, "write a mapping"),
        ({"also": {"mask": "boolean d"}}, "has also with 'mask'"),
        ({"readout": None}, "has readout = None and no `fit` of its own"),
        ({"fit_site": Method.fit_site}, "writes neither `fit_site` nor `fit`"),
        ({"prepare": Method.prepare}, "writes no `prepare`"),
        ({"edit": Method.edit}, "writes no `edit`"),
        ({"__annotations__": {"heads": "int"}, "heads": dataclasses.field()}, "`heads` without a default"),
    ],
)
def test_a_class_that_lacks_something(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str) -> None:
    kind = derived(**{"name": "changed", **changes})
    assert said in str(class_problem(kind))
    if "heads" not in changes:
        with pytest.raises(FitError, match="Changed ") as raised:
            fit(kind())
        assert said in str(raised.value)
    register(monkeypatch, kind, name="changed")
    with pytest.raises(UnknownNameError, match=r"method 'changed' \(.*\) cannot be used: ") as unknown:
        registry.resolve("changed")
    assert "\n" not in str(unknown.value)


def test_a_class_that_is_no_dataclass_or_no_method(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(Good):
        """Its fields would be no settings."""

        name = "plain"

    class Other:
        name = "other"

    assert "write @dataclass(frozen=True) over it" in str(class_problem(Plain))
    register(monkeypatch, Plain, Other)
    with pytest.raises(UnknownNameError, match=r"Other does not derive from steerkit.methods.Method"):
        registry.resolve("other")
    for wrong in (Other, Other(), None):
        with pytest.raises(FitError, match="give a name of `steerkit methods`"):
            fit(wrong)
        assert not checked(wrong)["can_be_used"].passed


def test_the_name_is_the_file_s(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Good, name="better")
    with pytest.raises(UnknownNameError, match=r"Good has name = 'good'; write name: ClassVar.* = 'better'"):
        registry.resolve("better")


def test_a_broken_file_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(ImportError):
        plug_in(monkeypatch, tmp_path, "broken", "broken:Broken", "from steerkit.methods import Nothing\n")
    assert registry.resolve("caa") is ContrastiveActivationAddition
    with pytest.raises(
        UnknownNameError, match=r"'broken' \(broken:Broken\) cannot be used: ImportError: cannot import"
    ):
        registry.resolve("broken")
    usable, wrong = registry.usable_methods()
    assert "caa" in usable
    assert list(wrong) == ["broken"]
    shown = CliRunner().invoke(app, ["methods", "--json"])
    assert shown.exit_code == 0
    assert '"caa"' in shown.stdout
    assert "note: method 'broken'" in shown.stderr


def test_a_class_instead_of_an_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Good)
    assert fit(Good).settings == {"heads": 4, "scale": None}
    assert all(finding.passed for finding in checked(Good).values())


def test_two_classes_of_one_name() -> None:
    twin = derived(name="caa")
    with pytest.raises(FitError, match=r"caa: the method of that name is steerkit\.methods\.caa\.Contrastive"):
        fit(twin())
    found = checked(twin())
    assert list(found) == ["can_be_used"]
    assert "give the latter a name of its own" in found["can_be_used"].reason


def test_a_class_that_is_not_registered_is_told_once() -> None:
    found = checked(Good())
    assert list(found) == ["can_be_used"]
    assert "good: Good is not registered; put it in steerkit/methods/good.py" in found["can_be_used"].reason
    assert f'good = "{__name__}:Good"' in found["can_be_used"].reason


@pytest.mark.parametrize("value", ["4", 4.5, True, None])
def test_settings_are_of_their_type(value: Any) -> None:
    with pytest.raises(FitError, match=r"good: setting heads = .*: a whole number is wanted"):
        Good(heads=value)
    assert Good(scale=1).scale == 1
    with pytest.raises(FitError, match="setting scale = 'much': a number is wanted or nothing is wanted"):
        Good(scale="much")  # type: ignore[arg-type]


def test_a_setting_s_type_that_only_mypy_imports_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = '''
from __future__ import annotations
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar
from steerkit.methods import MeanDifference
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Literal

@dataclass(frozen=True)
class Late(MeanDifference):
    """One annotation is for mypy alone, and that is fine; another is read."""
    name: ClassVar[str] = "late"
    title: ClassVar[str] = "Late"
    paper: ClassVar[str] = "nobody"
    params: ClassVar[Mapping[str, str]] = {"direction": "d"}
'''
    monkeypatch.delitem(sys.modules, "late", raising=False)
    kind: Any = plug_in(monkeypatch, tmp_path, "late", "late:Late", source)
    assert fit("late").method == "late"
    assert kind().settings == {}
    (tmp_path / "later.py").write_text(source.replace("late", "later") + "    side: Literal['up'] = 'up'\n")
    later = __import__("later").Late
    with pytest.raises(FitError, match=r"Late: .*side: Literal.*'Literal' is not defined; import it in later, and not"):
        later()


@dataclass(frozen=True)
class Window(Method):
    """One row per position in the middle of the prompt."""

    name: ClassVar[str] = "window"
    title: ClassVar[str] = "Window"
    paper: ClassVar[str] = "nobody, arXiv 0000.00000"
    data: ClassVar[Any] = ONE_PAIR
    params: ClassVar[Mapping[str, str]] = {"direction": "w d"}
    readout: ClassVar[str | None] = None
    scope: ClassVar[str] = "mid"
    scopes: ClassVar[tuple[str, ...]] = ("mid",)

    def fit(self, acts: Any, subject: Subject, sites: list[Site]) -> dict[str, Tensor]:
        plus, minus = subject.pair_ids()
        width = min(len(plus), len(minus))
        rows = subject.record_ids([plus[:width], minus[:width]], sites)
        return {f"{site}/direction": rows[site][0] - rows[site][1] for site in sites}

    def minimum_prompt(self, params: Mapping[str, Tensor]) -> int:
        return len(params["direction"])

    def prepare(self, params: Any, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {"rows": (strength * params["direction"]).to(device, dtype)}

    def edit(self, h: Tensor, prepared: Any, tokens: Any) -> Tensor:
        rows = prepared["rows"]
        width = rows.shape[-2]
        at = tokens.position - (tokens.prompt_length // 2 - width // 2)
        inside = ((at >= 0) & (at < width))[..., None]
        at = at.clamp(0, width - 1)
        added = rows[at] if rows.dim() == 2 else rows.gather(1, at[..., None].expand(-1, -1, rows.shape[-1]))
        return torch.where(inside, h + added, h)


def everywhere(self: Any, h: Tensor, prepared: Any, tokens: Any) -> Tensor:
    """Every token gets the second row."""
    return h + prepared["rows"][..., 1:2, :]


def test_a_window_is_all_that_a_window_scope_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    loose = derived(Window, name="loose", edit=everywhere)
    silent = derived(Window, name="silent", minimum_prompt=None)
    register(monkeypatch, Window, loose, silent)
    assert all(finding.passed for finding in checked(Window(), pair()).values())
    assert "`edit` changed tokens" in checked(loose(), pair())["a_window_is_all_that_is_written"].reason
    assert "minimum_prompt" in checked(silent(), pair())["a_window_is_all_that_is_written"].reason


def test_behind_the_prompt_a_window_scope_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the method itself would: an edit of every token ends with the prompt, pads left out."""
    loose = derived(Window, name="loose", edit=everywhere, scopes=("front", "mid", "back"))
    register(monkeypatch, loose)
    model = build("llama")
    vector = steerkit.fit(model, byte_tokenizer(CHATML), pair(), method="loose", sites=["resid_post.0"])
    ids = torch.arange(1, 13)[None].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with torch.no_grad():
        before = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[1]
        for scope in ("front", "mid", "back"):
            with steerkit.steer(model, vector, 2.0, scope=scope, prompt_lengths=[7, 5]):
                after = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[1]
            moved = (after != before).any(dim=-1)
            assert moved.tolist() == [[column < 7 for column in range(12)], [2 <= column < 7 for column in range(12)]]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda self, h, prepared, tokens: None, "`edit` gave NoneType, a tensor"),
        (lambda self, h, prepared, tokens: h[:, :, :3], r"`edit` made \[2, 6, 3\] of \[2, 6, 32\]"),
        (lambda self, h, prepared, tokens: h > 0, "`edit` gave torch.bool for torch.float32; give floats"),
        (lambda self, h, prepared: h, r"TypeError: .*takes 3 positional arguments but 4 were given"),
        (lambda self, h, prepared, tokens: h + prepared["rows"], r"KeyError: 'rows' \(test_authoring.py, line \d+\)"),
    ],
)
def test_an_edit_that_gives_something_else_is_one_finding(
    monkeypatch: pytest.MonkeyPatch, edit: Any, said: str
) -> None:
    kind = derived(name="changed", edit=edit)
    register(monkeypatch, kind)
    found = checked(kind())
    assert list(found) == ["can_be_used", "can_be_fitted", "edit_gives_activations"]
    assert re.search(said, found["edit_gives_activations"].reason), found


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        (lambda d: None, "`fit_site` gave NoneType"),
        (lambda d: {}, "`fit` gave no tensor"),
        (lambda d: {"direction": d.tolist()}, "is of type list; give a tensor"),
        (lambda d: {"direction": None}, "is of type NoneType; give a tensor"),
        (lambda d: {"direction": d, "mask": d}, r"`params` declares 'direction'; add \{'mask': 'd'\}"),
        (lambda d: {"direction": d, "mask": d > 0}, r"add \{'mask': 'bool d'\}"),
        (lambda d: {"direction": d.double()}, "declares 'direction' in float32, `fit` gave float64"),
        (lambda d: {"direction": d > 0}, "declares 'direction' in float32, `fit` gave bool"),
        (lambda d: {"direction": d[None]}, r"`params` declares 'direction' \[d\], `fit` gave \[1, 32\]"),
        (lambda d: {"directions": d}, r"`fit` gave 'directions' \[32\], `params` declares 'direction'"),
    ],
)
def test_what_fit_gives_is_what_is_declared(gives: Any, said: str) -> None:
    kind = derived(name="changed", fit_site=lambda self, positive, negative: gives(positive[0] - negative[0]))
    with pytest.raises(FitError, match=said) as raised:
        fit(kind())
    assert "\n" not in str(raised.value)


def test_keys_of_fit_are_texts_with_a_site() -> None:
    for key, said in ((Site(1), "under Site resid_post.1"), ("direction", "under 'direction'")):
        kind = derived(name="changed", fit=lambda self, acts, subject, sites, key=key: {key: torch.ones(32)})
        with pytest.raises(FitError, match=f"{said}; name it '<site>/<name>'"):
            fit(kind())
    kind = derived(name="changed", fit=lambda self, acts, subject, sites: [torch.ones(32)])
    with pytest.raises(FitError, match="`fit` gave list; return a dict"):
        fit(kind())


def test_forgotten_params_are_told_with_what_to_write() -> None:
    kind = derived(Window, name="changed", params={})
    with pytest.raises(FitError, match=r"declares nothing; add \{'direction': 'w d'\}"):
        fit(kind(), pair())


def test_a_declaration_is_read() -> None:
    assert read_declared("w d") == (("w", "d"), None)
    assert read_declared("") == ((), None)
    assert read_declared("int64") == ((), torch.int64)
    assert read_declared("bool k") == (("k",), torch.bool)
    assert read_declared("...") == (None, None)
    assert [read_declared(text) for text in ("w,d", "dw", "w  d", " d", "d ", "float16 d")] == [None] * 6


def test_a_method_s_own_check_is_asked_when_it_is_fitted() -> None:
    def check(self: Any, site: Site, params: Any) -> None:
        raise steerkit.VectorMismatchError(f"{site}: never right")

    with pytest.raises(FitError, match=r"does not pass its own check \(resid_post.1: never right\)"):
        fit(derived(name="changed", check=check)())


def test_an_edit_has_the_method_s_name_where_it_says_no_other() -> None:
    assert Window().edit_name == "window"
    assert Good().edit_name == "add"


def test_advice_is_possible(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No error advises a scope that the method does not have."""
    from steerkit.export.gguf import control_vector
    from steerkit.steering.weights import exact_strength

    late = derived(name="late_only", scopes=("generated",), scope="generated")
    register(monkeypatch, late, Window)
    model = build("llama")
    for name, data in (("late_only", contrast()), ("window", pair())):
        vector = fit(name, data)
        with (
            pytest.raises(ScopeError, match=r"pass prompt_lengths= .* to steer\(\)$"),
            steerkit.steer(model, vector, 1.0),
        ):
            model(torch.arange(1, 9)[None])
    vector = fit("late_only")
    with pytest.raises(ScopeError, match=r"only at 'generated'; steer with hooks$"):
        control_vector(vector)
    with pytest.raises(ScopeError, match=r"which is something else; steer with hooks$"):
        exact_strength(vector)
    with pytest.raises(ScopeError, match=r"accept that with vector.at"):
        control_vector(fit("caa"))
    with pytest.raises(ScopeError, match=r"or use scope='all' or 'first\(n\)'"), steerkit.steer(model, fit("caa"), 1.0):
        model(torch.arange(1, 9)[None])
