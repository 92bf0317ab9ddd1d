"""A Hugging Face hub on loopback to push to and read from: repositories with branches and commits, git blobs, LFS, tokens.

It speaks what huggingface_hub 1.33 asks of the hub for whoami, create, branches, refs, tree, paths-info, preupload, LFS batch
and upload, commit and download. Of Xet, the hub's newer transfer, it knows nothing.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from hub_blobs import Blob, Refused, Repo

USER, TOKEN, READ_TOKEN = "org", "hf_write", "hf_read"
PAGE = 7  # entries of a listing in one answer
LFS_SUFFIXES = (".arrow", ".safetensors")


class HubRepos:
    """repos: by kind (datasets, models) and name. uploaded: bytes that came in, by path or sha256; served: bytes given out.

    lose: answers to commits that are carried out and never sent; fail: statuses of the next answers; alter: sha256 of a file
    that is kept without its last byte.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.uploaded: dict[str, int] = {}
        self.served: dict[str, int] = {}
        self.requests: list[str] = []
        self.lose = 0
        self.fail: list[int] = []
        self.alter: str | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_POST = do_PUT = do_GET

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._lock = threading.Lock()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, kind: str, name: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository, by path."""
        repo = self.repos[kind, name]
        return {path: blob.data for path, blob in repo.commits[repo.find(revision)].items()}

    # --- requests --------------------------------------------------------------------------------------------

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        url = urlsplit(request.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        self.requests.append(f"{request.command} {url.path}")
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        with self._lock:
            try:
                if self.fail:
                    raise Refused(self.fail.pop(0), "", "come again")
                found = self.route(request, parts, query, body, token)
            except Refused as error:
                status, code, text = error.args
                self.send(request, status, json.dumps({"error": text}).encode(), {"X-Error-Code": code} if code else {})
                return
        if found is not None:
            status, data, headers = found
            self.send(request, status, data, headers)

    def route(self, request: Any, parts: list[str], query: dict, body: bytes, token: str) -> Any:
        if parts == ["api", "whoami-v2"]:
            if token not in (TOKEN, READ_TOKEN):
                raise Refused(401, "", "Invalid credentials in Authorization header")
            return self.json(
                {"type": "user", "name": USER, "orgs": [{"name": "lab"}], "auth": {"type": "access_token"}}
            )
        if parts == ["api", "validate-yaml"]:
            return self.json({"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            return self.create(json.loads(body), token)
        if parts[0] == "lfs" and request.command == "PUT":
            return self.put(parts[1], body)
        if parts[0] == "api":
            kind, name, rest = parts[1], "/".join(parts[2:4]), parts[4:]
            return self.api(request, kind, name, self.repo(kind, name, token), rest, query, body, token)
        kind = "datasets" if parts[0] == "datasets" else "models"
        own = parts[1:] if kind == "datasets" else parts
        if own[1].endswith(".git"):
            name = f"{own[0]}/{own[1].removesuffix('.git')}"
            self.repo(kind, name, token)
            return self.batch(json.loads(body))
        name = "/".join(own[:2])
        repo = self.repo(kind, name, token)
        assert own[2] == "resolve", parts
        return self.resolve(request, repo, own[3], "/".join(own[4:]))

    def repo(self, kind: str, name: str, token: str) -> Repo:
        repo = self.repos.get((kind, name))
        if repo is None or (repo.private and token not in (TOKEN, READ_TOKEN)):
            raise Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        return repo

    def create(self, wanted: dict[str, Any], token: str) -> Any:
        if token != TOKEN or wanted["organization"] not in (USER, "lab"):
            raise Refused(403, "", "You don't have the rights to create a repository under this namespace")
        kind = f"{wanted.get('type') or 'model'}s"
        name = f"{wanted['organization']}/{wanted['name']}"
        if (kind, name) in self.repos:
            raise Refused(409, "", "You already created this repo")
        repo = self.repos[kind, name] = Repo(wanted.get("visibility") == "private")
        repo.commit("main", {".gitattributes": Blob(b"*.arrow filter=lfs\n", False)}, "initial commit")
        return self.json({"url": f"{self.endpoint}/{'datasets/' if kind == 'datasets' else ''}{name}"})

    def api(
        self, request: Any, kind: str, name: str, repo: Repo, rest: list[str], query: dict, body: bytes, token: str
    ) -> Any:
        what = rest[0] if rest else "revision"
        if what == "refs":
            refs = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": oid} for b, oid in repo.branches.items()]
            return self.json({"branches": refs, "tags": [], "converts": []})
        if what in ("preupload", "commit", "branch") and token != TOKEN:
            raise Refused(403, "", "Forbidden: you must use a write token to upload to a repository")
        if what == "branch":
            if rest[1] in repo.branches:
                raise Refused(409, "", "Reference already exists")
            repo.branches[rest[1]] = repo.branches[json.loads(body).get("startingPoint") or "main"]
            return self.json({})
        revision = rest[1] if len(rest) > 1 else "main"
        oid = repo.find(revision)
        if oid is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[oid]
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self.json({"_id": "0", "id": name, "sha": oid, "private": repo.private, "gated": False, "disabled": False,
                              "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})  # fmt: skip
        if what == "preupload":
            return self.json({"files": [self.mode(files, file) for file in json.loads(body)["files"]]})
        if what == "commit":
            return self.commit(
                request, f"{'datasets/' if kind == 'datasets' else ''}{name}", repo, revision, files, body
            )
        entries = {path: blob.entry(path) for path, blob in files.items()}
        for path in files:
            for parent in [path.rsplit("/", depth + 1)[0] for depth in range(path.count("/"))]:
                entries[parent] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": parent}
        if what == "paths-info":
            asked = json.loads(body)["paths"]
            return self.json(
                [entries[path] for path in ([asked] if isinstance(asked, str) else asked) if path in entries]
            )
        assert what == "tree", rest
        return self.tree(request, entries, "/".join(rest[2:]), query)

    def tree(self, request: Any, entries: dict[str, dict], below: str, query: dict) -> Any:
        recursive = query.get("recursive", "").lower() == "true"
        inside = {path.removeprefix(f"{below}/"): entry for path, entry in entries.items()
                  if not below or path.startswith(f"{below}/")}  # fmt: skip
        found = [entry for path, entry in sorted(inside.items()) if recursive or "/" not in path]
        if below and not found:
            raise Refused(404, "EntryNotFound", f"{below} does not exist")
        first = int(query.get("cursor", 0))
        headers = {}
        if len(found) > first + PAGE:
            url = re.sub(r"&cursor=\d+", "", f"{self.endpoint}{request.path}") + ("" if "?" in request.path else "?")
            headers["Link"] = f'<{url}&cursor={first + PAGE}>; rel="next"'
        return 200, json.dumps(found[first : first + PAGE]).encode(), headers

    @staticmethod
    def mode(files: dict[str, Blob], file: dict[str, Any]) -> dict[str, Any]:
        lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > 10 << 20
        there = files.get(file["path"])
        oid = None if there is None else there.sha256 if there.lfs else there.oid
        return {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}

    def batch(self, wanted: dict[str, Any]) -> Any:
        objects = []
        for one in wanted["objects"]:
            actions = {"actions": {"upload": {"href": f"{self.endpoint}/lfs/{one['oid']}", "header": {}}}}
            objects.append({"oid": one["oid"], "size": one["size"], **({} if one["oid"] in self.lfs else actions)})
        return self.json({"transfer": "basic", "objects": objects})

    def put(self, oid: str, body: bytes) -> Any:
        self.uploaded[oid] = self.uploaded.get(oid, 0) + len(body)
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "", "BadDigest")
        self.lfs[oid] = body
        return self.json({})

    def commit(self, request: Any, where: str, repo: Repo, branch: str, before: dict[str, Blob], body: bytes) -> Any:
        header, files = {}, dict(before)
        for line in body.decode().splitlines():
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
                self.uploaded[value["path"]] = self.uploaded.get(value["path"], 0) + 1
            elif key == "lfsFile":
                if value["oid"] not in self.lfs:
                    raise Refused(400, "", "The object was not uploaded")
                data = self.lfs[value["oid"]]
                files[value["path"]] = Blob(data[:-1] if value["oid"] == self.alter else data, True)
            else:
                assert key == "deletedFile", key
                del files[value["path"]]
        if header.get("parentCommit") not in (None, repo.branches[branch]):
            raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
        oid = repo.commit(branch, files, header["summary"])
        if self.lose:
            self.lose -= 1
            request.close_connection = True
            request.connection.close()
            return None
        return self.json({"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{where}/commit/{oid}"})

    def resolve(self, request: Any, repo: Repo, revision: str, path: str) -> Any:
        oid = repo.find(revision)
        if oid is None or path not in repo.commits[oid]:
            raise Refused(404, "RevisionNotFound" if oid is None else "EntryNotFound", f"{path} does not exist")
        blob = repo.commits[oid][path]
        low, high, status = 0, len(blob.data) - 1, 200
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.sha256 if blob.lfs else blob.oid}"', "Accept-Ranges": "bytes"}
        if asked := request.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            low, high, status = int(first), min(int(last or high), high), 206
            headers["Content-Range"] = f"bytes {low}-{high}/{len(blob.data)}"
        data = blob.data[low : high + 1]
        if request.command == "GET":
            self.served[path] = self.served.get(path, 0) + len(data)
        return status, data, headers

    @staticmethod
    def json(value: Any) -> tuple[int, bytes, dict[str, str]]:
        return 200, json.dumps(value).encode(), {}

    @staticmethod
    def send(request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str]) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)


def use(hub: HubRepos, monkeypatch: pytest.MonkeyPatch, token: str | None = TOKEN) -> None:
    """Have huggingface_hub in this process ask this hub, with plain LFS for large files."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    url = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
