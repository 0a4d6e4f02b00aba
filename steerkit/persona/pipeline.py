"""From the specification of a trait to a vector and its card, stage by stage, in one folder.

Chen et al. (2025), "Persona Vectors", arXiv 2507.21509. Every stage leaves a file: `rollouts.jsonl`, `scores.jsonl`,
`pairs.jsonl` (a contrast set, held-out questions marked), `choice.jsonl`, the vector to steer with, the one to watch
with (`steerkit.persona.watchpoint`) and a card of both. What is there is not done again, and a run that was killed has
lost a batch at the most.

Where this file departs. The paper steers every layer at one coefficient and takes the highest trait score; here
`calibrate` screens the blocks at one strength, lets the best of them climb a ladder of strengths inside a budget of
costs, all on one half of the held-out questions, and confirms what it found on the other half. Without a judge the
preference margin of held-out pairs stands in for the trait score.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from steerkit.errors import DataError, VectorFileError
from steerkit.evaluate.judges.judge import Judge
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.store_identity import digest_of, weights_digest
from steerkit.network.decoder import inner_model
from steerkit.persona.card_text import write_card
from steerkit.persona.choice import READOUTS, Choice
from steerkit.persona.extraction import Bar, Extraction, Line, by_ones, no_bar, no_line
from steerkit.persona.filtering import Rules, filtered
from steerkit.persona.pairs import contrast_sets
from steerkit.persona.rollout_plan import RolloutPlan
from steerkit.persona.rollouts import Rollout, roll_out, takes_system
from steerkit.persona.run_folder import alone_in, keep_spec
from steerkit.persona.scores import Scores, judge_scores, margin_scores
from steerkit.persona.traits import TraitSpec, slug
from steerkit.persona.vector_choice import METHOD, steering_vector
from steerkit.persona.watching import watchpoint
from steerkit.prompts.rendering import has_chat_template
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Pipeline", "extract"]


def extract(
    model: nn.Module,
    tokenizer: Any,
    spec: TraitSpec,
    folder: Path,
    *,
    plan: RolloutPlan | None = None,
    judge: Judge | None = None,
    rules: Rules | None = None,
    choice: Choice | None = None,
    batch_size: int = 16,
    bar: Bar = no_bar,
    line: Line = no_line,
) -> Extraction:
    """Make a persona vector of a trait, or go on where an earlier run in the same folder stopped.

    Args:
        model: any decoder-only transformers model with a chat template; unchanged afterwards.
        tokenizer: its tokenizer.
        spec: of the trait.
        folder: where all files go.
        plan: what is asked and how it is answered.
        judge: rates trait and coherence; None filters by the model's own probabilities, and the card says so.
        rules: when a pair of answers is kept.
        choice: how the layer is chosen.
        batch_size: rows per pass.
        bar: from a title and a total to a context that gives what advances a progress bar by one.
        line: from a first note to a context that gives what shows the next ones.

    Returns:
        The vector, where it is, and what was kept and measured on the way.

    Raises:
        DataError: the specification has places to fill in, no pair survives the filter, the folder was begun with
            other settings, or another run is at work in it.
        FitError: the kept answers of both sides do not differ.
        SteerError: see `steerkit.fit`, `steerkit.generate` and the judge.
    """
    pipeline = Pipeline(
        model,
        tokenizer,
        spec,
        folder,
        plan=plan or RolloutPlan(),
        judge=judge,
        rules=rules or Rules(),
        choice=choice or Choice(),
        batch_size=batch_size,
        bar=bar,
        line=line,
    )
    return pipeline.run()


@dataclass(eq=False)
class Pipeline:
    """One extraction on its way; see `extract` for the fields."""

    model: nn.Module
    tokenizer: Any
    spec: TraitSpec
    folder: Path
    plan: RolloutPlan
    judge: Judge | None
    rules: Rules
    choice: Choice
    batch_size: int
    bar: Bar
    line: Line
    seconds: dict[str, float] = field(default_factory=dict, init=False)

    def run(self) -> Extraction:
        """Go through all stages; see `extract`.

        Raises:
            DataError: the model has no chat template, or see `extract`.
        """
        self.spec.check_filled()
        if not has_chat_template(self.tokenizer):
            raise DataError("the model has no chat template, and a persona is one of a chat model; take another model")
        with alone_in(self.folder):
            with self._timed("rollouts"):
                rollouts = self.roll_out()
            keep_spec(self.spec, self.folder)
            with self._timed("scores"):
                scores = self.score(rollouts)
            kept = filtered(rollouts, scores, self.rules)
            train, choosing, confirming = contrast_sets(self.spec, rollouts, kept, self.folder, folded=self.folded)
            with self._timed("vector"):
                vector, verdict = steering_vector(self, train, choosing, confirming, kept)
            with self._timed("monitor"), self.line("looking for where to watch"):
                monitor = self.monitor()
            with self._timed("card"):
                card = write_card(self, vector, monitor)
        return Extraction(
            vector=vector,
            file=self.file,
            monitor=monitor,
            monitor_file=self.monitor_file,
            card=card,
            filtered=kept,
            pairs=(len(train), len(choosing or ()), len(confirming or ())),
            verdict=verdict,
            works=vector.calibration.get("confirmed") is True,
            judge=scores.judge,
            seconds=self.seconds,
        )

    @property
    def file(self) -> Path:
        """Where the vector goes; one that is not read from responses says so in its name."""
        more = "" if self.choice.readout == READOUTS[0] else f"-{self.choice.readout.replace('_', '-')}"
        return self.folder / f"{slug(self.spec.trait)}-{METHOD}{more}.safetensors"

    @property
    def monitor_file(self) -> Path:
        """Where the vector to watch with goes."""
        return self.folder / f"{slug(self.spec.trait)}-monitor.safetensors"

    @cached_property
    def folded(self) -> bool:
        """Whether system prompts are written before the question, because the template has no system turn."""
        return not takes_system(self.tokenizer)

    @cached_property
    def setup(self) -> Setup:
        """The model with what every measurement shares."""
        setup = Setup(
            self.model,
            self.tokenizer,
            batch_size=self.batch_size,
            texts=self.choice.texts,
            max_new_tokens=self.choice.max_new_tokens,
            chat_template_kwargs=self.plan.chat_template_kwargs,
        )
        return setup.first_neutral(self.choice.neutral)

    def roll_out(self) -> list[Rollout]:
        """Both answers to everything asked."""
        with self.bar("rollouts", len(self.plan.asked(self.spec))) as advance:
            return roll_out(
                self.model,
                self.tokenizer,
                self.spec,
                self.folder / "rollouts.jsonl",
                self.plan,
                batch_size=self.batch_size,
                step=by_ones(advance),
            )

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """What a judge says of the answers, or how much better they fit their own system prompt."""
        told = [(row.asked, row.positive, row.negative, row.in_thought) for row in rollouts]
        header = {"format": 1, "rollouts": digest_of(told), "spec": self.spec.digest}
        path = self.folder / f"scores{'' if self.judge is None else '-judge'}.jsonl"
        with self.bar("scores", len(rollouts)) as advance:
            step = by_ones(advance)
            if self.judge is not None:
                return judge_scores(self.judge, self.spec, rollouts, path, header, step=step)
            return margin_scores(self.setup, self.spec, rollouts, path, header, folded=self.folded, step=step)

    def monitor(self) -> SteeringVector:
        """The vector to watch with, taken from its file where specification and model are the same."""
        template = self.plan.chat_template_kwargs
        identity = digest_of([self.spec.digest, weights_digest(inner_model(self.model)), template, self.folded])
        with contextlib.suppress(VectorFileError):
            made = SteeringVector.load(self.monitor_file)
            if made.extra.get("watchpoint", {}).get("identity") == identity:
                return made
        vector = watchpoint(self.setup, self.spec, method=METHOD, folded=self.folded)
        about = {**vector.extra["watchpoint"], "identity": identity, "trait": self.spec.trait}
        vector = replace(vector, extra={**vector.extra, "watchpoint": about})
        vector.save(self.monitor_file)
        return vector

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        before = time.monotonic()
        yield
        self.seconds[stage] = time.monotonic() - before
