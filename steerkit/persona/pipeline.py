"""From the specification of a trait to a vector and its card, stage by stage, in one folder.

Chen et al. (2025), "Persona Vectors", arXiv 2507.21509. Every stage leaves a file: `rollouts.jsonl`, `scores.jsonl`,
`pairs.jsonl` (a contrast set, held-out questions marked), `choice.jsonl`, the vector to steer with, the one to watch
with (`steerkit.watchpoint`) and a card of both. What is there is not done again, and a run that was killed has lost a
batch at the most.

Where this file departs. The paper steers every layer at one coefficient and takes the highest trait score; here
`calibrate` screens the blocks at one strength, lets the best of them climb a ladder of strengths inside a budget of
costs, all on one half of the held-out questions, and confirms what it found on the other half. Without a judge the
preference margin of held-out pairs stands in for the trait score.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock
from torch import nn

from steerkit._support.files import write_whole
from steerkit.errors import DataError, VectorFileError
from steerkit.evaluate.calibration.budget import Search
from steerkit.evaluate.calibration.result import Calibration
from steerkit.evaluate.calibration.search import calibrate
from steerkit.evaluate.controls import FEWEST
from steerkit.evaluate.judges.judge import Judge
from steerkit.evaluate.scorers._base import Scorer
from steerkit.evaluate.scoring import scorer_of
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.store import Store
from steerkit.evaluate.store_identity import digest_of, weights_digest
from steerkit.fitting.fitting import fit
from steerkit.generation import generate
from steerkit.methods._registry import default_strength
from steerkit.network.decoder import inner_model
from steerkit.persona.card_text import about_trait, watching
from steerkit.persona.choice import READOUTS, Choice, by_ones, most_answers, pairs_taken
from steerkit.persona.extraction import Bar, Extraction, Line, no_bar, no_line
from steerkit.persona.filtering import UNENDED, Filtered, Rules, filtered
from steerkit.persona.pairs import pairs_jsonl
from steerkit.persona.rollout_plan import RolloutPlan
from steerkit.persona.rollouts import Rollout, roll_out, takes_system
from steerkit.persona.scores import Scores, judge_scores, margin_scores
from steerkit.persona.traits import TraitSpec, slug
from steerkit.persona.watching import watchpoint
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.rendering import has_chat_template
from steerkit.report.card import Answer, vector_card
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Pipeline", "extract"]

METHOD = "persona"
QUESTIONS = 2  # answered on the card


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
        """All stages."""
        self.spec.check_filled()
        if not has_chat_template(self.tokenizer):
            raise DataError("the model has no chat template, and a persona is one of a chat model; take another model")
        with self._alone():
            with self._timed("rollouts"):
                rollouts = self.roll_out()
            _keep_spec(self.spec, self.folder)
            with self._timed("scores"):
                scores = self.score(rollouts)
            kept = filtered(rollouts, scores, self.rules)
            train, choosing, confirming = self.pairs(rollouts, kept)
            with self._timed("vector"):
                vector, verdict = self.vector(train, choosing, confirming, kept)
            with self._timed("monitor"), self.line("looking for where to watch"):
                monitor = self.monitor()
            with self._timed("card"):
                card = self.card(vector, monitor, verdict, kept, scores)
        return Extraction(
            vector=vector,
            file=self.file,
            monitor=monitor,
            monitor_file=self.monitor_file,
            card=card,
            filtered=kept,
            pairs=(len(train), len(choosing or ()), len(confirming or ())),
            verdict=verdict,
            works=vector.suggested_strength is not None,
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
        return setup.with_neutral(self.choice.neutral)

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
        header = {"format": 1, "rollouts": digest_of([tuple(row) for row in rollouts]), "spec": self.spec.digest}
        path = self.folder / f"scores{'' if self.judge is None else '-judge'}.jsonl"
        with self.bar("scores", len(rollouts)) as advance:
            step = by_ones(advance)
            if self.judge is not None:
                return judge_scores(self.judge, self.spec, rollouts, path, header, step=step)
            return margin_scores(self.setup, self.spec, rollouts, path, header, folded=self.folded, step=step)

    def pairs(
        self, rollouts: Sequence[Rollout], kept: Filtered
    ) -> tuple[ContrastSet, ContrastSet | None, ContrastSet | None]:
        """The kept rows as contrast sets: to extract from, to choose on and to confirm on.

        Raises:
            DataError: nothing is left to extract from.
        """
        rows = [rollouts[place] for place in kept.kept]
        if not any(not row.asked.held_out for row in rows):
            thinks = "; to answer without thinking first, give --no-thinking" if UNENDED in kept.reasons else ""
            raise DataError(
                f"{self.spec.trait}: no pair of answers to the extraction questions survives ({kept.sentence()}); read "
                f"{self.folder / 'rollouts.jsonl'}, then change the instructions, the model or --max-new-tokens{thinks}"
            )
        path = self.folder / "pairs.jsonl"
        try:
            write_whole(path, pairs_jsonl(self.spec, rows, folded=self.folded).encode())
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None
        read = ContrastSet.from_jsonl(path)
        asked = [row.asked for row in rows]
        # Neighbouring questions to different halves: what two instructions drew from one question stays together.
        halves = [question.question % 2 if question.held_out else None for question in asked]
        train, choosing, confirming = (
            pairs_taken(read, [half is wanted for half in halves]) for wanted in (None, 0, 1)
        )
        assert train is not None
        return train, choosing, confirming

    def vector(
        self, train: ContrastSet, choosing: ContrastSet | None, confirming: ContrastSet | None, kept: Filtered
    ) -> tuple[SteeringVector, str]:
        """The vector at the layer that is chosen, taken from the file where nothing it depends on has changed."""
        identity = self.identity(kept)
        with contextlib.suppress(VectorFileError):
            made = SteeringVector.load(self.file)
            if made.extra.get(METHOD, {}).get("identity") == identity:
                return made, made.extra[METHOD]["verdict"]
        with self.line("choosing a layer") as step:
            found = self.chosen(train, choosing, confirming, step)
            verdict = found.verdict if isinstance(found, Calibration) else found
            vector = found.vector if isinstance(found, Calibration) else None
            if vector is None:
                best = most_answers(found) if isinstance(found, Calibration) else None
                vector = self.plain(train, confirming, best)
                verdict += f"; layer {vector.sites[0].layer} {'changed most' if best else 'is taken unchosen'}"
            if isinstance(found, Calibration):  # what was tried stays, found or not
                vector = replace(vector, held_out={**vector.held_out, "calibration": found.as_json()})
        about = {
            "identity": identity,
            "trait": self.spec.trait,
            "spec": self.spec.digest,
            "judge": None if self.judge is None else self.judge.name,
            "system_turn": not self.folded,
            "plan": asdict(self.plan),
            "rules": asdict(self.rules),
            "rows": kept.rows,
            "kept": len(kept.kept),
            "dropped": dict(kept.reasons),
            "verdict": verdict,
        }
        vector = replace(vector, seed=self.plan.seed, extra={**vector.extra, METHOD: about})
        vector.save(self.file)
        return vector, verdict

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

    def identity(self, kept: Filtered) -> str:
        """Digest of what the vector and its card depend on."""
        pairs = (self.folder / "pairs.jsonl").read_bytes().decode()
        judge = None if self.judge is None else self.judge.name
        model = weights_digest(inner_model(self.model))
        told = [asdict(self.choice), asdict(self.plan), asdict(self.rules), dict(kept.reasons)]
        return digest_of([pairs, judge, model, self.spec.digest, *told])

    def chosen(
        self,
        train: ContrastSet,
        choosing: ContrastSet | None,
        confirming: ContrastSet | None,
        step: Callable[[str], None],
    ) -> Calibration | str:
        """What `calibrate` found; or why there is nothing to choose on."""
        sizes = [len(part or ()) for part in (train, choosing, confirming)]
        if choosing is None or confirming is None or sizes[0] < FEWEST or min(sizes[1:]) < 2:
            return (
                f"layer not chosen: {sizes[0]} pairs to extract from, {sizes[1]} to choose on and {sizes[2]} to "
                f"confirm on are left; at least {FEWEST}, 2 and 2 are needed"
            )
        search = Search(
            candidates=None if self.choice.layers is None else [(layer,) for layer in self.choice.layers],
            strengths=self.choice.strengths,
            finalists=self.choice.finalists,
            screened_items=self.choice.screened,
            controls=self.choice.controls,
            seed=self.plan.seed,
            together=False,
        )
        return calibrate(
            replace(self.setup, data=confirming),
            train,
            method=METHOD,
            readout=self.choice.readout,
            budget=self.choice.budget,
            search=search,
            effect=self.effect(),
            store=Store(self.folder / "choice.jsonl"),
            validation=choosing,
            step=step,
        )

    def effect(self) -> Scorer:
        """What shows the trait: a judge's score, or the preference margin."""
        if self.judge is None:
            return scorer_of("preference_margin")
        return scorer_of("judge", {"judge": self.judge, "rubric": self.spec.rubric, "low": 0, "high": 100})

    def plain(
        self, train: ContrastSet, held_out: ContrastSet | None, layers: Sequence[int] | None = None
    ) -> SteeringVector:
        """The vector at a layer that nothing confirms: that given, the middle of those allowed, the method's own."""
        if layers is None and self.choice.layers is not None:
            layers = [self.choice.layers[len(self.choice.layers) // 2]]
        return fit(
            self.model,
            self.tokenizer,
            train,
            method=METHOD,
            layers=layers,
            readout=self.choice.readout,
            held_out=held_out,
            batch_size=self.batch_size,
            chat_template_kwargs=self.plan.chat_template_kwargs,
        )

    def card(
        self, vector: SteeringVector, monitor: SteeringVector, verdict: str, kept: Filtered, scores: Scores
    ) -> Path:
        """Write the card, with answers before and after."""
        path = self.file.with_suffix(".md")
        marks = [f"vector digest | `{vector.digest[:16]}`", f"digest `{monitor.digest[:16]}`"]
        if path.exists() and all(mark in path.read_text(encoding="utf-8") for mark in marks):
            return path
        answers = self.answers(vector)
        text = vector_card(self.file.stem, vector, curve=None, answers=answers, new_tokens=self.choice.max_new_tokens)
        try:
            more = about_trait(self, vector, verdict, kept, scores) + watching(self.monitor_file, monitor)
            write_whole(path, (text + more).encode())
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None
        return path

    def answers(self, vector: SteeringVector) -> list[Answer]:
        """A few held-out questions, answered against, without and with the trait."""
        dose = default_strength(vector)
        asked = [(question, by * dose) for question in self.spec.held_out_questions[-QUESTIONS:] for by in (-1, 0, 1)]
        texts = generate(
            self.model,
            self.tokenizer,
            [question for question, _ in asked],
            vector=vector,
            strength=[strength for _, strength in asked],
            max_new_tokens=self.choice.max_new_tokens,
            batch_size=self.batch_size,
            chat_template_kwargs=self.plan.chat_template_kwargs,
        )
        return [Answer(question, strength, text) for (question, strength), text in zip(asked, texts, strict=True)]

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        before = time.monotonic()
        yield
        self.seconds[stage] = time.monotonic() - before

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep a second run out of the folder; the operating system frees the lock of one that was killed."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder / ".lock")
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise DataError(f"{self.folder}: another run is at work in it; wait, or choose another folder") from None
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be written ({error.strerror}); choose another folder") from None
        try:
            yield
        finally:
            lock.release()


def _keep_spec(spec: TraitSpec, folder: Path) -> None:
    """Leave the specification with what came of it; a file that somebody wrote by hand stays as it is."""
    path = folder / f"{slug(spec.trait)}.toml"
    if path.exists():
        with contextlib.suppress(DataError):
            if TraitSpec.load(path).digest == spec.digest:
                return
        path = folder / f"{slug(spec.trait)}-extracted.toml"
    spec.save(path)
