"""A small corpus, what pack and score make of it when nothing happens, and the commands that do it."""

import shutil
from pathlib import Path

from conftest import make_model, source_texts, write_corpus
from processes import Command, content

SEQ_LEN, ROWS_PER_PART = 48, 20


class Faulty:
    """corpus, tokenizer, model: inputs; packed, scored: outputs of undisturbed runs."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.folder, self.corpus, self.tokenizer, self.model = folder, folder / "corpus", tokenizer, folder / "model"
        self.packed, self.scored = folder / "packed", folder / "scored"
        if self.scored.exists():
            self.num_parts = len(list(self.packed.glob("part-*.arrow")))
            assert self.num_parts >= 6
            self._content = {"pack": content(self.packed), "score": content(self.scored)}

    @classmethod
    def build(cls, folder: Path, tokenizer: Path) -> None:
        """Make what such an object has, in an empty folder."""
        faulty = cls(folder, tokenizer)
        for index in range(3):
            write_corpus(faulty.corpus / f"{index}.jsonl", source_texts(40, seed=20 + index))
        shutil.copytree(tokenizer, make_model(faulty.model), dirs_exist_ok=True)
        for name, out in (("pack", faulty.packed), ("score", faulty.scored)):
            run = Command(folder, *faulty.command(name, out))
            assert run.finish() == 0, run.errors

    def command(self, name: str, out: Path, *more: object, engines: int | None = 1) -> list[object]:
        """engines: how many score, each of which takes a second to start; None for all that there is room for."""
        if name == "pack":
            return [
                "pack", "--corpus", self.corpus, "--tokenizer", self.tokenizer, "--out", out, "--seq-len", SEQ_LEN,
                "--tokens-per-shard", SEQ_LEN * ROWS_PER_PART, *more,
            ]  # fmt: skip
        number = () if engines is None else ("--num-engines", engines)
        score: list[object] = [
            "score",
            "--shards",
            self.packed,
            "--model",
            self.model,
            "--out",
            out,
            "--engine",
            "fake",
        ]
        return [*score, *number, *more]

    def undisturbed(self, name: str) -> dict[str, bytes]:
        return self._content[name]
