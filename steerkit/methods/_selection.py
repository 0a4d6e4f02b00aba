"""The choice of a refusal direction among candidates: what each does to refusals and to harmless answers, measured."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from steerkit.errors import FitError
from steerkit.methods._declining import is_refusal
from steerkit.methods._refusal import first_log_probs, log_odds
from steerkit.methods._subject import Subject
from steerkit.network.sites import Site
from steerkit.network.writers import every_write
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import Rendered, spread
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.methods.refusal import RefusalDirection

__all__ = ["Candidate", "Selection", "asked_prompts"]

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


class Selection:
    """One run of the selection: prompts, beginnings of refusals, candidates, scores."""

    def __init__(self, method: RefusalDirection, subject: Subject, sites: Sequence[Site]) -> None:
        self._method, self._subject = method, subject
        self._writes = tuple(every_write(subject.decoder))
        train, held_out = subject.data.split(held_out=0.25)
        asked = asked_prompts(train.positive), asked_prompts(train.negative)
        harmful, harmless = map(subject.rendered, asked)
        if {item.ids for item in harmful} == {item.ids for item in harmless}:
            raise FitError("refusal: both sides ask the same; give harmful and harmless prompts, or source='responses'")
        pairs = [*zip(asked[0], harmful, strict=True), *zip(asked[1], harmless, strict=True)]
        self._width = min(_behind_instruction(prompt, item) for prompt, item in pairs)
        self._beginnings = self._refusals(asked[0], harmful, harmless)
        self._sides = self._as_labelled(harmful, refused=True), self._as_labelled(harmless, refused=False)
        harmful, harmless = (subject.rendered(asked_prompts(side)) for side in (held_out.positive, held_out.negative))
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
        return best, directions[best.site, best.position].float(), torch.tensor(rows, dtype=torch.float32)

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
        return self._subject.vector(method, tensors, sites, scope="all")

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


def asked_prompts(items: Sequence[Conversation]) -> list[Conversation]:
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
