"""A Hugging Face hub on loopback that serves dataset folders of this machine, counting the bytes it gives."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

REVISION = hashlib.sha1(b"revision").hexdigest()


class Hub:
    """Serves each folder `root`/USER/NAME as dataset USER/NAME. served: bytes given of each file, by its path."""

    def __init__(self, root: Path) -> None:
        self.root = root
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
        path = unquote(urlsplit(request.path).path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "datasets"] and len(parts) >= 4 and (self.root / parts[2] / parts[3]).is_dir():
            self.describe(request, f"{parts[2]}/{parts[3]}", parts[4:], body)
        elif parts[0] == "datasets" and len(parts) > 5 and parts[3] == "resolve":
            self.give(request, "/".join([*parts[1:3], *parts[5:]]))
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

    def give(self, request: BaseHTTPRequestHandler, path: str) -> None:
        file = self.root / path
        if not file.is_file():
            return self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        size = file.stat().st_size
        low, high, status = 0, size - 1, 200
        headers = {"X-Repo-Commit": REVISION, "ETag": '"0"', "Accept-Ranges": "bytes"}
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
