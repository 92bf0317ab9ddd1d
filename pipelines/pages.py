"""Files that a command writes for a reader: HTML pages that stand alone, figures as JSON."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from shards.store import temporary_name


def write_page(file: Path, page: str) -> None:
    """Write `page` in UTF-8, whole or not at all; what is no character (of names of files that are no Unicode) becomes U+FFFD."""
    temporary = temporary_name(file)
    try:
        temporary.write_text(re.sub("[\ud800-\udfff]", "\ufffd", page), encoding="utf-8", newline="")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(file: Path, figures: dict[str, Any]) -> None:
    """Write the figures of --json."""
    file.write_text(json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def content_hash(content: str) -> str:
    """Of a script or style element, as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def check_page(option: str, file: Path) -> None:
    """ValueError unless `file` can be written, and is called a page: what it replaces should be one."""
    check_output_file(option, file)
    if file.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{option} is {file}, expected the name of a page, for instance page.html")


def check_output_file(option: str, file: Path) -> None:
    """ValueError unless `file` can be written as far as its place is concerned."""
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{option} {file}: its folder does not exist; create it")
    if file.is_dir():
        raise ValueError(f"{option} {file}: is a folder, expected a file")
