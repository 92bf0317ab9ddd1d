"""Bytes per token on disk of a reference's most probable tokens, beside what other stores of teachers take.

    python -m benchmarks.bench_topk --sample .cache/sample        (make bench-topk; two minutes)

Measured twice: for the sample project's reference (a vocabulary of about two thousand), and for the same log-probs
with ids drawn from a Zipf distribution over 100,352 tokens, which cost more, because more of them are in use.
"""

import json
import sys
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import torch
import transformers
import zstandard

from benchmarks.common import Claim, claim, make_shards, report
from scorer.rowcheck import round_logprobs
from shards import ShardFolder, write_part
from shards.schema import list_array
from shards.topk import topk_array

# bytes per token of other ways to keep a teacher's distribution, as their authors report them
KNOWN = {"sparse sampling of the distribution": 36, "polynomial compression, least": 114, "the same, most": 344}
LARGE_VOCABULARY = 100_352
STEP = 1 / 64


@torch.no_grad()
def top_of_sample(sample: Path, rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probs [rows * 255, k] of the sample's reference on rows of its own held-out text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(sample / "reference", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(sample / "reference")
    with zstandard.open(sample / "heldout" / "heldout.jsonl.zst", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    ids = [token for text in texts for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    rows = min(rows, len(ids) // 256)
    batch = torch.tensor(ids[: rows * 256]).reshape(rows, 256)
    best = [model(input_ids=part).logits[:, :-1].log_softmax(-1).topk(k) for part in batch.split(16)]
    top_ids = torch.cat([part.indices for part in best]).reshape(-1, k).numpy().astype(np.int32)
    return top_ids, round_logprobs(torch.cat([part.values for part in best]).reshape(-1, k).numpy(), STEP)


def zipf_ids(tokens: int, k: int, seed: int = 0) -> np.ndarray:
    """k different ids for each token, the frequent ones more often."""
    rng = np.random.default_rng(seed)
    share = 1 / (np.arange(LARGE_VOCABULARY) + 2.7)
    bounds = np.cumsum(share / share.sum())
    drawn = np.searchsorted(bounds, rng.random((tokens, 8 * k)))
    names = rng.permutation(LARGE_VOCABULARY)  # ids are not in the order of frequency
    found = np.empty((tokens, k), np.int32)
    for place, row in enumerate(drawn):
        different = list(dict.fromkeys(row.tolist()))[:k]
        spare = (token for token in range(LARGE_VOCABULARY) if token not in different)
        while len(different) < k:
            different.append(next(spare))
        found[place] = names[different]
    return found


def size_of(columns: dict[str, pa.Array], folder: Path, k: int, length: int, rows: int) -> float:
    """Bytes per token that columns of the most probable tokens add to a part."""
    plain = make_shards(folder / "plain", LARGE_VOCABULARY, 1, rows, length)
    batch = pa.ipc.open_file(folder / "plain" / plain.manifest.parts[0].name).get_batch(0)
    logprobs = pa.array([[None] + [-1.0] * (length - 1)] * rows, pa.list_(pa.float32()))
    sizes = []
    for kept in (0, k):
        reference = {"context": "packed", "logprob_step": STEP, "model": "sample", "top_k": kept}
        manifest = replace(plain.manifest, references={"rl": reference})
        values = [*batch.columns, logprobs, *(columns.values() if kept else ())]
        out = folder / str(kept)
        record = write_part(
            out, manifest.parts[0].name, manifest.schema, {}, [pa.record_batch(values, schema=manifest.schema)]
        )
        sizes.append(record.size)
    assert ShardFolder(folder / "plain").manifest.rows == rows
    return (sizes[1] - sizes[0]) / (rows * length)


def measured(top_ids: np.ndarray, logprobs: np.ndarray, length: int = 256) -> float:
    """Bytes per token of ids and log-probs [rows * (length - 1), k]; a row's first token has none."""
    k, rows = top_ids.shape[1], len(top_ids) // (length - 1)
    present = np.tile(np.arange(length) > 0, rows)
    columns = {}
    for name, values in (("ids", top_ids), ("logprobs", logprobs)):
        filled = np.zeros((rows * length, k), values.dtype)
        filled[present] = values[: rows * (length - 1)]
        columns[name] = list_array(topk_array(filled, present), np.full(rows, length))
    with TemporaryDirectory() as folder:
        return size_of(columns, Path(folder), k, length, rows)


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=Path, default=Path(".cache/sample"))
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--top-k", type=int, nargs="+", default=[8, 32, 64])
    options = parser.parse_args()
    claims: list[Claim] = []
    for k in options.top_k:
        top_ids, logprobs = top_of_sample(options.sample, options.rows, k)
        small, large = measured(top_ids, logprobs), measured(zipf_ids(len(logprobs), k), logprobs)
        claims.append(claim(f"top {k}, the sample's reference: bytes per token", [small]))
        claims.append(claim(f"top {k}, ids of a vocabulary of {LARGE_VOCABULARY:,}: bytes per token", [large]))
    claims += [claim(f"as reported: {name}", [float(value)]) for name, value in KNOWN.items()]
    return report("topk", claims)


if __name__ == "__main__":
    sys.exit(main())
