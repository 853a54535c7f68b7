"""
A small hub on localhost that speaks enough of the Hugging Face Hub's endpoints for the real `huggingface_hub` client.

Repositories are kept in memory as commits (path -> bytes) and refs (branch or tag -> commit). A model is called
`owner/name`, a data set `datasets/owner/name`, a Space `spaces/owner/name`. Who writes, or reads what is private,
needs the token `TOKEN`. Large files go over LFS, as from clients without Xet (HF_HUB_DISABLE_XET), which it does not
speak. Every answer is noted in `log`, so that a test can say what went over the wire. A new endpoint is a method of
`_Handler` and a line in its `ROUTES`.
"""

import base64
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
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


TOKEN = "hf_localhost"


@dataclass
class Answer:
    """One line of the log: what was asked, the status, and the bytes of the body."""

    method: str
    path: str
    status: int
    body_bytes: int


@dataclass
class Fault:
    """What goes wrong with answers to requests (`GET /path?query`) in which the pattern is found."""

    pattern: str
    what: str  # "500", "stall" (no answer for a minute) or "cut" (half of the body)
    times: float


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit_of(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class Hub:
    """The repositories and the log, apart from the protocol."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.log: list[Answer] = []
        self.uploads: dict[str, bytes] = {}  # large files by SHA-256, before a commit names them
        self.url = ""
        self.faults: list[Fault] = []
        self.stopped = threading.Event()

    def fail(self, pattern: str, what: str, times: float = float("inf")) -> None:
        """Let so many answers go wrong from now on; see `Fault`."""
        self.faults.append(Fault(pattern, what, times))

    def commit(self, repo: str, folder: Path, *refs: str) -> str:
        """Put the files of `folder` into `repo` as a new commit that `refs` (by default `main`) point to; its id."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return self.commit_files(repo, files, *refs)

    def commit_files(self, repo: str, files: dict[str, bytes], *refs: str) -> str:
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
        hub.stopped.set()
        server.shutdown()
        thread.join()
        server.server_close()


LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "other", "unknown")


def metadata_errors(data: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong in the metadata of a card by huggingface/hub-docs, modelcard.md and datasetcard.md."""
    if "license" in data and data["license"] not in LICENSES:
        yield f'"license" must be one of {LICENSES}'
    bases = data.get("base_model") or []
    for key, names in (
        ("base_model", [bases] if isinstance(bases, str) else bases),
        ("datasets", data.get("datasets") or []),
    ):
        yield from (f'"{key}" with value "{name}" is not valid' for name in names if not is_id(name))
    for model in data.get("model-index") or []:
        if not model.get("name") or not model.get("results"):
            yield '"model-index" needs a name and results'
        for result in model.get("results") or []:
            for part, fields in (("task", ("type",)), ("dataset", ("type", "name"))):
                yield from (f'"{part}.{field}" is required' for field in fields if not result.get(part, {}).get(field))
            for metric in result.get("metrics") or [{}]:
                yield from (
                    f'"metrics.{field}" is required' for field in ("type", "value") if metric.get(field) is None
                )


def eval_result_errors(text: str) -> Iterator[str]:
    """The same for a file of `.eval_results`, by docs/hub/eval-results.md; whether the data set is there it leaves."""
    for entry in yaml.safe_load(text):
        dataset = entry.get("dataset") or {}
        if not is_id(dataset.get("id")):
            yield f'"dataset.id" with value "{dataset.get("id")}" is not valid'
        if not dataset.get("task_id") or entry.get("value") is None:
            yield '"dataset.task_id" and "value" are required'


def is_id(name: Any) -> bool:
    """Whether a repository could have that name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


class _NotFound(Exception):
    """What is missing: RepoNotFound, RevisionNotFound or EntryNotFound, as the hub calls it in X-Error-Code."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = urlsplit(self.path).path
        if self._goes_wrong("500"):
            self._body()
            self._send(500)
            return
        if self._goes_wrong("stall"):
            self.hub.stopped.wait(60)
            return
        try:
            routes = self.UPLOAD_ROUTES if self.command in ("POST", "PUT") else self.ROUTES
            for pattern, answer in routes:
                if match := re.fullmatch(pattern, path):
                    if answer in self.WRITING and not self._has_token():
                        self._body()
                        self._send(401, headers={"X-Error-Message": "Invalid username or password."})
                        return
                    getattr(self, answer)(**{name: unquote(text) for name, text in match.groupdict("").items()})
                    return
            self._send(404)
        except _NotFound as error:
            self._send(404, headers={"X-Error-Code": str(error), "X-Error-Message": str(error)})

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format, *args):
        pass

    def _goes_wrong(self, what: str) -> bool:
        request = f"{self.command} {self.path}"
        for fault in self.hub.faults:
            if fault.what == what and fault.times > 0 and re.search(fault.pattern, request):
                fault.times -= 1
                self.close_connection = True
                return True
        return False

    def _send(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None):
        sent = b"" if self.command == "HEAD" else body
        if self._goes_wrong("cut"):
            sent = sent[: len(sent) // 2]
        self.hub.log.append(Answer(self.command, self.path, status, len(sent)))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)

    def _send_json(self, content: Any):
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """Commit id and files; `_NotFound` as the hub would say it."""
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and not self._has_token()):
            raise _NotFound("RepoNotFound")
        commit = repository.commit_of(revision or "main")
        if commit is None:
            raise _NotFound("RevisionNotFound")
        return commit, repository.commits[commit]

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

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
        private = self.hub.repositories[repo].private
        answer = {"id": repo, "sha": commit, "siblings": siblings, "private": private, "tags": []}
        if "config.json" in files:
            answer["config"] = json.loads(files["config.json"])
        if "README.md" in files:
            answer["library_name"] = ModelCard(files["README.md"].decode()).data.get("library_name")
        self._send_json(answer)

    def tree(self, kind: str, repo: str, revision: str, folder: str):
        """The files in a folder (all of the repository without one), with `recursive` those below it, too."""
        _, files = self._files(repo if kind == "models" else f"{kind}/{repo}", revision)
        inside = f"{folder}/" if folder else ""
        recursive = "recursive=false" not in urlsplit(self.path).query.lower()
        listing, folders = [], set()
        for path, content in sorted(files.items()):
            if not path.startswith(inside):
                continue
            below, separator, _ = path.removeprefix(inside).partition("/")
            if separator and not recursive:
                folders.add(inside + below)
                continue
            oid = hashlib.sha1(content).hexdigest()
            listing.append({"type": "file", "path": path, "size": len(content), "oid": oid})
        for path in sorted(folders):
            listing.append(
                {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
            )
        self._send_json(listing)

    # A push: the repository is made, the hub says which files are large, those are sent by their SHA-256, and a commit
    # brings the small ones and the names of all.

    def create(self):
        request = json.loads(self._body())
        name = f"{request.get('organization') or 'somebody'}/{request['name']}"
        repo = name if request["type"] == "model" else f"{request['type']}s/{name}"
        if repo in self.hub.repositories:
            self._send(409, json.dumps({"url": f"{self.hub.url}/{repo}"}).encode())
            return
        self.hub.commit_files(repo, {})
        private = self.hub.repositories[repo].private = request.get("visibility") == "private"
        self._send_json({"url": f"{self.hub.url}/{repo}", "id": name, "private": private})

    def branch(self, kind: str, repo: str, branch: str):
        request = json.loads(self._body() or b"{}")
        repo = repo if kind == "models" else f"{kind}/{repo}"
        commit, _ = self._files(repo, request.get("startingPoint", "main"))
        refs = self.hub.repositories[repo].refs
        if branch in refs:
            self._send(409)
            return
        refs[branch] = commit
        self._send(200)

    def validate_yaml(self):
        errors = list(metadata_errors(ModelCard(json.loads(self._body())["content"]).data.to_dict()))
        answer = {"errors": [{"message": message} for message in errors], "warnings": []}
        self._send(400 if errors else 200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def preupload(self, **_: str):
        files = json.loads(self._body())["files"]
        modes = {
            file["path"]: "lfs" if file["path"].endswith((".parquet", ".safetensors")) else "regular" for file in files
        }
        self._send_json(
            {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}
        )

    def lfs_batch(self, **_: str):
        objects = json.loads(self._body())["objects"]
        for item in objects:
            item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
        self._send_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str):
        content = self._body()
        if hashlib.sha256(content).hexdigest() != oid:
            self._send(400)
            return
        self.hub.uploads[oid] = content
        self._send(200)

    def push(self, kind: str, repo: str, revision: str):
        repo = repo if kind == "models" else f"{kind}/{repo}"
        parent, files = self._files(repo, revision)
        files = dict(files)
        for line in map(json.loads, self._body().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", parent) != parent:
                    self._send(412, headers={"X-Error-Message": "A commit has happened since. Please refresh."})
                    return
        results = [text.decode() for path, text in files.items() if re.fullmatch(r"\.eval_results/.*\.yaml", path)]
        if errors := [error for text in results for error in eval_result_errors(text)]:
            self._send(400, headers={"X-Error-Message": errors[0]})
            return
        commit = self.hub.commit_files(repo, files, revision)
        self.hub.repositories[repo].messages[commit] = message
        self._send_json({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit})

    def paths_info(self, kind: str, repo: str, revision: str):
        """Files and folders among the paths that are asked for."""
        _, files = self._files(repo if kind == "models" else f"{kind}/{repo}", revision)
        body = self._body().decode()
        request = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        found: list[dict[str, Any]] = []
        for path in request:
            if path in files:
                oid = hashlib.sha1(files[path]).hexdigest()
                found.append({"type": "file", "path": path, "size": len(files[path]), "oid": oid})
            elif any(name.startswith(f"{path}/") for name in files):
                found.append({"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()})
        self._send_json(found)

    # Without `lfs_upload`: its address is given to one that has shown a token.
    WRITING = ("create", "branch", "preupload", "lfs_batch", "push")
    UPLOAD_ROUTES = (
        (r"/api/repos/create", "create"),
        (r"/api/validate-yaml", "validate_yaml"),
        (r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)", "branch"),
        (r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        (r"/(?P<repo>(?:datasets/|spaces/)?[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        (r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
        (r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "push"),
        (r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "paths_info"),
    )
    ROUTES = (
        (r"/(?P<repo>(?:datasets/|spaces/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        (r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", "info"),
        (
            r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?",
            "tree",
        ),
    )
