"""The refusal direction: what a model reads off a request before it refuses, added or taken out.

    r[i, l] = mean over harmful prompts of x_l[i]  -  mean over harmless prompts of x_l[i]
    add:     x_l' = x_l + strength * r
    ablate:  every write to the stream loses its component along r

`x_l` is the input of block `l`, `i` a position of the template behind the instruction. One of these candidates is
selected, on prompts that were kept apart:

    bypass = refusal score of harmful prompts while r is ablated          the lowest wins
    induce = refusal score of harmless prompts while r is added at l      kept where >= `min_induce`
    kl     = KL(base || ablated) on harmless prompts, last position       kept where <= `max_kl`
    depth  = l < `max_depth` * number of blocks

Arditi, Obeso, Syed, Paleka, Panickssery, Gurnee, Nanda (2024), "Refusal in Language Models Is Mediated by a Single
Direction", arXiv 2406.11717. Two other sources of a direction, for models that do not refuse by themselves: refusing
minus complying openings (`source="responses"`, the behaviour vector of arXiv 2409.05907) and the output embeddings of
the words of refusals (`source="unembedding"`, arXiv 2505.20309).

Where this file departs. The default source is `responses`, which any model has. The released code lists by hand the
first tokens of each model's refusals; here they are taken from the model's own: a first token counts that opens a
larger share of its refusals than of its answers to harmless prompts (`openings` names others, of any number of tokens).
Positions are found in the rendered text, not counted by family, and means are taken over the prompts of each side that
the model treats as its side says, as in the released code. Candidates are tried in the order of their cost: deep ones
not at all, `induce` first, ablation only for those that pass. Scores and divergences are exact, without the 1e-6 and
1e-8 of the released code. Where no candidate is left, the code picks nothing and stops at an assertion; here the error
lists the best of them with the reason for each, and `error.candidates` holds all. A filter is relaxed by its setting.
Added, the fitted direction is written from the last prompt token on (the paper: all tokens, `scope="all"`, which is
what `induce` is measured with). As weights, the ablation is that of the method `ablation`.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from steerkit import edits
from steerkit.activations import Activations
from steerkit.data import Conversation, Rendered, spread
from steerkit.directions import unit
from steerkit.errors import FitError, StrengthError
from steerkit.methods._base import AddDirection, Params, Prepared, Subject, WeightUpdate
from steerkit.methods._refusal import (
    first_log_probs,
    is_refusal,
    log_odds,
    response_contrast,
    unembedding_direction,
)
from steerkit.sites import Decoder, Site
from steerkit.tokens import Tokens
from steerkit.vector import SteeringVector, model_facts
from steerkit.writers import every_write

__all__ = ["Candidate", "RefusalDirection"]

logger = logging.getLogger(__name__)

_OWN_REFUSALS = 64  # harmful prompts whose answers are looked at for refusals
_ANSWER_TOKENS = 16
_SHOWN = 4
_ROWS_AT_ONCE = 16  # rows whose every token is held at once


class Candidate(NamedTuple):
    """One direction of the selection.

    Attributes:
        site: where it was read.
        position: which token, counted from the end of the prompt (-1 is the last).
        induce: mean refusal score of harmless prompts while it is added; nan where not tried.
        bypass: mean refusal score of harmful prompts while it is ablated; nan where not tried.
        kl: mean divergence of harmless prompts while it is ablated, nats; nan where not tried.
        reasons: names of the filters that it does not pass; empty where it passes all.
    """

    site: Site
    position: int
    induce: float = math.nan
    bypass: float = math.nan
    kl: float = math.nan
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        scores = f"bypass {self.bypass:.2f}, induce {self.induce:.2f}, kl {self.kl:.3f}"
        return f"{self.site} at {self.position} ({scores}; fails {' and '.join(self.reasons) or 'nothing'})"


@dataclass(frozen=True)
class RefusalDirection(AddDirection):
    """Add the refusal direction, so that the model refuses; or ablate it, so that it does not.

    Added, strength 1 is the difference as it was read, 0 the identity; negative strengths refuse less. Ablated,
    strength is the share of the component that is taken out. The positive side of the data are harmful prompts, the
    negative side harmless ones; answers are left out. `responses` reads the positive side only, at each given site.
    `instructions` looks at all given sites (none: the input of every block) and leaves one.
    """

    name: ClassVar[str] = "refusal"
    title: ClassVar[str] = "Refusal direction"
    paper: ClassVar[str] = "Arditi et al. 2024, arXiv 2406.11717"
    data: ClassVar[str] = "harmful and harmless prompts"
    sorts_prompts: ClassVar[bool] = True
    readout: ClassVar[str | None] = None
    scope: ClassVar[str] = "response"

    source: Literal["responses", "instructions", "unembedding"] = "responses"
    """Where the direction is read: refusing minus complying openings, harmful minus harmless prompts, or the output
    embeddings of words."""
    apply: Literal["add", "ablate"] = "add"
    """What the vector does with it."""
    openings: tuple[str, ...] = ()
    """How answers that refuse begin, for the refusal score; none: first tokens of the model's own refusals."""
    as_labelled: bool = False
    """Keep prompts that the model does not treat as their side says: harmful ones it answers, harmless ones it
    refuses."""
    validation: int = 32
    """Prompts of each side on which candidates are scored, at most; a quarter of the data is kept for them."""
    min_induce: float = 0.0
    """Least refusal score of harmless prompts while the direction is added."""
    max_kl: float = 0.1
    """Largest divergence on harmless prompts while the direction is ablated, in nats."""
    max_depth: float = 0.8
    """Blocks from this share of the depth on are not tried."""

    def __post_init__(self) -> None:
        if self.validation < 1:
            raise FitError(f"refusal: validation = {self.validation}; give a number of prompts of at least 1")

    @property
    def edit_name(self) -> str:
        """The operation that vector files of this method name."""
        return "add" if self.apply == "add" else "project_out"

    @property
    def default_scope(self) -> str:
        """From the last prompt token on where it is added, every token where it is ablated."""
        return "response" if self.apply == "add" else "all"

    def sites(self, decoder: Decoder) -> list[Site]:
        """The input of every block; for `responses` one block's output, for `unembedding` every one's."""
        if self.source == "instructions":
            return [Site(layer, "resid_pre") for layer in range(decoder.num_layers)]
        if self.source == "unembedding" and self.apply == "add":
            return [Site(layer) for layer in range(decoder.num_layers)]
        return super().sites(decoder)

    def fit(self, acts: Activations | None, subject: Subject, sites: list[Site]) -> dict[str, Tensor]:
        """Read the direction, and where there are candidates select one.

        Args:
            acts: unused; the method reads for itself.
            subject: the door to the model and to the prompts.
            sites: where to read.

        Returns:
            ``"<site>/direction"`` [d] of each site that is written, or ``"shared/direction"``; after a selection also
            ``"shared/selection"`` [k, 5], of every candidate that was fully scored layer, position, bypass, induce, kl.

        Raises:
            FitError: there is no direction, no refusal to know others by, or no candidate passes all filters (then
                `candidates` holds every `Candidate`).
            DataError: too few prompts to keep some apart.
        """
        if self.source == "unembedding":
            subject.record(_asked(subject.data.negative), sites)  # for the norms that strengths are counted in
            return {"shared/direction": unembedding_direction(subject)}
        if self.source == "instructions":
            best, direction, selection = _Selection(self, subject, sites).run()
            name = f"{best.site}/direction" if self.apply == "add" else "shared/direction"
            return {name: direction, "shared/selection": selection}
        found = response_contrast(subject, _asked(subject.data.positive), sites)
        if self.apply == "add":
            return {f"{site}/direction": direction for site, direction in found.items()}
        if len(sites) != 1:
            raise FitError(f"refusal: one direction is ablated, got {len(sites)} sites; fit at one of them")
        return {"shared/direction": found[sites[0]]}

    def written(self, sites: list[Site], tensors: Mapping[str, Tensor], decoder: Decoder) -> list[Site]:
        """The selected site, all sites, or every write to the stream.

        Args:
            sites: where it was fitted.
            tensors: what `fit` gave.
            decoder: the model's decoder.

        Raises:
            SiteError: the model writes to its stream where there is no site.
        """
        if self.apply == "ablate":
            return every_write(decoder)
        return [site for site in sites if f"{site}/direction" in tensors] or sites

    def length(self, params: Params) -> float | None:
        """Norm of the direction; None where it is ablated, because then no length is added."""
        return super().length(params) if self.apply == "add" else None

    def prepare(self, params: Params, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """The direction times the strength; or at length 1, and the share to be removed."""
        if self.apply == "add":
            return super().prepare(params, strength, dtype, device)
        wide = torch.promote_types(dtype, torch.float32)
        return {"direction": unit(params["direction"].double()).to(wide).to(device), "share": strength.to(wide)}

    def edit(self, h: Tensor, prepared: Prepared, tokens: Tokens) -> Tensor:
        """`h + strength * r`, or `h - strength * (h . u) u`."""
        if self.apply == "add":
            return super().edit(h, prepared, tokens)
        return edits.project_out(h, prepared["direction"], share=prepared["share"], is_unit=True)

    def weight_updates(self, model: nn.Module, vector: SteeringVector, strength: float) -> list[WeightUpdate]:
        """As for every addition.

        Raises:
            StrengthError: the direction is ablated.
            SiteError: it is added at another kind of site than `resid_post`.
        """
        if self.apply == "ablate":
            raise StrengthError("refusal: as weights, ablation is the method 'ablation'; fit that one, or use hooks")
        return super().weight_updates(model, vector, strength)

    def _is_shallow(self, layer: int, decoder: Decoder) -> bool:
        return layer < int(self.max_depth * decoder.num_layers)

    def scored(self, candidate: Candidate) -> Candidate:
        """A candidate with the filters it does not pass.

        Args:
            candidate: with all of its scores.
        """
        # Written so that nan fails.
        fails = {
            "induce": not candidate.induce >= self.min_induce,
            "kl": not candidate.kl <= self.max_kl,
            "finite": not math.isfinite(candidate.bypass),
        }
        return candidate._replace(reasons=tuple(name for name, failed in fails.items() if failed))


class _Selection:
    """One run of the selection: prompts, beginnings of refusals, candidates, scores."""

    def __init__(self, method: RefusalDirection, subject: Subject, sites: Sequence[Site]) -> None:
        self._method, self._subject = method, subject
        self._facts = model_facts(subject.decoder.model)
        self._writes = tuple(every_write(subject.decoder))
        train, held_out = subject.data.split(held_out=0.25)
        asked = _asked(train.positive), _asked(train.negative)
        harmful, harmless = map(subject.rendered, asked)
        if {item.ids for item in harmful} == {item.ids for item in harmless}:
            raise FitError("refusal: both sides ask the same; give harmful and harmless prompts, or source='responses'")
        pairs = [*zip(asked[0], harmful, strict=True), *zip(asked[1], harmless, strict=True)]
        self._width = min(_behind_instruction(prompt, item) for prompt, item in pairs)
        self._beginnings = self._refusals(asked[0], harmful, harmless)
        self._sides = self._as_labelled(harmful, refused=True), self._as_labelled(harmless, refused=False)
        harmful, harmless = (subject.rendered(_asked(side)) for side in (held_out.positive, held_out.negative))
        self._harmful = spread(self._as_labelled(harmful, refused=True), method.validation)
        self._harmless = spread(self._as_labelled(harmless, refused=False), method.validation)
        self._base = torch.log_softmax(subject.logits(self._harmless).double(), dim=-1)
        self._shallow = [site for site in sites if method._is_shallow(site.layer, subject.decoder)]
        self._deep = [site for site in sites if site not in self._shallow]
        if not self._shallow:
            raise FitError(
                f"refusal: all {len(sites)} sites are too deep (max_depth {method.max_depth:g}); give others"
            )

    def run(self) -> tuple[Candidate, Tensor, Tensor]:
        """Score the candidates and take the best.

        Returns:
            The winner, its direction [d], and the table of all that were fully scored [k, 5].

        Raises:
            FitError: none passes all filters.
        """
        directions = self._directions()
        found = [self._induced(*place, direction) for place, direction in directions.items()]
        hopeful = [one for one in found if one.induce >= self._method.min_induce]
        if not hopeful:  # some are scored all the same, so that the error can say how far off they are
            hopeful = sorted((one for one in found if not math.isnan(one.induce)), key=lambda one: -one.induce)[:_SHOWN]
        tried = [self._method.scored(self._ablated(one, directions[one.site, one.position])) for one in hopeful]
        survivors = [one for one in tried if not one.reasons]
        if not survivors:
            raise self._none_left(found, tried)
        best = min(survivors, key=lambda one: one.bypass)
        logger.info("refusal: selected %s of %d candidates, %d of which survive", best, len(found), len(survivors))
        finite = [one for one in tried if "finite" not in one.reasons and math.isfinite(one.kl)]
        rows = [[float(one.site.layer), float(one.position), one.bypass, one.induce, one.kl] for one in finite]
        return best, directions[best.site, best.position].float(), torch.tensor(rows)

    def _directions(self) -> dict[tuple[Site, int], Tensor]:
        """Differences of the means [d] at each site and position behind the instruction, float64."""
        harmful, harmless = map(self._means, self._sides)
        return {
            (site, place - self._width): harmful[site][place] - harmless[site][place]
            for site in self._shallow
            for place in range(self._width)
        }

    def _means(self, items: Sequence[Rendered]) -> dict[Site, Tensor]:
        """[positions, d] mean activations of the last tokens of each prompt, float64."""
        sums: dict[Site, Tensor] = {}
        for start in range(0, len(items), _ROWS_AT_ONCE):
            part = [item.ids for item in items[start : start + _ROWS_AT_ONCE]]
            for site, rows in self._subject.record_ids(part, self._shallow).items():
                total = torch.stack([row[-self._width :].double() for row in rows]).sum(dim=0)
                sums[site] = sums[site] + total if site in sums else total
        return {site: total / len(items) for site, total in sums.items()}

    def _refusals(
        self, asked: Sequence[Conversation], harmful: Sequence[Rendered], harmless: Sequence[Rendered]
    ) -> list[tuple[int, ...]]:
        """Token ids with which refusals begin.

        Raises:
            FitError: the model refuses nothing, or refusals begin like other answers.
        """
        if self._method.openings:
            return [self._subject.token_ids(text) for text in self._method.openings]
        texts = self._subject.answers(spread(asked, _OWN_REFUSALS), max_new_tokens=_ANSWER_TOKENS)
        refused = [place for place, text in enumerate(texts) if is_refusal(text)]
        hint = "name how refusals begin with `openings`, or use source='responses'"
        if not refused:
            raise FitError(f"refusal: the model refuses 0 of {len(texts)} harmful prompts; {hint}")
        first, others = (
            self._subject.logits(items).argmax(dim=-1).tolist()
            for items in ([harmful[place] for place in refused], spread(harmless, _OWN_REFUSALS))
        )
        usual = Counter(others)
        found = [(t,) for t, n in Counter(first).items() if n / len(first) > usual[t] / len(others)]
        if not found:
            raise FitError(
                f"refusal: {len(refused)} of {len(texts)} harmful prompts are refused, with first tokens that open "
                f"answers to harmless ones as often; {hint}"
            )
        return sorted(found)

    def _as_labelled(self, items: list[Rendered], *, refused: bool) -> list[Rendered]:
        """The prompts that the model treats as their side says.

        Raises:
            FitError: there is none.
        """
        if self._method.as_labelled:
            return items
        scores = self._score(items, self._subject.logits(items), None)
        kept = [item for item, score in zip(items, scores.tolist(), strict=True) if (score > 0) == refused]
        if not kept:
            side, does = ("harmful", "refuses") if refused else ("harmless", "answers")
            raise FitError(
                f"refusal: the model {does} none of {len(items)} {side} prompts (highest refusal score "
                f"{float(scores.max()):.2f}, lowest {float(scores.min()):.2f}); set as_labelled=True to use all of "
                "them, or source='responses'"
            )
        return kept

    def _score(self, items: Sequence[Rendered], logits: Tensor, under: SteeringVector | None) -> Tensor:
        return log_odds(first_log_probs(self._subject, items, logits, self._beginnings, under=under))

    def _induced(self, site: Site, position: int, direction: Tensor) -> Candidate:
        """A candidate with its score under addition at its own site.

        What block 0 reads of the template is the same for every prompt, where positions are not part of it.
        """
        if not bool(direction.any()):
            return Candidate(site, position, reasons=("zero",))
        vector = self._vector("add", {f"{site}/direction": direction.float()}, (site,))
        logits = self._subject.logits(self._harmless, under=vector)
        score = float(self._score(self._harmless, logits, vector).mean())
        return Candidate(site, position, score, reasons=() if score >= self._method.min_induce else ("induce",))

    def _ablated(self, candidate: Candidate, direction: Tensor) -> Candidate:
        """A candidate with its scores under ablation at every write."""
        vector = self._vector("ablate", {"shared/direction": direction.float()}, self._writes)
        logits = self._subject.logits([*self._harmful, *self._harmless], under=vector)
        harmful, harmless = logits[: len(self._harmful)], logits[len(self._harmful) :]
        bypass = float(self._score(self._harmful, harmful, vector).mean())
        ablated = torch.log_softmax(harmless.double(), dim=-1)
        kl = (self._base.exp() * (self._base - ablated)).sum(dim=-1)
        return candidate._replace(bypass=bypass, kl=float(kl.mean()))

    def _vector(
        self, apply: Literal["add", "ablate"], tensors: dict[str, Tensor], sites: tuple[Site, ...]
    ) -> SteeringVector:
        """A candidate as a vector of this method, written at all tokens."""
        method = replace(self._method, apply=apply)
        return SteeringVector(
            method=method.name,
            tensors=tensors,
            sites=sites,
            edit=method.edit_name,
            scope="all",
            unit="paper",
            settings=method.settings,
            **self._facts,
        )

    def _none_left(self, found: list[Candidate], tried: list[Candidate]) -> FitError:
        """Say why, in one line, with the candidates that no other one beats."""
        method = self._method
        known = {(one.site, one.position): one for one in tried}
        table = [known.get((one.site, one.position), one) for one in found]
        places = range(-self._width, 0)
        table += [Candidate(site, place, reasons=("depth",)) for site in self._deep for place in places]
        counts = Counter(reason for one in table for reason in one.reasons)
        limits = {
            "induce": f"induce >= {method.min_induce:g}",
            "kl": f"kl <= {method.max_kl:g}",
            "depth": f"depth < {method.max_depth:g}",
            "zero": "length > 0",
            "finite": "finite scores",
        }
        why = ", ".join(f"{counts[name]} fail {limit}" for name, limit in limits.items() if counts[name])
        best = "; ".join(map(str, _pareto(tried)[:_SHOWN])) or "none could be scored"
        return FitError(
            f"refusal: none of {len(table)} candidates passes ({why}); best: {best}; relax one filter (min_induce, "
            "max_kl, max_depth), or use source='responses'",
            candidates=table,
        )


def _asked(items: Sequence[Conversation]) -> list[Conversation]:
    """Prompts without their answers, each once."""
    once: list[Conversation] = []
    for item in items:
        prompt = replace(item, answer=None)
        if prompt not in once:  # a chat has no hash
            once.append(prompt)
    return once


def _behind_instruction(prompt: Conversation, item: Rendered) -> int:
    """Tokens that the template writes behind the instruction; the last token alone where it writes none."""
    said = prompt.prompt if isinstance(prompt.prompt, str) else prompt.prompt[-1]["content"]
    start = item.text.rfind(said.strip())
    behind = [place for place, (first, _) in enumerate(item.offsets) if first >= start + len(said.strip())]
    return max(1, len(item.ids) - behind[0]) if start >= 0 and behind else 1


def _pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that no other one beats in all three scores, those that fail fewest filters first."""

    def beaten(one: Candidate) -> bool:
        return any(
            other is not one
            and other.bypass <= one.bypass
            and other.induce >= one.induce
            and other.kl <= one.kl
            and (other.bypass, -other.induce, other.kl) != (one.bypass, -one.induce, one.kl)
            for other in candidates
        )

    left = [one for one in candidates if not beaten(one)]
    return sorted(left, key=lambda one: (len(one.reasons), one.bypass))
