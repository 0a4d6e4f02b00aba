"""Reading activations: model + prompts + sites -> `Activations`, in one pass per batch for all sites.

The decoder body runs without its LM head and stops after the deepest site. Texts are sorted by length and padded at the
right, where pads change nothing that is read. Pads and each row's first real token never enter a mean or a norm: some
models park activations a thousand times the usual size on the first token (arXiv 2402.17762).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from steerkit.activations.reading import Reads, forward_body, read_passes
from steerkit.activations.readout import Readout, chosen_columns, cut_to
from steerkit.activations.token_scale import TokenScale
from steerkit.errors import DataError, FitError, SiteError
from steerkit.network.context import check_lengths, name_of, named
from steerkit.network.decoder import execution_device, find_decoder
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.prompts.batching import Batch, batches, pad_token_id
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import Rendered, render

__all__ = ["Activations", "check_finite", "record", "record_ids", "rendered_items", "warn_of_special"]

logger = logging.getLogger(__name__)
Item = str | Sequence[Mapping[str, str]] | Conversation | Rendered


@dataclass(frozen=True)
class Activations:
    """What was read, in the order of the items given.

    Attributes:
        positive: per site [n, d] float32 on the CPU (all items, where the data has no sides).
        negative: per site [m, d]; empty where the data has no sides.
        scales: per site how long activations are.
        readout: which tokens were read.
        paired: row `i` of both sides belong together.
        items: by side which item of the data each row [n] is of, positive ones counted first; None where rows stand as
            the data does. For fits that go back to the items.
    """

    positive: Mapping[Site, Tensor]
    negative: Mapping[Site, Tensor]
    scales: Mapping[Site, TokenScale] = field(default_factory=dict)
    readout: str = "last"
    paired: bool = False
    items: tuple[Tensor, Tensor] | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites read."""
        return tuple(self.positive)

    @property
    def norms(self) -> dict[Site, float]:
        """Per site the median token norm, without pads and each row's first token."""
        return {site: scale.norm for site, scale in self.scales.items()}

    def __getitem__(self, site: Site | str | int) -> Tensor:
        key = Site.of(site)
        if key not in self.positive:  # where no post-norm follows, a raw output is kept under its canonical name
            key = Site(key.layer, key.kind.replace("_raw", "_out"))
        if key not in self.positive:
            raise SiteError(f"{site}: not recorded; there are {', '.join(map(str, self.positive))}")
        return torch.cat([self.positive[key], self.negative[key]]) if key in self.negative else self.positive[key]


def record(
    model: nn.Module,
    tokenizer: Any,
    data: ContrastSet | Sequence[Item],
    sites: Iterable[Site | str | int],
    *,
    readout: str | int | tuple[int, int] = "last",
    batch_size: int = 16,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    padding_side: Literal["right", "left"] = "right",
    max_tokens: int | None = None,
    progress: bool = False,
    shares: bool = False,
    reads: Reads = read_passes,
) -> Activations:
    """Read activations of prompts, chats or a contrast set at some sites.

    Inside a `steer` context the steered model is read; scopes that depend on the prompt's end are then known only
    where `prompt_lengths` was given.

    Args:
        model: any decoder-only transformers model (wrapped by PEFT or not).
        tokenizer: its tokenizer; never changed.
        data: a contrast set, or prompts (strings, lists of chat messages, `Conversation`s).
        sites: where to read, such as ``Site(12, "resid_post")``, ``"resid_post.12"`` or 12, the same.
        readout: which tokens, see `Readout`.
        batch_size: rows per pass.
        chat_template_kwargs: passed on to the chat template.
        padding_side: where pads go; the result is the same.
        max_tokens: tokens of a text that are read, the rest being cut off at the right; None reads all.
        progress: show a progress bar on stderr.
        shares: run what texts have in common once: fewer tokens, and the same up to rounding instead of to the bit.
        reads: what runs the texts; the model itself where nothing else is named.

    Returns:
        One row per item and site, float32.

    Raises:
        DataError: an item has no token to be read, or more than the model has positions for.
        SiteError: a site does not exist in this model.
        FitError: an activation is not finite, with the site named.
    """
    decoder = find_decoder(model)
    wanted = list(map(Site.of, sites))
    sides = data if isinstance(data, ContrastSet) else None
    items: Sequence[Item] = (*sides.positive, *sides.negative) if sides is not None else cast("Sequence[Item]", data)
    rendered = [cut_to(rendered_items(tokenizer, item, chat_template_kwargs), max_tokens) for item in items]
    if not rendered:
        raise DataError("record: got no prompts; give at least one")
    if not wanted:
        raise SiteError("record: got no site; give at least one, such as 'resid_post.12'")
    plan = Readout.parse(readout)
    work = batches(rendered, batch_size, pad_id=pad_token_id(tokenizer), side=padding_side, alike=shares)
    taps = locate(model, wanted)
    found: dict[Site, Tensor] = {}

    def keep(site: Site, rows: Tensor, batch: Batch) -> None:
        if site not in found:
            found[site] = torch.empty(len(rendered), rows.shape[-1], dtype=torch.float32)
        found[site][list(batch.rows)] = rows.cpu()

    count = len(sides.positive) if sides is not None else len(rendered)

    def name(row: int) -> str:
        side = "" if sides is None else "positive " if row < count else "negative "
        return f"{side}row {row if row < count else row - count}"

    def shown(row: int) -> str:
        side = "" if sides is None else "positive " if row < count else "negative "
        first, size = (0, count) if row < count else (count, len(rendered) - count)
        return name_of(f"{side}item", row - first, size, rendered[row])

    check_lengths(decoder, rendered, shown)
    chosen = chosen_columns(plan, rendered, name)
    scales = reads(decoder, taps, work, chosen, keep, progress, plan, shares=shares)
    warn_of_special(tokenizer, plan, rendered)
    check_finite(found)
    return Activations(
        positive={site: rows[:count] for site, rows in found.items()},
        negative={site: rows[count:] for site, rows in found.items()} if sides is not None else {},
        scales=scales,
        readout=str(plan),
        paired=sides is not None and sides.paired,
    )


def record_ids(model: nn.Module, rows: Sequence[Sequence[int]], sites: Iterable[Site]) -> dict[Site, list[Tensor]]:
    """Activations of every token of rows of ids, each row on its own, nothing masked.

    Args:
        model: any decoder-only transformers model.
        rows: token ids.
        sites: where to read.

    Returns:
        per canonical site one [t, d] float32 tensor for each row, on the CPU.

    Raises:
        DataError: a row is longer than the model has positions for.
        FitError: an activation is not finite, with the site named.
    """
    decoder = find_decoder(model)
    taps = locate(model, sites)
    found: dict[Site, list[Tensor]] = {site: [] for site in taps}
    texts = [Rendered("", tuple(ids), len(ids), ()) for ids in rows]
    check_lengths(decoder, texts, named("text", texts))
    for ids in rows:
        inputs = torch.tensor([list(ids)], device=execution_device(decoder), dtype=torch.long)

        def keep(site: Site, h: Tensor) -> None:
            # A copy in any case: Falcon adds into such a tensor in place afterwards.
            found[site].append(h[0].detach().to("cpu", torch.float32, copy=True))

        forward_body(decoder, taps, inputs, torch.ones_like(inputs), keep)
    for site, kept in found.items():
        check_finite({site: torch.cat(kept)})
    return found


def rendered_items(tokenizer: Any, item: Item, chat_template_kwargs: Mapping[str, Any] | None) -> Rendered:
    """One item as the model reads it; what is rendered already comes back as it is.

    Args:
        tokenizer: the model's tokenizer.
        item: a prompt, a list of chat messages, a conversation, or a rendered text.
        chat_template_kwargs: passed on to the chat template.
    """
    if isinstance(item, Rendered):
        return item
    return render(tokenizer, Conversation.of(item), chat_template_kwargs=chat_template_kwargs)


def warn_of_special(tokenizer: Any, plan: Readout, rendered: Sequence[Rendered]) -> None:
    """Warn where only special tokens are read, the same few in every text.

    Args:
        tokenizer: the model's tokenizer.
        plan: which tokens are read.
        rendered: the texts.
    """
    if plan.kind not in ("last", "index", "prompt_last"):
        return
    special = set(getattr(tokenizer, "all_special_ids", None) or [])
    read = {text.ids[plan.tokens(text)[0]] for text in rendered}
    if read and read <= special:
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in sorted(read))
        warnings.warn(
            f"readout '{plan}' reads only template tokens ({names}); choose another one if the text is meant",
            stacklevel=3,
        )


def check_finite(found: Mapping[Site, Tensor]) -> None:
    """Refuse activations that are not finite.

    Args:
        found: per site [n, d].

    Raises:
        FitError: some are not, with the site named.
    """
    for site, rows in found.items():
        if not bool(torch.isfinite(rows).all()):
            raise FitError(f"{site}: activations are not finite; load the model in float32 or bfloat16")
