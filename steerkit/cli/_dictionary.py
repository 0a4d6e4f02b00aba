"""`steerkit dictionary train` and `decompose`: a small dictionary of your own, and vectors as sums of its latents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit._support.json_values import jsonable
from steerkit._support.progress import status
from steerkit.cli._files import check_writable
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import BatchSize, Json, number, print_json, stdout, table
from steerkit.cli._written import check_written

if TYPE_CHECKING:
    from steerkit.dictionary.decomposition import Decomposition
    from steerkit.dictionary.fitness import Fitness
    from steerkit.network.sites import Site
    from steerkit.prompts.conversation import Conversation
    from steerkit.prompts.files.lines import Lines

__all__ = ["decompose", "train"]

_GLANCE = 1 << 20  # bytes

TextsOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Texts, prompts or chats, JSONL or a text a line. (default: what ships)"),
]
SiteOption = Annotated[str | None, typer.Option(help="Such as resid_post.14. (default: the block in the middle)")]
WorkOption = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="What a killed run goes on from. (default: beside --out)")
]
KeepOption = Annotated[bool, typer.Option(help="Keep activations in the work folder, so that later passes are fast.")]
DictionaryOption = Annotated[
    str, typer.Option("--dictionary", metavar="FILE", help="A file or folder of any known format, or a shipped name.")
]


@loads_model
def train(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the dictionary (.safetensors).")],
    texts: TextsOption = None,
    site: SiteOption = None,
    latents: Annotated[int, typer.Option(min=1, help="How many latents.")] = 1536,
    top_k: Annotated[int, typer.Option(min=1, help="How many fire at a token, on average.")] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens learned from; texts are gone through again.")] = 1_000_000,
    learning_rate: Annotated[float, typer.Option(help="Of Adam.")] = 1e-3,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a text that are read.")] = 256,
    work: WorkOption = None,
    keep: KeepOption = True,
    seed: Annotated[int, typer.Option(min=0, help="Fixes beginning and order.")] = 0,
    model: ModelChoice = DEFAULT,
    batch_size: BatchSize = 16,
    as_json: Json = False,
) -> None:
    """Train a small dictionary of latents (BatchTopK) on a model's activations at one site.

    Texts are streamed, so memory does not grow with them. A killed run goes on from its work folder when the same
    command is given again, and ends with the same numbers. How well it explains texts that it was not trained on, the
    shipped neutral ones, is told at the end: read that before you use a latent.
    """
    from steerkit.dictionary.fitness import check_dictionary
    from steerkit.dictionary.learning import Learning
    from steerkit.dictionary.training import train_dictionary
    from steerkit.network.decoder import find_decoder
    from steerkit.network.sites import Site

    if out.suffix != ".safetensors":
        raise typer.BadParameter(f"--out: {out}; a dictionary's file ends in .safetensors")
    check_written(site=site)
    check_writable(out)
    how = Learning(latents=latents, top_k=top_k, tokens=tokens, learning_rate=learning_rate, seed=seed)
    read, told = _texts(texts)
    folder = work or out.with_name(f"{out.stem}.work")
    if folder.exists() and not folder.is_dir():
        raise typer.BadParameter(f"--work: {folder} is a file; give a folder")
    loaded, tokenizer = model.load()
    depth = find_decoder(loaded).num_layers
    place = Site(depth // 2, "resid_post") if site is None else Site.of(site)
    options: dict[str, Any] = {"work": folder, "keep": keep, "batch_size": batch_size, "max_tokens": max_tokens}
    with status("training") as step:
        found = train_dictionary(loaded, tokenizer, read, place, how, told=told, step=step, **options)
        written = found.compact()
        written.save(out)
        step("measuring")
        fits = check_dictionary(loaded, tokenizer, written)
    answer = {"file": str(out), "site": str(place), "work": str(folder), **written.provenance["trained"]}
    if as_json:
        print_json(jsonable({**answer, "neutral": asdict(fits)}))
        return
    typer.echo(
        f"wrote {out}: {latents} latents at {place}, {answer['tokens_read']} tokens of {answer['texts_read']} texts"
    )
    typer.echo(_words(fits))
    typer.echo(f"{folder} may be deleted")


def decompose(
    vector: Annotated[str, typer.Option(metavar="FILE", help="A vector file, a shipped name, or hub:USER/NAME.")],
    dictionary: DictionaryOption,
    most: Annotated[int, typer.Option(min=1, help="Latents at the most.")] = 16,
    random: Annotated[int, typer.Option(min=1, help="Random directions, decomposed beside.")] = 10,
    as_json: Json = False,
) -> None:
    """Write a vector as a sum of a few latents, and tell what is left over.

    Weights are not negative, as latents are not. The same number of latents explains a part of any direction: what it
    explains of random ones stands beside. A vector that acts at another block than the dictionary's is compared all the
    same, and that is said.
    """
    from steerkit._support.shipped import vector_path
    from steerkit.dictionary import decomposition as parts
    from steerkit.dictionary import load_dictionary
    from steerkit.errors import VectorMismatchError
    from steerkit.evaluate.discoveries import directions_of
    from steerkit.vector.steering_vector import SteeringVector

    held = load_dictionary(dictionary)
    directions = directions_of(SteeringVector.load(vector_path(vector)))
    if not directions:
        raise VectorMismatchError(f"{vector}: writes no single direction, so there is none to take apart")
    found = {site: parts.decompose(one, held, most=most, random=random) for site, one in directions.items()}
    if as_json:
        sites = [{"site": str(site), **one.as_json()} for site, one in found.items()]
        print_json(jsonable({"vector": vector, "dictionary": str(dictionary), "at": str(held.site), "sites": sites}))
        return
    for site, one in found.items():
        _show(site, one, held.site)


@dataclass(frozen=True)
class _FileTexts:
    """The texts of a JSONL file, read anew each time they are gone through."""

    lines: Lines

    def __iter__(self) -> Iterator[Conversation]:
        from steerkit.errors import DataError

        for row in self.lines:
            try:
                yield _text(row.value)
            except DataError as error:
                raise DataError(f"{self.lines.name}, {row.place}: {error}") from None


def _text(value: Any) -> Conversation:
    """One text: {"text": ...} as it stands, else a prompt or a chat, with its answer where there is one.

    Raises:
        DataError: it is none of these.
    """
    from steerkit.prompts.conversation import Conversation
    from steerkit.prompts.files.prompts import prompt_of

    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return Conversation(value["text"], raw=True)
    answer = value.pop("response", None) if isinstance(value, dict) else None
    found = prompt_of(value)
    return found if answer is None else Conversation.of(found, answer=answer)


def _texts(source: str | None) -> tuple[Iterable[Conversation], dict[str, str]]:
    """The texts, and what the dictionary's file says of them.

    Raises:
        DataError: the file cannot be read.
    """
    from steerkit.prompts.conversation import Conversation
    from steerkit.prompts.files.columns import Columns
    from steerkit.prompts.files.lines import lines_of
    from steerkit.prompts.files.reading import read_rows

    if source is None:
        shipped = _shipped()
        told = {"texts": "the training items of the shipped recipes, both sides"}
        return shipped, {**told, "texts_digest": _digest(repr(shipped).encode())}
    lines, name = lines_of(source, Columns()), Path(source).name
    if lines is not None:
        return _FileTexts(lines), {"texts": name, "texts_digest": _glance(Path(source))}
    rows = [row.value for row in read_rows(source, what="texts").rows]
    found = [Conversation(one, raw=True) if isinstance(one, str) else _text(one) for one in rows]
    return found, {"texts": name, "texts_digest": _digest(repr(found).encode())}


def _glance(path: Path) -> str:
    """A digest of a file's size, beginning and end: a changed file is told, and a large one not read twice."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(_GLANCE)
        file.seek(max(size - _GLANCE, 0))
        return _digest(f"{size}\n".encode() + first + file.read())


def _digest(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()[:16]


def _shipped() -> list[Conversation]:
    """Prompts with both answers of the shipped recipes' training items."""
    from steerkit._support.shipped import recipes
    from steerkit.errors import SteerError
    from steerkit.recipe import find_recipe

    found: dict[str, Conversation] = {}
    for name in sorted(recipes()):
        try:
            train, _ = find_recipe(name).split()
        except SteerError:
            continue
        for one in (*train.positive, *train.negative):
            found.setdefault(repr(one), one)
    return list(found.values())


def _words(fits: Fitness) -> str:
    return (
        f"on {fits.tokens} tokens of the neutral texts, which it was not trained on: {fits.fvu:.3f} of the variance "
        f"left (FVU), {fits.l0:.1f} latents fire at a token, {fits.dead:.0%} of all never do"
    )


def _show(site: Site, found: Decomposition, own: Site) -> None:
    """The latents of one site's direction."""
    console = stdout()
    shown = table("latent", "weight", right=("latent", "weight"), title=f"{site}")
    for latent, weight in zip(found.latents, found.weights.tolist(), strict=True):
        shown.add_row(str(latent), number(weight))
    console.print(shown)
    drawn = sorted(found.random)
    console.print(
        f"{len(found.latents)} latents explain {found.explained:.0%} of it; of random directions {drawn[0]:.0%} to "
        f"{drawn[-1]:.0%}" + ("" if site == own else f"; the dictionary is of {own}")
    )
