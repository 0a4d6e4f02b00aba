"""A trial: one model on one set of items, steered by a vector at a strength, or the baseline. All that scorers may ask.

Every pass of a scorer goes through `Trial`, so that they all render alike and always say where the prompt ends.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from steerkit.activations.reading import position_inputs
from steerkit.activations.recording import Activations
from steerkit.errors import DataError, StrengthError
from steerkit.fitting.held_out import record_steered
from steerkit.generation import generate
from steerkit.network.block_trace import evaluation_mode
from steerkit.network.decoder import Decoder, execution_device, find_decoder
from steerkit.network.sites import Site
from steerkit.prompts.batching import batches, pad_token_id
from steerkit.prompts.chat_roles import Roles
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import Rendered, render
from steerkit.steering.steering import steer
from steerkit.steering.strengths import vectors_of
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Answer", "Setup", "Trial", "neutral_texts", "shared_system"]

KEPT_BYTES = 2**28


class Answer(NamedTuple):
    """What the model thinks of one answer that it is shown (teacher forcing).

    Attributes:
        row: which of the texts.
        targets: [t] ids of the answer's tokens.
        logits: [t, v] float32, row `i` predicts `targets[i]`.
        baseline: [t, v] float32, the same of the unsteered model; None unless asked for.
    """

    row: int
    targets: Tensor
    logits: Tensor
    baseline: Tensor | None


@dataclass(frozen=True, eq=False)
class Setup:
    """What a vector is tried on.

    Attributes:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer.
        data: held-out items; scorers of answers need pairs with both of them.
        prompts: what texts are generated from; None takes the prompts of `data`.
        neutral: answered prompts that steering should leave alone; None takes the shipped ones.
        batch_size: rows per pass.
        texts: at most so many prompts are answered.
        max_new_tokens: length of the generated texts, in tokens.
        chat_template_kwargs: passed on to the chat template.
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
    scored: dict[Any, Any] = field(init=False, default_factory=dict, repr=False)
    """Scores of the baseline model, by scorer: they do not change with the strength."""
    predicted: dict[Any, Tensor] = field(init=False, default_factory=dict, repr=False)
    """Logits of the baseline model for the answers of texts, as long as all of them fit into `KEPT_BYTES`."""

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
            strength: one number; None takes each vector's own, else its suggested one, else 1.
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
        return Trial(self, vector, strength, scope, unit)

    @cached_property
    def baseline(self) -> Trial:
        """The setup without steering; its texts are generated once."""
        return Trial(self, None, None, None, None)

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
        """The same with every second neutral text, so that costs are chosen on some and confirmed on others.

        Args:
            number: 0 or 1.
        """
        return replace(self, neutral=self.calm[number % 2 :: 2])

    def with_neutral(self, count: int) -> Setup:
        """The same with the first neutral texts only.

        Args:
            count: how many at most.
        """
        return replace(self, neutral=self.calm[:count])

    @cached_property
    def decoder(self) -> Decoder:
        """The model's decoder."""
        return find_decoder(self.model)

    @cached_property
    def roles(self) -> Roles:
        """Whose words a token is, for scopes by role."""
        return Roles(self.tokenizer)

    @cached_property
    def asked(self) -> tuple[Conversation, ...]:
        """The prompts that texts are generated from, without answers and without a contrast in the system prompt.

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
        """Of each item of the data both answers to its one prompt; a contrast in the system prompt is left out.

        A system prompt that both sides share stays.

        Raises:
            DataError: there is no data, it is not paired, or a pair lacks an answer or has two prompts.
        """
        if self.data is None:
            raise DataError("pairs of answers are needed; give data with both answers to each prompt")
        found = []
        for number, (positive, negative) in enumerate(zip(self.data.positive, self.data.negative, strict=False)):
            answered = positive.answer is not None and negative.answer is not None
            if not self.data.paired or not answered or positive.prompt != negative.prompt:
                raise DataError(f"item {number} has no two answers to one prompt; give both answers")
            system = shared_system(positive, negative)
            sides = (replace(side, system=system) for side in (positive, negative))
            first, second = (self.render(side) for side in sides)
            found.append((first, second))
        return tuple(found)

    @cached_property
    def calm(self) -> tuple[Conversation, ...]:
        """The neutral texts."""
        return tuple(neutral_texts() if self.neutral is None else self.neutral)

    def keep(self, text: Rendered, logits: Tensor) -> Tensor:
        """Keep what the baseline model predicts for a text, while there is room; the next strength asks for it again.

        Args:
            text: the text.
            logits: [t, v].

        Returns:
            The logits, on their own.
        """
        used = sum(one.nbytes for one in self.predicted.values())
        if used + logits.nbytes <= KEPT_BYTES:
            self.predicted[text] = logits.clone()
        return logits

    def render(self, item: Conversation) -> Rendered:
        """A conversation as the model reads it.

        Args:
            item: the conversation.
        """
        return render(self.tokenizer, item, chat_template_kwargs=self.chat_template_kwargs)


@dataclass(frozen=True, eq=False)
class Trial:
    """A setup under one vector at one strength.

    Attributes:
        setup: model, tokenizer and items.
        vector: what steers; None is the baseline model.
        strength: one number, or None for the vector's own.
        scope: which tokens are written, or None for the vector's own.
        unit: what the strength counts in, or None for the vector's own.
    """

    setup: Setup
    vector: SteeringVector | Sequence[SteeringVector] | None
    strength: float | None
    scope: str | None
    unit: Literal["paper", "norm"] | None

    @property
    def baseline(self) -> Trial:
        """The same items without steering."""
        return self if self.vector is None else self.setup.baseline

    @property
    def vectors(self) -> tuple[SteeringVector, ...]:
        """The vectors that steer, none for the baseline model."""
        if self.vector is None:
            return ()
        return (self.vector,) if isinstance(self.vector, SteeringVector) else tuple(self.vector)

    def steering(self, prompt_lengths: Any = None) -> contextlib.AbstractContextManager[Any]:
        """The context in which the model is steered; nothing for the baseline model.

        Args:
            prompt_lengths: real prompt tokens of each row of the passes run inside.
        """
        if self.vector is None:
            return contextlib.nullcontext()
        return steer(
            self.setup.model,
            self.vector,
            self.strength,
            scope=self.scope,
            unit=self.unit,
            prompt_lengths=prompt_lengths,
            tokenizer=self.setup.roles,
        )

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """What the model answers to `setup.asked`, greedy."""
        return tuple(self.answer(self.setup.asked))

    def answer(self, prompts: Sequence[Conversation], **options: Any) -> list[str]:
        """Generate texts under this trial's steering.

        Args:
            prompts: what to answer.
            options: handed on to `steerkit.generate`.
        """
        setup = self.setup
        steering: dict[str, Any] = {}
        if self.vector is not None:
            steering = {"vector": self.vector, "strength": self.strength, "scope": self.scope, "unit": self.unit}
        return generate(
            setup.model,
            setup.tokenizer,
            prompts,
            batch_size=setup.batch_size,
            chat_template_kwargs=setup.chat_template_kwargs,
            **{"max_new_tokens": setup.max_new_tokens, **steering, **options},
        )

    def answers(self, rendered: Sequence[Rendered], *, beside: bool = False) -> Iterator[Answer]:
        """Show the model texts with answers, and give what it predicts for every answer token.

        Args:
            rendered: texts with answers; what is called an answer here is all from `prompt_length` on.
            beside: run the unsteered model on the same batches too.

        Yields:
            One `Answer` per text, in the order of the batches.

        Raises:
            DataError: a text has no answer, or nothing comes before it.
        """
        setup, decoder = self.setup, self.setup.decoder
        device = execution_device(decoder)
        for text in rendered:
            if not 1 <= text.prompt_length < len(text.ids):
                raise DataError(f"{text.text[:40]!r} has no answer to score behind a prompt; give both")
        # Padded at the left, so that all answers end in the last column and the LM head runs on those columns only.
        for batch in batches(rendered, setup.batch_size, pad_id=pad_token_id(setup.tokenizer), side="left"):
            ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
            lengths = [len(rendered[row].ids) - rendered[row].prompt_length for row in batch.rows]
            keep = max(lengths) + 1
            inputs = {
                "input_ids": ids,
                "attention_mask": mask,
                "use_cache": False,
                "logits_to_keep": keep,
                **position_inputs(decoder.model, mask),
            }
            with torch.no_grad(), evaluation_mode(decoder.model):
                with self.steering(batch.prompt_lengths):
                    logits = setup.model(**inputs).logits[:, -keep:-1]
                known = [setup.predicted.get(rendered[row]) for row in batch.rows]
                baseline: Tensor | None = None
                if beside and any(one is None for one in known):
                    baseline = setup.model(**inputs).logits[:, -keep:-1]
            targets = ids[:, -(keep - 1) :].to(logits.device)
            for place, row in enumerate(batch.rows):
                own = slice(keep - 1 - lengths[place], None)
                if baseline is not None:
                    known[place] = setup.keep(rendered[row], baseline[place, own].float())
                yield Answer(
                    row=row,
                    targets=targets[place, own],
                    logits=logits[place, own].float(),
                    baseline=known[place] if beside else None,
                )

    def log_probs(self, rendered: Sequence[Rendered]) -> list[Tensor]:
        """Log-probability of every answer token, teacher-forced.

        Args:
            rendered: texts with answers.

        Returns:
            per text [t] float32, nats, on the CPU.
        """
        found: list[Tensor] = [torch.empty(0)] * len(rendered)
        for answer in self.answers(rendered):
            chosen = torch.log_softmax(answer.logits, dim=-1).gather(-1, answer.targets[:, None])[:, 0]
            found[answer.row] = chosen.cpu()
        return found

    def record(self, rendered: Sequence[Rendered], sites: Sequence[Site | str], *, readout: Any) -> Activations:
        """Read activations under this trial's steering.

        Args:
            rendered: texts.
            sites: where to read; a site that is written gives the value after the edit.
            readout: which tokens.

        Returns:
            One row per text and site, in their order.
        """
        setup = self.setup
        return record_steered(
            setup.model,
            setup.tokenizer,
            rendered,
            sites,
            readout=readout,
            batch_size=setup.batch_size,
            steering=self.steering,
        )


def neutral_texts() -> list[Conversation]:
    """The shipped neutral texts: plain answered questions that no behaviour has a reason to change."""
    lines = Path(__file__).with_name("neutral.jsonl").read_text(encoding="utf-8").splitlines()
    return [Conversation(item["prompt"], answer=item["answer"]) for item in map(json.loads, lines)]


def shared_system(side: Conversation, other: Conversation) -> str | None:
    """The system prompt of both sides; None where they have none, or a contrast in it.

    Args:
        side: one side of an item.
        other: the other.
    """
    return side.system if side.system == other.system else None
