"""Compositions: several vectors, each with its strength and its tokens, as one line, as plain data, as a file.

`terms` is the object, `expression` its text, `json_form` its JSON (whose schema is `schema.json`), `binding` makes the
vectors of it that `steer` takes.
"""

from __future__ import annotations

from steerkit.composition.terms import Composition, Term

__all__ = ["Composition", "Term"]
