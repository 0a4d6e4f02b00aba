"""A judge in this process: a causal language model, read by the probabilities of the numbers it may answer with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from steerkit.activations.reading import position_inputs
from steerkit.errors import DataError
from steerkit.evaluate.judges.scale import LEAST_MASS, broken_up, check_scale, expected_value
from steerkit.network.context import check_lengths, named
from steerkit.network.decoder import execution_device, find_decoder
from steerkit.prompts.batching import Batch, batches, pad_token_id, run_batches
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import Rendered, has_chat_template, render

__all__ = ["LocalJudge"]

Spelling: TypeAlias = tuple[int, ...]
"""Token ids of a prompt and what is written behind it."""


class LocalJudge:
    """A local causal language model as judge.

    p(k) is the probability that the answer begins with the number k and does not go on to a longer number of the scale,
    from the log-probabilities of its tokens. Beginnings that numbers share are run once: one pass for each prompt where
    all numbers are single tokens, 2 where a scale 0 to 10 is spelled in digits, 11 for 0 to 100. The number stands
    directly behind the chat template's generation prompt; without a template, behind a space.

    The judge may be the model that is being steered: `score` must then be called outside of every steering context.

    Args:
        model: any decoder-only transformers model, in evaluation mode.
        tokenizer: its tokenizer.
        name: what tables call it; None takes the model's own name.
        batch_size: rows per pass.
        least_mass: probability of all numbers together below which there is no score.
        chat_template_kwargs: passed on to the chat template; None tells it not to think first, where it can.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        name: str | None = None,
        batch_size: int = 8,
        least_mass: float = LEAST_MASS,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._name = name or str(getattr(model, "name_or_path", "")) or type(model).__name__
        self.batch_size, self.least_mass = batch_size, least_mass
        self.chat_template_kwargs = {"enable_thinking": False} if chat_template_kwargs is None else chat_template_kwargs

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @property
    def name(self) -> str:
        """What tables call it."""
        return self._name

    def score(self, prompts: Sequence[str], *, low: int = 0, high: int = 10) -> list[float | None]:
        """Score every prompt; see `Judge.score`.

        Args:
            prompts: each asks for one whole number. Special tokens spelled out in them are broken up, so that judged
                text cannot end its turn.
            low: lower end of the scale.
            high: upper end.

        Raises:
            DataError: the scale is none, or a prompt cannot be rendered.
        """
        check_scale(low, high)
        asked = [self._spelled(prompt, low, high) for prompt in prompts]
        found = self._log_probs(step for spelled in asked for step in spelled.steps)
        return [expected_value(spelled.masses(found), self.least_mass) for spelled in asked]

    def _spelled(self, prompt: str, low: int, high: int) -> _Spelled:
        """A prompt followed by each number of the scale, in tokens."""
        special = {str(token) for token in self.tokenizer.all_special_tokens}
        special |= {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        prompt = broken_up(prompt, special)
        gap = "" if has_chat_template(self.tokenizer) or prompt[-1:].isspace() else " "
        texts = [
            render(
                self.tokenizer,
                Conversation(prompt, answer=f"{gap}{number}"),
                chat_template_kwargs=self.chat_template_kwargs,
            )
            for number in range(low, high + 1)
        ]
        # From one place for all: a token may join the prompt's end to some of the numbers only.
        start = min(text.prompt_length for text in texts)
        if start < 1:
            raise DataError(f"judge {self.name}: nothing comes before the score; give a prompt with text in it")
        return _Spelled(start, {low + place: text.ids for place, text in enumerate(texts)})

    def _log_probs(self, spelled: Iterable[Spelling]) -> dict[Spelling, float]:
        """Log-probability of the last token of each spelling behind the others, nats."""
        wanted: dict[Spelling, set[int]] = {}
        for spelling in spelled:
            wanted.setdefault(spelling[:-1], set()).add(spelling[-1])
        rows = list(wanted)
        rendered = [Rendered("", ids, len(ids), ()) for ids in rows]
        decoder = find_decoder(self.model)
        device = execution_device(decoder)
        check_lengths(decoder, rendered, named("question", rendered))
        found: dict[Spelling, float] = {}

        def run(batch: Batch) -> Tensor:
            ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
            with torch.no_grad():
                logits = self.model(
                    input_ids=ids,
                    attention_mask=mask,
                    use_cache=False,
                    logits_to_keep=1,
                    **position_inputs(decoder.model, mask),
                ).logits[:, -1]
            return torch.log_softmax(logits.float(), dim=-1).cpu()

        work = batches(rendered, self.batch_size, pad_id=pad_token_id(self.tokenizer), side="left")
        for batch, logs in run_batches(work, run):
            for place, row in enumerate(batch.rows):
                found |= {(*rows[row], token): float(logs[place, token]) for token in wanted[rows[row]]}
        return found


class _Spelled(NamedTuple):
    """One prompt with every number of a scale behind it.

    Attributes:
        start: tokens before the first one that numbers may differ in.
        ids: per number the tokens of prompt and number.
    """

    start: int
    ids: dict[int, Spelling]

    @property
    def steps(self) -> list[Spelling]:
        """All spellings up to and with each token that has to be predicted."""
        return [ids[: end + 1] for ids in self.ids.values() for end in range(self.start, len(ids))]

    def masses(self, found: Mapping[Spelling, float]) -> dict[int, float]:
        """Probability that the answer is each number, from the log-probabilities of the steps."""
        begins = {
            ids: math.exp(sum(found[ids[: end + 1]] for end in range(self.start, len(ids))))
            for ids in self.ids.values()
        }
        own = dict(begins)
        for ids, mass in begins.items():
            # What goes on to a longer number is that one's: taken from the longest number it begins with.
            shorter = [ids[:end] for end in range(self.start + 1, len(ids)) if ids[:end] in begins]
            if shorter:
                own[shorter[-1]] -= mass
        return {number: max(own[ids], 0.0) for number, ids in self.ids.items()}
