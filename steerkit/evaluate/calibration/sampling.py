"""Layers and strength looked for by an optimiser (optuna) instead of a ladder."""

from __future__ import annotations

from typing import Any

from steerkit.errors import SteerError
from steerkit.evaluate.calibration.choosing import Choosing
from steerkit.evaluate.calibration.problem import Problem, strength_of
from steerkit.evaluate.sweeps import Point

__all__ = ["sampled_points"]


def sampled_points(problem: Problem, choosing: Choosing) -> list[Point]:
    """Let optuna's sampler try points with the budget as its constraint, and give those inside.

    Args:
        problem: what is calibrated.
        choosing: its search, which keeps what was tried.

    Raises:
        SteerError: optuna is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError:
        raise SteerError("--trials needs optuna; pip install 'steerkit-hf[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    inside: list[Point] = []
    broken: list[tuple[tuple[int, ...], float]] = []
    weakest, strongest = sorted((problem.ladder[0], problem.ladder[-1]))

    def objective(trial: Any) -> float:
        layers = choosing.candidates[trial.suggest_int("candidate", 0, len(choosing.candidates) - 1)]
        strength = float(f"{trial.suggest_float('strength', weakest, strongest):.3g}")
        point = choosing.tried(layers, strength)
        trial.set_constraint("budget", -1.0 if point else 1.0)
        if point is None:
            broken.append((layers, strength))
            return 0.0
        inside.append(point)
        return problem.gain(point).mean

    sampler = optuna.samplers.TPESampler(seed=problem.search.seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(objective, n_trials=problem.search.trials)
    # A point counts only if nothing weaker at its layers was outside.
    return [
        point
        for point in inside
        if not problem.is_ladder
        or not any(
            layers == point.layers and problem.reach(one) < problem.reach(strength_of(point)) for layers, one in broken
        )
    ]
