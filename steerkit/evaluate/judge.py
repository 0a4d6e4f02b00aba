"""Judges: a rubric's text in, a number of a scale out, or None where there is none to be had.

The score is an expectation over the judge's own probabilities, finer and steadier than its one most likely answer
(persona vectors, Chen et al. 2025, arXiv 2507.21509):

    score = sum_k k p(k) / sum_k p(k)        over the whole numbers k of the scale

and undefined where sum_k p(k) < 0.25: the judge was about to say something else. What could not be scored is None, is
counted, and is never guessed.

An `EndpointJudge` sees the most likely first tokens of an answer. A token is read as the number it spells. Tokenizers
that write every digit as a token of its own give "1" for 1 and for 10 alike; where that may be so (a token begins a
longer number of the scale, and no token has two digits) the answer's text is read instead. Scales up to 9 never meet
this. A `LocalJudge` follows every number of the scale to its last token and has no such limit.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from steerkit.activations import position_inputs
from steerkit.data import Conversation, Rendered, batches, has_chat_template, pad_token_id, render
from steerkit.endpoint import FILTERED, Endpoint, told
from steerkit.errors import DataError, SteerError
from steerkit.models import load_model
from steerkit.sites import execution_device, find_decoder

__all__ = [
    "EndpointJudge",
    "Judge",
    "LocalJudge",
    "check_judge",
    "check_scale",
    "expected_score",
    "fill",
    "judge_of",
    "last_question",
    "parse_score",
    "rate",
]

LEAST_MASS = 0.25
LARGEST_SCALE = 1000
LONGEST_ANSWER = 200  # characters; what is longer is not a number and nothing else

Spelling: TypeAlias = tuple[int, ...]
"""Token ids of a prompt and what is written behind it."""

_WHOLE = re.compile(r"[\s▁Ġ]*(0|[1-9][0-9]*)\s*")
_MARKUP = re.compile(r"[*_`\"'\[\]]")
_LABEL = r"(?:(?:(?:final|overall)\s+)?(?:score|rating|grade|answer)\b\s*(?::|=|is\b)?\s*)?"
_SCORED = re.compile(
    rf"\s*{_LABEL}((?:0|[1-9][0-9]*)(?:\.[0-9]+)?)(?:\s*(?:/|out\s+of)\s*([0-9]+))?\s*\.?\s*", re.IGNORECASE | re.ASCII
)
_PLACEHOLDER = re.compile(r"(^> ?)?\{(\w+)\}", re.MULTILINE)


@runtime_checkable
class Judge(Protocol):
    """Whatever turns prompts into numbers of a scale."""

    @property
    def name(self) -> str:
        """What tables call it."""

    def score(self, prompts: Sequence[str], *, low: int = 0, high: int = 10) -> list[float | None]:
        """Score every prompt.

        Args:
            prompts: each asks for one whole number.
            low: lower end of the scale.
            high: upper end.

        Returns:
            One number each, or None where the judge gave none.
        """


class EndpointJudge:
    """A model behind an OpenAI-compatible endpoint (vLLM, llama.cpp, TGI, the large providers).

    Requests are greedy and seeded. Endpoints that give no log-probabilities, or refuse to be asked for them, are read
    as text by `parse_score`. The key is sent to `base_url` alone (redirects are not followed) and shown nowhere.

    Args:
        base_url: such as ``http://localhost:8000/v1``.
        model: the endpoint's name of the model.
        api_key: None takes the environment variable STEERKIT_JUDGE_KEY, else OPENAI_API_KEY; "" sends none.
        timeout: seconds without a sign of the endpoint.
        retries: further tries after time-outs, broken connections, HTTP 408, 429 and 5xx.
        backoff: seconds before the first of them; each further one waits twice as long.
        parallel: requests under way at once.
        max_tokens: length of an answer, in tokens; an answer that is cut off there is not read as text.
        least_mass: probability of all numbers together below which there is no score.

    Raises:
        SteerError: `base_url` is no plain address, the model has no name, or the key holds blanks or the like.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
        parallel: int = 4,
        max_tokens: int = 16,
        least_mass: float = LEAST_MASS,
    ) -> None:
        self._endpoint = Endpoint(base_url, model, api_key, timeout=timeout, retries=retries, backoff=backoff)
        self.base_url, self.model = self._endpoint.base_url, model
        self.parallel, self.max_tokens, self.least_mass = parallel, max_tokens, least_mass
        self._gives_logprobs = True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r}, {self.model!r})"

    @property
    def name(self) -> str:
        """The endpoint's name of the model."""
        return self.model

    def score(self, prompts: Sequence[str], *, low: int = 0, high: int = 10) -> list[float | None]:
        """Score every prompt; see `Judge.score`.

        Args:
            prompts: each asks for one whole number.
            low: lower end of the scale.
            high: upper end.

        Raises:
            SteerError: the endpoint refuses, cannot be reached, or answers with something else.
        """
        check_scale(low, high)
        if not prompts:
            return []
        # The first alone: it finds out whether there are log-probabilities, and a wrong key fails once, not four times.
        replies = [self._ask(prompts[0], threading.Event()), *self._ask_all(prompts[1:])]
        return [self._read(reply, low, high) for reply in replies]

    def _ask_all(self, prompts: Sequence[str]) -> list[_Reply]:
        """The answers to all prompts, some of which are under way at once.

        In threads of our own: nothing waits for those, not even the interpreter's end, when one request fails or
        somebody presses Ctrl-C while the endpoint hangs.
        """
        stop, left = threading.Event(), deque((prompt, Future[_Reply]()) for prompt in prompts)
        answers = [answer for _, answer in left]

        def work() -> None:
            while not stop.is_set():
                try:
                    prompt, answer = left.popleft()
                except IndexError:
                    return
                try:
                    answer.set_result(self._ask(prompt, stop))
                except BaseException as error:  # noqa: BLE001  # raised again where it is waited for
                    answer.set_exception(error)

        for _ in range(min(self.parallel, len(prompts))):
            threading.Thread(target=work, daemon=True).start()
        try:
            return [answer.result() for answer in answers]
        finally:
            stop.set()

    def _read(self, reply: _Reply, low: int, high: int) -> float | None:
        """The score of one answer."""
        if reply.tops and not _may_split_numbers(reply.tops, low, high):
            return expected_score(reply.tops, low, high, least_mass=self.least_mass)
        return None if reply.cut_off else parse_score(reply.text, low, high)

    def _ask(self, prompt: str, stop: threading.Event) -> _Reply:
        """One answer, with log-probabilities where the endpoint gives them."""
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "seed": 0,
        }
        if self._gives_logprobs:
            status, body = self._endpoint.post({**asked, "logprobs": True, "top_logprobs": 20}, stop)
            if status not in (400, 422) or told(body)[1] == FILTERED:
                return self._reply(status, body)
        status, body = self._endpoint.post(asked, stop)
        reply = self._reply(status, body)
        self._gives_logprobs = False  # only now: what was refused was the option, not the prompt
        return reply

    def _reply(self, status: int, body: bytes) -> _Reply:
        """Read a reply.

        Raises:
            SteerError: it is an error, or no chat completion.
        """
        if told(body)[1] == FILTERED:
            return _Reply([], "", cut_off=True)
        self._endpoint.check(status, body)
        try:
            return _Reply.of(body)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise self._endpoint.no_completion(body) from None


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
        return [_expected(spelled.masses(found), self.least_mass) for spelled in asked]

    def _spelled(self, prompt: str, low: int, high: int) -> _Spelled:
        """A prompt followed by each number of the scale, in tokens."""
        special = {str(token) for token in self.tokenizer.all_special_tokens}
        special |= {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        prompt = _broken_up(prompt, special)
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
        found: dict[Spelling, float] = {}
        for batch in batches(rendered, self.batch_size, pad_id=pad_token_id(self.tokenizer), side="left"):
            ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
            with torch.no_grad():
                logits = self.model(
                    input_ids=ids,
                    attention_mask=mask,
                    use_cache=False,
                    logits_to_keep=1,
                    **position_inputs(decoder.model, mask),
                ).logits[:, -1]
            logs = torch.log_softmax(logits.float(), dim=-1).cpu()
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


class _Reply(NamedTuple):
    """What an endpoint answered.

    Attributes:
        tops: the likeliest first tokens with their log-probabilities; empty where the endpoint gives none.
        text: the answer.
        cut_off: it is not the whole answer.
    """

    tops: list[tuple[str, float]]
    text: str
    cut_off: bool

    @classmethod
    def of(cls, body: bytes) -> _Reply:
        """Read a chat completion; whatever is missing raises as Python does."""
        choice = json.loads(body)["choices"][0]
        text = choice["message"]["content"] or ""
        if not isinstance(text, str):
            raise TypeError("content")
        tokens = (choice.get("logprobs") or {}).get("content") or [{}]
        tops = [(str(top["token"]), float(top["logprob"])) for top in tokens[0].get("top_logprobs") or []]
        return cls(tops, text, choice.get("finish_reason") in ("length", FILTERED))


def expected_score(
    tops: Iterable[tuple[str, float]], low: int, high: int, *, least_mass: float = LEAST_MASS
) -> float | None:
    """The expected number over the likeliest tokens.

    Args:
        tops: tokens with their log-probabilities, nats; those that spell no whole number of the scale are left out.
        low: lower end of the scale.
        high: upper end.
        least_mass: probability of all numbers together below which there is no score.

    Returns:
        A number within the scale, or None.

    Example:
        >>> tops = [("7", -0.693147), ("9", -1.386294), ("Well", -1.386294)]  # probabilities 1/2, 1/4, 1/4
        >>> round(expected_score(tops, 0, 10), 3)  # (7/2 + 9/4) / (3/4)
        7.667
    """
    masses: dict[int, float] = {}
    for token, log_prob in tops:
        spelled = _WHOLE.fullmatch(token)
        if spelled and len(spelled[1]) <= len(str(high)) and low <= int(spelled[1]) <= high:
            masses[int(spelled[1])] = masses.get(int(spelled[1]), 0.0) + math.exp(min(log_prob, 0.0))
    return _expected(masses, least_mass)


def parse_score(text: str, low: int, high: int) -> float | None:
    """Read an answer that is one number and nothing else.

    Args:
        text: ``7``, ``7/10``, ``Score: 7``, ``**7**``, ``Rating: [[7]]``, ``{"score": 7}``.
        low: lower end of the scale.
        high: upper end; what stands behind a slash has to be this.

    Returns:
        The number, or None for anything else: two numbers, one beyond the scale, a range, words, nothing.
    """
    text = text.strip()
    if len(text) > LONGEST_ANSWER:
        return None
    if text.startswith("{"):
        number = _of_json(text)
    else:
        # Spaces, not nothing: "1*0" must not become 10.
        found = _SCORED.fullmatch(_MARKUP.sub(" ", text))
        if found is None or (found[2] is not None and float(found[2]) != high):
            return None
        number = float(found[1])
    return number if number is not None and low <= number <= high else None


def fill(rubric: str, values: Mapping[str, str]) -> str:
    r"""Put texts into a rubric, in one go: what is put in is not looked at again.

    A placeholder behind "> " at the start of its line keeps every line of its text behind such a mark, so that no text
    can pass for the rubric's own words.

    Args:
        rubric: with placeholders such as ``{answer}``; other braces are left as they are.
        values: the text for each name.

    Example:
        >>> fill("Rate this:\n> {answer}\nAs asked: {question}", {"answer": "Fine.\n{question}", "question": "{}"})
        'Rate this:\n> Fine.\n> {question}\nAs asked: {}'
    """

    def put(found: re.Match[str]) -> str:
        if found[2] not in values:
            return found[0]
        text = values[found[2]]
        return text if found[1] is None else "\n".join(f"> {line}" for line in text.splitlines() or [""])

    return _PLACEHOLDER.sub(put, rubric)


def last_question(conversation: Conversation) -> str:
    """What was asked last: a string prompt, or the last user turn of a list of messages.

    Args:
        conversation: a prompt.
    """
    if isinstance(conversation.prompt, str):
        return conversation.prompt
    asked = [turn["content"] for turn in conversation.prompt if turn["role"] == "user"]
    return asked[-1] if asked else conversation.prompt[-1]["content"]


def rate(judge: Judge, prompts: Sequence[str], *, low: int, high: int, partly: bool = False) -> Tensor:
    """Let a judge score prompts.

    Args:
        judge: any judge.
        prompts: filled rubrics.
        low: lower end of the scale.
        high: upper end.
        partly: these are some of many prompts, so that it may be that none of them can be scored.

    Returns:
        [n], nan where the judge gave no score.

    Raises:
        DataError: the judge gave another number of scores, one beyond the scale, or, unless `partly`, none at all.
    """
    scores = judge.score(prompts, low=low, high=high)
    if len(scores) != len(prompts):
        raise DataError(
            f"judge {judge.name} gave {len(scores)} scores for {len(prompts)} prompts; it has to give one each"
        )
    given = [score for score in scores if score is not None and not math.isnan(score)]
    beyond = [score for score in given if not low <= score <= high]
    if beyond:
        raise DataError(f"judge {judge.name} gave {beyond[0]!r}; allowed are numbers from {low} to {high}, and None")
    if prompts and not given and not partly:
        raise DataError(
            f"judge {judge.name} scored none of {len(prompts)} prompts; it has to answer with one number from {low} to "
            f"{high} and nothing else: change the rubric or the judge"
        )
    return torch.tensor([math.nan if score is None else float(score) for score in scores])


def check_judge(spec: str | Judge) -> None:
    """Refuse what names no judge, without loading anything.

    Args:
        spec: as for `judge_of`.

    Raises:
        SteerError: it is empty, or no judge.
    """
    ways = "give an endpoint (https://host/v1#model-name), a model's name or folder, or an object with a method score"
    if not isinstance(spec, str | Judge):
        raise SteerError(f"judge: got {type(spec).__name__}; {ways}")
    if isinstance(spec, str) and not spec.strip():
        raise SteerError(f"judge: none is named; {ways}")


def judge_of(spec: str | Judge) -> Judge:
    """A judge from its text form, or as it is.

    Args:
        spec: ``https://host/v1#model-name`` for an endpoint; anything else is a model's name or folder, as for
            `steerkit.load_model`. A local model is loaded once as long as somebody holds its judge.

    Raises:
        SteerError: no judge is named, the address has no model, or what it is given is no judge.
        UnknownNameError: no model of that name.
        ModelError: it cannot be loaded.
    """
    check_judge(spec)
    if not isinstance(spec, str):
        return spec
    if spec.lower().startswith(("http://", "https://")):
        base_url, _, model = spec.partition("#")
        return EndpointJudge(base_url, model)
    judge = _LOADED.get(spec)
    if judge is None:
        judge = _LOADED[spec] = LocalJudge(*load_model(spec), name=spec)
    return judge


_LOADED: WeakValueDictionary[str, LocalJudge] = WeakValueDictionary()


def check_scale(low: int, high: int) -> None:
    """Refuse what is no scale.

    Args:
        low: lower end.
        high: upper end.

    Raises:
        DataError: with what is allowed.
    """
    whole = all(isinstance(end, int) and not isinstance(end, bool) for end in (low, high))
    if not whole or not 0 <= low < high <= LARGEST_SCALE:
        raise DataError(f"scale {low!r} to {high!r}: give two whole numbers from 0 to {LARGEST_SCALE}, the lower first")


def _expected(masses: Mapping[int, float], least_mass: float) -> float | None:
    """The mean of numbers by their probabilities, None where these add up to too little."""
    total = sum(masses.values())
    if not total > 0 or total < least_mass:
        return None
    return sum(number * mass for number, mass in masses.items()) / total


def _may_split_numbers(tops: Iterable[tuple[str, float]], low: int, high: int) -> bool:
    """Whether a token may be the first digit of a longer number of the scale rather than a number."""
    numbers = [found[1] for found in (_WHOLE.fullmatch(token) for token, _ in tops) if found]
    if any(len(number) > 1 for number in numbers):
        return False
    longer = {str(number)[0] for number in range(max(low, 10), high + 1)}
    return bool(longer & set(numbers))


def _of_json(text: str) -> float | None:
    """The number of an object with a score and nothing else."""
    try:
        # Pairs, not a dict: the same key twice is two answers.
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    if len(pairs) != 1 or pairs[0][0].lower() not in ("score", "rating"):
        return None
    value = pairs[0][1]
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _broken_up(text: str, special: Iterable[str]) -> str:
    """A text with a space inside of every special token that it spells out."""
    longest_first = sorted((token for token in special if len(token) > 1), key=len, reverse=True)
    if not longest_first:
        return text
    return re.sub("|".join(map(re.escape, longest_first)), lambda found: f"{found[0][0]} {found[0][1:]}", text)
