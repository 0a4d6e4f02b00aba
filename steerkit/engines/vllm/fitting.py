"""`fit` on vLLM: the engine runs the texts, `steerkit.fit` does the rest as ever.

What is found by structure (blocks, sites, widths) is found in the same architecture without weights
(`steerkit.network.stand_in`); what runs is vLLM's.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerkit._support.progress import bar
from steerkit.activations.moments import NormMedian
from steerkit.activations.readout import Readout
from steerkit.activations.token_scale import PassScale, TokenScale, TokenScales, massive_tokens
from steerkit.engines.vllm import names
from steerkit.engines.vllm.recording import Part, Read, ask, spans_of
from steerkit.errors import DataError, ModelError
from steerkit.fitting.fitting import fit as fit_on
from steerkit.methods._base import Method
from steerkit.network.decoder import Decoder
from steerkit.network.sites import Site
from steerkit.network.stand_in import stand_in
from steerkit.network.tap import Tap
from steerkit.prompts.batching import Batch
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["EngineReads", "fit"]


def fit(
    llm: Any,
    data: ContrastSet,
    *,
    method: str | Method = "caa",
    layers: str | int | Sequence[int] | None = None,
    sites: Sequence[Site | str] | Site | str | None = None,
    readout: str | int | tuple[int, int] | None = None,
    batch_size: int = 64,
    held_out: ContrastSet | None = None,
    settings: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> SteeringVector:
    """Learn a steering vector from a contrast set on a model that vLLM runs.

    Args:
        llm: vLLM's `LLM`, which this plug-in has been loaded by, with all blocks in one process.
        data: the contrast set.
        method: a name of `steerkit methods`, or a method with its settings: one that is fitted on activations alone.
        layers: blocks counted from 0, at the method's own kind of site.
        sites: exact sites instead of layers, of the kinds that the engine was started with.
        readout: which tokens are read; None takes the method's own.
        batch_size: texts that the engine is given at one time.
        held_out: items to measure the separation on; the figures go into the file.
        settings: the method's settings where `method` is a name.
        tokenizer: of the model; None takes the engine's.
        chat_template_kwargs: passed on to the chat template.
        progress: show a progress bar on stderr.

    Returns:
        The fitted vector, up to rounding the one of `steerkit.fit`.

    Raises:
        FitError: the method asks more of the model than activations, or what `steerkit.fit` says.
        SiteError: a site that the engine does not know, or that does not exist.
        DataError: the data has no token to read, or a text is longer than the engine takes.
        ModelError: the engine is not steered, or transformers does not know its architecture.

    Example:
        >>> from vllm import LLM                                                      # doctest: +SKIP
        >>> vector = fit(LLM("Qwen/Qwen3-8B"), data, method="caa", layers=[16])       # doctest: +SKIP
        >>> vector.save("vectors/mine.safetensors")                                   # doctest: +SKIP
    """
    return fit_on(
        _architecture(llm),
        llm.get_tokenizer() if tokenizer is None else tokenizer,
        data,
        method=method,
        layers=layers,
        sites=sites,
        readout=readout,
        batch_size=batch_size,
        held_out=held_out,
        settings=settings,
        chat_template_kwargs=chat_template_kwargs,
        progress=progress,
        reads=EngineReads(llm),
    )


def _architecture(llm: Any) -> nn.Module:
    """The model of an engine without its weights."""
    facts = names.model_facts(llm)
    config = copy.deepcopy(facts.text)
    config._name_or_path, config._commit_hash = facts.path, facts.commit
    return stand_in(config, trust_remote_code=facts.trusted)


class EngineReads:
    """Texts run on vLLM, as `steerkit.activations.reading.read_passes` runs them on the model.

    Args:
        llm: vLLM's `LLM`.

    Raises:
        ModelError: the engine is not steered.
    """

    def __init__(self, llm: Any) -> None:
        why = names.unread(llm)
        if why is not None:
            raise ModelError(why)
        self._llm = llm

    def __call__(
        self,
        decoder: Decoder,
        taps: Mapping[Site, Tap],
        work: Sequence[Batch],
        chosen: Sequence[Sequence[int]],
        take: Callable[[Site, Tensor, Batch], None],
        progress: bool,
        plan: Readout,
        *,
        shares: bool = False,
    ) -> dict[Site, TokenScale]:
        """Run all batches and pool what is read to one row per text.

        Args:
            decoder: unused; the engine has its own.
            taps: where to read.
            work: the batches.
            chosen: by text the tokens that are read.
            take: called with each site's rows [b, d] of a batch, float32.
            progress: show a progress bar on stderr.
            plan: how the tokens of a text become one row: a mean or one token; where massive ones are left out, texts
                run twice.
            shares: unused; the engine decides.

        Returns:
            By site how long activations are.

        Raises:
            DataError: the readout is an extreme of several tokens, which the engine does not give.
            SteerError: see `steerkit.engines.vllm.recording.ask`.
        """
        if plan.pool != "mean":
            raise DataError(f"readout '{plan}': vLLM gives means and single tokens; fit it in transformers")
        scales = {site: TokenScales() for site in taps}
        total = sum(len(batch.rows) for batch in work)
        with bar("reading", total) if progress else contextlib.nullcontext(lambda: None) as step:
            for batch in work:
                self._run(batch, [chosen[row] for row in batch.rows], scales, take, plan.no_massive)
                for _ in batch.rows:
                    step()
        return {site: scale.result() for site, scale in scales.items()}

    def _run(
        self,
        batch: Batch,
        chosen: Sequence[Sequence[int]],
        scales: Mapping[Site, TokenScales],
        take: Callable[[Site, Tensor, Batch], None],
        no_massive: bool,
    ) -> None:
        texts = [ids[mask != 0].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
        usual = [
            dict.fromkeys(scales, Part(spans_of(tokens), spans_of(range(1, len(text)))))
            for text, tokens in zip(texts, chosen, strict=True)
        ]
        massive: list[dict[Site, set[int]]] = [{} for _ in texts]
        if no_massive:
            found = ask(self._llm, texts, usual)
            massive = [_massive(tokens, read) for tokens, read in zip(chosen, found, strict=True)]
        parts = [
            {site: _without(part, left_out.get(site)) for site, part in of_text.items()}
            for of_text, left_out in zip(usual, massive, strict=True)
        ]
        found = ask(self._llm, texts, parts)
        for site, scale in scales.items():
            for tokens, left_out, of_text in zip(chosen, massive, found, strict=True):
                read = of_text[site]
                if len(read.norms):
                    gone = len(left_out.get(site, set()) & set(tokens))
                    counted = torch.ones(1, len(read.norms), dtype=torch.float32)
                    bins = NormMedian.bins_of(read.norms)[None]
                    scale.add(PassScale(bins, counted, read.middle, read.power, torch.tensor(gone, dtype=torch.long)))
            take(site, torch.stack([of_text[site].mean for of_text in found]), batch)


def _massive(tokens: Sequence[int], found: Mapping[Site, Read]) -> dict[Site, set[int]]:
    """By site the massive tokens of a text, of all but its first one."""
    left_out = {}
    for site, read in found.items():
        norms = torch.cat([torch.zeros(1, dtype=torch.float32), read.norms])[None]
        counted, is_read = torch.ones_like(norms), torch.zeros_like(norms, dtype=torch.bool)
        counted[0, 0] = 0.0
        is_read[0, list(tokens)] = True
        left_out[site] = set(massive_tokens(norms, counted, is_read)[0].nonzero()[:, 0].tolist())
    return left_out


def _without(part: Part, left_out: set[int] | None) -> Part:
    """A part without some tokens."""
    if not left_out:
        return part
    kept = [[token for start, end in spans for token in range(start, end) if token not in left_out] for spans in part]
    return Part(*map(spans_of, kept))
