"""Options of remit train that are written as short texts: last:20, skip:3, 9001..9002."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shards.store import HUB_IS_READ, is_remote
from shards.writable import require_writable

Ranges = tuple[tuple[int, int], ...]
"""Ranges of steps, first and last, both included; ascending, with a gap between any two."""


@dataclass(frozen=True)
class AverageOption:
    """--average: `last` steps with equal weights, or an exponential moving average with `decay`."""

    kind: Literal["last", "ema"]
    last: int = 0
    decay: float = 0.0


def parse_average(text: str) -> AverageOption:
    """`last:N` or `ema:DECAY`; ValueError for anything else."""
    kind, _, value = text.partition(":")
    if kind == "last" and value.isascii() and value.isdigit() and int(value) > 0:
        return AverageOption("last", last=int(value))
    if kind == "ema" and re.fullmatch(r"0?\.\d+", value) and 0 < float(value) < 1:
        return AverageOption("ema", decay=float(value))
    raise ValueError(
        f"--average is {text!r}, expected last:N with the number of steps, as last:100, or ema:DECAY with a number between "
        "0 and 1, as ema:0.999"
    )


def parse_on_nonfinite(text: str) -> int:
    """Steps in a row that may be left out: 0 for `stop`, N for `skip:N`; ValueError for anything else."""
    if text == "stop":
        return 0
    kind, _, value = text.partition(":")
    if kind == "skip" and value.isascii() and value.isdigit() and int(value) > 0:
        return int(value)
    raise ValueError(
        f"--on-nonfinite is {text!r}, expected stop, or skip:N with the number of steps in a row that may be left out, as skip:3"
    )


def parse_steps(texts: tuple[str, ...]) -> Ranges:
    """Ranges `A..B` or single steps `A`, joined; ValueError for anything else."""
    ranges = []
    for text in texts:
        match = re.fullmatch(r"([0-9]+)(?:\.\.([0-9]+))?", text)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise ValueError(
                f"--skip-steps has {text!r}, expected a step or a first and a last one, counted from 1, as 9001..9002"
            )
        ranges.append((first, last))
    return join(ranges)


def join(ranges: list[tuple[int, int]]) -> Ranges:
    """The same steps as ascending ranges that do not touch."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(joined[-1][1], last)
        else:
            joined.append((first, last))
    return tuple(joined)


def without(ranges: Ranges, known: Ranges) -> Ranges:
    """The steps of `ranges` that are not in `known`."""
    left = []
    for first, last in ranges:
        for known_first, known_last in known:
            if known_last < first or known_first > last:
                continue
            if known_first > first:
                left.append((first, known_first - 1))
            first = known_last + 1
        if first <= last:
            left.append((first, last))
    return join(left)


def contains(ranges: Ranges, step: int) -> bool:
    return any(first <= step <= last for first, last in ranges)


def show(ranges: Ranges) -> str:
    """As the option is written: 9001..9002 9100..9100."""
    return " ".join(f"{first}..{last}" for first, last in ranges)


def check_eval_device(text: str, ray_workers: int) -> None:
    """ValueError unless --eval-device names a device that --eval-tasks can be given."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise ValueError(f"--eval-device is {text!r}, expected auto, cpu, cuda or cuda:N, as cuda:7")
    if ray_workers and ":" in text:
        raise ValueError(f"--eval-device is {text} with --ray-workers, expected auto, cpu or cuda: Ray chooses the GPU")


def check_mirror(mirror: str, out: Path) -> None:
    """ValueError unless --mirror names a folder that can be written, apart from --out."""
    if mirror.startswith("hf:"):
        raise ValueError(HUB_IS_READ.format(f"--mirror {mirror}"))
    if not mirror.strip("/ "):
        raise ValueError(f"--mirror is {mirror!r}, expected a folder, as s3://bucket/run")
    if is_remote(mirror):
        require_writable(mirror)
        if "/" not in mirror.rstrip("/").partition("://")[2]:
            raise ValueError(f"--mirror {mirror}: is a whole bucket; name a folder in it")
        return
    here, there = Path(out).resolve(), Path(mirror.removeprefix("file://")).resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(
            f"--mirror {mirror} and --out {out} are one folder, or one is in the other; choose another --mirror"
        )
