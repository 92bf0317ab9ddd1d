"""Memory and time of document context: a mask of T x T beside attention that takes each document by itself.

    python -m benchmarks.bench_documents        (make bench-documents; about a minute on two quiet cores)

One row of documents of 200 to 4,000 tokens, or one document as long as the row (which has no mask in either form), forward and
backward of the body of a two-layer Llama, float32, each in a process of its own. Peak memory is that of the process above what it held before the
first forward. The gradients of both forms are compared.
"""

import json
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np

from benchmarks.common import Claim, claim, report

HIDDEN, LAYERS, HEADS, SHARED, VOCABULARY = 128, 2, 4, 2, 1024
MASK, DOCUMENTS = "mask", "documents"


def lengths_of_documents(seq_len: int, kind: str) -> list[int]:
    """Of one row."""
    if kind == "one":
        return [seq_len]
    rng, lengths = np.random.default_rng(0), list[int]()
    while sum(lengths) < seq_len:
        lengths.append(int(rng.integers(200, 4_000)))
    return [*lengths[:-1], seq_len - sum(lengths[:-1])]


def measure(form: str, kind: str, seq_len: int, gradients: Path) -> None:
    """Print what one form takes; write its gradients."""
    import torch
    import transformers

    from trainer.attention_choice import choose_attention
    from trainer.loss_model import peak_memory_bytes
    from trainer.model import Base

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=SHARED, max_position_embeddings=seq_len,
    )  # fmt: skip
    base = Base(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32), torch.float32)
    attention = "a mask of T x T" if form == MASK else choose_attention(base).text
    lengths = lengths_of_documents(seq_len, kind)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ids = torch.randint(0, VOCABULARY, (1, seq_len), generator=torch.Generator().manual_seed(1))
    upstream_BTH = torch.randn(1, seq_len, HIDDEN, generator=torch.Generator().manual_seed(2))
    base.hidden_states(ids[:, :8], positions[:, :8]).sum().backward()  # what torch itself needs once
    base.model.zero_grad(set_to_none=True)
    before, began = peak_memory_bytes(torch.device("cpu")), perf_counter()
    (base.hidden_states(ids, positions) * upstream_BTH).sum().backward()
    seconds, added = perf_counter() - began, peak_memory_bytes(torch.device("cpu")) - before
    torch.save([p.grad for p in base.model.parameters() if p.grad is not None], gradients)
    print(json.dumps({"bytes": added, "seconds": seconds, "attention": attention, "documents": len(lengths)}))


def measured(form: str, kind: str, seq_len: int, gradients: Path) -> dict:
    command = [sys.executable, "-m", "benchmarks.bench_documents", "--only", form, "--kind", kind]
    command += ["--seq-len", str(seq_len), "--gradients", str(gradients)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict = json.loads(done.stdout.splitlines()[-1])
    print(f"{seq_len:,} tokens, {found['documents']} documents, {found['attention']}: "
          f"{found['bytes'] / 1e9:.2f} GB, {found['seconds']:.1f} s", flush=True)  # fmt: skip
    return found


def apart(found: Path, wanted: Path) -> float:
    """Largest difference of two lists of gradients, in units of the largest gradient of a tensor."""
    import torch

    pairs = zip(torch.load(found), torch.load(wanted), strict=True)
    return max(((one - other).abs().max() / other.abs().max()).item() for one, other in pairs)


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--seq-len", type=int, nargs="+", default=[4_096, 16_384])
    parser.add_argument("--only", choices=(MASK, DOCUMENTS), help="used by the script itself")
    parser.add_argument("--kind", choices=("many", "one"), default="many", help="likewise")
    parser.add_argument("--gradients", type=Path, help="likewise")
    options = parser.parse_args()
    if options.only:
        measure(options.only, options.kind, options.seq_len[0], options.gradients)
        return 0
    claims: list[Claim] = []
    with TemporaryDirectory() as name:
        for seq_len in options.seq_len:
            for kind in ("many", "one")[: 2 if seq_len < 16_384 else 1]:
                files = {form: Path(name) / f"{form}.pt" for form in (MASK, DOCUMENTS)}
                found = {form: measured(form, kind, seq_len, file) for form, file in files.items()}
                what = f"{seq_len:,} tokens in {found[MASK]['documents']} documents"
                ratios = {key: found[DOCUMENTS][key] / found[MASK][key] for key in ("bytes", "seconds")}
                at_size = seq_len >= 16_384
                claims += [
                    claim(f"memory / that with a mask, {what}", [ratios["bytes"]], at_most=0.5 if at_size else 1.1),
                    claim(f"time / that with a mask, {what}", [ratios["seconds"]], at_most=1.0 if at_size else None),
                    claim(f"gradients apart, {what}", [apart(files[DOCUMENTS], files[MASK])], at_most=1e-5),
                ]
    return report("documents", claims)


if __name__ == "__main__":
    sys.exit(main())
