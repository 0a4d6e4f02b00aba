"""`merge`: a checkpoint with a task vector in its weights, written some rows at a time, whatever its size."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from steerkit.errors import ModelError, StrengthError
from steerkit.export.rewriting import Made, Rewritten, fingerprint, in_rows, rewrite
from steerkit.monitor.adapters import AdapterDifference
from steerkit.monitor.checkpoints import Checkpoint
from steerkit.tuning.differences import CheckpointDifference, Difference
from steerkit.tuning.task_vector import TaskVector

__all__ = ["merge"]


def merge(
    base: str | Path,
    vector: TaskVector,
    out: str | Path,
    *,
    scale: float = 1.0,
    force: bool = False,
    shard_bytes: int = 10**9,
) -> Rewritten:
    """Write a checkpoint with a task vector added to its weights.

    In memory are a few million numbers, whatever the checkpoint's size. A call that was killed goes on behind the last
    file that it finished, and ends with the same bytes.

    Args:
        base: the checkpoint: a folder, a .safetensors file, an alias or a name on the hub.
        vector: the task vector, of checkpoints or adapters on the disk.
        out: the folder to make.
        scale: what the vector is multiplied by.
        force: replace a checkpoint that stands there.
        shard_bytes: the size at which a new file begins.

    Returns:
        What was written.

    Raises:
        StrengthError: `scale` is not finite.
        ModelError: the checkpoint lacks a tensor that differs, or has another shape there; a difference is of models in
            memory, so that a killed run could not know it again; or the folder cannot be written.

    Example:
        steerkit.tuning.merge("base", -TaskVector.between("base", "rude"), "politer", scale=0.5)
    """
    if not math.isfinite(scale):
        raise StrengthError(f"the scale is {scale}; give a finite number")
    source, scaled = Checkpoint.of(str(base)), vector * scale
    for name, shape in vector.shapes.items():
        if name not in source:
            raise ModelError(f"{base}: lacks {name}, which the task vector changes; give its own base model")
        held = source.shape(name)
        if held[1:] != shape[1:] or (shape and held[0] < shape[0]):
            raise ModelError(f"{base}: {name} is {list(held)} and differs in {list(shape)}; give its own base model")
        if not source.files[name].entries[name].dtype.is_floating_point:
            raise ModelError(f"{base}: {name} is quantised; merge into the unquantised model and quantise that")
    made = {
        name: Made(source.like(name), functools.partial(_added, source, scaled, name))
        for name in source.files
        if scaled.touches(name)
    }
    return rewrite(source, made, out, identity=_identity(scaled), force=force, shard_bytes=shard_bytes)


def _added(source: Checkpoint, vector: TaskVector, name: str) -> Iterator[Tensor]:
    """A tensor with the differences added in float32, some rows at a time."""
    for start, old in in_rows(source, name):
        yield vector.rows(name, old.float(), start) if old.numel() else old


def _identity(vector: TaskVector) -> dict[str, Any]:
    """What the bytes depend on: each term's files and factors."""
    return {"terms": list(_terms(vector))}


def _terms(vector: TaskVector) -> Iterator[dict[str, Any]]:
    for term in vector.terms:
        by_name = json.dumps(dict(sorted(term.by_name.items()))).encode()
        yield {
            "scale": term.scale,
            "by_name": hashlib.sha256(by_name).hexdigest() if term.by_name else None,
            "of": _of(term.difference),
        }


def _of(difference: Difference) -> Any:
    """What identifies a difference.

    Raises:
        ModelError: it is in memory.
    """
    if isinstance(difference, CheckpointDifference):
        return [fingerprint(difference.base), fingerprint(difference.tuned)]
    if isinstance(difference, AdapterDifference):
        return difference.digest
    raise ModelError("merge: a difference of models in memory has no files; take it between checkpoints on the disk")
