"""A small server that speaks as much of the Hugging Face Hub's protocol as its client needs to load and to push."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_secretsecretsecret"


@dataclass
class Repository:
    """Commits in order, each with all of its files; branches and tags by name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        before = self.commits.get(self.refs.get(ref, ""), {})
        sha = hashlib.sha1(f"{len(self.commits)}".encode(), usedforsecurity=False).hexdigest()
        self.commits[sha] = {**before, **files}
        self.refs[ref] = sha
        return sha


class Hub:
    """The server; `requests` has what it was asked, `announced` and `sent` are sizes and contents it lies about."""

    def __init__(self) -> None:
        self.repos: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.announced: dict[str, int] = {}
        self.sent: dict[str, bytes] = {}
        self.fails = 0
        self.before_commit: Any = None
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def add(self, repo: str, files: dict[str, bytes], **how: Any) -> str:
        self.repos[repo] = Repository(**how)
        return self.repos[repo].commit(files)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        return None

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(content).encode(), Content_Type="application/json")

    def found(self, repo: str) -> Repository | None:
        """The repository, where whoever asks may see it; else the answer is given."""
        known = self.hub.repos.get(repo)
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if known is None or (known.private and not allowed):
            self.answer(401 if not allowed else 404, X_Error_Code="RepoNotFound")
            return None
        if known.gated and "/api/" not in self.path:
            self.answer(403, X_Error_Code="GatedRepo")
            return None
        return known

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.hub.fails:
            return self.answer(self.hub.fails)
        told = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self.path.partition("?")[0])
        if told:
            repo = self.found(told[1])
            sha = None if repo is None else self.sha(repo, unquote(told[2] or "main"))
            return None if sha is None else self.answer_json({"id": told[1], "sha": sha, "siblings": []})
        wanted = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if wanted is None:
            return self.answer(404)
        repo = self.found(wanted[1])
        sha = None if repo is None else self.sha(repo, unquote(wanted[2]))
        if repo is None or sha is None:
            return None
        name = unquote(wanted[3])
        content = repo.commits[sha].get(name)
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        etag = hashlib.sha256(content).hexdigest()
        size = str(self.hub.announced.get(name, len(content)))
        body = self.hub.sent.get(name, content)
        length = {"Content_Length": size} if self.command == "HEAD" else {}
        return self.answer(200, body, X_Repo_Commit=sha, ETag=f'"{etag}"', X_Linked_Size=size, **length)

    def sha(self, repo: Repository, revision: str) -> str | None:
        found = revision if revision in repo.commits else repo.refs.get(revision)
        if found is None:
            self.answer(404, X_Error_Code="RevisionNotFound")
        return found

    def do_POST(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.chunks()
        if self.path == "/api/validate-yaml":
            return self.answer_json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer_json({"error": "Invalid credentials"}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            if name in self.hub.repos:
                return self.answer_json({"error": "already there", "url": f"{self.hub.url}/{name}"}, 409)
            self.hub.add(name, {".gitattributes": b""}, private=asked.get("visibility") == "private")
            return self.answer_json({"url": f"{self.hub.url}/{name}"})
        asked_of = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^?]+)(?:\?.*)?", self.path)
        if asked_of is None:
            return self.answer(404)
        repo = self.found(asked_of[1])
        if repo is None:
            return None
        if asked_of[2] == "preupload":
            files = [one["path"] for one in json.loads(body)["files"]]
            return self.answer_json(
                {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]}
            )
        return self.take_commit(
            asked_of[1], unquote(asked_of[3]), [json.loads(line) for line in body.splitlines() if line]
        )

    def take_commit(self, name: str, ref: str, lines: list[dict[str, Any]]) -> None:
        repo = self.hub.repos[name]
        if self.hub.before_commit is not None:
            self.hub.before_commit(repo)
        if lines[0]["value"].get("parentCommit") not in (None, repo.refs.get(ref)):
            return self.answer_json({"error": "A commit has happened since. Please refresh and try again."}, 412)
        files = {
            one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in lines if one["key"] == "file"
        }
        sha = repo.commit(files, ref)
        return self.answer_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def chunks(self) -> bytes:
        """A body in pieces, each behind its length."""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body
