"""TODO methods._protocols."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from steerkit.network.decoder import Decoder
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.activations.expert_activations import ExpertMeans
    from steerkit.activations.recording import Activations
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.prompts.rendering import Rendered
    from steerkit.tokens.forward_pass import Tokens

__all__ = ["Editor", "HeatMap", "Params", "PartsTable", "Prepared", "Subject", "WeightUpdate"]

Params = Mapping[str, Tensor]
Prepared = Mapping[str, Tensor]


class WeightUpdate(NamedTuple):
    """One exact change of a parameter.

    Attributes:
        name: the parameter's name in the transformers model; it may be a bias that is absent so far.
        update: from the old weight in float32 at least (None where the bias is absent) to the new one.
    """

    name: str
    update: Callable[[Tensor | None], Tensor]


class PartsTable(NamedTuple):
    """What a vector consists of, where that is a list of parts rather than directions, for people to read.

    Attributes:
        title: what the rows are, with their number.
        columns: titles.
        rows: one entry per column: text, whole numbers, or numbers.
        note: what else there is to say of them.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str | int | float, ...]]
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """The same as plain data, each row by its columns."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {"title": self.title, "rows": rows, "note": self.note}


class HeatMap(NamedTuple):
    """Signed sizes of the parts of a vector, layer by layer, to be drawn as a heat map.

    Attributes:
        title: what the parts are.
        across: what stands from left to right.
        rows: layer to one number for each part, 0 where it is left alone; rows may differ in length.
        above: what a number over 0 means.
        below: what a number under 0 means.
    """

    title: str
    across: str
    rows: Mapping[int, Sequence[float]]
    above: str
    below: str


class Subject(Protocol):
    """The only door through which `Method.fit` reaches the model; `steerkit.fitting` gives it."""

    @property
    def decoder(self) -> Decoder:
        """The model's decoder."""

    @property
    def data(self) -> ContrastSet:
        """What the method is fitted on."""

    def rendered(self, items: Sequence[Any]) -> list[Rendered]:
        """Items as the model reads them."""

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a text, without special tokens."""

    def unembedding(self) -> Tensor:
        """The output embedding [v, d], float32, on the CPU: row `t` reads the logit of token `t` off the stream."""

    def answers(self, items: Sequence[Any], *, max_new_tokens: int) -> list[str]:
        """What the model, unsteered and greedy, answers to each item."""

    def record(
        self, items: Sequence[Any], sites: Sequence[Site], *, readout: Any = "last", under: SteeringVector | None = None
    ) -> Activations:
        """Read activations of texts, steered by `under` where given."""

    def logits(self, items: Sequence[Any], *, under: SteeringVector | None = None) -> Tensor:
        """Next-token logits [n, v] behind each item, steered by `under` where given."""

    def shifted(
        self, items: Sequence[Any], shifts: Mapping[Site, Tensor], *, prompts: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [b, t, v] of texts whose answers are written with shifts [b, d], ids, and which predict the answer."""

    def train(
        self,
        parameters: Sequence[Tensor],
        loss: Callable[[Tensor], Tensor],
        items: int,
        *,
        epochs: int,
        batch_size: int = 32,
        rate: float = 1e-3,
        decay: float = 0.0,
        seed: int = 0,
        judge: Callable[[], float] | None = None,
        patience: int | None = None,
        title: str = "training",
    ) -> list[float]:
        """Train parameters in place, the model frozen; see `steerkit.training.minimise`."""

    def norms(self, sites: Sequence[Site]) -> dict[Site, float]:
        """Median token norms at sites that have been read, unsteered."""

    def pair_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids of the one pair of prompts the method is fitted on."""

    def filler_id(self, text: str) -> int:
        """Id of the one token that `text` is."""

    def record_ids(self, rows: Sequence[tuple[int, ...]], sites: Sequence[Site]) -> dict[Site, list[Tensor]]:
        """Activations [t, d] of every token of each row of ids, none of them masked."""

    def weight(self, site: Site) -> Tensor:
        """The matrix [o, i], float32, of the linear layer that writes at a site."""

    def experts(self, sites: Sequence[Site], readout: Any) -> dict[Site, ExpertMeans]:
        """What the experts read at those of the sites where routed ones write, as means over their own tokens."""

    def weight_digests(self, sites: Sequence[Site]) -> dict[str, str]:
        """What identifies the weights that write at some sites, by name."""


class Editor(Protocol):
    """What a method gives that reads at some sites and, by what it found there, writes at others.

    All it remembers is in a state, which begins with the first pass of a text and ends with it: with the `generate`
    call, the cache, or the pass. `steering.py` runs a pass again where a gate knows too late for it.
    """

    @property
    def reads(self) -> tuple[Site, ...]:
        """Where it reads; at a site that is written too, before the write."""

    def begin(self, rows: int, device: torch.device) -> Any:
        """A new state for a text of so many rows."""

    def read(self, site: Site, h: Tensor, tokens: Tokens, state: Any) -> None:
        """Take what it needs of the activations [b, t, d] of one pass; it must not keep or change them."""

    def decides(self, tokens: Tokens, state: Any) -> bool:
        """Whether the pass that is about to run, or is running, holds what decides and has not been read yet."""

    def write(self, site: Site, h: Tensor, prepared: Prepared, tokens: Tokens, state: Any) -> Tensor:
        """As `Method.edit`; rows that are left alone come back bitwise."""

    def finish(self, state: Any) -> Tensor | bool:
        """Which rows [b] the deciding pass has to be run again for; False for none, True for all."""

    def explain(self, found: Mapping[Site, Tensor], strength: float) -> list[dict[str, Any]]:
        """What it would decide about activations [b, d] of each read site, per row, as JSON can hold it."""
