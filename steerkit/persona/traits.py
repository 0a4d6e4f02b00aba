"""Trait specifications: what a trait is, how to bring it about, what to ask, and how to rate it.

The parts are those of the paper's files: pairs of instructions that ask for the trait and for its opposite, questions
(the first half to extract a vector from, the second half held out) and the rubric of a judge who answers with 0 to 100.

Chen, Arditi, Sleight, Evans, Lindsey (2025), "Persona Vectors: Monitoring and Controlling Character Traits in Language
Models", arXiv 2507.21509. Their JSON, ``{"instruction": [{"pos", "neg"}], "questions", "eval_prompt"}``, is read as it
is. Our own files are TOML, which also hold a format number, the trait's name and description, and what both assistants
are called. Where this file departs: the paper keeps the questions of extraction and evaluation in two files.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

from steerkit._support.files import write_whole
from steerkit._support.shipped import trait_path
from steerkit.errors import DataError
from steerkit.persona.instruction import SIDES, Instruction, is_open
from steerkit.persona.trait_checks import check_once, check_strings, check_text, same_text
from steerkit.persona.trait_files import as_toml, read_json, read_toml
from steerkit.prompts.system_prompts import SystemPrompts

__all__ = ["TraitSpec", "slug"]

_PLACES = ("question", "answer")


@dataclass(frozen=True)
class TraitSpec:
    """The specification of one trait.

    Attributes:
        trait: its name, an adjective or a noun that fits into "You are a ... assistant".
        instructions: pairs of instructions; the paper has five.
        questions: what is asked, none of them about the trait; the paper has forty.
        rubric: what a judge is asked, with ``{question}`` and ``{answer}``; the reply is a number from 0 to 100.
        description: one sentence on what the trait looks like.
        assistants: what the two assistants are called; empty names take the trait, and "helpful".

    Raises:
        DataError: a part is missing, empty, of another type, or stands there twice.

    Example:
        >>> spec = TraitSpec.load("optimistic")
        >>> len(spec.instructions), len(spec.extraction_questions), len(spec.held_out_questions)
        (5, 20, 20)
        >>> spec.system_prompt(0, "negative").partition(".")[0]
        'You are a pessimistic assistant'
    """

    trait: str
    instructions: tuple[Instruction, ...]
    questions: tuple[str, ...]
    rubric: str
    description: str = ""
    assistants: tuple[str, str] = ("", "")

    def __post_init__(self) -> None:
        for name in ("trait", "description", "rubric"):
            check_text(name, getattr(self, name), empty=name == "description")
        if "\n" in self.trait:
            raise DataError(f"trait: {self.trait!r} has more than one line; give an adjective")
        check_strings("assistants", self.assistants, empty=True)
        if len(self.assistants) != 2:
            raise DataError(f"assistants: got {len(self.assistants)} names; give one of each side")
        object.__setattr__(self, "instructions", tuple(Instruction(*pair) for pair in self.instructions))
        object.__setattr__(self, "questions", tuple(self.questions))
        object.__setattr__(self, "assistants", tuple(self.assistants))
        object.__setattr__(self, "rubric", self.rubric.strip("\n"))
        self._check_instructions()
        self._check_questions()
        self._check_rubric()

    def _check_instructions(self) -> None:
        if not self.instructions:
            raise DataError("instructions: there is none; give at least one pair, better five")
        for number, pair in enumerate(self.instructions, start=1):
            for side in SIDES:
                check_text(f"instruction {number}, {side}", getattr(pair, side))
            if same_text(*pair) and not is_open(pair.positive):
                raise DataError(f"instruction {number}: both sides are the same text; one asks for the opposite")
        check_once("instruction", [pair.positive for pair in self.instructions])

    def _check_questions(self) -> None:
        if len(self.questions) < 2:
            raise DataError(f"questions: got {len(self.questions)}; give at least two, better forty: half is held out")
        check_strings("questions", self.questions)
        check_once("question", self.questions)

    def _check_rubric(self) -> None:
        written = re.findall(r"\{(\w+)\}", self.rubric)
        for place in _PLACES:
            if place not in written and not is_open(self.rubric):
                others = [name for name in written if name not in _PLACES]
                found = f"; it has {', '.join(f'{{{name}}}' for name in others)}" if others else ""
                raise DataError(f"rubric: no {{{place}}} in it{found}; write it where the {place} belongs")

    @classmethod
    def load(cls, path: str | Path) -> TraitSpec:
        """Read a specification.

        Args:
            path: a .toml file of ours, a .json file of the paper's structure (the trait is then called as the file is),
                or the name of a shipped trait.

        Returns:
            The specification, checked. Places may still have to be filled in: see `open_places`.

        Raises:
            UnknownNameError: no shipped trait of that name.
            DataError: the file cannot be read, has an unknown key (with near misses), lacks one, or see the class.
        """
        path = trait_path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); give a .toml or .json file") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
        try:
            return cls(**(read_json(path.stem, text) if path.suffix == ".json" else read_toml(text)))
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the specification as TOML, whole or not at all.

        Args:
            path: a .toml file.

        Raises:
            DataError: another ending, or it cannot be written.
        """
        path = Path(path)
        if path.suffix != ".toml":
            raise DataError(f"{path}: a trait specification is a .toml file; give it that ending")
        try:
            write_whole(path, self.to_toml().encode())
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None

    def to_toml(self) -> str:
        """The specification as TOML, which `load` reads."""
        return as_toml(self)

    @property
    def extraction_questions(self) -> tuple[str, ...]:
        """The first half of the questions (of an odd number, the larger one), to extract from."""
        return self.questions[: -(len(self.questions) // 2)]

    @property
    def held_out_questions(self) -> tuple[str, ...]:
        """The second half of the questions, to choose and to measure on."""
        return self.questions[-(len(self.questions) // 2) :]

    @property
    def digest(self) -> str:
        """The sha256, in hex, of everything in it."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def open_places(self) -> tuple[str, ...]:
        """Places that nobody has written yet, such as ``"question 3"``."""
        places = {"description": self.description, "rubric": self.rubric}
        for number, pair in enumerate(self.instructions, start=1):
            places |= {f"instruction {number}, {side}": getattr(pair, side) for side in SIDES}
        places |= {f"question {number}": text for number, text in enumerate(self.questions, start=1)}
        places |= {f"assistants, {side}": name for side, name in zip(SIDES, self.assistants, strict=True)}
        return tuple(place for place, text in places.items() if is_open(text))

    def check_filled(self, path: str | Path = "") -> None:
        """Refuse a specification with places that nobody has written yet.

        Args:
            path: where it came from, for the message.

        Raises:
            DataError: there are such places.
        """
        missing = self.open_places
        if not missing:
            return
        named = f"{path}: " if path else ""
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        places = "1 place is" if len(missing) == 1 else f"{len(missing)} places are"
        raise DataError(
            f"{named}{places} still to be filled in ({'; '.join(missing[:4])}{more}); write them, or "
            f"let a model do it: steerkit persona draft {shlex.quote(self.trait)} --endpoint URL#MODEL --out NEW.toml"
        )

    def assistant(self, side: str) -> str:
        """What the assistant of a side is called.

        Args:
            side: positive or negative.
        """
        return self.assistants[SIDES.index(side)] or (self.trait if side == "positive" else "helpful")

    @property
    def prompting(self) -> SystemPrompts:
        """The system prompts of all instructions, which ask for the trait and for its opposite."""
        every = range(len(self.instructions))
        return SystemPrompts(*(tuple(self.system_prompt(number, side) for number in every) for side in SIDES))

    def system_prompt(self, instruction: int, side: str) -> str:
        """The system prompt of a side: who the assistant is, and an instruction.

        Args:
            instruction: its place, counted from 0.
            side: positive or negative.
        """
        name = self.assistant(side)
        article = "an" if name[:1].lower() in set("aeiou") else "a"
        return f"You are {article} {name} assistant. {getattr(self.instructions[instruction], side)}"


def slug(trait: str) -> str:
    """A trait's name as part of a file's name.

    Args:
        trait: its name.
    """
    return "-".join(re.findall(r"\w+", trait.lower())) or "trait"
