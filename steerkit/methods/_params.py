"""The schema of a method's tensors: `Method.params` and `Method.also`, what they may say, and tensors held against it.

A tensor is declared as its shape in letters parted by single blanks, such as ``"w d"``; no letter is one number. What
is not a float has its dtype in front: ``"int64 k"``. In `also`, ``"..."`` is any shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Declared", "form_problem", "misfit", "read_declared", "undeclared"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bool, torch.float64, torch.int32, torch.int64)}
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


class Declared(NamedTuple):
    """What is declared of one tensor.

    Attributes:
        letters: one for each dimension, equal ones for equal sizes; None for any shape.
        dtype: the dtype; None for a float of at most 32 bits.
    """

    letters: tuple[str, ...] | None
    dtype: torch.dtype | None


def read_declared(text: str) -> Declared | None:
    """Read a declaration, such as ``"w d"`` or ``"int64 k"``.

    Args:
        text: of one tensor.

    Returns:
        What it says; None where it says nothing that can be read.
    """
    first, _, rest = text.partition(" ")
    dtype, shape = (_DTYPES[first], rest) if first in _DTYPES else (None, text)
    if shape == "...":
        return Declared(None, dtype)
    letters = tuple(shape.split(" ")) if shape else ()
    return Declared(letters, dtype) if all(re.fullmatch("[A-Za-z]", letter) for letter in letters) else None


def form_problem(schema: Any, where: str) -> str | None:
    """What is wrong with the form of a schema.

    Args:
        schema: what should be a mapping from name to declaration.
        where: what it is called.

    Returns:
        Half a sentence; None where nothing is wrong.
    """
    if not isinstance(schema, Mapping):
        return f'has {where} = {schema!r}; write a mapping such as {{"direction": "d"}}'
    for name, text in schema.items():
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            return f"has {where} with the name {name!r}; give a tensor's name without its site, such as 'direction'"
        if not isinstance(text, str) or read_declared(text) is None:
            return (
                f"has {where} with {name!r}: {text!r}; write one letter for each dimension, parted by single blanks, "
                f"such as 'w d' (before them {', '.join(_DTYPES)} where it is no float)"
            )
    return None


def undeclared(name: str, tensor: Tensor, known: Iterable[str]) -> str:
    """Say that a tensor is not declared, and how it would be.

    Args:
        name: without its site.
        tensor: [...] itself, of any shape.
        known: names that are declared.
    """
    shape = " ".join("d" if last == 0 else "wkjabc"[min(last - 1, 5)] for last in reversed(range(tensor.dim())))
    dtype = "" if tensor.dtype in _FLOATS else str(tensor.dtype).removeprefix("torch.")
    given = f"{dtype} {shape}".strip()
    listed = ", ".join(map(repr, known)) or "nothing"
    return f"`fit` gave {name!r} {list(tensor.shape)}, `params` declares {listed}; add {{{name!r}: {given!r}}} to it"


def misfit(
    schema: Mapping[str, str], params: Mapping[str, Tensor], *, dtypes: bool = False
) -> tuple[str, str | None] | None:
    """Hold tensors against a schema.

    Args:
        schema: name to declaration.
        params: name to tensor [...], of any shape.
        dtypes: whether dtypes have to be those declared.

    Returns:
        What is wanted and what there is (None where there is nothing), the first that differs; None where all fit.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, text in schema.items():
        declared, tensor = read_declared(text), params.get(name)
        assert declared is not None, text
        letters = declared.letters
        wanted = f"'{name}' [{', '.join(letters)}]" if letters else f"one number '{name}'"
        if tensor is None:
            return wanted, None
        if dtypes and (tensor.dtype not in _FLOATS if declared.dtype is None else tensor.dtype != declared.dtype):
            kind = "float32" if declared.dtype is None else str(declared.dtype).removeprefix("torch.")
            return f"'{name}' in {kind}", str(tensor.dtype).removeprefix("torch.")
        if letters is None:
            continue
        if tensor.dim() != len(letters) and not (not letters and tensor.numel() == 1):
            return wanted, str(list(tensor.shape))
        for letter, size in zip(letters, tensor.shape, strict=False):
            known, first = sizes.setdefault(letter, (size, name))
            if size != known:
                return f"'{name}' as wide as '{first}' ({letter} = {known})", str(list(tensor.shape))
    return None
