"""`steerkit inspect`: what a vector file holds."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from steerkit.cli._shared import Json, print_json, sites_table, stdout, table

__all__ = ["run"]

# In this order; what a file does not hold is left out.
_SHOWN = (
    "method",
    "paper",
    "settings",
    "edit",
    "scope",
    "unit",
    "suggested_strength",
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


def run(
    vector: Annotated[str, typer.Argument(metavar="FILE", help="A vector file, or a shipped vector's name.")],
    as_json: Json = False,
) -> None:
    """Show what a vector file holds: where it acts, norms, its strength in both units, where it came from."""
    from steerkit.shipped import vector_path
    from steerkit.vector import SteeringVector

    path = vector_path(vector)
    facts = SteeringVector.load(path).describe()
    if as_json:
        print_json({"file": str(path), **facts})
        return
    console = stdout()
    shown = table("", str(path))
    for name in _SHOWN:
        if facts[name] not in (None, {}):
            unit = f" {_unit(facts['method'])}" if name == "suggested_strength" else ""
            shown.add_row(name.replace("_", " "), _text(name, facts[name]) + unit)
    written, read = len(facts["sites"]), len(facts["fitted_at"])
    if read > written:
        shown.add_row("selected", f"{written} of {read} sites looked at")
    if facts["held_out"]:
        shown.add_row("held out", f"{facts['held_out'].get('items', '?')} items")
    console.print(shown)
    console.print(sites_table(facts))


def _unit(method: str) -> str:
    """What strengths count, where it is more than a factor and the method is installed."""
    from steerkit.errors import UnknownNameError
    from steerkit.registry import resolve

    try:
        unit = resolve(method).strength_unit
    except UnknownNameError:
        return ""
    return "" if unit == "factor" else unit


def _text(name: str, value: Any) -> str:
    if name.endswith(("digest", "sha256")):
        return f"{value[:16]}..."
    if isinstance(value, dict):
        return ", ".join(f"{key}={entry!r}" for key, entry in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
