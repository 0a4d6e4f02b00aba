"""A setup: one model with the items that vectors are tried on.

`Setup.trial` puts a vector on it, `Setup.baseline` none; what the unsteered model says is kept, because every strength
is compared with it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from steerkit.errors import DataError, StrengthError
from steerkit.evaluate.trial import Trial
from steerkit.network.context import check_lengths, named
from steerkit.network.decoder import Decoder, find_decoder
from steerkit.prompts.chat_roles import Roles
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import SIDES, Conversation
from steerkit.prompts.neutral import neutral_texts
from steerkit.prompts.rendering import ANSWER_SEPARATOR, Rendered, answer_separator, render
from steerkit.prompts.splitting import half_of
from steerkit.prompts.system_prompts import instructed, takes_system
from steerkit.steering.kept_blocks import KeptBlocks
from steerkit.steering.kept_prompts import KeptPrompts
from steerkit.steering.strengths import vectors_of
from steerkit.vector.fitted_rendering import as_fitted
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Setup", "free_unused", "shared_system"]

KEPT_BYTES = 2**28


@dataclass(frozen=True, eq=False)
class Setup:
    """What a vector is tried on.

    Attributes:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer.
        data: held-out items; scorers of answers need pairs with both of them.
        prompts: what texts are generated from; None takes the prompts of `data`.
        neutral: answered prompts that steering should leave alone; None takes the shipped ones.
        batch_size: texts per pass; where trials share passes, a pass has a row for each of up to four of them.
        texts: at most so many prompts are answered.
        max_new_tokens: length of the generated texts, in tokens.
        chat_template_kwargs: passed on to the chat template.
        system: a system prompt before every prompt and text; all that is measured is still compared with the unsteered
            model without it. Where the model has no system turn it is plain text in front.
    """

    model: nn.Module
    tokenizer: Any
    data: ContrastSet | None = None
    prompts: Sequence[Conversation] | None = None
    neutral: Sequence[Conversation] | None = None
    batch_size: int = 16
    texts: int = 16
    max_new_tokens: int = 40
    chat_template_kwargs: Mapping[str, Any] | None = None
    system: str | None = None
    scored: dict[Any, Any] = field(init=False, default_factory=dict, repr=False)
    """Scores of the baseline model, by scorer: they do not change with the strength."""
    predicted: dict[Any, Tensor] = field(init=False, default_factory=dict, repr=False)
    """What the baseline model predicts for the answers of texts, as long as all of them fit into `KEPT_BYTES`."""
    kept: KeptBlocks = field(init=False, default_factory=KeptBlocks, repr=False)
    """What leaves the blocks that no strength changes."""
    read: KeptPrompts = field(init=False, default_factory=KeptPrompts, repr=False)
    """What prompts leave in a cache where no strength changes it."""
    remembered: dict[Any, dict[Any, Any]] | None = field(init=False, default=None, repr=False)
    """What trials found out, by vector and strength, where a part of the items is tried before all of them."""
    _otherwise: dict[str, Setup] = field(init=False, default_factory=dict, repr=False)
    """The same setup with other separators between prompts and answers, for vectors that were fitted so."""

    def trial(
        self,
        vector: SteeringVector | Sequence[SteeringVector] | None,
        strength: float | None = None,
        *,
        scope: str | None = None,
        unit: Literal["paper", "norm"] | None = None,
    ) -> Trial:
        """The setup under a vector.

        Args:
            vector: what to steer with; None is the baseline model.
            strength: one number; None takes each vector's own, else its suggested one.
            scope: which tokens are written; None takes the vector's own.
            unit: what the strength counts in; None takes the vector's own.

        Raises:
            StrengthError: a strength beside vectors that carry their own, which would win.
        """
        if strength is not None and vector is not None:
            for one in vectors_of(vector):
                if one.strength is not None:
                    raise StrengthError(
                        f"strength {strength:g} beside a vector that carries its own ({one.strength}); give one of both"
                    )
        trial = Trial(self._as_fitted(vector), vector, strength, scope, unit)
        if self.remembered is None or not isinstance(vector, SteeringVector):
            return trial
        # The vector is kept with its figures, so that no other one can get its id.
        own = self.remembered.setdefault((id(vector), strength, scope, unit), {"vector": vector})
        vars(trial)["known"] = own
        return trial

    def trials(
        self,
        asked: Iterable[tuple[SteeringVector | Sequence[SteeringVector] | None, float | None]],
        *,
        scope: str | None = None,
        unit: Literal["paper", "norm"] | None = None,
    ) -> list[Trial]:
        """The setup under several vectors or strengths, all of which will be measured: they share passes.

        Args:
            asked: vectors with their strengths; no vector is the baseline model.
            scope: see `trial`.
            unit: see `trial`.

        Raises:
            StrengthError: see `trial`.
        """
        found = [self.trial(vector, strength, scope=scope, unit=unit) for vector, strength in asked]
        for one in found:
            one.abreast.extend(found)
        return found

    def _as_fitted(self, vector: SteeringVector | Sequence[SteeringVector] | None) -> Setup:
        """The setup with prompts and answers joined as when a vector was fitted; itself where they are already."""
        vectors = [] if vector is None else vectors_of(vector)
        wanted = answer_separator(self.tokenizer, as_fitted(vectors, self.tokenizer, self.chat_template_kwargs))
        if wanted is None or wanted == answer_separator(self.tokenizer, self.chat_template_kwargs):
            return self
        if wanted not in self._otherwise:
            options = {**(self.chat_template_kwargs or {}), ANSWER_SEPARATOR: wanted}
            joined = replace(self, chat_template_kwargs=options)
            self._otherwise[wanted] = joined if self.system is None else joined._before(self.plain._as_fitted(vector))
        return self._otherwise[wanted]

    def prompted(self, system: str) -> Setup:
        """The same with a system prompt, which is compared with this setup's unsteered model without one.

        Args:
            system: the system prompt.
        """
        return replace(self, system=system)._before(self.plain)

    def _before(self, plain: Setup) -> Setup:
        """Share what the unsteered model says without the system prompt, so that it is asked once."""
        vars(self)["plain"] = plain
        return self

    @cached_property
    def plain(self) -> Setup:
        """The same without its system prompt."""
        return self if self.system is None else replace(self, system=None)

    @cached_property
    def baseline(self) -> Trial:
        """The setup without steering and without its system prompt; its texts are generated once."""
        return Trial(self, None, None, None, None) if self.system is None else self.plain.baseline

    def side(self, name: Literal["positive", "negative"]) -> Setup:
        """The same, with texts generated from the prompts of one side of the data only.

        What is a success on one side is a failure on the other where a method decides by the prompt; measured apart,
        both have their own intervals.

        Args:
            name: which side.

        Raises:
            DataError: there is no data, or no side of that name.
        """
        if name not in ("positive", "negative"):
            raise DataError(f"side {name!r}: give 'positive' or 'negative'")
        if self.data is None:
            raise DataError("a side is one of the data's; give data")
        return replace(self, prompts=getattr(self.data, name))

    def half(self, number: int) -> Setup:
        """The same with every second neutral text and prompt, so that what is chosen on some is confirmed on others.

        Those that ask the same stay together.

        Args:
            number: 0 or 1.
        """
        prompts = None if self.prompts is None else half_of([Conversation.of(one) for one in self.prompts], number)
        return replace(self, neutral=half_of(self.calm, number), prompts=prompts)

    def first_neutral(self, count: int) -> Setup:
        """The same with the first neutral texts only.

        Args:
            count: how many at most.
        """
        return replace(self, neutral=self.calm[:count])

    @cached_property
    def decoder(self) -> Decoder:
        """The model's decoder."""
        return find_decoder(self.model)

    def first(self, items: int, neutral: int) -> Setup:
        """The same with the first items and neutral texts only; what is found out of them is known of all then.

        Args:
            items: of the data.
            neutral: texts.
        """
        if self.remembered is None:
            vars(self)["remembered"] = {}
        data = self.data
        if data is not None:
            data = data.items_at(*(range(min(items, len(side))) for side in data.sides))
        found = replace(self, data=data, neutral=self.calm[:neutral])
        for name in ("remembered", "kept", "read", "predicted"):
            vars(found)[name] = getattr(self, name)
        if self.system is None:
            vars(found)["baseline"] = baseline = replace(self.baseline, setup=found)
            vars(baseline)["known"] = self.baseline.known
        return found

    @cached_property
    def roles(self) -> Roles:
        """Finds the role (system, user, assistant) that each token belongs to, for scopes by role."""
        return Roles(self.tokenizer)

    @cached_property
    def asked(self) -> tuple[Conversation, ...]:
        """The prompts to generate from, without answers and without a system prompt that differs between sides.

        Raises:
            DataError: there are none.
        """
        if self.prompts is not None:
            listed = [replace(Conversation.of(prompt), answer=None) for prompt in self.prompts]
        elif self.data is not None:
            pairs = zip(self.data.positive, self.data.negative, strict=False)
            listed = [replace(side, answer=None, system=shared_system(side, other)) for side, other in pairs]
        else:
            listed = []
        if not listed:
            raise DataError("there is no prompt to generate from; give data or prompts")
        once: list[Conversation] = []
        for prompt in listed:  # a chat has no hash
            if len(once) < self.texts and prompt not in once:
                once.append(prompt)
        return tuple(once)

    @cached_property
    def pairs(self) -> tuple[tuple[Rendered, Rendered], ...]:
        """Both answers to each prompt of the data, rendered; a system prompt that differs between sides is left out.

        A system prompt that both sides share stays.

        Raises:
            DataError: there is no data, it is not paired, a pair lacks an answer or has two prompts, or an item is
                longer than the model has positions for.
        """
        if self.data is None:
            raise DataError("pairs of answers are needed; give data with both answers to each prompt")
        found = []
        for number, (positive, negative) in enumerate(zip(self.data.positive, self.data.negative, strict=False)):
            answered = positive.answer is not None and negative.answer is not None
            if not self.data.paired or not answered or positive.prompt != negative.prompt:
                raise DataError(f"item {number} has no two answers to one prompt; give both answers, or another scorer")
            system = shared_system(positive, negative)
            sides = (replace(side, system=system) for side in (positive, negative))
            first, second = (self.render(side) for side in sides)
            found.append((first, second))
        for name, texts in zip(SIDES, zip(*found, strict=True), strict=True):
            check_lengths(self.decoder, texts, named(f"{name} item", texts))
        return tuple(found)

    @cached_property
    def calm(self) -> tuple[Conversation, ...]:
        """The neutral texts."""
        return tuple(neutral_texts() if self.neutral is None else self.neutral)

    def keep(self, text: Rendered, logs: Tensor) -> Tensor:
        """Keep what the unsteered model predicts for a text, while there is room, because every strength needs it.

        Args:
            text: the text.
            logs: [t, v] log-probabilities, on their own.
        """
        used = sum(one.nbytes for one in self.predicted.values())
        if used + logs.nbytes <= KEPT_BYTES:
            self.predicted[text] = logs
        return logs

    def render(self, item: Conversation) -> Rendered:
        """A conversation as the model reads it, behind the system prompt.

        Args:
            item: the conversation.
        """
        return render(self.tokenizer, self.instructed(item), chat_template_kwargs=self.chat_template_kwargs)

    def instructed(self, item: Conversation) -> Conversation:
        """A conversation with the system prompt before it; as it is where there is none.

        Args:
            item: the conversation.
        """
        return item if self.system is None else instructed(item, self.system, has_turn=self._has_turn)

    @cached_property
    def _has_turn(self) -> bool:
        return takes_system(self.tokenizer)


def free_unused() -> None:
    """Free what setups have kept that nobody holds any more; to be called where many are made in turn.

    A setup holds itself through its baseline, so only Python's collector of circles frees it, and that one counts
    objects: it comes by seldom, however large a few of them are.
    """
    gc.collect()


def shared_system(side: Conversation, other: Conversation) -> str | None:
    """The system prompt that both sides share; None where they have none, or different ones.

    Args:
        side: one side of an item.
        other: the other.
    """
    return side.system if side.system == other.system else None
