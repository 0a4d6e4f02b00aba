"""Conditional steering: add a direction only where the prompt meets a condition.

    condition score   s = cos(h, c)                                     (`cosine`, signed)
                      s = cos(h, tanh(c (c . h) / (c . c)))             (`cast`, the paper's eq. 5)
    decision          above: s > threshold;   below: not above
    where it is met   h' = h + strength * v                             at other places of the network

Lee, Padhi, Ramamurthy, Miehling, Dognin, Nagireddy, Dhurandhar (2024), "Programming Refusal with Conditional
Activation Steering", arXiv 2409.05907.

`h` in the score is the last real prompt token's activation, or the mean over the prompt, at one site. `c` comes from
the two sides of the contrast set (positive: prompts that meet the condition). Site and threshold are searched on the
same items, each scored by a direction fitted without it. `v` comes from answers (see `direction_from`).

Where this file departs. The paper reads at an early layer and writes at later ones, so that one pass is enough; here a
condition may be read at any layer, and the prompt's last token is fed again where it was read too late (`passes.py`).
The paper's score is about |cos|: it cannot tell c from -c, shrinks as activations grow, and is
0/0 where h is orthogonal to c (here 0), so the signed cosine is the default. The condition's direction is the mean
difference by default, because a principal component of differences fails where unpaired prompts vary much; `probe` is
better than both. The search is exact (sorted scores, every midpoint), keeps full precision, and breaks ties by the
margin; with `max_false_alarm` it only chooses the site, and the threshold is what that promise needs (`_operating`).
The decision is taken once per row and text; the released code looks at the first row only, keeps its state on a class,
and names its comparisons the wrong way round. Rules over several conditions are objects (`combine`,
`steerkit.predicates`), no texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from steerkit.activations.recording import Activations
from steerkit.errors import FitError, VectorMismatchError, unknown_name
from steerkit.maths.directions import mean_difference, pair_differences, principal_direction, unit
from steerkit.maths.predicates import Predicate
from steerkit.maths.probes import auc, linear_probe
from steerkit.methods._conditional_gate import PARTS, ConditionsGate
from steerkit.methods._fingerprint import are_alike, fingerprint
from steerkit.methods._gate import Gate
from steerkit.methods._gated_addition import RIDGE, GatedAddition, behaviour, blocks_written, folds_of
from steerkit.methods._protocols import Params
from steerkit.methods._subject import Subject
from steerkit.methods._thresholds import best_threshold, score
from steerkit.network.decoder import Decoder
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.methods._thresholds import Threshold

__all__ = ["ConditionalSteering", "combine"]


@dataclass(frozen=True)
class ConditionalSteering(GatedAddition):
    """Add a direction to the rows whose prompt meets a condition; the others stay bitwise as they were.

    In models of routed experts, which mix the rows of a batch, the others beside written ones stay so in their first
    step only, and differ by rounding afterwards.

    The positive side of the contrast set are prompts that meet it (harmful requests), the negative side prompts that do
    not. Sites given to `fit` are where the condition may be read; the best of them is kept.

    Example:
        >>> import torch
        >>> best_threshold(torch.tensor([0.5, 0.75]), torch.tensor([0.125, 0.25])).value
        0.375
    """

    name: ClassVar[str] = "conditional"
    title: ClassVar[str] = "Conditional steering"
    paper: ClassVar[str] = "Lee et al. 2024, arXiv 2409.05907"
    also: ClassVar[Mapping[str, str]] = {
        "condition": "k c",
        "layer": "int64 k",
        "threshold": "float64 k",
        "above": "bool k",
        "fingerprint": "p",
    }
    readout: ClassVar[str | None] = "last"
    scope: ClassVar[str] = "response"

    condition: Literal["mean_difference", "pairwise", "probe"] = "mean_difference"
    """The condition's direction: mean difference, first principal component of pair differences, not centred, or the
    weights of a linear probe (logistic regression with a ridge), which tells the sides apart best."""
    score: Literal["cosine", "cast"] = "cosine"
    """What is compared with the threshold."""
    compare: Literal["auto", "above", "below"] = "auto"
    """Which side of the threshold meets the condition."""
    max_fpr: float | None = None
    """The largest share of negative training items that may meet it."""
    direction_from: Literal["response", "mean_difference", "unembed"] = "response"
    """What is added: refusing minus complying answers, the prompts' own difference, or words of answers' beginnings."""
    writes: tuple[int, ...] = ()
    """Blocks after which it is added; none takes the block at 40 % of the depth."""
    folds: int = 5
    """Parts into which the training items are cut, so that each is scored by a direction fitted on the others."""
    conditions: tuple[str, ...] = ("condition",)
    """Names of the conditions in the file; `combine` puts several into one."""
    rule: tuple[Any, ...] = ("name", "condition")
    """What opens the gate, as `Predicate.data` gives it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_fpr is not None and not 0 <= self.max_fpr <= 1:
            raise FitError(f"conditional: max_fpr {self.max_fpr!r} is no share; give a number from 0 to 1")
        if self.folds < 2:
            raise FitError(f"conditional: folds {self.folds!r}: give at least 2")
        unknown = [name for name in Predicate.from_data(self.rule).names if name not in self.conditions]
        if unknown:
            raise FitError(f"conditional: the rule asks about {unknown[0]!r}; conditions: {', '.join(self.conditions)}")

    @property
    def edit_name(self) -> str:
        """The operation that vector files of this method name."""
        return "add_where"

    def sites(self, decoder: Decoder) -> list[Site]:
        """Where the condition may be read: all block outputs but those of the first tenth.

        Args:
            decoder: the model's decoder.
        """
        return [Site(layer) for layer in range(round(0.1 * decoder.num_layers), decoder.num_layers)]

    def fit(self, acts: Activations | None, subject: Subject, sites: list[Site]) -> dict[str, Tensor]:
        """Find the condition's site, direction and threshold, and the direction to be added.

        Args:
            acts: activations of both sides at every site.
            subject: whose stream is written.
            sites: where the condition may be read.

        Returns:
            ``"shared/condition"`` [1, d], ``"shared/layer"`` [1], ``"shared/threshold"`` [1] float64,
            ``"shared/above"`` [1], and per written site ``"<site>/direction"`` [d].

        Raises:
            FitError: the two sides are alike, everywhere or where the direction is read; or two sites of one layer.
        """
        assert acts is not None
        if len({site.layer for site in sites}) < len(sites):
            raise FitError("conditional: two sites of one layer were given; give one kind of site")
        written, data = self._written(subject.decoder), subject.data
        kept = self.parts(data)
        parts = folds_of(self.fitted_turns(data), self.folds)
        most = self.max_fpr if self.max_fpr is not None else self.max_false_alarm
        best: tuple[tuple[float, float], Site, Tensor, Threshold] | None = None
        for site in sites:
            positive, negative = acts.positive[site][kept.positive].float(), acts.negative[site][kept.negative].float()
            try:
                direction = self._condition(positive, negative, paired=acts.paired)
                scores = self._scores(positive, negative, direction, parts, paired=acts.paired)
            except FitError as error:
                raise FitError(f"conditional at {site}: {error}") from None
            found = best_threshold(*scores, max_fpr=most, compare=self.compare)
            area = auc(*scores)
            rank = (found.f1, max(area, 1 - area))
            if best is None or rank > best[0]:  # of equals the first: what is read early costs no second pass
                best = (rank, site, direction, found)
        assert best is not None
        _, site, direction, found = best
        added = behaviour(subject, self.direction_from, written)
        mark = fingerprint(subject.decoder)
        return {
            "shared/condition": direction[None].contiguous(),
            "shared/layer": torch.tensor([site.layer], dtype=torch.long),
            "shared/threshold": torch.tensor([found.value], dtype=torch.double),
            "shared/above": torch.tensor([found.compare == "above"], dtype=torch.bool),
            **({"shared/fingerprint": mark} if len(mark) else {}),
            **{f"{one}/direction": value for one, value in added.items()},
        }

    def _written(self, decoder: Decoder) -> list[Site]:
        return blocks_written(decoder, self.writes, [round(0.4 * (decoder.num_layers - 1))])

    def _condition(self, positive: Tensor, negative: Tensor, *, paired: bool) -> Tensor:
        """The direction [d] that tells the kinds of prompts apart."""
        if self.condition == "mean_difference":
            return unit(mean_difference(positive, negative))
        if self.condition == "probe":
            penalty = RIDGE * (len(positive) + len(negative))
            return unit(linear_probe(positive, negative, penalty=penalty).weight)
        return principal_direction(pair_differences(positive, negative, paired=paired))

    def _scores(
        self,
        positive: Tensor,
        negative: Tensor,
        whole: Tensor,
        parts: Sequence[tuple[Tensor, Tensor]],
        *,
        paired: bool,
    ) -> tuple[Tensor, Tensor]:
        """Scores of both sides, each item's by a direction that it had no part in."""
        scores = torch.empty(len(positive), dtype=torch.float32), torch.empty(len(negative), dtype=torch.float32)
        for mine, theirs in parts:
            direction = self._condition(positive[~mine], negative[~theirs], paired=paired)
            scores[0][mine] = score(positive[mine], direction, self.score)
            scores[1][theirs] = score(negative[theirs], direction, self.score)
        if not parts:
            return score(positive, whole, self.score), score(negative, whole, self.score)
        return scores

    def written(self, sites: list[Site], tensors: Mapping[str, Tensor], decoder: Decoder) -> list[Site]:
        """The outputs of the blocks that `writes` names.

        Args:
            sites: unused.
            tensors: unused.
            decoder: the model's decoder.
        """
        return self._written(decoder)

    def read_at(self, sites: list[Site], tensors: Mapping[str, Tensor]) -> list[Site]:
        """The one site where the condition is read.

        Args:
            sites: where it might have been.
            tensors: what `fit` gave.
        """
        return [site for site in sites if site.layer == int(tensors["shared/layer"][0])]

    def read_direction(self, params: Params) -> Tensor | None:
        """The condition's direction; None where there are several.

        Args:
            params: the tensors of the site that is read.
        """
        conditions = params.get("condition")
        return conditions[0] if conditions is not None and len(conditions) == 1 else None

    def opens_above(self, vector: SteeringVector) -> float:
        """The threshold of the first condition; where that is met below it, the gate opens below.

        Args:
            vector: a vector of this method.
        """
        return float(vector.tensors["shared/threshold"][0])

    def opening_above(self, vector: SteeringVector, threshold: float) -> SteeringVector:
        """The same vector with another threshold of its one condition.

        Args:
            vector: a vector of this method.
            threshold: of `Gate.opening`; where the condition is met below its threshold, that is the negative score.
        """
        is_above = bool(vector.tensors["shared/above"][0])
        value = torch.tensor([threshold if is_above else -threshold], dtype=torch.double)
        if not is_above:  # met up to and with the threshold
            value = torch.nextafter(value, torch.full_like(value, -torch.inf))
        settings = {**vector.settings, **self.settings}
        return replace(vector, tensors={**vector.tensors, "shared/threshold": value}, settings=settings)

    def editor(self, vector: SteeringVector) -> Gate:
        """The gate: reads at `vector.reads`, and opens by the rule.

        Args:
            vector: a vector of this method.

        Raises:
            VectorMismatchError: the vector lacks a condition, or was read in a way that no gate can.
        """
        return ConditionsGate(vector, self.conditions, self.score, Predicate.from_data(self.rule))

    def measure(self, vector: SteeringVector, held_out: Activations) -> dict[str, Any]:
        """How often the gate opens on held-out items of either side.

        Args:
            vector: a vector of this method.
            held_out: both sides at `vector.reads`.
        """
        gate = self.editor(vector)
        shares = [float(gate.decide(side).is_open.float().mean()) for side in (held_out.positive, held_out.negative)]
        return {"tpr": round(shares[0], 4), "fpr": round(shares[1], 4)}


def combine(vectors: Mapping[str, SteeringVector], rule: Predicate, *, writes: str | None = None) -> SteeringVector:
    """One vector that several conditions open by a rule; its behaviour is added once.

    Args:
        vectors: condition to a vector of this method that holds it.
        rule: such as ``P("harmful") & ~P("fiction")``.
        writes: the condition whose vector's direction is added; None takes the rule's first.

    Returns:
        The vector, without the figures that were measured on its parts.

    Raises:
        UnknownNameError: the rule asks about a condition that is not there.
        VectorMismatchError: the vectors are not of one model, its weights, score and readout, or one has several.
    """
    rule({name: torch.zeros(1, dtype=torch.bool) for name in vectors})
    if writes is not None and writes not in vectors:
        raise unknown_name("condition", writes, vectors)
    reads = {site for one in vectors.values() for site in one.reads}
    if len({site.layer for site in reads}) < len(reads):
        raise VectorMismatchError(
            "combine: conditions are read at two sites of one layer; fit them at one kind of site"
        )
    main = vectors[rule.names[0] if writes is None else writes]
    known = {name: one.settings for name, one in vectors.items() if one.method == ConditionalSteering.name}
    methods = {name: ConditionalSteering.from_settings(settings) for name, settings in known.items()}
    facts = {
        (one.model_type, one.hidden_size, one.num_layers, one.readout, methods[name].score if name in methods else None)
        for name, one in vectors.items()
    }
    if len(facts) > 1 or len(methods) < len(vectors):
        raise VectorMismatchError("combine: the vectors are not of one method, model, score and readout")
    marks = [one.tensors["shared/fingerprint"] for one in vectors.values() if "shared/fingerprint" in one.tensors]
    if not are_alike(marks):
        raise VectorMismatchError("combine: the vectors are not of one model; fit all of them on the same weights")
    if any(len(method.conditions) != 1 for method in methods.values()):
        raise VectorMismatchError("combine: a vector holds several conditions already; combine those of its parts")
    shared = {
        f"shared/{part}": torch.cat([one.tensors[f"shared/{part}"] for one in vectors.values()]) for part in PARTS
    }
    method = ConditionalSteering.from_settings({**main.settings, "conditions": tuple(vectors), "rule": rule.data})
    return replace(
        main,
        tensors={**main.tensors, **shared},
        settings=method.settings,
        fitted_at=tuple(dict.fromkeys(site for one in vectors.values() for site in one.reads)),
        held_out={},
    )
