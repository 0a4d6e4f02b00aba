"""TuCo: how much of what a prompt's end is made of comes from finetuning, one number per prompt.

    TuCo = |sum_l FTC_l[n]| / (|sum_l PTC_l[n]| + |sum_l FTC_l[n]|)          n: the prompt's last token

PTC and FTC as in `pair`, sums over blocks, before the final norm; |.| is the L1 norm. Nuti, Franzmeyer, Henriques
(2025), "TuCo: Measuring the Contribution of Fine-Tuning to Individual Responses of LLMs". Where this file departs: the
same with the L2 norm, and without the dimensions that are massive there, which dominate an L1 norm too; and a profile
by block, |FTC_l| / (|PTC_l| + |FTC_l|), which tells where finetuning has acted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steerkit._support.precision import full_precision
from steerkit.activations.reading import forward_body
from steerkit.activations.token_scale import PassScale, TokenScales
from steerkit.errors import DataError
from steerkit.evaluate.intervals import Estimate, interval
from steerkit.monitor.items import Item, conversation_of
from steerkit.network.decoder import execution_device
from steerkit.network.sites import Site
from steerkit.prompts.batching import Batch, batches, pad_token_id, run_batches
from steerkit.steering.readings import rendered_to_read
from steerkit.tuning.pair import Pair

__all__ = ["Contribution", "contribution"]


@dataclass(frozen=True, eq=False)
class Contribution:
    """What finetuning contributes to the ends of prompts.

    Attributes:
        values: [n] TuCo of each prompt with the L1 norm, from 0 to 1; 0 where the models are the same.
        l2: [n] the same with the L2 norm.
        without_massive: [n] the same with the L1 norm, massive dimensions left out.
        massive: those dimensions of the last block's output, with their share of the mean squared norm.
        tuned: [n, blocks] L1 norm of what finetuning adds in each block.
        plain: [n, blocks] L1 norm of what the base block adds.
    """

    values: Tensor
    l2: Tensor
    without_massive: Tensor
    massive: Mapping[int, float]
    tuned: Tensor
    plain: Tensor

    @property
    def estimate(self) -> Estimate:
        """The mean over prompts with its 95 % interval."""
        return interval(self.values, shares=False)

    @property
    def profile(self) -> Tensor:
        """[blocks] the mean share of finetuning in what each block adds: where it has acted."""
        return _share(self.tuned, self.plain).mean(dim=0)


def contribution(
    model: nn.Module,
    base: nn.Module | None,
    tokenizer: Any,
    prompts: Sequence[Item],
    *,
    raw: bool = False,
    batch_size: int = 16,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Contribution:
    """Measure what finetuning contributes to each prompt, at its last token, generation header included.

    Args:
        model: the finetuned transformers model, or a PEFT model.
        base: the model before finetuning, on the same device; None switches the adapters of `model` off block by block.
        tokenizer: of both.
        prompts: what is read; answers are left out.
        raw: leave string prompts as they are, without the chat template.
        batch_size: rows per pass.
        chat_template_kwargs: passed on to the chat template.

    Returns:
        One number per prompt, and a profile over blocks.

    Raises:
        DataError: there is no prompt, or one cannot be read.
        ModelError: as for `Pair`.
        SiteError: the model's residual stream is not one vector for each token.

    Example:
        steerkit.tuning.contribution(tuned, base, tokenizer, ["How are you?"]).values
    """
    if isinstance(prompts, str) or not prompts:
        raise DataError("tuning contribution: give a list of prompts, with at least one")
    pair = Pair(model, base)
    listed = [conversation_of(item, raw=raw) for item in prompts]
    texts = rendered_to_read(pair.decoder, tokenizer, listed, "prompt_last", chat_template_kwargs)
    count, blocks, width = len(texts), pair.decoder.num_layers, pair.decoder.hidden_size
    sums = torch.zeros(2, count, width, dtype=torch.float32)
    norms = torch.zeros(2, count, blocks, dtype=torch.float32)
    scales = TokenScales()
    work = batches(texts, batch_size, pad_id=pad_token_id(tokenizer))
    for batch, (found, sizes, scale) in run_batches(work, lambda batch: _read(pair, batch)):
        rows = list(batch.rows)
        sums[:, rows], norms[:, rows] = found.cpu(), sizes.cpu()
        scales.add(scale)
    massive = scales.result().massive
    kept = torch.tensor([place not in massive for place in range(width)], dtype=torch.bool)
    plain, tuned = sums
    return Contribution(
        _share(tuned.abs().sum(1), plain.abs().sum(1)),
        _share(torch.linalg.vector_norm(tuned, dim=1), torch.linalg.vector_norm(plain, dim=1)),
        _share(tuned[:, kept].abs().sum(1), plain[:, kept].abs().sum(1)),
        massive,
        norms[1],
        norms[0],
    )


def _read(pair: Pair, batch: Batch) -> tuple[Tensor, Tensor, PassScale]:
    """What base and finetuning add to the last token: sums over blocks [2, b, d], and norms [2, b, blocks]."""
    device = execution_device(pair.decoder)
    mask = batch.attention_mask.to(device)
    last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
    rows = torch.arange(len(mask), device=device)
    sums = torch.zeros(2, len(mask), pair.decoder.hidden_size, dtype=torch.float32, device=device)
    sizes: list[Tensor] = []
    scales: list[PassScale] = []

    def add(_layer: int, read: Tensor, plain: Tensor, tuned: Tensor) -> None:
        with full_precision():
            before, first, second = (
                one[rows.to(one.device), last.to(one.device)].float() for one in (read, plain, tuned)
            )
            parts = torch.stack([first - before, second - first]).to(device)
            sums.add_(parts)
            sizes.append(parts.abs().sum(dim=-1))

    def notice(_site: Site, h: Tensor) -> None:
        counted = mask.to(h.device, torch.float32)
        counted[rows.to(h.device), mask.argmax(dim=1).to(h.device)] = 0.0
        scales.append(PassScale.of(h, counted))

    tap = pair.taps[-1]
    with pair.hooked(add):
        forward_body(pair.decoder, {tap.site: tap}, batch.input_ids.to(device), mask, notice)
    return sums, torch.stack(sizes, dim=-1), scales[0]


def _share(part: Tensor, rest: Tensor) -> Tensor:
    """The share part / (part + rest), 0 where both are 0."""
    return torch.where(part > 0, part / (part + rest), 0.0)
