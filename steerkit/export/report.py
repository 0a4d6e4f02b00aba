"""Reports: everything that is known of one vector on one model, in one HTML file without links to anything outside.

`gather` measures and gives plain results, `report_html` turns them into a page and measures nothing. The page works
without JavaScript, its pictures are SVG inside it, and the same evidence gives the same bytes: it bears no date.
"""

from __future__ import annotations

import base64
import json
import math
import shlex
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerkit import plots
from steerkit.activations import Activations, record
from steerkit.data import ContrastSet, Conversation
from steerkit.errors import DataError, FitError, SiteError
from steerkit.evaluate.confounds import confounds
from steerkit.evaluate.controls import Refits, refits
from steerkit.evaluate.curve import Curve, dose_response
from steerkit.evaluate.heat import TokenScores, direction_of, token_projections
from steerkit.evaluate.identity import digest_of, environment, setup_identity
from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.scoring import Measured, measure
from steerkit.evaluate.trial import Setup
from steerkit.fitting import fit, read
from steerkit.registry import method_of
from steerkit.sites import Site, find_decoder, locate
from steerkit.vector import SteeringVector

__all__ = ["Evidence", "Heat", "Plan", "Projections", "Separation", "Texts", "comparison_html", "gather", "report_html"]

EFFECT = "preference_margin"
SCORERS = ("divergence", "repetition", "length")
COSTS = ("kl", "perplexity_ratio", "repetition", "words")


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        strengths: of the dose-response; the suggested and the neutral one are added. None takes them from both sides
            of neutral, as far as the suggested strength and half of it.
        questions: answered before and after.
        controls: random directions, and draws of fits on shuffled labels.
        control_strengths: where random directions are measured; None takes both ends and the suggested strength.
        shuffled: fits on shuffled labels whose effect is measured at the suggested strength.
        texts: prompts answered for repetition and length.
        neutral: neutral texts for KL divergence and perplexity.
        new_tokens: the longest answer.
        seed: fixes controls and intervals.
        batch_size: rows per pass.
    """

    strengths: Sequence[float] | None = None
    questions: Sequence[str] = ()
    controls: int = 5
    control_strengths: Sequence[float] | None = None
    shuffled: int = 3
    texts: int = 8
    neutral: int = 16
    new_tokens: int = 40
    seed: int = 0
    batch_size: int = 16


class Separation(NamedTuple):
    """How well the method's direction at one block separates held-out items.

    Attributes:
        block: counted from 0.
        auc: share of (positive, negative) couples in the right order, ties counted half.
        cohens_d: distance of the means in pooled standard deviations.
    """

    block: int
    auc: float
    cohens_d: float


class Projections(NamedTuple):
    """Held-out items along the vector's own direction at one site, in activation units.

    Attributes:
        site: where they were read.
        positive: one number per item.
        negative: one number per item.
        auc: share of (positive, negative) couples in the right order, ties counted half.
        cohens_d: distance of the means in pooled standard deviations.
    """

    site: str
    positive: tuple[float, ...]
    negative: tuple[float, ...]
    auc: float
    cohens_d: float

    @property
    def middle(self) -> float:
        """Half-way between the means of the two sides."""
        return (_mean(self.positive) + _mean(self.negative)) / 2


class Texts(NamedTuple):
    """One question answered three times, greedy.

    Attributes:
        prompt: the question.
        lower: answered at the suggested strength mirrored at the neutral one.
        bare: answered without steering.
        upper: answered at the suggested strength.
    """

    prompt: str
    lower: str
    bare: str
    upper: str


@dataclass(frozen=True, eq=False)
class Heat:
    """One prompt answered without and with steering, token by token, both read by the unsteered model.

    Attributes:
        bare: the prompt with the unsteered answer.
        steered: the prompt with the steered answer.
        middle: what counts as zero.
        shift: how much further along the direction the steered answer's tokens lie under steering, on average.
    """

    bare: TokenScores
    steered: TokenScores
    middle: float
    shift: float


@dataclass(frozen=True, eq=False)
class Evidence:
    """What was measured of one vector on one model.

    Attributes:
        name: of the vector.
        title: of its method.
        vector: the facts of its file.
        model: what the model is called, how deep and how wide it is.
        strength: the suggested one, else 1.
        neutral: the strength that changes nothing; None where the method has none.
        items: held-out items.
        curve: dose-response and costs; its effect is the KL divergence where the items have no two answers.
        warnings: what to know before trusting the figures.
        missing: section to the reason why it is left out.
        layers: separation of the method's direction at every block.
        projections: held-out items along the vector's own direction.
        calibration: what the vector's file says of its calibration.
        refits: fits on rearranged items.
        shuffled: effects of fits on shuffled labels, rescaled to the same norm, at the suggested strength.
        heat: one prompt token by token.
        texts: before and after.
        digests: of everything that the figures depend on.
        versions: of what computed.
        plan: how much was measured.
        command: that repeats it.
    """

    name: str
    title: str
    vector: Mapping[str, Any]
    model: Mapping[str, Any]
    strength: float
    neutral: float | None
    items: int
    curve: Curve
    warnings: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[Separation, ...] = ()
    projections: Projections | None = None
    calibration: Mapping[str, Any] | None = None
    refits: Mapping[str, Any] | None = None
    shuffled: tuple[float, ...] = ()
    heat: Heat | None = None
    texts: tuple[Texts, ...] = ()
    digests: Mapping[str, str | None] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    plan: Plan = Plan()
    command: str = ""

    @property
    def has_effect(self) -> bool:
        """Whether an effect could be measured beside the costs."""
        return "effect" not in self.missing

    @property
    def suggested(self) -> Mapping[str, Measured]:
        """Every figure at the suggested strength."""
        return self.curve.points[self.curve.strengths.index(self.strength)]

    @property
    def randoms(self) -> list[float]:
        """Effects of the random directions at the suggested strength."""
        return [control[self.strength] for control in self.curve.controls if self.strength in control]

    def as_json(self) -> dict[str, Any]:
        """Plain data; numbers that JSON does not have are None."""
        heat = self.heat
        plain: dict[str, Any] = _plain(
            {
                "name": self.name,
                "title": self.title,
                "vector": self.vector,
                "model": self.model,
                "strength": self.strength,
                "neutral": self.neutral,
                "verdict": _verdict(self)[1] if self.has_effect else None,
                "warnings": self.warnings,
                "missing": self.missing,
                "layers": [one._asdict() for one in self.layers],
                "projections": None if self.projections is None else self.projections._asdict(),
                "effect": self.curve.effect if self.has_effect else None,
                "items": self.items,
                "curve": self.curve.as_rows(),
                "pareto": [spot._asdict() for spot in _spots(self)],
                "controls": {"refits": self.refits, "shuffled": self.shuffled, "random": self.randoms},
                "heat": None
                if heat is None
                else {
                    "site": str(heat.bare.site),
                    "middle": heat.middle,
                    "shift": heat.shift,
                    "bare": list(zip(heat.bare.tokens, heat.bare.values.tolist(), strict=True)),
                    "steered": list(zip(heat.steered.tokens, heat.steered.values.tolist(), strict=True)),
                },
                "texts": [one._asdict() for one in self.texts],
                "digests": self.digests,
                "versions": self.versions,
                "plan": asdict(self.plan),
                "command": self.command,
            }
        )
        return plain


def gather(
    model: nn.Module,
    tokenizer: Any,
    vector: SteeringVector,
    *,
    name: str,
    held_out: ContrastSet,
    train: ContrastSet | None = None,
    plan: Plan | None = None,
    command: str = "",
    step: Callable[[str], None] = lambda note: None,
) -> Evidence:
    """Measure everything a report shows.

    Args:
        model: the model, unsteered.
        tokenizer: its tokenizer.
        vector: the vector.
        name: of the vector.
        held_out: items the vector was not fitted on.
        train: what it was fitted on; None leaves out what needs it.
        plan: how much is measured.
        command: that repeats it, for the report.
        step: called with a few words before each measurement, for a progress line.

    Returns:
        The evidence.

    Raises:
        DataError: an item has no token to be read, or `train` is not what the vector was fitted on.
        SteerError: the vector does not fit the model (see `steerkit.steer`).
    """
    return _Gathering(model, tokenizer, vector, held_out, train, plan or Plan(), step).run(name, command)


class _Gathering:
    """One report's measurements on their way."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        vector: SteeringVector,
        held_out: ContrastSet,
        train: ContrastSet | None,
        plan: Plan,
        step: Callable[[str], None],
    ) -> None:
        self.model, self.tokenizer, self.vector = model, tokenizer, vector
        self.held_out, self.train, self.plan, self.step = held_out, train, plan, step
        self.method = method_of(vector)
        self.depth = find_decoder(model).num_layers
        self.setup = Setup(
            model,
            tokenizer,
            held_out,
            batch_size=plan.batch_size,
            texts=plan.texts,
            max_new_tokens=plan.new_tokens,
        ).with_neutral(plan.neutral)
        self.neutral = self.method.neutral
        self.centre = 0.0 if self.neutral is None else self.neutral
        self.strength = 1.0 if vector.suggested_strength is None else float(vector.suggested_strength)
        self.missing: dict[str, str] = {}

    def run(self, name: str, command: str) -> Evidence:
        """All measurements, in the order of the report."""
        facts = self.vector.describe()
        config: Any = getattr(self.setup.decoder.model, "config", None)
        return Evidence(
            name=name,
            title=self.method.title,
            vector=facts,
            model={
                "class": type(self.setup.decoder.model).__name__,
                "type": self.vector.model_type,
                "name": self.vector.model_id,
                "blocks": self.depth,
                "width": self.vector.hidden_size,
                "dtype": str(getattr(config, "dtype", None) or next(self.model.parameters()).dtype).removeprefix(
                    "torch."
                ),
            },
            strength=self.strength,
            neutral=self.neutral,
            items=len(self.held_out),
            warnings=tuple(self.warnings()),
            layers=tuple(self.layers()),
            projections=self.projections,
            curve=self.curve(),
            calibration=self.vector.held_out.get("calibration"),
            refits=None if self.refits is None else self.refits.as_json(),
            shuffled=tuple(self.shuffled()),
            texts=tuple(self.texts()),
            heat=self.heat(),
            digests=self.digests(),
            versions=environment(),
            missing=self.missing,
            plan=self.plan,
            command=command,
        )

    def warnings(self) -> list[str]:
        """Mismatches of model and template, and plain features that predict the label."""
        self.step("looking for confounds")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.vector.check(self.model, self.tokenizer)
        told = [str(one.message) for one in caught]
        readout = self.vector.readout
        which, data = ("held-out", self.held_out) if self.train is None else ("training", self.train)
        if self.method.readout is None:  # fitted on prompts alone: what was held out only measures
            which, data, readout = "held-out", self.held_out, None
        found = confounds(self.tokenizer, data, readout=readout)
        return told + [f"{which} items: {one.message}" for one in found if one.warns]

    @cached_property
    def own(self) -> tuple[Site, Tensor] | None:
        """The vector's first direction, with its site."""
        try:
            return direction_of(self.vector)
        except DataError:
            return None

    @cached_property
    def recorded(self) -> Activations:
        """Held-out items at every block and at the vector's first site, in one pass."""
        self.step("reading held-out items")
        assert self.own is not None
        return record(
            self.model,
            self.tokenizer,
            self.held_out,
            dict.fromkeys([*self.blocks, self.own[0]]),
            readout=self.vector.readout or "last",
            batch_size=self.plan.batch_size,
        )

    @cached_property
    def blocks(self) -> list[Site]:
        """The vector's kind of site at every block that has it; none where nothing can be fitted there."""
        if self.own is None:
            self.missing["layers"] = f"{self.method.name} has no single direction to project on"
        elif self.method.readout is None:
            self.missing["layers"] = f"{self.method.name} reads no contrast set, so there is nothing to fit per block"
        elif self.train is None:
            self.missing["layers"] = "the items the vector was fitted on are not known here"
        else:
            found = []
            for block in range(self.depth):
                try:
                    found += locate(self.model, [Site(block, self.own[0].kind)])
                except SiteError:
                    continue
            return found
        return []

    def layers(self) -> list[Separation]:
        """The method fitted at every block, and how well that separates held-out items."""
        if not self.blocks:
            return []
        self.step("fitting at every block")
        assert self.train is not None
        common: dict[str, Any] = {"method": self.method, "batch_size": self.plan.batch_size}
        acts = read(
            self.model, self.tokenizer, self.train, sites=self.blocks, readout=self.vector.readout, **common
        )
        found = []
        for site in self.blocks:
            try:
                fitted = fit(self.model, self.tokenizer, self.train, sites=[site], acts=acts, **common)
                direction = direction_of(fitted)[1]
            except (FitError, DataError):  # nothing to learn at this block
                continue
            found.append(Separation(site.layer, *_separated(*self.along(site, direction))))
        return found

    def along(self, site: Site, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Held-out projections [n] and [m] of the two sides."""
        rows = self.recorded[site] @ (direction.float() / torch.linalg.vector_norm(direction.float()))
        return rows[: len(self.held_out.positive)], rows[len(self.held_out.positive) :]

    @cached_property
    def projections(self) -> Projections | None:
        """Held-out items along the vector's own direction."""
        if self.own is None:
            self.missing["projections"] = f"{self.method.name} has no single direction to project on"
            return None
        if self.vector.readout is None and any(item.answer is not None for item in self.held_out.positive):
            self.missing["projections"] = f"{self.method.name} reads no tokens that held-out items could be read at"
            return None
        positive, negative = self.along(*self.own)
        return Projections(
            str(self.own[0]), tuple(positive.tolist()), tuple(negative.tolist()), *_separated(positive, negative)
        )

    def curve(self) -> Curve:
        """Effect and costs over strengths."""
        reach, centre, given = self.strength - self.centre, self.centre, self.plan.strengths
        listed = [centre - reach, centre - reach / 2, centre + reach / 2] if given is None else list(given)
        listed += [self.strength] + ([] if self.neutral is None else [self.neutral])
        strengths = sorted(set(map(float, listed)))
        scorers = list(SCORERS)
        try:
            _ = self.setup.pairs
            scorers.insert(0, EFFECT)
        except DataError as error:
            self.missing["effect"] = f"no effect is measured: {error}"
        ends = {strengths[0], strengths[-1], self.strength} - {self.neutral}
        chosen = sorted(ends) if self.plan.control_strengths is None else sorted(self.plan.control_strengths)
        self.step("dose-response")
        return dose_response(
            self.setup,
            self.vector,
            strengths,
            scorers=scorers,
            controls=self.plan.controls if self.missing.get("effect") is None else 0,
            control_strengths=chosen,
            seed=self.plan.seed,
            step=lambda: self.step("dose-response"),
        )

    @cached_property
    def refits(self) -> Refits | None:
        """Fits on rearranged items."""
        if self.method.readout is None:
            self.missing["refits"] = f"{self.method.name} reads no contrast set, so there are no rows to rearrange"
            return None
        if self.train is None:
            self.missing["refits"] = "the items the vector was fitted on are not known here"
            return None
        self.step("fits on rearranged items")
        try:
            return refits(
                self.model,
                self.tokenizer,
                self.train,
                self.vector,
                shuffled=self.plan.controls,
                seed=self.plan.seed,
                batch_size=self.plan.batch_size,
            )
        except FitError as error:
            self.missing["refits"] = str(error)
            return None

    def shuffled(self) -> list[float]:
        """Effects of fits on shuffled labels at the suggested strength."""
        if self.refits is None or "effect" in self.missing:
            return []
        effects = []
        for control in self.refits.matched()[: self.plan.shuffled]:
            self.step("shuffled labels")
            found = measure(self.setup.trial(control, self.strength), [EFFECT], seed=self.plan.seed)
            effects.append(found[EFFECT].estimate.mean)
        return effects

    @cached_property
    def answered(self) -> tuple[list[str], list[str], list[str]]:
        """The questions and one held-out prompt answered below, without and above."""
        prompts = [*map(Conversation.of, self.plan.questions), self.setup.asked[0]]
        trials = [
            self.setup.trial(self.vector, 2 * self.centre - self.strength),
            self.setup.bare,
            self.setup.trial(self.vector, self.strength),
        ]
        found = []
        for trial in trials:
            self.step("answering")
            found.append(trial.answer(prompts))
        return found[0], found[1], found[2]

    def texts(self) -> list[Texts]:
        """Before and after."""
        return [Texts(*row) for row in zip(self.plan.questions, *self.answered, strict=False)]

    def heat(self) -> Heat | None:
        """One held-out prompt, token by token."""
        if self.own is None or self.projections is None:
            self.missing["heat"] = self.missing["projections"]
            return None
        prompt, (_, bare, steered) = self.setup.asked[0], self.answered
        if not bare[-1] or not steered[-1]:
            self.missing["heat"] = "the model gave an empty answer"
            return None
        self.step("token by token")
        before, after = (
            self.setup.render(replace(prompt, answer=text)) for text in (bare[-1], steered[-1])
        )
        trial = self.setup.trial(self.vector, self.strength)
        found = [token_projections(self.setup.bare, text, self.vector) for text in (before, after)]
        under = token_projections(trial, after, self.vector)
        shift = (under.values - found[1].values)[under.prompt :]
        return Heat(*found, middle=self.projections.middle, shift=float(shift.mean()) if len(shift) else 0.0)

    def digests(self) -> dict[str, str | None]:
        """Of everything the figures depend on."""
        identity = setup_identity(self.setup)
        return {
            "vector": self.vector.digest,
            "training data": self.vector.data_digest,
            "held-out data": self.held_out.digest,
            "neutral texts": identity["neutral"],
            "chat template": identity["chat_template_sha256"],
            "tokenizer": identity["tokenizer_sha256"],
            "weights": identity["weights"],
        }


def report_html(evidence: Evidence) -> str:
    """The report of a vector as one HTML page.

    Args:
        evidence: what `gather` gave.

    Returns:
        HTML that loads nothing from outside.

    Raises:
        SteerError: matplotlib is not installed.
    """
    plots.ready()
    return _page(
        "report.html.j2",
        evidence=evidence,
        verdict=_verdict(evidence) if evidence.has_effect else ("no effect measured", ""),
        costs_words=_costs_words(evidence),
        facts=_facts(evidence),
        layers=_layers_part(evidence),
        projections=_projections_part(evidence),
        dose=_dose_part(evidence),
        costs=_costs_part(evidence),
        pareto=_pareto_part(evidence),
        controls=_control_rows(evidence),
        heat=_heat_part(evidence),
        mirrored=2 * (evidence.neutral or 0.0) - evidence.strength,
        recipe=_json(evidence.vector.get("extra", {}).get("recipe")),
        plan=_json(_plain(asdict(evidence.plan))),
    )


def comparison_html(comparison: Mapping[str, Any]) -> str:
    """The report of several methods side by side as one HTML page.

    Args:
        comparison: plain data as `steerkit compare` writes it: `behaviour`, `model`, `budget`, `environment`,
            `command`, `digests`, and `rows` with a method's figures each (see `steerkit.evaluate.compare.Row.as_json`).

    Returns:
        HTML that loads nothing from outside.

    Raises:
        SteerError: matplotlib is not installed.
    """
    plots.ready()
    rows = list(comparison["rows"])
    bars = [
        plots.Bar(row["method"], _given(row["effect"]), None if row["random"] is None else tuple(row["random"]), row["works"])
        for row in rows
    ]
    spots = [
        plots.Spot(row["method"], row["kl"]["mean"], row["effect"]["mean"], 0 if row["works"] else 1)
        for row in rows
        if row["effect"] is not None and row["kl"] is not None
    ]
    label = "change of the preference margin (nats per token)"
    return _page(
        "comparison.html.j2",
        comparison=comparison,
        rows=rows,
        forest=_picture(plots.forest_svg(bars, effect=label), "effects of the methods with intervals"),
        scatter=_picture(
            plots.spots_svg(
                spots,
                kinds=["clear of its controls", "not clear"],
                effect=label,
                cost="KL divergence on neutral texts (nats per token)",
                front=_front(spots),
            ),
            "effect against KL divergence",
        )
        if spots
        else "",
        working=[row["method"] for row in rows if row["works"]],
        recipe="",
    )


def _page(template: str, **content: Any) -> str:
    """One page from a template beside this file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(signed=_signed, number=_number, cell=_cell, span=_span)
    return made.get_template(template).render(**content)


class _Part(NamedTuple):
    """A picture with what it says."""

    picture: str
    words: str


def _picture(svg: str, alt: str) -> str:
    """A picture as an image that holds its own data: nothing in it meets the ids and styles of the page."""
    from markupsafe import Markup, escape

    data = base64.b64encode(svg.encode()).decode()
    return Markup(f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(alt)}">')


def _verdict(evidence: Evidence) -> tuple[str, str]:
    """The judgement in a few words, and the figures it rests on."""
    measured = evidence.suggested[evidence.curve.effect]
    column, change = measured.column, measured.effect
    sign = 1 if evidence.strength >= (evidence.neutral or 0.0) else -1
    certain = sign * (change.low if sign > 0 else change.high) > 0
    bare = measured.estimate.mean - change.mean
    moved = "rises" if change.mean > 0 else "falls"
    said = (
        f"At strength {evidence.strength:g} the {column.title} on {measured.items} held-out items {moved} by "
        f"{abs(change.mean):.3g} {column.unit} against the unsteered model (95 % interval of the change "
        f"{_span(change)}), from {bare:.3g} to {measured.estimate.mean:.3g}."
    )
    clear = True
    if evidence.randoms:
        most = max(evidence.randoms, key=lambda one: sign * one)
        clear = _is_clear(measured.estimate, evidence.randoms, sign)
        said += (
            f" The largest of {len(evidence.randoms)} random directions of the same norm changes it by "
            f"{_signed(most - bare)}: {'the effect is clear of it' if clear else 'the effect is not clear of it'}."
        )
    if not certain:
        return "No effect shown: the interval of the change includes zero or lies on the other side.", said
    if not clear:
        return "In doubt: a random direction of the same norm may do as much.", said
    beside = " and of every random direction" if evidence.randoms else "; no random direction was measured"
    return f"It steers: the effect is clear of zero{beside}.", said


def _is_clear(estimate: Estimate, controls: Sequence[float], sign: int) -> bool:
    return estimate.low > max(controls) if sign > 0 else estimate.high < min(controls)


def _costs_words(evidence: Evidence) -> str:
    """What steering costs at the suggested strength."""
    found = evidence.suggested
    return (
        f"Costs: KL divergence {_cell(found['kl'].effect, '.3g')} nats per token and perplexity ratio "
        f"{_cell(found['perplexity_ratio'].effect, '.3g')} on {found['kl'].items} neutral texts; share of repeated "
        f"4-grams {_change(found['repetition'], '+.3g')} and length {_change(found['words'], '+.3g')} words over "
        f"{found['repetition'].items} generated texts."
    )


def _change(measured: Measured, form: str) -> str:
    """A change against the unsteered model; of the unsteered model itself there is none."""
    return "+0" if measured.change is None else _cell(measured.change, form)


def _facts(evidence: Evidence) -> list[tuple[str, str]]:
    """The head's table."""
    vector, model = evidence.vector, evidence.model
    suggested = vector["suggested_strength"]
    strength = f"{evidence.strength:g} ({vector['unit']} unit)"
    return [
        ("method", f"{vector['method']}: {evidence.title}"),
        ("paper", vector["paper"] or "none named"),
        (
            "model",
            f"{model['name'] or model['class']} ({model['type']}, {model['blocks']} blocks, width {model['width']}, "
            f"{model['dtype']})",
        ),
        ("sites", ", ".join(site["site"] for site in vector["sites"])),
        ("tokens", f"read: {vector['readout'] or 'by the method itself'}; written: {vector['scope']}"),
        ("suggested strength", strength if suggested is not None else f"none in the file; {strength} is shown"),
    ]


def _layers_part(evidence: Evidence) -> _Part | None:
    if not evidence.layers:
        return None
    own = sorted({Site.parse(site["site"]).layer for site in evidence.vector["sites"]})
    best = max(evidence.layers, key=lambda one: (one.auc, one.cohens_d))
    marked = [one for one in evidence.layers if one.block in own]
    picture = plots.separation_svg(
        {one.block: one.auc for one in evidence.layers},
        {one.block: one.cohens_d for one in evidence.layers},
        own,
    )
    words = (
        f"{evidence.vector['method']} was fitted again at each of {len(evidence.layers)} blocks and each direction "
        f"measured on {evidence.items} held-out items. Block {best.block} separates best (AUC {best.auc:.3f}, "
        f"d {best.cohens_d:.2f})"
    )
    if marked:
        listed = ", ".join(f"block {one.block} AUC {one.auc:.3f}, d {one.cohens_d:.2f}" for one in marked)
        words += f"; the vector's own: {listed}"
    words += ". A block that separates well need not be the one that steers best."
    return _Part(_picture(picture, "AUC and Cohen's d by block"), words)


def _projections_part(evidence: Evidence) -> _Part | None:
    found = evidence.projections
    if found is None:
        return None
    picture = plots.histogram_svg(
        found.positive, found.negative, label=f"projection on the direction at {found.site} (activation units)"
    )
    words = (
        f"Held-out items along the vector's direction at {found.site}, unsteered: AUC {found.auc:.3f}, which is the "
        f"share of couples in which the positive item lies further along; Cohen's d {found.cohens_d:.2f}. The means "
        f"(dashed) are {_mean(found.positive):.3g} and {_mean(found.negative):.3g}."
    )
    return _Part(_picture(picture, "projections of both sides"), words)


def _dose_part(evidence: Evidence) -> _Part | None:
    if not evidence.has_effect:
        return None
    curve = evidence.curve
    column = curve.points[0][curve.effect].column
    first, last = curve.effects[0], curve.effects[-1]
    words = (
        f"The {column.title} goes from {first.mean:.3g} at strength {curve.strengths[0]:g} to {last.mean:.3g} at "
        f"{curve.strengths[-1]:g} ({column.unit}, {curve.items} held-out items) and "
        f"{'rises at every step' if curve.rises else 'does not rise at every step'}."
    )
    if curve.controls:
        ends = [strength for strength in (curve.strengths[0], curve.strengths[-1]) if strength in curve.controls[0]]
        spans = [
            f"{min(values):.3g} to {max(values):.3g} at {strength:g}"
            for strength in ends
            if (values := [control[strength] for control in curve.controls])
        ]
        words += f" {len(curve.controls)} random directions of the same norm give {' and '.join(spans)}"
        words += ", which the intervals are clear of." if curve.clear_of_controls else ", which is not cleared."
    picture = plots.curve_svg(curve, unit=evidence.vector["unit"], marked=evidence.strength)
    return _Part(_picture(picture, "effect over strengths"), words)


def _costs_part(evidence: Evidence) -> _Part:
    curve, panels = evidence.curve, []
    for name in COSTS:
        column = curve.points[0][name].column
        bare = None
        if evidence.neutral in curve.strengths:
            bare = curve.points[curve.strengths.index(evidence.neutral)][name].estimate.mean  # type: ignore[arg-type]
        values = [point[name].estimate for point in curve.points]
        panels.append(plots.Panel(column.title, column.unit, curve.strengths, values, bare))
    worst = max(range(len(curve.points)), key=lambda place: curve.points[place]["kl"].estimate.mean)
    kl, ratio = (curve.points[worst][name].estimate.mean for name in ("kl", "perplexity_ratio"))
    loops = max(point["repetition"].estimate.mean for point in curve.points)
    shortest = min(point["words"].estimate.mean for point in curve.points)
    words = (
        f"Costs with 95 % intervals; dotted is the unsteered model, dashed the suggested strength. They are largest at "
        f"strength {curve.strengths[worst]:g}, with a KL divergence of {kl:.3g} nats per token and a perplexity ratio "
        f"of {ratio:.3g}. Generated texts repeat at most {100 * loops:.0f} % of their 4-grams and have at least "
        f"{shortest:.0f} words on average (cut off at {evidence.plan.new_tokens} tokens)."
    )
    return _Part(
        _picture(plots.costs_svg(panels, unit=evidence.vector["unit"], marked=evidence.strength), "costs by strength"),
        words,
    )


def _spots(evidence: Evidence) -> list[plots.Spot]:
    """Effect and KL of every point known: those of the curve, and those of the calibration in the vector's file."""
    if not evidence.has_effect:
        return []
    spots = []
    for strength, point in zip(evidence.curve.strengths, evidence.curve.points, strict=True):
        measured = point[evidence.curve.effect]
        change = 0.0 if measured.change is None else measured.change.mean
        spots.append(
            plots.Spot(f"{strength:+g}", point["kl"].estimate.mean, change, 0, chosen=strength == evidence.strength)
        )
    for row in (evidence.calibration or {}).get("validation", ()):
        effect, kl = row["scores"].get(evidence.curve.effect), row["scores"].get("kl")
        if row["strength"] is None or effect is None or kl is None or "change" not in effect:
            continue
        label = f"{'+'.join(map(str, row['layers']))} at {row['strength']:g}"
        spots.append(plots.Spot(label, kl["mean"], effect["change"], 1))
    return spots


def _front(spots: Iterable[plots.Spot]) -> list[tuple[float, float]]:
    """(cost, effect) of the points that no other beats in both, from the cheapest on."""
    front: list[tuple[float, float]] = []
    for spot in sorted(spots, key=lambda one: (one.cost, -one.effect)):
        if not front or spot.effect > front[-1][1]:
            front.append((spot.cost, spot.effect))
    return front


def _pareto_part(evidence: Evidence) -> _Part | None:
    spots = _spots(evidence)
    if not spots:
        return None
    column = evidence.curve.points[0][evidence.curve.effect].column
    front = _front(spots)
    # Only what is on the front, and the curve, is named: calibrations try dozens of points.
    named = [spot if spot.kind == 0 or (spot.cost, spot.effect) in front else spot._replace(label="") for spot in spots]
    picture = plots.spots_svg(
        named,
        kinds=["this report, held-out items", "calibration, validation items"],
        effect=f"change of the {column.title}\n({column.unit})",
        cost="KL divergence on neutral texts (nats per token)",
        front=front,
    )
    chosen = next((spot for spot in spots if spot.chosen), None)
    tried = sum(spot.kind == 1 for spot in spots)
    words = f"{len(front)} of {len(spots)} points are on the front: no other point has more effect for less KL divergence."
    if chosen is not None:
        place = "on" if (chosen.cost, chosen.effect) in front else "not on"
        words += (
            f" The suggested strength (ring) buys {_signed(chosen.effect)} {column.unit} for {chosen.cost:.3g} nats "
            f"per token and is {place} it."
        )
    words += f" {tried} points come from the calibration kept in the vector's file." if tried else (
        " The vector's file holds no calibration, so these are the strengths of this report only."
    )
    return _Part(_picture(picture, "effect against KL divergence"), words)


def _control_rows(evidence: Evidence) -> list[tuple[str, str, str]]:
    """What was done, what came out, and what it means."""
    rows = []
    for site, found in (evidence.refits or {}).get("sites", {}).items():
        half, again, mixed = found.get("split_half"), found.get("bootstrap"), found.get("shuffled")
        if half:
            rows.append(
                (f"split half, {site}", f"cosine {_cell(_given(half), '.3f')}", "two halves of the items agree at 1")
            )
        if again:
            rows.append(
                (
                    f"bootstrap, {site}",
                    f"cosine {again['cosine']:.3f}, 2.5 % of draws below {again['cosine_low']:.3f}",
                    "items drawn anew give the same direction at 1",
                )
            )
        if mixed:
            lengths, cosines = ([one[name] for one in mixed] for name in ("relative_length", "cosine"))
            rows.append(
                (
                    f"shuffled labels, {site}",
                    f"{min(lengths):.2f} to {max(lengths):.2f} of the length, cosine {min(cosines):.2f} to "
                    f"{max(cosines):.2f}",
                    f"{len(mixed)} fits with nothing left to learn; a length far below 1 is wanted",
                )
            )
    if not evidence.has_effect:
        return rows
    measured = evidence.suggested[evidence.curve.effect]
    bare = measured.estimate.mean - (0.0 if measured.change is None else measured.change.mean)
    at = f"at strength {evidence.strength:g}"
    for name, values in (("random directions", evidence.randoms), ("shuffled labels, same norm", evidence.shuffled)):
        if values:
            low, high = min(values) - bare, max(values) - bare
            what = f"change {_signed(low)} to {_signed(high)} {measured.column.unit}"
            rows.append((f"{name}, {at}", what, f"{len(values)} draws, against {_signed(measured.effect.mean)} steered"))
    return rows


class _Token(NamedTuple):
    """One token of the heat map."""

    text: str
    title: str
    colour: str
    kind: str


def _heat_part(evidence: Evidence) -> dict[str, Any] | None:
    """The heat map's tokens, its scale and its sentence."""
    heat = evidence.heat
    if heat is None:
        return None
    answers = torch.cat([scores.values[scores.prompt :] for scores in (heat.bare, heat.steered)]) - heat.middle
    scale = float(answers.abs().max()) if len(answers) else 0.0
    scale = scale or 1.0
    cells = {name: _cells(scores, heat.middle, scale) for name, scores in (("bare", heat.bare), ("steered", heat.steered))}
    means = [float(scores.values[scores.prompt :].mean()) - heat.middle for scores in (heat.bare, heat.steered)]
    words = (
        f"Projection of every token on the direction at {heat.bare.site}, activation units. Both texts are read by the "
        f"unsteered model, so that the colours show what the words say and not what the edit adds; zero is half-way "
        f"between the two sides of the held-out items. The unsteered answer lies at {_signed(means[0])} on average, the "
        f"steered one at {_signed(means[1])}. While steering, its tokens lie {_signed(heat.shift)} further along. "
        "Colours of the prompt end at the same scale; its first token often lies far outside."
    )
    legend = [_colour(place / 4 - 1) for place in range(9)]
    return {
        "prompt": cells["bare"][: heat.bare.prompt],
        "bare": cells["bare"][heat.bare.prompt :],
        "steered": cells["steered"][heat.steered.prompt :],
        "legend": legend,
        "scale": scale,
        "words": words,
    }


def _cells(scores: TokenScores, middle: float, scale: float) -> list[_Token]:
    """Each token with the colour and the number of its own value."""
    cells = []
    for text, value in zip(scores.tokens, scores.values.tolist(), strict=True):
        share = max(-1.0, min(1.0, (value - middle) / scale))
        kind = "up" if share > 0.5 else "down" if share < -0.5 else "even"
        shown = text.replace("\n", "\u21b5\n").replace("\t", "\u21e5")
        cells.append(_Token(shown, f"{value - middle:+.3f}", _colour(share), kind))
    return cells


def _colour(share: float) -> str:
    """From orange (-1) over white (0) to blue (1); black text is readable on all of them."""
    end = (86, 180, 233) if share > 0 else (230, 145, 56)
    mixed = [round(255 + (one - 255) * abs(share)) for one in end]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def _separated(positive: Tensor, negative: Tensor) -> tuple[float, float]:
    """AUC and Cohen's d of projections [n] and [m]; d is 0 where nothing spreads."""
    ordered = (positive[:, None] > negative[None, :]).float() + 0.5 * (positive[:, None] == negative[None, :]).float()
    spread = 0.0
    if min(len(positive), len(negative)) > 1:
        spread = math.sqrt((float(positive.var()) + float(negative.var())) / 2)
    gap = float(positive.mean() - negative.mean())
    return float(ordered.mean()), gap / spread if spread > 0 else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _given(found: Mapping[str, Any] | None) -> Estimate | None:
    """An estimate from plain data; an end that is not there bounds nothing."""
    if found is None:
        return None
    low, high = found.get("low"), found.get("high")
    return Estimate(found["mean"], -math.inf if low is None else low, math.inf if high is None else high)


def _cell(found: Estimate | Mapping[str, Any] | None, form: str = "+.2f") -> str:
    """A mean with its interval."""
    one = found if isinstance(found, Estimate) else _given(found)
    if one is None:
        return "-"
    return f"{one.mean:{form}} ({one.low:{form}} to {one.high:{form}})"


def _span(found: Estimate) -> str:
    return f"{found.low:.3g} to {found.high:.3g}"


def _signed(value: float) -> str:
    return f"{value:+.3g}"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:g}"


def _json(content: Any) -> str:
    return "" if content is None else json.dumps(content, indent=2, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """Plain data with None in the place of numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
