"""One learned coefficient for each tensor of each task vector: which parts of a finetuning carry a behaviour.

    theta_b = theta_base,b + sum_i c_ib tau_ib           the model frozen, every c_ib 0 at the start
    loss    = mean over pairs of softplus(-margin) + penalty * mean |c|

Zhang, Albert, Rodriguez-Opazo, van den Hengel, Abbasnejad (2024), "Knowledge Composition using Task Vectors with
Learned Anisotropic Scaling" (aTLAS), arXiv 2407.02880: the parametrisation, AdamW with rate 1e-3 and decay 0.1. Where
this file departs: what is learned on is a contrast set, so the loss is of its pairs, margin being the preference margin
(mean log-probability per token of the positive answer minus that of the negative one); differences are float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerkit._support.precision import full_precision
from steerkit.activations.reading import position_inputs
from steerkit.errors import DataError, ModelError
from steerkit.evaluate.scorers.preference_margin import PreferenceMargin
from steerkit.evaluate.setup import Setup
from steerkit.fitting.training import frozen, minimise
from steerkit.methods._subject import Schedule
from steerkit.network.block_trace import evaluation_mode
from steerkit.network.decoder import execution_device, find_decoder, inner_model
from steerkit.network.plain_weights import refuse_packed
from steerkit.prompts.batching import Batch, batches, pad_token_id
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.rendering import Rendered
from steerkit.tuning.task_vector import TaskVector

__all__ = ["SCHEDULE", "Learned", "Weighted", "learn_coefficients"]

SCHEDULE = Schedule(epochs=10, batch_size=128, rate=1e-3, decay=0.1)
"""The paper's. Few steps of it move a coefficient by a few hundredths; small sets want a larger rate."""


class Learned(NamedTuple):
    """What was learned.

    Attributes:
        coefficients: for each task vector, the name of each of its tensors to its coefficient.
        vector: the sum of the task vectors with these.
        history: the mean loss of each epoch.
    """

    coefficients: tuple[Mapping[str, float], ...]
    vector: TaskVector
    history: tuple[float, ...]


def learn_coefficients(
    model: nn.Module,
    tokenizer: Any,
    vectors: Sequence[TaskVector],
    data: ContrastSet,
    *,
    schedule: Schedule = SCHEDULE,
    penalty: float = 0.0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Learned:
    """Learn with what coefficients task vectors make the positive answers of a contrast set likelier.

    Args:
        model: the vectors' base, in memory and not quantised; it stays as it is.
        tokenizer: its tokenizer.
        vectors: what is combined; their differences are in memory meanwhile.
        data: pairs of answers to the same prompts.
        schedule: how long and how fast; `batch_size` counts pairs.
        penalty: what the mean absolute coefficient costs, in nats; with some, blocks that do little fall to 0.
        chat_template_kwargs: passed on to the chat template.

    Returns:
        The coefficients, and the task vector that they make.

    Raises:
        DataError: there is no vector, or a pair lacks an answer or has two prompts.
        ModelError: the model lacks a weight that differs, or it is offloaded or quantised.
        FitError: the loss is not finite.

    Example:
        learned = learn_coefficients(base, tokenizer, [tau], data, schedule=Schedule(epochs=10, rate=0.05))
    """
    setup = Setup(model, tokenizer, data, chat_template_kwargs=chat_template_kwargs)
    texts = PreferenceMargin().texts(setup)
    weighted = Weighted(model, vectors)
    values = weighted.zeros()

    def loss(rows: Tensor) -> Tensor:
        chosen = [texts[2 * row + side] for row in rows.tolist() for side in (0, 1)]
        margins = PreferenceMargin().of_items(weighted.mean_log_probs(values, chosen, pad_token_id(tokenizer)))
        return nn.functional.softplus(-margins).mean() + penalty * values.abs().mean()

    with frozen(weighted.inner), evaluation_mode(weighted.inner):
        history = minimise([values], loss, len(texts) // 2, schedule, progress="coefficients")
    learned = weighted.named(values.detach())
    parts = [vector.weighted(one) for vector, one in zip(vectors, learned, strict=True)]
    return Learned(learned, sum(parts[1:], parts[0]), tuple(history))


class Weighted:
    """A model whose weights depend on coefficients, one for each tensor of each task vector.

    Args:
        model: the vectors' base; it stays as it is.
        vectors: what is combined.

    Raises:
        DataError: there is no vector.
        ModelError: the model lacks a weight that differs, or it is offloaded, packed or of another shape.
    """

    def __init__(self, model: nn.Module, vectors: Sequence[TaskVector]) -> None:
        if not vectors:
            raise DataError("coefficients: got no task vector; give at least one")
        self.inner: Any = inner_model(model)
        refuse_packed(self.inner)
        self._device = execution_device(find_decoder(model))
        self._weights = dict(self.inner.named_parameters(remove_duplicate=False))
        self._places: list[tuple[int, str]] = []
        self._parts: dict[str, list[tuple[int, Tensor]]] = {}
        for number, vector in enumerate(vectors):
            for name, shape in vector.shapes.items():
                weight = self._weights.get(name)
                if weight is None or weight.is_meta or tuple(weight.shape) != shape or not weight.is_floating_point():
                    held = "none" if weight is None else "offloaded" if weight.is_meta else str(list(weight.shape))
                    raise ModelError(
                        f"the task vector changes {name} of {list(shape)}, and {type(self.inner).__name__} has {held}; "
                        "give its own base model, in memory and without an adapter"
                    )
                part = len(self._places), vector.difference(name).to(weight.device)
                self._parts.setdefault(name, []).append(part)
                self._places.append((number, name))
        self._count = len(vectors)

    def zeros(self) -> Tensor:
        """Coefficients [k], all 0, that take gradients."""
        return torch.zeros(len(self._places), dtype=torch.float32, device=self._device, requires_grad=True)

    def named(self, values: Tensor) -> tuple[dict[str, float], ...]:
        """Coefficients by task vector and tensor.

        Args:
            values: [k].
        """
        found: tuple[dict[str, float], ...] = tuple({} for _ in range(self._count))
        for (number, name), value in zip(self._places, values.tolist(), strict=True):
            found[number][name] = value
        return found

    def logits(self, values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Run the model with coefficients, with gradients for these.

        Args:
            values: [k].
            input_ids: [b, t].
            attention_mask: [b, t].

        Returns:
            [b, t, v].
        """
        weights = {}
        for name, parts in self._parts.items():
            old = self._weights[name].detach()
            wide = torch.promote_types(old.dtype, torch.float32)
            change = sum(values[place].to(tau.device) * tau.to(wide) for place, tau in parts)
            weights[name] = (old.to(wide) + change).to(old.dtype)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        given |= position_inputs(self.inner, attention_mask)
        found: Tensor = torch.func.functional_call(self.inner, weights, kwargs=given).logits
        return found

    def mean_log_probs(self, values: Tensor, texts: Sequence[Rendered], pad_id: int) -> Tensor:
        """Mean log-probability of the tokens of each answer, with gradients for the coefficients.

        Args:
            values: [k].
            texts: with answers.
            pad_id: what rows are padded with.

        Returns:
            [n] float32.
        """
        (batch,) = batches(texts, len(texts), pad_id=pad_id)
        ids, mask = batch.input_ids.to(self._device), batch.attention_mask.to(self._device)
        logits = self.logits(values, ids, mask)
        with full_precision():
            logs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
            chosen = logs.gather(-1, ids[:, 1:, None])[..., 0]  # [b, t - 1], of the token behind each place
            counted = _answered(batch).to(self._device)[:, 1:]
            means = (chosen * counted).sum(dim=1) / counted.sum(dim=1)
        return means[torch.tensor(batch.rows, dtype=torch.int64, device=self._device).argsort()]


def _answered(batch: Batch) -> Tensor:
    """[b, t] float32, 1 on the tokens of answers; rows are padded at the right."""
    places = torch.arange(batch.input_ids.shape[1])[None]
    return ((places >= batch.prompt_lengths[:, None]) & (batch.attention_mask > 0)).float()
