"""A Hugging Face hub on loopback that serves folders of this machine as datasets and models, counting the bytes."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

REVISION = hashlib.sha1(b"revision").hexdigest()


def commit_of(name: str, revision: str) -> str:
    """The commit that a revision of a model points to."""
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


def _hash(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


class Hub:
    """Serves each folder `root`/USER/NAME as dataset USER/NAME. served: bytes given of each file, by its path.

    models: the folder of each revision of each model, by the model's name and the revision's, a branch or tag; its
    commit is `commit_of` them.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.models: dict[str, dict[str, Path]] = {}
        self.served: dict[str, int] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        parts = [unquote(part) for part in urlsplit(request.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "datasets"] and len(parts) >= 4 and (self.root / parts[2] / parts[3]).is_dir():
            self.describe(request, f"{parts[2]}/{parts[3]}", parts[4:], body)
        elif parts[0] == "datasets" and len(parts) > 5 and parts[3] == "resolve":
            self.give(request, "/".join([*parts[1:3], *parts[5:]]))
        elif parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in self.models:
            self.describe_model(request, "/".join(parts[2:4]), parts[4:])
        elif parts[2:3] == ["resolve"] and "/".join(parts[:2]) in self.models:
            name, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            folder = self.folder_of(name, revision)
            if folder is None:
                self.send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
            else:
                commit = next(commit_of(name, r) for r, f in self.models[name].items() if f == folder)
                self.give(request, f"{name}@{commit}/{file}", folder / file, commit)
        else:
            self.send(request, 404, b"{}")

    def files(self, name: str) -> dict[str, Path]:
        folder = self.root / name
        return {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}

    def describe(self, request: BaseHTTPRequestHandler, name: str, what: list[str], body: bytes) -> None:
        files = self.files(name)
        if not what or what[0] == "revision":
            if what and what[1] not in ("main", REVISION):
                return self.send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            value: Any = {"_id": "0", "id": name, "sha": REVISION, "private": False, "gated": False, "disabled": False,
                          "tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": file} for file in files]}  # fmt: skip
            return self.send(request, 200, json.dumps(value).encode())
        entries = {path: {"type": "file", "oid": "0" * 40, "size": file.stat().st_size, "path": path}
                   for path, file in files.items()}  # fmt: skip
        for path in files:
            for parent in Path(path).parents[:-1]:
                entries[str(parent)] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": str(parent)}
        if what[0] == "paths-info":
            asked = json.loads(body)["paths"]
            asked = [asked] if isinstance(asked, str) else asked
            found = [entries[path.rstrip("/")] for path in asked if path.rstrip("/") in entries]
            return self.send(request, 200, json.dumps(found).encode())
        assert what[0] == "tree", what
        below = "/".join(what[2:])
        recursive = "recursive=True" in request.path or "recursive=true" in request.path
        found = [
            entry for path, entry in sorted(entries.items())
            if (path.startswith(below + "/") if below else True)
            and (recursive or "/" not in path.removeprefix(below).strip("/"))
        ]  # fmt: skip
        if below and not found:
            return self.send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"})
        return self.send(request, 200, json.dumps(found).encode())

    def folder_of(self, name: str, revision: str) -> Path | None:
        """The folder of a branch, tag or commit of a model."""
        found = self.models[name]
        return found.get(revision) or {commit_of(name, other): folder for other, folder in found.items()}.get(revision)

    def describe_model(self, request: BaseHTTPRequestHandler, name: str, what: list[str]) -> None:
        if what == ["refs"]:
            refs = [
                {"name": r, "ref": f"refs/heads/{r}", "targetCommit": commit_of(name, r)} for r in self.models[name]
            ]
            return self.send(request, 200, json.dumps({"branches": refs, "tags": [], "converts": []}).encode())
        revision = what[1] if what else "main"
        folder = self.folder_of(name, revision)
        if folder is None:
            return self.send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        commit = next(commit_of(name, r) for r, f in self.models[name].items() if f == folder)
        files = [file for file in sorted(folder.iterdir()) if file.is_file()]
        value: Any = {"_id": "0", "id": name, "sha": commit, "private": False, "gated": False, "disabled": False,
                      "tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": f.name} for f in files]}  # fmt: skip
        if what[:1] == ["tree"]:
            value = [
                {"type": "file", "oid": _hash(file), "size": file.stat().st_size, "path": file.name} for file in files
            ]
        return self.send(request, 200, json.dumps(value).encode())

    def give(
        self, request: BaseHTTPRequestHandler, path: str, file: Path | None = None, commit: str = REVISION
    ) -> None:
        etag = "0" if file is None or not file.is_file() else _hash(file)  # the cache keeps a model's files by it
        file = file or self.root / path
        if not file.is_file():
            return self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        size = file.stat().st_size
        low, high, status = 0, size - 1, 200
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        asked = request.headers.get("Range")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            low, high, status = int(first), min(int(last or size - 1), size - 1), 206
            headers["Content-Range"] = f"bytes {low}-{high}/{size}"
        with file.open("rb") as stream:
            stream.seek(low)
            data = stream.read(high + 1 - low)
        if request.command == "GET":
            self.served[path] = self.served.get(path, 0) + len(data)
        return self.send(request, status, data, headers)

    @staticmethod
    def send(request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)
