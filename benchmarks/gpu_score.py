"""Scoring on a GPU, checked and then timed: is it right, is it fast, does the command outlive a killed engine?

    python -m benchmarks.gpu_score        (make gpu-score-check; under eight minutes on one GPU)

First right: a tiny model in each dtype, with and without the most probable tokens, rows in chunks and documents of two
to 512 tokens, against a transformers forward in float32, within what the canary allows. Then fast, at the shapes of
OLMo-2-1B in rows of 4,096: tokens/s beside the bare prefill with the product of the output embedding, model FLOPs, memory
beyond vLLM's own, start cold and warm. Then `remit score` with Ray: an engine killed, who listens, two runs compared. Each
step is a process of its own with a time limit. Without a GPU it runs small shapes on the CPU, to try the script.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from benchmarks import gpu_score_steps as steps
from benchmarks.common import Claim, claim, machine, report

PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "B200": 2250}  # dense bfloat16, vendor's data sheets
STEPS: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "right": steps.right, "compare": steps.compare, "fast": steps.fast, "canary": steps.canary, "command": steps.command,
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """What runs in a process of its own: a function of STEPS, at most `limit` seconds, with these settings."""

    name: str
    kind: str
    limit: int
    settings: dict[str, Any] = field(default_factory=dict)


def plan(gpu: bool) -> list[Step]:
    rows = 96 if gpu else 8
    in_chunks = 256  # tokens per engine step, half a row of the tiny model
    return [
        Step("bfloat16, rows in chunks", "right", 150, {"dtype": "bfloat16", "tokens": in_chunks}),
        Step("bfloat16, entropy", "right", 90, {"dtype": "bfloat16", "temperatures": [1, 2]}),
        Step("float16, top 32", "right", 90, {"dtype": "float16", "top_k": 32}),
        Step(
            "float32, top 32, entropy, rows in chunks",
            "right",
            90,
            {"dtype": "float32", "top_k": 32, "temperatures": [1, 2], "tokens": in_chunks},
        ),
        Step("bfloat16, cold start", "fast", 180, {"dtype": "bfloat16", "rows": rows}),
        Step("bfloat16, top 32, warm start", "fast", 120, {"dtype": "bfloat16", "rows": rows // 2, "top_k": 32}),
        Step(
            "bfloat16, entropy, warm start",
            "fast",
            120,
            {"dtype": "bfloat16", "rows": rows // 2, "temperatures": [1, 2]},
        ),
        Step("forwards of the canary", "canary", 120, {"large": gpu}),  # its process sees no GPU
        Step("remit score", "command", 300),
    ]


def run_step(step: Step, folder: Path, log: Path) -> dict[str, Any]:
    """What the step's process says, or {"failed": the end of its log}."""
    command = [sys.executable, "-m", "benchmarks.gpu_score", "--step", json.dumps([step.kind, step.settings])]
    environment = os.environ | {"VLLM_CACHE_ROOT": str(folder / "compiled")}
    if step.kind in ("compare", "canary"):
        environment |= {"CUDA_VISIBLE_DEVICES": ""}  # transformers' forwards are the CPU's
    began = perf_counter()
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*command, "--folder", str(folder)],
            stdout=subprocess.PIPE, stderr=file, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=step.limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # engines of several processes hold the GPU's memory
            output, _ = process.communicate()
    lines = [line[7:] for line in output.splitlines() if line.startswith("RESULT ")]
    result = json.loads(lines[-1]) if lines else {"failed": log.read_text()[-1500:] or f"not done in {step.limit} s"}
    return result | {"seconds": round(perf_counter() - began, 1)}


def claims_of(found: dict[str, dict[str, Any]], gpu: bool) -> list[Claim]:
    """What the results say, beside what they should."""
    claims = []
    for name, result in found.items():
        if "share_of_limit" in result:
            text = f"{name}: difference to float32 / what is allowed"
            claims.append(claim(text, [result["share_of_limit"]], at_most=1.0))
            claims.append(claim(f"{name}: mean |difference|, nat", [result["mean"]]))
            if not result["ordered"]:
                claims.append(Claim(f"{name}: equal log-probs by ascending id", 0.0, "1", False, (0.0, 0.0)))
    speeds = []
    for name, result in found.items():
        if "score_seconds" not in result:
            continue
        bare = result["prefill_seconds"] + result["head_seconds"]
        speeds.append(result["tokens"] / result["score_seconds"])
        claims.append(claim(f"{name}: tokens/s", [speeds[-1]]))
        if len(speeds) == 1:
            at_least = 0.93 if gpu else None
            claims.append(claim("bare prefill with head product / scoring", [bare / result["score_seconds"]], at_least))
            tflops = speeds[0] * result["flops_per_token"] / 1e12
            claims.append(claim("model FLOPs / those of a large product", [tflops / result["matmul_tflops"]]))
            peak = next((value for card, value in PEAK_TFLOPS.items() if card in result["device_name"]), None)
            if peak:
                claims.append(claim(f"model FLOPs / peak of {peak} TFLOP/s", [tflops / peak], 0.4))
        else:
            at_least = 0.8 if gpu and "top" in name else None
            claims.append(claim(f"{name}: speed / that of log-probs alone", [speeds[-1] / speeds[0]], at_least))
        claims.append(claim(f"{name}: start, s", [result["start_seconds"]]))
        claims.append(claim(f"{name}: memory beyond vLLM's own, GiB", [result["memory_beyond_gib"]]))
    for result in found.values():
        if "canary_seconds" in result:
            claims.append(claim("forwards of the canary, s", [result["canary_seconds"]], at_most=60.0))
        if "verify_exit_code" in result:
            for text, value in (
                ("remit score: engine killed, and finished", float(result["engine_killed"])),
                ("remit score: verified", float(result["verify_exit_code"] == 0)),
                ("remit score: nobody listens beyond loopback", float(not result["listeners_beyond_loopback"])),
            ):
                claims.append(claim(text, [value], 1.0))
            claims.append(claim("two runs: mean |difference|, nat", [result["difference_mean"]]))
    failed = [name for name, result in found.items() if "failed" in result]
    return claims + [Claim(f"{name}: did not run", 0.0, "1", False, (0.0, 0.0)) for name in failed]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-score"), help="folder for results and logs")
    parser.add_argument("--only", default="", help="steps whose name has this in it")
    parser.add_argument("--step", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        kind, settings = options.step
        print("RESULT " + json.dumps(STEPS[kind](settings, options.folder)), flush=True)
        os._exit(0)  # engines leave threads behind
    gpu = steps.has_gpu()
    options.out.mkdir(parents=True, exist_ok=True)
    results, found = options.out / "gpu_score.jsonl", {}
    results.write_text(json.dumps(machine()) + "\n")
    if not gpu:
        print("no GPU: small shapes on the CPU, which try the script and say nothing of a GPU")
    with TemporaryDirectory(prefix="remit-gpu-") as name:
        for step in plan(gpu):
            if options.only not in step.name:
                continue
            log = options.out / f"{step.name.replace(', ', '-').replace(' ', '-')}.log"
            result = run_step(step, Path(name), log)
            if step.kind == "right" and "failed" not in result:
                result |= run_step(Step(step.name, "compare", 120), Path(name), log)
            found[step.name] = result
            with open(results, "a") as file:
                file.write(json.dumps({"step": step.name, **result}) + "\n")
            print(json.dumps({"step": step.name, **result}), flush=True)
    return report("gpu_score" if gpu else "gpu_score_cpu", claims_of(found, gpu))


if __name__ == "__main__":
    sys.exit(main())
