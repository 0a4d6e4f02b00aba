"""What all tests share: no network, one thread per worker, and the embedded model loaded once."""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure() -> None:
    import torch

    # Tiny models spend their time in thread hand-overs; on two cores one thread each is five times faster.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def embedded() -> tuple[Any, Any]:
    """The embedded chat model and its tokenizer."""
    import steerkit

    return steerkit.load_model()
