"""Directions of MELBO beside random ones of the same length: `python -m benchmarks.discover [--write]`.

Both at the same block: learned on four prompts, and drawn. For each the change of the target block, on those prompts
and on four others, the KL divergence on neutral texts, and what it does to readings along the shipped vectors of the
model: how many standard deviations of neutral texts the mean reading of answers moves, along the vector that moves
most, and the mean size over all shipped vectors, of which none is chosen. First at the same length; then, since what
costs more moves everything more, at the strength at which each costs the same KL divergence (see
`benchmarks.equal_kl`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import steerkit
from benchmarks.equal_kl import Costs
from benchmarks.results import recorded
from steerkit._support.shipped import shipped_vectors
from steerkit.activations.recording import record_ids
from steerkit.evaluate.intervals import Estimate, interval
from steerkit.evaluate.scoring import measure
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.trial import Trial
from steerkit.maths.directions import unit
from steerkit.methods._protocols import read_direction
from steerkit.methods._registry import method_of
from steerkit.methods.melbo import MELBO
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

PROMPTS = (
    "How was your day?",
    "What should I do about a neighbour who plays loud music?",
    "Write the first lines of a story about a lighthouse.",
    "How can I learn to cook in a month?",
)
OTHERS = (
    "What is the best way to spend a rainy afternoon?",
    "Explain how a bicycle stays upright.",
    "My friend has not called me back for a week.",
    "Which is heavier, a litre of milk or a litre of oil?",
)
COUNT, STEPS, BLOCK, SEED = 5, 40, 7, 0
KL, TEXTS = 0.1, 12
WORDS = """For each direction: the change of the target block (resid_post.22), on the four prompts it was learned on
and on four others; the KL divergence on 12 neutral texts, nats per token; by how many standard deviations of neutral
texts the mean reading of their answers moves along the shipped vector that it moves most, and the mean size over all
shipped vectors, of which none is chosen. What costs more moves everything more, so the second table compares at one
cost."""


@dataclass(frozen=True)
class Readings:
    """What is read along the known vectors.

    Attributes:
        directions: name to unit direction by site.
        before: [n] the unsteered readings of the neutral answers, by name and site.
    """

    directions: Mapping[str, Mapping[Site, Tensor]]
    before: Mapping[Site, Tensor]

    @classmethod
    def of(cls, setup: Setup, known: Mapping[str, SteeringVector]) -> Readings:
        """Read the unsteered model along the directions of the known vectors at the blocks that come after the push."""
        found: dict[str, dict[Site, Tensor]] = {}
        for name, vector in known.items():
            method = method_of(vector)
            own = {site: read_direction(method, vector.params(site)) for site in vector.reads}
            kept = {
                site: unit(one.float())
                for site, one in own.items()
                if one is not None and site.kind == "resid_post" and site.layer > BLOCK
            }
            if kept and not name.endswith("-monitor"):  # those are the persona's own directions again
                found[name] = kept
        return cls(found, _acts(setup.baseline, found))

    def moved(self, trial: Trial) -> Tensor:
        """[n, r] by how many standard deviations of the unsteered texts each reading of each text moves."""
        after, columns = _acts(trial, self.directions), []
        for own in self.directions.values():
            parts = [
                (after[site] - self.before[site]) @ along / (self.before[site] @ along).std()
                for site, along in own.items()
            ]
            columns.append(torch.stack(parts).mean(dim=0))
        return torch.stack(columns, dim=1)


def _acts(trial: Trial, directions: Mapping[str, Mapping[Site, Tensor]]) -> Mapping[Site, Tensor]:
    """[n, d] the mean activation of each neutral answer, by site."""
    sites = sorted({site for one in directions.values() for site in one})
    texts = [trial.setup.render(text) for text in trial.setup.calm]
    return trial.record(texts, sites, readout="response_mean").positive


def change_on(setup: Setup, vector: SteeringVector, prompts: Sequence[str]) -> float:
    """The change that a vector was learned to make, on other prompts: by hooks as in use, token by token."""
    return float(torch.stack([one.norm() for one in apart(setup, vector, prompts)]).mean())


def largest_token(setup: Setup, vector: SteeringVector, prompt: str) -> str:
    """Which token of a prompt changes most, with its share of the squared change."""
    (lengths,) = apart(setup, vector, [prompt])
    place = int(lengths.argmax())
    token = setup.tokenizer.decode([setup.render(steerkit.Conversation(prompt)).ids[1 + place]])
    return f"`{token.strip()}`, token {1 + place} from 0, {float(lengths[place] ** 2 / lengths.square().sum()):.1%}"


def apart(setup: Setup, vector: SteeringVector, prompts: Sequence[str]) -> list[Tensor]:
    """[t - 1] of each prompt: how far the target moves at every token but the first."""
    target = MELBO.from_settings(vector.settings).target_site(setup.decoder)
    rows = [setup.render(steerkit.Conversation(prompt)).ids for prompt in prompts]
    plain = record_ids(setup.model, rows, [target])[target]
    with steerkit.steer(setup.model, vector, 1.0):
        pushed = record_ids(setup.model, rows, [target])[target]
    return [(one - other)[1:].norm(dim=-1) for one, other in zip(pushed, plain, strict=True)]


def main() -> None:
    """Print the comparison as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.discover")
    parser.add_argument("--write", action="store_true", help="make the page in docs/results of it too")
    options = parser.parse_args()
    title = "Directions of MELBO beside random ones"
    with recorded("discover", title, "benchmarks.discover", wanted=options.write) as facts:
        model, tokenizer = steerkit.load_model()
        facts["model"] = model
        compare(model, tokenizer)


def compare(model: Any, tokenizer: Any) -> None:
    """Print both tables, and the answers."""
    setup = Setup(model, tokenizer, prompts=[steerkit.Conversation(PROMPTS[0])], max_new_tokens=24).first_neutral(TEXTS)
    known = {name.partition("/")[2]: SteeringVector.load(name) for name in shipped_vectors("smollm2-135m")}
    settings = {"count": COUNT, "steps": STEPS, "seed": SEED}
    how: dict[str, Any] = {"site": Site(BLOCK)}
    found = steerkit.discover(model, tokenizer, PROMPTS, settings=settings, **how)
    drawn = steerkit.discover(model, tokenizer, PROMPTS, settings={**settings, "steps": 0, "seed": SEED + 1}, **how)
    sets = {"MELBO": found, "random": drawn}
    length = float(found[0].params(Site(BLOCK))["direction"].norm())
    print(
        f"{COUNT} directions each, of length {length:.1f} at resid_post.{BLOCK}, learned in {STEPS} steps.\n\n{WORDS}\n"
    )
    readings = Readings.of(setup, known)
    print("| | change, other prompts | KL | largest reading | moved by | all readings |")
    print("| --- | --- | --- | --- | --- | --- |")
    show(setup, sets, readings)
    told = "; ".join(f"{name} 1: {largest_token(setup, one[0], OTHERS[0])}" for name, one in sets.items())
    print(f"\nThe token that changes most, with its share of the squared change. {told}.")
    print(f"\nThe same at the strength at which each costs {KL:g} nats per token.\n")
    print("| | strength | KL | largest reading | moved by | all readings |\n| --- | --- | --- | --- | --- | --- |")
    show(setup, sets, readings, kl=KL)
    print(f"\nAnswers to {PROMPTS[0]!r}, at the same length.\n")
    print("| | answer |\n| --- | --- |")
    print(f"| unsteered | {' '.join(setup.baseline.texts[0].split())} |")
    for name, vectors in sets.items():
        for place, vector in enumerate(vectors, start=1):
            (text,) = setup.trial(vector, 1.0).texts
            print(f"| {name} {place} | {' '.join(text.replace('|', ' ').split())} |", flush=True)


def show(
    setup: Setup,
    sets: Mapping[str, list[SteeringVector]],
    readings: Readings,
    *,
    kl: float | None = None,
) -> None:
    """A row for each vector, and one for the mean of each set."""
    names = list(readings.directions)
    means: dict[str, list[tuple[float, float, float]]] = {name: [] for name in sets}
    for name, vectors in sets.items():
        for place, vector in enumerate(vectors, start=1):
            strength: Any = 1.0
            first = f"{float(vector.params(Site(BLOCK))['change'][0, -1]):.0f}, {change_on(setup, vector, OTHERS):.0f}"
            if kl is not None:
                reached = Costs(setup, vector).reaching(kl)
                if isinstance(reached, str):
                    print(f"| {name} {place} | - | {reached} | - | - | - |", flush=True)
                    continue
                strength, first = reached.strength, f"{reached.strength:.3g}"
            trial = setup.trial(vector, strength)
            cost, moved = measure(trial, ["divergence"])["kl"].effect, readings.moved(trial)
            best = int(moved.mean(dim=0).abs().argmax())
            every, largest = float(moved.mean(dim=0).abs().mean()), interval(moved[:, best])
            means[name].append((cost.mean, abs(largest.mean), every))
            print(
                f"| {name} {place} | {first} | {shown(cost)} | {names[best]} | {shown(largest, '+.2f')} "
                f"| {every:.2f} |",
                flush=True,
            )
    for name, rows in means.items():
        if rows:
            columns = [interval(torch.tensor(column)) for column in zip(*rows, strict=True)]
            cost_shown, *moved_shown = (shown(one, form) for one, form in zip(columns, COLUMN_FORMS, strict=True))
            cells = [f"**{name}, mean**", "", cost_shown, "", *moved_shown]
            print(f"| {' | '.join(cells)} |", flush=True)


COLUMN_FORMS = (".3f", ".2f", ".2f")
"""How the means of cost, of the largest and of every change are written."""


def shown(found: Estimate, form: str = ".3f") -> str:
    """A figure with its interval."""
    return f"{found.mean:{form}} ({found.low:{form}} to {found.high:{form}})"


if __name__ == "__main__":
    main()
