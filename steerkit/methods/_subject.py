"""`Subject`: what a method's `fit` may ask of the model. `steerkit.fitting` gives it; a method gets no other hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from steerkit.network.decoder import Decoder
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.activations.expert_activations import ExpertMeans
    from steerkit.activations.recording import Activations
    from steerkit.methods._base import Method
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.prompts.conversation import Conversation
    from steerkit.prompts.rendering import Rendered

__all__ = ["Read", "Schedule", "Subject"]

Read = Callable[[Any], Tensor]
"""From a readout to the rows [n + m, d] of all items, the positive ones first."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast parameters are trained.

    Attributes:
        epochs: passes over the items, each of which is seen once in a pass, in an order drawn anew.
        batch_size: items in a batch.
        rate: learning rate.
        decay: weight decay.
        seed: of the order.
        patience: epochs without a better judgement before it ends; None never ends early.
        clip: length to which the gradient of all parameters together is clipped; None leaves it.
    """

    epochs: int
    batch_size: int = 32
    rate: float = 1e-3
    decay: float = 0.0
    seed: int = 0
    patience: int | None = None
    clip: float | None = 1.0


class Subject(Protocol):
    """The only door through which `Method.fit` reaches the model; `steerkit.fitting` gives it."""

    @property
    def decoder(self) -> Decoder:
        """The model's decoder."""

    @property
    def data(self) -> ContrastSet:
        """What the method is fitted on."""

    @property
    def prompts(self) -> tuple[Conversation, ...]:
        """The prompts of what it is fitted on, each once, without answers; all that a method of `PROMPTS` may read."""

    @property
    def batch_size(self) -> int:
        """Rows per pass that the user wants at the most."""

    def rendered(self, items: Sequence[Any]) -> list[Rendered]:
        """Items as the model reads them."""

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a text, without special tokens (so without a BOS)."""

    def unembedding(self) -> Tensor:
        """The output embedding [v, d], float32, on the CPU: row `t` reads the logit of token `t` off the stream."""

    def answers(self, items: Sequence[Any], *, max_new_tokens: int) -> list[str]:
        """What the model, unsteered and greedy, answers to each item."""

    def record(
        self, items: Sequence[Any], sites: Sequence[Site], *, readout: Any = None, under: SteeringVector | None = None
    ) -> Activations:
        """Read activations of texts, steered by `under` where given; where no readout is named, as the user wants.

        The user's is the `readout` of `fit`, else the method's own.
        """

    def vector(
        self,
        method: Method,
        tensors: Mapping[str, Tensor],
        sites: Sequence[Site],
        *,
        scope: str | None = None,
    ) -> SteeringVector:
        """A vector to try on this model, for `under=`.

        Args:
            method: what applies it.
            tensors: ``"<site>/<param>"`` to tensor, of any shape that the method's `params` name.
            sites: where it is applied.
            scope: which tokens are written; None takes the method's own.
        """

    def advance(
        self, method: Method, sites: Sequence[Site], fit_one: Callable[[Site, Read], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Fit site by site in the order of a pass, each on the data as all sites before it have changed it.

        `fit_one` gets a site and what reads it (`Read`). It gives the site's tensors by name, of any shape, under which
        the later sites are read, at strength 1 and in the method's own scope.
        """

    def logits(self, items: Sequence[Any], *, under: SteeringVector | None = None) -> Tensor:
        """Next-token logits [n, v] behind each item, steered by `under` where given."""

    def shifted(
        self, items: Sequence[Any], shifts: Mapping[Site, Tensor], *, prompts: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [b, t, v] of texts whose answers are written with shifts [b, d], ids, and which predict the answer."""

    def read_shifted(self, items: Sequence[Any], shifts: Mapping[Site, Tensor], site: Site) -> tuple[Tensor, Tensor]:
        """Activations [b, t, d] behind shifts [b, d] of every token, with gradients, and which [b, t] are no pads."""

    def train(
        self,
        parameters: Sequence[Tensor],
        loss: Callable[[Tensor], Tensor],
        items: int,
        schedule: Schedule,
        *,
        judge: Callable[[], float] | None = None,
        title: str = "training",
    ) -> list[float]:
        """Train parameters of any shape in place, the model frozen; see `steerkit.fitting.training.minimise`."""

    def norms(self, sites: Sequence[Site]) -> dict[Site, float]:
        """Median token norms at sites that have been read, unsteered."""

    def pair_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids of the one pair of prompts the method is fitted on, with the BOS that the tokenizer puts in front.

        A bare text is read as it stands, without the chat template.
        """

    def filler_id(self, text: str) -> int:
        """Id of the one token that `text` is."""

    def record_ids(self, rows: Sequence[tuple[int, ...]], sites: Sequence[Site]) -> dict[Site, list[Tensor]]:
        """Activations [t, d] of every token of each row of ids, in the order of the rows, none of them masked.

        The rows are run as they are: no BOS is added.
        """

    def weight(self, site: Site) -> Tensor:
        """The matrix [o, i], float32, of the linear layer that writes at a site."""

    def experts(self, sites: Sequence[Site], readout: Any) -> dict[Site, ExpertMeans]:
        """What the experts read at those of the sites where routed ones write, as means over their own tokens."""

    def weight_digests(self, sites: Sequence[Site]) -> dict[str, str]:
        """What identifies the weights that write at some sites, by name."""
