"""Build the sample project: a corpus, a tokenizer, a tiny base model and a better reference. No network.

    python -P -m pipelines.sample --out DIR

Out: DIR/corpus/ (four .jsonl.zst files and one .parquet), DIR/heldout/ (reasoning that nothing trains on),
DIR/tokenizer, DIR/base, DIR/reference. Deterministic from the seed; what is there already is kept.
The base and the reference are trained by remit's own packer and trainer.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from time import monotonic

import pyarrow as pa
import pyarrow.parquet
import torch
import transformers
import tyro
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipelines.sample_corpus import documents
from pipelines.terminal import progress_bar, quiet_libraries
from scorer.cluster import ray_cluster
from scorer.config import PackConfig
from scorer.pack import pack
from shards.store import temporary_name
from trainer.config import TrainConfig
from trainer.train import train

EOS = "<|endoftext|>"


@dataclass(frozen=True)
class SampleConfig:
    """Build the sample project."""

    out: Path
    """Folder to build it in."""
    documents: int = 36_000
    """Documents of the mid-training corpus; 36,000 are about two million tokens."""
    base_steps: int = 250
    """Optimizer steps of the base."""
    reference_steps: int = 350
    """Optimizer steps that the reference has on top of the base."""
    seq_len: int = 256
    """Tokens per row, and the models' longest sequence."""
    seed: int = 0
    """Decides everything."""
    debug: bool = field(default=False, repr=False)
    """Show what the workers print."""


def build(config: SampleConfig) -> None:
    """Build what is missing of the sample project in `config.out`."""
    out = config.out
    out.mkdir(parents=True, exist_ok=True)
    steps: list[tuple[str, Callable[[Path], None]]] = [
        ("corpus", lambda path: write_corpus(path, config)),
        ("heldout", lambda path: write_jsonl(path, "heldout", list(documents(config.seed + 9, 600, 1.0, 0.0)))),
        ("tokenizer", lambda path: write_tokenizer(path, out / "corpus", config)),
        ("base", lambda path: write_base(path, config)),
        ("reference", lambda path: write_reference(path, config)),
    ]
    for name, step in steps:
        if (out / name).exists():
            continue
        began = monotonic()
        temporary = temporary_name(out / name)
        step(temporary)
        os.rename(temporary, out / name)
        print(f"sample: {name} ({monotonic() - began:.0f} s)", flush=True)


def write_jsonl(folder: Path, name: str, texts: list[str]) -> None:
    """One .jsonl.zst file with a document per line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (folder / f"{name}.jsonl.zst").write_bytes(zstandard.ZstdCompressor(level=3).compress(lines.encode()))


def write_corpus(folder: Path, config: SampleConfig) -> None:
    """Mid-training mix: half of it word problems, every fifth of their steps wrong."""
    texts = list(documents(config.seed + 1, config.documents, reasoning_share=0.5, wrong_steps=0.2))
    share = -(-len(texts) // 5)
    for index in range(4):
        write_jsonl(folder, f"mix-{index}", texts[index * share : (index + 1) * share])
    pyarrow.parquet.write_table(pa.table({"text": texts[4 * share :]}), folder / "mix-4.parquet")


def write_tokenizer(folder: Path, corpus: Path, config: SampleConfig) -> None:
    """Byte-level BPE of 1,024 tokens; digits stay single, so that numbers read the same everywhere."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = islice(documents(config.seed + 1, config.documents, reasoning_share=0.5, wrong_steps=0.2), 8_000)
    tokenizer.train_from_iterator(texts, trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS).save_pretrained(folder)


def write_base(folder: Path, config: SampleConfig) -> None:
    """A tiny OLMo-2, pre-trained on plain text with a little faulty arithmetic."""
    start = folder.with_name(".start")
    torch.manual_seed(config.seed)
    model_config = transformers.Olmo2Config(
        vocab_size=1024,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=config.seq_len,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    transformers.AutoModelForCausalLM.from_config(model_config, dtype=torch.float32).save_pretrained(start)
    _train(folder, start, config, "base", config.base_steps, reasoning_share=0.3, wrong_steps=0.3)
    shutil.rmtree(start)


def write_reference(folder: Path, config: SampleConfig) -> None:
    """The base, trained on: mostly word problems, all of them solved correctly."""
    base = config.out / "base"
    _train(folder, base, config, "reference", config.reference_steps, reasoning_share=0.9, wrong_steps=0.0)


def _train(
    folder: Path, start: Path, config: SampleConfig, name: str, steps: int, reasoning_share: float, wrong_steps: float
) -> None:
    work = folder.with_name(f".{name}.work")
    shutil.rmtree(work, ignore_errors=True)
    seed = config.seed + {"base": 2, "reference": 3}[name]
    count = steps * 16 * config.seq_len // 50  # documents have about 55 tokens
    write_jsonl(work / "corpus", name, list(documents(seed, count, reasoning_share, wrong_steps)))
    tokenizer = str(config.out / "tokenizer")
    shards = pack(
        PackConfig([str(work / "corpus")], tokenizer, str(work / "packed"), config.seq_len, debug=config.debug)
    )
    settings = TrainConfig(
        shards=(str(shards.path),),
        model=str(start),
        out=work / "run",
        objective="ntp",
        max_steps=steps,
        global_batch_size=16,
        micro_batch_size=16,
        learning_rate=2e-3,
        min_learning_rate=2e-4,
        warmup_steps=20,
        seed=config.seed,
        dtype="float32",
        checkpoint_every=0,
    )
    with progress_bar(desc=f"train the sample {name}", unit=" steps", total=steps) as bar:

        def progress(done: int, total: int, metrics: dict) -> None:
            bar.set_postfix_str(f"loss {metrics['ntp_loss']:.3f}", refresh=False)
            bar.update(done - bar.n)

        result = train(settings, progress)
    os.rename(result.out / "model", folder)
    for file in (config.out / "tokenizer").iterdir():
        shutil.copyfile(file, folder / file.name)
    shutil.rmtree(work)


def main() -> None:
    config = tyro.cli(SampleConfig, description=__doc__)
    quiet_libraries()
    if all((config.out / name).exists() for name in ("corpus", "heldout", "tokenizer", "base", "reference")):
        return
    print(f"sample: building the sample project in {config.out}, about two minutes", flush=True)
    with ray_cluster(config.debug):  # one Ray session for all packing
        build(config)


if __name__ == "__main__":
    main()
