"""The last step of benchmarks.gpu_score: the command as users run it, with Ray, an engine killed, and who listens."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any

import numpy as np

from benchmarks.gpu_score_steps import TINY, has_gpu, random_model


def command(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`remit score` twice over one folder, the first time with an engine killed; who listened; do the runs agree."""
    from benchmarks.common import make_shards
    from shards import ShardFolder

    model, shards = random_model(folder / "tiny", TINY), folder / "shards"
    make_shards(shards, TINY["vocabulary"], 6, 256 if has_gpu() else 16, TINY["positions"])
    began = perf_counter()
    listening, killed = score_command(shards, model, folder / "first", kill=True)
    first_seconds = perf_counter() - began
    score_command(shards, model, folder / "second", kill=False)
    verified = subprocess.run(remit("verify", "--shards", str(folder / "first")), capture_output=True, text=True)
    values: list[np.ndarray] = []
    for name in ("first", "second"):
        scored = ShardFolder(folder / name)
        columns = [
            scored.open_part(plan.name).get_batch(batch).column("rl_logprobs").flatten().to_numpy(zero_copy_only=False)
            for plan in scored.manifest.parts
            for batch in range(scored.open_part(plan.name).num_record_batches)
        ]
        values.append(np.concatenate(columns))
    parts = [plan.name for plan in ShardFolder(shards).manifest.parts]
    same = sum((folder / "first" / part).read_bytes() == (folder / "second" / part).read_bytes() for part in parts)
    difference = np.abs(values[0] - values[1])
    return {
        "engine_killed": killed, "verify_exit_code": verified.returncode, "first_seconds": first_seconds,
        "listeners_beyond_loopback": sorted(listening), "same_parts": f"{same} of {len(parts)}",
        "difference_mean": float(np.nanmean(difference)), "difference_max": float(np.nanmax(difference)),
    }  # fmt: skip


def remit(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", *arguments]


def score_command(shards: Path, model: Path, out: Path, kill: bool) -> tuple[set[str], bool]:
    """Run it to its end; who listened beyond loopback, and whether an engine was killed after the first part."""
    arguments = remit("score", "--shards", str(shards), "--model", str(model), "--out", str(out), "--num-engines", "1")
    with open(f"{out}.log", "w") as log:
        process = subprocess.Popen([*arguments, "--dtype", "bfloat16"], stdout=log, stderr=log)
        listening: set[str] = set()
        killed, deadline = False, monotonic() + 240
        while process.poll() is None and monotonic() < deadline:
            running = descendants(process.pid)
            listening |= listeners(set(running))
            engines = [pid for pid, text in running.items() if "ray::ScoringActor" in text]
            if kill and not killed and engines and list(out.glob("_commits/part-*.json")):
                os.kill(engines[0], signal.SIGKILL)
                killed = True
            sleep(0.2)
        if process.poll() is None:
            process.terminate()
    if process.wait() != 0:
        raise RuntimeError(f"remit score ended with {process.returncode}: {Path(f'{out}.log').read_text()[-1500:]}")
    return listening, killed


def descendants(root: int) -> dict[int, str]:
    """Command lines of a process and of all that descend from it, by pid."""
    parents, texts = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            texts[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: texts.get(pid, "") for pid in found}


def listeners(pids: set[int]) -> set[str]:
    """Programs and local addresses of TCP sockets on which one of these processes listens beyond loopback."""
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            address = fields[1].rpartition(":")[0]
            is_loopback = (
                address == "0100007F" or address == "0" * 24 + "01000000" or address.endswith("FFFF00000100007F")
            )
            if fields[3] == "0A" and not is_loopback:
                sockets[f"socket:[{fields[9]}]"] = fields[1]
    found = set()
    for pid in pids:
        try:
            program = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:60]
            targets = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        found |= {f"{re.sub(' +', ' ', program)} {sockets[target]}" for target in targets if target in sockets}
    return found
