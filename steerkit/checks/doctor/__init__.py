"""A self-test on a user's own model.

`case` is the model with its texts and passes; `pass_checks`, `decoding_checks` and `cost_checks` are run one by one by
`checks`.
"""

from __future__ import annotations

from steerkit.checks.doctor.checks import doctor

__all__ = ["doctor"]
