"""What a small step of steering changes in a score, at many sites from one forward and one backward pass.

A vector writes `h' = edit(h, s)` at the tokens of its scope, and leaves them alone at its neutral strength s0. With

    t = d edit(h, s) / d s   at s0            [b, t, d], the direction itself of an addition
    g = d score / d h                         [b, t, d], from the backward pass

the slope of a text's score in the strength is the sum over written tokens and coordinates of `t * g`. All sites of all
vectors share the passes; other tensors for the same edit (random directions, for one) cost a product more.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steerkit._support.memory import is_out_of_memory
from steerkit.errors import DataError, ModelError
from steerkit.evaluate.answer_passes import AnswerPasses
from steerkit.evaluate.trial import Answer
from steerkit.fitting.training import frozen
from steerkit.methods._protocols import Params, editor_of
from steerkit.methods._registry import method_of
from steerkit.network.block_trace import evaluation_mode
from steerkit.network.sites import Site
from steerkit.prompts.batching import Batch, run_batches
from steerkit.steering.edits_at_sites import Edit, RowStrengths
from steerkit.steering.planning import Target, planned
from steerkit.steering.steering import Steering
from steerkit.tokens.forward_pass import Pass, Tokens
from steerkit.tokens.scope import PromptLengths
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.evaluate.setup import Setup
    from steerkit.prompts.rendering import Rendered

__all__ = ["Along", "products_of_texts", "refuse_without_slope", "slopes_of_texts"]

_HAIR = 1e-6


@dataclass(frozen=True)
class Along:
    """Slopes of texts in the strength of one vector at one site.

    Attributes:
        own: [k, n] of each of k scores of n texts.
        others: [c, k, n] with other tensors in the vector's place.
        parts: [k, n, d] by coordinate, where it was asked for: their sum is `own`.
    """

    own: Tensor
    others: Tensor
    parts: Tensor | None


@dataclass(eq=False)
class _Probe(Edit):
    """An edit that changes nothing and asks the backward pass what a little of it would change."""

    variants: Sequence[Params] = field(kw_only=True)
    in_parts: bool = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def activity(self) -> list[bool]:
        """Every row is looked at."""
        return [True]

    def refresh(self) -> None:
        """Nothing is prepared beforehand."""
        self._inert = False

    def _write(self, h: Tensor, read: Tensor | None, facts: Pass, tokens: Tokens) -> Tensor:
        # As it is read here and nowhere else: what else uses the tensor is none of this site's.
        h = (h if h.requires_grad else h.detach().requires_grad_(True)).view_as(h)
        at, given = h.detach(), None if read is None else read.detach()

        def arrived(gradient: Tensor | None) -> None:
            if gradient is None:
                raise NotImplementedError(f"none arrives at {self.tap.site}")
            self.seen.append(self._slopes(at, given, gradient, tokens))

        h.register_hook(arrived)  # type: ignore[no-untyped-call]
        return h

    def _slopes(self, h: Tensor, read: Tensor | None, gradient: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """[1 + c, b] by row, for the vector's own tensors and the others; and [b, d] of its own, by coordinate."""
        wide, found, parts = gradient.float(), [], None
        if tokens.mask is not None:
            wide = wide * tokens.mask
        for number, params in enumerate(self.variants):
            product = (_tangent(self, params, h.float(), read, tokens) * wide).sum(dim=1) * self.factor
            found.append(product.sum(dim=-1))
            if number == 0 and self.in_parts:
                parts = product.cpu()
        return torch.stack(found).cpu(), parts

    def taken(self, rows: int, scores: int) -> tuple[Tensor, Tensor | None]:
        """What arrived: [1 + c, k, b] and [k, b, d]; zeros where no gradient reaches the site."""
        if not self.seen:
            nothing = torch.zeros(len(self.variants), scores, rows, dtype=torch.float32)
            width = self.tap.width
            return nothing, torch.zeros(scores, rows, width, dtype=torch.float32) if self.in_parts else None
        sums, parts = zip(*self.seen, strict=True)
        self.seen = []
        return torch.stack(sums, dim=1), torch.stack(parts) if self.in_parts else None


def _tangent(edit: Edit, params: Params, h: Tensor, read: Tensor | None, tokens: Tokens) -> Tensor:
    """How the edit of [b, t, d] begins: its derivative in the strength where it changes nothing."""
    method = edit.method
    neutral = method.neutral_strength
    assert neutral is not None

    def edited(strength: Tensor) -> Tensor:
        prepared = method.prepare(params, strength, torch.float32, h.device)
        return method.edit(h, prepared if read is None else {**prepared, "input": read.float()}, tokens)

    # A hair beside the neutral strength: at it some edits are written as the identity itself, which has no slope.
    start = torch.tensor(neutral + _HAIR, dtype=torch.float32, device=h.device)
    tangent: Tensor = torch.func.jvp(edited, (start,), (torch.ones_like(start),))[1]
    return tangent


@dataclass(eq=False)
class _Reader(_Probe):
    """A probe that is told activations and gradients themselves."""

    told: Callable[[Tensor, Tensor], Tensor] = field(kw_only=True)

    def _slopes(self, h: Tensor, read: Tensor | None, gradient: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        wide = gradient.float()
        return self.told(h.float(), wide if tokens.mask is None else wide * tokens.mask).cpu(), None


def refuse_without_slope(vector: SteeringVector) -> None:
    """Refuse vectors whose effect has no slope at a strength that changes nothing.

    Args:
        vector: any.

    Raises:
        DataError: no strength of its method changes nothing, or something else than the strength decides what it does.
    """
    method = method_of(vector)
    if method.neutral_strength is None:
        raise DataError(
            f"{method.name}: no strength leaves activations as they are, so there is none to count a slope from; "
            "measure it with `steerkit sweep`"
        )
    changing = {"when": vector.when, "hold": vector.hold, "fade": vector.fade, "rows": vector.rows}
    decided = [name for name, value in changing.items() if value is not None]
    if editor_of(method, vector) is not None or decided:
        what = f"{decided[0]} decides" if decided else "a gate decides by the prompt"
        raise DataError(
            f"{method.name}: {what} what this vector does, which has no slope in the strength; measure it with "
            "`steerkit evaluate`, or attribute a plain vector"
        )


def slopes_of_texts(
    setup: Setup,
    texts: Sequence[Rendered],
    score: Callable[[Answer], Tensor],
    vectors: Sequence[SteeringVector],
    *,
    others: Sequence[Sequence[SteeringVector]] = (),
    parts: Callable[[Site], bool] = lambda site: False,
) -> tuple[Tensor, list[dict[Site, Along]]]:
    """Slopes of texts' scores in the strengths of vectors, at each of their sites alone.

    The unsteered model is run forward once over every text, and backward once for every score of a text.

    Args:
        setup: model and tokenizer.
        texts: with answers.
        score: of one text's answer: [k] numbers that carry gradients.
        vectors: what a little of is asked for.
        others: for each vector some with other tensors, at the same sites.
        parts: at which sites slopes are told by coordinate too.

    Returns:
        The scores [k, n], and for each vector its slopes by site.

    Raises:
        DataError: a vector has no slope (`refuse_without_slope`), or a text has no answer.
        ModelError: no gradient goes through the model.
    """
    beside = list(others) or [[] for _ in vectors]
    probes = [_planned(setup, vector, also, parts) for vector, also in zip(vectors, beside, strict=True)]
    scores, found = _over_texts(setup, texts, score, [probe for own in probes for probe in own])
    alongs = iter(found)
    return scores, [{probe.tap.site: next(alongs) for probe in own} for own in probes]


def products_of_texts(
    setup: Setup,
    texts: Sequence[Rendered],
    score: Callable[[Answer], Tensor],
    vector: SteeringVector,
    told: Callable[[Tensor, Tensor], Tensor],
    count: int,
) -> tuple[Tensor, Tensor]:
    """Whatever products of activations and gradients are wanted at the one site of a vector, from the same passes.

    Args:
        setup: model and tokenizer.
        texts: with answers.
        score: of one text's answer: [k] numbers that carry gradients.
        vector: says where, and by its scope at which tokens.
        told: from activations [b, t, d] and gradients [b, t, d], zero at all other tokens, both float32, to [c, b].
        count: how many numbers c that are for each row.

    Returns:
        The scores [k, n], and the products [c, k, n].

    Raises:
        DataError: a text has no answer.
        ModelError: no gradient goes through the model.
    """
    (probe,) = _planned(setup, vector, (), lambda site: False)
    own: dict[str, Any] = {one.name: getattr(probe, one.name) for one in fields(Edit)}
    reader = _Reader(**own, variants=[probe.params] * count, in_parts=False, told=told)
    scores, (found,) = _over_texts(setup, texts, score, [reader])
    return scores, torch.cat([found.own[None], found.others])


def _over_texts(
    setup: Setup, texts: Sequence[Rendered], score: Callable[[Answer], Tensor], flat: Sequence[_Probe]
) -> tuple[Tensor, list[Along]]:
    """Scores [k, n], and what each probe was told, in the order of the texts."""
    with torch.inference_mode(mode=False):  # whose tensors nothing can be differentiated through
        passes = AnswerPasses([setup.baseline], texts, None)
        ran = list(run_batches(passes.work(), lambda batch: _run(setup, passes, batch, score, flat)))
    if not ran:
        raise DataError("attribution: there is no text to score; give data")
    place = torch.tensor([row for batch, _ in ran for row in batch.rows], dtype=torch.long).argsort()
    alongs = [_joined([found[number] for _, (_, found) in ran], place) for number in range(len(flat))]
    return torch.cat([values for _, (values, _) in ran], dim=-1)[..., place], alongs


def _joined(found: Sequence[tuple[Tensor, Tensor | None]], place: Tensor) -> Along:
    """What one probe was told in all batches, in the order of the texts."""
    every = torch.cat([one for one, _ in found], dim=-1)[..., place]
    parts = [own for _, own in found if own is not None]
    return Along(every[0], every[1:], torch.cat(parts, dim=1)[:, place] if parts else None)


def _planned(
    setup: Setup, vector: SteeringVector, others: Sequence[SteeringVector], parts: Callable[[Site], bool]
) -> list[_Probe]:
    """The probes of one vector, at each of its sites."""
    refuse_without_slope(vector)
    target = Target.of(setup.model, None, setup.roles)
    neutral = method_of(vector).neutral_strength
    found = []
    edits = planned(target, vector, RowStrengths(replace(vector, strength=None), neutral, None))
    for site, edit in zip(vector.sites, edits, strict=True):
        own: dict[str, Any] = {one.name: getattr(edit, one.name) for one in fields(Edit)}
        variants = [edit.params, *(other.params(site) for other in others)]
        found.append(_Probe(**own, variants=variants, in_parts=parts(edit.tap.site)))
    return found


def _run(
    setup: Setup, passes: AnswerPasses, batch: Batch, score: Callable[[Answer], Tensor], probes: Sequence[_Probe]
) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
    """Scores [k, b] of one batch, and what every probe was told."""
    model = setup.decoder.model
    lengths = PromptLengths(batch.prompt_lengths)
    placed = [replace(probe, lengths=lengths) for probe in probes]
    with frozen(model), evaluation_mode(model), torch.enable_grad():
        with Steering(setup.decoder, placed, ()):
            seen = passes.whole(batch)
        rows = zip(batch.rows, seen.targets, seen.logits, strict=True)
        values = torch.stack(
            [score(Answer(row, targets, logits.float(), None)) for row, targets, logits in rows], dim=-1
        )
        _backward(model, values)
    return values.detach().cpu(), [probe.taken(len(batch.rows), len(values)) for probe in placed]


def _backward(model: Any, values: Tensor) -> None:
    """Run backward once for each score [k, b] of the rows.

    Raises:
        ModelError: no gradient goes through the model.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*an autograd kernel was not registered")  # wrong, and not silent
            # What torch 2.14 says of its own derivatives.
            warnings.filterwarnings("ignore", message="`torch.jit.script`", category=FutureWarning)
            for number, value in enumerate(values):
                value.sum().backward(retain_graph=number + 1 < len(values))
    except (RuntimeError, UserWarning) as error:
        if is_out_of_memory(error):
            raise
        said = str(error).partition("\n")[0][:200]
        raise ModelError(
            f"{type(model).__name__}: no gradient goes through it ({said}); load the model unquantised, in float32 or "
            "bfloat16"
        ) from None
