"""A trial: a setup under one vector at one strength, or under none. Scorers ask it for all they measure.

Every pass of a scorer goes through `Trial`, so that all render alike and always say where the prompt ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from steerkit.activations.recording import Activations
from steerkit.errors import DataError
from steerkit.evaluate.answer_passes import AnswerPasses
from steerkit.fitting.held_out import record_steered
from steerkit.generation import generate
from steerkit.network.context import check_lengths, named
from steerkit.network.sites import Site
from steerkit.prompts.batching import batches, pad_token_id, run_batches
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import Rendered
from steerkit.steering.steering import steer
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.evaluate.setup import Setup

__all__ = ["Answer", "Trial"]


class Answer(NamedTuple):
    """The model's predictions for one answer that it is shown (teacher forcing).

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
        """The same items without steering and without a system prompt of the setup."""
        return self if self.is_baseline else self.setup.baseline

    @property
    def is_baseline(self) -> bool:
        """Whether this is what others are compared with: nothing steers, and no system prompt is set."""
        return self.vector is None and self.setup.system is None

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
            [setup.instructed(Conversation.of(prompt)) for prompt in prompts],
            batch_size=setup.batch_size,
            chat_template_kwargs=setup.chat_template_kwargs,
            **{"max_new_tokens": setup.max_new_tokens, **steering, **options},
        )

    def answers(self, rendered: Sequence[Rendered], *, beside: Sequence[Rendered] | None = None) -> Iterator[Answer]:
        """Run the model over texts with answers, and give its logits for every answer token.

        Args:
            rendered: texts with answers; what is called an answer here is all from `prompt_length` on.
            beside: the same answers as the unsteered model reads them (`baseline.setup.render`), in the same order:
                run it on the same batches too.

        Yields:
            One `Answer` per text, in the order of the batches.

        Raises:
            DataError: a text has no answer, nothing comes before it, or its tokens are others in `beside`.
        """
        setup, decoder = self.setup, self.setup.decoder
        for text in rendered:
            if not 1 <= text.prompt_length < len(text.ids):
                raise DataError(f"{text.text[:40]!r} has no answer to score behind a prompt; give both")
        check_lengths(decoder, rendered, named("text", rendered), warns=False)
        passes = AnswerPasses(self, rendered, beside)
        # Padded at the left, so that all answers end in the last column and the LM head runs on those columns only.
        work = batches(rendered, setup.batch_size, pad_id=pad_token_id(setup.tokenizer), side="left")
        for batch, seen in run_batches(work, passes):
            for place, row in enumerate(batch.rows):
                yield Answer(row, seen.targets[place], seen.logits[place].float(), passes.baseline(row, place, seen))

    def log_probs(self, rendered: Sequence[Rendered]) -> list[Tensor]:
        """Log-probability of every answer token, teacher-forced.

        Args:
            rendered: texts with answers.

        Returns:
            per text [t] float32, nats, on the CPU.
        """
        found: list[Tensor] = [torch.empty(0, dtype=torch.float32)] * len(rendered)
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
