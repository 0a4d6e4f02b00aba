"""What a graph reads stays where it is, and what runs in each step never waits for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steerkit.engines.vllm.board import Board
from steerkit.engines.vllm.names import Step
from steerkit.engines.vllm.plan import Served
from steerkit.engines.vllm.points import Point
from steerkit.engines.vllm.requests import ASKED, Admission
from steerkit.engines.vllm.settings import Settings
from steerkit.engines.vllm.steps import Steerer
from steerkit.network.sites import Site
from tests.engines.vllm import models
from tests.engines.vllm.engine import addresses

SERVED = Served(models.WIDTH, models.BLOCKS, tuple(models.KINDS.values()), 2, 3)
ROWS, TOKENS = 4, 16


class Blocks:
    """Places of a model, steered step by step without an engine.

    Args:
        device: of all.
        entries: room for directions.
        folder: of the vectors.
    """

    def __init__(self, device: str, entries: int, folder: Path) -> None:
        sites = [Site(layer, kind) for layer in range(models.BLOCKS) for kind in SERVED.kinds]
        sizes = {"places": len(sites), "rows": ROWS, "tokens": TOKENS, "width": models.WIDTH, "entries": entries}
        self.board = Board(**sizes, levels=SERVED.levels, terms=SERVED.terms, device=torch.device(device))
        points = [Point(site, number, self.board) for number, site in enumerate(sites)]
        self.modules = [nn.Identity() for _ in sites]
        for point, module in zip(points, self.modules, strict=True):
            point.hang(module)
        self.steerer = Steerer(points, self.board, SERVED, rows=ROWS, eagerly=contextlib.nullcontext, graphed=True)
        self.admission = Admission(Settings(folder=str(folder), kinds=SERVED.kinds, terms=3), SERVED)
        self.h = torch.zeros(TOKENS, models.WIDTH, device=device)

    def step(self, asked: dict[str, str | None]) -> Tensor:
        """A step with four tokens of each request, the last three of its prompt of four and one behind it."""
        count = 4 * len(asked)
        starts = tuple(range(0, count + 1, 4))
        positions = torch.arange(1, 5).repeat(len(asked)).to(self.h.device)

        def extra(request: str) -> Any:
            said = asked.get(request)
            return None if request not in asked else ((self.admission.admitted({ASKED: said or ""}, 4) or {}), 4)

        def forward() -> Tensor:
            h = self.h[:count]
            for module in self.modules:
                h = module(h)
            return h

        found: Tensor = self.steerer.run(Step(tuple(asked), starts, positions, (1,) * len(asked)), extra, forward)
        return found


@pytest.fixture(scope="module")
def folder(place: Path) -> Path:
    """Many vectors: those of every edit, and twenty additions."""
    made = place / "board"
    made.mkdir()
    model = models.loaded(models.saved("llama", place))
    for name, vector in models.vectors(model).items():
        if vector.method not in ("conditional", "controller"):
            vector.save(made / f"{name}.safetensors")
    for seed in range(20):
        models._vector(model, "caa", "add", (Site(1), Site(2)), seed, {}).save(made / f"other-{seed}.safetensors")
    return made


def run(blocks: Blocks, *, between: Callable[[], None] = lambda: None) -> None:
    """Requests come and go, three at a time, with more vectors than there is room for."""
    said = [f"other-{seed}*{seed + 1}" for seed in range(20)]
    said += ["turn-post*40 - add-attn@generated", "aim-mlp*20", "off-post", "set-mlp*2 fade(linear over 3)"]
    for number in range(len(said) - 2):
        blocks.step({f"{number + place}": said[number + place] if place != 1 else None for place in range(3)})
        between()


def test_no_address_changes_while_vectors_come_and_go(folder: Path) -> None:
    blocks = Blocks("cpu", 13, folder)
    before, room = addresses(blocks.steerer), blocks.board.room
    seen: set[Any] = set()

    def look() -> None:
        assert addresses(blocks.steerer) == before
        seen.update(room._at)

    run(blocks, between=look)
    assert len(seen) > blocks.board.entries > len(room._at)


def test_no_step_waits_for_the_device(folder: Path) -> None:
    # A tensor without data raises at whatever brings a number to the host: .item(), .tolist(), bool(), .cpu().
    run(Blocks("meta", 13, folder))


def test_the_graph_brings_nothing_to_the_host(folder: Path) -> None:
    blocks = Blocks("cpu", 13, folder)
    blocks.step({"a": "turn-post*40 + off-post*2"})
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(blocks.modules[0], backend=keep, fullgraph=True, dynamic=True)
    compiled(blocks.h[:4])
    (graph,) = graphs
    called = {node.target for node in graph.graph.nodes if node.op.startswith("call")}
    assert len(called) > 10
    assert not called & {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__"}
