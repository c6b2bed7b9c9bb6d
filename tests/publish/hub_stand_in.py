"""A stand-in for the Hub's HTTP API: repositories in memory, served on loopback by the test that
wants one.

Answers what huggingface_hub asks when it makes a repository, uploads (small files inside the
commit, large ones through LFS), commits, lists and downloads. One branch, no history: a commit's id
is the hash of what it holds.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standInForTheHubNobodyElsesToken"
LARGE = ".safetensors"


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def sha(self) -> str:
        """Commit id: 40 hex digits of the content."""
        digest = hashlib.sha1()
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + hashlib.sha1(content).digest())
        return digest.hexdigest()


@dataclass
class Hub:
    """endpoint: for HF_ENDPOINT; repos: by "user/name"; asked: "METHOD path" of every request."""

    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)  # LFS objects by sha256
    asked: list[str] = field(default_factory=list)
    commits: int = 0

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a process that talks to this Hub."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
        }


class _Answer(Exception):
    def __init__(
        self, status: int, content: Any = b"", headers: dict[str, str] | None = None
    ) -> None:
        self.status, self.headers = status, headers or {}
        self.content = content if isinstance(content, bytes) else json.dumps(content).encode()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None: ...

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            for method, pattern, answer in ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, path)):
                    if method in ("POST", "PUT") and not path.startswith("/lfs/"):
                        self._authorize()
                    answer(self, body, **match.groupdict())
            raise _Answer(404, {"error": f"no such page: {path}"})
        except _Answer as found:
            self.send_response(found.status)
            headers = {"Content-Length": str(len(found.content)), **found.headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(found.content)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _authorize(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Answer(
                401,
                {"error": "Invalid username or password."},
                {"X-Error-Message": "Invalid token."},
            )

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (
            repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        ):
            raise _Answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return repo

    # --- uploading --------------------------------------------------------------------------------

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        address = {"url": f"{self.hub.endpoint}/{name}", "id": name}
        if name in self.hub.repos:
            raise _Answer(409, address)
        self.hub.repos[name] = Repo(
            private=asked.get("visibility") == "private" or asked.get("private") is True
        )
        raise _Answer(200, address)

    def validate(self, body: bytes) -> None:
        assert json.loads(body)["content"].startswith("---\n")
        raise _Answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str) -> None:
        self._repo(repo)
        files = json.loads(body)["files"]
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular"}
            for f in files
        ]
        raise _Answer(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def batch(self, body: bytes, repo: str) -> None:
        objects = json.loads(body)["objects"]
        for each in objects:
            if each["oid"] not in self.hub.blobs:
                each["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{each['oid']}"}}
        raise _Answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        raise _Answer(200)

    def commit(self, body: bytes, repo: str) -> None:
        files = dict(self._repo(repo).files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.repos[repo].files = files  # all of it, or nothing
        self.hub.commits += 1
        sha = self.hub.repos[repo].sha
        raise _Answer(
            200, {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}", "commitOid": sha}
        )

    # --- downloading ------------------------------------------------------------------------------

    def info(self, body: bytes, repo: str) -> None:
        found = self._repo(repo)
        siblings = [{"rfilename": name} for name in sorted(found.files)]
        raise _Answer(
            200,
            {
                "id": repo,
                "sha": found.sha,
                "private": found.private,
                "siblings": siblings,
                "tags": [],
            },
        )

    def tree(self, body: bytes, repo: str) -> None:
        files = self._repo(repo).files
        rows = [
            {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
            for n, c in files.items()
        ]
        raise _Answer(200, rows)

    def resolve(self, body: bytes, repo: str, name: str) -> None:
        found = self._repo(repo)
        if name not in found.files:
            raise _Answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found.sha})
        content = found.files[name]
        raise _Answer(
            200,
            content,
            {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": found.sha},
        )


NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{NAME}/preupload/\w+", _Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.store),
    ("POST", rf"/api/models/{NAME}/commit/\w+", _Handler.commit),
    ("GET", rf"/api/models/{NAME}(/revision/\w+)?", _Handler.info),
    ("GET", rf"/api/models/{NAME}/tree/\w+", _Handler.tree),
    ("GET", rf"/{NAME}/resolve/\w+/(?P<name>.+)", _Handler.resolve),
    ("HEAD", rf"/{NAME}/resolve/\w+/(?P<name>.+)", _Handler.resolve),
]


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
