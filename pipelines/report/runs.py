"""The folder of a run as remit report and remit compare read it: run.json, and files of one JSON object a line.

Light to import, so that a mistyped path is answered at once.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

RUN, METRICS, EVALUATION = "run.json", "metrics.jsonl", "evaluation.jsonl"
Line = dict[str, Any]


def read_settings(out: Path) -> dict[str, Any]:
    """run.json; ValueError, with what is there instead, where `out` is no run."""
    path = out / RUN
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{out}: {_what_is_there(out)}; give the --out of remit train, sft, dpo or rl") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())}); restore it") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: is not a JSON object, so {out} is not a run")
    changes = settings.pop("changes", {})
    return settings | changes  # what later commands changed is in force


def _what_is_there(out: Path) -> str:
    """Why `out` is no run, and which run may be meant."""
    if out.is_file():
        return "is a file"
    if not out.exists():
        return f"no such folder{_runs_in(out.parent)}"
    if (out.parent / RUN).exists():
        return f"is a part of the run {out.parent}"
    kind = "a shard folder" if (out / "_manifest.json").exists() else "not a run"
    return f"holds no {RUN}, so it is {kind}{_runs_in(out)}"


def _runs_in(folder: Path) -> str:
    runs = sorted(path.parent.name for path in folder.glob(f"*/{RUN}"))
    more = f" and {len(runs) - 8:,} more" if len(runs) > 8 else ""
    return f"; {folder} has the runs {', '.join(runs[:8])}{more}" if runs else ""


def read_lines(
    path: Path, damaged: Callable[[str], None], progress: Callable[[int], None] = lambda size: None
) -> Iterator[Line]:
    """Each object of a file of JSON lines with ascending steps; none where the file is missing.

    A damaged last line is left out and told to `damaged`: it was being written when the run was killed, or is right now.
    ValueError where lines follow it. progress: told the bytes of each line.
    """
    if not path.exists():
        return
    problem, last_step = "", -1
    with open(path, "rb") as file:
        for number, text in enumerate(file, start=1):
            progress(len(text))
            if not text.strip():
                continue
            if problem:
                raise ValueError(f"{path}: {problem}, and lines follow it; take it out or restore the file")
            try:
                line = json.loads(text)
            except ValueError:  # UnicodeDecodeError too
                line = None
            if not isinstance(line, dict) or type(line.get("step")) is not int:
                problem = f"line {number} is not a JSON object with a step"
            elif line["step"] <= last_step:
                problem = f"line {number} has step {line['step']}, the one before it {last_step}"
            else:
                last_step = line["step"]
                yield line
    if problem:
        damaged(f"{path.name}: {problem}; left out, as the last one")


def finite(value: Any) -> float | None:
    """`value` where it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def run_names(folders: Sequence[Path]) -> list[str]:
    """For each run the shortest end of its path, in whole folders, that no other run has."""
    parts = [folder.absolute().resolve().parts for folder in folders]
    names = []
    for own in parts:
        ends = ("/".join(own[-length:]) for length in range(1, len(own) + 1))
        names.append(next(end for end in ends if sum(f"/{'/'.join(p)}".endswith(f"/{end}") for p in parts) == 1))
    return [characters(name) for name in names]


def characters(text: str) -> str:
    """`text` with U+FFFD for what is no character, as names of files can have."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def require_different(runs: Sequence[Path]) -> None:
    """ValueError where two paths are one folder."""
    resolved = [run.resolve() for run in runs]
    for index, run in enumerate(runs):
        if resolved[index] in resolved[:index]:
            raise ValueError(f"{run} is given twice, expected different runs")
