"""Projection difference: how far a data set would move a model along a vector, before anything is trained.

    difference(x, y) = (a(x, y) - a(x, y')) . u          a: mean over answer tokens, y' the model's own answer to x

Chen, Arditi, Sleight, Evans, Lindsey (2025), "Persona Vectors: Monitoring and Controlling Character Traits in Language
Models", arXiv 2507.21509: its mean predicts the tuning shift, and it ranks the samples. Where this file departs: the
mean comes with an interval, counted in standard deviations of neutral texts unless asked otherwise. The cheap form puts
the prompt's last token in the place of a(x, y'), as the paper suggests, so that nothing has to be generated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from steerkit.errors import DataError
from steerkit.evaluate.intervals import Estimate, interval
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.store import Store
from steerkit.evaluate.store_identity import digest_of, setup_identity
from steerkit.generation import generate
from steerkit.monitor.items import Item, Kind, conversation_of
from steerkit.monitor.monitor import Monitor
from steerkit.network.context import check_lengths, name_of
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.prompts.batching import batches, pad_token_id
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.marks import spoken
from steerkit.prompts.rendering import Rendered, opens_thought, render
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Difference", "own_answers", "projection_difference"]


@dataclass(frozen=True, eq=False)
class Difference:
    """How far the answers of a data set lie along a vector from the model's own.

    Attributes:
        given: [n] one number per sample: its answer. nan where it has none.
        own: [n] the model's own answer, or the prompt's last token in the cheap form; nan where that is empty.
        answers: the model's own answers; None in the cheap form.
    """

    given: Tensor
    own: Tensor
    answers: tuple[str, ...] | None

    @property
    def values(self) -> Tensor:
        """[n] given minus own."""
        return self.given - self.own

    @property
    def estimate(self) -> Estimate:
        """The mean over samples with its 95 % interval."""
        return interval(self.values, shares=False)


def projection_difference(
    model: nn.Module,
    tokenizer: Any,
    data: Sequence[Item],
    vector: SteeringVector,
    *,
    own: Sequence[str] | None = None,
    cheap: bool = False,
    kind: Kind = "proj",
    calibrated: bool = True,
    sites: Sequence[Site | str] | None = None,
    max_new_tokens: int = 64,
    store: str | Path | None = None,
    batch_size: int = 16,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Difference:
    """Measure how far the answers of a training set lie along a vector from the model's own answers.

    Thoughts are left out of both (`steerkit.prompts.marks.spoken`); an answer that is nothing else has no number.

    Args:
        model: the model that is to be finetuned.
        tokenizer: its tokenizer.
        data: samples with answers: ``{"prompt", "response"}``, ``{"messages"}`` or chats.
        vector: the vector.
        own: the model's own answers, one per sample; None takes those of `store`, and generates what is missing.
        cheap: read the prompt's last token in the place of the own answer; nothing is generated.
        kind: `proj` or `cos`.
        calibrated: count in standard deviations of neutral answers; else raw.
        sites: some of the vector's sites.
        max_new_tokens: length of the own answers, in tokens; greedy.
        store: a JSONL file that keeps own answers as they are generated, so that a killed run goes on.
        batch_size: rows per pass.
        chat_template_kwargs: passed on to the chat template.

    Returns:
        One number per sample; `estimate` is their mean with its interval.

    Raises:
        DataError: no sample has an answer beside its thoughts, or `own` has another length, or stands beside `cheap`.
        VectorMismatchError: the vector was fitted on a model of another width or depth.
    """
    items = [conversation_of(item) for item in data]
    if own is not None and (cheap or len(own) != len(items)):
        beside = "beside cheap=True" if cheap else f"for {len(items)} samples"
        raise DataError(f"projection difference: got {len(own)} own answers {beside}; give one per sample, or none")
    items = [replace(item, answer=spoken(item.answer or "") or None) for item in items]
    if not any(item.answer for item in items):
        raise DataError("projection difference: no sample has an answer; give {'prompt', 'response'} or {'messages'}")
    monitor = Monitor(
        model,
        tokenizer,
        vector,
        read="response_mean",
        kind=kind,
        calibrated=calibrated,
        sites=sites,
        batch_size=batch_size,
        chat_template_kwargs=chat_template_kwargs,
    )
    given = monitor.score(items)
    if cheap:
        values = monitor.project(monitor.rendered(items, read="prompt_last"), "prompt_last")
        return Difference(given, monitor.scaled(values, differences=False), None)
    prompts = [replace(item, answer=None) for item in items]
    if own is None:
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        own = own_answers(model, tokenizer, prompts, store=store, chat_template_kwargs=chat_template_kwargs, **options)
    answered = [replace(prompt, answer=spoken(text) or None) for prompt, text in zip(prompts, own, strict=True)]
    return Difference(given, monitor.score(answered), tuple(own))


def own_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Conversation],
    *,
    max_new_tokens: int = 64,
    store: str | Path | None = None,
    batch_size: int = 16,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[str]:
    """The model's own answers, greedy and without thoughts; those in the store are taken from it.

    Args:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer.
        prompts: what is answered.
        max_new_tokens: the longest answer, in tokens.
        store: a JSONL file that grows batch by batch; None keeps nothing. An answer is found again only if weights,
            precision, template, library versions, prompt and length are as they were.
        batch_size: prompts per pass.
        chat_template_kwargs: passed on to the chat template.

    Returns:
        One text per prompt.
    """
    kept = Store(None if store is None else Path(store))
    identity = setup_identity(
        Setup(model, tokenizer, max_new_tokens=max_new_tokens, chat_template_kwargs=chat_template_kwargs)
    )
    keys = [digest_of([identity, astuple(prompt)]) for prompt in prompts]
    missing = [row for row, key in enumerate(keys) if kept.get(key) is None]
    texts: list[Rendered] = [
        render(tokenizer, prompts[row], chat_template_kwargs=chat_template_kwargs) for row in missing
    ]
    check_lengths(
        find_decoder(model),
        texts,
        lambda place: name_of("prompt", missing[place], len(prompts), texts[place]),
        new_tokens=max_new_tokens,
    )
    in_thought = opens_thought(tokenizer, chat_template_kwargs)
    # In the order of their lengths, a batch at a time, so that what has been answered is kept.
    for batch in batches(texts, batch_size, pad_id=pad_token_id(tokenizer)) if missing else ():
        rows = [missing[place] for place in batch.rows]
        answers = generate(
            model,
            tokenizer,
            [prompts[row] for row in rows],
            max_new_tokens=max_new_tokens,
            batch_size=len(rows),
            chat_template_kwargs=chat_template_kwargs,
        )
        for row, answer in zip(rows, answers, strict=True):
            kept.put(keys[row], {"answer": spoken(answer, in_thought=in_thought)})
    return [str((kept.get(key) or {})["answer"]) for key in keys]
