"""What a plan of 100,000 parts costs before and after the work: start, resume, verify the manifest, open for training.

    python -m benchmarks.bench_scale [--parts 100000]        (make bench-scale)

The manifest and the commit records are real; the parts behind them are not there, because none of these steps may
touch them. Times and memory are of a process of its own for each size, so that growth shows.
"""

import json
import resource
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from benchmarks.common import claim, report, write_tokenizer
from shards import CommitRecord, CorpusFile, Manifest, PartPlan, ShardFolder
from shards.manifest import part_name
from shards.record import COMMITS, encode_record

ROWS, SEQ_LEN = 1024, 4096


def plan_of(parts: int) -> Manifest:
    """A plan of that many full parts: 4M tokens each, from one corpus file for every ten of them."""
    tokenizer = {"fingerprint": "0" * 64, "eos_token_id": 0, "vocab_size": 50_000, "special_tokens": "parse"}
    files = []
    for index in range(0, parts, 10):
        rows = ROWS * min(10, parts - index)
        name = f"shard/{index:06d}.jsonl.zst"
        files.append(CorpusFile(name, rows * 9000, f"{index:064x}", rows, rows, 0, 0, rows, rows * SEQ_LEN))
    plans = tuple(PartPlan(part_name(index), ROWS, ROWS * SEQ_LEN) for index in range(parts))
    return Manifest(SEQ_LEN, ROWS, 64, tokenizer, tuple(files), plans)


def steps(folder: Path, parts: int) -> dict[str, float]:
    """Seconds of each step, and the peak of memory in MB."""
    from scorer.score import refuse_other_scoring
    from shards.output_folder import begin_shards, writing
    from shards.store import open_store
    from trainer.data import RowReader
    from trainer.order import RowOrder

    seconds: dict[str, float] = {}

    def timed(name: str, began: float) -> None:
        seconds[name] = perf_counter() - began

    began = perf_counter()
    shards = ShardFolder(folder / "packed")
    timed("read and verify a manifest", began)
    began = perf_counter()
    shards.require_complete()
    timed("see that all parts are committed", began)
    began = perf_counter()
    training = ShardFolder(folder / "packed")
    training.require_complete()
    reader = RowReader(training, "packed", None, 50_000)
    assert len(RowOrder(reader.block_rows, seed=0).rows(12_345_678 % (parts * ROWS), 512)) == 512
    timed("start of training: open, find the rows of a step", began)
    references = {"rl": {"context": "packed", "logprob_step": 1 / 64, "model": "m"}}
    manifest = replace(shards.manifest, references=references)
    out = open_store(folder / "scored")
    with writing(out) as lease:
        began = perf_counter()
        scored = begin_shards(shards, out, manifest, lease)
        missing = scored.missing_parts()
        timed("freeze the plan of a scoring", began)
    assert len(missing) == parts
    for name in missing[:-3]:
        data = encode_record(CommitRecord(name, "0" * 64, 1, ROWS, ROWS * SEQ_LEN))
        path = folder / "scored" / COMMITS / name.replace(".arrow", ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    began = perf_counter()
    refuse_other_scoring(out, manifest, "rl")
    assert ShardFolder(out).missing_parts() == missing[-3:]
    timed("resume a scoring, three parts missing", began)
    began = perf_counter()
    metadata = [scored.part_metadata(name) for name in missing[:100]]
    timed("metadata of 100 parts", began)
    seconds["metadata of a part, bytes"] = len(json.dumps(metadata[50]))
    seconds["peak memory, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return seconds


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=int, default=100_000)
    parser.add_argument("--only", type=Path, help="used by the script itself")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(steps(options.only, options.parts)))
        return 0
    results = {}
    for parts in (options.parts // 100, options.parts):
        with TemporaryDirectory() as name:
            folder = Path(name)
            plan = plan_of(parts)
            plan.write(folder / "packed")
            write_tokenizer(folder / "packed")
            (folder / "packed" / COMMITS).mkdir()
            for index in range(parts):
                (folder / "packed" / COMMITS / part_name(index).replace(".arrow", ".json")).touch()
            command = [sys.executable, "-m", "benchmarks.bench_scale", "--parts", str(parts), "--only", name]
            results[parts] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    claims = []
    for step in results[options.parts]:
        for parts, values in results.items():
            limit = 10.0 if parts == options.parts and step[:2] in ("re", "se", "fr") else None
            limit = 2.0 if parts == options.parts and step.startswith("start") else limit
            claims.append(claim(f"{step}, {parts:,} parts", [values[step]], at_most=limit))
    return report("scale", claims)


if __name__ == "__main__":
    sys.exit(main())
