"""A trial: a setup under one vector at one strength, or under none. Scorers ask it for all they measure.

Every pass of a scorer goes through `Trial`, so that all render alike and always say where the prompt ends.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from torch import Tensor
from torch.nn.functional import cross_entropy

from steerkit._support.processes import processes
from steerkit.activations.recording import Activations
from steerkit.errors import DataError
from steerkit.evaluate.abreast import ABREAST, by_row, can_share, companions
from steerkit.evaluate.answer_passes import AnswerPasses
from steerkit.fitting.held_out import record_steered
from steerkit.generation import generate
from steerkit.network.context import check_lengths, named
from steerkit.network.sites import Site
from steerkit.prompts.batching import dealt_out, run_batches
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import Rendered
from steerkit.steering.steering import steer
from steerkit.tokens.scope import Scope
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.evaluate.setup import Setup

__all__ = ["Answer", "Trial", "token_log_probs"]

T = TypeVar("T")


class Answer(NamedTuple):
    """The model's predictions for one answer that it is shown (teacher forcing).

    Attributes:
        row: which of the texts.
        targets: [t] ids of the answer's tokens.
        logits: [t, v] float32, row `i` predicts `targets[i]`.
        baseline: [t, v] float32, log-probabilities of the unsteered model; None unless asked for.
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
        abreast: trials that are measured too (`Setup.trials`), this one among them: what a scorer asks of one of them
            is found out for all that can share its passes.
        known: what was found out, text by text.
    """

    setup: Setup
    vector: SteeringVector | Sequence[SteeringVector] | None
    strength: float | None
    scope: str | None
    unit: Literal["paper", "norm"] | None
    # Not copied by `replace`: what was found out under one vector says nothing of another.
    abreast: list[Trial] = field(init=False, default_factory=list, repr=False)
    known: dict[Any, Any] = field(init=False, default_factory=dict, repr=False)

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

    @property
    def leaves_prompts(self) -> bool:
        """Whether by its scopes nothing is written before the last token of a prompt."""
        written = [one.scope if one.own_scope or self.scope is None else self.scope for one in self.vectors]
        return all(Scope.parse(scope).leaves_prompts for scope in written)

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
        """What the model answers to `setup.asked`, greedy; kept."""
        return self.answered(self.setup.asked)

    def answered(self, prompts: Sequence[Conversation], **options: Any) -> tuple[str, ...]:
        """What the model answers to prompts; kept, and found out for the trials abreast and the baseline too.

        Args:
            prompts: what to answer.
            options: handed on to `steerkit.generate`; the same for every row.
        """
        key = ("answered", repr((tuple(prompts), options)))
        if key not in self.known:
            together = [one for one in companions(self, same_sites=False) if key not in one.known]
            beside = self.baseline
            if can_share(self) and beside.setup is self.setup and key not in beside.known:
                together.append(beside)
            if len(together) == 1:
                self.known[key] = tuple(self.answer(prompts, **options))
            else:
                self._answer_together(together, prompts, key, options)
        found: tuple[str, ...] = self.known[key]
        return found

    def _answer_together(
        self, together: Sequence[Trial], prompts: Sequence[Conversation], key: Any, options: dict[str, Any]
    ) -> None:
        """Answer prompts under several trials at once."""
        rows = [one for _ in prompts for one in together]
        plain = Trial(self.setup, by_row(rows), None, None, None)
        size = ABREAST * self.setup.batch_size
        texts = plain.answer([one for one in prompts for _ in together], **{"batch_size": size, **options})
        for place, one in enumerate(together):
            one.known[key] = tuple(texts[place :: len(together)])

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
            chat_template_kwargs=setup.chat_template_kwargs,
            shares=True,
            **{"batch_size": setup.batch_size, "max_new_tokens": setup.max_new_tokens, **steering, **options},
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
        yield from (answer for _, answer in self._passes([self], rendered, beside))

    def over_answers(
        self, rendered: Sequence[Rendered], of: Callable[[Answer], T], *, beside: Sequence[Rendered] | None = None
    ) -> list[T]:
        """What a function makes of the model's logits for each text; kept, and found out for the trials abreast too.

        Args:
            rendered: texts with answers.
            of: a function, which is known again by being equal. What it gives is kept: no logits.
            beside: see `answers`.

        Returns:
            One value per text, in their order.

        Raises:
            DataError: see `answers`.
        """
        plain = [None] * len(rendered) if beside is None else beside
        keys = [(of, row, *texts) for row, texts in enumerate(zip(rendered, plain, strict=True))]
        left = [row for row, key in enumerate(keys) if key not in self.known]
        if left:
            together = companions(self, same_sites=True)
            lacking = [one for one in together if any(keys[row] not in one.known for row in left)][:ABREAST]
            some, also = [rendered[row] for row in left], beside and [beside[row] for row in left]

            def found(rank: int = 0, count: int = 1) -> list[tuple[int, int, T]]:
                passes = self._passes(lacking, some, also, rank, count)
                placed = ((places[id(trial)], left[answer.row], answer) for trial, answer in passes)
                return [(place, row, of(answer._replace(row=row))) for place, row, answer in placed]

            several, places = processes(), {id(trial): place for place, trial in enumerate(lacking)}
            # Of logits only what is made of them goes from process to process.
            parts = (
                [found()]
                if several is None
                else several.gathered(lambda: found(several.rank, several.count), tuple(left))
            )
            for place, row, value in itertools.chain(*parts):
                lacking[place].known[keys[row]] = value
        return [self.known[key] for key in keys]

    def _passes(
        self,
        together: Sequence[Trial],
        rendered: Sequence[Rendered],
        beside: Sequence[Rendered] | None,
        rank: int = 0,
        count: int = 1,
    ) -> Iterator[tuple[Trial, Answer]]:
        """The answers of some trials that can share passes, in the order of the batches: one process's of several."""
        for text in rendered:
            if not 1 <= text.prompt_length < len(text.ids):
                raise DataError(f"{text.text[:40]!r} has no answer to score behind a prompt; give both")
        check_lengths(self.setup.decoder, rendered, named("text", rendered), warns=False)
        passes = AnswerPasses(together, rendered, beside)
        work = passes.work()
        mine = [work[place] for place in dealt_out(len(work), count)[rank]]
        for batch, seen in run_batches(mine, passes, is_split=False):
            for place, item in enumerate(batch.rows):
                row, member = divmod(item, len(together))
                baseline = passes.baseline(row, place, seen)
                yield together[member], Answer(row, seen.targets[place], seen.logits[place].float(), baseline)

    def log_probs(self, rendered: Sequence[Rendered]) -> list[Tensor]:
        """Log-probability of every answer token, teacher-forced.

        Args:
            rendered: texts with answers.

        Returns:
            per text [t] float32, nats, on the CPU.
        """
        return self.over_answers(rendered, _log_probs)

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


def token_log_probs(answer: Answer) -> Tensor:
    """Log-probabilities of the tokens of one answer.

    Args:
        answer: with logits [t, v].

    Returns:
        [t] float32, nats.
    """
    # The same bits as `log_softmax` and a choice of its columns, without writing them all down.
    return -cross_entropy(answer.logits, answer.targets, reduction="none")


def _log_probs(answer: Answer) -> Tensor:
    """The same on the CPU."""
    return token_log_probs(answer).cpu()
