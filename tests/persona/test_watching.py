"""The vector to watch with: what it is fitted and measured on, its formula in the slow form, the choice of block."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import steerkit
from steerkit.evaluate.setup import Setup
from steerkit.persona.watching import Kind, prompts, separates, watchpoint
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render
from tests.families import BLOCKS, build
from tests.persona.test_persona import TRAIT
from tests.tiny_tokenizers import CHATML, byte_tokenizer

KINDS: tuple[Kind, ...] = ("positive", "negative", "neutral")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer(CHATML)


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


def last_tokens(model: Any, tokenizer: Any, asked: tuple[Conversation, ...]) -> torch.Tensor:
    """[n, blocks, d], one prompt at a time."""
    rows = []
    for one in asked:
        ids = torch.tensor([render(tokenizer, one).ids])
        with torch.no_grad():
            hidden = model.model(input_ids=ids, output_hidden_states=True).hidden_states
        # The last entry is behind the final norm; the block's own output is not.
        seen: list[torch.Tensor] = []
        handle = model.model.layers[-1].register_forward_hook(
            lambda _m, _a, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            model.model(input_ids=ids)
        handle.remove()
        rows.append(torch.stack([*(h[0, -1] for h in hidden[1:BLOCKS]), seen[0][0, -1]]))
    return torch.stack(rows)


def area(plus: torch.Tensor, minus: torch.Tensor) -> float:
    couples = [(float(a), float(b)) for a in plus for b in minus]
    return sum((a > b) + 0.5 * (a == b) for a, b in couples) / len(couples)


def test_the_formula_and_the_block(model: Any, tokenizer: Any) -> None:
    vector = watchpoint(Setup(model, tokenizer, batch_size=4), TRAIT, method="persona")
    plus, minus, calm = (last_tokens(model, tokenizer, prompts(TRAIT, kind, held_out=False)).double() for kind in KINDS)
    assert len(minus) == len(calm)
    direction = plus.mean(dim=0) - (minus.mean(dim=0) + calm.mean(dim=0)) / 2
    others = torch.cat([minus, calm])
    areas = [area(plus[:, block] @ direction[block], others[:, block] @ direction[block]) for block in range(BLOCKS)]
    (site,) = vector.sites
    assert areas[site.layer] == max(areas)
    assert vector.readout == "prompt_last"
    assert torch.allclose(vector.params(site)["direction"].double(), direction[site.layer], atol=1e-5)


def test_what_is_measured_was_not_seen(model: Any, tokenizer: Any) -> None:
    for kind in KINDS:
        fitted, measured = (prompts(TRAIT, kind, held_out=held_out) for held_out in (False, True))
        assert not {one.prompt for one in fitted} & {one.prompt for one in measured}
        assert not {one.system for one in fitted} & {one.system for one in measured}
    sizes = {len(prompts(TRAIT, kind, held_out=True)) for kind in KINDS}
    assert len(sizes) == 1

    vector = watchpoint(Setup(model, tokenizer), TRAIT, method="persona")
    (site,) = vector.sites
    plus, minus, calm = (
        last_tokens(model, tokenizer, prompts(TRAIT, kind, held_out=True))[:, site.layer] for kind in KINDS
    )
    direction = vector.params(site)["direction"]
    found = vector.extra["watchpoint"]
    assert found["neutral"]["mean"] == pytest.approx(area(plus @ direction, calm @ direction), abs=0.02)
    assert found["negative"]["mean"] == pytest.approx(area(plus @ direction, minus @ direction), abs=0.02)
    assert found["prompts"] == len(plus)
    monitor = steerkit.Monitor(model, tokenizer, vector)
    assert separates(monitor, TRAIT).mean == pytest.approx(found["neutral"]["mean"])


def test_without_a_system_turn_it_stands_before_the_question() -> None:
    for kind in KINDS:
        plain, folded = (prompts(TRAIT, kind, held_out=True, folded=fold) for fold in (False, True))
        assert [one.prompt for one in folded] == [f"{one.system}\n\n{one.prompt}" for one in plain]
        assert not any(one.system for one in folded)


def test_neutral_prompts_are_as_long_as_those_of_the_shipped_traits() -> None:
    from steerkit._support.shipped import traits
    from steerkit.persona.traits import TraitSpec

    def words(asked: tuple[Conversation, ...]) -> float:
        return sum(len(str(one.system).split()) for one in asked) / len(asked)

    for path in traits().values():
        spec = TraitSpec.load(path)
        for held_out in (False, True):
            of_trait, calm = (words(prompts(spec, kind, held_out=held_out)) for kind in ("positive", "neutral"))
            assert 0.7 < calm / of_trait < 1.4, path


def test_every_shipped_trait_has_a_confirmed_vector_and_one_to_watch_with() -> None:
    from steerkit._support.shipped import traits, vector_path
    from steerkit.persona.traits import TraitSpec

    for name, path in traits().items():
        spec = TraitSpec.load(path)
        steering, watching = (
            steerkit.SteeringVector.load(vector_path(f"{name}-{kind}")) for kind in ("persona", "monitor")
        )
        assert steering.extra["persona"]["spec"] == spec.digest
        assert steering.suggested_strength is not None
        assert steering.held_out["calibration"]["curve"]
        assert watching.extra["watchpoint"]["trait"] == spec.trait
        assert all(watching.extra["watchpoint"][kind]["low"] > 0.5 for kind in ("neutral", "negative"))
