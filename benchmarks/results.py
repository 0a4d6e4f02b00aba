"""Pages of measured figures: `docs/results/NAME.md`, rendered from `NAME.json` beside it.

A page names the command that makes it, the date, the versions and a digest of the model's weights. The benchmarks write
theirs under `--write`; `python -m benchmarks.results` renders every page from its JSON again.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "results"
MODEL = "smollm2-135m"
Part = Any
"""A paragraph as text, a table {"columns", "rows"} of text cells, or {"printed": text} as the terminal showed it."""


def write(
    name: str,
    title: str,
    command: str,
    parts: Sequence[Part],
    *,
    model: Any = None,
    vectors: Mapping[str, str] | None = None,
    note: str = "",
    folder: Path = FOLDER,
    **more: Any,
) -> Path:
    """Write a page of what has just been measured, and its JSON.

    Args:
        name: the files' name.
        title: the page's heading.
        command: what to type in the repository's root to measure anew.
        parts: paragraphs and tables, in order.
        model: the model that was measured, None where there was none.
        vectors: digests by name of the shipped vectors that were measured.
        note: what else is to be known of how the figures came about.
        folder: where the page goes.
        **more: further entries of the JSON, which the page does not show.
    """
    from steerkit._support.commit import commit
    from steerkit.evaluate.store_identity import environment, weights_digest

    content = {
        "title": title,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {package: environment()[package] for package in ("steerkit", "torch", "transformers")},
        "model": None if model is None else {"name": MODEL, "digest": weights_digest(model)},
        "vectors": dict(vectors or {}),
        "commit": commit(),
        "note": note,
        "parts": list(parts),
        **more,
    }
    return save(name, content, folder)


def save(name: str, content: Mapping[str, Any], folder: Path = FOLDER) -> Path:
    """Write a page's JSON and the Markdown that it renders to."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")
    page = folder / f"{name}.md"
    page.write_text(render(content), encoding="utf-8")
    return page


def render(content: Mapping[str, Any]) -> str:
    """The Markdown of a page."""
    versions = ", ".join(f"{package} {version}" for package, version in content["versions"].items())
    model = content["model"]
    facts = [["command", f"`{content['command']}`"], ["date", content["date"]], ["versions", versions]]
    if content.get("commit"):
        facts.append(["commit", f"`{content['commit']}`"])
    if model:
        facts.append(["model", f"{model['name']}, weights `{model['digest'][:16]}`"])
    if content["vectors"]:
        facts.append(["vectors", ", ".join(f"{one} `{digest[:16]}`" for one, digest in content["vectors"].items())])
    blocks = [f"# {content['title']}", *map(_block, content["parts"]), "## How it was measured"]
    blocks += [content["note"]] if content["note"] else []
    blocks.append(_block({"columns": ["what", "value"], "rows": facts}))
    return "\n\n".join(blocks) + "\n"


def _block(part: Part) -> str:
    if isinstance(part, str):
        return part
    if "printed" in part:
        return f"```text\n{part['printed']}\n```"
    lines = [part["columns"], ["---"] * len(part["columns"]), *part["rows"]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def parts_of(markdown: str) -> list[Part]:
    """Paragraphs and tables of a text, as `render` takes them."""
    parts: list[Part] = []
    for block in markdown.strip().split("\n\n"):
        lines = block.strip().splitlines()
        table = [line for line in lines if line.startswith("|")]
        words = "\n".join(line.rstrip() for line in lines if not line.startswith("|")).strip()
        if words:
            parts.append(words)
        if table:
            rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in table]
            parts.append({"columns": rows[0], "rows": rows[2:]})
    return parts


class _Tee(io.StringIO):
    """Keeps what is printed and shows it too."""

    def write(self, text: str) -> int:
        sys.__stdout__.write(text)  # type: ignore[union-attr]
        return super().write(text)


@contextlib.contextmanager
def recorded(
    name: str, title: str, module: str, *, wanted: bool, printed: bool = False, **facts: Any
) -> Iterator[dict[str, Any]]:
    """Make a page of what is printed inside, where that is wanted.

    Args:
        name: the page's name.
        title: its heading.
        module: what is run, for the command that the page names.
        wanted: whether to write.
        printed: the text is no Markdown and stays as printed.
        **facts: as `write` takes them; the dictionary that is yielded takes more (the model, once it is loaded).
    """
    if not wanted:
        yield facts
        return
    shown = _Tee()
    with contextlib.redirect_stdout(shown):
        yield facts
    text = shown.getvalue().strip("\n")
    parts = [{"printed": text}] if printed else parts_of(text)
    page = write(name, title, shlex.join(["python", "-m", module, *sys.argv[1:]]), parts, **facts)
    print(f"wrote {page}", file=sys.stderr)


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.json")):
        save(path.stem, json.loads(path.read_text(encoding="utf-8")))
