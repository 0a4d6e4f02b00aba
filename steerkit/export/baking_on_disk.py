"""Vectors written into the weights of a checkpoint that lies on the disk and may be larger than memory.

What changes is what `bake` changes, and ends as the same numbers: one tensor after the other is read, changed in
float32, rounded once and written; what does not change goes over byte by byte. A run that was killed goes on behind the
last file that it finished. The architecture is built without weights; where a method, or the comparison with the hooks,
has to run it, each layer's weights are read when it runs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerkit._support.files import check_folder
from steerkit._support.precision import full_precision
from steerkit.export.baking import Baked, baked_of, compared, planned, write_card
from steerkit.export.checkpoint_plan import CheckpointPlan
from steerkit.export.on_disk import Placed, names_in_files, opened, tokenizer_of
from steerkit.export.rewriting import Made, rewrite
from steerkit.export.verification import expected
from steerkit.export.weight_changes import Change
from steerkit.model import quiet
from steerkit.monitor.checkpoints import Checkpoint
from steerkit.network.stored_tensors import stored_dtype
from steerkit.steering.strengths import vectors_of
from steerkit.steering.weights import exact_strength
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["bake_on_disk"]


@full_precision()
def bake_on_disk(
    checkpoint: str | Path,
    vectors: SteeringVector | Sequence[SteeringVector],
    out: str | Path,
    *,
    strength: float | None = None,
    untie: bool = False,
    verify: bool = True,
    force: bool = False,
    shard_bytes: int = 10**9,
) -> Baked:
    """Write a checkpoint with vectors in its weights, without loading it. A call that was killed goes on.

    Writing takes the memory of two tensors. The comparison with the hooks, at the end, reads both checkpoints block by
    block, six times in all, and takes the memory of the largest layer and of a few times the logits of 192 tokens
    (vocabulary x 768 bytes each); it maps the new files, which a limit of the address space (`ulimit -v`) counts and
    other limits do not.

    Args:
        checkpoint: a folder that `save_pretrained` wrote, an alias, or a name on the hub; safetensors of a model that
            is not quantised. Config, tokenizer and whatever else lies beside go over.
        vectors: as for `bake`.
        out: the folder to make. A killed run leaves `.NAME.unfinished` beside it, from which the same call goes on and
            ends with the same bytes.
        strength: as for `bake`.
        untie: as for `bake`.
        verify: load the new checkpoint and compare it with the hooks before it takes its place. Without, the card says
            that nothing was compared.
        force: replace a checkpoint that stands there.
        shard_bytes: the size at which a new file begins; what is lost by a kill is one of them at the most.

    Returns:
        What was written, and how far its logits are from those of the hooks.

    Raises:
        VectorMismatchError: a vector was fitted on a model of another width or depth, or needs the weights in memory.
        ScopeError: a vector's scope is not `all`.
        StrengthError: a method has no exact weight form, or the strength is not one finite number.
        SiteError: this architecture has no place for the exact form, or it is in routed experts.
        ModelError: the checkpoint is quantised, an adapter or pickles, is code from outside of transformers, or holds a
            weight in another form than the model (experts one by one); the folder cannot be written; or the new
            checkpoint's logits are not those of the hooks, and then nothing is left behind.

    Example:
        steerkit.export.bake_on_disk("large", vector.at(scope="all"), "optimistic-large", strength=2.0)
    """
    target, listed = Path(out).expanduser(), vectors_of(vectors)
    check_folder(target, replace=force)
    values = [exact_strength(vector, strength) for vector in listed]
    source = Checkpoint.of(str(checkpoint))
    model, weights = opened(source)
    tokenizer = tokenizer_of(source) if verify else None  # before any work: what fails at the end costs all of it
    plan = planned(model, listed, strength, untie=untie)
    baked = baked_of(plan, target, None)

    def complete(folder: Path) -> None:
        nonlocal baked
        if plan.switches:
            plan.config.save_pretrained(folder)
        if verify:
            wanted = expected(model, tokenizer, listed, strength)
            with quiet():
                baked = replace(baked, verification=compared(type(model), folder, wanted, target))
        write_card(baked, model, listed, strength, folder)

    written = rewrite(
        source,
        _made(model, plan, weights),
        target,
        identity={"vectors": [[one.digest, value] for one, value in zip(listed, values, strict=True)], "untie": untie},
        complete=complete,
        force=force,
        shard_bytes=shard_bytes,
    )
    return replace(baked, resumed=written.resumed)


def _made(model: Any, plan: CheckpointPlan, weights: Placed) -> dict[str, Made]:
    """What changes and what is new, by the names that files have for it."""
    source, found = weights.source, dict[str, Made]()
    empty = {
        name: torch.empty(shape, dtype=stored_dtype(model, name), device="meta") for name, shape in plan.shapes.items()
    }
    for name, file_name in names_in_files(model, empty).items():
        place, change = weights.places.get(name), plan.changes.get(name)
        if change is None and file_name in source:
            continue
        like = empty[name] if place is None else source.like(place)
        found[file_name] = Made(like, functools.partial(_values, source, place, change, like))
    return found


def _values(source: Checkpoint, place: str | None, change: Change | None, like: Tensor) -> Iterator[Tensor]:
    """The new values [...] of a tensor from its place in the source, if it has one; else zero, before it changes."""
    old = None if place is None else source.read(place)
    if change is not None:
        yield change.rounded(old, like.dtype)
    else:
        yield torch.zeros(like.shape, dtype=like.dtype) if old is None else old
