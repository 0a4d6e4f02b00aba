"""A repository of vectors on the Hugging Face Hub: what is uploaded beside a vector, and the upload.

`steerkit.json` has the facts of every vector in the repository, and the page `README.md` is made of them alone, so that
a vector is added to a pack without reading the others. Both and the vector come in one commit, whose parent is the
commit that the facts were read of: what somebody else pushes in between is never lost.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from steerkit._support.hub import INDEX, INDEX_FORMAT, HubName, hub_error, read_index
from steerkit.errors import SteerError, VectorFileError
from steerkit.network.sites import sites_text

if TYPE_CHECKING:
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["pack_card", "pack_index", "push", "vector_facts"]

_MARK = "<!-- made by steerkit of steerkit.json; a page without this line is left alone -->"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}")


def push(
    vector: SteeringVector,
    repo: str,
    name: str | None = None,
    *,
    revision: str | None = None,
    private: bool | None = None,
    license: str | None = None,
) -> str:
    """See `SteeringVector.push_to_hub`.

    Args:
        vector: the vector.
        repo: `user/name`.
        name: of the vector in it.
        revision: a branch.
        private: whether a repository that is made anew is private.
        license: as the Hub writes it.

    Raises:
        VectorFileError: it cannot be uploaded.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    wanted = HubName.parse(f"{repo}/{name or repo.partition('/')[2]}" + (f"@{revision}" if revision else ""))
    repo, name = wanted.repo, str(wanted.name)
    if license is not None and not _LICENSE.fullmatch(license):
        raise VectorFileError(f"license {license!r}: write it as the Hub does, such as apache-2.0 or cc-by-4.0")
    data, api = vector.to_bytes(), HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        parent = api.repo_info(repo, revision=revision).sha
        listed = read_index(repo, parent)
        listed = dict(sorted({**listed, name: vector_facts(vector, data, license)}.items()))
        files = {f"{name}.safetensors": data, INDEX: pack_index(listed)}
        if _may_write_card(api, repo, parent):
            files["README.md"] = pack_card(repo, listed).encode()
        done = api.create_commit(
            repo,
            [CommitOperationAdd(path_in_repo=file, path_or_fileobj=content) for file, content in files.items()],
            commit_message=f"Vector {name}",
            revision=revision,
            parent_commit=parent,
        )
    except SteerError:
        raise
    except Exception as error:  # noqa: BLE001 - several libraries raise below, with addresses and headers in their texts
        raise hub_error(wanted, error) from None
    return str(HubName(repo, name, done.oid))


def pack_index(listed: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The list of a pack's vectors, as it lies beside them.

    Args:
        listed: name of each vector to its facts.
    """
    return (json.dumps({"format": INDEX_FORMAT, "vectors": listed}, indent=2, ensure_ascii=False) + "\n").encode()


def vector_facts(vector: SteeringVector, data: bytes, license: str | None = None) -> dict[str, Any]:
    """What the list and the page say of one vector.

    Args:
        vector: the vector.
        data: its file.
        license: as the Hub writes it.
    """
    return {
        "method": vector.method,
        "paper": vector.paper,
        "model": vector.model_id or vector.model_type,
        "model_type": vector.model_type,
        "sites": sites_text([str(site) for site in vector.sites]),
        "scope": vector.scope,
        "suggested_strength": vector.suggested_strength,
        "unit": vector.unit,
        "data_source": vector.data_source,
        "license": license,
        "digest": vector.digest,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _may_write_card(api: Any, repo: str, parent: str | None) -> bool:
    """Whether the page is missing, or was made here."""
    if not api.file_exists(repo, "README.md", revision=parent):
        return True
    path = api.hf_hub_download(repo, "README.md", revision=parent)
    with open(path, encoding="utf-8", errors="replace") as page:  # noqa: PTH123 - a name as the library gives it
        return _MARK in page.read(2**20)


def pack_card(repo: str, listed: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of a repository of vectors.

    Args:
        repo: `user/name`.
        listed: name of each vector to its facts.

    Returns:
        Markdown, with the head that the Hub reads.
    """
    models = sorted({str(facts["model"]) for facts in listed.values() if "/" in str(facts.get("model"))})
    licenses = sorted({str(facts["license"]) for facts in listed.values() if facts.get("license")})
    methods = sorted({str(facts.get("method")) for facts in listed.values()})
    first = next(iter(listed))
    head = ["---", "library_name: steerkit"]
    head += [f"license: {licenses[0]}"] if len(licenses) == 1 else ["license: other"] if licenses else []
    head += [f"base_model: {json.dumps(models)}"] if models else []
    head += [f"tags: {json.dumps(['activation-steering', 'steerkit', *methods])}", "---", _MARK, ""]
    rows = [
        f"| `{name}` | {_cell(facts.get('method'))} | {_cell(facts.get('model'))} | {_cell(facts.get('sites'))} "
        f"| {_cell(facts.get('scope'))} | {_cell(facts.get('suggested_strength'))} | {_cell(facts.get('license'))} "
        f"| `{_cell(facts.get('digest'))[:16]}` |"
        for name, facts in listed.items()
    ]
    return "\n".join(
        [
            *head,
            f"# {repo.partition('/')[2]}",
            "",
            f"Steering {'vector' if len(listed) == 1 else 'vectors'} for steerkit (`pip install steerkit-hf`).",
            "",
            "| vector | method | model | sites | tokens | strength | licence | digest |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            "```bash",
            f'steerkit generate "How was your day?" --vector hub:{repo}/{first}',
            "```",
            "",
            "```python",
            f'vector = steerkit.SteeringVector.from_hub("{repo}", name="{first}")',
            "with steerkit.steer(model, vector):",
            "    model.generate(...)",
            "```",
            "",
            "A strength is what the file suggests; none means that none was measured. Name a commit behind an @ to get "
            "the same file for ever.",
            "",
        ]
    )


def _cell(value: Any) -> str:
    """A value in a table, whatever it holds."""
    if value is None:
        return "-"
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[|`<>\[\]]", " ", " ".join(shown.split()))[:120]
