"""What a manifest says of a corpus file: its identity, and what was counted as it was packed."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CorpusFile:
    """One corpus file as it was packed.

    path: relative to the corpus; of a dataset NAME:CONFIG:SPLIT#SHARD-of-COUNT, which of the hub is hf://NAME@REVISION
    and has no size and sha256.
    documents_read = documents_packed + documents_empty + documents_rejected.
    Folders packed by earlier releases have none of the next four: bos_tokens: of the tokens those that pack put in front
    of document pieces; unknown_tokens: those with the id that stands for text the tokenizer cannot spell;
    documents_sampled, documents_changed: documents that were decoded again from the rows, and those of them that did not
    come back as they were.
    left_out: why nothing of the file was packed (--on-bad-file reject); "" for all others.
    Of token ids alone: documents_with_bos: those that began with BOS; eos_added: those that pack ended with EOS; beside: sha256
    of the files beside it (an index, a mask), by name.
    fields_sha256: of the table with the fields that are kept of its documents (shards/side_table.py), None without one.
    predicted_tokens: of the tokens those that are to be predicted; None where the folder has no such column, or rows were
    selected. without_eos: documents that do not end in EOS, as they were found; None where each does.
    """

    path: str
    size: int | None
    sha256: str | None
    documents_read: int
    documents_packed: int
    documents_empty: int
    documents_rejected: int
    rows: int
    tokens: int
    bos_tokens: int | None = None
    unknown_tokens: int | None = None
    documents_sampled: int | None = None
    documents_changed: int | None = None
    left_out: str = ""
    documents_with_bos: int | None = None
    eos_added: int | None = None
    beside: dict[str, str] | None = None
    fields_sha256: str | None = None
    predicted_tokens: int | None = None
    without_eos: int | None = None

    def entry(self) -> dict[str, Any]:
        """As a JSON object, without what says nothing: left_out, or what an earlier release did not count."""
        always = ("size", "sha256")
        return {name: value for name, value in vars(self).items() if name in always or value not in (None, "")}
