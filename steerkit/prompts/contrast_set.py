"""`ContrastSet`: conversations that show a behaviour and others that show its opposite, of lists or files."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerkit.errors import DataError, near_miss
from steerkit.prompts.conversation import SIDES, Conversation
from steerkit.prompts.files.columns import Columns
from steerkit.prompts.files.pairs import answered
from steerkit.prompts.files.reading import read_rows
from steerkit.prompts.files.rows import item_at
from steerkit.prompts.files.sides import of_labelled, of_table, read_sides
from steerkit.prompts.files.source import name_of
from steerkit.prompts.splitting import Marks, drawn, warn_of_known_items

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame

    from steerkit.prompts.conversation import Prompt

__all__ = ["ContrastSet"]

# Held out by `split` where neither the caller nor the file says how much.
_DEFAULT_HELD_OUT = 0.25


@dataclass(frozen=True)
class ContrastSet:
    """What shows a behaviour and what shows its opposite.

    Attributes:
        positive: conversations that show it.
        negative: conversations that do not.
        paired: item i of one side belongs to item i of the other.
        source: the name of where the data came from; not part of the digest.
        marks: which pairs the file marks as held out; empty where it marks none.
        origins: of the items of either side, the source that the file names for each; empty where it names none. Not
            part of the digest.
        topics: of labelled prompts of either side, the topic that the file names for each, "" where it names none;
            empty where it names none at all. Not part of the digest.

    Raises:
        DataError: when a side is empty or holds something else than conversations, pairs are of unequal number, both
            sides are the same, or there are marks, origins or topics without one for each pair or item.
    """

    positive: tuple[Conversation, ...]
    negative: tuple[Conversation, ...]
    paired: bool
    source: str = ""
    marks: tuple[bool, ...] = ()
    origins: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    topics: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    def __post_init__(self) -> None:
        for name in SIDES:
            side = tuple(getattr(self, name))
            object.__setattr__(self, name, side)
            if not side:
                raise DataError(f"one-sided data: there is no {name} item; a contrast needs both sides")
            for index, item in enumerate(side):
                if not isinstance(item, Conversation):
                    raise DataError(f"{name} item {index}: expected a Conversation, got {reprlib.repr(item)}")
        sizes = f"{len(self.positive)} positive and {len(self.negative)} negative"
        if self.paired and len(self.positive) != len(self.negative):
            raise DataError(f"{sizes} items cannot be pairs; give as many on each side, or paired=False")
        if self.positive == self.negative:
            raise DataError(f"the {sizes} items are the same text, so there is nothing to learn; give two sides")
        if self.marks and not (self.paired and len(self.marks) == len(self.positive)):
            raise DataError(f"{len(self.marks)} held-out marks for {sizes} items; give one for each pair, or none")
        for what in ("origins", "topics"):
            named = tuple(map(len, getattr(self, what)))
            if any(named) and named != (len(self.positive), len(self.negative)):
                raise DataError(f"{named} {what} for {sizes} items; give one for each item, or none")

    @classmethod
    def from_prompts(
        cls,
        positive: Sequence[Prompt],
        negative: Sequence[Prompt],
        *,
        raw: bool = False,
        system: str | None = None,
        paired: bool | None = None,
    ) -> ContrastSet:
        """Contrast two lists of prompts.

        Args:
            positive: prompts that show the behaviour: strings, lists of messages, or conversations.
            negative: prompts that do not.
            raw: leave strings as they are, without a chat template.
            system: a system prompt for all of them.
            paired: whether prompt i of one list belongs to prompt i of the other; None: when the lists are as long.

        Returns:
            The contrast set.

        Raises:
            DataError: when a side is empty or one string, the sides are the same, a prompt is of another type, or
                `paired` is asked of lists of unequal length.

        Example:
            >>> data = ContrastSet.from_prompts(["I love it", "I adore it"], ["I hate it"])
            >>> len(data), data.paired
            (2, False)
        """
        sides = []
        for name, prompts in zip(SIDES, (positive, negative), strict=True):
            if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable):
                raise DataError(f"{name}: expected a list of prompts, got {reprlib.repr(prompts)}; put it into a list")
            side = []
            for index, item in enumerate(prompts):
                with item_at(f"{name} item {index}"):
                    side.append(Conversation.of(item, raw=raw, system=system))
            sides.append(tuple(side))
        return cls(sides[0], sides[1], paired=len(sides[0]) == len(sides[1]) if paired is None else paired)

    @classmethod
    def from_answers(
        cls, triples: Iterable[tuple[Prompt, str, str]], *, raw: bool = False, system: str | None = None
    ) -> ContrastSet:
        """Contrast two answers to the same prompt.

        Args:
            triples: (prompt, positive answer, negative answer).
            raw: leave string prompts as they are; prompt and answer are then joined verbatim.
            system: a system prompt for all of them.

        Returns:
            The contrast set, paired.

        Raises:
            DataError: when there is no triple, an item is no triple, an answer is empty or no string, or every
                positive answer is its negative one.

        Example:
            >>> data = ContrastSet.from_answers([("How was your day?", "Great!", "Awful.")])
            >>> data.positive[0].answer
            'Great!'
        """
        pairs = []
        for index, triple in enumerate(triples):
            if not isinstance(triple, (tuple, list)) or len(triple) != 3:
                raise DataError(f"item {index}: expected (prompt, positive, negative), got {reprlib.repr(triple)}")
            prompt, *answers = triple
            with item_at(f"item {index}"):
                pairs.append([answered(prompt, answer, raw=raw, system=system) for answer in answers])
        return _from_pairs(pairs)

    @classmethod
    def from_jsonl(cls, path: str | Path) -> ContrastSet:
        """Read a file of pairs, one JSON object a line; blank lines are skipped. Other formats: see `from_file`.

        The forms: ``{"prompt", "positive", "negative"}``, two answers to a prompt; ``{"positive", "negative"}``, two
        prompts; ``{"prompt", "system": {"positive", "negative"}}``, one prompt under two system prompts, with or
        without the answers ``"positive"`` and ``"negative"``. Prompts are strings or lists of messages. Every line may
        also have ``"raw"`` and ``"held_out"`` (true or false), ``"source"``, by which `split` can hold items out where
        every line has it, and ``"id"`` and ``"topic"``, which are not read.

        Args:
            path: the file.

        Returns:
            The contrast set, paired, with the file's name as its source.

        Raises:
            DataError: when the file is missing or holds no item, or, with the line's number, when a line is not UTF-8,
                not JSON, has an unknown key, lacks one, or has a value of the wrong type.
        """
        return cls.from_file(path)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        against: str | Path | None = None,
        columns: Mapping[str, str] | None = None,
        positive: str | int | bool | None = None,
        negative: str | int | bool | None = None,
        raw: bool = False,
        escapes: bool = False,
    ) -> ContrastSet:
        r"""Read pairs or labelled prompts of any file: JSON, JSONL, CSV, TSV, parquet; what it is, its content tells.

        Pairs are found by the usual names of their columns: ``positive`` and ``negative``, ``chosen`` and ``rejected``
        (texts or messages), ``answer_matching_behavior`` and ``answer_not_matching_behavior``, with the prompt in
        ``prompt``, ``question``, ``instruction`` and others, or in the messages. Rows with a ``label`` and no pair are
        labelled prompts.

        Args:
            path: the file, - for stdin, or ``hf:NAME:SPLIT``, a data set that `datasets` loads by its name.
            against: a second file; both then hold prompts, this one those of the negative side.
            columns: names that are not the usual ones: of ``prompt``, ``positive``, ``negative``, ``response``,
                ``system``, ``label``, ``source``.
            positive: of labelled prompts, the label of the positive side; None where it is clear, as 1 beside 0.
            negative: the label of the other side; None where there is only one other.
            raw: leave prompts that are text as they are, without the chat template.
            escapes: read a written ``\n`` in prompts as a line break.

        Returns:
            The contrast set with the file's name as its source; pairs are paired, labelled prompts are not.

        Raises:
            DataError: the file cannot be read or holds nothing of use, or, with its place, a row is wrong.

        Warns:
            UserWarning: a text holds the marks of a chat template and is not read raw.
        """
        labels = (positive, negative)
        named = Columns(columns or {})
        found = read_sides(path, against=against, columns=named, labels=labels, raw=raw, escapes=escapes)
        with item_at(name_of(path)):
            return cls(**found._asdict())

    @classmethod
    def from_labelled(
        cls, path: str | Path, *, positive: str | int | bool | None = None, negative: str | int | bool | None = None
    ) -> ContrastSet:
        """Read a file of labelled prompts, one JSON object a line or any other format that `from_file` knows.

        A line is ``{"prompt", "label", "source"}``: a string or list of messages, which side it is on, and which
        collection it comes from, by which `split` can hold whole collections out. It may also have ``"raw"``,
        ``"topic"``, by which gates tell ordinary prompts from others, and ``"id"``, which is not read. Either all lines
        have a source, or none.

        Args:
            path: the file.
            positive: the label of the positive side, a text, 1 or 0, or true or false; None where it is clear, as 1
                beside 0.
            negative: the label of the other; None where the file has only one other.

        Returns:
            The contrast set, unpaired, with the file's name as its source.

        Raises:
            DataError: when the file is missing or holds no item, a label is not in it, the other one is not clear, only
                some lines name a source, or, with the line's number, when a line cannot be read.
        """
        rows = read_rows(path, what="labelled prompts")
        found = of_labelled(rows, Columns(), (positive, negative))
        with item_at(rows.name):
            return cls(**found._asdict())

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset | DataFrame | Iterable[Mapping[str, object]] | Mapping[str, Sequence[object]],
        *,
        positive: str | None = None,
        negative: str | None = None,
        prompt: str | None = None,
        system: str | None = None,
    ) -> ContrastSet:
        """Take a contrast from the columns of a table in memory.

        Args:
            dataset: one split of a `datasets.Dataset`, a DataFrame, a list of objects, or an object of columns.
            positive: the column of prompts that show the behaviour, or of answers where `prompt` is given. None finds
                both sides, and the prompt, by their usual names (see `from_file`).
            negative: the column of the others.
            prompt: the column of prompts that both answer.
            system: the column of system prompts that both have.

        Returns:
            The contrast set, paired row by row; unpaired where the usual columns are those of labelled prompts.

        Raises:
            DataError: when a column is missing, `dataset` is a dictionary of splits, it has no row, or a cell is
                neither text nor a list of messages (the row is named).
        """
        return cls(**of_table(dataset, positive, negative, prompt=prompt, system=system)._asdict())

    def __len__(self) -> int:
        return max(len(self.positive), len(self.negative))

    @property
    def sides(self) -> tuple[tuple[Conversation, ...], tuple[Conversation, ...]]:
        """The positive and the negative items."""
        return self.positive, self.negative

    @property
    def digest(self) -> str:
        """The sha256, in hex, of every text, role and flag that is fitted on; any character changes it."""
        sides = [[[item.prompt, item.answer, item.system, item.raw] for item in getattr(self, name)] for name in SIDES]
        content = {"paired": self.paired, "sides": sides}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def split(
        self, *, held_out: float | None = None, seed: int = 0, held_out_sources: Sequence[str] = ()
    ) -> tuple[ContrastSet, ContrastSet]:
        """Part the set into one to fit on and one to measure on.

        Pairs stay together; unpaired sides are split each on its own. Items with one prompt, or equal ones, stay
        together, whatever their answers and system prompts (case and white space do not count): none is measured on
        that asks what was fitted on. Both parts keep the order of the whole.

        Args:
            held_out: the share that is held out, between 0 and 1. None: what the file marks, else a quarter.
            seed: draws which items are held out; not used where the file marks them.
            held_out_sources: hold out all items of these `origins` instead, so that nothing is measured on items of a
                collection that was fitted on.

        Returns:
            What to fit on, and what is held out.

        Raises:
            DataError: when the share is not between 0 and 1, a part would be empty or of two identical sides, or a
                source is not among the origins.

        Warns:
            UserWarning: marks or sources part items with one prompt, all items have one prompt, or pairs share their
                texts so that they have to come apart.

        Example:
            >>> data = ContrastSet.from_answers([(f"Is {n} nice?", "Yes.", "No.") for n in range(8)])
            >>> [len(part) for part in data.split(held_out=0.25)]
            [6, 2]
        """
        if held_out_sources:
            if held_out is not None:
                raise DataError(f"held_out={held_out} beside held_out_sources; give one of them")
            marks = self._of_sources(held_out_sources)
        elif held_out is None and self.marks:
            if len(set(self.marks)) == 1:
                every = "every" if self.marks[0] else "no"
                raise DataError(f"{every} item is marked held_out, which leaves a part empty; give held_out=0.25")
            marks = Marks(self.marks, self.marks, True)
        else:
            share = _DEFAULT_HELD_OUT if held_out is None else held_out
            marks = drawn(self.sides, paired=self.paired, share=share, seed=seed)
        fitted, measured = self._part(marks, wanted=False), self._part(marks, wanted=True)
        warn_of_known_items(fitted.sides, measured.sides)
        return fitted, measured

    def _of_sources(self, sources: Sequence[str]) -> Marks:
        """Marks of the items that come from some sources."""
        if isinstance(sources, str):
            raise DataError(f"held_out_sources: got one text, {sources!r}; give a list of sources")
        known = {origin for side in self.origins for origin in side}
        for source in sources:
            if source not in known:
                raise DataError(f"held_out_sources: no item has the source {source!r}; {near_miss(source, known)}")
        positive, negative = (tuple(origin in sources for origin in side) for side in self.origins)
        for name, marks in zip(SIDES, (positive, negative), strict=True):
            if len(set(marks)) == 1:
                none = "every" if marks[0] else "no"
                raise DataError(f"held_out_sources: {none} {name} item comes from {', '.join(sources)}; give others")
        return Marks(positive, negative, self.paired)

    def items_at(self, positive: Sequence[int], negative: Sequence[int] | None = None) -> ContrastSet:
        """Some of the items, with what the file says of each; held-out marks are for the whole set and go.

        Args:
            positive: places of the positive ones, in the order wanted.
            negative: places of the negative ones; None takes the same places, of pairs.

        Raises:
            DataError: a side is left empty, or pairs without partners.
        """
        kept = (positive, positive if negative is None else negative)
        sides = [tuple(side[place] for place in places) for side, places in zip(self.sides, kept, strict=True)]
        origins, topics = (
            tuple(tuple(side[place] for place in places if side) for side, places in zip(named, kept, strict=True))
            for named in (self.origins, self.topics)
        )
        facts: dict[str, Any] = {"marks": (), "origins": origins, "topics": topics}
        return replace(self, positive=sides[0], negative=sides[1], **facts)

    def _part(self, marks: Marks, *, wanted: bool) -> ContrastSet:
        """The items of both sides whose mark is `wanted`."""
        kept = [[place for place, mark in enumerate(side) if mark is wanted] for side in marks[:2]]
        return replace(self, paired=marks.paired, marks=()).items_at(*kept)


def _from_pairs(pairs: Sequence[Sequence[Conversation]], *, source: str = "") -> ContrastSet:
    """A paired set of [positive, negative] items."""
    positive, negative = (tuple(pair[side] for pair in pairs) for side in (0, 1))
    return ContrastSet(positive, negative, paired=True, source=source)
