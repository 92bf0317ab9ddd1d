"""The result files of remit eval: TASK.json for each task as it ends, results.json of a whole command."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

FORMAT = 2  # of the result files


def finished(file: Path, settings: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The record in `file` where it was evaluated with `settings`; otherwise None and what differs, '' without file."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        before = record["settings"]
        if record["format"] != FORMAT:
            return None, "another version of remit"
    except FileNotFoundError:
        return None, ""
    except (ValueError, KeyError, TypeError):
        return None, "a result that cannot be read"
    differs = [key for key in settings if before.get(key) != settings[key]]
    return (None, f"other settings ({', '.join(differs)})") if differs else (record, "")


def set_aside(file: Path, settings: dict[str, Any] | None = None) -> Path:
    """Where the result of a task with other settings than those of `file` is kept; without settings `file` goes there.

    So a look at five questions does not cost the result of all.
    """
    moves = settings is None
    if moves:
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            settings = {}
    text = json.dumps(settings, sort_keys=True)
    aside = file.parent / "other-settings" / f"{file.stem}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    if moves and file.is_file():
        aside.parent.mkdir(exist_ok=True)
        os.replace(file, aside)
    return aside


def read_results(file: Path) -> dict[str, Any]:
    """results.json of an earlier run; ValueError where it is something else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--compare {file}: cannot be read ({error}); give results.json of an earlier run") from None
    if not isinstance(values, dict) or "format" not in values or not isinstance(values.get("tasks"), dict):
        raise ValueError(f"--compare {file}: is no result of remit eval; give results.json of an earlier run")
    if values["format"] != FORMAT:
        raise ValueError(
            f"--compare {file}: has format {values['format']}, expected {FORMAT}: another version of remit wrote it; evaluate "
            "that model again"
        )
    return values


def write_json(file: Path, value: Any) -> None:
    """Whole or not at all: a kill leaves the file that was there."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, file)
