"""An S3 server (moto) on loopback, in a process of its own: what it holds stays while it does not listen."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.config

REGION = "us-east-1"
BUCKET = "bucket"


class S3Server:
    """The server, and a client of it that has nothing to do with the code under test."""

    def __init__(self, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self.port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | environment,
        )  # fmt: skip
        self._telling = threading.Lock()
        self.tell("start")
        config = botocore.config.Config(retries={"total_max_attempts": 1}, connect_timeout=60, read_timeout=120)
        self._client = boto3.client("s3", REGION, endpoint_url=self.endpoint, config=config, aws_access_key_id="x",
                                    aws_secret_access_key="y")  # fmt: skip
        self._client.create_bucket(Bucket=BUCKET)

    def tell(self, command: str) -> str:
        """start, stop, lose SUFFIX (drop the answer to the next PUT of such a key), requests (so far), sent SUFFIX (bytes of
        such keys that were given out so far)."""
        assert self._process.stdin
        assert self._process.stdout
        with self._telling:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
            return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def upload(self, folder: Path, prefix: str) -> str:
        """Copy a local folder; returns its URL."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def put(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def get(self, key: str) -> bytes:
        return self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def keys(self, prefix: str) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def files(self, prefix: str) -> dict[str, bytes]:
        return {key.removeprefix(prefix + "/"): self.get(key) for key in self.keys(prefix + "/")}


def serve(port: int) -> None:
    """Obey the lines of stdin, each answered by one of stdout."""
    import moto.moto_server.threaded_moto_server as module

    inner = module.DomainDispatcherApplication
    in_turn = threading.Lock()
    connections: list[socket.socket] = []
    lost: list[str] = []
    sent: dict[str, int] = {}
    count = 0

    class Application:
        """S3's conditional put is atomic, moto's is not: it looks, then writes."""

        def __init__(self, *arguments: Any) -> None:
            self._inner = inner(*arguments)

        def __call__(self, environ: dict, start_response: Callable) -> Iterator[bytes] | list[bytes]:
            nonlocal count
            with in_turn:
                count += 1
                answer = list(self._inner(environ, start_response))
                if environ["REQUEST_METHOD"] == "GET":
                    path = environ["PATH_INFO"]
                    sent[path] = sent.get(path, 0) + sum(map(len, answer))
            if lost and environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].endswith(lost[0]):
                lost.clear()
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            return answer

    module.DomainDispatcherApplication = Application  # type: ignore[assignment, misc]
    server = module.ThreadedMotoServer("127.0.0.1", port, verbose=False)
    for line in sys.stdin:
        verb, _, argument = line.strip().partition(" ")
        if verb == "start":
            server.start()
            listener: Any = server._server
            accept = listener.get_request

            def get_request(accept: Callable = accept) -> Any:
                connection, address = accept()
                connections.append(connection)
                return connection, address

            listener.get_request = get_request
        elif verb == "stop":
            server.stop()
            listener.server_close()
            for connection in connections:  # kept alive, they would go on to be answered
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            connections.clear()
        elif verb == "lose":
            lost.append(argument)
        given_out = sum(size for path, size in sent.copy().items() if path.endswith(argument))
        print(given_out if verb == "sent" else count, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
