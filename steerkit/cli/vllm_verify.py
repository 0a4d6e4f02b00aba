"""`steerkit vllm-verify`: does vLLM, as it is installed here, steer as it should?"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from steerkit._support.progress import bar
from steerkit.cli._findings import print_findings
from steerkit.cli._shared import Json, print_json

__all__ = ["run"]


def run(
    model: Annotated[str, typer.Option(help="Alias, hub name or folder, as vLLM takes it.")] = "smollm2-135m",
    eager: Annotated[bool, typer.Option("--eager", help="Do not compile.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Load the model in transformers too, and compare.")
    ] = True,
    options: Annotated[
        str, typer.Option(metavar="JSON", help='More of what vLLM\'s LLM takes, such as \'{"dtype": "float32"}\'.')
    ] = "{}",
    as_json: Json = False,
) -> None:
    """Start vLLM on a model and test that it steers. Exit code 1 if something fails.

    Steering changes answers; plain requests and differently steered ones in one batch get what they get alone; cached
    prefixes are shared by requests that are steered alike only; no request names a file; activations are read as they
    are; steered answers are as near to transformers' as plain ones; what it costs.
    """
    from steerkit.engines.vllm.verify import CHECKS, verify
    from steerkit.model import ALIASES, converted, embedded_gguf

    given = {"enforce_eager": eager} | _options(options)
    path = model
    if model in ALIASES:
        path = str(converted(model, embedded_gguf(ALIASES[model]), sha256=ALIASES[model].sha256))
    with bar("checking", len(CHECKS)) as step:
        findings = verify(path, compared=compare, options=given, step=step)
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        print_findings(model, findings, "vLLM steers as it should")
    if not all(finding.passed for finding in findings):
        raise typer.Exit(1)


def _options(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        found = error
    if not isinstance(found, dict):
        raise typer.BadParameter(f"--options: {text!r}; give a JSON object, such as '{{\"max_model_len\": 2048}}'")
    return found
