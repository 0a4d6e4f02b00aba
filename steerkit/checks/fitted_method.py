"""A method fitted on a model, with the passes that its conformance checks compare."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerkit.activations.reading import position_inputs
from steerkit.methods._base import Method
from steerkit.methods._protocols import Gated, ReadsInput
from steerkit.network.decoder import execution_device, find_decoder, inner_model
from steerkit.prompts.batching import batches, pad_token_id
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation, Prompt
from steerkit.prompts.rendering import render
from steerkit.steering.steering import steer
from steerkit.tokens.forward_pass import Pass
from steerkit.tokens.scope import PromptLengths, Scope
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["TEXTS", "Finding", "FittedMethod"]

TEXTS = ("a short one", "a text that is a good deal longer than the first one", "the third of them")


class Finding(NamedTuple):
    """What one check found.

    Attributes:
        check: its name.
        passed: whether the method holds it.
        reason: what was seen where it does not, or why it was not applicable.
    """

    check: str
    passed: bool
    reason: str


@dataclass(frozen=True)
class FittedMethod:
    """A method fitted on a model, ready to be checked."""

    method: Method
    model: nn.Module
    tokenizer: Any
    data: ContrastSet | Sequence[Prompt]
    vector: SteeringVector
    strength: float = 1.0

    def logits(self, ids: Tensor, mask: Tensor, vector: SteeringVector | None, strength: Any = None) -> Tensor:
        """[b, t, v] logits of one plain forward pass, steered where a vector is given."""
        lengths = (mask.sum(dim=1) - 1).clamp_min(1)
        used = self.strength if strength is None else strength
        context: Any = steer(self.model, vector, used, prompt_lengths=lengths) if vector else contextlib.nullcontext()
        more = position_inputs(inner_model(self.model), mask)
        with context, torch.no_grad():
            found: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits
        return found

    def edited(
        self, facts: Pass, scope: Scope, dtype: torch.dtype, lengths: PromptLengths | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`prepare` and `edit` on random activations of one pass, as they would be called at the first site.

        Args:
            facts: the pass, of b rows and t tokens.
            scope: which tokens are meant.
            dtype: of the activations.
            lengths: where the prompts end.

        Returns:
            What `edit` was given, what it gave, and a copy of the former from before, each [b, t, d].
        """
        generator = torch.Generator().manual_seed(0)

        def drawn(width: int) -> Tensor:
            shape = facts.batch, facts.width, width
            return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)

        site = self.vector.sites[0]
        h = drawn(self.vector.widths.get(site, self.vector.hidden_size))
        before = h.clone()
        strength = torch.tensor(self.strength, dtype=torch.float32)
        prepared = self.method.prepare(self.vector.params(site), strength, dtype, h.device)
        inputs = self.method.inputs_at(self.model, self.vector) if isinstance(self.method, ReadsInput) else {}
        if site in inputs:
            prepared["input"] = drawn(inputs[site].width)
        return h, self.method.edit(h, prepared, facts.tokens(scope, lengths)), before

    def rows(self, side: str = "right") -> tuple[Tensor, Tensor]:
        """Ids and mask of the check's texts in one padded batch, in their order.

        Of a gated method the middle one is a prompt it was fitted on, and one token: a gate may pass over the others.

        Args:
            side: where the pads are.

        Returns:
            [b, t] ids and [b, t] mask.
        """
        rendered = [render(self.tokenizer, Conversation(text, raw=True)) for text in TEXTS]
        if isinstance(self.method, Gated) and isinstance(self.data, ContrastSet):
            prompt = max((render(self.tokenizer, item) for item in self.data.positive), key=lambda item: len(item.ids))
            rendered[1] = replace(prompt, ids=(*prompt.ids, prompt.ids[0]))
        batch = batches(rendered, len(TEXTS), pad_id=pad_token_id(self.tokenizer), side=side)[0]  # type: ignore[arg-type]
        order = torch.tensor(batch.rows, dtype=torch.long).argsort()
        device = execution_device(find_decoder(self.model))
        return batch.input_ids[order].to(device), batch.attention_mask[order].to(device)

    def alone(self, vector: SteeringVector | None) -> list[Tensor]:
        """[t, v] logits of each text on its own."""
        ids, mask = self.rows()
        return [
            self.logits(ids[row : row + 1, :length], mask[row : row + 1, :length], vector)[0]
            for row, length in enumerate(mask.sum(dim=1).tolist())
        ]
