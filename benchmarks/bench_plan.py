"""How close remit plan --measure comes to the real times of the sample project.

    python -m benchmarks.bench_plan --sample .cache/sample      (make bench-plan; about six minutes on two quiet cores)

The commands are those of `make score train`, each in a process of its own; a stage's time is what its last line says.
The plan is made before them, from the two configs, the number of tokens and its own measurements. The error is
|predicted / measured - 1|.
"""

import json
import re
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.common import claim, report
from shards import Manifest

SEQ_LEN, ROWS = 256, 32
STAGES = {
    "remit score": "score once",
    "remit train, NTP": "train NTP",
    "remit train, ReMiT": "train ReMiT, stored log-probs",
}


def remit(*arguments: object) -> str:
    """What the command prints."""
    command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return done.stdout


def seconds(output: str) -> int:
    """The time in the last line of a stage."""
    return int(re.findall(r"\((\d+) s\)", output)[-1])


def one_round(sample: Path, corpus: Path, work: Path) -> dict[str, tuple[float, float]]:
    """For each stage: predicted and measured seconds."""
    pack = ("--tokenizer", sample / "tokenizer", "--seq-len", SEQ_LEN)
    remit("pack", "--corpus", corpus, *pack, "--tokens-per-shard", 131_072, "--out", work / "packed")
    remit("pack", "--corpus", sample / "heldout", *pack, "--out", work / "heldout")
    manifest = Manifest.read(work / "packed")
    models = ("--base", sample / "base", "--reference", sample / "reference", "--tokens", manifest.tokens)
    batches = ("--global-batch-size", ROWS, "--micro-batch-size", ROWS)
    to = work / "plan.json"
    print(remit("plan", *models, "--seq-len", SEQ_LEN, *batches, "--measure", "--json", to), flush=True)
    predicted = {name: cost["wall_seconds"] for name, cost in json.loads(to.read_text())["costs"].items()}
    scored = work / "scored"
    train = ("--shards", scored, "--model", sample / "base", *batches, "--learning-rate", "1e-3")
    train += ("--eval-shards", work / "heldout", "--eval-every", 37)
    commands: dict[str, tuple[object, ...]] = {
        "remit score": ("score", "--shards", work / "packed", "--model", sample / "reference", "--out", scored),
        "remit train, NTP": ("train", "--objective", "ntp", "--out", work / "ntp", *train),
        "remit train, ReMiT": ("train", "--objective", "remit", "--out", work / "remit", *train),
    }
    found = {}
    for stage, command in commands.items():
        found[stage] = predicted[STAGES[stage]], float(seconds(remit(*command)))
        print(f"{stage}: predicted {found[stage][0]:.1f} s, measured {found[stage][1]:.0f} s", flush=True)
    return found


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=Path, default=Path(".cache/sample"), help="the sample project")
    parser.add_argument("--corpus", type=Path, help="default: the sample's own")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    rounds = []
    for _ in range(options.rounds):
        with TemporaryDirectory() as work:
            rounds.append(one_round(options.sample, options.corpus or options.sample / "corpus", Path(work)))
    claims = []
    for stage in STAGES:
        pairs = [found[stage] for found in rounds]
        claims.append(
            claim(f"{stage}: error of the prediction, as a share of the measured time", [abs(a / b - 1) for a, b in pairs], at_most=0.2)
        )  # fmt: skip
        claims.append(claim(f"{stage}: predicted seconds", [a for a, _ in pairs]))
        claims.append(claim(f"{stage}: measured seconds", [b for _, b in pairs]))
    return report("plan", claims)


if __name__ == "__main__":
    sys.exit(main())
