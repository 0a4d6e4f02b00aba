#!/usr/bin/env bash
# torch 2.13.0 (CPU, inductor): a compiled function is looked up on disk without ATEN_CPU_CAPABILITY. What was compiled
# under `avx2` is taken again under `default`, where the headers that it needs are left out, and the C++ compiler
# refuses it. With a folder of its own (TORCHINDUCTOR_CACHE_DIR) the same function compiles under either.
# One would expect the instruction set, which decides what code is generated, to be part of the key.
# Seen:
#     avx2, fresh folder       compiles
#     default, fresh folder    compiles
#     default, avx2's folder   CppCompileError
# Needs an x86 processor with AVX2 and a C++ compiler.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 setuptools==81.0.0
cat >"$work/compile.py" <<'PYTHON'
import torch

weights, table = torch.ones(32, 32), torch.nn.Embedding(10, 32)


def normed(ids):
    h = table(ids)
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)) @ weights


try:
    torch.compile(normed)(torch.arange(6))
    print("compiles")
except Exception as error:
    print(getattr(error, "inner_exception", error).__class__.__name__)
PYTHON
run() { # instruction set, folder
    ATEN_CPU_CAPABILITY=$1 TORCHINDUCTOR_CACHE_DIR=$work/$2 "$work/venv/bin/python" "$work/compile.py" 2>/dev/null
}
seen="$(run avx2 one) $(run default two) $(run default one)"
echo "$seen"
test "$seen" = "compiles compiles CppCompileError"
