"""Reading activations: model + prompts + sites -> `Activations`, in one pass per batch for all sites.

The decoder body runs without its LM head and stops after the deepest site. Texts are sorted by length and padded at the
right, where pads change nothing that is read. Pads and each row's first real token never enter a mean or a norm: some
models park activations a thousand times the usual size on the first token (arXiv 2402.17762).
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from steerkit.data import Batch, ContrastSet, Conversation, Rendered, batches, pad_token_id, render
from steerkit.errors import DataError, FitError, SiteError
from steerkit.moments import Accumulator, NormMedian
from steerkit.probe_block import evaluation_mode
from steerkit.roles import outside_thinking
from steerkit.sites import Decoder, Site, Tap, execution_device, find_decoder, locate
from steerkit.tokens import PassClock

__all__ = [
    "Activations",
    "Readout",
    "execution_device",
    "forward_body",
    "position_inputs",
    "record",
    "record_ids",
    "stream",
]

logger = logging.getLogger(__name__)

Item = str | Sequence[Mapping[str, str]] | Conversation | Rendered
_COUNTED = re.compile(r"index\((-?\d+)\)|span\((\d+),(\d+)\)")
_NAMES = (
    "last",
    "mean",
    "prompt_last",
    "prompt_mean",
    "response_mean",
    "predicting_mean",
    "assistant_mean",
    "answer_mean",
)
_NEEDS_ANSWERS = ("response_mean", "predicting_mean", "span", "assistant_mean", "answer_mean")


@dataclass(frozen=True)
class Readout:
    """Which tokens of a text are read.

    `last` (of the rendered text: the generation prompt's last token, or the answer's), `mean` (all but the first),
    `prompt_last`, `prompt_mean`, `response_mean` (the answer's tokens), `predicting_mean` (the tokens from which the
    answer's are predicted: the prompt's last, and the answer's without its last), `assistant_mean` (the tokens of all
    assistant messages, those of the history too), `answer_mean` (the same without thinking and its marks), an index
    (negative ones count from the end), or a character span of the answer (`span(0,3)`, the end excluded).
    """

    kind: str
    start: int = 0
    stop: int = 0

    @classmethod
    def parse(cls, readout: str | int | tuple[int, int] | Readout) -> Readout:
        """Read a readout from what a caller writes.

        Args:
            readout: a name, a token index, a (start, stop) character span of the answer, or the text of either.

        Raises:
            DataError: it means nothing.
        """
        if isinstance(readout, Readout):
            return readout
        if isinstance(readout, int) and not isinstance(readout, bool):
            return cls("index", readout)
        if isinstance(readout, tuple):
            if len(readout) != 2 or not all(isinstance(end, int) and not isinstance(end, bool) for end in readout):
                raise DataError(
                    f"readout {readout!r}: a span is two whole numbers, start and stop, of the answer's characters"
                )
            return cls("span", *readout)
        counted = _COUNTED.fullmatch(str(readout).replace(" ", ""))
        if counted:
            return cls("index", int(counted[1])) if counted[1] else cls("span", int(counted[2]), int(counted[3]))
        if readout not in _NAMES:
            raise DataError(f"unknown readout {readout!r}; allowed: {', '.join(_NAMES)}, a token index, or span(a,b)")
        return cls(str(readout))

    def __str__(self) -> str:
        if self.kind == "index":
            return f"index({self.start})"
        return f"span({self.start},{self.stop})" if self.kind == "span" else self.kind

    def tokens(self, rendered: Rendered) -> Sequence[int]:
        """The token indices read in one text.

        Args:
            rendered: the text as the model gets it.

        Raises:
            DataError: there is no such token in this text.
        """
        length, prompt = len(rendered.ids), rendered.prompt_length
        chosen: Sequence[int]
        if self.kind == "last":
            chosen = range(length - 1, length)
        elif self.kind == "mean":
            chosen = range(1, length)
        elif self.kind == "prompt_last":
            chosen = range(prompt - 1, prompt)
        elif self.kind == "prompt_mean":
            chosen = range(1, prompt)
        elif self.kind == "response_mean":
            chosen = range(max(prompt, 1), length)
        elif self.kind == "predicting_mean":
            chosen = range(max(prompt - 1, 0), length - 1)
        elif self.kind == "index":
            index = self.start if self.start >= 0 else length + self.start
            chosen = range(index, index + 1) if 0 <= index < length else range(0)
        elif self.kind == "span":
            chosen = self._span(rendered)
        else:
            chosen = self._said(rendered)
        if len(chosen) == 0:
            hint = "; give answers" if self.kind in _NEEDS_ANSWERS else ""
            raise DataError(f"readout '{self}' finds no token in {_short(rendered.text)} ({length} tokens){hint}")
        return chosen

    def _said(self, rendered: Rendered) -> list[int]:
        """Tokens of the assistant's messages; one that also holds a character of the template belongs to them."""
        spans = rendered.assistant
        if spans is None or not rendered.offsets:
            why = "the tokenizer tells no character offsets" if spans else "the chat template rewrites the history"
            raise DataError(f"readout '{self}': where assistant messages stand is not known ({why}); use response_mean")
        if self.kind == "answer_mean":
            spans = tuple(part for span in spans for part in outside_thinking(rendered.text, *span))
        return [
            index
            for index, (first, last) in enumerate(rendered.offsets)
            if index > 0 and any(last > start and first < stop for start, stop in spans)
        ]

    def _span(self, rendered: Rendered) -> range:
        answer = rendered.ids[rendered.prompt_length :]
        if not answer or not rendered.offsets:
            return range(0)
        origin = rendered.answer_start
        first, last = origin + self.start, origin + self.stop
        inside = [
            index
            for index in range(rendered.prompt_length, len(rendered.ids))
            if rendered.offsets[index][1] > first and rendered.offsets[index][0] < last
        ]
        return range(inside[0], inside[-1] + 1) if inside else range(0)


@dataclass(frozen=True)
class Activations:
    """What was read, in the order of the items given.

    Attributes:
        positive: per site [n, d] float32 on the CPU (all items, where the data has no sides).
        negative: per site [m, d]; empty where the data has no sides.
        norms: per site the median token norm, without pads and each row's first token.
        readout: which tokens were read.
        paired: row `i` of both sides belong together.
    """

    positive: Mapping[Site, Tensor]
    negative: Mapping[Site, Tensor]
    norms: Mapping[Site, float] = field(default_factory=dict)
    readout: str = "last"
    paired: bool = False

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites read."""
        return tuple(self.positive)

    def __getitem__(self, site: Site | str) -> Tensor:
        key = Site.parse(site) if isinstance(site, str) else site
        if key not in self.positive:  # where no post-norm follows, a raw output is kept under its canonical name
            key = Site(key.layer, key.kind.replace("_raw", "_out"))
        if key not in self.positive:
            raise SiteError(f"{site}: not recorded; there are {', '.join(map(str, self.positive))}")
        return torch.cat([self.positive[key], self.negative[key]]) if key in self.negative else self.positive[key]


def record(
    model: nn.Module,
    tokenizer: Any,
    data: ContrastSet | Sequence[Item],
    sites: Iterable[Site | str],
    *,
    readout: str | int | tuple[int, int] = "last",
    batch_size: int = 16,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    padding_side: Literal["right", "left"] = "right",
    max_tokens: int | None = None,
    progress: bool = False,
) -> Activations:
    """Read activations of prompts, chats or a contrast set at some sites.

    Inside a `steer` context the steered model is read; scopes that depend on the prompt's end are then known only
    where `prompt_lengths` was given.

    Args:
        model: any decoder-only transformers model (wrapped by PEFT or not).
        tokenizer: its tokenizer; never changed.
        data: a contrast set, or prompts (strings, lists of chat messages, `Conversation`s).
        sites: where to read, such as ``Site(12, "resid_post")`` or ``"resid_post.12"``.
        readout: which tokens, see `Readout`.
        batch_size: rows per pass.
        chat_template_kwargs: passed on to the chat template.
        padding_side: where pads go; the result is the same.
        max_tokens: tokens of a text that are read, the rest being cut off at the right; None reads all.
        progress: show a progress bar on stderr.

    Returns:
        One row per item and site, float32.

    Raises:
        DataError: an item has no token to be read.
        SiteError: a site does not exist in this model.
        FitError: an activation is not finite, with the site named.
    """
    decoder = find_decoder(model)
    wanted = [Site.parse(site) if isinstance(site, str) else site for site in sites]
    sides = data if isinstance(data, ContrastSet) else None
    items: Sequence[Item] = (*sides.positive, *sides.negative) if sides is not None else cast("Sequence[Item]", data)
    rendered = [_cut(_rendered(tokenizer, item, chat_template_kwargs), max_tokens) for item in items]
    if not rendered:
        raise DataError("record: got no prompts; give at least one")
    if not wanted:
        raise SiteError("record: got no site; give at least one, such as 'resid_post.12'")
    plan = Readout.parse(readout)
    work = batches(rendered, batch_size, pad_id=pad_token_id(tokenizer), side=padding_side)
    taps = locate(model, wanted)
    found: dict[Site, Tensor] = {}

    def keep(site: Site, rows: Tensor, batch: Batch) -> None:
        if site not in found:
            found[site] = torch.empty(len(rendered), rows.shape[-1])
        found[site][list(batch.rows)] = rows.cpu()

    count = len(sides.positive) if sides is not None else len(rendered)

    def name(row: int) -> str:
        side = "" if sides is None else "positive " if row < count else "negative "
        return f"{side}row {row if row < count else row - count}"

    norms = _read(decoder, taps, work, _chosen(plan, rendered, name), keep, progress)
    _warn_of_special(tokenizer, plan, rendered)
    _check_finite(found)
    return Activations(
        positive={site: rows[:count] for site, rows in found.items()},
        negative={site: rows[count:] for site, rows in found.items()} if sides is not None else {},
        norms=norms,
        readout=str(plan),
        paired=sides is not None and sides.paired,
    )


def stream(
    model: nn.Module,
    tokenizer: Any,
    data: ContrastSet,
    accumulators: Mapping[Site, Accumulator],
    *,
    readout: str | int | tuple[int, int] = "last",
    batch_size: int = 16,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
    progress: bool = False,
) -> Activations:
    """Feed the activations of a contrast set to accumulators, batch by batch; no sample is kept.

    Args:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer; never changed.
        data: the contrast set; both sides of a pair arrive in one update.
        accumulators: one per site, under canonical sites.
        readout: which tokens.
        batch_size: rows per pass.
        chat_template_kwargs: passed on to the chat template.
        max_tokens: tokens of a text that are read, the rest being cut off at the right; None reads all.
        progress: show a progress bar on stderr.

    Returns:
        What each accumulator gives for the two sides.

    Raises:
        DataError: an item has no token to be read.
        FitError: a result is not finite, with the site named.
    """
    decoder = find_decoder(model)
    plan = Readout.parse(readout)
    items = [side for pair in zip(data.positive, data.negative, strict=True) for side in pair] if data.paired else []
    items = items or [*data.positive, *data.negative]
    rendered = [_cut(_rendered(tokenizer, item, chat_template_kwargs), max_tokens) for item in items]
    if batch_size < 1:
        raise DataError(f"batch_size is at least 1, got {batch_size}")
    groups = 2 if data.paired else 1
    work = batches(rendered, max(batch_size, groups), pad_id=pad_token_id(tokenizer), groups=groups)
    positives = len(data.positive)

    def is_positive(row: int) -> bool:
        return row % 2 == 0 if data.paired else row < positives

    def feed(site: Site, rows: Tensor, batch: Batch) -> None:
        chosen = [place for place, row in enumerate(batch.rows) if is_positive(row)]
        others = [place for place, row in enumerate(batch.rows) if not is_positive(row)]
        accumulators[site].update(rows[chosen], rows[others])

    def name(row: int) -> str:
        number = row // 2 if data.paired else row if row < positives else row - positives
        return f"{'positive' if is_positive(row) else 'negative'} row {number}"

    taps = locate(model, accumulators)
    norms = _read(decoder, taps, work, _chosen(plan, rendered, name), feed, progress)
    _warn_of_special(tokenizer, plan, rendered)
    results = {site: accumulator.result() for site, accumulator in accumulators.items()}
    positive = {site: pair[0] for site, pair in results.items()}
    negative = {site: pair[1] for site, pair in results.items()}
    _check_finite(positive)
    _check_finite(negative)
    return Activations(positive=positive, negative=negative, norms=norms, readout=str(plan), paired=data.paired)


def record_ids(model: nn.Module, rows: Sequence[Sequence[int]], sites: Iterable[Site]) -> dict[Site, list[Tensor]]:
    """Activations of every token of rows of ids, each row on its own, nothing masked.

    Args:
        model: any decoder-only transformers model.
        rows: token ids.
        sites: where to read.

    Returns:
        per canonical site one [t, d] float32 tensor for each row, on the CPU.

    Raises:
        FitError: an activation is not finite, with the site named.
    """
    decoder = find_decoder(model)
    taps = locate(model, sites)
    found: dict[Site, list[Tensor]] = {site: [] for site in taps}
    for ids in rows:
        inputs = torch.tensor([list(ids)], device=execution_device(decoder))

        def keep(site: Site, h: Tensor) -> None:
            # A copy in any case: Falcon adds into such a tensor in place afterwards.
            found[site].append(h[0].detach().to("cpu", torch.float32, copy=True))

        forward_body(decoder, taps, inputs, torch.ones_like(inputs), keep)
    for site, kept in found.items():
        _check_finite({site: torch.cat(kept)})
    return found


class _Stop(BaseException):
    """Ends a forward pass when all that was asked for has been read. Not an `Exception`, so that nothing eats it."""


def forward_body(
    decoder: Decoder,
    taps: Mapping[Site, Tap],
    input_ids: Tensor,
    attention_mask: Tensor,
    read: Callable[[Site, Tensor], None],
) -> None:
    """Run the decoder body, hand every tap's tensor [b, t, d] to `read`, and stop after the deepest.

    Args:
        decoder: whose body runs.
        taps: where to read.
        input_ids: [b, t].
        attention_mask: [b, t].
        read: called once per site; it must not keep the tensor (Falcon changes one in place afterwards).
    """
    left = set(taps)

    def notice(site: Site, h: Tensor) -> None:
        read(site, h.reshape(*input_ids.shape, h.shape[-1]) if h.dim() == 2 else h)
        left.discard(site)
        if not left:
            raise _Stop

    inputs: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "use_cache": False,
        **position_inputs(decoder.body, attention_mask),
    }
    with contextlib.ExitStack() as stack:
        for site, tap in taps.items():
            stack.callback(_attach_reader(tap, site, notice).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation_mode(decoder.body))
        if "torch._dynamo" in sys.modules:  # a compiled block would not stop, nor call hooks it has not seen
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        with contextlib.suppress(_Stop):
            decoder.body(**inputs)
            raise FitError(f"the model never ran {', '.join(map(str, sorted(left)))}; it cannot be read there")


def position_inputs(module: nn.Module, attention_mask: Tensor) -> dict[str, Tensor]:
    """Position ids as an argument of a forward pass, where the module takes them.

    GPT-2 is wrong without them when rows are padded at the left, and no model minds.

    Args:
        module: the model or decoder body to be called.
        attention_mask: [b, t].
    """
    if "position_ids" not in inspect.signature(module.forward).parameters:
        return {}
    return {"position_ids": (attention_mask.cumsum(dim=1) - 1).clamp_min(0)}


def _attach_reader(tap: Tap, site: Site, notice: Callable[[Site, Tensor], None]) -> Any:
    # Appended, so that the value is read as it flows on, edits included.
    if tap.side == "input":
        return tap.module.register_forward_pre_hook(
            lambda _module, args, kwargs: notice(site, tap.read(args, kwargs)), with_kwargs=True
        )
    return tap.module.register_forward_hook(
        lambda _module, args, kwargs, output: notice(site, tap.read(args, kwargs, output)), with_kwargs=True
    )


def _read(
    decoder: Decoder,
    taps: Mapping[Site, Tap],
    work: Sequence[Batch],
    chosen: Sequence[Sequence[int]],
    take: Callable[[Site, Tensor, Batch], None],
    progress: bool,
) -> dict[Site, float]:
    """Run all batches and hand the pooled rows [b, d] of each to `take`; returns the norms."""
    norms = {site: NormMedian() for site in taps}
    device = execution_device(decoder)
    clock = PassClock.of(decoder.model)  # the model is being steered: values given per item follow their items
    for batch in _with_progress(work, progress):
        input_ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        pool = _Pool(batch, [chosen[row] for row in batch.rows], device)

        def read(site: Site, h: Tensor, pool: _Pool = pool, batch: Batch = batch) -> None:
            norms[site].update(h, pool.counted(h.device))
            take(site, pool(h), batch)

        with contextlib.nullcontext() if clock is None else clock.items(batch.rows):
            forward_body(decoder, taps, input_ids, mask, read)
    return {site: median.result() for site, median in norms.items()}


class _Pool:
    """Turns [b, t, d] into one row [b, d] per text: one token, or the mean of several, in float32."""

    def __init__(self, batch: Batch, chosen: Sequence[Sequence[int]], device: torch.device) -> None:
        starts = (batch.attention_mask != 0).long().argmax(dim=1).tolist()
        places = [[start + token for token in tokens] for start, tokens in zip(starts, chosen, strict=True)]
        self._single = all(len(tokens) == 1 for tokens in places)
        rows, width = batch.input_ids.shape
        self._index = torch.tensor([tokens[0] for tokens in places], device=device)
        weights = torch.zeros(rows, 1, width)
        counted = batch.attention_mask.float()
        for row, tokens in enumerate(places):
            weights[row, 0, tokens] = 1.0 / len(tokens)
            counted[row, starts[row]] = 0.0
        self._weights, self._counted = weights.to(device), counted.to(device)
        self._padded = bool((batch.attention_mask == 0).any())

    def counted(self, device: torch.device) -> Tensor:
        """[b, t] 1 where a token's norm counts."""
        return self._counted.to(device)

    def __call__(self, h: Tensor) -> Tensor:
        if self._single:
            index = self._index.to(h.device)
            return h[torch.arange(h.shape[0], device=h.device), index].float()
        weights, values = self._weights.to(h.device), h.float()
        with torch.autocast(h.device.type, enabled=False):  # it would give products in half precision
            pooled = torch.bmm(weights, values)[:, 0]
            # Times zero keeps what is not finite on pads. Masking costs a copy, looking costs an accelerator a stop.
            if self._padded and (h.device.type != "cpu" or not bool(torch.isfinite(pooled).all())):
                pooled = torch.bmm(weights, values.masked_fill(weights.mT == 0, 0.0))[:, 0]
        return pooled


def _chosen(plan: Readout, rendered: Sequence[Rendered], name: Callable[[int], str]) -> list[Sequence[int]]:
    """The tokens read in each text; a text without any is named."""
    found = []
    for row, text in enumerate(rendered):
        try:
            found.append(plan.tokens(text))
        except DataError as error:
            raise DataError(f"{name(row)}: {error}") from None
    return found


def _rendered(tokenizer: Any, item: Item, chat_template_kwargs: Mapping[str, Any] | None) -> Rendered:
    if isinstance(item, Rendered):
        return item
    return render(tokenizer, Conversation.of(item), chat_template_kwargs=chat_template_kwargs)


def _cut(text: Rendered, max_tokens: int | None) -> Rendered:
    """A text without what follows its first tokens."""
    if max_tokens is None or len(text.ids) <= max_tokens:
        return text
    if max_tokens < 1:
        raise DataError(f"max_tokens = {max_tokens}; give at least 1, or None to read all")
    kept = min(text.prompt_length, max_tokens)
    return replace(text, ids=text.ids[:max_tokens], offsets=text.offsets[:max_tokens], prompt_length=kept)


def _with_progress(work: Sequence[Batch], progress: bool) -> Iterator[Batch]:
    if not progress:
        yield from work
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(work, description="reading", console=Console(stderr=True), transient=True)


def _warn_of_special(tokenizer: Any, plan: Readout, rendered: Sequence[Rendered]) -> None:
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


def _check_finite(found: Mapping[Site, Tensor]) -> None:
    for site, rows in found.items():
        if not bool(torch.isfinite(rows).all()):
            raise FitError(f"{site}: activations are not finite; load the model in float32 or bfloat16")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
