"""The LM Evaluation Harness as a library: its tasks, its wrapper around a model, and what it leaves changed."""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steerkit.errors import DataError, SteerError, UnknownNameError, unknown_name
from steerkit.prompts.batching import pad_token_id

__all__ = ["check_folder", "left_as_it_was", "load_evaluator", "task_manager", "wrapped_model"]


def load_evaluator() -> Any:
    """Import the function of lm_eval that runs tasks.

    Raises:
        SteerError: it is not installed.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
    except ImportError as error:
        raise SteerError(
            f"tasks of the LM Evaluation Harness need lm-eval ({error}); pip install 'steerkit-hf[lm-eval]'"
        ) from None
    return simple_evaluate


def check_folder(folder: str | Path) -> None:
    """Refuse a folder of tasks that is not there.

    Args:
        folder: where task files are.

    Raises:
        DataError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: is no folder; give one with task files (.yaml)")


def task_manager(names: Sequence[str], include_path: str | Path | None) -> Any:
    """Load lm_eval's index of tasks, with those of another folder beside them.

    Raises:
        DataError: there is no such folder.
        UnknownNameError: no task of that name.
    """
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else str(include_path)
    if folder is not None:
        check_folder(folder)
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own  # lm_eval's own files need not be read, which takes seconds
    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            if close:
                raise unknown_name("task", name, close)
            raise UnknownNameError(f"unknown task {name!r}; `lm-eval ls tasks` lists lm-eval's own")
    return manager


def wrapped_model(model: nn.Module, tokenizer: Any, batch_size: int) -> Any:
    """The model as lm_eval wants it, with a copy of the tokenizer, whose pad token it sets.

    Raises:
        DataError: a tokenizer without an end-of-text token, which lm_eval needs.
    """
    from lm_eval.models.huggingface import HFLM

    if tokenizer.eos_token_id is None:
        raise DataError("lm-eval needs a tokenizer with an end-of-text token; set tokenizer.eos_token")
    own = copy.deepcopy(tokenizer)
    own.pad_token_id = pad_token_id(tokenizer)
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of being given a model instead of a name
    try:
        return HFLM(pretrained=model, tokenizer=own, backend="causal", batch_size=batch_size)
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back what lm_eval sets: random states, variables of the environment, whether modules train."""
    import numpy

    environment = dict(os.environ)
    states = random.getstate(), numpy.random.get_state()
    training = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            for module, was_training in training:
                module.training = was_training
            random.setstate(states[0])
            numpy.random.set_state(states[1])
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)
