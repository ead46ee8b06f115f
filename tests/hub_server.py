"""A small Hub on this machine: the endpoints that huggingface_hub calls to list repos and to download from them.

What belongs here: repos with commits, served over HTTP, and faults on demand. What does not: uploads, accounts, datasets.
To try something by hand: `python -m tests.hub_server FOLDER --port 8900` and HF_ENDPOINT=http://127.0.0.1:8900 elsewhere.
"""

import argparse
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import numpy as np

TEXT_FILES = (".json", ".md", ".txt", ".yaml", ".gitattributes")
"""Kept in git itself by the Hub, hence known by their git blob id; anything else is LFS and known by its sha256."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Blob:
    """One version of a file: its bytes, or a path that is read when asked for."""

    content: bytes | Path
    is_lfs: bool

    @cached_property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def chunks(self, start: int = 0) -> Iterator[bytes]:
        if isinstance(self.content, bytes):
            yield self.content[start:]
            return
        with self.content.open("rb") as stream:
            stream.seek(start)
            while block := stream.read(_CHUNK):
                yield block

    @cached_property
    def sha256(self) -> str:
        return self._digest(hashlib.sha256())

    @cached_property
    def git_id(self) -> str:
        return self._digest(hashlib.sha1(f"blob {self.size}\0".encode()))

    def _digest(self, digest: "hashlib._Hash") -> str:
        for block in self.chunks():
            digest.update(block)
        return digest.hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_id


@dataclass(frozen=True)
class Commit:
    sha: str
    files: Mapping[str, Blob]


@dataclass
class Fault:
    """What goes wrong with the next `times` answers to requests whose path ends with `ending`."""

    kind: str
    ending: str
    times: int
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)


class HubServer:
    """Serves repos on 127.0.0.1 until closed. `requests`: Counter of "METHOD path"; `bytes_sent`: Counter by file path."""

    def __init__(self, *, port: int = 0, page_size: int = 1000) -> None:
        self.page_size = page_size
        self.requests: Counter[str] = Counter()
        self.bytes_sent: Counter[str] = Counter()
        self.gated: set[str] = set()
        self.is_closed = False
        self._commits: dict[str, list[Commit]] = {}
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        self._folder: tuple[Path, str | None] | None = None
        self._stamps: dict[str, dict[str, tuple[int, int]]] = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Be unreachable, on connections that are open as well."""
        self.is_closed = True
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    # Repos ------------------------------------------------------------------------------------------------------------

    def commit(self, repo: str, changes: Mapping[str, bytes | Path | None]) -> str:
        """Add, replace or (None) delete files in a new commit of `repo`, made if need be; returns its sha."""
        with self._lock:
            history = self._commits.setdefault(repo, [])
            files = dict(history[-1].files) if history else {}
            for path, content in changes.items():
                files.pop(path, None)
                if content is not None:
                    files[path] = Blob(content, is_lfs=not path.endswith(TEXT_FILES))
            identity = json.dumps([repo, len(history), sorted((path, blob.etag) for path, blob in files.items())])
            history.append(Commit(hashlib.sha1(identity.encode()).hexdigest(), files))
            return history[-1].sha

    def remove(self, repo: str) -> None:
        """Delete a repo."""
        with self._lock:
            del self._commits[repo]

    def serve_folder(self, folder: Path, *, org: str | None = None) -> None:
        """Serve FOLDER/<org>/<repo> (with `org`: FOLDER/<repo>); what changes in it becomes a commit at the next listing."""
        self._folder = (folder, org)
        self._rescan()

    def _rescan(self) -> None:
        if self._folder is None:
            return
        folder, org = self._folder
        for repo in folder.glob("*" if org else "*/*"):
            name = f"{org}/{repo.name}" if org else f"{repo.parent.name}/{repo.name}"
            found = {p.relative_to(repo).as_posix(): p for p in repo.rglob("*") if p.is_file()}
            stamps = {path: (p.stat().st_size, p.stat().st_mtime_ns) for path, p in found.items()}
            known = self._stamps.get(name, {})
            changes: dict[str, bytes | Path | None] = {p: found[p] for p, stamp in stamps.items() if known.get(p) != stamp}
            changes |= {path: None for path in known.keys() - stamps.keys()}
            if changes:
                self.commit(name, changes)
            self._stamps[name] = stamps

    def heads(self) -> dict[str, Commit]:
        """The newest commit of every repo."""
        with self._lock:
            self._rescan()
            return {repo: history[-1] for repo, history in sorted(self._commits.items())}

    def find(self, repo: str, revision: str) -> Commit | None:
        """The commit of a repo that `revision` (a sha, or main) names."""
        with self._lock:
            history = self._commits.get(repo, [])
            return history[-1] if history and revision == "main" else next((c for c in history if c.sha == revision), None)

    def knows(self, repo: str) -> bool:
        return repo in self._commits

    # Faults -----------------------------------------------------------------------------------------------------------

    def truncate(self, file: str, times: int = 1) -> None:
        """Break off the next `times` downloads of a file half way, as a lost connection does."""
        self._add(Fault("truncate", file, times))

    def corrupt(self, file: str, times: int = 1) -> None:
        """Send other bytes of the right length in the next `times` downloads of a file."""
        self._add(Fault("corrupt", file, times))

    def lose(self, file: str, times: int = 1 << 30) -> None:
        """List a file, but answer 404 when it is asked for."""
        self._add(Fault("lose", file, times))

    def fail(self, status: int = 429, times: int = 1, *, retry_after: float | None = None, ending: str = "") -> None:
        """Answer the next `times` requests (whose path ends with `ending`) with an error."""
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        self._add(Fault("fail", ending, times, status, headers))

    def stall(self, times: int = 1, *, ending: str = "") -> None:
        """Take the next `times` requests and never answer."""
        self._add(Fault("stall", ending, times))

    def _add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def take_fault(self, path: str, *kinds: str) -> Fault | None:
        """The fault that the request for `path` meets, used up by one."""
        with self._lock:
            for fault in self._faults:
                if fault.kind in kinds and fault.times > 0 and path.endswith(fault.ending):
                    fault.times -= 1
                    return fault
            return None


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if self.hub.is_closed:
            self.close_connection = True
            return
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), {name: values for name, values in parse_qs(parts.query).items()}
        self.hub.requests[f"{self.command} {path}"] += 1
        if self.hub.take_fault(path, "stall"):
            time.sleep(60)
            return
        if fault := self.hub.take_fault(path, "fail"):
            self._error(fault.status, "", fault.headers)
        elif path == "/api/models":
            self._list_models(query)
        elif path.startswith("/api/models/"):
            self._repo_api(path.removeprefix("/api/models/"), query)
        elif "/resolve/" in path:
            repo, _, rest = path.removeprefix("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            self._resolve(repo, revision, file)
        else:
            self._error(404, "")

    # API --------------------------------------------------------------------------------------------------------------

    def _list_models(self, query: dict[str, list[str]]) -> None:
        author, search = query.get("author", [""])[0], query.get("search", [""])[0].lower()
        heads = self.hub.heads()
        found = [r for r in heads if r.startswith(f"{author}/" if author else "") and search in r.lower()]
        self._page([self._model(repo, heads[repo]) for repo in found], query)

    def _model(self, repo: str, commit: Commit, *, siblings: bool = False, blobs: bool = False) -> dict[str, object]:
        body: dict[str, object] = {"_id": repo, "id": repo, "modelId": repo, "sha": commit.sha, "private": False}
        body["gated"] = "manual" if repo in self.hub.gated else False
        if siblings:
            body["siblings"] = [self._sibling(path, blob, blobs=blobs) for path, blob in commit.files.items()]
        return body

    def _sibling(self, path: str, blob: Blob, *, blobs: bool) -> dict[str, object]:
        entry: dict[str, object] = {"rfilename": path}
        if blobs:
            entry |= {"size": blob.size, "blobId": blob.git_id}
        if blobs and blob.is_lfs:
            entry["lfs"] = {"size": blob.size, "sha256": blob.sha256, "pointerSize": 130}
        return entry

    def _repo_api(self, rest: str, query: dict[str, list[str]]) -> None:
        pieces = rest.split("/")
        repo, action, revision = "/".join(pieces[:2]), (pieces[2:3] or ["revision"])[0], (pieces[3:4] or ["main"])[0]
        commit = self._commit(repo, revision)
        if commit is None:
            return
        if action == "tree":
            self._tree(commit, "/".join(pieces[4:]), query)
        elif action == "revision":
            self._json(self._model(repo, commit, siblings=True, blobs=query.get("blobs", ["False"])[0].lower() == "true"))
        else:
            self._error(404, "")

    def _commit(self, repo: str, revision: str) -> Commit | None:
        commit = self.hub.find(repo, revision)
        if commit is None:
            self._error(404, "RevisionNotFound" if self.hub.knows(repo) else "RepoNotFound")
        return commit

    def _tree(self, commit: Commit, folder: str, query: dict[str, list[str]]) -> None:
        """Files under `folder`, all of them or (not recursive) those directly in it; folders themselves are not listed."""
        recursive = query.get("recursive", ["False"])[0].lower() == "true"
        prefix = f"{folder}/" if folder else ""
        entries: list[dict[str, object]] = []
        for path, blob in sorted(commit.files.items()):
            if path.startswith(prefix) and (recursive or "/" not in path.removeprefix(prefix)):
                entry: dict[str, object] = {"type": "file", "path": path, "size": blob.size, "oid": blob.git_id}
                if blob.is_lfs:
                    entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
                entries.append(entry)
        self._page(entries, query)

    def _page(self, entries: list[dict[str, object]], query: dict[str, list[str]]) -> None:
        start = int(query.get("cursor", ["0"])[0])
        end = start + min(self.hub.page_size, int(query.get("limit", ["1000000"])[0]))
        headers = {}
        if end < len(entries) and "limit" not in query:
            following = urlencode({**query, "cursor": [str(end)]}, doseq=True)
            headers["Link"] = f'<{self.hub.url}{urlsplit(self.path).path}?{following}>; rel="next"'
        self._json(entries[start:end], headers)

    # Files ------------------------------------------------------------------------------------------------------------

    def _resolve(self, repo: str, revision: str, file: str) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return
        if repo in self.hub.gated and "Authorization" not in self.headers:
            self._error(401, "GatedRepo")
        elif file not in commit.files or self.hub.take_fault(f"{repo}/{file}", "lose"):
            self._error(404, "EntryNotFound", {"X-Repo-Commit": commit.sha})
        else:
            self._send_file(f"{repo}/{file}", commit.files[file], commit.sha)

    def _send_file(self, name: str, blob: Blob, sha: str) -> None:
        start = 0
        if requested := self.headers.get("Range"):
            start = int(requested.removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if blob.is_lfs:
            headers |= {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.sha256}"'}
        if start:
            headers["Content-Range"] = f"bytes {start}-{blob.size - 1}/{blob.size}"
        self._head(206 if start else 200, blob.size - start, "application/octet-stream", headers)
        if self.command == "GET":
            self._send_body(name, blob, start)

    def _send_body(self, name: str, blob: Blob, start: int) -> None:
        truncated = self.hub.take_fault(name, "truncate") is not None
        corrupted = self.hub.take_fault(name, "corrupt") is not None
        left = (blob.size - start) // 2 if truncated else blob.size - start
        for block in blob.chunks(start):
            block = block[:left]
            self.wfile.write(bytes(byte ^ 0x55 for byte in block) if corrupted else block)
            self.hub.bytes_sent[name] += len(block)
            left -= len(block)
        self.close_connection = truncated

    # Answers ----------------------------------------------------------------------------------------------------------

    def _json(self, value: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self._head(200, len(body), "application/json", headers or {})
        if self.command == "GET":
            self.wfile.write(body)

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._head(status, 0, "text/plain", ({"X-Error-Code": code} if code else {}) | (headers or {}))

    def _head(self, status: int, length: int, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()


def sae_files(rng: np.random.Generator, *paths: str, size: int = 4000) -> dict[str, bytes | Path | None]:
    """Random bytes under the file names of single-layer SAEs of Gemma Scope 2, with the big file that is never fetched."""
    files: dict[str, bytes | Path | None] = {}
    for path in paths:
        files[f"{path}/config.json"] = json.dumps({"width": int(rng.integers(1 << 30))}).encode()
        files[f"{path}/params.safetensors"] = rng.bytes(size)
        files[f"{path}/examples.safetensors"] = rng.bytes(5 * size)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="holds <org>/<repo>/..., or with --org <repo>/...")
    parser.add_argument("--org", help="the org of every repo in the folder")
    parser.add_argument("--port", type=int, default=8900)
    arguments = parser.parse_args()
    with HubServer(port=arguments.port) as hub:
        hub.serve_folder(arguments.folder, org=arguments.org)
        print(f"HF_ENDPOINT={hub.url}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
