"""What finetuning added: how much of it acts in a prompt, scaled while the model runs, added and taken away as weights.

`contributing` measures it and `scaling` scales it, block by block beside the base (`pair`, `second_cache`);
`task_vector` combines `differences` of checkpoints, `adding` puts them into a model in memory, `merging` writes them
out some rows at a time, `coefficients` learns one number for each tensor; `calibrating` finds a scale, measured by
`changed_trial` beside `signs` at random; `emulated` does arithmetic on the logits of three models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from steerkit._support.lazy import lazily

if TYPE_CHECKING:
    from steerkit.tuning.adding import added
    from steerkit.tuning.calibrating import AtScale, CalibratedScale, calibrate_scale
    from steerkit.tuning.coefficients import learn_coefficients
    from steerkit.tuning.contributing import Contribution, contribution
    from steerkit.tuning.emulated import EmulatedFinetuning
    from steerkit.tuning.merging import merge
    from steerkit.tuning.scaling import scaled
    from steerkit.tuning.task_vector import TaskVector

__all__ = [
    "AtScale",
    "CalibratedScale",
    "Contribution",
    "EmulatedFinetuning",
    "TaskVector",
    "added",
    "calibrate_scale",
    "contribution",
    "learn_coefficients",
    "merge",
    "scaled",
]

__getattr__ = lazily(
    __name__,
    {
        "AtScale": "calibrating",
        "CalibratedScale": "calibrating",
        "Contribution": "contributing",
        "EmulatedFinetuning": "emulated",
        "TaskVector": "task_vector",
        "added": "adding",
        "calibrate_scale": "calibrating",
        "contribution": "contributing",
        "learn_coefficients": "coefficients",
        "merge": "merging",
        "scaled": "scaling",
    },
)
