#!/usr/bin/env bash
# accelerate 1.15.0, torch 2.13.0.
# Expected: `find_executable_batch_size` makes the batch smaller whenever the device or the host runs out of memory.
# Seen: it knows memory errors by pieces of text, and two common ones of CUDA are not among them: the driver's own
#   "CUDA error: out of memory" (there is no full stop behind "memory") and cuBLAS's CUBLAS_STATUS_ALLOC_FAILED, which is
#   what a matrix product raises when its workspace no longer fits. `MemoryError` of the host is no `RuntimeError` and is
#   not known either. All three leave the decorated function as they are, at the first batch size.
# Output seen:
#   torch's allocator: batch sizes 8 7 6 5 4
#   the driver: batch sizes 8, then RuntimeError
#   cuBLAS: batch sizes 8, then RuntimeError
#   the host: batch sizes 8, then MemoryError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from accelerate.utils import find_executable_batch_size

ERRORS = {
    "torch's allocator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "the driver": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "the host": MemoryError(),
}


def outcome(error):
    tried = []

    @find_executable_batch_size(starting_batch_size=8)
    def work(batch_size):
        tried.append(str(batch_size))
        if batch_size > 4:
            raise error

    try:
        work()
    except (RuntimeError, MemoryError) as left:
        return f"batch sizes {' '.join(tried)}, then {type(left).__name__}"
    return f"batch sizes {' '.join(tried)}"


found = {name: outcome(error) for name, error in ERRORS.items()}
for name, told in found.items():
    print(f"{name}: {told}")
assert found["torch's allocator"] == "batch sizes 8 7 6 5 4"
assert all("then" in found[name] for name in ("the driver", "cuBLAS", "the host"))
PYTHON
