"""What finetuning added: how much of it acts in a prompt, scaled while the model runs, added and taken away as weights.

`contributing` measures it and `scaling` scales it, block by block beside the base (`pair`, `second_cache`);
`task_vector` takes differences of checkpoints, `adding` puts them into a model in memory, `merging` writes them out
tensor by tensor, `coefficients` learns one number for each block; `emulated` does arithmetic on the logits of three
models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from steerkit._support.lazy import lazily

if TYPE_CHECKING:
    from steerkit.tuning.contributing import Contribution, contribution
    from steerkit.tuning.scaling import scaled

__all__ = ["Contribution", "contribution", "scaled"]

__getattr__ = lazily(__name__, {"Contribution": "contributing", "contribution": "contributing", "scaled": "scaling"})
