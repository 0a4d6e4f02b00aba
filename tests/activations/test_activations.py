"""Reading: what is recorded is what a plain hook sees, whatever the batch, the padding and the readout."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steerkit
from steerkit.activations.moments import Means, NormMedian
from steerkit.activations.readout import Readout
from steerkit.activations.recording import record, record_ids
from steerkit.activations.streaming import stream
from steerkit.errors import DataError, FitError, ScopeError, SiteError, SteerError
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import Rendered, render
from tests.families import HIDDEN, build
from tests.modes import vector_for
from tests.tiny_tokenizers import LLAMA2, byte_tokenizer

TEXTS = ["a middle one here", "short", "the longest text of these four, by far", "another one"]
KINDS = ("resid_pre", "resid_post", "attn_in", "attn_out", "attn_raw", "mlp_in", "mlp_out", "mlp_raw", "z", "mlp_post",
         "block_in", "mixer_out")  # fmt: skip
FAMILIES = ("llama", "gpt2", "gemma2", "falcon", "opt", "mamba", "gpt_oss", "llama_peft")


@functools.cache
def model_of(family: str = "llama") -> Any:
    return build(family)


@functools.cache
def kinds_of(family: str) -> tuple[str, ...]:
    """Kinds of site that a family has, under their canonical names."""
    found = {}
    for kind in KINDS:
        try:
            found.update(locate(model_of(family), [Site(1, kind)]))
        except SiteError:
            continue
    return tuple(site.kind for site in found)


def ids_of(text: str) -> list[int]:
    return byte_tokenizer(None)(text)["input_ids"]


def padded(texts: list[str], side: str, extra: int = 0) -> tuple[Tensor, Tensor]:
    rows = [ids_of(text) for text in texts]
    width = max(map(len, rows)) + extra
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for row, entries in enumerate(rows):
        place = slice(width - len(entries), width) if side == "left" else slice(0, len(entries))
        ids[row, place], mask[row, place] = torch.tensor(entries), 1
    return ids, mask


def seen_by_hooks(model: Any, sites: list[Site], ids: Tensor, mask: Tensor) -> dict[Site, Tensor]:
    """What plain hooks on the full model see, copied at once (Falcon changes one tensor in place afterwards)."""
    seen: dict[Site, Tensor] = {}
    handles = []
    for site, tap in locate(model, sites).items():

        def keep(h: Any, site: Site = site) -> None:
            h = h[0] if isinstance(h, tuple | list) else h
            seen[site] = h.reshape(*ids.shape, h.shape[-1]).clone()

        if tap.side == "input":
            handles.append(
                tap.module.register_forward_pre_hook(
                    lambda _m, args, kwargs, keep=keep: keep(args[0] if args else kwargs["hidden_states"]),
                    with_kwargs=True,
                )
            )
        else:
            handles.append(tap.module.register_forward_hook(lambda _m, _a, output, keep=keep: keep(output)))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return seen


def hook_count(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# What is read


@pytest.mark.parametrize("family", FAMILIES)
def test_record_is_what_a_plain_hook_sees(family: str) -> None:
    model = model_of(family)
    sites = [Site(layer, kind) for kind in kinds_of(family) for layer in (0, 3)]
    assert len(sites) >= 4
    # `record` puts the longest row first; so does this batch.
    order = sorted(TEXTS, key=lambda text: -len(ids_of(text)))
    ids, mask = padded(order, "right")
    seen = seen_by_hooks(model, sites, ids, mask)
    acts = record(model, byte_tokenizer(None), order, sites, readout="last")
    assert acts.sites == tuple(seen)
    for site, h in seen.items():
        expected = torch.stack([h[row, int(mask[row].sum()) - 1] for row in range(len(order))])
        assert torch.equal(acts[site], expected), site
        assert acts[site].dtype == torch.float32
    assert acts[sites[0]] is acts[str(sites[0])] or torch.equal(acts[sites[0]], acts[str(sites[0])])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon", "opt", "mamba"])
def test_bug_12_what_is_fitted_at_a_block_is_its_own_output(family: str) -> None:
    """Every block, the last one too, whose output is not `hidden_states[-1]` (that one is behind the final norm)."""
    model, tokenizer = model_of(family), byte_tokenizer(None)
    sites = [Site(layer) for layer in range(4)]
    text = TEXTS[0]
    seen = seen_by_hooks(model, sites, *padded([text], "right"))
    acts = record(model, tokenizer, [text], sites)
    for site in sites:
        assert torch.equal(acts[site][0], seen[site][0, -1])
    with torch.no_grad():
        normed = model(input_ids=torch.tensor([ids_of(text)]), output_hidden_states=True).hidden_states[-1]
    assert not torch.allclose(acts[sites[-1]][0], normed[0, -1], atol=1e-3)
    data = steerkit.ContrastSet.from_prompts([text], [TEXTS[1]], raw=True)
    other = seen_by_hooks(model, sites, *padded([TEXTS[1]], "right"))
    vector = steerkit.fit(model, tokenizer, data, sites=sites, batch_size=1)
    for site in sites:
        expected = seen[site][0, -1] - other[site][0, -1]
        # The two texts go through one pass, padded, where a matrix product may round its last bit differently.
        torch.testing.assert_close(vector.params(site)["direction"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("readout", ["last", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bug_03_batched_and_padded_is_one_by_one(family: str, readout: str) -> None:
    model, tokenizer = model_of(family), byte_tokenizer(None)
    sites = [Site(1, kind) for kind in kinds_of(family)] + [Site(3)]
    alone = [record(model, tokenizer, [text], sites, readout=readout) for text in TEXTS]
    for side in ("right", "left"):
        for batch_size in (4, 3):
            together = record(model, tokenizer, TEXTS, sites, readout=readout, batch_size=batch_size, padding_side=side)
            for site in together.sites:
                expected = torch.cat([acts[site] for acts in alone])
                scale = expected.abs().max()
                assert (together[site] - expected).abs().max() < 1e-5 * scale, (site, side, batch_size)


def test_order_is_that_of_the_items() -> None:
    model, tokenizer = model_of(), byte_tokenizer(None)
    forth = record(model, tokenizer, TEXTS, ["resid_post.2"], batch_size=2)["resid_post.2"]
    back = record(model, tokenizer, TEXTS[::-1], ["resid_post.2"], batch_size=3)["resid_post.2"]
    torch.testing.assert_close(forth, back.flip(0), rtol=1e-4, atol=1e-5)
    assert (forth[0] - forth[1]).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_bug_04_pads_and_first_tokens_are_never_in_a_mean(family: str, side: str) -> None:
    """Short texts beside one much longer: 20 pads and more. The norms leave pads and first tokens out as well."""
    model, tokenizer = model_of(family), byte_tokenizer(None)
    site = Site(2)
    short = ["one", "two"]
    expected, norms = [], []
    for text in [*short, "x" * 40]:
        h = seen_by_hooks(model, [site], *padded([text], "right"))[site][0]
        expected.append(h[1:].double().mean(dim=0).float())
        norms += h[1:].double().norm(dim=-1).tolist()
    acts = record(model, tokenizer, [*short, "x" * 40], [site], readout="mean", padding_side=side)
    torch.testing.assert_close(acts[site], torch.stack(expected), rtol=1e-4, atol=1e-5)
    median = float(torch.tensor(norms, dtype=torch.float64).median())
    assert abs(acts.norms[site] / median - 1) < 0.005


@pytest.mark.parametrize("poison", [1e9, float("nan"), float("inf")])
@pytest.mark.parametrize("readout", ["last", "mean"])
def test_bug_04_whatever_stands_on_pads_does_not_matter(readout: str, poison: float) -> None:
    """Half-precision models do overflow on pads; times zero that would still be nan."""
    model, tokenizer = model_of(), byte_tokenizer(None)
    site = Site(3)
    expected = record(model, tokenizer, TEXTS, [site], readout=readout)
    _, mask = padded(sorted(TEXTS, key=lambda text: -len(ids_of(text))), "right")
    handle = (
        find_decoder(model)
        .blocks[3]
        .register_forward_hook(lambda _m, _a, output: torch.where(mask[..., None].bool(), output, poison))
    )
    try:
        acts = record(model, tokenizer, TEXTS, [site], readout=readout)
    finally:
        handle.remove()
    torch.testing.assert_close(acts[site], expected[site], rtol=1e-5, atol=1e-6)
    assert acts.norms[site] == expected.norms[site]


# Readouts


def answered(tokenizer: Any) -> list[Rendered]:
    items = [("What is it? ", "Yes, it is."), ("Say more, please. ", "No"), ("Hm", "Perhaps so; it depends.")]
    return [render(tokenizer, Conversation.of(prompt, answer=answer)) for prompt, answer in items]


@pytest.mark.parametrize("template", [None, LLAMA2])
@pytest.mark.parametrize(
    "readout",
    ["last", "mean", "prompt_last", "prompt_mean", "response_mean", 1, 2, -1, -2, (0, 2), (1, 2), "span(0,2)"],
)
def test_readouts_against_brute_force(readout: Any, template: str | None) -> None:
    model, tokenizer = model_of("gpt2"), byte_tokenizer(template)
    site = Site(2)
    rendered = answered(tokenizer)
    acts = record(model, tokenizer, rendered, [site], readout=readout, batch_size=3)
    for row, text in enumerate(rendered):
        ids = torch.tensor([text.ids])
        h = seen_by_hooks(model, [site], ids, torch.ones_like(ids))[site][0].double()
        count, prompt = len(text.ids), text.prompt_length
        if isinstance(readout, int):
            places = [readout % count]
        elif isinstance(readout, tuple) or str(readout).startswith("span"):
            start, stop = readout if isinstance(readout, tuple) else (0, 2)
            begin = text.text.rindex(text.text[text.answer_start :])
            wanted = set(range(begin + start, begin + stop))
            places = [
                place
                for place, (left, right) in enumerate(text.offsets)
                if place >= prompt and wanted & set(range(left, right))
            ]
        else:
            places = {
                "last": [count - 1],
                "mean": list(range(1, count)),
                "prompt_last": [prompt - 1],
                "prompt_mean": list(range(1, prompt)),
                "response_mean": list(range(prompt, count)),
            }[readout]
        assert places
        expected = torch.stack([h[place] for place in places]).mean(dim=0)
        torch.testing.assert_close(acts[site][row].double(), expected, rtol=1e-4, atol=1e-5)


def test_readouts_differ() -> None:
    model, tokenizer = model_of(), byte_tokenizer(None)
    rendered = answered(tokenizer)
    found = [
        record(model, tokenizer, rendered, ["resid_post.1"], readout=readout)["resid_post.1"]
        for readout in ("last", "mean", "prompt_last", "prompt_mean", "response_mean", 1, 2, (0, 1))
    ]
    for index, one in enumerate(found):
        assert all((one - other).abs().max() > 1e-3 for other in found[:index])


@pytest.mark.parametrize("readout", ["nonsense", "index", "span(1)", True, 1.5, None])
def test_readouts_that_are_none(readout: Any) -> None:
    with pytest.raises(DataError):
        Readout.parse(readout)


def test_readouts_that_find_no_token() -> None:
    model, tokenizer = model_of(), byte_tokenizer(None)
    for readout in ("response_mean", (0, 2), 99, -99):
        with pytest.raises(DataError, match="no token"):
            record(model, tokenizer, TEXTS, ["resid_post.1"], readout=readout)
    for readout in ((50, 60), (2, 2), (3, 1)):
        with pytest.raises(DataError, match="no token"):
            record(model, tokenizer, answered(tokenizer), ["resid_post.1"], readout=readout)
    for text in ("last", "mean", "index(-2)", "span(0,3)"):
        assert str(Readout.parse(text)) == text
        assert Readout.parse(str(Readout.parse(text))) == Readout.parse(text)


def test_bug_36_every_option_of_record_that_may_change_something_does() -> None:
    model, tokenizer = model_of(), byte_tokenizer()
    template = "{% for m in messages %}{{ m['content'] }}{{ mark }}{% endfor %}"
    tokenizer.chat_template = template
    one, other = (
        record(model, tokenizer, ["text"], ["resid_post.1"], chat_template_kwargs={"mark": mark})["resid_post.1"]
        for mark in ("!", "?")
    )
    assert (one - other).abs().max() > 1e-3


# Streaming


@pytest.mark.parametrize("sizes", [(4, 4), (4, 2)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_stream_is_record(family: str, sizes: tuple[int, int]) -> None:
    model, tokenizer = model_of(family), byte_tokenizer(None)
    texts = [text[::-1] for text in TEXTS]
    data = steerkit.ContrastSet.from_prompts(TEXTS[: sizes[0]], texts[: sizes[1]], raw=True)
    sites = [Site(1), Site(2, "mlp_out")]
    whole = record(model, tokenizer, data, sites, readout="mean")
    for batch_size in (1, 3, 16):
        streamed = stream(
            model, tokenizer, data, {site: Means() for site in sites}, readout="mean", batch_size=batch_size
        )
        for site in sites:
            for side in ("positive", "negative"):
                expected = getattr(whole, side)[site].mean(dim=0, keepdim=True)
                torch.testing.assert_close(getattr(streamed, side)[site], expected, rtol=1e-4, atol=1e-5)
            assert streamed.norms[site] == pytest.approx(whole.norms[site], rel=1e-6)
        assert streamed.readout == whole.readout


class Pairs:
    """An accumulator that writes down what comes together."""

    def __init__(self) -> None:
        self.updates: list[tuple[Tensor, Tensor]] = []

    def update(self, positive: Tensor, negative: Tensor) -> None:
        self.updates.append((positive.clone(), negative.clone()))

    def result(self) -> tuple[Tensor, Tensor]:
        return torch.cat([one for one, _ in self.updates]), torch.cat([other for _, other in self.updates])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 16])
def test_both_sides_of_a_pair_come_in_one_update(batch_size: int) -> None:
    model, tokenizer = model_of(), byte_tokenizer(None)
    others = [text[:3] for text in TEXTS]
    data = steerkit.ContrastSet.from_prompts(TEXTS, others, raw=True)
    pairs = Pairs()
    stream(model, tokenizer, data, {Site(1): pairs}, batch_size=batch_size)
    whole = record(model, tokenizer, data, [Site(1)])
    left = set(range(4))
    for positive, negative in pairs.updates:
        assert len(positive) == len(negative)
        for one, other in zip(positive, negative, strict=True):
            row = int((whole.positive[Site(1)] - one).norm(dim=-1).argmin())
            torch.testing.assert_close(one, whole.positive[Site(1)][row], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(other, whole.negative[Site(1)][row], rtol=1e-4, atol=1e-4)
            left.remove(row)
    assert not left


def test_stream_keeps_no_samples() -> None:
    """Nothing of n rows, and no pile of batches, is alive while the last batches are read."""
    model, tokenizer = model_of(), byte_tokenizer(None)
    count, site = 60, Site(1)
    data = steerkit.ContrastSet.from_prompts(
        [f"yes {i}" for i in range(count)], [f"no {i}" for i in range(count)], raw=True
    )
    kept: list[tuple[int, int]] = []

    def alive() -> list[Tensor]:
        return [
            entry
            for entry in gc.get_objects()
            if type(entry) is torch.Tensor and entry.dim() >= 1 and entry.shape[-1] == HIDDEN and entry.dim() <= 3
        ]

    class Watching(Means):
        def update(self, positive: Tensor, negative: Tensor) -> None:
            super().update(positive, negative)
            new = [entry for entry in alive() if id(entry) not in before]
            kept.append((max(entry.shape[0] for entry in new if entry.dim() == 2), len(new)))

    gc.collect()
    before = {id(entry): entry for entry in alive()}  # what other tests have left; kept, so that no id is used again
    stream(model, tokenizer, data, {site: Watching()}, batch_size=4)
    assert len(kept) == 2 * count // 4
    assert max(rows for rows, _ in kept[1:]) < count
    assert kept[-1][1] <= kept[2][1]  # the number of activations alive does not grow with the batches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_bug_34_means_of_half_precision_models_are_float32(family: str, dtype: torch.dtype) -> None:
    model, tokenizer = build(family).to(dtype), byte_tokenizer(None)
    site = Site(1)
    acts = record(model, tokenizer, [TEXTS[2]], [site], readout="mean")
    h = seen_by_hooks(model, [site], *padded([TEXTS[2]], "right"))[site][0]
    assert acts[site].dtype == torch.float32
    torch.testing.assert_close(acts[site][0].double(), h[1:].double().mean(dim=0), rtol=1e-5, atol=1e-5)
    last = record(model, tokenizer, [TEXTS[2]], [site])[site][0]
    assert torch.equal(last, h[-1].float())


def test_means_are_float32_under_autocast() -> None:
    """What `explain` says a gate reads is what the gate reads."""
    model, tokenizer, site = build("llama"), byte_tokenizer(None), Site(1)
    with torch.autocast("cpu", torch.bfloat16):
        acts = record(model, tokenizer, [TEXTS[2]], [site], readout="mean")
        h = seen_by_hooks(model, [site], *padded([TEXTS[2]], "right"))[site][0]
    torch.testing.assert_close(acts[site][0].double(), h[1:].double().mean(dim=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e3, 1e5])
def test_median_norm(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(40, 25, 1, generator=generator) * 3
    h = torch.randn(40, 25, 8, generator=generator) * scale * 10**spread
    counted = (torch.rand(40, 25, generator=generator) > 0.3).float()
    h[counted == 0] = 1e12  # what is not counted does not matter
    median = NormMedian()
    for start in range(0, 40, 7):
        median.update(h[start : start + 7], counted[start : start + 7])
    expected = float(h[counted == 1].double().norm(dim=-1).median())
    assert abs(median.result() / expected - 1) < 0.005


def test_median_norm_of_large_float16_and_of_nothing() -> None:
    median = NormMedian()
    assert median.result() != median.result()  # nan
    median.update(torch.full((1, 3, 64), 6.0e4, dtype=torch.float16), torch.ones(1, 3))
    assert abs(median.result() / 4.8e5 - 1) < 0.005


# What runs and what does not


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mamba", "gpt_oss", "llama_peft"])
def test_the_pass_ends_after_the_deepest_site(family: str) -> None:
    model, tokenizer = model_of(family), byte_tokenizer(None)
    decoder = find_decoder(model)
    locate(model, [Site(0)])  # a model's form is seen once, in a pass of its own
    ran: list[Any] = []
    handles = [
        block.register_forward_pre_hook(lambda _m, _a, layer=layer: ran.append(layer))
        for layer, block in enumerate(decoder.blocks)
    ]
    handles.append(decoder.model.get_output_embeddings().register_forward_pre_hook(lambda _m, _a: ran.append("head")))
    try:
        record(model, tokenizer, TEXTS, [Site(1), Site(0)], batch_size=2)
        assert ran == [0, 1] * 2
        ran.clear()
        record(model, tokenizer, TEXTS, [Site(2, "resid_pre")], batch_size=4)
        assert set(ran) <= {0, 1, 2}
        ran.clear()
        record(model, tokenizer, TEXTS, [Site(3)], batch_size=4)
        assert ran == [0, 1, 2, 3]
    finally:
        for handle in handles:
            handle.remove()


def prime(model: Any) -> Any:
    """The model with transformers' own capture hooks on, which the first such call leaves for good."""
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2]]), output_hidden_states=True)
    return model


def nothing_left(model: Any, work: Callable[[], Any]) -> None:
    inputs = {"input_ids": torch.tensor([ids_of(TEXTS[0])])}
    with torch.no_grad():
        before = prime(model)(**inputs).logits
        hooks, training = hook_count(model), model.training
        work()
        assert hook_count(model) == hooks
        assert torch.equal(model(**inputs).logits, before)
        assert model.training == training


def test_non_finite_activations_name_the_site() -> None:
    model, tokenizer = build("llama"), byte_tokenizer(None)
    handle = find_decoder(model).blocks[2].register_forward_hook(lambda _m, _a, output: output * float("inf"))
    data = steerkit.ContrastSet.from_prompts(TEXTS, [text[::-1] for text in TEXTS], raw=True)
    sites = [Site(1), Site(2)]
    for work in (
        lambda: record(model, tokenizer, TEXTS, sites),
        lambda: stream(model, tokenizer, data, {site: Means() for site in sites}),
        lambda: record_ids(model, [ids_of(TEXTS[0])], sites),
        lambda: steerkit.fit(model, tokenizer, data, sites=sites),
        lambda: steerkit.fit(model, tokenizer, data, sites=sites, method="repe"),
    ):
        with pytest.raises(FitError, match=r"resid_post\.2"):
            work()
    handle.remove()
    assert torch.isfinite(record(model, tokenizer, TEXTS, sites)[Site(2)]).all()


def test_hooks_are_gone_after_an_error() -> None:
    model, tokenizer = build("llama"), byte_tokenizer(None)
    block = find_decoder(model).blocks[1]
    record(model, tokenizer, TEXTS, [Site(2)])  # sites are located: what fails from here on is the reading

    def broken(error: type[BaseException]) -> None:
        def fail(*_args: Any) -> None:
            raise error

        handle = block.register_forward_hook(fail)
        with pytest.raises(error):
            record(model, tokenizer, TEXTS, [Site(2), Site(3)])
        handle.remove()

    nothing_left(model, lambda: broken(RuntimeError))
    nothing_left(model, lambda: broken(KeyboardInterrupt))

    def empty() -> None:
        with pytest.raises(SteerError):
            record(model, tokenizer, [], [Site(1)])

    nothing_left(model, empty)
    nothing_left(model, lambda: record(model, tokenizer, TEXTS, [Site(2)]))


def state_of(tokenizer: Any) -> Any:
    return (
        {name: repr(value) for name, value in vars(tokenizer).items() if name != "_tokenizer"},
        tokenizer._tokenizer.to_str(),
        tokenizer.pad_token,
        tokenizer.pad_token_id,
        tokenizer.padding_side,
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
    )


@pytest.mark.parametrize("method", ["caa", "repe", "actadd"])
def test_tokenizer_and_model_are_unchanged_by_a_fit(method: str) -> None:
    model, tokenizer = prime(build("llama")), byte_tokenizer(None)
    few = TEXTS[:1] if method == "actadd" else TEXTS
    data = steerkit.ContrastSet.from_prompts(few, [text[::-1] for text in few], raw=True)
    before = (
        state_of(tokenizer),
        copy.deepcopy(model.state_dict()),
        [sorted(vars(module)) for module in model.modules()],
    )
    requires = [parameter.requires_grad for parameter in model.parameters()]
    nothing_left(model, lambda: steerkit.fit(model, tokenizer, data, method=method))
    assert state_of(tokenizer) == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in model.state_dict().items())
    assert [sorted(vars(module)) for module in model.modules()] == before[2]
    assert [parameter.requires_grad for parameter in model.parameters()] == requires
    assert all(parameter.grad is None for parameter in model.parameters())


def test_record_ids_reads_every_token() -> None:
    model = model_of()
    rows = [ids_of(text) for text in TEXTS]
    found = record_ids(model, rows, [Site(1), Site(2, "resid_pre")])
    for site in (Site(1), Site(2, "resid_pre")):
        for ids, got in zip(rows, found[site], strict=True):
            inputs = torch.tensor([ids])
            assert torch.equal(got, seen_by_hooks(model, [site], inputs, torch.ones_like(inputs))[site][0])


# Reading a steered model


def test_recording_inside_a_context_reads_the_steered_model() -> None:
    model, tokenizer = model_of(), byte_tokenizer(None)
    vector = vector_for(model, scope="all")
    clean = record(model, tokenizer, TEXTS, [Site(1), Site(2)])
    with steerkit.steer(model, vector):
        steered = record(model, tokenizer, TEXTS, [Site(1), Site(2)], batch_size=3)
        assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape[1] == 3  # and the next pass is fine
    torch.testing.assert_close(steered[Site(1)], clean[Site(1)] + vector.params(Site(1))["direction"])
    assert (steered[Site(2)] - clean[Site(2)]).abs().max() > 0.1


@pytest.mark.parametrize("given", ["strengths", "prompt lengths"])
def test_what_was_given_for_each_row_follows_its_row(given: str) -> None:
    """`record` sorts by length; strengths and prompt lengths of a context have to follow, or be refused."""
    model, tokenizer = model_of(), byte_tokenizer(None)
    texts, lengths, strengths = ["ab cd", "the longest of all these", "in the middle"], [3, 9, 5], [1.0, 0.0, -2.0]
    vector = vector_for(model, scope="all" if given == "strengths" else "prompt")

    def context(rows: slice) -> Any:
        if given == "strengths":
            return steerkit.steer(model, vector, strengths[rows])
        return steerkit.steer(model, vector, prompt_lengths=lengths[rows])

    alone = []
    for row, text in enumerate(texts):
        with context(slice(row, row + 1)):
            alone.append(record(model, tokenizer, [text], [Site(2)], readout="mean")[Site(2)])
    with context(slice(None)):
        try:
            together = record(model, tokenizer, texts, [Site(2)], readout="mean")[Site(2)]
        except ScopeError:
            return
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_rows_of_ids_are_copies() -> None:
    """Falcon adds the attention's output into the MLP's, in place: what was read must not follow."""
    from steerkit.activations.recording import record_ids

    model = build("falcon")
    alone = record_ids(model, [(1, 2, 3, 4)], [Site(0, "mlp_out")])
    together = record_ids(model, [(1, 2, 3, 4)], [Site(0, "mlp_out"), Site(3)])
    assert torch.equal(together[Site(0, "mlp_out")][0], alone[Site(0, "mlp_out")][0])


def test_a_number_stands_for_the_output_of_that_block() -> None:
    model = build("llama")
    read = steerkit.record(model, byte_tokenizer(), ["hi"], [1])
    assert torch.equal(read[1], read["resid_post.1"])
    assert read.sites == (Site(1),)
    for wrong in (True, 1.5, None):
        with pytest.raises(SiteError, match="is not a site; write a layer such as 12"):
            steerkit.record(model, byte_tokenizer(), ["hi"], [wrong])  # type: ignore[list-item]
