"""
A small hub on localhost that speaks enough of the Hugging Face Hub's endpoints for the real `huggingface_hub` client.

Repositories are kept in memory as commits (path -> bytes) and refs (branch or tag -> commit). A model is called
`owner/name`, a data set `datasets/owner/name`. Every answer is noted in `log`, so that a test can say what went over
the wire. A new endpoint is a method of `_Handler` and a line in its `ROUTES`.
"""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Answer:
    """One line of the log: what was asked, the status, and the bytes of the body."""

    method: str
    path: str
    status: int
    body_bytes: int


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit_of(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class Hub:
    """The repositories and the log, apart from the protocol."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.log: list[Answer] = []
        self.url = ""

    def commit(self, repo: str, folder: Path, *refs: str) -> str:
        """Put the files of `folder` into `repo` as a new commit that `refs` (by default `main`) point to; its id."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        repository = self.repositories.setdefault(repo, Repository())
        listing = sorted((path, hashlib.sha1(content).hexdigest()) for path, content in files.items())
        commit = hashlib.sha1(json.dumps([len(repository.commits), listing]).encode()).hexdigest()
        repository.commits[commit] = files
        for ref in refs or ("main",):
            repository.refs[ref] = commit
        return commit

    def downloads(self) -> list[str]:
        """Paths of files whose content was sent."""
        return [answer.path for answer in self.log if "/resolve/" in answer.path and answer.body_bytes]


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A running hub at `hub.url`, for `HF_ENDPOINT`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _NotFound(Exception):
    """What is missing: RepoNotFound, RevisionNotFound or EntryNotFound, as the hub calls it in X-Error-Code."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = urlsplit(self.path).path
        try:
            for pattern, answer in self.ROUTES:
                if match := re.fullmatch(pattern, path):
                    getattr(self, answer)(**{name: unquote(text) for name, text in match.groupdict("").items()})
                    return
            self._send(404)
        except _NotFound as error:
            self._send(404, headers={"X-Error-Code": str(error), "X-Error-Message": str(error)})

    do_HEAD = do_GET

    def log_message(self, format, *args):
        pass

    def _send(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None):
        sent = b"" if self.command == "HEAD" else body
        self.hub.log.append(Answer(self.command, self.path, status, len(sent)))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)

    def _send_json(self, content: Any):
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """Commit id and files; `_NotFound` as the hub would say it."""
        repository = self.hub.repositories.get(repo)
        if repository is None:
            raise _NotFound("RepoNotFound")
        commit = repository.commit_of(revision or "main")
        if commit is None:
            raise _NotFound("RevisionNotFound")
        return commit, repository.commits[commit]

    def resolve(self, repo: str, revision: str, path: str):
        """The content of a file, or a part of it; HEAD tells its ETag, size and commit."""
        commit, files = self._files(repo, revision)
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            self._send(404, headers={**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "EntryNotFound"})
            return
        content = files[path]
        headers |= {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
            if first >= len(content):
                self._send(416, headers={**headers, "Content-Range": f"bytes */{len(content)}"})
                return
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._send(206, content[first : last + 1], headers)
        else:
            self._send(200, content, headers)

    def info(self, kind: str, repo: str, revision: str):
        repo = repo if kind == "models" else f"{kind}/{repo}"
        commit, files = self._files(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        self._send_json({"id": repo, "sha": commit, "siblings": siblings, "private": False, "tags": []})

    def tree(self, kind: str, repo: str, revision: str):
        """All files, as if asked with `recursive`."""
        _, files = self._files(repo if kind == "models" else f"{kind}/{repo}", revision)
        self._send_json(
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in sorted(files.items())
            ]
        )

    ROUTES = (
        (r"/(?P<repo>(?:datasets/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        (r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", "info"),
        (r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", "tree"),
    )
