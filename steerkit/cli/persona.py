"""`steerkit persona`: from the name of a trait to its specification, and from that to a vector."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit._support.progress import bar, status
from steerkit.cli._evidence import Judge, MaxKl, MaxPplRatio, MaxRepetition
from steerkit.cli._files import check_writable
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._program import Command, paragraphs
from steerkit.cli._shared import (
    BatchSize,
    Json,
    print_json,
    sites_table,
    stdout,
    table,
    usage_line,
)
from steerkit.cli._written import check_written

if TYPE_CHECKING:
    from steerkit.persona.choice import Choice
    from steerkit.persona.extraction import Extraction
    from steerkit.persona.traits import TraitSpec
    from steerkit.persona.writers import Writer

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="From the description of a trait to a vector.")


@loads_model
def draft(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An adjective, as in: you are a NAME assistant.")],
    description: Annotated[str, typer.Option(help="One sentence on what the trait looks like.")] = "",
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL#MODEL", help="An OpenAI-compatible endpoint that writes it.")
    ] = None,
    model: Annotated[
        ModelChoice, "A local model that writes it: alias, hub name, folder or .gguf file. (default: none)"
    ] = DEFAULT,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write. (default: <name>.toml)")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write the specification of a trait: instructions, questions and a rubric, to be read over before it is used.

    A model writes it where one is given; else places are left to be filled in, and listed.
    Exit code 1 where a model was asked and places are left.
    """
    if endpoint is not None and model.model is not None:
        raise typer.BadParameter("--endpoint and --model both write it; give one of them")
    if model.model is None and model.is_given:
        raise typer.BadParameter(f"{model.words()[0]} says how a --model is loaded; give one")
    from steerkit.errors import DataError, SteerError
    from steerkit.persona import drafting
    from steerkit.persona.traits import slug

    empty = drafting.skeleton(name, description)
    target = out or Path(f"{slug(name)}.toml")
    if target.suffix != ".toml":
        raise typer.BadParameter(f"--out {target}: a trait specification is a .toml file")
    if target.exists() and not force:
        raise DataError(f"{target}: is there already; choose another --out, or replace it with --force")
    check_writable(target)
    writer = _writer(endpoint, model)
    failures: list[SteerError] = []
    if writer is None:
        spec = empty
    else:
        with status("drafting") as step:
            spec = drafting.draft(name, description, writer, step=step, failed=failures.append)
    spec.save(target)
    if as_json:
        print_json({"file": str(target), "trait": spec.trait, "open": list(spec.open_places)})
    else:
        _show_draft(spec, target)
    if failures:
        raise SteerError(f"{failures[0]}; {target} keeps what was written until then")
    if writer is not None and spec.open_places:
        raise typer.Exit(1)


SamplesOption = Annotated[
    int, typer.Option(min=1, help="Answers to each question under each system prompt; one is greedy.")
]
HeldOutUnderOption = Annotated[
    int, typer.Option(min=1, help="Instructions that each held-out question is asked under.")
]
LayersOption = Annotated[str | None, typer.Option(help="Blocks to choose from, such as 8-14. (default: eight of them)")]
NoThinkingOption = Annotated[
    bool, typer.Option("--no-thinking", help="Tell the chat template not to think first, where it can.")
]
OutOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where everything goes. (default: <trait>-persona)")
]


@loads_model
def extract(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="A .toml or .json file, or a shipped trait's name.")],
    model: ModelChoice = DEFAULT,
    judge: Judge = None,
    samples: SamplesOption = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 56,
    held_out_under: HeldOutUnderOption = 4,
    readout: Annotated[str, typer.Option(help="response_mean, prompt_mean or prompt_last.")] = "response_mean",
    layers: LayersOption = None,
    threshold: Annotated[float, typer.Option(help="Points of 100 the trait needs, with a judge.")] = 50.0,
    coherence: Annotated[float, typer.Option(help="Points of 100 both answers need, with a judge.")] = 50.0,
    margin: Annotated[float, typer.Option(help="Nats per token both margins need, without a judge.")] = 0.0,
    max_kl: MaxKl = 0.3,
    max_ppl_ratio: MaxPplRatio = 1.3,
    max_repetition: MaxRepetition = 0.1,
    no_thinking: NoThinkingOption = False,
    seed: Annotated[int, typer.Option(min=0, help="Fixes samples, splits and controls.")] = 0,
    batch_size: BatchSize = 16,
    out: OutOption = None,
    as_json: Json = False,
) -> None:
    """Make a persona vector: rollouts, filter, layer choice, vector and card, in one folder.

    Rollouts run under both system prompts of every instruction. Pairs of answers that show the trait are kept: by a
    judge's scores where --judge is given, else by the model's own probabilities, which is weaker, and the card says so.
    Killed at any time, the same command goes on where it stopped.
    """
    from steerkit import persona
    from steerkit.evaluate.calibration.budget import Budget
    from steerkit.evaluate.judges.judging import judge_of
    from steerkit.persona.filtering import Rules
    from steerkit.persona.rollout_plan import RolloutPlan
    from steerkit.persona.traits import TraitSpec, slug

    check_written(layers=layers)
    chosen = TraitSpec.load(spec)
    chosen.check_filled(spec)
    choice = persona.Choice(readout=readout, budget=Budget(max_kl, max_ppl_ratio, max_repetition))
    thinking = {"enable_thinking": False} if no_thinking else None
    lengths = {"samples": samples, "held_out_instructions": held_out_under, "max_new_tokens": max_new_tokens}
    plan = RolloutPlan(**lengths, seed=seed, chat_template_kwargs=thinking)
    rules = Rules(trait=threshold, coherence=coherence, margin=margin)
    folder = out or Path(f"{slug(chosen.trait)}-persona")
    check_writable(folder / "rollouts.jsonl")
    rating = None if judge is None else judge_of(judge)
    loaded, tokenizer = model.load()
    choice = _at_layers(choice, layers, loaded)
    found = persona.extract(
        loaded,
        tokenizer,
        chosen,
        folder,
        plan=plan,
        judge=rating,
        rules=rules,
        choice=choice,
        batch_size=batch_size,
        bar=bar,
        line=status,
    )
    if as_json:
        print_json(found.as_json())
        return
    _show(found, chosen, model)


def _at_layers(choice: Choice, layers: str | None, model: Any) -> Choice:
    """The choice among these layers only, if any are given."""
    from steerkit.network.decoder import find_decoder
    from steerkit.network.sites import parse_layers

    if layers is None:
        return choice
    return replace(choice, layers=tuple(parse_layers(layers, find_decoder(model).num_layers)))


def _writer(endpoint: str | None, model: ModelChoice) -> Writer | None:
    """What writes the draft, if anything does."""
    from steerkit.persona.writers import endpoint_writer, model_writer

    if endpoint is not None:
        return endpoint_writer(endpoint)
    return None if model.model is None else model_writer(*model.load())


def _show_draft(spec: TraitSpec, target: Path) -> None:
    typer.echo(f"wrote {target}")
    missing = spec.open_places
    if missing:
        from steerkit.persona.instruction import FILL_IN

        places = "1 place is" if len(missing) == 1 else f"{len(missing)} places are"
        typer.echo(f"{places} still to be filled in, marked by '{FILL_IN.strip()}':")
        for place in _grouped(missing):
            typer.echo(f"  {place}")
    typer.echo(f"{'then' if missing else 'read it over, then'}:\n  steerkit persona extract {target}")


def _grouped(places: tuple[str, ...]) -> list[str]:
    """Places by kind: question 3, question 4, ... become one line."""
    kinds: dict[str, list[str]] = {}
    for place in places:
        words = place.partition(",")[0].split()
        number = words.pop() if words[-1].isdigit() else ""
        kinds.setdefault(" ".join(words), []).append(number)
    lines = []
    for kind, numbers in kinds.items():
        told = list(dict.fromkeys(number for number in numbers if number))
        span = told[0] if len(told) == 1 else f"{told[0]} to {told[-1]} ({len(told)})" if told else ""
        lines.append(f"{kind}{'s' if len(told) > 1 else ''} {span}".strip())
    return lines


def _show(found: Extraction, spec: TraitSpec, model: ModelChoice) -> None:
    console = stdout()
    typer.echo(f"wrote {found.file}\nwrote {found.monitor_file}\nwrote {found.card}")
    how = f"rated by {found.judge}" if found.judge else "no judge: filtered by the model's own probabilities"
    console.print(f"{len(found.filtered.kept)} of {found.filtered.rows} pairs of answers kept; {how}")
    if found.filtered.reasons:
        shown = table("dropped for", "pairs", right=("pairs",))
        for reason, count in found.filtered.reasons.items():
            shown.add_row(reason, str(count))
        console.print(shown)
    console.print(sites_table(found.vector.describe()))
    console.print(found.verdict)
    area = found.monitor.extra["watchpoint"]["neutral"]
    console.print(
        f"to watch: {found.monitor.sites[0]} tells held-out prompts of the trait from neutral ones, AUC "
        f"{area['mean']:.2f} ({area['low']:.2f} to {area['high']:.2f})"
    )
    times: dict[str, Any] = {stage: f"{seconds:.0f} s" for stage, seconds in found.seconds.items()}
    typer.echo("took " + ", ".join(f"{stage} {told}" for stage, told in times.items()))
    from steerkit.methods._registry import example_strength

    strength = example_strength(found.vector)
    asked = spec.held_out_questions[0]
    usage = usage_line(asked, str(found.file), strength=strength, model=model)
    watch = usage_line(asked, str(found.monitor_file), model=model, command="monitor")
    typer.echo(f"use it:\n  {usage}\n  {watch}")


for _command in (draft, extract):
    app.command(_command.__name__, cls=Command, help=paragraphs(_command))(_command)
