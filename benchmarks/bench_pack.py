"""How fast remit pack is against the tokenizer alone, and how much memory it takes as the corpus grows.

    python -m benchmarks.bench_pack [--megabytes 48] [--grow 10 100 1000] [--grow-tokens 20 200 800]     (make bench-pack)

Text: source files and documentation of the installed Python packages. The tokenizer: byte-level BPE of 8,192 tokens
trained on a sample of it. Bare: tokenizers' encode_batch over the same documents on the same cores. Token ids: what the
text became, again and again, as OLMo-core's .npy and as datatrove's .ds with its index.
"""

import json
import os
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np

from benchmarks.common import Claim, PeakMemory, claim, report

SEQ_LEN, VOCABULARY = 2048, 8192


def documents(num_bytes: int) -> Iterator[str]:
    """About `num_bytes` of text, as documents of at most 20,000 characters; begins again when it runs out."""
    packages = Path(os.__file__).parent, Path(json.__file__).parents[1] / "site-packages", Path(sys.prefix)
    files = sorted({file for root in packages for file in root.rglob("*.py")})
    left = num_bytes
    while left > 0:
        for file in files:
            try:
                text = file.read_text(encoding="utf-8")[:20_000]
            except (OSError, UnicodeDecodeError):
                continue
            if text:
                yield text
                left -= len(text.encode())
            if left <= 0:
                return


def write_corpus(path: Path, num_bytes: int, files: int = 1) -> None:
    path.mkdir(parents=True)
    with ExitStack() as stack:
        names = [path / f"{index:02d}.jsonl" for index in range(files)]
        outputs = [stack.enter_context(open(file, "w", encoding="utf-8")) for file in names]
        for number, text in enumerate(documents(num_bytes)):
            outputs[number % files].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents(4_000_000), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def bare_tokens_per_second(tokenizer: Path, texts: list[str]) -> float:
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    began = perf_counter()
    tokens = 0
    for start in range(0, len(texts), 1024):
        tokens += sum(map(len, encoder.encode_batch(texts[start : start + 1024], add_special_tokens=False)))
    return tokens / (perf_counter() - began)


def packed_tokens_per_second(corpus: Path, tokenizer: Path, out: Path) -> float:
    from scorer.config import PackConfig
    from scorer.pack import pack

    began = perf_counter()
    folder = pack(PackConfig([str(corpus)], str(tokenizer), str(out), SEQ_LEN))
    return folder.manifest.tokens / (perf_counter() - began)


def write_token_corpus(folder: Path, packed: Path, millions: int, kind: str, files: int = 2) -> None:
    """About so many million tokens of a packed folder, in documents, as .npy or .ds."""
    from shards import ShardFolder

    shards = ShardFolder(packed)
    rows = list(shards.batches(["input_ids"]))
    ids = np.concatenate([batch.ids for batch in rows]).astype(np.uint16)
    ends = np.flatnonzero(ids == shards.manifest.tokenizer["eos_token_id"]) + 1
    ids = ids[: ends[-1]]
    folder.mkdir(parents=True)
    for index in range(files):
        times = max(1, round(millions * 10**6 / files / len(ids)))
        with open(folder / f"{index}.{kind}", "wb") as file:
            for _ in range(times):
                ids.tofile(file)
        if kind == "ds":
            all_ends = [ends.astype(np.uint64) + np.uint64(time * len(ids)) for time in range(times)]
            np.concatenate(all_ends).tofile(folder / f"{index}.ds.index")


def memory_of_tokens(folder: Path, millions: list[int]) -> list[Claim]:
    """Peak memory of packing token ids as they become more."""
    peaks = []
    for count in millions:
        write_token_corpus(folder / f"ids-{count}", folder / "out-8-0", count, "npy")
        with PeakMemory() as memory:
            speed = packed_tokens_per_second(folder / f"ids-{count}", folder / "tokenizer", folder / f"ids-out-{count}")
        peaks.append(memory.peak)
        print(f"{count}M token ids: {speed:,.0f} tokens/s, peak {memory.peak / 1e6:,.0f} MB")
    if not peaks:
        return []
    name = f"memory of pack of token ids, {millions[-1]}M / {millions[0]}M"
    return [
        claim(name, [peaks[-1] / peaks[0]], at_most=1.1),
        claim("memory of pack of token ids, MB", [median(peaks) / 1e6]),
    ]


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--grow", type=int, nargs="*", default=[10, 100, 1000], help="megabytes; none: skip it")
    parser.add_argument("--tokens", type=int, default=200, help="millions of token ids")
    parser.add_argument("--grow-tokens", type=int, nargs="*", default=[20, 200, 800], help="millions; none: skip it")
    options = parser.parse_args()
    from scorer.cluster import ray_cluster

    claims: list[Claim] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        make_tokenizer(folder / "tokenizer")
        texts = list(documents(options.megabytes * 10**6))
        ratios: dict[int, list[float]] = {1: [], 8: []}
        times_text: dict[str, list[float]] = {"npy": [], "ds": []}
        speeds = []
        for files, values in ratios.items():
            write_corpus(folder / f"corpus-{files}", options.megabytes * 10**6, files)
            # Ray's of its own, as a command has: a worker that was used before keeps its number of tokenizer threads
            with ray_cluster():
                for index in range(options.rounds):
                    speeds.append(bare_tokens_per_second(folder / "tokenizer", texts))
                    out = folder / f"out-{files}-{index}"
                    text_speed = packed_tokens_per_second(folder / f"corpus-{files}", folder / "tokenizer", out)
                    values.append(text_speed / speeds[-1])
                    print(f"{files} files, round {index}: bare {speeds[-1]:,.0f} tokens/s, pack x {values[-1]:.2f}")
                    for kind in times_text if files > 1 else ():
                        corpus = folder / f"tokens-{kind}"
                        if not corpus.exists():
                            write_token_corpus(corpus, out, options.tokens, kind)
                        out_ids = folder / f"out-{kind}-{index}"
                        speed = packed_tokens_per_second(corpus, folder / "tokenizer", out_ids)
                        times_text[kind].append(speed / text_speed)
                        print(f"round {index}: {kind} {speed:,.0f} tokens/s, x {times_text[kind][-1]:.1f} of text")
        claims.append(claim("pack / bare encode_batch, one corpus file", ratios[1], 0.7))
        claims.append(claim("pack / bare encode_batch, eight corpus files", ratios[8], 0.7))
        claims.append(claim("bare encode_batch, tokens/s", speeds))
        for kind, values in times_text.items():
            claims.append(claim(f"pack of token ids (.{kind}) / pack of text, tokens/s", values, 20))
        peaks = []
        with ray_cluster():
            for megabytes in options.grow:
                corpus = folder / f"grow-{megabytes}"
                write_corpus(corpus, megabytes * 10**6, 2)
                with PeakMemory() as memory:
                    speed = packed_tokens_per_second(corpus, folder / "tokenizer", folder / f"grown-{megabytes}")
                peaks.append(memory.peak)
                print(f"{megabytes} MB: {speed:,.0f} tokens/s, peak {memory.peak / 1e6:,.0f} MB")
        if peaks:
            claims.append(
                claim(
                    f"memory of pack, {options.grow[-1]} MB / {options.grow[0]} MB", [peaks[-1] / peaks[0]], at_most=1.1
                )
            )
            claims.append(claim("memory of pack, MB", [median(peaks) / 1e6]))
        with ray_cluster():
            claims += memory_of_tokens(folder, options.grow_tokens)
    return report("pack", claims)


if __name__ == "__main__":
    sys.exit(main())
