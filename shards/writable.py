"""Which remote stores are written to: those that keep two commands from overwriting each other's files."""

from pathlib import Path

from shards.store import HUB, is_remote

EXCLUSIVE = frozenset({"s3", "s3a", "gs", "gcs", "hdfs", "memory"})
"""Protocols where of two processes that create one file one is told that it is there."""


def require_writable(folder: "str | Path") -> None:
    """ValueError for a URL of a protocol whose files two processes could replace for each other."""
    protocol = str(folder).partition("://")[0]
    if is_remote(folder) and not str(folder).startswith(HUB) and protocol not in EXCLUSIVE:
        raise ValueError(
            f"{folder}: {protocol}:// is only read: nothing in it keeps two commands from overwriting each other's files; write to "
            "s3://, gs://, hdfs:// or a folder here"
        )
