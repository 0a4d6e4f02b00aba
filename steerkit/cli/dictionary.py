"""`steerkit dictionary check`: what a dictionary is, and how well it fits a model."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit._support.progress import status
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._program import Command, paragraphs
from steerkit.cli._shared import Json, print_json, stdout, table

if TYPE_CHECKING:
    from steerkit.dictionary.dictionary import Dictionary
    from steerkit.dictionary.fitness import Fitness

__all__ = ["SiteOption", "app", "read_dictionary"]

app = typer.Typer(no_args_is_help=True, help="Dictionaries of latents (sparse autoencoders).")

SiteOption = Annotated[
    str | None, typer.Option(help="Where it belongs, such as resid_post.12, where its files do not say.")
]


def read_dictionary(path: str, site: str | None) -> Dictionary:
    """Read a dictionary from wherever it lies.

    Args:
        path: a file or a folder.
        site: where it belongs; None takes what its files say.
    """
    from steerkit.dictionary import load_dictionary

    return load_dictionary(path, site=site)


@loads_model
def check(
    dictionary: Annotated[
        str,
        typer.Argument(
            metavar="DICTIONARY",
            help="A folder of SAELens, sparsify or Llama Scope, a params.npz, our own file, or a shipped name.",
        ),
    ],
    site: SiteOption = None,
    model: ModelChoice = DEFAULT,
    as_json: Json = False,
) -> None:
    """Show what a dictionary is, and how well it fits your model on neutral texts.

    FVU is the share of variance that it does not explain: near 0 it fits, near 1 or above it was trained on another
    model, place or scale. Exit code 1 where it explains nothing.
    """
    one = read_dictionary(dictionary, site)
    from steerkit.dictionary.fitness import check_dictionary

    loaded, tokenizer = model.load()
    with status("reading neutral texts"):
        found = check_dictionary(loaded, tokenizer, one)
    if as_json:
        print_json({"file": dictionary, **_facts(one), **asdict(found), "explained": found.explained})
    else:
        _show(dictionary, one, found)
    if found.fvu >= 1.0:
        if not as_json:
            typer.echo("it explains nothing of this model's activations: another model, place or scale", err=True)
        raise typer.Exit(1)


def _facts(one: Dictionary) -> dict[str, Any]:
    return {
        **one.facts(),
        "latents": one.num_latents,
        "width": one.width,
        "model_id": one.model_id,
        "provenance": dict(one.provenance),
        "digest": one.digest,
    }


def _show(path: str, one: Dictionary, found: Fitness) -> None:
    shown = table("", path)
    shown.add_row("latents", f"{one.num_latents} of width {one.width}, {one.activation}")
    shown.add_row("site", str(one.site))
    shown.add_row("format", str(one.provenance.get("format", "steerkit")))
    if one.model_id is not None:
        shown.add_row("trained on", one.model_id)
    shown.add_row("variance unexplained (FVU)", f"{found.fvu:.3f}")
    shown.add_row("latents that fire on a token (L0)", f"{found.l0:.1f}")
    shown.add_row("latents that never fire", f"{found.dead:.1%} on {found.tokens} tokens")
    shown.add_row("usual strongest latent (peak)", f"{found.peak:.4g}")
    stdout().print(shown)


app.command("check", cls=Command, help=paragraphs(check))(check)
