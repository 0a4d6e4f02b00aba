"""The model a doctor's checks run on, with its texts, its random vector and the passes they share."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from steerkit.activations.reading import position_inputs
from steerkit.activations.recording import record
from steerkit.activations.token_scale import TokenScale
from steerkit.errors import SiteError, SteerError
from steerkit.network.decoder import Decoder, execution_device, inner_model
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.prompts.batching import batches, pad_token_id
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import Rendered, render
from steerkit.steering.steering import steer
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["NEW", "Case", "Given"]

TEXTS = ("The weather today is very", "An old cat sat on the wooden chair by the door")
_LOOKED_AT = 32
SIZE = 0.5
"""Length of the direction, in typical activation norms."""
NEW = 4
"""Tokens generated."""
Given = float | Sequence[float] | None
"""A strength, one for each row, or None for the baseline model."""


@dataclass(frozen=True, eq=False)
class Case:
    """A model on which the checks run, with what they share.

    Attributes:
        model: what is called: the caller's model, out of wrappers that cannot generate.
        tokenizer: its tokenizer.
        compiled: compile for real, with the default backend.
        decoder: the text decoder inside.
        data: items whose texts are read; None takes plain sentences.
        given: a vector of the user's or several, for the checks that ask about one.
        strength: at which it is applied; None takes its own.
    """

    model: Any
    tokenizer: Any
    compiled: bool
    decoder: Decoder
    data: ContrastSet | None = None
    given: SteeringVector | Sequence[SteeringVector] | None = None
    strength: float | None = None
    passes: dict[Any, Tensor] = field(default_factory=dict, repr=False)
    """Plain passes that several checks compare with."""

    @cached_property
    def texts(self) -> list[Rendered]:
        """The texts, of unequal length: of the data a short item and the next longer one."""
        items = [Conversation(text, raw=True) for text in TEXTS]
        if self.data is not None:
            items = [*self.data.positive[:_LOOKED_AT], *self.data.negative[:_LOOKED_AT]]
        rendered = sorted((render(self.tokenizer, item) for item in items), key=lambda text: len(text.ids))
        first, longest = rendered[0], rendered[-1]
        return [first, next((text for text in rendered if len(text.ids) > len(first.ids)), longest)]

    @cached_property
    def prompts(self) -> list[int]:
        """How many tokens of each text count as its prompt, where a whole text is scored."""
        return [max(1, len(text.ids) // 2) for text in self.texts]

    @cached_property
    def site(self) -> Site:
        """Where the direction is added: after a middle block, or in it where several streams pass between blocks."""
        middle = (self.decoder.num_layers - 1) // 2
        for kind in ("resid_post", "mlp_raw", "attn_raw"):
            with contextlib.suppress(SiteError):
                return next(iter(locate(self.model, [Site(middle, kind)])))
        return Site(middle)  # each check says why it is not to be had

    @cached_property
    def scale(self) -> TokenScale | None:
        """How long activations are where the direction is added; None where they cannot be read."""
        try:
            return record(self.model, self.tokenizer, self.texts, [self.site], readout="mean").scales[self.site]
        except SteerError:  # `sites` says why; the other checks still want a direction
            return None

    @cached_property
    def vector(self) -> SteeringVector:
        """A random direction, always the same one for the same model."""
        norm = self.decoder.hidden_size**0.5 if self.scale is None else self.scale.norm
        return self.random_vector([self.site], {self.site: SIZE * norm}, scope="response")

    @property
    def tolerance(self) -> float:
        """Largest difference that rounding explains, in units of the largest logit.

        1e-4 in float32. In the half types one rounding is that large already: they add up like a random walk over the
        roundings of some tens of blocks, so a few times the spacing of the type.
        """
        return max(1e-4, 8 * torch.finfo(self.decoder.model.dtype).eps)

    def random_vector(self, sites: Sequence[Site], lengths: dict[Site, float], scope: str) -> SteeringVector:
        """Random directions of given lengths."""
        generator = torch.Generator().manual_seed(0)
        widths = {site: tap.width for site, tap in locate(self.model, sites).items()}
        drawn = {site: torch.randn(width, generator=generator, dtype=torch.float32) for site, width in widths.items()}
        tensors = {f"{site}/direction": lengths[site] * one / one.norm() for site, one in drawn.items()}
        return SteeringVector(
            method="caa",
            tensors=tensors,
            sites=tuple(widths),
            edit="add",
            scope=scope,
            unit="paper",
            model_type=self.decoder.model.config.get_text_config().model_type,
            hidden_size=self.decoder.hidden_size,
            num_layers=self.decoder.num_layers,
            widths={site: width for site, width in widths.items() if width != self.decoder.hidden_size},
        )

    def row(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Ids and mask [1, t] of one row."""
        made = torch.tensor([list(ids)], device=execution_device(self.decoder), dtype=torch.long)
        return made, torch.ones_like(made)

    def rows(self, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
        """Ids and mask [b, t] of the texts in one padded batch, in their order."""
        batch = batches(self.texts, len(self.texts), pad_id=pad_token_id(self.tokenizer), side=side)[0]
        order, device = torch.tensor(batch.rows, dtype=torch.long).argsort(), execution_device(self.decoder)
        return batch.input_ids[order].to(device), batch.attention_mask[order].to(device)

    def steered(self, strength: Given, lengths: Sequence[int] | None = None) -> Any:
        """The context of a steered pass, or of an unsteered one."""
        if strength is None:
            return contextlib.nullcontext()
        return steer(self.model, self.vector, strength, prompt_lengths=lengths)

    def logits(self, ids: Tensor, mask: Tensor, strength: Given, lengths: Sequence[int] | None = None) -> Tensor:
        """[b, t, v] logits of one plain forward pass."""
        more = position_inputs(inner_model(self.model), mask)
        with self.steered(strength, lengths), torch.no_grad():
            found: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits
        return found

    def batch(self, strength: Given) -> Tensor:
        """[b, t, v] logits of the texts, padded at the right."""
        return self.logits(*self.rows("right"), strength, self.prompts)

    def alone(self, ids: Sequence[int], prompt: int, strength: float | None) -> Tensor:
        """[t, v] logits of one row without pads in one plain pass; made once."""
        key = (tuple(ids), prompt, strength)
        if key not in self.passes:
            self.passes[key] = self.logits(*self.row(ids), strength, [prompt])[0]
        return self.passes[key]

    def generate(self, strength: Given, **options: Any) -> Any:
        """Answer the texts as a left-padded batch; nothing of the model's own settings changes the scores."""
        ids, mask = self.rows("left")
        settings: dict[str, Any] = {
            "max_new_tokens": NEW,
            "min_new_tokens": NEW,
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
            "repetition_penalty": 1.0,
            "pad_token_id": pad_token_id(self.tokenizer),
            "return_dict_in_generate": True,
        }
        with self.steered(strength), torch.no_grad():
            return self.model.generate(input_ids=ids, attention_mask=mask, **{**settings, **options})
