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

from benchmarks.bench_bucket import text
from benchmarks.common import Claim, claim, make_shards, report
from scorer.logits import draws
from scorer.rowcheck import round_logprobs
from shards import ShardFolder, write_part
from shards.schema import list_array
from shards.topk import topk_array

# bytes per token of other ways to keep a teacher's distribution, as their authors report them
KNOWN = {"sparse sampling of the distribution": 36, "polynomial compression, least": 114, "the same, most": 344}
LARGE_VOCABULARY = 100_352
STEP = 1 / 64
DRAWS = (10, 25, 50, 100)


@torch.no_grad()
def top_of_sample(sample: Path, rows: int, k: int) -> tuple[np.ndarray, ...]:
    """Ids and log-probs [rows * 255, k] of the sample's reference on rows of its own held-out text, and its entropies at
    temperature 2, [rows * 255]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(sample / "reference", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(sample / "reference")
    with zstandard.open(sample / "heldout" / "heldout.jsonl.zst", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    ids = [token for text in texts for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    rows = min(rows, len(ids) // 256)
    batch = torch.tensor(ids[: rows * 256]).reshape(rows, 256)
    logprobs = torch.cat([model(input_ids=part).logits[:, :-1].log_softmax(-1) for part in batch.split(16)])
    logprobs = logprobs.reshape(-1, logprobs.shape[-1])
    best, hot = logprobs.topk(k), torch.special.entr((logprobs / 2).softmax(-1)).sum(-1)
    return best.indices.numpy().astype(np.int32), round_logprobs(best.values.numpy(), STEP), hot.numpy()


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


def size_of(columns: dict[str, pa.Array], folder: Path, k: int, length: int, rows: int, option: str = "top_k") -> float:
    """Bytes per token that columns of the most probable tokens, or of the drawn ones ("sample_k"), add to a part."""
    plain = make_shards(folder / "plain", LARGE_VOCABULARY, 1, rows, length)
    batch = pa.ipc.open_file(folder / "plain" / plain.manifest.parts[0].name).get_batch(0)
    logprobs = pa.array([[None] + [-1.0] * (length - 1)] * rows, pa.list_(pa.float32()))
    sizes = []
    for kept in (0, k):
        reference = {"context": "packed", "logprob_step": STEP, "model": "sample", option: kept}
        reference["vocab_size"] = LARGE_VOCABULARY
        manifest = replace(plain.manifest, references={"rl": reference})
        values = [*batch.columns, logprobs, *(columns.values() if kept else ())]
        out = folder / str(kept)
        record = write_part(
            out, manifest.parts[0].name, manifest.schema, {}, [pa.record_batch(values, schema=manifest.schema)]
        )
        sizes.append(record.size)
    assert ShardFolder(folder / "plain").manifest.rows == rows
    return (sizes[1] - sizes[0]) / (rows * length)


@torch.no_grad()
def top_of_real(folder: Path, rows: int, k: int) -> tuple[np.ndarray, ...]:
    """Ids and log-probs [rows * 255, k] of a model on this project's pages and sources, its entropies at temperature 2, and ids
    that are drawn from its distributions, [rows * 255, draws]."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(tokenizer(text()).input_ids)
    rows = min(rows, len(ids) // 256)
    found = []
    for row in ids[: rows * 256].reshape(rows, 256):
        logprobs = model(input_ids=row[None]).logits[0, :-1].log_softmax(-1)
        top = logprobs.topk(k)
        hot = torch.special.entr((logprobs / 2).softmax(-1)).sum(-1)
        found.append((top.indices, top.values, hot, draws(logprobs, row[1:], DRAWS[-1])))
    top_ids, values, entropies, drawn = (torch.cat(parts).numpy() for parts in zip(*found))
    return top_ids.astype(np.int32), round_logprobs(values, STEP), entropies, drawn.astype(np.int32)


def measured_draws(ids: np.ndarray, length: int = 256) -> float:
    """Bytes per token of drawn ids [rows * (length - 1), S]; a row's first token has none."""
    count, rows = ids.shape[1], len(ids) // (length - 1)
    present = np.tile(np.arange(length) > 0, rows)
    filled = np.zeros((rows * length, count), np.int32)
    filled[present] = ids[: rows * (length - 1)]
    columns = {"ids": list_array(topk_array(filled, present), np.full(rows, length))}
    with TemporaryDirectory() as folder:
        return size_of(columns, Path(folder), count, length, rows, "sample_k")


def real_claims(folder: Path, rows: int, counts: list[int]) -> list[Claim]:
    """All tokens against those whose entropy is lowest, of a real model."""
    claims = []
    top_ids, logprobs, entropies, drawn = top_of_real(folder, rows, max(counts))
    for count in DRAWS:
        values = drawn[:, :: DRAWS[-1] // count]
        claims.append(claim(f"{count} drawn tokens, {folder.name}: bytes per token", [measured_draws(values)]))
    for k in counts:
        own = np.ascontiguousarray(top_ids[:, :k]), np.ascontiguousarray(logprobs[:, :k])
        claims += gated_claims(f"top {k}, {folder.name}", *own, entropies)
    return claims


def gated_claims(name: str, top_ids: np.ndarray, logprobs: np.ndarray, entropies: np.ndarray) -> list[Claim]:
    """All tokens against the share of lowest entropy."""
    claims = []
    for share in (1.0, 0.3, 0.25, 0.2):
        kept = entropies <= np.quantile(entropies, share)
        what = "all tokens" if share == 1 else f"the {share:.0%} of lowest entropy"
        claims.append(claim(f"{name}, {what}: bytes per token", [measured(top_ids, logprobs, kept=kept)]))
    return claims


def measured(top_ids: np.ndarray, logprobs: np.ndarray, length: int = 256, kept: np.ndarray | None = None) -> float:
    """Bytes per token of ids and log-probs [rows * (length - 1), k]; a row's first token has none, and none has one where `kept`
    is False."""
    k, rows = top_ids.shape[1], len(top_ids) // (length - 1)
    present = np.tile(np.arange(length) > 0, rows)
    shown = present.copy()
    if kept is not None:
        shown[present] = kept[: int(present.sum())]
    columns = {}
    for name, values in (("ids", top_ids), ("logprobs", logprobs)):
        filled = np.zeros((rows * length, k), values.dtype)
        filled[present] = values[: rows * (length - 1)]
        columns[name] = list_array(topk_array(filled, shown), np.full(rows, length))
    with TemporaryDirectory() as folder:
        return size_of(columns, Path(folder), k, length, rows)


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=Path, default=Path(".cache/sample"))
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--top-k", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument(
        "--real", type=Path, help="also of this model, as .cache/real/smollm2: all tokens and the surest"
    )
    options = parser.parse_args()
    claims: list[Claim] = real_claims(options.real, options.rows, options.top_k) if options.real else []
    for k in options.top_k if options.sample.exists() else ():
        top_ids, logprobs, entropies = top_of_sample(options.sample, options.rows, k)
        claims += gated_claims(f"top {k}, the sample's reference", top_ids, logprobs, entropies)
        large = measured(zipf_ids(len(logprobs), k), logprobs)
        claims.append(claim(f"top {k}, ids of a vocabulary of {LARGE_VOCABULARY:,}: bytes per token", [large]))
    claims += [claim(f"as reported: {name}", [float(value)]) for name, value in KNOWN.items()]
    return report("topk", claims)


if __name__ == "__main__":
    sys.exit(main())
