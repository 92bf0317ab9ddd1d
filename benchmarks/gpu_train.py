"""remit train on a GPU, whole runs of a tiny model: repeated, killed and resumed, held against a CPU.

    python -m benchmarks.gpu_train        (part of make gpu-check; about three minutes on one GPU)

For each objective and context: the same run twice, then once killed with -9 in mid-run and given the same command
again. With --deterministic metrics and trained weights must be bit-equal, though each process has an empty cache of
compiled kernels, as on another node. A run in float32 must follow the CPU's losses and gradient norms, and one under
torchrun must equal the one without. Without a GPU smaller runs show the same on the CPU.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.common import claim, make_shards, report
from benchmarks.training import annotate

HAS_GPU = torch.cuda.is_available()
# the backward pass of attention adds the blocks of long rows in the order in which they come; odd lengths are what a
# compiler may pad; the 16 steps of 4 rows are one epoch, in which the short row comes up once
SEQ_LEN, HIDDEN, DOCS_PER_ROW = (2037, 256, 7) if HAS_GPU else (255, 128, 5)
VOCABULARY, ROWS_PER_PART, SHORT_ROW, STEPS, TOP_K = 4096, 32, 101, 16, 8
MEASURED = ("tokens_per_second", "data_wait_seconds", "peak_memory_bytes")  # of the machine, not of the run
COMMON = [
    "--global-batch-size", "4", "--micro-batch-size", "1", "--max-steps", str(STEPS), "--checkpoint-every", "4",
    "--learning-rate", "1e-3", "--deterministic",
]  # fmt: skip
REMIT, DOCUMENT = ["--objective", "remit"], ["--objective", "remit", "--centring", "document"]
VARIANTS = {
    "remit, packed, evaluation": ("packed", [*REMIT, "--eval-shards", "{folder}/rows", "--eval-every", "5"]),
    "ntp, three rows and one": ("packed", ["--objective", "ntp", "--micro-batch-size", "3"]),
    "remit, document, activation checkpointing": ("document", [*DOCUMENT, "--activation-checkpointing"]),
    "rho1, global": ("packed", ["--objective", "rho1"]),
    "kd": ("top", ["--objective", "kd"]),
}


class Runs:
    """Runs of remit train in `folder`; one that fails is an error with its last lines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(0)
        config = transformers.Olmo2Config(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=SEQ_LEN, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=0, pad_token_id=None,
        )  # fmt: skip
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "base")
        make_shards(folder / "rows", VOCABULARY, 2, ROWS_PER_PART, SEQ_LEN, DOCS_PER_ROW, SHORT_ROW)
        annotate(folder / "rows", folder / "packed")
        annotate(folder / "rows", folder / "document", context="document")
        annotate(folder / "rows", folder / "top", top_k=TOP_K)

    def start(self, name: str, shards: str, options: list[str], *launcher: str, **environment: str) -> subprocess.Popen:
        words = [sys.executable, *launcher, "-m", "pipelines.cli", "train", "--shards", str(self.folder / shards)]
        words += ["--model", str(self.folder / "base"), "--out", str(self.folder / name), *COMMON]
        words += [option.format(folder=self.folder) for option in options]
        caches = self.folder / "caches" / f"{name}-{time.monotonic_ns()}"
        own = {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_CACHE_DIR": f"{caches}/triton"}
        environment = os.environ | own | {"OMP_NUM_THREADS": "1"} | environment
        with (self.folder / f"{name}.log").open("a") as log:
            return subprocess.Popen(words, stdout=log, stderr=log, env=environment)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-3000:]

    def finish(self, name: str, run: subprocess.Popen) -> tuple[list[dict], bytes, bytes]:
        """Metrics without what is measured, held-out losses, and the bytes of the trained weights."""
        if run.wait(400):
            raise RuntimeError(f"{name}: exit code {run.returncode}\n{self.log(name)}")
        lines = map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        metrics = [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]
        assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
        evaluation = self.folder / name / "evaluation.jsonl"
        held_out = evaluation.read_bytes() if evaluation.exists() else b""
        return metrics, held_out, (self.folder / name / "model" / "model.safetensors").read_bytes()

    def whole(self, name: str, shards: str, options: list[str], *launcher: str, **environment: str) -> tuple:
        return self.finish(name, self.start(name, shards, options, *launcher, **environment))

    def killed(self, name: str, shards: str, options: list[str]) -> tuple:
        """kill -9 between checkpoints, then the same command again."""
        run, metrics = self.start(name, shards, options), self.folder / name / "metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < STEPS // 2 + 2:
            if run.poll() is not None:
                raise RuntimeError(f"{name}: ended before it was killed\n{self.log(name)}")
            time.sleep(0.002)
        run.kill()
        run.wait()
        assert not (self.folder / name / "model").exists(), "too late: nothing is left to resume"
        return self.whole(name, shards, options)


def largest_difference(found: list[dict], wanted: list[dict], key: str) -> float:
    """Relative, over the steps."""
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(found, wanted, strict=True))


def main() -> int:
    where = torch.cuda.get_device_name() if HAS_GPU else "no GPU here: on the CPU"
    print(f"torch {torch.__version__}, {where}", flush=True)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    rows: list[tuple[str, str, bool | None]] = []
    with TemporaryDirectory() as folder, ThreadPoolExecutor(10 if HAS_GPU else 1) as pool:
        runs = Runs(Path(folder))

        def submit(name: str, shards: str, options: list[str], *launcher: str, **environment: str):
            return pool.submit(runs.whole, name, shards, options, *launcher, **environment)

        exact = [*DOCUMENT, "--dtype", "float32"]
        cpu = submit("cpu", "document", exact, CUDA_VISIBLE_DEVICES="")
        jobs = {}
        for index, (shards, options) in enumerate(VARIANTS.values()):
            jobs[index, "first"] = submit(f"first-{index}", shards, options)
            jobs[index, "again"] = submit(f"again-{index}", shards, options)
            jobs[index, "killed"] = pool.submit(runs.killed, f"killed-{index}", shards, options)
        first = next(iter(VARIANTS.values()))
        torchran = submit("torchrun", *first, *torchrun)
        gpu = submit("float32", "document", exact)
        free = [submit(f"free-{index}", "packed", [*REMIT, "--no-deterministic"]) for index in range(2)]

        for index, name in enumerate(VARIANTS):
            first = jobs[index, "first"].result()
            losses = f"loss {first[0][0]['loss']:.4f} .. {first[0][-1]['loss']:.4f}"
            for job, what in (("again", "the same run twice"), ("killed", "killed and resumed")):
                other = jobs[index, job].result()
                apart = f"{losses}, apart {largest_difference(other[0], first[0], 'loss'):.1e}"
                rows.append((f"{name}: {what}", apart, other == first))
        rows.append(
            ("the first of these under torchrun, one process", "", torchran.result() == jobs[0, "first"].result())
        )
        apart = f"apart {largest_difference(free[0].result()[0], free[1].result()[0], 'loss'):.1e}"
        equal = "the same" if free[0].result() == free[1].result() else "differ"
        rows.append(("for comparison, twice without --deterministic", f"{equal}, {apart}", None))
        for key in ("loss", "ntp_loss", "grad_norm", "weight_std"):
            error = largest_difference(gpu.result()[0], cpu.result()[0], key)
            bound = 1e-3 if key == "grad_norm" else 1e-5
            rows.append((f"float32, document, {key}: from the CPU's, relative", f"{error:.1e}", error < bound))
    table = Table("remit train", "", "", title=where)
    for what, found, good in rows:
        table.add_row(what, found, {True: "ok", False: "WRONG", None: ""}[good])
    Console(width=120, highlight=False).print(table)
    name = "gpu_train" if HAS_GPU else "gpu_train_cpu"
    return report(name, [claim(what, [float(good)], at_least=1) for what, _, good in rows if good is not None])


if __name__ == "__main__":
    sys.exit(main())
