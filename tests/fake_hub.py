# Copyright 2026 The hf_source team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A small stand-in for the Hub: what huggingface_hub calls to make, fill and read a repository, over HTTP."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


TOKEN = "hf_secretOfTheTest"


class FakeHub:
    """Repositories in memory, served on a free port of this machine.

    Attributes:
        url: of the server.
        repositories: `"me/name"` of a model, `"datasets/me/name"` -> `{"private", "branches": name -> commit,
            "commits": commit -> path -> content}`.
        requests: method and path of every request.
        tokens: every token that was sent.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> "FakeHub":
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """The newest content of a branch."""
        repository = self.repositories[repo_id]
        return repository["commits"][repository["branches"][branch]]


def _commit_id(files: dict[str, bytes]) -> str:
    digest = hashlib.sha1()
    for name, content in sorted(files.items()):
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.tokens.add(self.headers.get("Authorization"))
        for method, pattern, answer in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split():
                return answer(self, **found.groupdict())
        return self._send(404, {"error": f"no such address: {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _repository(self, repo: str) -> dict[str, Any] | None:
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository["private"] and not self.headers.get("Authorization")):
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repository

    def _commit(self, repository: dict[str, Any], revision: str) -> str | None:
        commit = repository["branches"].get(revision, revision)
        if commit not in repository["commits"]:
            self._send(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}"
        repo = {"dataset": "datasets/", "space": "spaces/"}.get(asked.get("type"), "") + repo
        if not self.headers.get("Authorization"):
            return self._send(401, {"error": "Invalid username or password."})
        if repo in self.hub.repositories:
            return self._send(409, {"error": "You already created this repository", "url": f"{self.hub.url}/{repo}"})
        first = {".gitattributes": b"*.safetensors filter=lfs\n"}
        self.hub.repositories[repo] = {
            "private": bool(asked.get("private")) or asked.get("visibility") == "private",
            "branches": {"main": _commit_id(first)},
            "commits": {_commit_id(first): first},
        }
        return self._send(200, {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo})

    def info(self, repo: str, revision: str = "main") -> None:
        repository = self._repository(repo)
        commit = repository and self._commit(repository, revision)
        if commit:
            siblings = [{"rfilename": name} for name in sorted(repository["commits"][commit])]
            name = repo.removeprefix("datasets/").removeprefix("spaces/")
            content = {
                "id": name,
                "modelId": name,
                "gated": repository.get("gated", False),
                "sha": commit,
                "private": repository["private"],
                "tags": [],
            }
            self._send(200, content | {"siblings": siblings})

    def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        """Files below a folder, at any depth or, with the folders beside them, at its own only."""
        repository = self._repository(repo)
        commit = repository and self._commit(repository, revision)
        if not commit:
            return
        start = f"{folder}/" if folder else ""
        files = {name: content for name, content in repository["commits"][commit].items() if name.startswith(start)}
        if folder and not files:
            return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        if "recursive=true" not in urlsplit(self.path).query.lower() and urlsplit(self.path).query:
            inside = {name.removeprefix(start).split("/")[0] for name in files if "/" in name.removeprefix(start)}
            folders = [{"type": "directory", "path": start + name, "size": 0, "oid": "0" * 40} for name in inside]
            files = {name: content for name, content in files.items() if "/" not in name.removeprefix(start)}
        else:
            folders = []
        self._send(200, [*folders, *(_entry(name, content) for name, content in sorted(files.items()))])

    def paths(self, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        commit = repository and self._commit(repository, revision)
        if commit:
            asked = json.loads(self.body)["paths"]
            files = repository["commits"][commit]
            self._send(200, [_entry(name, files[name]) for name in asked if name in files])

    def branch(self, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        if repository:
            if revision in repository["branches"]:
                return self._send(409, {"error": "Reference already exists"})
            repository["branches"][revision] = repository["branches"]["main"]
            self._send(200, {})

    def preupload(self, repo: str, revision: str) -> None:
        def answer(file: dict[str, Any]) -> dict[str, Any]:
            large = file["path"].endswith((".safetensors", ".parquet"))
            mode = "lfs" if large else "regular"
            return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

        if self._repository(repo):
            self._send(200, {"files": [answer(file) for file in json.loads(self.body)["files"]]})

    def batch(self, repo: str) -> None:
        def answer(file: dict[str, Any]) -> dict[str, Any]:
            actions = {
                "upload": {"href": f"{self.hub.url}/lfs/{file['oid']}"},
                "verify": {"href": f"{self.hub.url}/lfs-verify"},
            }
            return {**file, "actions": actions}

        objects = [answer(file) for file in json.loads(self.body)["objects"]]
        self._send(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._send(400, {"error": "hash differs"})
        self.hub.large_files[oid] = self.body
        return self._send(200, {})

    def verify(self) -> None:
        asked = json.loads(self.body)
        held = self.hub.large_files.get(asked["oid"])
        self._send(200 if held is not None and len(held) == asked["size"] else 404, {})

    def commit(self, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        if not repository:
            return
        files = dict(repository["commits"][repository["branches"][revision]])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        commit = _commit_id(files)
        repository["commits"][commit] = files
        repository["branches"][revision] = commit
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        self._send(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def resolve(self, repo: str, revision: str, file: str) -> None:
        repository = self._repository(repo)
        commit = repository and self._commit(repository, revision)
        if commit:
            content = repository["commits"][commit].get(file)
            if content is None:
                return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            etag = hashlib.sha1(content).hexdigest()
            self._send(200, content, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})

    def yaml(self) -> None:
        self._send(200, {"errors": [], "warnings": []})


_REPO = r"(?P<repo>(?:datasets/|spaces/)?[^/]+/[^/]+)"
_API = rf"/api/(?:models/)?{_REPO}"
_ROUTES = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.yaml),
    ("GET", rf"{_API}", _Handler.info),
    ("GET", rf"{_API}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)/?", _Handler.tree),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)/(?P<folder>.+)", _Handler.tree),
    ("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)", _Handler.paths),
    ("POST", rf"{_API}/branch/(?P<revision>.+)", _Handler.branch),
    ("POST", rf"{_API}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"{_API}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.upload),
    ("POST", r"/lfs-verify", _Handler.verify),
    ("GET HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
]
