"""The card of a checkpoint or an adapter that has vectors in its weights: a page of Markdown beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from steerkit.export.verification import Verification
from steerkit.methods._registry import default_strength
from steerkit.model import hub_id, weights_of
from steerkit.network.decoder import inner_model
from steerkit.vector.model_identity import model_facts
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["number", "weights_card"]

_NOT_MEASURED = ", as was asked for here; what was measured of the vector was measured with its own scope"


def weights_card(
    name: str,
    model: nn.Module,
    vectors: Sequence[SteeringVector],
    strength: float | None,
    verification: Verification | None,
    facts: Mapping[str, str],
    use: str,
    *,
    library: str = "transformers",
) -> str:
    """Write the card of a checkpoint or adapter that holds vectors.

    Args:
        name: of the folder.
        model: what it was made of.
        vectors: what is in it.
        strength: as it was given.
        verification: how far it is from the hooks; None where that was not asked.
        facts: further rows of its table.
        use: how to load it; `{name}` stands for the name.
        library: what loads it.

    Returns:
        Markdown.
    """
    identity = model_facts(model)
    base = hub_id(identity["model_id"] or vectors[0].model_id or identity["model_type"])
    what = "a steering vector" if len(vectors) == 1 else f"{len(vectors)} steering vectors"
    methods = ", ".join(sorted({vector.method for vector in vectors}))
    lines = [
        "---",
        f"library_name: {library}",
        f"base_model: {base}",
        f"tags: [activation-steering, {methods}]",
        "---",
        "",
        f"# {name}",
        "",
        f"{base} with {what} in its weights, made by steerkit. The licence is that of the base model.",
        "",
        use.format(name=name),
        "",
        "| | |",
        "| --- | --- |",
    ]
    for vector in vectors:
        sites = ", ".join(f"`{site}`" for site in vector.sites[:4]) + (", ..." if len(vector.sites) > 4 else "")
        own = vector.strength if vector.strength is not None else strength
        own = default_strength(vector) if own is None else own
        lines += [
            f"| vector | `{vector.method}` ({vector.paper or 'no paper'}), digest `{vector.digest[:16]}` |",
            f"| sites | {sites} |",
            f"| strength | {own:g} |",
            f"| tokens | every one{_NOT_MEASURED if vector.own_scope else ''} |",
        ]
    lines += [f"| {name} | {text} |" for name, text in facts.items()]
    lines.append(f"| weights of the base model | {weights_of(inner_model(model))} |")
    precision = str(inner_model(model).dtype).removeprefix("torch.")
    lines += [f"| precision | {precision} |", "", "## The same as hooks", "", _compared(verification)]
    return "\n".join(lines) + "\n"


def _compared(verification: Verification | None) -> str:
    """What was found when the weights were compared with hooks."""
    if verification is None:
        return (
            "**Not compared.** The comparison with the base model steered by hooks was switched off when this was "
            "written (`--no-verify`), so that nothing here has been run."
        )
    return (
        f"Loaded again and compared with the base model steered by hooks on {verification.rows} texts, "
        f"{verification.tokens} tokens: {verification.sentence()}. Steering itself moves the logits by "
        f"{verification.effect:.2g} relative."
    )


def number(value: float | None, digits: int = 1) -> str:
    """Write a number in a table; a dash where there is none.

    Args:
        value: the number.
        digits: behind the point.
    """
    return "-" if value is None else f"{value:.{digits}f}"
