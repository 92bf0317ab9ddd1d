"""The list of a checkpoint's files, with which they are compared before anything is loaded: checkpoint.json."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shards.part import encode_json, sha256_file

INDEX = "checkpoint.json"


def checksum(index: dict[str, Any]) -> str:
    """Of all else that a checkpoint.json says."""
    return hashlib.sha256(encode_json(index)).hexdigest()


def read_files_of(checkpoint: Path, settings: str | None) -> dict[str, str] | str:
    """`read_files` of a folder here."""
    try:
        return read_files((checkpoint / INDEX).read_bytes(), str(checkpoint / INDEX), settings)
    except OSError as error:
        return f"{checkpoint / INDEX}: {error}"


def read_files(data: bytes, where: str, settings: str | None) -> dict[str, str] | str:
    """The hashes of a checkpoint's files by name, or what is wrong with its index. data: of the index, which is `where`."""
    try:
        index = json.loads(data)
        if index.pop("checksum") != checksum(index):
            return f"{where}: altered since it was written"
        if settings is not None and index["settings"] != settings:
            return f"{where.removesuffix(f'/{INDEX}')}: of a run with other settings"
        return {str(name): str(sha256) for name, sha256 in index["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{where}: {error}"


def altered(checkpoint: Path, files: dict[str, str]) -> str | None:
    """The first of some files that has not the hash that it should have, or None."""
    try:
        with ThreadPoolExecutor(8) as pool:
            for name, sha256 in zip(files, pool.map(sha256_file, [checkpoint / name for name in files])):
                if files[name] != sha256:
                    return f"{checkpoint / name}: sha256 differs from {INDEX}"
    except OSError as error:
        return f"{checkpoint / INDEX}: {error}"
    return None
