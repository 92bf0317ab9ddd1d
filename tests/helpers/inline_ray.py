"""Pack in this process, without Ray: for tests of what stands in the rows, not of how the work is spread."""

import contextlib
from collections.abc import Generator, Iterator
from typing import Any
from unittest import mock

import scorer.pack
import scorer.side_tables
from scorer.config import PackConfig
from shards import ShardFolder


class _Task:
    def __init__(self, function: Any) -> None:
        self.function = function

    def options(self, **_: object) -> "_Task":
        return self

    def remote(self, *arguments: object) -> Any:
        result = self.function(*arguments)
        return result if isinstance(result, Generator) else _Done(result)


class _Done:
    """A key of its own for each task, as a reference of Ray is."""

    def __init__(self, value: object) -> None:
        self.value = value


class _InlineRay:
    """What scorer/pack.py calls of Ray. A task runs when it is asked for; a streaming one as its results are taken."""

    remote = staticmethod(_Task)

    @staticmethod
    def cluster_resources() -> dict[str, float]:
        return {"CPU": 1.0}

    @staticmethod
    def wait(running: list, **_: object) -> tuple[list, list]:
        return running[:1], running[1:]

    @staticmethod
    def get(result: Any) -> Any:
        return result.value if isinstance(result, _Done) else result


def pack_inline(config: PackConfig) -> ShardFolder:
    """scorer.pack.pack with its tasks called one after the other."""

    @contextlib.contextmanager
    def nothing(*_: object) -> Iterator[None]:
        yield

    with (
        mock.patch.object(scorer.pack, "ray", _InlineRay),
        mock.patch.object(scorer.side_tables, "ray", _InlineRay),
        mock.patch.object(scorer.pack, "ray_cluster", nothing),
        mock.patch.object(scorer.pack, "require_ray"),
        mock.patch.object(scorer.pack, "wait_for_nodes"),
    ):
        return scorer.pack.pack(config)
