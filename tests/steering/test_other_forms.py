"""Models of other forms: several residual streams, a cache that does not count, blocks with several cache slots.

Right against hooks written by hand, or refused in one line at every entrance.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.generation.utils import ALL_CACHE_NAMES

import steerkit
from steerkit.checks.planning import plan
from steerkit.errors import ScopeError, SiteError, SteerError
from steerkit.export.baking import bake
from steerkit.network.decoder import find_decoder, inner_model
from steerkit.network.sites import Site
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render
from steerkit.serve.passes import Passes
from steerkit.tokens import transformers_facts
from steerkit.tuning.emulated import _Reader
from tests.families import build
from tests.gated import as_decided, gated_vector
from tests.modes import LONG, MODES, PAD, SHORT, gap, plain_logits, run_steered, vector_for
from tests.tiny_tokenizers import byte_tokenizer
from tests.tolerances import COARSE

family = lru_cache(maxsize=None)(build)
TOKENIZER = byte_tokenizer()
PACKAGE = Path(steerkit.__file__).parent
FOUR = SHORT[:4]  # as many tokens as such models have streams
STREAMS = ("deepseek_v4", "hy_v4", "qwen4_exp", "gemma3n")
NEW = 4

# By family the modules of block 1 that can be written, by hand and by site.
INSIDE = [
    ("deepseek_v4", "attn_raw", "self_attn"),
    ("deepseek_v4", "mlp_raw", "mlp"),
    ("deepseek_v4", "mlp_in", "post_attention_layernorm"),
    ("hy_v4", "attn_raw", "self_attn"),
    ("hy_v4", "mlp_raw", "mlp"),
    ("qwen4_exp", "attn_raw", "self_attn"),
    ("qwen4_exp", "mlp_raw", "mlp"),
    ("gemma3n", "attn_raw", "self_attn"),
    ("gemma3n", "attn_in", "input_layernorm"),
    ("longcat_flash", "resid_post", ""),
    ("longcat_flash", "resid_pre", ""),
    ("rwkv", "resid_post", ""),
    ("rwkv", "mixer_out", "attention"),
]


@contextlib.contextmanager
def by_hand(model: Any, kind: str, module: str, columns: Sequence[int], direction: Tensor) -> Iterator[None]:
    """Add to some columns of what a module of block 1 gives, or of what the block reads."""

    def shifted(tensor: Tensor) -> Tensor:
        assert tensor.dim() == 3
        new = tensor.clone()
        new[:, list(columns)] += direction
        return new

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (shifted(output[0]), *output[1:]) if isinstance(output, tuple) else shifted(output)

    block = find_decoder(model).blocks[1]
    handle = (
        block.register_forward_pre_hook(lambda _m, args: (shifted(args[0]), *args[1:]))
        if kind == "resid_pre"
        else block.get_submodule(module).register_forward_hook(after)
    )
    try:
        yield
    finally:
        handle.remove()


def written(scope: str, prompt: int, end: int) -> list[int]:
    """The columns of a text that a scope means."""
    start = {"response": prompt - 1, "generated": prompt}.get(scope, 0)
    stop = {"prompt": prompt, "first(2)": 2}.get(scope, end)
    return list(range(start, stop))


@pytest.mark.parametrize("use_cache", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "kind", "module"), INSIDE)
def test_every_scope_writes_what_hooks_written_by_hand_write(
    name: str, kind: str, module: str, use_cache: bool
) -> None:
    model = family(name)
    for scope in ("all", "prompt", "response", "generated", "first(2)"):
        vector = vector_for(model, scope=scope, site=Site(1, kind))
        with torch.no_grad(), steerkit.steer(model, vector):
            out = model.generate(
                input_ids=torch.tensor([FOUR]),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                use_cache=use_cache,
                pad_token_id=PAD,
                output_logits=True,
                return_dict_in_generate=True,
            )
        text = out.sequences[0].tolist()
        columns = written(scope, len(FOUR), len(text))
        direction = vector.tensors[f"{Site(1, kind)}/direction"]
        with by_hand(model, kind, module, columns, direction):
            expected = plain_logits(model, text)[len(FOUR) - 1 : -1]
        got = torch.stack(out.logits, dim=1)[0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert (got - plain_logits(model, text)[len(FOUR) - 1 : -1]).abs().max() > COARSE


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "kind"), [("gemma3n", "attn_raw"), ("qwen4_exp", "mlp_raw"), ("longcat_flash", "resid_post")]
)
def test_every_mode_in_every_scope(name: str, kind: str, mode: str) -> None:
    if (name, mode) == ("gemma3n", "inputs_embeds"):
        pytest.skip(
            "blocks of Gemma 3n read what is made of the ids beside the stream; without ids it is another model"
        )
    model = family(name)
    for scope in ("all", "prompt", "response", "generated", "first(2)"):
        try:
            run_steered(model, mode, None)
        except ValueError:
            pytest.skip("transformers does not offer it")
        for ran, expected, baseline in run_steered(model, mode, vector_for(model, scope=scope, site=Site(1, kind))):
            assert gap(ran, expected) < 1e-4, scope
            # A beam shows a sum over its answer, which a few tokens move little.
            least = 2e-4 if ran.processed else COARSE
            assert gap(ran, baseline) > least or (scope == "generated" and ran.processed), scope


# Several streams: every entrance


def entrances(model: Any, out: Path) -> dict[str, Callable[[], Any]]:
    data = ContrastSet.from_prompts(["a bright day", "so happy"], ["a dull day", "so sad"], raw=True)
    vector = vector_for(model, scope="all", site=Site(1))
    return {
        "fit": lambda: steerkit.fit(model, TOKENIZER, data, method="caa", layers=[1]),
        "record": lambda: steerkit.record(model, TOKENIZER, ["hello"], ["resid_post.1"]),
        "steer": lambda: steerkit.steer(model, vector),
        "monitor": lambda: steerkit.Monitor(model, TOKENIZER, vector, calibrated=False),
        "edited": lambda: steerkit.edited(model, vector).__enter__(),
        "bake": lambda: bake(model, TOKENIZER, vector, out / "baked"),
    }


@pytest.mark.parametrize("name", STREAMS)
def test_every_entrance_refuses_several_streams_in_one_line(name: str, tmp_path: Path) -> None:
    model = family(name)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    for entrance, run in entrances(model, tmp_path).items():
        with pytest.raises(SiteError) as caught:
            run()
        assert "passes between the blocks, 4 residual streams of width 32" in str(caught.value), entrance
        assert "\n" not in str(caught.value)
    problems = plan(model, vector_for(model, scope="all"), measure=False).problems
    assert any("4 residual streams of width 32" in problem for problem in problems)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", STREAMS)
def test_a_vector_is_fitted_and_watched_inside_such_blocks(name: str) -> None:
    model = family(name)
    data = ContrastSet.from_prompts(["a bright day", "so happy"], ["a dull day", "so sad"], raw=True)
    vector = steerkit.fit(model, TOKENIZER, data, method="caa", sites=["attn_raw.1"])
    text = render(TOKENIZER, Conversation("a bright day", raw=True))
    recorded = steerkit.record(model, TOKENIZER, [text], ["attn_raw.1"], readout=len(text.ids) - 1)
    seen: list[Tensor] = []
    module = find_decoder(model).blocks[1].get_submodule("self_attn")
    handle = module.register_forward_hook(lambda _m, _a, out: seen.append(out[0]))
    plain_logits(model, text.ids)
    handle.remove()
    torch.testing.assert_close(recorded[Site(1, "attn_raw")][0], seen[0][0, -1].detach())
    assert steerkit.Monitor(model, TOKENIZER, vector, calibrated=False) is not None
    with pytest.raises(SteerError), steerkit.edited(model, vector.at(scope="all")):
        pass


# A cache that does not count: RWKV's state


def test_every_name_that_transformers_has_for_a_cache_is_known() -> None:
    assert set(ALL_CACHE_NAMES) <= set(transformers_facts.CACHE_ARGUMENTS)


def test_the_package_asks_each_model_what_its_cache_is_called() -> None:
    """Transformers 5.24 renamed `past_key_values` to `cache`: a name written down is right in some versions alone."""
    told = {"tokens/transformers_facts.py", "steering/replay.py"}
    files = {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in PACKAGE.rglob("*.py")}
    assert {name for name, text in files.items() if re.search("past_key_values|cache_params", text)} == told


class Newer(nn.Module):
    def forward(self, input_ids: Any = None, cache: Any = None) -> None: ...


class Older(nn.Module):
    def forward(self, input_ids: Any = None, past_key_values: Any = None) -> None: ...


@pytest.mark.parametrize(("kind", "name"), [(Newer, "cache"), (Older, "past_key_values")])
def test_a_cache_goes_by_either_name(kind: type[nn.Module], name: str) -> None:
    assert transformers_facts.cache_argument(kind()) == name
    assert transformers_facts.cache_of({name: "held", "input_ids": 1}) == "held"
    assert transformers_facts.cache_left_by(SimpleNamespace(**{name: "left"})) == "left"
    assert transformers_facts.cache_left_by(SimpleNamespace(cache=None, past_key_values="warns")) is None


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
def test_a_wrapped_model_is_asked_inside_of_its_wrapper() -> None:
    """An adapter's own forward takes any arguments and names none of them."""
    wrapped = get_peft_model(build("mamba"), LoraConfig(r=2, target_modules=["in_proj"]))
    name = transformers_facts.cache_argument(inner_model(wrapped))
    assert (Passes(wrapped)._cache, _Reader(wrapped, None)._named) == (name, name)
    assert name in inspect.signature(inner_model(wrapped).forward).parameters


@pytest.mark.parametrize("known", ["prompt lengths", "mask"])
def test_a_loop_by_hand_over_a_state(known: str) -> None:
    """A state does not tell how much it has seen: right with a mask over everything, else only scope `all`."""
    model = family("rwkv")
    ids = torch.tensor([LONG])

    def run(scope: str) -> Tensor:
        def mask(width: int) -> dict[str, Tensor]:
            return {"attention_mask": torch.ones(1, width, dtype=torch.long)} if known == "mask" else {}

        vector = vector_for(model, scope=scope)
        with torch.no_grad(), steerkit.steer(model, vector, prompt_lengths=len(LONG)):
            out = model(input_ids=ids, use_cache=True, **mask(len(LONG)))
            token = out.logits[:, -1:].argmax(dim=-1)
            got = model(input_ids=token, state=out.state, use_cache=True, **mask(len(LONG) + 1)).logits[0, -1]
            expected = plain_logits(model, [*LONG, int(token)])[-1]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        return got

    run("all")
    for scope in ("prompt", "response", "generated", "first(2)"):
        if known == "mask":
            run(scope)
        else:
            with pytest.raises(ScopeError, match=r"does not say how many tokens it has seen.*use scope='all'"):
                run(scope)


@pytest.mark.parametrize("prompt", [SHORT, LONG])
@pytest.mark.parametrize("scope", ["response", "all"])
def test_a_gate_decides_once_and_its_decision_lasts_over_a_state(scope: str, prompt: Sequence[int]) -> None:
    """It reads block 3 and writes block 1, so the prompt's end runs again on a copy of what the state was."""
    model = family("rwkv")
    vector = gated_vector(model, scope=scope)
    ids = torch.tensor([prompt])
    options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
    with torch.no_grad(), steerkit.steer(model, vector):
        out = model.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
    text = out.sequences[0].tolist()
    with as_decided(model, vector, prompt, opens=prompt == SHORT):
        expected = plain_logits(model, text)[len(prompt) - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["rwkv", "mamba"])
def test_a_mask_over_the_new_token_alone_does_not_say_what_was_seen(name: str) -> None:
    model = family(name)
    cache = "state" if name == "rwkv" else "cache_params"
    with torch.no_grad(), steerkit.steer(model, vector_for(model, scope="generated"), prompt_lengths=len(LONG)):
        out = model(input_ids=torch.tensor([LONG]), use_cache=True)
        given = {cache: getattr(out, cache), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
        with pytest.raises(ScopeError, match="does not say how many tokens it has seen"):
            model(input_ids=torch.tensor([[7]]), use_cache=True, **given)


def test_generate_on_a_state_of_another_call_allows_scope_all_only() -> None:
    model = family("rwkv")
    common: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3, "pad_token_id": PAD}
    new = torch.tensor([[7, 8]])
    with torch.no_grad():
        first = model.generate(torch.tensor([FOUR]), return_dict_in_generate=True, **common)
        with steerkit.steer(model, vector_for(model, scope="all")):
            got = model.generate(new, state=copy.deepcopy(first.past_key_values), **common)
        with steerkit.steer(model, vector_for(model, scope="response")), pytest.raises(ScopeError, match="scope='all'"):
            model.generate(new, state=copy.deepcopy(first.past_key_values), **common)
        seen = first.sequences[0, :-1].tolist()  # the last token was not fed
        with by_hand(
            model,
            "",
            "",
            range(len(seen), len(seen) + 5),
            vector_for(model, scope="all").tensors[f"{Site(1)}/direction"],
        ):
            logits = plain_logits(model, [*seen, *got[0].tolist()])
    assert logits.argmax(dim=-1)[len(seen) + 1 : -1].tolist() == got[0, 2:].tolist()


@pytest.mark.parametrize("scope", ["all", "prompt", "response", "generated", "first(2)"])
def test_a_cache_by_a_name_that_nobody_knows_allows_scope_all_only(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a model with code of its own may have: `generate` feeds it the new token and no cache that is known."""
    monkeypatch.setattr(transformers_facts, "CACHE_ARGUMENTS", ("past_key_values", "cache_params"))
    model = family("rwkv")
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3, "pad_token_id": PAD}
    with torch.no_grad(), steerkit.steer(model, vector_for(model, scope=scope)):
        plain = model.generate(torch.tensor([FOUR]), use_cache=False, **options)
        refused = pytest.raises(ScopeError, match=r"no argument that is known; pass use_cache=False; use scope='all'")
        with contextlib.nullcontext() if scope == "all" else refused:
            assert torch.equal(model.generate(torch.tensor([FOUR]), **options), plain)


def test_a_tensor_of_another_shape_never_reaches_a_mask() -> None:
    """RWKV's cached step mixes the rows of a batch into [b, b, d]; that is refused, not written."""
    model = family("rwkv")
    ids = torch.tensor([FOUR, LONG[:4]])
    with torch.no_grad(), steerkit.steer(model, vector_for(model, scope="response")):
        with pytest.raises(SiteError, match=r"resid_post\.1: \[2, 2, 32\] came from .*a pass of 2 rows and 1 tokens"):
            model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=PAD)
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=PAD, use_cache=False)
