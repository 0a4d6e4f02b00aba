"""Vectors on the Hub, against a small server of its protocol: pushed, loaded, pinned, cached, refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import resource
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml

import steerkit
from steerkit.errors import SteerError, UnknownNameError, VectorFileError
from steerkit.vector.pack import save_pack
from steerkit.vector.steering_vector import SteeringVector
from tests.hub import TOKEN, Hub
from tests.program import ROOT, Cli

REPO = "user/moods"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The server, its client turned to it, with a token and an empty cache."""
    server = Hub()
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", server.url)
    monkeypatch.setattr(
        f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()


@pytest.fixture
def other(vector: SteeringVector) -> SteeringVector:
    return SteeringVector.from_bytes(
        SteeringVector(**{**vars_of(vector), "tensors": {"resid_post.1/direction": torch.arange(32.0)}}).to_bytes()
    )


def vars_of(vector: SteeringVector) -> dict[str, Any]:
    return {name: getattr(vector, name) for name in vector.__dataclass_fields__}


def refused(text: str, *, name: str | None = None) -> str:
    """The project's own error for a name on the Hub, on one line and without the token."""
    with pytest.raises(SteerError) as caught:
        SteeringVector.load(text)
    said = str(caught.value)
    assert TOKEN not in said and "\n" not in said and "http://127" not in said
    assert name is None or name in said
    return said


def test_pushed_and_loaded(hub: Hub, vector: SteeringVector) -> None:
    reference = vector.push_to_hub(REPO, license="apache-2.0")
    repo = hub.repos[REPO]
    assert reference == f"hub:{REPO}/moods@{repo.refs['main']}"
    assert set(repo.commits[repo.refs["main"]]) == {".gitattributes", "moods.safetensors", "steerkit.json", "README.md"}
    for loaded in (SteeringVector.load(reference), SteeringVector.load(f"hub:{REPO}"), SteeringVector.from_hub(REPO)):
        assert loaded == vector
    # What is fixed by a commit and here already is not asked for again.
    asked = len(hub.requests)
    assert SteeringVector.load(reference) == vector
    assert len(hub.requests) == asked


def test_a_pack_and_its_page(hub: Hub, vector: SteeringVector, other: SteeringVector) -> None:
    vector.push_to_hub(REPO, "calm", license="apache-2.0")
    other.push_to_hub(REPO, "wild", license="cc-by-4.0")
    files = hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]
    listed = json.loads(files["steerkit.json"])["vectors"]
    assert list(listed) == ["calm", "wild"]
    assert listed["wild"]["sha256"] == hashlib.sha256(files["wild.safetensors"]).hexdigest()
    assert (listed["calm"]["digest"], listed["calm"]["suggested_strength"]) == (vector.digest, 1.5)
    page = files["README.md"].decode()
    head = yaml.safe_load(page.split("---")[1])
    assert head == {"library_name": "steerkit", "license": None, "tags": head["tags"]} | {
        "license": head.get("license")
    }
    assert "activation-steering" in head["tags"] and "caa" in head["tags"]
    for name, one in (("calm", vector), ("wild", other)):
        assert f"| `{name}` | caa | tiny | resid_post 1 | response | 1.5 |" in page and f"`{one.digest[:16]}`" in page
    assert SteeringVector.from_hub(REPO, name="wild") == other
    assert SteeringVector.load(f"hub:{REPO}/calm@main") == vector
    with pytest.raises(UnknownNameError, match=r"holds 2 vectors; name one, as in user/moods/NAME: calm, wild"):
        SteeringVector.from_hub(REPO)
    with pytest.raises(UnknownNameError, match=r"unknown vector in user/moods 'clam'; did you mean 'calm'"):
        SteeringVector.from_hub(REPO, name="clam")


def test_a_folder_of_vectors_is_a_repository_once_it_is_uploaded(
    hub: Hub, vector: SteeringVector, other: SteeringVector, tmp_path: Path
) -> None:
    save_pack({"calm": vector, "wild": other}, tmp_path / "pack")
    hub.add(REPO, {path.name: path.read_bytes() for path in (tmp_path / "pack").iterdir()})
    assert SteeringVector.load(f"hub:{REPO}/wild") == other
    vector.push_to_hub(REPO, "third")
    assert SteeringVector.from_hub(REPO, name="calm") == vector


@pytest.mark.parametrize(
    ("repo", "how", "message"),
    [
        ("moods", {}, "names no vector on the hub"),
        ("user/moods/x", {}, "names no vector on the hub"),
        ("user/../x", {}, "names no vector on the hub"),
        (REPO, {"name": "a/b"}, "names no vector on the hub"),
        (REPO, {"name": "../b"}, "names no vector on the hub"),
        (REPO, {"revision": "a b"}, "names no vector on the hub"),
        (REPO, {"license": "mine\nlicense: yours"}, "write it as the Hub does, such as apache-2.0"),
        (REPO, {"revision": "nowhere"}, "there is no revision 'nowhere'"),
    ],
)
def test_pushes_that_cannot_be(hub: Hub, vector: SteeringVector, repo: str, how: dict[str, str], message: str) -> None:
    hub.add(REPO, {})
    before = dict(hub.repos[REPO].refs)
    with pytest.raises(VectorFileError, match=message):
        vector.push_to_hub(repo, **how)
    assert hub.repos[REPO].refs == before and list(hub.repos) == [REPO]


def test_hostile_facts_stay_in_their_cells(hub: Hub, vector: SteeringVector) -> None:
    facts = vars_of(vector) | {"model_id": "org/x\n---\nlicense: mit", "data_source": "a | b"}
    SteeringVector(**facts).push_to_hub(REPO)
    page = hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]["README.md"].decode()
    head = yaml.safe_load(page.split("\n---\n")[0])
    assert head["base_model"] == ["org/x\n---\nlicense: mit"] and "license" not in head
    (row,) = (line for line in page.splitlines() if line.startswith("| `moods`"))
    assert row.count("|") == 9


def test_a_page_of_somebody_else_is_left_alone(hub: Hub, vector: SteeringVector) -> None:
    hub.add(REPO, {"README.md": b"# Mine"})
    vector.push_to_hub(REPO)
    assert hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]["README.md"] == b"# Mine"
    assert SteeringVector.from_hub(REPO) == vector


def test_nothing_that_somebody_pushes_meanwhile_is_lost(hub: Hub, vector: SteeringVector) -> None:
    hub.add(REPO, {})
    hub.before_commit = lambda repo: repo.commit({"mine": b"x"})
    with pytest.raises(VectorFileError, match="changed by somebody else in between; push again"):
        vector.push_to_hub(REPO)
    hub.before_commit = None
    vector.push_to_hub(REPO)
    assert "mine" in hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]


def test_private_repositories(hub: Hub, vector: SteeringVector, monkeypatch: pytest.MonkeyPatch) -> None:
    vector.push_to_hub(REPO, private=True)
    assert hub.repos[REPO].private
    assert SteeringVector.from_hub(REPO) == vector
    for token in ("hf_wrongwrongwrong", None):
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", f"{hub.url[-5:]}-{token}")
        said = refused(f"hub:{REPO}")
        assert "no such repository, or it is private: log in" in said and "wrongwrong" not in said
        with pytest.raises(VectorFileError, match=r"not open to you \(HTTP 401\)|no such repository|needs a token"):
            vector.push_to_hub(REPO)
    assert not Path(f"{hub.url[-5:]}-None").exists()


def test_without_a_network_what_was_read_last_is_read(
    hub: Hub, vector: SteeringVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    vector.push_to_hub(REPO)
    assert SteeringVector.from_hub(REPO) == vector
    hub.fails = 503
    assert SteeringVector.from_hub(REPO) == vector
    hub.close()
    assert SteeringVector.from_hub(REPO) == vector
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert SteeringVector.from_hub(REPO) == vector
    assert "cannot be reached, and nothing of it is in the cache" in refused("hub:user/others")
    with pytest.raises(VectorFileError, match="the hub did not do it"):
        vector.push_to_hub(REPO)


def test_a_branch_that_moved_is_told_and_a_commit_stays(
    hub: Hub, vector: SteeringVector, other: SteeringVector
) -> None:
    first = vector.push_to_hub(REPO)
    assert SteeringVector.from_hub(REPO) == vector
    second = other.push_to_hub(REPO)
    old, new = first.rpartition("@")[2], second.rpartition("@")[2]
    with pytest.warns(UserWarning, match=f"has changed since it was read here; the one before is @{old}, .* @{new}"):
        assert SteeringVector.from_hub(REPO) == other
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SteeringVector.from_hub(REPO) == other
        assert SteeringVector.from_hub(REPO, revision=old) == vector
        assert SteeringVector.load(first) == vector
    hub.repos[REPO].refs["v1"] = old
    assert SteeringVector.from_hub(REPO, revision="v1") == vector


def test_what_is_not_there(hub: Hub, vector: SteeringVector) -> None:
    assert "no such repository, or it is private" in refused("hub:user/none", name="hub:user/none")
    vector.push_to_hub(REPO)
    assert "there is no revision 'v9'" in refused(f"hub:{REPO}@v9")
    hub.add("user/bare", {"v.safetensors": vector.to_bytes(), "model.bin": b"x"})
    assert "has no steerkit.json" in refused("hub:user/bare")
    assert SteeringVector.load("hub:user/bare/v") == vector
    assert "there is no w.safetensors in it" in refused("hub:user/bare/w")
    hub.add("user/gated", {"v.safetensors": vector.to_bytes()}, gated=True)
    assert "is gated; accept its terms" in refused("hub:user/gated/v")


@pytest.mark.parametrize(
    "name",
    [
        "hub:user", "hub:", "hub:/x", "hub:../x", "hub:user/..", "hub:user/x/../../y", "hub:user/x/y/z", "hub:a/b@",
        "hub:user/x/.hidden", "hub:user/x\n", "hub:user/x@a b", "hub:user/x?y", "hub:http://evil/x", "hub:user/x.git",
        "hub:user/x/y%2F..", "hub:us--er/x", "hub:user/" + "x" * 97,
    ],
)  # fmt: skip
def test_names_that_are_none(hub: Hub, name: str) -> None:
    assert "names no vector on the hub; write hub:user/repository" in refused(name)
    assert hub.requests == []


def test_hostile_repositories(hub: Hub, vector: SteeringVector, tmp_path: Path) -> None:
    data, digest = vector.to_bytes(), hashlib.sha256(vector.to_bytes()).hexdigest()

    def index(**vectors: Any) -> bytes:
        return json.dumps({"format": 1, "vectors": vectors}).encode()

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("a pickle was opened",))

    trap = pickle.dumps(Trap())
    hub.add(
        "evil/pickle", {"steerkit.json": index(v={"sha256": hashlib.sha256(trap).hexdigest()}), "v.safetensors": trap}
    )
    assert "pickles are never read" in refused("hub:evil/pickle")
    for number, listed in enumerate(
        [index(**{"../../up": {"sha256": digest}}), index(v={"sha256": "x"}), b"[]", b"{", index(v=[]),
         b'{"format": 2, "vectors": {}}', b"[" * 100_000]
    ):  # fmt: skip
        hub.add(f"evil/list{number}", {"steerkit.json": listed, "v.safetensors": data})
        assert "its steerkit.json is no list of vectors of format 1" in refused(f"hub:evil/list{number}")
    hub.add("evil/altered", {"steerkit.json": index(v={"sha256": "0" * 64}), "v.safetensors": data})
    assert "v.safetensors is not the file that steerkit.json lists" in refused("hub:evil/altered")
    assert not (tmp_path / "up.safetensors").exists()


def test_files_of_any_length(hub: Hub, vector: SteeringVector) -> None:
    data = vector.to_bytes()
    hub.add("evil/huge", {"huge.safetensors": data, "long.safetensors": data + b"1", "short.safetensors": data + b"2"})
    hub.announced = {"huge.safetensors": 2**40}
    said = refused("hub:evil/huge/huge")
    assert f"{2**40} bytes long (at most {2**30}); it is not downloaded" in said
    assert not any(request.startswith("GET") and "huge.safetensors" in request for request in hub.requests)
    # Announced small, sent large.
    hub.sent = {"long.safetensors": b"x" * 2**26, "short.safetensors": b"x"}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "the hub did not do it" in refused("hub:evil/huge/long")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # of kilobytes; the server has its own
    assert "the hub did not do it" in refused("hub:evil/huge/short")
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    assert sum(one.stat().st_size for one in cache.rglob("*") if one.is_file()) < 2**25
    hub.announced = {"steerkit.json": 2**30}
    hub.add("evil/index", {"steerkit.json": b"{}"})
    assert "steerkit.json is 1073741824 bytes long (at most 1048576)" in refused("hub:evil/index")


def test_nothing_of_the_hub_is_loaded_for_names_of_here() -> None:
    code = (
        "import sys, steerkit; steerkit.SteeringVector.load('optimism-caa'); "
        "steerkit.Composition.parse('optimism-caa*0.5').vectors(); print('huggingface_hub' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_wherever_a_vector_is_named(
    hub: Hub, cli: Cli, here: Path, tiny: Path, vector: SteeringVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = vector.push_to_hub(REPO)
    told = cli("inspect", reference, "--json")
    assert (told.code, json.loads(told.out)["digest"]) == (0, vector.digest)
    line = f'"{reference}"*0.5 + v.safetensors'
    assert str(steerkit.Composition.parse(line)) == line
    plain = f"hub:{REPO}/moods@answer*0.5 - hub:{REPO}"  # a revision needs quotation marks, for @ begins a scope
    assert str(steerkit.Composition.parse(plain)) == plain
    made = steerkit.Composition.parse(f"hub:{REPO}@all*0.5").vectors()[0]
    assert (made.strength, made.scope, made) == (0.5, "all", vector.at(strength=0.5, scope="all"))
    for words in (("--vector", reference, "--strength", 0.5), ("--steering", f'"{reference}"*0.5')):
        ended = cli("generate", "Hello", "--model", tiny, "--max-new-tokens", 2, "--json", *words)
        assert ended.code == 0, ended.err
        mine = cli("generate", "Hello", "--model", tiny, "--max-new-tokens", 2, "--json", "--vector", "v.safetensors",
                   "--strength", 0.5)  # fmt: skip
        assert json.loads(ended.out)[0]["text"] == json.loads(mine.out)[0]["text"]
    ended = cli("inspect", "hub:user/none")
    assert ended.code == 1 and ended.err.startswith("error: hub:user/none: there is no such repository")


def test_the_command_pushes_a_pack(hub: Hub, cli: Cli, here: Path, vector: SteeringVector) -> None:
    vector.save("w.safetensors")
    ended = cli("export", "v.safetensors", "--vector", "w.safetensors", "--to", "hub", "--repo", REPO, "--json",
                "--license", "apache-2.0", "--private")  # fmt: skip
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert hub.repos[REPO].private
    assert [SteeringVector.load(name) == vector for name in told["pinned"]] == [True, True]
    assert SteeringVector.from_hub(REPO, name="w") == vector
    for words in (("--to", "hub"), ("--to", "gguf", "--repo", REPO), ("--to", "hub", "--repo", REPO, "--strength", 2)):
        assert cli("export", "v.safetensors", *words).code == 2
