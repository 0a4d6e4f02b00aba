"""Patching, by the network and by gradients: identities that hold without any reference implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steerkit.errors import DataError
from steerkit.evaluate.attribution.patching import Node, Patched, attribution_patching, exact_patching
from steerkit.evaluate.attribution.prompt_pairs import PromptPairs, logit_difference
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from tests.families import BLOCKS, build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

CLEAN = ["the red cat sat here", "a dog ran", "tell me of red now"]
CORRUPT = ["the wet dog sat here", "a hog sat", "tell me of wet now"]
RIGHT, WRONG = ["a", "b", "c"], ["x", "y", "z"]


@pytest.fixture(scope="module")
def pairs() -> PromptPairs:
    return PromptPairs.of(byte_tokenizer(CHATML), CLEAN, CORRUPT, batch_size=2)


@pytest.fixture(scope="module")
def metric() -> Any:
    return logit_difference(byte_tokenizer(CHATML), RIGHT, WRONG)


def changes(model: Any, pairs: PromptPairs, metric: Any, *sites: str, **options: Any) -> dict[str, Any]:
    places = [Site.parse(site) for site in sites]
    found = attribution_patching(model, pairs, metric, places, **{"way": "denoising", **options})
    return dict(zip(sites, found.values(), strict=True))


def slow_metric(model: nn.Module, ids: tuple[int, ...], row: int) -> Tensor:
    tokenizer = byte_tokenizer(CHATML)
    plus, minus = (tokenizer(side[row], add_special_tokens=False)["input_ids"][0] for side in (RIGHT, WRONG))
    logits = model(torch.tensor([ids])).logits[0, -1]
    return logits[plus] - logits[minus]


def at(model: nn.Module, site: str, change: Any, ids: tuple[int, ...], row: int) -> Tensor:
    (tap,) = locate(model, [Site.parse(site)]).values()
    handle = tap.attach(change)
    try:
        with torch.no_grad():
            return slow_metric(model, ids, row)
    finally:
        handle.remove()


def held(model: nn.Module, site: str, ids: tuple[int, ...], row: int) -> Tensor:
    kept: list[Tensor] = []
    at(model, site, lambda h: kept.append(h.detach().clone()) or h, ids, row)
    return kept[0]


@pytest.mark.parametrize("way", ["denoising", "noising"])
@pytest.mark.parametrize("site", ["resid_post.1", "attn_out.2", "z.1", "mlp_post.2", "mlp_out.0"])
def test_it_is_the_slope_of_the_patched_metric(pairs: PromptPairs, metric: Any, site: str, way: str) -> None:
    model = build("llama")
    found = changes(model, pairs, metric, site, way=way)[site]
    for row in range(3):
        sides = (pairs.corrupt, pairs.clean) if way == "denoising" else (pairs.clean, pairs.corrupt)
        base, source = (side[row].ids for side in sides)
        step = held(model, site, source, row) - held(model, site, base, row)
        up, down = (at(model, site, lambda h, e=e, step=step: h + e * step, base, row) for e in (0.01, -0.01))
        assert float(found.change[row]) == pytest.approx(float(up - down) / 0.02, rel=1e-3, abs=2e-4)


def test_heads_add_up_to_attention_and_neurons_to_the_mlp(pairs: PromptPairs, metric: Any) -> None:
    sites = [f"{kind}.{layer}" for kind in ("z", "attn_out", "mlp_post", "mlp_out") for layer in range(BLOCKS)]
    found = changes(build("llama"), pairs, metric, *sites)
    for layer in range(BLOCKS):
        heads, neurons = found[f"z.{layer}"], found[f"mlp_post.{layer}"]
        assert heads.parts.shape == (3, 4)
        assert neurons.parts.shape == (3, 48)
        assert torch.allclose(heads.parts.sum(dim=1), found[f"attn_out.{layer}"].change, atol=1e-5)
        assert torch.allclose(neurons.parts.sum(dim=1), found[f"mlp_out.{layer}"].change, atol=1e-5)


def test_the_stream_is_the_sum_of_what_was_added(pairs: PromptPairs, metric: Any) -> None:
    """Of d L / d resid_post the differences of resid_pre and both halves: in their slow form, by one backward pass."""
    model = build("llama")
    found = changes(model, pairs, metric, "resid_post.1")["resid_post.1"]
    for row in range(3):
        base, source = pairs.corrupt[row].ids, pairs.clean[row].ids
        (tap,) = locate(model, [Site(1)]).values()
        leaf = held(model, "resid_post.1", base, row).requires_grad_()
        handle = tap.attach(lambda _, leaf=leaf: leaf)
        slow_metric(model, base, row).backward()
        handle.remove()
        parts = [
            ((held(model, site, source, row) - held(model, site, base, row)) * leaf.grad).sum()
            for site in ("resid_pre.1", "attn_out.1", "mlp_out.1")
        ]
        assert float(found.change[row]) == pytest.approx(float(sum(parts)), rel=1e-4, abs=1e-5)


def test_the_embeddings_patched_everywhere_are_the_other_run(pairs: PromptPairs, metric: Any) -> None:
    model = build("llama")
    for way in ("denoising", "noising"):
        (found,) = exact_patching(model, pairs, metric, [Site(0, "resid_pre")], way=way)  # type: ignore[arg-type]
        assert torch.equal(found.change, found.span)
        assert bool(found.span.any())


def test_a_share_is_of_the_mean_span() -> None:
    change, span = torch.tensor([1.0, 1.5, 0.5]), torch.tensor([2.0, 2.2, 1.8])
    found = Patched(Node((Site(1),)), "noising", change, span).share
    assert found.mean == pytest.approx(0.5)
    assert found.low < 0.5 < found.high


def test_of_a_linear_metric_the_estimate_is_exact(pairs: PromptPairs, metric: Any) -> None:
    model = build("llama")
    model.model.norm = nn.Identity()
    site = Site(BLOCKS - 1)
    (exact,) = exact_patching(model, pairs, metric, [site], way="denoising")
    estimate = attribution_patching(model, pairs, metric, [site], way="denoising")[site]
    assert torch.allclose(estimate.change, exact.change, rtol=1e-4, atol=1e-4)
    other = attribution_patching(model, pairs, metric, [site], way="noising")[site]
    assert torch.allclose(other.change, -exact.change, rtol=1e-4, atol=1e-4)


def test_exact_patching_in_its_slow_form(pairs: PromptPairs, metric: Any) -> None:
    model, head = build("llama"), slice(16, 24)
    nodes = [Node((Site(1, "z"),), 2), Node((Site(0), Site(1)))]
    found, window = exact_patching(model, pairs, metric, nodes, way="noising", positions=[-1, -3])
    assert [str(one.node) for one in (found, window)] == ["z.1[2]", "resid_post 0+1 together"]
    for row in range(3):
        base, source = pairs.clean[row].ids, held(model, "z.1", pairs.corrupt[row].ids, row)

        def swapped(h: Tensor, source: Tensor = source) -> Tensor:
            h = h.clone()
            for place in (-1, -3):
                h[:, place, head] = source[:, place, head]
            return h

        with torch.no_grad():
            plain = slow_metric(model, base, row)
        assert float(found.change[row]) == pytest.approx(float(at(model, "z.1", swapped, base, row) - plain), abs=1e-4)
    with pytest.raises(DataError, match=r"z\.1\[4\]: it has parts 0 to 3"):
        exact_patching(model, pairs, metric, [Node((Site(1, "z"),), 4)], way="noising")


def test_grad_drop_in_its_slow_form(pairs: PromptPairs, metric: Any) -> None:
    """For each block a whole backward pass in which what the block adds lets no gradient through."""
    model = build("llama")
    sites = ["z.0", "mlp_post.1", "attn_out.2", "z.3"]
    found = changes(model, pairs, metric, *sites, grad_drop=True)
    for row in range(3):
        base, source = pairs.corrupt[row].ids, pairs.clean[row].ids
        sizes: dict[str, list[Tensor]] = {site: [] for site in sites}
        for dropped in range(BLOCKS):
            leaves: dict[str, Tensor] = {}
            handles = []

            def bypass(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                return args[0] + (output - args[0]).detach()

            handles.append(model.model.layers[dropped].register_forward_hook(bypass))
            for site in sites:
                (tap,) = locate(model, [Site.parse(site)]).values()

                def keep(h: Tensor, site: str = site, leaves: dict[str, Tensor] = leaves) -> Tensor:
                    own = h if h.requires_grad else h.detach().requires_grad_(True)
                    leaves[site] = own * 1.0
                    leaves[site].retain_grad()
                    return leaves[site]

                handles.append(tap.attach(keep))
            slow_metric(model, base, row).backward()
            for handle in handles:
                handle.remove()
            model.zero_grad()
            for site in sites:
                gradient = leaves[site].grad
                step = held(model, site, source, row) - held(model, site, base, row)
                product = (step * (torch.zeros_like(step) if gradient is None else gradient)).sum(dim=(0, 1))
                sizes[site].append(product.unflatten(0, (4, -1)).sum(-1) if site.startswith("z") else product)
        for site in sites:
            parts = torch.stack([one.abs() for one in sizes[site]]).sum(dim=0) / (BLOCKS - 1)
            whole = torch.stack([one.sum().abs() for one in sizes[site]]).sum() / (BLOCKS - 1)
            assert torch.allclose(found[site].parts[row], parts.detach(), rtol=1e-3, atol=1e-5), site
            assert float(found[site].change[row]) == pytest.approx(float(whole), rel=1e-3, abs=1e-5)


def test_grad_drop_costs_half_of_its_backward_passes(pairs: PromptPairs, metric: Any) -> None:
    """A pass from block d runs the d blocks before it: with the first one L (L + 1) / 2 blocks of L (L + 1)."""
    model, ran = build("llama"), [0] * BLOCKS
    hooks = []
    for layer, block in enumerate(model.model.layers):

        def count(module: nn.Module, args: Any, output: Tensor, layer: int = layer) -> None:
            def arrived(_gradient: Tensor) -> None:
                ran[layer] += 1

            if output.requires_grad:  # not in the passes that only look where things are
                output.register_hook(arrived)

        hooks.append(block.register_forward_hook(count))
    few = PromptPairs.of(byte_tokenizer(CHATML), CLEAN[:1], CORRUPT[:1])
    with torch.enable_grad():
        changes(model, few, metric, "z.0", grad_drop=True)
    for hook in hooks:
        hook.remove()
    assert sum(ran) <= BLOCKS * (BLOCKS + 1) // 2
    assert ran[0] >= BLOCKS - 1


def test_what_cannot_be_patched_is_refused(pairs: PromptPairs, metric: Any) -> None:
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    with pytest.raises(DataError, match=r"pair 0 have .* tokens; replace words"):
        PromptPairs.of(tokenizer, ["a cat"], ["a horse"])
    with pytest.raises(DataError, match="2 clean and 1 corrupt"):
        PromptPairs.of(tokenizer, ["a", "b"], ["c"])
    with pytest.raises(DataError, match="begin with the same token"):
        logit_difference(tokenizer, ["abc"], ["axe"])
    with pytest.raises(DataError, match="way 'sideways'"):
        exact_patching(model, pairs, metric, [Site(0)], way="sideways")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="position 0; count from the end"):
        exact_patching(model, pairs, metric, [Site(0)], way="noising", positions=[0])
    with pytest.raises(DataError, match="grad_drop leaves out what a block adds"):
        attribution_patching(model, pairs, metric, [Site(0)], way="noising", grad_drop=True)
    same = PromptPairs.of(tokenizer, CLEAN, CLEAN)
    (found,) = exact_patching(model, same, metric, [Site(1)], way="noising")
    with pytest.raises(DataError, match="less than 3 standard errors"):
        _ = found.share


def test_padding_changes_nothing(metric: Any) -> None:
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    found = [
        changes(model, PromptPairs.of(tokenizer, CLEAN, CORRUPT, batch_size=size), metric, "z.1")["z.1"].parts
        for size in (1, 3)
    ]
    assert torch.allclose(*found, atol=1e-4)
