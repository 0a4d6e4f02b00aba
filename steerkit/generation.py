"""Prompts to texts: chat template, left padding, seeds, and steering where a vector is given.

One seed for all prompts draws each token for the whole batch at once, so a text depends on what is answered beside it.
One seed per prompt draws for each row alone. The most likely token is taken after noise was added to the logits (Gumbel
noise: that draws a token exactly with its probability), which moves little where rounding moves the logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from steerkit.errors import DataError, StrengthError
from steerkit.network.chosen_tokens import ChosenTokens
from steerkit.network.context import check_lengths, named
from steerkit.network.decoder import execution_device, find_decoder, inner_model
from steerkit.prompts.batching import Batch, batches, pad_token_id, run_batches
from steerkit.prompts.beginnings import beginnings
from steerkit.prompts.chat_roles import Roles
from steerkit.prompts.conversation import Conversation, Message
from steerkit.prompts.marks import CHANNEL, FRAME, THINKING
from steerkit.prompts.rendering import Rendered, render
from steerkit.steering.kept_prompts import KeptPrompts, Split
from steerkit.steering.steering import steer
from steerkit.steering.strengths import Strength, Vectors, strength_value, vectors_of
from steerkit.tokens.scope import Scope
from steerkit.tokens.transformers_facts import cache_argument
from steerkit.vector.fitted_rendering import as_fitted
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["AnswerText", "Told", "exponential_noise", "generate", "told"]


class Told(NamedTuple):
    """One answer of a model.

    Attributes:
        text: without special tokens.
        ids: of its tokens, that which ends it included, what pads a batch too.
        log_probs: [t] float32 of each token, nats, on the CPU; None where they were not asked for or are not known.
    """

    text: str
    ids: list[int]
    log_probs: Tensor | None


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[Message] | Conversation],
    *,
    vector: Vectors | None = None,
    strength: Strength | None = None,
    scope: str | None = None,
    unit: Literal["paper", "norm"] | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    seed: int | Sequence[int] | None = None,
    raw: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    shares: bool = False,
    **options: Any,
) -> list[str]:
    """Answer prompts, steered where a vector is given. Greedy unless `do_sample=True`.

    Args:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer; never changed.
        prompts: strings (user turns where there is a chat template), chats, or conversations. A chat that ends with an
            assistant turn is continued.
        vector: one vector or several, a composition or its text, or one of these or None for each prompt; see `steer`.
        strength: one number, or one per prompt; None takes each file's suggested strength.
        scope: which tokens are written; None takes each vector's own.
        unit: `paper` or `norm`; None takes each vector's own.
        max_new_tokens: the longest answer, in tokens.
        batch_size: prompts per pass.
        seed: fixes sampling without touching the caller's random state. One number for all prompts, or one per prompt:
            then a text does not depend on batches, and `temperature` is the only further option of sampling.
        raw: leave strings as they are, without the chat template.
        chat_template_kwargs: passed on to the chat template.
        shares: read what prompts have in common once, and a prompt that stands there several times once, where steering
            leaves prompts alone and options mean one answer to each: the same up to rounding.
        options: handed on to `transformers`' own `generate` (`num_return_sequences`, `do_sample`, ...).

    Returns:
        The texts without their prompts, in the order given (`num_return_sequences` of each in a row).

    Raises:
        DataError: no prompts, one string instead of a list of them, seeds per prompt that do not fit, or a prompt that
            is with `max_new_tokens` longer than the model has positions for.
        StrengthError: one strength per prompt was given, but not as many as prompts.
        SteerError: a prompt cannot be rendered (see `steerkit.prompts.rendering.render`), or the model not steered (see
            `steer`).
    """
    found = told(
        model,
        tokenizer,
        prompts,
        listens=False,
        vector=vector,
        strength=strength,
        scope=scope,
        unit=unit,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        raw=raw,
        chat_template_kwargs=chat_template_kwargs,
        shares=shares,
        **options,
    )
    return [one.text for one in found]


def told(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[Message] | Conversation],
    *,
    listens: bool = True,
    vector: Vectors | None = None,
    strength: Strength | None = None,
    scope: str | None = None,
    unit: Literal["paper", "norm"] | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    seed: int | Sequence[int] | None = None,
    raw: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    shares: bool = False,
    **options: Any,
) -> list[Told]:
    """Answer prompts as `generate` does, and tell of each answer its ids and how likely they were.

    Args:
        model: see `generate`, as for all that follow.
        tokenizer: its tokenizer.
        prompts: what to answer.
        listens: whether log-probabilities are told, where there is one answer to each prompt.
        vector: what steers.
        strength: how strongly.
        scope: which tokens are written.
        unit: `paper` or `norm`.
        max_new_tokens: the longest answer.
        batch_size: prompts per pass.
        seed: fixes sampling.
        raw: leave strings as they are.
        chat_template_kwargs: passed on to the chat template.
        shares: read what prompts have in common once.
        options: handed on to `transformers`' own `generate`.

    Raises:
        DataError: see `generate`.
        StrengthError: see `generate`.
        SteerError: see `generate`.
    """
    if isinstance(prompts, str):
        raise DataError("generate: got one string; give a list of prompts")
    prompts = list(prompts)
    if not prompts:
        raise DataError("generate: got no prompts; give at least one")
    if max_new_tokens < 1:
        raise DataError(f"max_new_tokens is at least 1, got {max_new_tokens}")
    rows = _rows(strength, len(prompts))
    seeds = None if seed is None or isinstance(seed, int) else _seeds(seed, len(prompts), options)
    vectors = [] if vector is None else vectors_of(vector)
    for one in vectors:
        one.check_template(tokenizer)
        _rows(one.strength, len(prompts))
        if one.rows is not None and len(one.rows) != len(prompts):
            raise DataError(f"vector: got {len(one.rows)} compositions for {len(prompts)} prompts; give one per prompt")
    if scope is not None:
        Scope.parse(scope)
    roles = Roles(tokenizer)
    asked = [Conversation.of(prompt, raw=raw and isinstance(prompt, str)) for prompt in prompts]
    rendered = _rendered(model, tokenizer, asked, as_fitted(vectors, tokenizer, chat_template_kwargs), max_new_tokens)
    pad, device, text_of = pad_token_id(tokenizer), execution_device(find_decoder(model)), AnswerText(tokenizer)
    settings = _settings(pad, max_new_tokens, options, drawn_by_row=seeds is not None)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()), enabled=isinstance(seed, int)):
        if isinstance(seed, int):
            torch.manual_seed(seed)

        def run(batch: Batch) -> list[Told]:
            ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
            own = [rows[row] for row in batch.rows] if rows is not None else strength
            drawn = {} if seeds is None else _drawn([seeds[row] for row in batch.rows], options)
            steering = _steered(model, _of_batch(vectors, batch.rows), own, scope, unit, roles)
            with torch.no_grad():
                given = _read_once(model, batch, steering, device) if shares and options.keys() <= _ONE_ANSWER else {}
                listening = ChosenTokens(inner_model(model)) if listens else contextlib.nullcontext()
                with steering, listening as chosen:
                    out = model.generate(input_ids=ids, attention_mask=mask, **{**settings, **drawn, **given})  # type: ignore[operator]
                answers = getattr(out, "sequences", out)[:, ids.shape[1] :]
                logs = None if chosen is None else chosen.log_probs(answers)
            known = [None] * len(answers) if logs is None else logs.cpu()
            return [Told(text_of(row), row, one) for row, one in zip(answers.tolist(), known, strict=True)]

        return _in_order(run_batches(batches(rendered, batch_size, pad_id=pad, side="left"), run), len(prompts))


_ONE_ANSWER = frozenset({"do_sample", "min_new_tokens", "temperature", "top_k", "top_p"})


def _read_once(model: nn.Module, batch: Batch, steering: Any, device: torch.device) -> dict[str, Any]:
    """A cache of all prompts but for their last tokens, as an argument; nothing where it saves nothing."""
    split = Split.of(batch, device) if getattr(steering, "leaves_prompts", True) else None
    own = getattr(model, "generation_config", None)
    several = [getattr(own, name, None) not in (None, 1) for name in ("num_beams", "num_return_sequences")]
    if split is None or any(several) or not (split.repeated.any or any(beginnings(split.prompts))):
        return {}
    decoder, prompts = find_decoder(model), KeptPrompts()
    if not prompts.has(decoder, split):
        return {}
    name = cache_argument(decoder.model)
    return {name: prompts.inputs(decoder, split)[name]}


def _in_order(runs: Iterable[tuple[Batch, list[Told]]], prompts: int) -> list[Told]:
    """The answers of all batches, one or several to a prompt, in the order of the prompts."""
    found: list[list[Told]] = [[] for _ in range(prompts)]
    for batch, answers in runs:
        each = len(answers) // len(batch.rows)
        for place, row in enumerate(batch.rows):
            found[row] = answers[place * each : (place + 1) * each]
    return [one for answers in found for one in answers]


def _rendered(
    model: nn.Module, tokenizer: Any, asked: Sequence[Conversation], spoken: Any, max_new_tokens: int
) -> list[Rendered]:
    """The prompts as the model reads them, which have room for their answers."""
    rendered = [render(tokenizer, one, chat_template_kwargs=spoken) for one in asked]
    check_lengths(find_decoder(model), rendered, named("prompt", rendered), new_tokens=max_new_tokens)
    return rendered


def _settings(pad: int, max_new_tokens: int, options: Mapping[str, Any], *, drawn_by_row: bool) -> dict[str, Any]:
    """Settings of `transformers`' own `generate`: greedy unless the caller asks for more."""
    settings: dict[str, Any] = {"pad_token_id": pad, "max_new_tokens": max_new_tokens, **options}
    if "generation_config" not in settings:
        settings.setdefault("do_sample", False)
    if settings.get("do_sample") is False:
        # A checkpoint's sampling defaults would only draw warnings here.
        settings = {"temperature": None, "top_p": None, "top_k": None, **settings}
    if drawn_by_row:
        settings = {**settings, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return settings


class AnswerText:
    """Makes text of an answer's ids: without special tokens, but for the marks of thoughts, which part them.

    Args:
        tokenizer: the model's; never changed.
    """

    def __init__(self, tokenizer: Any) -> None:
        special = set(tokenizer.all_special_ids)
        vocabulary = tokenizer.get_vocab() if special else {}
        known = [mark for pair in THINKING for mark in pair] + ([*FRAME[:4]] if CHANNEL in vocabulary else [])
        marks = {vocabulary[mark] for mark in known if mark in vocabulary} & special
        self._tokenizer, self._dropped, self._has_marks = tokenizer, special - marks, bool(marks)

    def __call__(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        if not self._has_marks:
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))
        return str(self._tokenizer.decode([token for token in ids if token not in self._dropped]))


def _steered(
    model: nn.Module, vectors: Sequence[SteeringVector], strength: Any, scope: str | None, unit: Any, roles: Roles
) -> Any:
    if not vectors:
        return contextlib.nullcontext()
    return steer(model, vectors, strength, scope=scope, unit=unit, tokenizer=roles)


def _of_batch(vectors: Sequence[SteeringVector], rows: Sequence[int]) -> list[SteeringVector]:
    """The vectors with their own strengths per prompt, if they have such, in the order of a batch."""
    found = [
        one.at(strength=[one.strength[row] for row in rows]) if isinstance(one.strength, tuple) else one
        for one in vectors
    ]
    found = [one if one.rows is None else replace(one, rows=tuple(one.rows[row] for row in rows)) for one in found]
    return [one for one in found if one.rows is None or any(one.rows)]


def _rows(strength: Strength | None, prompts: int) -> list[float] | None:
    """One strength per prompt, where that is what was given."""
    listed = None if strength is None else strength_value(strength)
    if not isinstance(listed, tuple):
        return None
    if len(listed) != prompts:
        raise StrengthError(f"strength: got {len(listed)} numbers for {prompts} prompts; give one, or one per prompt")
    return list(listed)


_DRAWING = ("do_sample", "logits_processor", "temperature")


def _seeds(seeds: Sequence[int], prompts: int, options: Mapping[str, Any]) -> list[int]:
    """One seed per prompt, and options that go with that.

    Raises:
        DataError: another number of seeds, or an option that draws in another way.
    """
    if len(seeds) != prompts:
        raise DataError(f"seed: got {len(seeds)} numbers for {prompts} prompts; give one, or one per prompt")
    if not options.get("do_sample", True):
        raise DataError("one seed per prompt draws, and do_sample=False does not; leave one of them out")
    for name in options:
        if name not in _DRAWING and name.startswith(("top_", "min_p", "typical_p", "num_", "penalty_alpha")):
            raise DataError(f"one seed per prompt: {name} cannot be given beside it; temperature can")
    temperature = options.get("temperature", 1.0)
    if not isinstance(temperature, int | float) or not temperature > 0:
        raise DataError(f"temperature is a number above 0, got {temperature!r}")
    return [int(one) for one in seeds]


def _drawn(seeds: Sequence[int], options: Mapping[str, Any]) -> dict[str, Any]:
    """What makes `generate` draw each row from a seed of its own."""
    noise = _RowNoise(seeds, options.get("temperature", 1.0))
    return {"logits_processor": [*options.get("logits_processor", ()), noise]}


class _RowNoise:
    """A logits processor after which the most likely token of each row is one drawn from the row's own numbers.

    Args:
        seeds: one per row.
        temperature: that the logits are divided by.
    """

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.stack([exponential_noise(one, scores.shape[-1]) for one in self.generators]).to(scores.device)
        return scores.float() / self.temperature - noise


def exponential_noise(generator: torch.Generator, size: int) -> Tensor:
    """[size] float32, the logarithms of exponential draws: argmax(log p - log E) is a draw from p (Gumbel's trick).

    Args:
        generator: on the CPU; it goes on.
        size: tokens of the vocabulary.
    """
    # In float64: in float32 one draw in 16 million is 0, and there are that many in a few hundred tokens.
    return torch.empty(size, dtype=torch.float64).exponential_(generator=generator).log().float()
