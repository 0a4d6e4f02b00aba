"""`steerkit generate`: answer prompts, steered where a vector is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit._support.progress import status
from steerkit.cli._data import ColumnsOption, EscapesOption, check_reading, columns_of
from steerkit.cli._files import read_prompts
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import BatchSize, Json, Unit, print_json, stdout
from steerkit.cli._steering import Chosen, SteeringOption, check_chosen, chosen

if TYPE_CHECKING:
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["run"]

PromptsOption = Annotated[
    str | None, typer.Option("--prompts", metavar="FILE", help="Prompts or chats, any format; - reads stdin.")
]
TemperatureOption = Annotated[
    float | None, typer.Option(min=0.0, help="Of --sample, which it implies; lower is more likely.")
]
TopPOption = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Share of the likeliest tokens that --sample draws from.")
]
VectorOption = Annotated[
    list[str] | None, typer.Option(metavar="FILE", help="A vector file, a shipped name, or hub:USER/NAME; repeatable.")
]
StrengthOption = Annotated[
    list[float] | None, typer.Option(help="One for each vector. (default: the file's suggested strength)")
]
ScopeOption = Annotated[
    str | None,
    typer.Option(
        help="Tokens written: all, prompt, response, response(n), response(a:b), generated, first(n), assistant, "
        "answer, after(n). (default: the file's)"
    ),
]


@loads_model
def run(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="What to answer.")] = None,
    prompt_file: PromptsOption = None,
    columns: ColumnsOption = None,
    vector: VectorOption = None,
    strength: StrengthOption = None,
    steering: SteeringOption = None,
    unit: Annotated[Unit | None, typer.Option(help="What strengths count in. (default: the file's)")] = None,
    scope: ScopeOption = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Show the unsteered answer too.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 128,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Fixes what --sample draws.")] = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    system: Annotated[str | None, typer.Option(help="A system prompt before every prompt.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Leave prompts as they are, without the chat template.")] = False,
    escapes: EscapesOption = False,
    model: ModelChoice = DEFAULT,
    batch_size: BatchSize = 8,
    as_json: Json = False,
) -> None:
    """Answer prompts, steered where a vector is given.

    Several vectors act together, each with its own strength: --vector for each, or --steering with all of them in one
    line. Answers are greedy unless --sample is given.
    """
    if prompts and prompt_file is not None:
        raise typer.BadParameter(f"prompts and --prompts {prompt_file}: give one of both")
    if not prompts and prompt_file is None:
        raise typer.BadParameter("give prompts, or a file of them with --prompts")
    if not vector and steering is None and (strength or unit or scope or baseline):
        raise typer.BadParameter("--strength, --unit, --scope and --baseline say how a --vector acts; give one")
    check_chosen(vector, strength, steering, unit=unit, scope=scope)
    if system is not None and raw:
        raise typer.BadParameter("--system is part of a chat, which --raw leaves out; give one of both")
    drawing = _drawing(sample, seed, temperature, top_p)
    check_reading(prompt_file, columns, raw=raw, escapes=escapes)
    asked: Sequence[Any] = prompts or read_prompts(str(prompt_file), columns_of(columns), raw=raw, escapes=escapes)
    if system is not None:
        asked = [_under(system, prompt) for prompt in asked]
    used = chosen(vector, strength, steering, model.name, scope=scope, unit=unit.value if unit else None)

    import steerkit

    loaded, tokenizer = model.load()
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "raw": raw, **drawing}
    with status("answering"):
        texts = steerkit.generate(loaded, tokenizer, asked, vector=used.vectors or None, **options)
        plain = steerkit.generate(loaded, tokenizer, asked, **options) if baseline else None
    if not as_json:
        for name, one in zip(used.names, used.vectors, strict=True):
            if one.strength is None and one.hold is None:
                _say_strength(name, one)
    if as_json:
        print_json(_rows(asked, texts, plain, used))
    elif plain is not None:
        _print_both(asked, texts, plain)
    else:
        _print(asked, texts)


def _drawing(sample: bool, seed: int | None, temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """How tokens are drawn, as `generate` takes it.

    Raises:
        BadParameter: a seed without sampling, or a share or temperature of nothing.
    """
    drawn = {"temperature": temperature, "top_p": top_p}
    given = {name: value for name, value in drawn.items() if value is not None}
    if seed is not None and not (sample or given):
        raise typer.BadParameter("--seed fixes what --sample draws; give both")
    if 0.0 in given.values():
        raise typer.BadParameter("--temperature and --top-p are above 0; without --sample the likeliest token is taken")
    return {"seed": seed, **({"do_sample": True} if sample or given else {}), **given}


def _under(system: str, prompt: Any) -> list[Any]:
    """A prompt as a chat that begins with a system prompt.

    Raises:
        BadParameter: the prompt is a chat that has one.
    """
    if isinstance(prompt, str):
        return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    if prompt and prompt[0].get("role") == "system":
        raise typer.BadParameter("--system: a prompt has a system prompt of its own; leave one out")
    return [{"role": "system", "content": system}, *prompt]


def _say_strength(name: str, vector: SteeringVector) -> None:
    """Say on stderr which strength is taken where nobody gave one, and where it comes from."""
    from steerkit.vector.description import strength_source

    typer.echo(f"{name}: strength {_strength(vector):g}, {strength_source(vector)}", err=True)


def _strength(vector: SteeringVector) -> Any:
    """The strength `steer` takes where nobody says more than the vector does; None where a reading finds it."""
    from steerkit.methods._registry import default_strength

    if vector.hold is not None:
        return None
    return default_strength(vector) if vector.strength is None else vector.strength


def _rows(
    asked: Sequence[Any], texts: Sequence[str], plain: Sequence[str] | None, used: Chosen
) -> list[dict[str, Any]]:
    """The answers as JSON: null without a vector, lists with several; `steering` is all of it, to be given again."""

    def single(values: list[Any]) -> Any:
        return values if len(values) > 1 else next(iter(values), None)

    steering = {
        "vector": single(list(used.names)),
        "strength": single([_strength(vector) for vector in used.vectors]),
        "scope": single([vector.scope for vector in used.vectors]),
        "steering": str(used.composition) if used.vectors else None,
    }
    baselines = [{}] * len(texts) if plain is None else [{"baseline": text} for text in plain]
    return [
        {"prompt": prompt, "text": text, **baseline, **steering}
        for prompt, text, baseline in zip(asked, texts, baselines, strict=True)
    ]


def _print(asked: Sequence[Any], texts: Sequence[str]) -> None:
    """The answer alone to one prompt; with several, each under its prompt."""
    console = stdout()
    for number, (prompt, text) in enumerate(zip(asked, texts, strict=True)):
        if len(texts) > 1:
            console.print(("\n" if number else "") + _title(prompt), style="bold", soft_wrap=True)
        if console.is_terminal:
            console.print(text)
        else:
            typer.echo(text)  # to the letter


def _print_both(asked: Sequence[Any], texts: Sequence[str], plain: Sequence[str]) -> None:
    """Without and with the vector, side by side."""
    from rich.table import Table

    console = stdout()
    for prompt, text, baseline in zip(asked, texts, plain, strict=True):
        console.print(_title(prompt), style="bold", soft_wrap=True)
        both = Table(expand=True)
        both.add_column("without", ratio=1)
        both.add_column("steered", ratio=1)
        both.add_row(baseline.strip(), text.strip())
        console.print(both)


def _title(prompt: Any) -> str:
    """A prompt in one line: of a chat, its last turn."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return "> " + " ".join(str(text).split())
