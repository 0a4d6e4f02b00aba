"""The refusal direction: its selection against slow forms of the scores, and the other sources of a direction."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steerkit
from steerkit.errors import DataError, FitError, ModelError, StrengthError
from steerkit.fitting.subject import ModelSubject
from steerkit.methods import _refusal
from steerkit.methods._declining import is_refusal
from steerkit.methods._refusal import first_log_probs, log_odds, response_contrast, unembedding_direction
from steerkit.methods._selection import Candidate, Selection, _pareto
from steerkit.methods.refusal import RefusalDirection
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.network.writers import every_write
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import Rendered, render
from steerkit.vector.steering_vector import SteeringVector
from tests.families import BLOCKS, build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

HARMFUL = ("rob the bank", "burn it all", "poison the tea", "forge my papers", "hit him", "steal a car", "lie", "spy")
HARMLESS = ("bake the bread", "sing to us", "pour the tea", "sort my papers", "hug him", "wash a car", "nap", "run")
OPENINGS = ("t", "he", "in")
REQUESTS = Path(__file__).resolve().parents[2] / "recipes" / "prompts" / "requests.jsonl"
OPEN = {"openings": OPENINGS, "as_labelled": True, "min_induce": -1e6, "max_kl": 1e6}


def data() -> ContrastSet:
    return ContrastSet.from_prompts(HARMFUL, HARMLESS, paired=False)


def subject_of(model: nn.Module, contrast: ContrastSet | None = None) -> ModelSubject:
    return ModelSubject(model, byte_tokenizer(CHATML), contrast or data(), find_decoder(model), 4, None)


def rendered(prompts: Sequence[Conversation]) -> list[Rendered]:
    return [render(byte_tokenizer(CHATML), replace(prompt, answer=None)) for prompt in prompts]


def fit(
    model: nn.Module, contrast: ContrastSet | None = None, *, layers: Any = None, **settings: Any
) -> SteeringVector:
    method = RefusalDirection(**settings)
    return steerkit.fit(model, byte_tokenizer(CHATML), contrast or data(), method=method, layers=layers)


@functools.cache
def failed() -> tuple[Any, tuple[Candidate, ...], str]:
    """A model on which every candidate fails, and the error."""
    model = build("llama")
    with pytest.raises(FitError) as caught:
        fit(model, source="instructions", layers=range(BLOCKS), **{**OPEN, "max_kl": -1.0})
    return model, caught.value.candidates, str(caught.value)


def scored() -> list[Candidate]:
    """Of them those that were tried."""
    return [one for one in failed()[1] if not {"depth", "zero"} & set(one.reasons)]


# the slow forms: hooks by hand, one row at a time, probabilities instead of their logarithms


@contextlib.contextmanager
def by_hand(model: Any, layer: int | None, direction: Tensor) -> Iterator[None]:
    """Add a direction to what one block reads, or, without a layer, take it out of every write."""
    u = direction.double() / direction.double().norm()

    def added(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] + direction.float(), *args[1:])

    def without(h: Tensor) -> Tensor:
        return (h.double() - (h.double() @ u)[..., None] * u).float()

    def removed_before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (without(args[0]), *args[1:])

    def removed_after(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (without(output[0]), *output[1:]) if isinstance(output, tuple) else without(output)

    blocks = model.model.layers
    if layer is not None:
        handles = [blocks[layer].register_forward_pre_hook(added)]
    else:
        handles = [block.register_forward_pre_hook(removed_before) for block in blocks]
        handles += [half.register_forward_hook(removed_after) for b in blocks for half in (b.self_attn, b.mlp)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def chances(model: Any, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return torch.softmax(model(input_ids=torch.tensor([list(ids)])).logits[0, -1].double(), dim=-1)


def slow_odds(model: Any, ids: Sequence[int], beginnings: Sequence[Sequence[int]]) -> float:
    total = 0.0
    for beginning in beginnings:
        chance = 1.0
        for place, token in enumerate(beginning):
            chance *= float(chances(model, [*ids, *beginning[:place]])[token])
        total += chance
    return math.log(total) - math.log(1.0 - total)


def slow_direction(model: Any, layer: int, position: int, contrast: ContrastSet) -> Tensor:
    means = []
    for side in (contrast.positive, contrast.negative):
        rows = []
        for item in rendered(side):
            with torch.no_grad():
                states = model(input_ids=torch.tensor([item.ids]), output_hidden_states=True).hidden_states
            rows.append(states[layer][0, position].double())
        means.append(torch.stack(rows).mean(dim=0))
    return means[0] - means[1]


def test_every_score_is_that_of_the_slow_form() -> None:
    model = failed()[0]
    train, held_out = data().split(held_out=0.25)
    beginnings = [byte_tokenizer(CHATML)(text, add_special_tokens=False)["input_ids"] for text in OPENINGS]
    assert max(map(len, beginnings)) == 2, "beginnings of several tokens are meant to be among them"
    harmful, harmless = rendered(held_out.positive), rendered(held_out.negative)
    for one in (*scored()[:3], *scored()[-2:]):
        direction = slow_direction(model, one.site.layer, one.position, train)
        with by_hand(model, one.site.layer, direction):
            induce = [slow_odds(model, item.ids, beginnings) for item in harmless]
        base = [chances(model, item.ids) for item in harmless]
        with by_hand(model, None, direction):
            bypass = [slow_odds(model, item.ids, beginnings) for item in harmful]
            ablated = [chances(model, item.ids) for item in harmless]
        kl = [float((p * (p.log() - q.log())).sum()) for p, q in zip(base, ablated, strict=True)]
        assert one.induce == pytest.approx(sum(induce) / len(induce), abs=1e-4)
        assert one.bypass == pytest.approx(sum(bypass) / len(bypass), abs=1e-4)
        assert one.kl == pytest.approx(sum(kl) / len(kl), abs=1e-4)


def test_candidates_are_all_positions_behind_the_instruction_at_blocks_that_are_not_too_deep() -> None:
    _, candidates, _ = failed()
    behind = byte_tokenizer(CHATML)("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    tried = [(one.site, one.position) for one in candidates if "depth" not in one.reasons]
    assert tried == [(Site(layer, "resid_pre"), place) for layer in range(3) for place in range(-len(behind), 0)]
    deep = [(str(one.site), one.position) for one in candidates if "depth" in one.reasons]
    assert deep == [("resid_pre.3", place) for place in range(-len(behind), 0)]


def test_where_all_fail_the_error_says_why_in_one_line_and_keeps_the_table() -> None:
    _, candidates, message = failed()
    deep, zero = (sum(name in one.reasons for one in candidates) for name in ("depth", "zero"))
    why = f"{len(scored())} fail kl <= -1, {deep} fail depth < 0.8, {zero} fail length > 0"
    assert f"none of {len(candidates)} candidates passes ({why})" in message
    assert zero == deep == len(candidates) // BLOCKS, "what block 0 reads of the template is the same for all prompts"
    assert "fails kl" in message
    assert "max_kl" in message
    assert "\n" not in message
    assert all(one.reasons for one in candidates)
    assert message.count("bypass") <= 4, "the best few only"


def test_what_fails_by_induce_is_not_ablated_but_the_best_of_them_for_the_error() -> None:
    model = build("llama")
    with pytest.raises(FitError, match="fail induce >= 1e") as caught:
        fit(model, source="instructions", **{**OPEN, "min_induce": 1e6})
    candidates: Any = caught.value.candidates
    ablated = [one for one in candidates if not math.isnan(one.bypass)]
    assert 1 <= len(ablated) <= 4
    known = [one.induce for one in candidates if not math.isnan(one.induce)]
    assert max(known) == max(one.induce for one in ablated)
    assert "induce" in str(caught.value)


def test_the_survivor_with_the_lowest_bypass_is_selected() -> None:
    model = build("llama")
    limits = sorted(one.induce for one in scored())
    vector = fit(model, source="instructions", **{**OPEN, "min_induce": limits[len(limits) // 2]})
    expected = min((one for one in failed()[1] if one.induce >= limits[len(limits) // 2]), key=lambda one: one.bypass)
    assert vector.sites == (expected.site,)
    direction = slow_direction(model, expected.site.layer, expected.position, data().split(held_out=0.25)[0])
    torch.testing.assert_close(vector.params(expected.site)["direction"].double(), direction, rtol=1e-4, atol=1e-5)
    table = vector.tensors["shared/selection"]
    assert table.shape == (len(limits) - len(limits) // 2, 5)
    assert torch.isclose(table[:, 2].min(), torch.tensor(expected.bypass))
    assert (vector.edit, vector.scope) == ("add", "response")
    assert SteeringVector.from_bytes(vector.to_bytes()) == vector


def test_ablating_is_what_the_method_ablation_does_at_every_write() -> None:
    model = build("llama")
    vector = fit(model, source="instructions", apply="ablate", **OPEN)
    assert vector.sites == tuple(every_write(find_decoder(model)))
    other = replace(
        vector,
        method="ablation",
        settings={"writes": "every", "untie": False},
        tensors={"shared/direction": vector.tensors["shared/direction"]},
    )
    ids = torch.tensor([[5, 17, 44, 9]])
    found = []
    for one in (vector, other):
        with steerkit.steer(model, one), torch.no_grad():
            found.append(model(input_ids=ids).logits)
    assert torch.equal(*found)
    with pytest.raises(StrengthError, match="'ablation'"):
        RefusalDirection(apply="ablate").weight_updates(model, vector, 1.0)


def test_a_model_that_refuses_nothing_is_told_so() -> None:
    with pytest.raises(FitError, match=r"refuses 0 of 6 harmful prompts; name how refusals begin with `openings`"):
        fit(build("llama"), source="instructions")


def test_prompts_that_the_model_does_not_treat_as_labelled_are_left_out_and_none_left_is_an_error() -> None:
    with pytest.raises(FitError, match=r"refuses none of 6 harmful prompts \(highest refusal score -"):
        fit(build("llama"), source="instructions", **{**OPEN, "as_labelled": False})


class Refusing(ModelSubject):
    """A subject whose model says that it refuses some prompts."""

    said: tuple[str, ...] = ()

    def answers(self, items: Sequence[Any], *, max_new_tokens: int) -> list[str]:
        return ["I\u2019m sorry, no." if place in (0, 2, 3) else "Fine." for place in range(len(items))]


def test_refusals_are_known_by_the_first_tokens_of_the_model_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, train = build("llama"), data().split(held_out=0.25)[0]
    first = [int(chances(model, item.ids).argmax()) for item in rendered(train.positive)]
    others = [int(chances(model, item.ids).argmax()) for item in rendered(train.negative)]
    refused = [first[place] for place in (0, 2, 3)]
    expected = sorted({t for t in refused if refused.count(t) / 3 > others.count(t) / len(others)})
    subject = Refusing(model, byte_tokenizer(CHATML), data(), find_decoder(model), 4, None)
    method = RefusalDirection(source="instructions", as_labelled=True)
    selection = Selection(method, subject, method.sites(subject.decoder))
    assert expected
    assert selection._beginnings == [(token,) for token in expected]


def test_both_sides_asking_the_same_is_refused() -> None:
    triples = [(prompt, "no", "yes") for prompt in HARMFUL]
    with pytest.raises(FitError, match="both sides ask the same"):
        fit(build("llama"), ContrastSet.from_answers(triples), source="instructions", **OPEN)
    assert fit(build("llama"), ContrastSet.from_answers(triples)).sites == (Site(1),)


def test_plain_text_has_the_last_position_only() -> None:
    raw = ContrastSet.from_prompts(HARMFUL, HARMLESS, raw=True, paired=False)
    with pytest.raises(FitError) as caught:
        fit(build("llama"), raw, source="instructions", **{**OPEN, "max_kl": -1.0})
    assert {one.position for one in caught.value.candidates} == {-1}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "layers", "message"),
    [
        ({"validation": 0}, None, "validation = 0"),
        ({"source": "instructions", **OPEN, "max_depth": 0.2}, None, r"too deep \(max_depth 0.2\)"),
        ({"apply": "ablate"}, [1, 2], "one direction is ablated, got 2 sites"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], layers: Any, message: str) -> None:
    with pytest.raises(FitError, match=message):
        fit(build("llama"), layers=layers, **settings)


def test_too_few_prompts_to_keep_some_apart_are_refused() -> None:
    with pytest.raises(DataError, match="leave a part empty"):
        fit(build("llama"), ContrastSet.from_prompts(["a"], ["b"]), source="instructions", **OPEN)


@pytest.mark.embedded
@pytest.mark.slow
def test_the_selector_runs_on_the_embedded_model_and_says_why_it_picks_nothing(embedded: tuple[Any, Any]) -> None:
    """The model refuses next to nothing: no difference of prompts makes it refuse."""
    model, tokenizer = embedded
    requests = ContrastSet.from_labelled(REQUESTS, positive="harmful")
    few = requests.split(held_out_sources=[one for one in sorted(set(requests.origins[0])) if one != "theft"])[0]
    method = RefusalDirection(source="instructions", openings=("I'm sorry", "I can"), validation=4)
    with pytest.raises(FitError, match="refuses none of 30 harmful prompts"):
        steerkit.fit(model, tokenizer, few, method=method, layers=[13])
    method = replace(method, as_labelled=True)
    with pytest.raises(FitError, match=r"none of 6 candidates passes \(6 fail induce >= 0") as caught:
        steerkit.fit(model, tokenizer, few, method=method, layers=[13])
    assert len(caught.value.candidates) == 6  # type: ignore[attr-defined]
    vector = steerkit.fit(model, tokenizer, few, method=replace(method, min_induce=-20.0, max_kl=20.0), layers=[13])
    assert [str(site) for site in vector.sites] == ["resid_pre.13"]


@pytest.mark.embedded
@pytest.mark.slow
def test_refusing_openings_make_the_embedded_model_refuse(embedded: tuple[Any, Any]) -> None:
    model, tokenizer = embedded
    requests = ContrastSet.from_labelled(REQUESTS, positive="harmful")
    train, held_out = requests.split(held_out_sources=("weapons", "privacy"))
    vector = steerkit.fit(model, tokenizer, train, method="refusal", layers=[11, 12])
    asked = held_out.positive[::5]
    baseline = steerkit.generate(model, tokenizer, asked, max_new_tokens=20, batch_size=16)
    steered = steerkit.generate(model, tokenizer, asked, vector=vector, strength=0.8, max_new_tokens=20, batch_size=16)
    # Of 16; the others apologise without declining, or speak of something else.
    assert sum(map(is_refusal, baseline)) <= 2
    assert sum(map(is_refusal, steered)) >= 7


# the pieces


def test_beginnings_that_go_on_from_another_add_nothing() -> None:
    model = build("gpt2")
    subject = subject_of(model)
    items = subject.rendered(data().positive[:3])
    beginnings = [(5,), (7, 9), (7, 9, 2), (5, 3), (7, 11, 4)]
    logits = subject.logits(items)
    found = first_log_probs(subject, items, logits, beginnings)
    for item, value in zip(items, log_odds(found).tolist(), strict=True):
        assert value == pytest.approx(slow_odds(model, item.ids, [(5,), (7, 9), (7, 11, 4)]), abs=1e-4)


def test_log_odds_are_exact_at_both_ends() -> None:
    found = log_odds(torch.tensor([-50.0, math.log(0.5), -1e-12, 0.0, 1e-9], dtype=torch.float64))
    assert found[0] == pytest.approx(-50.0)
    assert found[1] == pytest.approx(0.0, abs=1e-12)
    assert found[2] == pytest.approx(-math.log(1e-12), rel=1e-4)
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_response_contrast_is_the_slow_form(family: str) -> None:
    model, tokenizer, site = build(family), byte_tokenizer(CHATML), Site(2)
    prompts = [Conversation(text, answer="gone") for text in HARMFUL[:2]]
    (found,) = response_contrast(subject_of(model), prompts, [site]).values()
    sides = []
    for openings in (_refusal.REFUSING, _refusal.COMPLYING):
        rows = []
        for number in range(len(openings)):  # fewer prompts than openings: each opening once
            text = render(tokenizer, Conversation(HARMFUL[number % 2], answer=openings[number]))
            with torch.no_grad():
                states = model(input_ids=torch.tensor([text.ids]), output_hidden_states=True).hidden_states
            rows.append(states[3][0, text.prompt_length :].double().mean(dim=0))
        sides.append(torch.stack(rows).mean(dim=0))
    torch.testing.assert_close(found.double(), sides[0] - sides[1], rtol=1e-4, atol=1e-5)


def test_response_contrast_gives_many_prompts_one_opening_of_each_side(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, seen = subject_of(build("llama")), []
    real = subject.record

    def record(items: Sequence[Conversation], *args: Any, **kwargs: Any) -> Any:
        seen.extend(items)
        return real(items, *args, **kwargs)

    monkeypatch.setattr(subject, "record", record)
    prompts = [Conversation(text) for text in (*HARMFUL, *HARMLESS)]
    response_contrast(subject, prompts, [Site(1)])
    assert [item.prompt for item in seen[::2]] == [prompt.prompt for prompt in prompts]
    assert {item.answer for item in seen[::2]} == set(_refusal.REFUSING)
    assert {item.answer for item in seen[1::2]} == set(_refusal.COMPLYING)
    seen.clear()
    response_contrast(subject, [Conversation(f"Number {n}") for n in range(170)], [Site(1)])
    assert [item.prompt for item in seen[::2]] == [f"Number {n * 170 // 80}" for n in range(80)], "from all of them"
    with pytest.raises(FitError, match="no prompt"):
        response_contrast(subject, [], [Site(1)])


def test_unembedding_direction_drops_what_both_sides_say() -> None:
    model, tokenizer = build("gpt2"), byte_tokenizer(CHATML)
    listed = _refusal.REFUSAL_WORDS, _refusal.COMPLIANCE_WORDS
    sides = [{t for text in texts for t in tokenizer(text, add_special_tokens=False)["input_ids"]} for texts in listed]
    assert sides[0] & sides[1]
    rows: Any = model.get_output_embeddings().weight.detach()
    means = [torch.stack([rows[t] for t in one - other]).mean(0) for one, other in (sides, sides[::-1])]
    torch.testing.assert_close(unembedding_direction(subject_of(model)), means[0] - means[1])
    vector = fit(model, source="unembedding")
    assert vector.sites == tuple(Site(layer) for layer in range(BLOCKS))
    assert set(vector.norms) == set(vector.sites), "so that a strength can be counted in norms"
    steerkit.steer(model, vector, 0.1, unit="norm")


def test_words_of_the_same_tokens_and_models_without_a_head_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of(build("llama"))
    monkeypatch.setattr(subject, "token_ids", lambda text: (3, 4))
    with pytest.raises(FitError, match="the same tokens"):
        unembedding_direction(subject)
    headless = build("llama")
    monkeypatch.setattr(headless, "get_output_embeddings", lambda: None)
    with pytest.raises(ModelError, match="no output embedding"):
        subject_of(headless).unembedding()


def test_equal_embeddings_give_no_direction() -> None:
    model = build("llama")
    torch.nn.init.ones_(model.get_output_embeddings().weight)  # type: ignore[union-attr, arg-type]
    with pytest.raises(FitError, match="same mean"):
        unembedding_direction(subject_of(model))


def test_no_opening_or_word_of_the_direction_judges_it() -> None:
    from steerkit.evaluate.scorers import refusal as scorer

    assert len(_refusal.REFUSING) == len(_refusal.COMPLYING)
    assert not {*scorer.REFUSING, *scorer.COMPLYING} & {*_refusal.REFUSING, *_refusal.COMPLYING}
    counts = [sum(len(text.split()) for text in side) for side in (_refusal.REFUSING, _refusal.COMPLYING)]
    assert abs(counts[0] - counts[1]) <= 0.1 * counts[1]


def test_the_candidates_that_nothing_beats() -> None:
    site = Site(1, "resid_pre")
    first = Candidate(site, -1, 1.0, -3.0, 0.2, ("kl",))
    second = Candidate(site, -2, 0.5, -2.0, 0.3, ("kl",))  # worse in all
    third = Candidate(site, -3, -1.0, -4.0, 0.3, ("induce", "kl"))
    assert _pareto([third, second, first]) == [first, third]
    assert str(first) == "resid_pre.1 at -1 (bypass -3.00, induce 1.00, kl 0.200; fails kl)"
