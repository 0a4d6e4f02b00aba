#!/usr/bin/env bash
# torch 2.13.0.
# Expected: `torch.Generator().manual_seed` takes 64 bits, so seeds that differ in any of them give other numbers; a seed for
#   each of (run, step) may be made by shifting the run above 32 bits.
# Seen: on the CPU only the lower 32 bits count. `manual_seed((run << 40) + step)` gives the same numbers for every run, and
#   `manual_seed(1 << 48)` those of seed 0, though `initial_seed()` gives back the seed as it was. NumPy's generators take all
#   bits. Hash what belongs together into 32 bits instead.
# Output seen:
#   seeds 0 and 1 << 48 give the same numbers: True; initial_seed() tells them apart: True
#   seeds 0 and 1 << 31 give the same numbers: False
#   the same in NumPy: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy
import torch


def drawn(seed):
    return torch.randn(8, generator=torch.Generator().manual_seed(seed))


low, high, half = 0, 1 << 48, 1 << 31
told = torch.Generator().manual_seed(high).initial_seed() != torch.Generator().manual_seed(low).initial_seed()
same = torch.equal(drawn(low), drawn(high))
print(f"seeds 0 and 1 << 48 give the same numbers: {same}; initial_seed() tells them apart: {told}")
other = torch.equal(drawn(low), drawn(half))
print(f"seeds 0 and 1 << 31 give the same numbers: {other}")
numbers = (numpy.random.default_rng(low).normal(size=8) == numpy.random.default_rng(high).normal(size=8)).all()
print(f"the same in NumPy: {bool(numbers)}")
assert same and told and not other and not numbers, "the behaviour has changed"
PYTHON
