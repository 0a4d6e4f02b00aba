"""A self-test on the user's own model: does steering hold here what it promises?

from steerkit.doctor import doctor
assert all(finding.passed for finding in doctor(model, tokenizer))

Nothing is fitted: a random direction, half as long as a typical activation, is added after a middle block. Each check
is one identity, such as cached = uncached. Where rounding makes the bare model itself miss it, the steered gap is
judged beside the unsteered one, so that no model is called broken for its arithmetic.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steerkit.activations import position_inputs, record
from steerkit.checks import Finding
from steerkit.data import Conversation, Rendered, batches, pad_token_id, render
from steerkit.errors import SiteError, SteerError
from steerkit.probe_block import evaluation_mode
from steerkit.sites import KINDS, Decoder, Site, Tap, execution_device, find_decoder, inner_model, locate
from steerkit.steering import steer
from steerkit.vector import SteeringVector

__all__ = ["CHECKS", "Case", "doctor"]

TEXTS = ("The weather today is very", "An old cat sat on the wooden chair by the door")
SIZE = 0.5
"""Length of the direction, in typical activation norms."""
NEW = 4
"""Tokens generated."""
TIMED = 6
"""The same where it is timed."""
PER_ROW = (1.0, -0.7)
SLOWEST = 1.5
PAIRS = 5

Given = float | Sequence[float] | None
"""A strength, one for each row, or None for the bare model."""


class _Broken(Exception):
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
        """The context of a steered pass, or of a bare one."""
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


def doctor(
    model: nn.Module,
    tokenizer: Any,
    *,
    compiled: bool = False,
    step: Callable[[], None] = lambda: None,
) -> list[Finding]:
    """Check on a model that steering holds what it promises. The model is left as it was.

    Args:
        model: any decoder-only transformers model, wrapped or not. It is checked in evaluation mode.
        tokenizer: its tokenizer.
        compiled: let `compile` generate code with the default backend, which takes a minute or more.
        step: called after each check, for a progress bar.

    Returns:
        One finding per check of `CHECKS`, in their order. An exception inside a check is a failed check.

    Raises:
        SiteError: no decoder whose blocks can be found.
    """
    decoder = find_decoder(model)
    # Out of torch.compile and DistributedDataParallel, but not out of peft, which adds something of its own.
    plain = getattr(model, "_orig_mod", model)
    case = Case(plain if hasattr(plain, "generate") else inner_model(model), tokenizer, compiled, decoder)
    findings = []
    with evaluation_mode(decoder.model):
        for check in CHECKS:
            findings.append(_finding(check, case))
            step()
    return findings


def _finding(check: Callable[[Case], str], case: Case) -> Finding:
    try:
        return Finding(check.__name__, True, check(case))
    except _Broken as found:
        return Finding(check.__name__, False, str(found))
    except Exception as error:  # noqa: BLE001 - whatever a model raises is the finding
        return Finding(check.__name__, False, _one_line(error))


def runs(case: Case) -> str:
    """Unsteered, the model runs, its logits are finite, and the same input gives the same logits twice."""
    first, again = case.batch(None), case.batch(None)
    _hold(bool(torch.isfinite(first[case.rows("right")[1].bool()]).all()), "the logits are not finite, unsteered")
    off = _gap(again, first)
    _hold(
        off <= case.tolerance,
        f"the same input gives logits that differ by {off:.1e} the second time, unsteered: it draws at random or "
        "keeps a state",
    )
    return "the same logits twice" if _bitwise(again, first) else f"equal passes differ by {off:.1e} by themselves"


def sites(case: Case) -> str:
    """At every kind of site, `record` reads bit for bit what flows there, and an edit adds just its direction to it.

    Read by plain hooks in a full pass, at the first, the middle and the last block. A kind that the model lacks is no
    failure.
    """
    layers = sorted({0, case.site.layer, case.decoder.num_layers - 1})
    taps, missing = _available(case.model, layers)
    text = case.texts[1]
    token = len(text.ids) // 2
    recorded = record(case.model, case.tokenizer, [text], taps, readout=token)
    seen, again = (_watched(case, taps, text.ids)[0] for _ in range(2))
    for site, tap in taps.items():
        _hold(site in seen, f"{site}: a hook on {tap.name} is never called")
        flowing, once_more = (_flat(found[site])[token].float().cpu() for found in (seen, again))
        if not torch.equal(recorded[site][0], flowing):
            off, own = _gap(recorded[site][0], flowing), _gap(once_more, flowing)
            _hold(0 < own <= case.tolerance and off <= 3 * own, f"{site}: what is recorded is off by {off:.1e}")
    lengths = {site: 0.1 * (norm or 1.0) for site, norm in recorded.norms.items()}
    vector = case.random_vector(list(taps), lengths, scope="all")
    with steer(case.model, vector, 1.0):
        before, after = _watched(case, taps, text.ids)
    for site in taps:
        _hold(site in before and site in after, f"{site}: a hook on {taps[site].name} is not called while steered")
        added = vector.params(site)["direction"].to(before[site])
        _hold(
            torch.equal(after[site], before[site] + added), f"{site}: what flows on is not what was there plus the edit"
        )
    kinds = sorted({site.kind for site in taps}, key=KINDS.index)
    absent = "".join(f"; no {kind} ({reason})" for kind, reason in missing.items())
    return f"{', '.join(kinds)} at blocks {', '.join(map(str, layers))}{absent}"


def changes(case: Case) -> str:
    """Steering changes the logits, and with scope `response` nothing before the last prompt token."""
    bare, steered = case.batch(None), case.batch(1.0)
    reached = torch.zeros_like(case.rows("right")[1], dtype=torch.bool)
    for row, prompt in enumerate(case.prompts):
        reached[row, prompt - 1 : len(case.texts[row].ids)] = True
    before = case.rows("right")[1].bool() & ~reached
    change = _gap(steered[reached], bare[reached])
    _hold(
        change > case.tolerance / 4, f"steering changes the logits by no more than {change:.1e}: the edit has no effect"
    )
    leak = _gap(steered[before], bare[before]) if bool(before.any()) else 0.0
    _hold(leak <= case.tolerance, f"tokens before the scope change by {leak:.1e}; allowed {case.tolerance:.1e}")
    return f"by {change:.2g} of the largest logit; before the scope by {leak:.1g}"


def neutral(case: Case) -> str:
    """At strength 0 the logits are bitwise those of the bare model."""
    bare = case.batch(None)
    return _unchanged(case, "strength 0", case.batch(0.0), bare)


def removal(case: Case) -> str:
    """After a context, and after an error in a pass inside one, logits, hooks and state dict are the bare model's."""
    bare, hooks, keys = case.batch(None), _hooks(case.model), list(case.model.state_dict())
    case.batch(1.0)
    _hold(_hooks(case.model) == hooks, "a hook stayed after the context")
    handle = case.decoder.blocks[-1].register_forward_hook(_raise)
    try:
        with contextlib.suppress(ZeroDivisionError):
            case.batch(1.0)
    finally:
        handle.remove()
    _hold(_hooks(case.model) == hooks, "a hook stayed after an error inside the context")
    _hold(list(case.model.state_dict()) == keys, "the keys of the state dict changed")
    return _unchanged(case, "having been steered", case.batch(None), bare)


def cache(case: Case) -> str:
    """Greedy decoding of a left-padded batch, with and without a cache, equals one plain pass over what it produced.

    The plain pass has each row alone and without pads. Both being equal to it, the tokens can part only at a tie.
    """

    def measure(strength: Given) -> float:
        worst = 0.0
        for use_cache in (True, False):
            out = case.generate(strength, use_cache=use_cache, output_logits=True)
            worst = _worst(worst, *(_gap(*pair) for pair in _beside_plain(case, out, strength)))
        return worst

    return _judged(case, f"{NEW} tokens with and without a cache", measure, 1.0, may_lack=True)


def pads(case: Case) -> str:
    """A text in a batch padded at the left or the right gets the logits that it gets alone."""

    def measure(strength: Given) -> float:
        sides: tuple[Literal["left", "right"], ...] = ("left", "right")
        return _worst(0.0, *(_batch_gap(case, side, strength) for side in sides))

    return _judged(case, "pads at the left and the right", measure, 1.0)


def rows(case: Case) -> str:
    """With a strength for each row, a row in a padded batch gets what it gets alone with its own."""
    return _judged(case, "one strength per row", lambda strength: _batch_gap(case, "left", strength), PER_ROW)


def beams(case: Case) -> str:
    """The scores of beam search, with a strength for each row, are those of a plain pass over each sequence."""

    def measure(strength: Given) -> float:
        out = case.generate(
            strength, num_beams=2, num_return_sequences=2, length_penalty=0.0, output_scores=True, use_cache=True
        )
        worst = 0.0
        for score, (answer, behind) in zip(out.sequences_scores, _plain_of(case, out, strength), strict=True):
            chosen = torch.log_softmax(behind.float(), dim=-1).gather(-1, answer[:, None])
            # Log-probabilities near 0 have no size of their own; what rounding moves is the logits.
            size = behind.float().abs().max() * len(answer)
            worst = _worst(worst, float((score.float() - chosen.sum()).abs() / size))
        return worst

    return _judged(case, "2 beams of 2 rows", measure, PER_ROW, may_lack=True)


def compile(case: Case) -> str:
    """The steered forward pass traces into one graph, agrees with eager, and a changed strength compiles nothing.

    Unless `compiled` was asked for, the backend generates no code, so only tracing is tried. Compiled code of this
    process is forgotten afterwards.
    """
    ids, prompt = case.texts[1].ids, case.prompts[1]
    strengths = PER_ROW
    expected = [case.alone(ids, prompt, strength) for strength in strengths]
    gaps, counts = [], []
    try:
        run, graphs = _compiled(case)
        with steer(case.model, case.vector, 1.0, prompt_lengths=[prompt]) as steering:
            # An eager pass first: what it makes and keeps, such as lengths as a tensor, is a reason to compile anew.
            case.logits(*case.row(ids), None)
            for strength, logits in zip(strengths, expected, strict=True):
                steering.strength = strength
                gaps.append(_gap(run(), logits))
                counts.append(len(graphs))
    except Exception as error:
        why = _why_bare_fails(lambda: _compiled(case)[0]())
        if why is None:
            raise
        return f"the model itself does not compile in one graph: {why} ({type(error).__name__} steered)"
    finally:
        torch._dynamo.reset()
    worst = _worst(0.0, *gaps)
    _hold(counts[0] > 0, "the model ran without being compiled")
    _hold(counts[-1] == counts[0], f"a changed strength compiled {counts[-1] - counts[0]} times anew")
    _hold(worst <= case.tolerance, f"compiled, the steered logits are off by {worst:.1e}; allowed {case.tolerance:.1e}")
    return f"one graph, off by {worst:.1e}; a changed strength compiles nothing"


def speed(case: Case) -> str:
    """Steered decoding takes at most 1.5 times as long as unsteered.

    One addition is nothing beside a block's matrix products, and a hook costs microseconds of Python: measured, 1.01 to
    1.04 on 30 hooked blocks of a 135M model. Beyond 1.5 something else is wrong, such as tensors moved between devices
    or code compiled anew in every pass. Interleaved pairs and their median leave other load on the machine out; where
    it is over the limit nonetheless, as many pairs again are run.
    """
    for strength in (None, 1.0):
        _seconds(case, strength)
    ratios: list[float] = []
    while len(ratios) < PAIRS or (statistics.median(ratios) > SLOWEST and len(ratios) < 3 * PAIRS):
        bare = _seconds(case, None)
        ratios.append(_seconds(case, 1.0) / bare)
    ratio = statistics.median(ratios)
    _hold(ratio <= SLOWEST, f"steered decoding takes {ratio:.2f} times as long as unsteered; allowed {SLOWEST}")
    return f"steered decoding takes {ratio:.2f} times as long (median of {len(ratios)} pairs)"


CHECKS: tuple[Callable[[Case], str], ...] = (
    runs,
    sites,
    changes,
    neutral,
    removal,
    cache,
    pads,
    rows,
    beams,
    compile,
    speed,
)


def _judged(
    case: Case, what: str, measure: Callable[[Given], float], strength: Given, *, may_lack: bool = False
) -> str:
    """Judge an identity that holds up to rounding, beside the same on the bare model.

    Args:
        case: the model.
        what: what is measured, in words.
        measure: the gap at a strength.
        strength: with which it is measured.
        may_lack: whether models without this feature exist; such a model raises, steered or not.

    Returns:
        The reason to pass: the gap is small, or it is the bare model's own and small enough for rounding.
    """
    case.rows("left")  # a tokenizer that fails is not what a model may lack
    try:
        steered = measure(strength)
    except Exception:
        why = _why_bare_fails(lambda: measure(None)) if may_lack else None
        if why is None:
            raise
        return f"the model itself cannot do this, unsteered: {why}"
    if steered <= case.tolerance:
        return f"{what}: off by {steered:.1e}, allowed {case.tolerance:.1e}"
    bare = measure(None)
    # A hundred times what is usual is still arithmetic (recurrent models have two forms of it); more is a mistake.
    if case.tolerance / 3 < bare <= min(100 * case.tolerance, 0.25) and steered <= 3 * bare:
        return f"{what}: the model itself differs by {bare:.1e} unsteered; steering adds nothing to it ({steered:.1e})"
    whose = "the model itself is wrong there" if bare > case.tolerance else "steering is wrong there"
    raise _Broken(f"{what}: off by {steered:.1e} steered and {bare:.1e} unsteered: {whose}")


def _unchanged(case: Case, after: str, found: Tensor, bare: Tensor) -> str:
    """Judge an identity that holds bitwise, unless the bare model does not repeat itself to the bit either."""
    if _bitwise(found, bare):
        return "bitwise the bare model's logits"
    off, own = _gap(found, bare), _gap(case.batch(None), bare)
    _hold(
        0 < own <= case.tolerance and off <= 3 * own,
        f"logits differ by {off:.1e} from the bare model's after {after}; two unsteered passes by {own:.1e}",
    )
    return f"off by {off:.1e}; the model itself differs by {own:.1e} from pass to pass"


def _batch_gap(case: Case, side: Literal["left", "right"], strength: Given) -> float:
    """How far the texts in a padded batch are from each text alone."""
    ids, mask = case.rows(side)
    found = case.logits(ids, mask, strength, case.prompts)
    worst = 0.0
    for row, (text, prompt) in enumerate(zip(case.texts, case.prompts, strict=True)):
        expected = case.alone(text.ids, prompt, _of_row(strength, row))
        worst = _worst(worst, _gap(found[row][mask[row].bool()], expected))
    return worst


def _plain_of(case: Case, out: Any, strength: Given) -> list[tuple[Tensor, Tensor]]:
    """For every sequence that was generated its new ids [t], and the logits [t, v] behind them in a plain pass."""
    width, each = case.rows("left")[0].shape[1], len(out.sequences) // len(case.texts)
    found = []
    for place, sequence in enumerate(out.sequences):
        row, answer = place // each, sequence[width:]
        prompt = case.texts[row].ids
        logits = case.alone([*prompt, *answer.tolist()], len(prompt), _of_row(strength, row))
        found.append((answer, logits[len(prompt) - 1 : -1]))
    return found


def _beside_plain(case: Case, out: Any, strength: Given) -> Iterator[tuple[Tensor, Tensor]]:
    """For each row what `generate` saw and what a plain pass gives, both [t, v]."""
    stacked = torch.stack(out.logits, dim=1)
    for seen, (_, expected) in zip(stacked, _plain_of(case, out, strength), strict=True):
        yield seen, expected


def _of_row(strength: Given, row: int) -> float | None:
    return strength if strength is None or isinstance(strength, int | float) else strength[row]


def _available(model: nn.Module, layers: Sequence[int]) -> tuple[dict[Site, Tap], dict[str, str]]:
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


def _watched(case: Case, taps: dict[Site, Tap], ids: Sequence[int]) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
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


def _flat(value: Tensor) -> Tensor:
    """[t, width] of one row."""
    return value.reshape(-1, value.shape[-1])


def _compiled(case: Case) -> tuple[Callable[[], Tensor], list[int]]:
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


def _why_bare_fails(run: Callable[[], object]) -> str | None:
    """What the same raises on the bare model; None where it runs."""
    try:
        run()
    except Exception as error:  # noqa: BLE001 - models say in many ways that they lack something
        return _one_line(error)
    return None


def _seconds(case: Case, strength: Given) -> float:
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


def _raise(*_: Any) -> None:
    raise ZeroDivisionError


def _hold(condition: bool, reason: str) -> None:
    if not condition:
        raise _Broken(reason)


def _gap(one: Tensor, other: Tensor) -> float:
    """Largest difference, in units of the other's largest value."""
    return float((one.float() - other.float()).abs().max() / other.float().abs().max().clamp_min(1e-9))


def _worst(*gaps: float) -> float:
    """The largest; nan where one is."""
    return float(torch.tensor(gaps, dtype=torch.float64).max())


def _bitwise(one: Tensor, other: Tensor) -> bool:
    """Equality that tells -0.0 from +0.0."""
    return torch.equal(one, other) and torch.equal(torch.signbit(one), torch.signbit(other))


def _hooks(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
    }


def _one_line(error: BaseException) -> str:
    """The class and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
