"""`Steerer`: what one worker does for a step: rows for its requests, numbers for its tokens, gates at prompts' ends.

Which tokens are written follows from each token's position in its request and from where the request's prompt ends,
never from how many tokens a step holds, so that chunks of a prompt, speculated tokens and what is computed again after
preemption are all steered alike.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerkit.engines.vllm.board import Board
from steerkit.engines.vllm.gates import Prompt, opened
from steerkit.engines.vllm.names import Step
from steerkit.engines.vllm.plan import Served, TermPlan
from steerkit.engines.vllm.points import Point
from steerkit.engines.vllm.recording import Reading
from steerkit.engines.vllm.requests import CARRIED, READ, carried_plans
from steerkit.engines.vllm.schedule import Schedule
from steerkit.maths.rank_two import RankTwo
from steerkit.network.sites import Site

__all__ = ["Steerer"]

_LOG = logging.getLogger(__name__)
_KEPT, _READ = 256, 2**14
Extra = Callable[[str], tuple[Mapping[str, Any], int] | None]


@dataclass
class _Live:
    """A steered request that has a row.

    Attributes:
        row: its row on the board.
        plans: of its vectors.
        taken: entries that it holds, with whether each has two directions.
        sites: where it writes.
    """

    row: int
    plans: tuple[TermPlan, ...]
    taken: list[tuple[Any, bool]] = field(default_factory=list)
    sites: set[Site] = field(default_factory=set)


class Steerer:
    """Steers the requests of one worker.

    Args:
        points: the places of the model.
        board: their numbers.
        served: the model.
        rows: steered requests at one time.
        eagerly: has the pass under way run as Python.
        graphed: the model runs as a graph, so that Python does not run in each step.
    """

    def __init__(
        self,
        points: Sequence[Point],
        board: Board,
        served: Served,
        *,
        rows: int,
        eagerly: Callable[[], AbstractContextManager[None]],
        graphed: bool,
    ) -> None:
        self._points, self._board, self._served = {point.site: point for point in points}, board, served
        self._numbers = {point.site: number for number, point in enumerate(points)}
        self._schedule = Schedule(served.terms, rows, board.device)
        self._free = list(range(rows, 0, -1))
        self._live: dict[str, _Live] = {}
        self._prompts: dict[str, dict[int, Prompt]] = {}
        self._readings: dict[str, Reading] = {}
        self._read: dict[str, Reading] = {}
        self._plans: OrderedDict[str, tuple[TermPlan, ...]] = OrderedDict()
        self._eagerly, self._graphed, self._is_plain = eagerly, graphed, True
        self._outgrown = False

    def run(self, step: Step, extra: Extra, forward: Callable[[], Any]) -> Any:
        """Run the model for a step, steered.

        Args:
            step: what it holds.
            extra: from a request's id to its `extra_args` and the tokens of its prompt; None for one that is gone.
            forward: runs the model.

        Returns:
            What `forward` gave, the second time where a gate has opened.
        """
        self._meet(step, extra)
        rows = [self._live[one].row if one in self._live else 0 for one in step.requests]
        self._fill(step, rows)
        asking = self._asking(step)
        for point in self._points.values():
            point.rests = not self._graphed and not any(
                point.site in live.sites for one in step.requests if (live := self._live.get(one))
            )
        self._listen(step, asking)
        try:
            with self._eagerly() if asking or self._outgrown else nullcontext():
                output = forward()
        finally:
            for point in self._points.values():
                point.reader = None
        if not self._decide(step, asking):
            return output
        # What opened writes from the prompt's last token on, which has just been computed without it.
        self._fill(step, rows)
        for live in self._live.values():
            for site in live.sites:
                self._points[site].rests = False
        with self._eagerly() if self._outgrown else nullcontext():
            return forward()

    def _meet(self, step: Step, extra: Extra) -> None:
        """Let go of requests that are gone, and make room for those that are new, or back."""
        known = {*self._prompts, *self._readings}
        for request in [one for one in known if one not in step.requests and extra(one) is None]:
            self._release(request)
            self._prompts.pop(request, None)
            reading = self._readings.pop(request, None)
            if reading is not None:
                self._read[reading.name] = reading.settle()
                while len(self._read) > _READ:
                    del self._read[next(iter(self._read))]
        for request in step.requests:
            found = None if request in self._live else extra(request)
            if found is None:
                continue
            if READ in found[0] and request not in self._readings:
                self._readings[request] = Reading.of(found[0][READ])
            if CARRIED in found[0]:
                if not self._free:  # requests that wait after preemption do not need theirs meanwhile
                    self._release(next(one for one in self._live if one not in step.requests))
                self._begin(request, self._planned(found[0][CARRIED]), found[1])

    def _release(self, request: str) -> None:
        """Take a request's row and entries back."""
        live = self._live.pop(request, None)
        if live is not None:
            for key, has_second in live.taken:
                self._board.give(key, has_second=has_second)
            self._free.append(live.row)

    def take(self, names: Sequence[str]) -> dict[str, dict[str, list[bytes]]]:
        """What has been read for some names, which is then forgotten.

        Args:
            names: of readings.
        """
        for reading in self._readings.values():
            if reading.name in names:
                self._read[reading.name] = reading
        return {name: self._read.pop(name).result() for name in names if name in self._read}

    def _planned(self, carried: Mapping[str, Any]) -> tuple[TermPlan, ...]:
        mark = carried["digest"]
        if mark not in self._plans:
            self._plans[mark] = carried_plans(carried, self._served)
        self._plans.move_to_end(mark)
        while len(self._plans) > _KEPT:
            self._plans.popitem(last=False)
        return self._plans[mark]

    def _begin(self, request: str, plans: tuple[TermPlan, ...], prompt: int) -> None:
        gates = {term: Prompt(plan, prompt) for term, plan in enumerate(plans) if plan.gate is not None}
        prompts = self._prompts.setdefault(request, gates)
        live = self._live[request] = _Live(self._free.pop(), plans)
        self._board.entry[:, :, live.row] = 0
        self._schedule.begin(live.row, plans, prompt)
        writes = [
            (term, site, (plan.digest, site), edit)
            for term, plan in enumerate(plans)
            if plan.gate is None
            for site, edit in plan.edits.items()
        ]
        self._write(live, writes)
        for term in prompts:
            self._open(request, term)

    def _open(self, request: str, term: int) -> bool:
        """Put the edits of a gated term where it has opened; whether it has."""
        found = self._prompts[request][term]
        writes = [
            (term, site, (request, term, site), opened(found.plan.edits[site], strength))
            for site, strength in found.strengths.items()
        ]
        self._write(self._live[request], writes)
        return bool(writes)

    def _write(self, live: _Live, writes: Sequence[tuple[int, Site, Any, RankTwo]]) -> None:
        """Put edits where their request's row finds them.

        Each term of a request has its level at a site by how many before it write there, so that vectors are applied
        in their order, whichever of them has been opened by a gate.
        """
        where: list[tuple[int, int, int, int]] = []
        for term, site, key, edit in writes:
            entry, grown = self._board.take(key, edit)
            self._outgrown |= grown
            if grown:
                _LOG.warning(
                    "more vectors at one time than there is room for, so steps run uncompiled from now on; start with "
                    "a larger setting 'vectors' (room for %d directions now)",
                    self._board.entries,
                )
            live.taken.append((key, bool(edit.basis[1].any())))
            live.sites.add(site)
            level = sum(site in plan.edits for plan in live.plans[:term])
            where.append((self._numbers[site], level, entry, term))
        if where:
            found = torch.tensor(where, dtype=torch.long).to(self._board.device, non_blocking=True)
            places, levels, entries, terms = found.unbind(1)
            self._board.entry[places, levels, live.row] = entries
            self._board.term[places, levels, live.row] = terms

    def _fill(self, step: Step, rows: Sequence[int]) -> None:
        """Write to the board which row each token of a step has, and what its terms do to it."""
        board = self._board
        if not any(rows):
            if not self._is_plain:
                board.row.zero_()
                self._is_plain = True
            return
        counts = [end - start for start, end in zip(step.starts, step.starts[1:], strict=False)]
        count = step.starts[-1]
        row = torch.repeat_interleave(
            torch.tensor(rows, dtype=torch.long), torch.tensor(counts, dtype=torch.long), output_size=count
        )
        row = row.to(board.device, non_blocking=True)
        board.row.zero_()
        board.row[:count] = row
        self._schedule.fill(board.on[:, :count], board.lead[:, :count], row, step.positions)
        self._is_plain = False

    def _asking(self, step: Step) -> list[tuple[int, Prompt | Reading]]:
        """What reads something of this step, each with the place of its request in it."""
        found: list[tuple[int, Prompt | Reading]] = []
        for number, request in enumerate(step.requests):
            count = step.starts[number + 1] - step.starts[number]
            readers: list[Prompt | Reading] = [*self._prompts.get(request, {}).values()]
            readers += [self._readings[request]] if request in self._readings else []
            found += [(number, reader) for reader in readers if reader.wants(step.first[number], count)]
        return found

    def _listen(self, step: Step, asking: Sequence[tuple[int, Prompt | Reading]]) -> None:
        for site in {site for _, prompt in asking for site in prompt.reads}:

            def read(stream: Tensor, site: Site = site) -> None:
                for number, prompt in asking:
                    if site in prompt.reads:
                        part = stream[step.starts[number] : step.starts[number + 1]]
                        prompt.read(site, part, step.first[number])

            self._points[site].reader = read

    def _decide(self, step: Step, asking: Sequence[tuple[int, Prompt | Reading]]) -> bool:
        """Have the gates decide whose prompts are complete; whether one has opened."""
        any_open = False
        for number, prompt in asking:
            end = step.first[number] + step.starts[number + 1] - step.starts[number]
            if isinstance(prompt, Prompt) and end >= prompt.tokens:
                prompt.decide()
                request = step.requests[number]
                term = next(term for term, one in self._prompts[request].items() if one is prompt)
                any_open |= self._open(request, term)
        return any_open
