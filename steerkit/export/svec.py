"""`.svec`, JSON with a direction by block: what AISteer360 and hidden-directions read.

AISteer360 adds at the output of block N what stands under N. hidden-directions takes the same JSON under a name that
ends in .json (`hidden-directions import-vector v.json --out v.pt`) and adds at the output of block N's MLP, in most
families the same. activation-steering, whose format it is, adds it to what block N reads: one block earlier.
"""

from __future__ import annotations

import json
from pathlib import Path

from steerkit.export.plain_addition import added_everywhere
from steerkit.vector.steering_vector import SteeringVector
from steerkit.vector.vector_files import write_vector_file

__all__ = ["write_svec"]


def write_svec(vector: SteeringVector, path: str | Path, *, strength: float | None = None) -> Path:
    """Write such a file, whole or not at all; the same vector gives the same bytes.

    Args:
        vector: a plain addition at block outputs, with scope `all` (`vector.at(scope="all")`).
        path: where; missing folders are made.
        strength: in the vector's unit, and part of what is written; None takes the vector's own, else its suggested
            one, else 1.

    Returns:
        The path.

    Raises:
        VectorFileError: the vector is no plain addition, or the file cannot be written there.
        SiteError: a site other than a block's output.
        ScopeError: the scope is not `all`.
        StrengthError: the strength is not one finite number, or of a unit that cannot be converted.
    """
    added = added_everywhere(vector, "this format", strength=strength)
    content = {
        "model_type": vector.model_type,
        "directions": {str(layer): direction.tolist() for layer, direction in added.items()},
        "explained_variances": {},
    }
    write_vector_file(Path(path), json.dumps(content).encode())
    return Path(path)
