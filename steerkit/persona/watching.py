"""The vector to watch a trait with: it tells prompts that will draw the trait out from all others, before any answer.

    positive: questions under the trait's system prompts
    negative: the same questions under the opposite system prompts and, as many again, under neutral ones
    v[l] = mean over positive of h[l](last token)  -  mean over negative of it
    l* = the l with the largest area under the curve of h[l] . v[l] between both sides; of equals, the widest gap

The vector that steers best rarely watches best: it is read from answers, and at its block the last token of a prompt
says little yet of what the answer will be like. Fitted is on the extraction questions and the first instructions;
measured on held-out questions, instructions and neutral system prompts, so that no word of what is measured was seen.

Chen et al. (2025), "Persona Vectors", arXiv 2507.21509, section 3.3. Where this file departs: the paper projects the
last prompt token on the vector of answers, at the block it steers at, and compares stronger with weaker instructions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from steerkit.activations.recording import record
from steerkit.evaluate.intervals import Estimate, separability
from steerkit.evaluate.setup import Setup
from steerkit.fitting.fitting import fit
from steerkit.fitting.held_out import apart
from steerkit.maths.directions import coordinates
from steerkit.monitor.monitor import Monitor
from steerkit.network.sites import Site
from steerkit.persona.traits import TraitSpec
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["neutral_systems", "prompts", "separates", "watchpoint"]

Kind = Literal["positive", "negative", "neutral"]
_KINDS: tuple[Kind, ...] = ("positive", "negative", "neutral")


def watchpoint(setup: Setup, spec: TraitSpec, *, method: str, folded: bool = False) -> SteeringVector:
    """Fit a vector that shows a trait at the last token of a prompt, at the block where it shows best.

    Args:
        setup: the model and what measurements share.
        spec: of the trait.
        method: that fits it, from prompts.
        folded: system prompts are written before the question, because there is no system turn.

    Returns:
        The vector, at one site. ``extra["watchpoint"]`` has, with its interval, the area under the curve between
        held-out prompts of the trait and ``"neutral"`` and ``"negative"`` ones, and how many there were.

    Raises:
        FitError: the prompts of both sides do not differ.
        SteerError: see `steerkit.fit`.
    """
    sites = [Site(layer) for layer in range(setup.decoder.num_layers)]
    shared: dict[str, Any] = {"batch_size": setup.batch_size, "chat_template_kwargs": setup.chat_template_kwargs}
    sides = {kind: prompts(spec, kind, held_out=False, folded=folded) for kind in _KINDS}
    others = sides["negative"] + sides["neutral"]
    data = ContrastSet(sides["positive"], others, paired=False, source=f"prompts of {spec.trait}")
    acts = record(setup.model, setup.tokenizer, data, sites, readout="prompt_last", shares=True, **shared)
    options = {**shared, "method": method, "readout": "prompt_last", "acts": acts}
    every = fit(setup.model, setup.tokenizer, data, sites=sites, **options)
    reached = []
    for site in sites:
        direction = every.params(site)["direction"].float()
        reached.append(apart(*(coordinates(side[site], direction) for side in (acts.positive, acts.negative))))
    best = sites[reached.index(max(reached))]
    vector = fit(setup.model, setup.tokenizer, data, sites=[best], **options)
    watching = Monitor(setup.model, setup.tokenizer, vector, calibrated=False, **shared)
    plus, *rest = (watching.score(prompts(spec, kind, held_out=True, folded=folded)) for kind in _KINDS)
    about: dict[str, Any] = {
        kind: separability(plus, minus)._asdict() for kind, minus in zip(_KINDS[1:], rest, strict=True)
    }
    about["prompts"] = len(plus)
    return replace(vector, extra={**vector.extra, "watchpoint": about})


def separates(monitor: Monitor, spec: TraitSpec, other: Kind = "neutral", *, folded: bool = False) -> Estimate:
    """How well a monitor tells held-out prompts of a trait from held-out ones without it.

    Args:
        monitor: reads the last prompt token.
        spec: of the trait.
        other: what stands against the trait's system prompts, neutral or negative ones.
        folded: system prompts are written before the question.

    Returns:
        The area under the curve with its interval.
    """
    plus, minus = (monitor.score(prompts(spec, kind, held_out=True, folded=folded)) for kind in ("positive", other))
    return separability(plus, minus)


def prompts(spec: TraitSpec, kind: Kind, *, held_out: bool, folded: bool = False) -> tuple[Conversation, ...]:
    """Questions under system prompts of one kind, each question under several of them.

    Args:
        spec: of the trait.
        kind: `positive` or `negative` for the trait's own system prompts, or `neutral`.
        held_out: whether of the held-out half of questions and system prompts; a single instruction is in both.
        folded: system prompts are written before the question.

    Returns:
        As many of every kind.
    """
    count = len(spec.instructions)
    first = count - count * 2 // 5 if count > 2 else max(1, count - 1)
    turns = range(first, count) if held_out and first < count else range(first)
    questions = spec.held_out_questions if held_out else spec.extraction_questions
    told = neutral_systems()[held_out::2]
    found = []
    for turn, instruction in enumerate(turns):
        for number, question in enumerate(questions):
            neutral = told[(number + turn) % len(told)]
            system = neutral if kind == "neutral" else spec.system_prompt(instruction, kind)
            found.append(Conversation(f"{system}\n\n{question}") if folded else Conversation(question, system=system))
    return tuple(found)


def neutral_systems() -> list[str]:
    """The shipped neutral system prompts, about as long as those of traits: what is told apart must not be length."""
    return Path(__file__).with_name("neutral_system.txt").read_text(encoding="utf-8").splitlines()
