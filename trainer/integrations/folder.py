"""The folder that remit export writes for OLMo-core or Megatron: what is in it, and whether all of it is.

In: OUT/export.json. Out: names of the files of each column, how their numbers are stored, and what they are.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "export.json"
"""Written before the folder gets its name, so a folder that has one is whole."""
IDS, MASK, LENGTHS, DOCUMENTS = "input_ids", "label_mask", "lengths", "doc_lengths"
"""Columns that every export for these trainers has; those of log-probs are NAME_logprobs."""


@dataclass(frozen=True)
class Exported:
    """An export. to: the trainer it is for; context: in which the log-probs were scored; vocab_size: largest id + 1; columns: of
    each column its files in order and the dtype of their numbers; sizes: bytes of each file."""

    folder: Path
    to: str
    rows: int
    seq_len: int
    context: str
    vocab_size: int
    eos_token_id: int
    references: tuple[str, ...]
    columns: dict[str, dict[str, Any]]
    sizes: dict[str, int]

    @classmethod
    def open(cls, folder: Path | str, to: str) -> "Exported":
        """ValueError where there is no export for this trainer, or a file of it is missing or cut off."""
        folder = Path(folder)
        try:
            value = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{folder}: has no {INDEX}; write it with remit export --to {to}") from None
        if value["to"] != to:
            raise ValueError(f"{folder}: was exported for {value['to']}; write it again with remit export --to {to}")
        names = ("to", "rows", "seq_len", "context", "vocab_size", "eos_token_id", "columns", "sizes")
        found = cls(folder, references=tuple(value["references"]), **{name: value[name] for name in names})
        for name, size in found.sizes.items():
            there = (folder / name).stat().st_size if (folder / name).exists() else None
            if there != size:
                raise ValueError(
                    f"{folder / name}: {'missing' if there is None else f'{there:,} bytes'}, expected {size:,} bytes; "
                    "write the export again"
                )
        return found

    def reference(self, name: str | None) -> str:
        """The reference `name`, or the only one. ValueError where there is no such, or several and none is named."""
        if name is None and len(self.references) == 1:
            return self.references[0]
        if name not in self.references:
            raise ValueError(
                f"{self.folder}: has log-probs of {', '.join(self.references) or 'no reference'}, {name!r} asked for; name one"
            )
        return name

    def files(self, column: str) -> list[str]:
        """Paths of the files of a column."""
        return [str(self.folder / name) for name in self.columns[column]["files"]]
