"""Programs that get little memory, are killed in the middle, and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.program import ROOT

GIGABYTE = 10**9


def started(program: str, *words: object, limit: int, builds_models: bool = False) -> subprocess.Popen[str]:
    """A module run as a program, with memory limited to so many bytes."""
    # The libraries of transformers' models, and those of CUDA, take the limit's address space before anything begins;
    # there private memory is limited.
    kind = "data" if builds_models or torch.version.cuda is not None else "as"
    prefix = ["prlimit", f"--{kind}={limit}", sys.executable, "-m", program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*prefix, *map(str, words)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def killed_and_resumed(tmp_path: Path, start: Callable[[Path], subprocess.Popen[str]]) -> list[Any]:
    """Write a folder twice, once killed in the middle, to equal bytes; what the second half and the whole run said."""
    folder = tmp_path / ".out.unfinished" / "files"
    with start(tmp_path / "out") as first:
        while first.poll() is None and len(list(folder.glob("*.safetensors"))) < 2:
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
    assert first.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    results = []
    for out in ("out", "whole"):
        with start(tmp_path / out) as process:
            answer, _ = process.communicate()
        assert process.returncode == 0
        results.append(json.loads(answer))
    assert results[0]["resumed"] >= 2
    assert results[1]["resumed"] == 0
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name in names:
        if name != "README.md":  # says what the folder is called
            same = subprocess.run(["cmp", tmp_path / "whole" / name, tmp_path / "out" / name], check=False)
            assert same.returncode == 0, name
    return results


def resident() -> int:
    """The largest resident memory of this process so far, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])
