"""One model's way through the command line, each step done once; and what a float32 forward says of the same tokens."""

import json
import os
import subprocess
import sys
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pyarrow.dataset
from transformers import AutoTokenizer

from . import corpus, forward
from .models import model_folder

SEQ_LEN = 256
CONTEXTS = ("packed", "document")
STEP = 1 / 64  # of the stored log-probs, unless asked otherwise


def remit(*arguments: object) -> str:
    """Run the command as a user does; its standard output. AssertionError with its last words where it fails."""
    mine = ("OMP_NUM_THREADS", "RAY_ADDRESS")  # the tests set the first for tiny models
    environment = {k: v for k, v in os.environ.items() if k not in mine and not k.startswith("REMIT_")}
    command = [str(Path(sys.executable).with_name("remit")), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}"
    return done.stdout


def read_rows(shards: Path) -> list[dict]:
    """All rows of a shard folder, with pyarrow alone."""
    return pyarrow.dataset.dataset(shards, format="arrow").to_table().to_pylist()


def spans(row: dict, context: str) -> list[tuple[int, int]]:
    """Start and end of what is conditioned on together."""
    if context == "packed":
        return [(0, len(row["input_ids"]))]
    ends = np.cumsum(row["doc_lengths"]).tolist()
    return list(zip([0, *ends[:-1]], ends))


def stored(row: dict, column: str = "rl_logprobs") -> np.ndarray:
    """A row's stored log-probs, float64 [tokens], NaN where there is none."""
    return np.array([np.nan if value is None else value for value in row[column]])


class Project:
    """Folders of one model, made under `work` when they are first asked for."""

    def __init__(self, name: str, work: Path) -> None:
        self.name, self.work, self.model = name, work, model_folder(name)
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        self.texts = corpus.write(work / "corpus")
        self.all_texts = [text for texts in self.texts.values() for text in texts]
        self.scored = cache(self._scored)

    @cached_property
    def packed(self) -> Path:
        return self._pack("packed", self.work / "corpus", SEQ_LEN)

    @cached_property
    def few(self) -> Path:
        """One document, in rows of 128 tokens: for what need not be measured on much."""
        folder = self.work / "few-corpus"
        folder.mkdir()
        (folder / "one.jsonl").write_text(json.dumps({"text": self.texts["prose"][2][:900]}) + "\n")
        return self._pack("few", folder, 128)

    def _pack(self, name: str, texts: Path, seq_len: int) -> Path:
        out = self.work / name
        remit("pack", "--corpus", texts, "--tokenizer", self.model, "--out", out, "--seq-len", seq_len)
        return out

    def _scored(self, context: str, *options: object, shards: Path | None = None, model: Path | None = None) -> Path:
        """Shards with the column rl_logprobs of `model`, the project's own unless given."""
        shards, model = shards or self.packed, model or self.model
        named = [str(option).strip("-").replace("/", "_") for option in options]
        out = self.work / "-".join(["scored", shards.name, model.parent.name, context, *named])
        remit("score", "--shards", shards, "--model", model, "--out", out, "--context", context, *options)
        return out

    def train(self, name: str, shards: Path, *options: object) -> Path:
        """The folder of a training run of the model on `shards`; small batches, no checkpoint."""
        out = self.work / name
        common = ("--micro-batch-size", 1, "--warmup-steps", 0, "--checkpoint-every", 0)
        remit("train", "--shards", shards, "--model", self.model, "--out", out, *common, *options)
        return out

    @cached_property
    def rows(self) -> list[dict]:
        return read_rows(self.packed)

    @cached_property
    def pieces(self) -> dict[tuple[int, int], list[tuple[int, list[int]]]]:
        """For each document, as (source, doc_id): its pieces in order, each with its row's number."""
        found: dict[tuple[int, int], list[tuple[int, list[int]]]] = {}
        for number, row in enumerate(self.rows):
            for (start, end), doc_id in zip(spans(row, "document"), row["doc_ids"]):
                found.setdefault((row["source"], doc_id), []).append((number, row["input_ids"][start:end]))
        return found

    @cached_property
    def files(self) -> list[str]:
        """The corpus files in the order of the manifest, by their names without suffix."""
        return [Path(file["path"]).stem for file in self.manifest["corpus"]]

    @cached_property
    def manifest(self) -> dict:
        return json.loads((self.packed / "_manifest.json").read_text())

    @cached_property
    def own_ids(self) -> dict[tuple[int, int], list[int]]:
        """For each document, keyed as its pieces, what the tokenizer's own call gives."""
        return {
            (source, doc_id): self.tokenizer(text)["input_ids"]
            for source, file in enumerate(self.files)
            for doc_id, text in enumerate(self.texts[file])
        }

    @cached_property
    def beginnings(self) -> dict[tuple[int, int], list[int]]:
        """For each document as many of its own ids as stand in its first piece."""
        return {key: ids[: len(self.pieces[key][0][1])] for key, ids in self.own_ids.items()}

    @cached_property
    def _variants(self) -> dict[str, list[list[int]]]:
        """The same text of some documents behind BOS, behind nothing and behind EOS."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        some = [texts[place] for texts in self.texts.values() for place in (0, 2)]
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"][:128] for text in some]
        return {"bos": [[bos, *i] for i in ids], "none": ids, "eos": [[eos, *i] for i in ids]}

    @cached_property
    def _truth(self) -> dict[tuple, np.ndarray]:
        """Log-probs of every sequence that is asked for, by one process that loads the model once."""
        wanted = [row["input_ids"][start:end] for c in CONTEXTS for row in self.rows for start, end in spans(row, c)]
        eos = self.tokenizer.eos_token_id
        # behind them EOS, as the end of a document has it in the rows: computed once where the rows are right
        wanted += [self._with_eos(ids, eos, key) for key, ids in self.beginnings.items()]
        wanted += [ids for variant in self._variants.values() for ids in variant]
        return dict(zip(map(tuple, wanted), forward.logprobs(self.model, wanted)))

    def _with_eos(self, ids: list[int], eos: int, key: tuple[int, int]) -> list[int]:
        return [*ids, eos] if len(ids) == len(self.own_ids[key]) else ids

    def truth(self, row: dict, context: str) -> np.ndarray:
        """float64 [tokens] of a row of `packed`, NaN where nothing precedes."""
        values = np.full(len(row["input_ids"]), np.nan)
        for start, end in spans(row, context):
            values[start + 1 : end] = self._truth[tuple(row["input_ids"][start:end])]
        return values

    def own_truth(self, key: tuple[int, int]) -> np.ndarray:
        """float64 [tokens - 1] of a document's beginning, the ids being the tokenizer's own."""
        ids = self.beginnings[key]
        return self._truth[tuple(self._with_eos(ids, self.tokenizer.eos_token_id, key))][: len(ids) - 1]

    def losses_behind(self) -> dict[str, float]:
        """Mean loss in nats per token of the same tokens behind BOS, behind nothing, behind EOS."""
        found = {}
        for name, sequences in self._variants.items():
            skip = 0 if name == "none" else 1  # the first text token has a log-prob only where something precedes it
            found[name] = -float(np.concatenate([self._truth[tuple(ids)][skip:] for ids in sequences]).mean())
        return found
