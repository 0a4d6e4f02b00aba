"""What several tests of the command line start from."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.program import ROOT


@pytest.fixture
def furnished(here: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a gated vector, a trait's specification and an array beside the rest; stdin asks."""
    from transformers import AutoModelForCausalLM

    from tests.dictionary.made import made
    from tests.families import HIDDEN
    from tests.gated import gated_vector
    from tests.persona.test_persona import TRAIT

    gated_vector(AutoModelForCausalLM.from_pretrained(tiny)).save("gated.safetensors")
    TRAIT.save("glad.toml")
    made(width=HIDDEN).save("latents.safetensors")
    sides = (("1", "Break"), ("0", "Mend"))
    asked = [{"prompt": f"{word} {n}", "label": side} for side, word in sides for n in range(8)]
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    np.save("row.npy", np.ones((1, HIDDEN), dtype=np.float32))
    Path("tests").symlink_to(ROOT / "tests")  # where the tasks look for their items
    return here
