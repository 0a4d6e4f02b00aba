"""Rollouts: what a model answers to the questions of a trait under both system prompts of every instruction.

    system prompt = "You are a/an {name} assistant. " + instruction                                   (paper, section 2)

Chen et al. (2025), "Persona Vectors", arXiv 2507.21509. Both answers to one (question, instruction, sample) are one
row, so that nothing can part them later. With several samples tokens are drawn at temperature 1, each answer with a
seed of its own, so that it depends neither on what stands beside it in a batch nor on where a killed run went on; one
sample is greedy. Rows go to a file batch by batch.

Where this file departs. The paper asks every held-out question under every instruction too; here each is asked under a
few instructions in turn, because these answers only choose and measure. What a model thinks
(`steerkit.prompts.marks.THINKING`) is kept in the file and left out of what is read. Where a chat template has no
system turn, refuses one or drops it without a word, the system prompt is written before the question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from steerkit._support.journal import Journal
from steerkit.evaluate.store_identity import weights_digest
from steerkit.generation import Told, told
from steerkit.network.decoder import inner_model
from steerkit.persona.rollout_plan import SIDES, Asked, RolloutPlan, Side
from steerkit.persona.traits import TraitSpec
from steerkit.prompts.marks import spoken
from steerkit.prompts.rendering import Rendered, opens_thought, render
from steerkit.prompts.system_prompts import takes_system
from steerkit.vector.model_identity import model_facts

__all__ = ["Rollout", "roll_out", "takes_system"]

FORMAT = 2  # the order of the rows


@dataclass(frozen=True)
class Rollout:
    """Both answers to one thing asked.

    Attributes:
        asked: what was asked.
        positive: what the assistant with the trait said, with its thoughts.
        negative: what the other one said.
        in_thought: whether answers begin inside of a thought, because the prompt opens it.
        likely: mean log-probability of each answer's tokens as they were chosen, nats, the positive one's first; None
            where that is not known, as of answers that come from a file.
    """

    asked: Asked
    positive: str
    negative: str
    in_thought: bool = False
    likely: tuple[float | None, ...] = field(default=(None, None), compare=False)

    def answer(self, side: Side) -> str:
        """What an assistant said, without thoughts.

        Args:
            side: which assistant.
        """
        return spoken(getattr(self, side), in_thought=self.in_thought)


def roll_out(
    model: nn.Module,
    tokenizer: Any,
    spec: TraitSpec,
    path: Path,
    plan: RolloutPlan | None = None,
    *,
    batch_size: int = 16,
    step: Callable[[int], None] = lambda rows: None,
) -> list[Rollout]:
    """Answer every question under both system prompts, as far as a file does not hold the answers yet.

    Args:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer.
        spec: of the trait.
        path: a JSONL file that grows batch by batch; a run that was killed goes on where it stopped.
        plan: what is asked; None takes the defaults.
        batch_size: rows per pass, two answers to each.
        step: called with the number of rows that have become ready, for a progress bar.

    Returns:
        The rows, in the order of `RolloutPlan.asked`.

    Raises:
        DataError: the specification has places to fill in, or the file was begun with another model, specification or
            plan, or cannot be used.
        SteerError: see `steerkit.generate`.
    """
    spec.check_filled()
    plan = plan or RolloutPlan()
    folded = not takes_system(tokenizer)
    kept = Journal(path, _header(model, tokenizer, spec, plan, folded=folded))
    every, rows = plan.asked(spec), batch_size
    # What follows the last whole batch is asked again, so that a resumed run has the very batches of one that was not.
    kept.keep(len(kept) if len(kept) >= len(every) else len(kept) // rows * rows)
    step(len(kept))
    likely: list[tuple[float | None, ...]] = [(None, None)] * len(kept)
    for batch in _batches(every[len(kept) :], rows):
        texts, means = _answers(model, tokenizer, spec, plan, batch, folded=folded)
        kept.append([{**asked._asdict(), **answers} for asked, answers in zip(batch, texts, strict=True)])
        likely += means
        step(len(batch))
    thought = opens_thought(tokenizer, plan.chat_template_kwargs)
    return [
        Rollout(asked, row["positive"], row["negative"], thought, means)
        for asked, row, means in zip(every, kept.rows, likely, strict=True)
    ]


def _header(model: nn.Module, tokenizer: Any, spec: TraitSpec, plan: RolloutPlan, *, folded: bool) -> dict[str, Any]:
    """What rollouts depend on; batches are not among it."""
    facts = model_facts(inner_model(model), tokenizer)
    return {
        "format": FORMAT,
        "trait": spec.trait,
        "spec": spec.digest,
        "model": facts["model_id"],
        "weights": weights_digest(inner_model(model)),
        "template": facts["chat_template_sha256"],
        "system_turn": not folded,
        **asdict(plan),
    }


def _batches(asked: Sequence[Asked], size: int) -> Iterator[Sequence[Asked]]:
    for start in range(0, len(asked), size):
        yield asked[start : start + size]


def _answers(
    model: nn.Module, tokenizer: Any, spec: TraitSpec, plan: RolloutPlan, batch: Sequence[Asked], *, folded: bool
) -> tuple[list[dict[str, str]], list[tuple[float | None, ...]]]:
    """Both answers to each of some things asked, in one batch, and how likely they were (see `Rollout.likely`)."""
    each = [(asked, side) for asked in batch for side in SIDES]
    drawn: dict[str, Any] = {}
    if plan.samples > 1:
        drawn = {"do_sample": True, "seed": [asked.seed(side, plan.seed) for asked, side in each]}
    template = plan.chat_template_kwargs
    answers = told(
        model,
        tokenizer,
        [asked.conversation(spec, side, folded=folded) for asked, side in each],
        max_new_tokens=plan.max_new_tokens,
        batch_size=len(each),
        chat_template_kwargs=template,
        shares=True,
        **drawn,
    )
    thought, likely = opens_thought(tokenizer, template), list[float | None]()
    for (asked, side), answer in zip(each, answers, strict=True):
        text, mean = spoken(answer.text, in_thought=thought), None
        if text:
            whole = asked.conversation(spec, side, answer=text, folded=folded)
            mean = _likely(answer, render(tokenizer, whole, chat_template_kwargs=template))
        likely.append(mean)
    places = range(0, len(each), len(SIDES))
    texts: list[dict[str, str]] = [
        {side: answers[place + number].text for number, side in enumerate(SIDES)} for place in places
    ]
    return texts, [tuple(likely[place : place + len(SIDES)]) for place in places]


def _likely(answer: Told, read: Rendered) -> float | None:
    """Mean log-probability of an answer, if what is read of it are the first of the tokens that were chosen."""
    ids = list(read.ids[read.prompt_length :])
    if answer.log_probs is None or not ids or answer.ids[: len(ids)] != ids:
        return None
    return float(answer.log_probs[: len(ids)].mean())
