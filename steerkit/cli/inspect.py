"""`steerkit inspect`: what a vector file holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit.cli._foreign import is_foreign, show_foreign
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import Json, number, print_json, sites_table, stderr, stdout, table

if TYPE_CHECKING:
    from rich.console import Console

    from steerkit.methods._listing import MethodFacts
    from steerkit.methods._protocols import PartsTable
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["run"]

_LISTED = 20
# In this order; what a file does not hold is left out.
_SHOWN = (
    "method",
    "paper",
    "settings",
    "edit",
    "scope",
    "unit",
    "suggested_strength",
    "calibration",
    "readout",
    "model_id",
    "model_revision",
    "model_type",
    "num_layers",
    "hidden_size",
    "data_source",
    "data_digest",
    "seed",
    "chat_template_sha256",
    "tokenizer_sha256",
    "steerkit_version",
    "digest",
)


@loads_model
def run(
    vector: Annotated[str, typer.Argument(metavar="FILE", help="A vector file, a shipped name, or hub:USER/NAME.")],
    plot: Annotated[
        Path | None, typer.Option(help="Draw its parts as a heat map: a .png, .svg or .pdf file.", dir_okay=False)
    ] = None,
    output_score: Annotated[
        bool, typer.Option("--output-score", help="Load the model, and show which tokens each direction stands for.")
    ] = False,
    model: ModelChoice = DEFAULT,
    as_json: Json = False,
) -> None:
    """Show what a vector file holds: where it acts, norms, its strength in both units, where it came from.

    With --output-score the model is loaded: directions whose tokens it does not say when they are written steer badly.

    Files of other programs (GGUF control vectors, .svec, .npy, tensors) are shown too, with how to import them.
    """
    from steerkit._support.shipped import vector_path
    from steerkit.vector.steering_vector import SteeringVector

    path = vector_path(vector)
    if is_foreign(path):
        show_foreign(path, as_json=as_json)
        return
    loaded = SteeringVector.load(path)
    facts, parts = loaded.describe(), _parts(loaded)
    scores = _output_scores(loaded, model) if output_score else {}
    for site in facts["sites"] if output_score else ():
        site["output_score"] = scores.get(site["site"])
    if plot is not None:
        from steerkit.methods._protocols import DrawsMaps
        from steerkit.methods._registry import method_of
        from steerkit.report.plots.maps import plot_maps

        method = method_of(loaded)
        maps = method.maps(loaded) if isinstance(method, DrawsMaps) else []
        plot_maps(maps, plot, title=path.stem, layers=loaded.num_layers)
        stderr().print(f"wrote {plot}")
    if as_json:
        print_json({"file": str(path), **facts, "parts": None if parts is None else parts.as_json()})
        return
    console = stdout()
    shown = table("", str(path))
    for name in _SHOWN:
        if facts[name] not in (None, {}):
            unit = f" {_unit(loaded)}" if name == "suggested_strength" else ""
            shown.add_row(name.replace("_", " "), _text(name, facts[name]) + unit)
    if _is_gated(loaded):
        shown.add_row("gate reads", "\n".join(_read(site, facts) for site in facts["fitted_at"]))
    else:
        written = [site["site"] for site in facts["sites"]]
        kinds = {site.rpartition(".")[0] for site in written}
        looked_at = [site for site in facts["fitted_at"] if site.rpartition(".")[0] in kinds]
        if len(looked_at) > len(written):
            shown.add_row("selected", f"{len(written)} of {len(looked_at)} sites looked at")
    for row in _site_rows(facts["sites"]):
        shown.add_row(*row)
    left_out = loaded.extra.get("massive_tokens_left_out")
    if isinstance(left_out, Mapping):
        shown.add_row("massive tokens left out", _text("", dict(left_out)))
    for row in _held_out_rows(loaded, facts["held_out"]):
        shown.add_row(*row)
    console.print(shown)
    console.print(sites_table(facts))
    if parts is not None:
        _print_parts(console, parts)


def _site_rows(sites: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What there is to say of single sites besides their norms."""
    rows = []
    for site in sites:
        if site["massive"]:
            rows.append(("massive dimensions", f"{site['site']}: {_shares(site['massive'])} of the squared norm"))
        if site.get("output_score") is not None:
            told = site["output_score"]
            words = " ".join(map(repr, told["words"][:8]))
            rows.append(("output score", f"{site['site']}: {told['score']:.3f}, stands for {words}"))
        if site["seen_share"] is not None:
            rows.append(("seen by the projection", f"{site['site']}: {site['seen_share']:.0%} of the direction"))
    return rows


def _output_scores(vector: SteeringVector, model: ModelChoice) -> dict[str, dict[str, Any]]:
    """The output score of the direction at each site that has one and lies in the residual stream."""
    from steerkit.evaluate.output_score import in_the_stream, output_scores
    from steerkit.methods._registry import method_of

    method = method_of(vector)
    loaded, tokenizer = model.load()
    vector.check(loaded, tokenizer)
    found = {}
    for site in vector.sites:
        direction = method.direction(vector.params(site)) if in_the_stream(site) else None
        if direction is not None and bool(direction.any()):
            one = output_scores(loaded, tokenizer, site, direction.float()[None])
            found[str(site)] = {"score": float(one.scores[0]), "words": list(one.words[0])}
    return found


def _held_out_rows(vector: SteeringVector, held_out: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was measured on items that the vector was not fitted on."""
    gate = held_out.get("gate", {})
    rows = [("held out", f"{held_out.get('items', '?')} items")] if held_out else []
    # By kind of prompts it is told below.
    once = [name for name in gate if "opened" not in gate or name not in ("opened", "tpr", "fpr")]
    rows += [(f"gate, {name}", _text(name, gate[name])) for name in once]
    if _is_gated(vector):
        from steerkit.evaluate.by_prompt_kind import opened_rows

        rows += [(f"gate, {name}", text) for name, text in opened_rows(vector)]
    return rows


def _is_gated(vector: SteeringVector) -> bool:
    """Whether the vector is known to be gated."""
    facts = _facts(vector)
    return facts is not None and facts.is_gated and facts.edit == vector.edit


def _read(site: str, facts: dict[str, Any]) -> str:
    """A site that is read, and how well it separates held-out items where that was measured."""
    figures = (facts["held_out"] or {}).get("sites", {}).get(site)
    if not figures:
        return site
    return f"{site} (held-out AUC {number(figures.get('auc'), '.3f')}, d {number(figures.get('cohens_d'), '.2f')})"


def _parts(vector: SteeringVector) -> PartsTable | None:
    """What the vector's method lists of it; None where it lists nothing or cannot use the vector."""
    facts = _facts(vector)
    if facts is None or not facts.lists_parts:
        return None
    from steerkit.errors import SteerError
    from steerkit.methods._protocols import ListsParts
    from steerkit.methods._registry import method_of

    try:
        method = method_of(vector)
        for site in vector.sites:
            method.check(site, vector.params(site))
        return method.table(vector) if isinstance(method, ListsParts) else None
    except SteerError:  # a file may be looked at that cannot be used
        return None


def _print_parts(console: Console, parts: PartsTable) -> None:
    """The first rows, and how many more there are."""
    numbers = [column for column, value in zip(parts.columns, parts.rows[0], strict=True) if not isinstance(value, str)]
    shown = table(*parts.columns, right=numbers, title=parts.title)
    for row in parts.rows[:_LISTED]:
        shown.add_row(*(number(value) if isinstance(value, float) else str(value) for value in row))
    console.print(shown)
    if len(parts.rows) > _LISTED:
        console.print(f"and {len(parts.rows) - _LISTED} more; --json lists all")
    if parts.note:
        console.print(parts.note)


def _facts(vector: SteeringVector) -> MethodFacts | None:
    """What the vector's method says of itself; None where it is not installed: a file may be looked at all the same."""
    from steerkit.errors import UnknownNameError
    from steerkit.methods._listing import listed_method

    try:
        return listed_method(vector.method)
    except UnknownNameError:
        return None


def _unit(vector: SteeringVector) -> str:
    """What strengths count, where it is more than a factor and the method is installed."""
    facts = _facts(vector)
    return "" if facts is None or facts.strength == "factor" else facts.strength


def _shares(massive: dict[str, float]) -> str:
    """Dimensions with the share of the squared norm that each holds."""
    return ", ".join(f"{place} holds {share:.0%}" for place, share in massive.items())


def _text(name: str, value: Any) -> str:
    if name.endswith(("digest", "sha256")):
        return f"{value[:16]}..."
    if isinstance(value, dict):
        return ", ".join(f"{key}={entry!r}" for key, entry in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
