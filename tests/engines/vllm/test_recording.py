"""What is read of a model that vLLM runs is what is read of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steerkit.engines.vllm.recording import record
from steerkit.errors import DataError
from steerkit.network.sites import Site
from tests.engines.vllm.asked import prompt
from tests.gated import activation

ENGINE = {"max_num_batched_tokens": 16}


@pytest.mark.parametrize("kind", ["resid_post", "attn_out", "mlp_out"])
def test_readings(pair: Any, kind: str) -> None:
    texts = [prompt(number, length) for number, length in enumerate((5, 17, 40, 33, 2))]
    spans = [(0, 5), (16, 17), (3, 30), (1, 33), (1, 2)]
    sites = [Site(1, kind), Site(3, kind)]
    found = record(pair.llm, texts, sites, spans)
    for row, (text, (start, end)) in enumerate(zip(texts, spans, strict=True)):
        for site in sites:
            wanted = _of(pair.model, text, site)[start:end].mean(dim=0)
            torch.testing.assert_close(found[site][row], wanted, rtol=1e-4, atol=1e-4)


def _of(model: Any, text: list[int], site: Site) -> torch.Tensor:
    """[t, d] at a site, by a hook."""
    from steerkit.network.tap import locate

    (tap,) = locate(model, [site]).values()
    seen: list[torch.Tensor] = []
    handle = tap.module.register_forward_hook(
        lambda _module, _args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(torch.tensor([text]), use_cache=False)
    handle.remove()
    return seen[0][0]


def test_under_steering(pair: Any) -> None:
    import steerkit

    text = prompt(3, 20)
    found = record(pair.llm, [text], ["resid_post.3"], [(19, 20)], steering="add-post@all*1")
    with steerkit.steer(pair.model, pair.known["add-post"].at(strength=1.0, scope="all")):
        wanted = activation(pair.model, text)
    torch.testing.assert_close(found[Site(3)][0], wanted, rtol=1e-4, atol=1e-4)


def test_wrong_spans(pair: Any) -> None:
    with pytest.raises(DataError, match="0 to 9"):
        record(pair.llm, [[1, 2]], ["resid_post.1"], [(0, 9)])
