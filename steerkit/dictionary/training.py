"""Training a small dictionary: texts in, activations by chunks, steps, and a folder that a killed run goes on from.

The result of a run that was killed and continued is, bit for bit, that of one that was not: after each chunk the whole
state is written, and what comes next is fixed by seed, pass and number of the chunk.

`sae-lens` trains larger ones, and what it writes is read here. Its trainer is not used for this: it keeps the state of
a run as a pickle, which steerkit never reads, what its buffer of activations held is lost with a kill, and it brings
some thirty packages where the loop is a page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from steerkit._support.files import write_whole
from steerkit._support.journal import Journal
from steerkit.dictionary.dictionary import Dictionary
from steerkit.dictionary.learning import Learner, Learning, seed_of
from steerkit.dictionary.token_chunks import TokenChunks
from steerkit.errors import DataError
from steerkit.model.weights import weights_digest
from steerkit.network.sites import Site
from steerkit.prompts.conversation import Conversation

__all__ = ["train_dictionary"]

STATE, PROGRESS, TOKENS = "state.safetensors", "progress.jsonl", "tokens"


def train_dictionary(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[Conversation],
    site: Site | str,
    how: Learning | None = None,
    *,
    work: str | Path,
    keep: bool = True,
    batch_size: int = 16,
    max_tokens: int = 256,
    chunk: int = 1 << 14,
    told: Mapping[str, Any] | None = None,
    step: Callable[[str], None] = lambda words: None,
) -> Dictionary:
    """Train a dictionary on a model's activations.

    Args:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer.
        texts: what the model reads, gone through again from the beginning where tokens are used more than once.
        site: where the activations are read.
        how: the settings.
        work: folder that a killed run goes on from; it may be deleted afterwards.
        keep: keep the activations of the first pass there, two bytes a number, so that later passes need no model.
        batch_size: texts per pass of the model.
        max_tokens: tokens of a text that are read.
        chunk: tokens that are held, shuffled and learned from before the state is written, at least; texts are read in
            groups of four passes.
        told: what the dictionary's file should say of its training, such as the texts; it is part of what a run has to
            have been begun with to be continued.
        step: told in a few words what is being done.

    Returns:
        The dictionary: BatchTopK with its threshold.

    Raises:
        DataError: there is no text, one cannot be rendered, or the folder was begun with something else.
        FitError: activations or the loss are not finite, or do not differ.
        SiteError: the model has no such site.
    """
    how, folder, place = how or Learning(), Path(work), Site.of(site)
    sizes: dict[str, Any] = {"size": chunk, "batch_size": batch_size, "max_tokens": max_tokens}
    chunks = TokenChunks(model, tokenizer, texts, place, **sizes, folder=folder / TOKENS if keep else None)
    header = {
        **{name: value for name, value in asdict(how).items()},
        "site": str(place),
        "weights": weights_digest(model),
        "max_tokens": max_tokens,
        "batch_size": batch_size,
        "chunk": chunk,
        "keep": keep,
        "told": dict(told or {}),
    }
    run = _Run(folder, Journal(folder / PROGRESS, header), how, chunks)
    for learner, row in run.chunks():
        step(f"{learner.seen} of {how.tokens} tokens, {row['unexplained']:.3f} of the variance left")
    made = run.learner
    if made is None:
        raise DataError("no text has a token to learn from; give others")
    config = getattr(model, "config", None)
    trained = {
        **asdict(how),
        **dict(told or {}),
        "tokens_read": run.unique,
        "texts_read": run.texts,
        "passes": run.passes,
        "dead": made.dead,
        "unexplained": run.unexplained,
    }
    return Dictionary(
        **made.tensors(),
        site=place,
        model_type=getattr(config, "model_type", None),
        model_id=getattr(config, "_name_or_path", None) or None,
        provenance={"format": "steerkit", "trained": trained},
    )


class _Run:
    """A run and where it is.

    Args:
        folder: the work folder.
        journal: one row for each chunk that is done.
        how: the settings.
        chunks: the activations.
    """

    def __init__(self, folder: Path, journal: Journal, how: Learning, chunks: TokenChunks) -> None:
        self.folder, self.journal, self.how, self._chunks = folder, journal, how, chunks
        self.learner: Learner | None = None
        self.unexplained = float("nan")
        # The row comes before the state: a kill between the two leaves a row too many, which is dropped.
        self._restored = self._state()
        journal.keep(int(self._restored.pop("done")) if self._restored else 0)

    @property
    def unique(self) -> int:
        """Tokens of the first pass."""
        return sum(row["tokens"] for row in self.journal.rows if row["pass"] == 0)

    @property
    def texts(self) -> int:
        """Texts of the first pass."""
        return max((row["texts"] for row in self.journal.rows if row["pass"] == 0), default=0)

    @property
    def passes(self) -> int:
        """Passes that were begun."""
        return 1 + max((row["pass"] for row in self.journal.rows), default=0)

    def chunks(self) -> Iterator[tuple[Learner, Mapping[str, Any]]]:
        """Learn chunk by chunk until enough tokens are seen; what is done already is left out.

        Yields:
            The learner and what is told of the chunk.
        """
        rows = self.journal.rows
        turn = rows[-1]["pass"] if rows else 0
        if self._restored:
            self.learner = Learner(_two_rows(self._restored), self.how)
            self.learner.restore(self._restored)
            self.unexplained = rows[-1]["unexplained"]
        while self.learner is None or self.learner.seen < self.how.tokens:
            before = len(self.journal)
            for number, tokens, texts in self._pass(turn):
                yield self._learn(turn, number, tokens, texts)
                assert self.learner is not None
                if self.learner.seen >= self.how.tokens:
                    return
            if len(self.journal) == before and not any(row["pass"] == turn for row in self.journal.rows):
                return  # no text at all
            turn += 1

    def _pass(self, turn: int) -> Iterator[tuple[int, Tensor, int]]:
        """The chunks of a pass that are not done: number, tokens, and texts read by then."""
        mine = [row for row in self.journal.rows if row["pass"] == turn]
        if turn == 0 or self._chunks.folder is None:
            after = mine[-1]["texts"] if mine else 0
            for number, chunk in enumerate(self._chunks.read(len(mine), after), start=len(mine)):
                yield number, chunk.rows, chunk.texts
            return
        count = sum(row["pass"] == 0 for row in self.journal.rows)
        order = torch.randperm(
            count, generator=torch.Generator().manual_seed(seed_of("chunks", self.how.seed, turn))
        ).tolist()
        for number in order[len(mine) :]:
            chunk = self._chunks.kept(number)
            yield number, chunk.rows, chunk.texts

    def _learn(self, turn: int, number: int, tokens: Tensor, texts: int) -> tuple[Learner, Mapping[str, Any]]:
        """Learn from a chunk, write the state, then the row."""
        if self.learner is None:
            self.learner = Learner(tokens, self.how)
        draw = torch.Generator().manual_seed(seed_of("tokens", self.how.seed, turn, number))
        order = torch.randperm(len(tokens), generator=draw)
        size = min(self.how.batch, len(tokens))
        found = [
            self.learner.step(tokens[order[start : start + size]])
            for start in range(0, len(tokens) - size + 1, size)
            if self.learner.seen < self.how.tokens
        ]
        self.unexplained = sum(one.unexplained for one in found) / len(found)
        row = {
            "pass": turn,
            "chunk": number,
            "tokens": len(tokens),
            "texts": texts,
            "seen": self.learner.seen,
            "unexplained": self.unexplained,
            "dead": found[-1].dead,
        }
        self.journal.append([row])
        done = torch.tensor(len(self.journal), dtype=torch.int64)
        try:
            write_whole(self.folder / STATE, save({**self.learner.state(), "done": done}))
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be written ({error.strerror}); choose another folder") from None
        return self.learner, row

    def _state(self) -> dict[str, Tensor]:
        """What was learned so far; nothing where nothing was."""
        path = self.folder / STATE
        if not path.exists() or not len(self.journal):
            return {}
        try:
            found: dict[str, Tensor] = load_file(path)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: cannot be read ({error}); delete the folder to begin anew") from None
        if not 0 < int(found.get("done", 0)) <= len(self.journal):
            raise DataError(f"{path}: does not belong to {PROGRESS} beside it; delete the folder to begin anew")
        return found


def _two_rows(state: Mapping[str, Tensor]) -> Tensor:
    """Two different rows of the width that a state has, for a learner that is restored right after."""
    width = len(state["decoder_bias"])
    return torch.eye(2, width, dtype=torch.float32)
