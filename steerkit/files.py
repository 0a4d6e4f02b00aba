"""Writing files whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, data: bytes) -> None:
    """Write beside the target, then take its place; whatever stops it, no partial file stays.

    Args:
        path: where; missing folders are made, a link stays a link.
        data: the content.

    Raises:
        OSError: it cannot be written there.
    """
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".steerkit-{secrets.token_hex(8)}.tmp")
    try:
        with partial.open("xb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
