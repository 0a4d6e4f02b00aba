"""What a method may have besides what every method has: each protocol is one thing that some methods need.

A method takes part by having the protocol's functions, without naming the protocol; whoever uses them asks with
`isinstance`. Shapes: b rows of the batch, t tokens of the pass, d width of the site, i what a module reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from steerkit.network.decoder import Decoder
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.activations.recording import Activations
    from steerkit.maths.rank_two import RankTwo
    from steerkit.methods._base import Method
    from steerkit.methods._subject import Subject
    from steerkit.network.tap import Tap
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.prompts.conversation import Conversation
    from steerkit.tokens.forward_pass import Tokens

__all__ = [
    "AddsFacts",
    "DrawsMaps",
    "Editor",
    "FindsSeveral",
    "Gated",
    "HasRankTwoForm",
    "HasWeightForm",
    "HeatMap",
    "LayerInput",
    "ListsParts",
    "Measured",
    "NeedsPrompt",
    "Params",
    "PartsTable",
    "Prepared",
    "PreparesData",
    "ReadsAlong",
    "ReadsInput",
    "SetsOperatingPoint",
    "TiedToWeights",
    "WeightUpdate",
    "editor_of",
    "read_direction",
]

Params = Mapping[str, Tensor]
Prepared = Mapping[str, Tensor]


class WeightUpdate(NamedTuple):
    """One exact change of a parameter.

    Attributes:
        name: the parameter's name in the transformers model; it may be a bias that is absent so far.
        update: from the old weight in float32 at least (None where the bias is absent) to the new one.
        separable: a dimension each slice along which `update` changes in the same way, without looking at the others,
            so that a large weight can be changed a few slices at a time; None where there is none.
    """

    name: str
    update: Callable[[Tensor | None], Tensor]
    separable: int | None = None


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


class Editor(Protocol):
    """A gate: it reads the activations of a prompt, decides for each row of the batch, and writes where it decided to.

    A model runs a text in several passes: one over the prompt, then one for every new token. `steering` calls a gate
    in this order. `begin` once for a new text. In each pass `read` at every site of `reads`, and `write` at every site
    of the vector. When the pass that holds the end of the prompt is over, `finish` tells which rows have to be run
    through it again: a gate that reads a late block knows only then that an earlier block should have been written.

    Everything a gate remembers of a text lies in the state that `begin` makes, so that one gate serves several texts.
    """

    @property
    def reads(self) -> tuple[Site, ...]:
        """Where it reads; at a site that is written too, it sees the activations before the write."""

    def begin(self, rows: int, device: torch.device) -> Any:
        """Make the state of a new text of so many rows, with nothing decided."""

    def read(self, site: Site, h: Tensor, tokens: Tokens, state: Any) -> None:
        """Take from the activations [b, t, d] of one pass what the decision needs, without keeping or changing them."""

    def decides(self, tokens: Tokens, state: Any) -> bool:
        """Whether this pass holds what the decision depends on, and the decision is still open."""

    def write(self, site: Site, h: Tensor, prepared: Prepared, tokens: Tokens, state: Any) -> Tensor:
        """Change the activations [b, t, d] as `Method.edit` does; rows that are left alone come back bitwise."""

    def finish(self, state: Any) -> Tensor | bool:
        """Which rows [b] the deciding pass has to be run again for; False for none, True for all."""

    def explain(self, found: Mapping[Site, Tensor], strength: float) -> list[dict[str, Any]]:
        """What it would decide about activations [b, d] of each read site, per row, as JSON can hold it."""


class LayerInput(Protocol):
    """Where a method is called that needs what a module reads, and how that is had."""

    @property
    def tap(self) -> Tap:
        """The module's output, where the method writes."""

    @property
    def width(self) -> int:
        """Width of what `__call__` gives."""

    def refresh(self) -> None:
        """Bring up to date what depends on where the module lies; called when attached and on a new strength."""

    def __call__(self, read: Tensor) -> Tensor:
        """From what the module was called with, [..., i], to what `Method.edit` finds in ``prepared["input"]``."""


@runtime_checkable
class Gated(Protocol):
    """A method that reads each prompt and decides by it which rows are steered, and how strongly."""

    def editor(self, vector: SteeringVector) -> Editor:
        """The gate of a vector: it reads at `vector.reads` and writes at `vector.sites`.

        Raises:
            VectorMismatchError: the vector lacks what the gate needs.
        """


@runtime_checkable
class HasRankTwoForm(Protocol):
    """A method whose edit moves every token inside the plane of two directions, by the token's coordinates in it."""

    def rank_two(self, params: Params) -> RankTwo:
        """The edit at one site as numbers, see `steerkit.maths.rank_two`."""


@runtime_checkable
class ReadsInput(Protocol):
    """A method whose change at a site depends on what the module that writes there reads.

    `Method.edit` then finds that in ``prepared["input"]``, [b, t, i]. A method whose settings decide whether it reads
    gives no place where it does not.
    """

    def inputs_at(self, model: nn.Module | Decoder, vector: SteeringVector) -> Mapping[Site, LayerInput]:
        """What is read at each of the vector's sites, by canonical site in the vector's order.

        Raises:
            SiteError: no module writes at a site alone.
        """


@runtime_checkable
class TiedToWeights(Protocol):
    """A method whose vectors fit the very weights that they were fitted on, and no others of the same size."""

    def check_model(self, vector: SteeringVector, decoder: Decoder) -> None:
        """Refuse other weights.

        Raises:
            VectorMismatchError: the model's weights are others than when the vector was fitted.
        """


@runtime_checkable
class NeedsPrompt(Protocol):
    """A method that cannot write prompts shorter than something in its vector."""

    def minimum_prompt(self, params: Params) -> int:
        """Prompt tokens that a row needs at the least, by the tensors of one site."""


@runtime_checkable
class HasWeightForm(Protocol):
    """A method some of whose vectors can be put into a model's weights, exactly."""

    def weight_updates(self, model: nn.Module, vector: SteeringVector, strength: float) -> list[WeightUpdate]:
        """The same change as weights; the strength counts in the vector's paper unit.

        Raises:
            StrengthError: this vector, or this strength, has no exact weight form.
            SiteError: this model has no place for it.
        """


@runtime_checkable
class Measured(Protocol):
    """A method that measures more on held-out items than how far its direction parts them."""

    def measure(self, vector: SteeringVector, held_out: Activations) -> dict[str, Any]:
        """Figures that JSON can hold, from both held-out sides at `vector.reads`, unsteered."""


@runtime_checkable
class SetsOperatingPoint(Protocol):
    """A gated method that opens from where calibration prompts say, and promises something by it."""

    def settled(self, vector: SteeringVector, data: ContrastSet, acts: Activations) -> SteeringVector:
        """The vector that has just been fitted on `data`, at its operating point.

        Raises:
            FitError: there are too few prompts to promise so much.
        """

    def calibrated(self, vector: SteeringVector, found: Mapping[Site, Tensor]) -> SteeringVector:
        """The vector at the operating point that activations [n, d] of ordinary prompts at its reads give.

        Raises:
            FitError: there are too few prompts to promise so much, or the method promises nothing.
        """

    def kinds(self, data: ContrastSet) -> dict[str, Tensor]:
        """``"ordinary"``, and each topic of negative prompts that is not, to [m] bool: where they stand."""

    def opens_above(self, vector: SteeringVector) -> float:
        """The score over which the gate opens."""

    def ordinary(self, data: ContrastSet) -> list[Conversation]:
        """The prompts that the promise is about: the negative side, but for topics that are counted beside."""

    def kept_apart(self, data: ContrastSet) -> list[Conversation]:
        """The prompts of what it was fitted on that the fit has not seen, to calibrate on."""

    def opened(self, vector: SteeringVector, data: ContrastSet, acts: Activations) -> dict[str, dict[str, int]]:
        """How many prompts open the gate, kind by kind, from both sides at `vector.reads`, unsteered."""


@runtime_checkable
class ReadsAlong(Protocol):
    """A method that reads along another direction than it writes, or along none."""

    def read_direction(self, params: Params) -> Tensor | None:
        """The direction [d] along which the two sides lie apart at a site of `vector.reads`; None without one."""


@runtime_checkable
class PreparesData(Protocol):
    """A method that reads its contrast set in a form of its own, such as balanced or without a chat template."""

    @property
    def longest_text(self) -> int | None:
        """Tokens of a text that are read at the most, the rest being cut off at the right; None reads all."""

    def contrast(self, data: ContrastSet) -> ContrastSet:
        """The items as the method reads them.

        Raises:
            DataError: the method cannot be fitted on such items.
        """


@runtime_checkable
class AddsFacts(Protocol):
    """A method whose vector files say something besides tensors and settings."""

    def extra(self, subject: Subject, sites: Sequence[Site]) -> dict[str, Any]:
        """Entries of `SteeringVector.extra`; ``{"weights": {name: digest}}`` ties the vector to these weights."""


@runtime_checkable
class FindsSeveral(Protocol):
    """A method that finds several directions in one fit, of which its vector applies the first."""

    def apart(self, vector: SteeringVector) -> list[SteeringVector]:
        """All of them, each as a vector of its own."""


@runtime_checkable
class ListsParts(Protocol):
    """A method whose vectors consist of parts that people can read in a table."""

    def table(self, vector: SteeringVector) -> PartsTable:
        """The parts, as `steerkit inspect` lists them."""


@runtime_checkable
class DrawsMaps(Protocol):
    """A method whose vectors consist of parts that can be drawn layer by layer."""

    def maps(self, vector: SteeringVector) -> list[HeatMap]:
        """Heat maps, as `steerkit inspect --plot` draws them."""


def editor_of(method: Method, vector: SteeringVector) -> Editor | None:
    """The gate of a vector; None where every row is steered alike.

    Args:
        method: the vector's method.
        vector: a vector of that method.

    Raises:
        VectorMismatchError: the vector lacks what the gate needs.
    """
    return method.editor(vector) if isinstance(method, Gated) else None


def read_direction(method: Method, params: Params) -> Tensor | None:
    """The direction along which the fitted sides lie apart where the vector reads.

    Args:
        method: the vector's method.
        params: the tensors of one site of `vector.reads`.

    Returns:
        [d]; None where there is no single one.
    """
    return method.read_direction(params) if isinstance(method, ReadsAlong) else method.direction(params)
