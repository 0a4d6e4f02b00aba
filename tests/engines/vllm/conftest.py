"""What the tests of vLLM share: they run in its own environment (`make test-vllm`), one engine at a time."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# In one process, so that a test sees the scheduler and the runner.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # N-gram speculation imports numba, behind which this vLLM starts no other engine in one process: it looks through
    # all modules for its kernels, and trips over llvmlite's.
    items.sort(key=lambda item: "test_speculation" in item.nodeid)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models and vectors lie."""
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, place: Path) -> Iterator[Any]:
    """The engine of a module, with the family and the options that the module names or its parameters give."""
    from tests.engines.vllm.engine import Pair

    options = {**getattr(request.module, "ENGINE", {}), **getattr(request, "param", {})}
    made = Pair.of(options.pop("family", "llama"), place, **options)
    yield made
    made.close()
