"""Gathering: everything a report shows of one vector on one model, measured once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.activations.recording import Activations, record
from steerkit.errors import DataError, FitError, SiteError
from steerkit.evaluate.confounding import confounds
from steerkit.evaluate.controls import refits
from steerkit.evaluate.curve import Curve, strength_response
from steerkit.evaluate.refit_results import Refits
from steerkit.evaluate.scoring import measure
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.store_identity import environment, setup_identity
from steerkit.fitting.fitting import fit, read
from steerkit.fitting.held_out import apart
from steerkit.methods._registry import default_strength, method_of
from steerkit.monitor.token_heat import direction_of, token_projections
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.report.evidence import Evidence
from steerkit.report.evidence_parts import EvidencePlan, Heat, Projections, Separation, Texts
from steerkit.vector.model_identity import model_facts
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["gather"]

EFFECT = "preference_margin"
SCORERS = ("divergence", "repetition", "length")


def gather(
    model: nn.Module,
    tokenizer: Any,
    vector: SteeringVector,
    *,
    name: str,
    held_out: ContrastSet,
    train: ContrastSet | None = None,
    plan: EvidencePlan | None = None,
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
    return _Gathering(model, tokenizer, vector, held_out, train, plan or EvidencePlan(), step).run(name, command)


class _Gathering:
    """One report's measurements on their way."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        vector: SteeringVector,
        held_out: ContrastSet,
        train: ContrastSet | None,
        plan: EvidencePlan,
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
        self.strength = default_strength(vector)
        self.missing: dict[str, str] = {}

    def run(self, name: str, command: str) -> Evidence:
        """All measurements; what is warned of on the way goes into the report."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", category=UserWarning)
            self.vector.check(self.model, self.tokenizer)
            confounded = self.confounds()
            found = self.measured(name, command)
        told = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
        for one in caught:
            if not issubclass(one.category, UserWarning):  # of libraries, not for readers of a report
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        return replace(found, warnings=tuple(dict.fromkeys([*told, *confounded])))

    def measured(self, name: str, command: str) -> Evidence:
        """All measurements, in the order of the report."""
        return Evidence(
            name=name,
            title=self.method.title,
            vector=self.vector.describe(),
            model=self.facts(),
            strength=self.strength,
            neutral=self.neutral,
            items=len(self.held_out),
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
            missing=dict(self.missing),
            plan=self.plan,
            command=command,
        )

    def facts(self) -> dict[str, Any]:
        """What the model is called, how deep and how wide it is."""
        model = self.setup.decoder.model
        return {
            "class": type(model).__name__,
            "name": model_facts(model)["model_id"],
            "type": self.vector.model_type,
            "blocks": self.depth,
            "width": self.vector.hidden_size,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        }

    def confounds(self) -> list[str]:
        """Plain features that predict the label."""
        self.step("looking for confounds")
        readout = self.vector.readout
        which, data = ("held-out", self.held_out) if self.train is None else ("training", self.train)
        if self.method.readout is None:  # fitted on prompts alone: what was held out only measures
            which, data, readout = "held-out", self.held_out, None
        found = confounds(self.tokenizer, data, readout=readout)
        return [f"{which} items: {one.message}" for one in found if one.warns]

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
            found: list[Site] = []
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
        acts = read(self.model, self.tokenizer, self.train, sites=self.blocks, readout=self.vector.readout, **common)
        found = []
        for site in self.blocks:
            try:
                fitted = fit(self.model, self.tokenizer, self.train, sites=[site], acts=acts, **common)
                direction = direction_of(fitted)[1]
            except (FitError, DataError):  # nothing to learn at this block
                continue
            found.append(Separation(site.layer, *apart(*self.along(site, direction))))
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
        positive, negative = self.along(*self.own)
        return Projections(
            str(self.own[0]), tuple(positive.tolist()), tuple(negative.tolist()), *apart(positive, negative)
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
        far = strengths[0] if self.strength >= self.centre else strengths[-1]
        chosen = {far, self.strength} - {self.neutral}
        if self.plan.control_strengths is not None:
            chosen = set(map(float, self.plan.control_strengths))
        self.step("dose-response")
        return strength_response(
            self.setup,
            self.vector,
            strengths,
            scorers=scorers,
            controls=self.plan.controls if self.missing.get("effect") is None else 0,
            control_strengths=sorted(chosen),
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
            self.setup.baseline,
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
        prompt, (_, baseline, steered) = self.setup.asked[0], self.answered
        if not baseline[-1] or not steered[-1]:
            self.missing["heat"] = "the model gave an empty answer"
            return None
        self.step("token by token")
        before, after = (self.setup.render(replace(prompt, answer=text)) for text in (baseline[-1], steered[-1]))
        trial = self.setup.trial(self.vector, self.strength)
        found = [token_projections(self.setup.baseline, text, self.vector) for text in (before, after)]
        under = token_projections(trial, after, self.vector)
        shift = (under.values - found[1].values)[under.prompt :]
        return Heat(found[0], found[1], self.projections.middle, float(shift.mean()) if len(shift) else 0.0)

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
