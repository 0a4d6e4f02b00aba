"""Pages as the tests read them: their fenced blocks, in order, and whether what was printed is what a page shows.

A page is run from top to bottom, in one folder and one Python namespace. A comment on the line above a fence says what
the fence cannot: `<!-- slow -->` (run by `make slow` only), `<!-- not run: REASON -->` (commands are parsed, Python is
compiled), `<!-- file: NAME -->` (the block is the content of that file).
"""

from __future__ import annotations

import functools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
# Pages with a test of their own, and pages that are generated.
ELSEWHERE = ("how-to/write-a-method.md", "results/")

_FENCE = re.compile(r"^(`{3,})(\S*)\s*$")
_COMMENT = re.compile(r"^<!-- (slow|file: (?P<file>\S+)|not run: .+) -->$")
_NUMBER = re.compile(r"[-+]?\d+\.\d+")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and what the comment above it says."""

    line: int
    language: str
    text: str
    mark: str = ""
    file: str | None = None
    shown: str | None = None

    @property
    def is_slow(self) -> bool:
        return self.mark == "slow"

    @property
    def is_run(self) -> bool:
        return not self.mark.startswith("not run")


def pages() -> list[Path]:
    """Every page that a reader opens."""
    return [ROOT / "README.md", ROOT / "AGENTS.md", *sorted(DOCS.rglob("*.md"))]


def runnable() -> list[Path]:
    """The pages whose blocks are run here."""
    return [page for page in pages() if not name_of(page).removeprefix("docs/").startswith(ELSEWHERE)]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page. A `text` block right behind a Python block is what that one prints."""
    found: list[Block] = []
    lines = text.splitlines()
    at = last = 0
    while at < len(lines):
        fence = _FENCE.match(lines[at])
        if not fence:
            at += 1
            continue
        end = next(row for row in range(at + 1, len(lines)) if lines[row] == fence[1])
        body = "\n".join(lines[at + 1 : end]) + "\n"
        comment = _COMMENT.match(lines[at - 1]) if at else None
        file = comment["file"] if comment else None
        mark = comment[1] if comment and not file else ""
        previous = found[-1] if found else None
        between = [line for line in lines[last:at] if line not in ("", "<!-- end -->")]
        if fence[2] == "text" and previous and previous.language == "python" and not between:
            found[-1] = Block(previous.line, "python", previous.text, previous.mark, previous.file, body)
        else:
            found.append(Block(at + 1, fence[2], body, mark, file))
        at = last = end + 1
    return found


def commands(block: Block) -> list[tuple[list[str], str | None]]:
    """The commands of a `console` or `bash` block as words, each with the output shown under it."""
    text = block.text.replace("\\\n", " ")
    if block.language == "bash":
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
        return [(shlex.split(line, comments=True), None) for line in lines]
    found: list[tuple[list[str], str | None]] = []
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        line, _, shown = part.partition("\n")
        found.append((shlex.split(line, comments=True), shown if shown.strip() else None))
    return found


def same(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed.

    Blanks and line breaks do not count, `...` stands for anything left out, and a number with decimals may be off by
    one and a half in its last place: processors round differently.
    """
    wanted, got = tuple(shown.split()), tuple(printed.split())

    @functools.cache
    def fits(at: int, place: int) -> bool:
        if at == len(wanted):
            return place == len(got)
        if wanted[at] == "...":
            return any(fits(at + 1, rest) for rest in range(place, len(got) + 1))
        return place < len(got) and _same_word(wanted[at], got[place]) and fits(at + 1, place + 1)

    for place in range(len(got), -1, -1):  # from the end, so that the recursion stays shallow
        for at in range(len(wanted), -1, -1):
            fits(at, place)
    return fits(0, 0)


def _same_word(shown: str, printed: str) -> bool:
    if shown.endswith("...") and len(shown) > 3 and not printed.endswith("..."):
        return printed.startswith(shown[:-3])
    if _NUMBER.sub("#", shown) != _NUMBER.sub("#", printed):
        return False
    for left, right in zip(_NUMBER.findall(shown), _NUMBER.findall(printed), strict=True):
        step = 10.0 ** -len(left.partition(".")[2])
        if abs(float(left) - float(right)) > 1.5 * step + 1e-12:
            return False
    return True


def anchors(text: str) -> set[str]:
    """The anchors that a forge gives the headings of a page."""
    outside = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for title in re.findall(r"^#+ (.+)$", outside, flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        count = 0
        while (one := f"{slug}-{count}" if count else slug) in found:
            count += 1
        found.add(one)
    return found | set(re.findall(r'<a id="([^"]+)">', text)) | set(re.findall(r"^\((.+)\)=$", text, re.MULTILINE))


def links(text: str) -> list[str]:
    """Targets of the links of a page, code left out."""
    outside = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    outside = re.sub(r"`[^`\n]*`", "", outside)
    return re.findall(r"\]\(([^)\s]+)\)", outside)
