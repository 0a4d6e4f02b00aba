"""TODO checks.doctor.case."""

from __future__ import annotations

import contextlib
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steerkit.activations.reading import position_inputs
from steerkit.activations.recording import record
from steerkit.errors import SiteError, SteerError
from steerkit.network.decoder import Decoder, execution_device, inner_model
from steerkit.network.sites import KINDS, Site
from steerkit.network.tap import Tap, locate
from steerkit.prompts.batching import batches, pad_token_id
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import Rendered, render
from steerkit.steering.steering import steer
from steerkit.vector.steering_vector import SteeringVector

__all__ = [
    "NEW",
    "Broken",
    "Case",
    "Given",
    "available",
    "batch_gap",
    "beside_plain",
    "bitwise",
    "compiled_model",
    "flat",
    "hold",
    "hooks_of",
    "judged_rows",
    "largest_gap",
    "one_line",
    "plain_of",
    "raise_error",
    "seconds",
    "unchanged",
    "watched",
    "why_bare_fails",
    "worst_of",
]

TEXTS = ("The weather today is very", "An old cat sat on the wooden chair by the door")
SIZE = 0.5
NEW = 4
TIMED = 6
Given = float | Sequence[float] | None


class Broken(Exception):
    """What a check found wrong."""


@dataclass(frozen=True, eq=False)
class Case:
    """A model on which the checks run, with what they share.

    Attributes:
        model: what is called: the caller's model, out of wrappers that cannot generate.
        tokenizer: its tokenizer.
        compiled: compile for real, with the default backend.
        decoder: the text decoder inside.
    """

    model: Any
    tokenizer: Any
    compiled: bool
    decoder: Decoder
    passes: dict[Any, Tensor] = field(default_factory=dict, repr=False)
    """Plain passes that several checks compare with."""

    @cached_property
    def texts(self) -> list[Rendered]:
        """The texts, of unequal length."""
        return [render(self.tokenizer, Conversation(text, raw=True)) for text in TEXTS]

    @cached_property
    def prompts(self) -> list[int]:
        """How many tokens of each text count as its prompt, where a whole text is scored."""
        return [max(1, len(text.ids) // 2) for text in self.texts]

    @cached_property
    def site(self) -> Site:
        """Where the direction is added."""
        return Site((self.decoder.num_layers - 1) // 2)

    @cached_property
    def vector(self) -> SteeringVector:
        """A random direction, always the same one for the same model."""
        try:
            norm = record(self.model, self.tokenizer, self.texts, [self.site], readout="mean").norms[self.site]
        except SteerError:  # `sites` says why; the other checks still want a direction
            norm = self.decoder.hidden_size**0.5
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
        drawn = {site: torch.randn(width, generator=generator) for site, width in widths.items()}
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
        made = torch.tensor([list(ids)], device=execution_device(self.decoder))
        return made, torch.ones_like(made)

    def rows(self, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
        """Ids and mask [b, t] of the texts in one padded batch, in their order."""
        batch = batches(self.texts, len(self.texts), pad_id=pad_token_id(self.tokenizer), side=side)[0]
        order, device = torch.tensor(batch.rows).argsort(), execution_device(self.decoder)
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


def judged_rows(
    case: Case, what: str, measure: Callable[[Given], float], strength: Given, *, may_lack: bool = False
) -> str:
    """Judge an identity that holds up to rounding, beside the same on the baseline model.

    Args:
        case: the model.
        what: what is measured, in words.
        measure: the gap at a strength.
        strength: with which it is measured.
        may_lack: whether models without this feature exist; such a model raises, steered or not.

    Returns:
        The reason to pass: the gap is small, or it is the baseline model's own and small enough for rounding.
    """
    case.rows("left")  # a tokenizer that fails is not what a model may lack
    try:
        steered = measure(strength)
    except Exception:
        why = why_bare_fails(lambda: measure(None)) if may_lack else None
        if why is None:
            raise
        return f"the model itself cannot do this, unsteered: {why}"
    if steered <= case.tolerance:
        return f"{what}: off by {steered:.1e}, allowed {case.tolerance:.1e}"
    baseline = measure(None)
    # A hundred times what is usual is still arithmetic (recurrent models have two forms of it); more is a mistake.
    if case.tolerance / 3 < baseline <= min(100 * case.tolerance, 0.25) and steered <= 3 * baseline:
        return (
            f"{what}: the model itself differs by {baseline:.1e} unsteered; steering adds nothing to it ({steered:.1e})"
        )
    whose = "the model itself is wrong there" if baseline > case.tolerance else "steering is wrong there"
    raise Broken(f"{what}: off by {steered:.1e} steered and {baseline:.1e} unsteered: {whose}")


def unchanged(case: Case, after: str, found: Tensor, baseline: Tensor) -> str:
    """Judge an identity that holds bitwise, unless the baseline model does not repeat itself to the bit either."""
    if bitwise(found, baseline):
        return "bitwise the baseline model's logits"
    off, own = largest_gap(found, baseline), largest_gap(case.batch(None), baseline)
    hold(
        0 < own <= case.tolerance and off <= 3 * own,
        f"logits differ by {off:.1e} from the baseline model's after {after}; two unsteered passes by {own:.1e}",
    )
    return f"off by {off:.1e}; the model itself differs by {own:.1e} from pass to pass"


def batch_gap(case: Case, side: Literal["left", "right"], strength: Given) -> float:
    """How far the texts in a padded batch are from each text alone."""
    ids, mask = case.rows(side)
    found = case.logits(ids, mask, strength, case.prompts)
    worst = 0.0
    for row, (text, prompt) in enumerate(zip(case.texts, case.prompts, strict=True)):
        expected = case.alone(text.ids, prompt, _of_row(strength, row))
        worst = worst_of(worst, largest_gap(found[row][mask[row].bool()], expected))
    return worst


def plain_of(case: Case, out: Any, strength: Given) -> list[tuple[Tensor, Tensor]]:
    """For every sequence that was generated its new ids [t], and the logits [t, v] behind them in a plain pass."""
    width, each = case.rows("left")[0].shape[1], len(out.sequences) // len(case.texts)
    found = []
    for place, sequence in enumerate(out.sequences):
        row, answer = place // each, sequence[width:]
        prompt = case.texts[row].ids
        logits = case.alone([*prompt, *answer.tolist()], len(prompt), _of_row(strength, row))
        found.append((answer, logits[len(prompt) - 1 : -1]))
    return found


def beside_plain(case: Case, out: Any, strength: Given) -> Iterator[tuple[Tensor, Tensor]]:
    """For each row what `generate` saw and what a plain pass gives, both [t, v]."""
    stacked = torch.stack(out.logits, dim=1)
    for seen, (_, expected) in zip(stacked, plain_of(case, out, strength), strict=True):
        yield seen, expected


def _of_row(strength: Given, row: int) -> float | None:
    return strength if strength is None or isinstance(strength, int | float) else strength[row]


def available(model: nn.Module, layers: Sequence[int]) -> tuple[dict[Site, Tap], dict[str, str]]:
    """The taps of every kind of site in some blocks, each place once; and why the other kinds are nowhere there."""
    found: dict[tuple[int, str], tuple[Site, Tap]] = {}
    missing = {}
    for kind in KINDS:
        taps: dict[Site, Tap] = {}
        for layer in layers:
            try:
                taps |= locate(model, [Site(layer, kind)])
            except SiteError as error:
                # Less the place: the same words hold at all these blocks.
                missing[kind] = re.sub(r"^\S+: | \(block \d+ of \w+\)$", "", str(error))
        if taps:
            missing.pop(kind, None)
        for site, tap in taps.items():
            found.setdefault((id(tap.module), tap.side), (site, tap))
    return dict(found.values()), missing


def watched(case: Case, taps: dict[Site, Tap], ids: Sequence[int]) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    """What stands at each site before and after all other hooks, in one full pass over one row."""
    before: dict[Site, Tensor] = {}
    after: dict[Site, Tensor] = {}

    def keep(found: dict[Site, Tensor], site: Site, value: Tensor) -> None:
        found[site] = value.detach().clone()  # Falcon changes one in place afterwards

    with contextlib.ExitStack() as stack:
        for site, tap in taps.items():
            for found, first in ((before, True), (after, False)):

                def hook(
                    _: Any, args: Any, kwargs: Any, out: Any = None, *, to: Any = found, at: Site = site, tap: Tap = tap
                ) -> None:
                    keep(to, at, tap.read(args, kwargs, out))

                attach = (
                    tap.module.register_forward_pre_hook if tap.side == "input" else tap.module.register_forward_hook
                )
                stack.callback(attach(hook, prepend=first, with_kwargs=True).remove)
        case.logits(*case.row(ids), None)
    return before, after


def flat(value: Tensor) -> Tensor:
    """[t, width] of one row."""
    return value.reshape(-1, value.shape[-1])


def compiled_model(case: Case) -> tuple[Callable[[], Tensor], list[int]]:
    """One compiled pass over the second text, and a list that grows with each graph."""
    import torch._dynamo

    graphs: list[int] = []

    def backend(graph: Any, inputs: Any, **options: Any) -> Any:
        graphs.append(1)
        return torch._dynamo.lookup_backend("inductor")(graph, inputs, **options) if case.compiled else graph.forward

    torch._dynamo.reset()
    compiled: Any = torch.compile(case.model, fullgraph=True, backend=backend)
    row, _ = case.row(case.texts[1].ids)

    def run() -> Tensor:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dynamo's, of the model's own code
            logits: Tensor = compiled(input_ids=row, use_cache=False).logits
            return logits[0]

    return run, graphs


def why_bare_fails(run: Callable[[], object]) -> str | None:
    """What the same raises on the baseline model; None where it runs."""
    try:
        run()
    except Exception as error:  # noqa: BLE001 - models say in many ways that they lack something
        return one_line(error)
    return None


def seconds(case: Case, strength: Given) -> float:
    """How long it takes to generate, planning and attaching not counted."""
    device = execution_device(case.decoder)
    with case.steered(strength):
        _finish(device)
        start = time.perf_counter()
        case.generate(None, max_new_tokens=TIMED, min_new_tokens=TIMED)
        _finish(device)
        return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def raise_error(*_: Any) -> None:
    raise ZeroDivisionError


def hold(condition: bool, reason: str) -> None:
    if not condition:
        raise Broken(reason)


def largest_gap(one: Tensor, other: Tensor) -> float:
    """Largest difference, in units of the other's largest value."""
    return float((one.float() - other.float()).abs().max() / other.float().abs().max().clamp_min(1e-9))


def worst_of(*gaps: float) -> float:
    """The largest; nan where one is."""
    return float(torch.tensor(gaps, dtype=torch.float64).max())


def bitwise(one: Tensor, other: Tensor) -> bool:
    """Equality that tells -0.0 from +0.0."""
    return torch.equal(one, other) and torch.equal(torch.signbit(one), torch.signbit(other))


def hooks_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
    }


def one_line(error: BaseException) -> str:
    """The class and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
