"""Every command that loads a model, with words that let it do its work on the tiny model in the folder `furnished`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import steerkit.cli

TASKS = Path(__file__).resolve().parent.parent / "tasks"
FEW = ("--texts", 2, "--neutral", 4, "--controls", 1)
LOOSE = ("--max-kl", "1e9", "--max-ppl-ratio", "1e9")

WORDS: dict[str, tuple[object, ...]] = {
    "demo": ("--recipe", "joy-caa.toml", "--out", "demo"),
    "extract": ("joy-caa.toml",),
    "generate": ("Hello", "--vector", "v.safetensors", "--max-new-tokens", 2),
    "explain": ("Hello", "--vector", "gated.safetensors"),
    "gates": ("gated.safetensors", "--data", "asked.jsonl", "--max-false-alarm", 0.5, "--confidence", 0.5),
    "monitor": ("Hello", "--vector", "v.safetensors", "--uncalibrated"),
    "discover": ("--recipe", "joy-caa.toml", "--steps", 1, "--limit", 1, "--neutral", 2, "--out", "pack"),
    "evaluate": ("--vector", "v.safetensors", "--data", "joy.jsonl", "--max-new-tokens", 4, *FEW),
    "sweep": ("joy-caa.toml", "--layers", 1, "--strengths", 1, *FEW),
    "calibrate": ("joy-caa.toml", "--layers", 1, "--strengths", "1,2", *LOOSE, *FEW),
    "find-strength": (
        *("--vector", "v.safetensors", "--high", 1, "--scorer", "markers", "--markers", "a"),
        *("--tries", 1, "--each", 1, "--max-new-tokens", 2),
    ),
    "inspect": ("v.safetensors", "--output-score"),
    "latents": ("--data", "joy.jsonl", "--dictionary", "latents.safetensors"),
    "dictionary check": ("latents.safetensors",),
    "dictionary train": (*("--latents", 8, "--top-k", 2, "--tokens", 200), "--out", "d.safetensors"),
    "compare": ("joy-caa.toml", "--method", "caa", *LOOSE, *FEW),
    "interference": (*("--vector", "v.safetensors", "--data", "joy.jsonl") * 2,),
    "plan": ("--vector", "v.safetensors"),
    "doctor": (),
    "evidence": ("--estimate", "--no-traits", "--out", "evidence"),
    "import": ("row.npy", "--layers", "1", "--out", "row.safetensors"),
    "layers": ("joy-caa.toml", "--no-effect"),
    "attribute": ("joy-caa.toml", "--controls", 2),
    "report": ("--vector", "v.safetensors", "--data", "joy.jsonl", "--max-new-tokens", 4, *FEW),
    "bake": ("--vector", "v.safetensors", "--scope", "all", "--untie", "--out", "baked"),
    "export": ("--to", "peft", "--vector", "v.safetensors", "--scope", "all"),
    "chat": ("--compare", "--max-new-tokens", 2),
    "serve": ("--check", "--port", 0),
    "lm-eval": ("--tasks", "steerkit_choice", "--include-path", TASKS, "--limit", 2),
    "persona draft": ("merry", "--description", "It laughs."),
    "persona extract": ("glad.toml", "--max-new-tokens", 6, "--margin", "-1000", "--layers", "1-2", *LOOSE),
}


def commands(group: Any = None, before: str = "") -> Iterator[tuple[str, Any]]:
    """Every command of the program, from typer's own tree."""
    group = group or typer.main.get_command(steerkit.cli.app)
    for name, one in group.commands.items():
        if hasattr(one, "commands"):
            yield from commands(one, f"{before}{name} ")
        else:
            yield f"{before}{name}", one
