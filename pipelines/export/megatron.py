"""Megatron's indexed datasets: NAME.bin with numbers and NAME.idx with where each row begins; a row is a sequence and a document.

tokens has the ids, label_mask a byte each, NAME_logprobs float32, doc_lengths the tokens of each document piece of a row. Layout of
.idx: see scorer/tokens/megatron.py, which reads it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.export.tokens import Plan
from scorer.tokens.heads import INDEX_MARK
from scorer.tokens.megatron import CODES, HEADER
from shards.rows import Rows
from shards.schema import logprobs_column
from trainer.integrations.folder import DOCUMENTS, IDS, MASK

SMALL_VOCABULARY = 65_500  # below it Megatron keeps ids as uint16, else as int32
ROWS_AT_ONCE = 1 << 20


class MegatronFiles:
    """Appends the parts of an export to files in `folder`, and writes their indexes at the end."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        small = plan.manifest.tokenizer["vocab_size"] < SMALL_VOCABULARY
        self.dtypes = {IDS: "uint16" if small else "int32", MASK: "uint8", DOCUMENTS: "int32"}
        self.dtypes |= {logprobs_column(name): "float32" for name in plan.names}
        self._lengths = {column: ".pieces" if column == DOCUMENTS else ".lengths" for column in self.dtypes}

    @property
    def read_columns(self) -> list[str] | None:
        return self.plan.columns

    @property
    def bytes_per_token(self) -> float:
        return sum(np.dtype(dtype).itemsize for column, dtype in self.dtypes.items() if column != DOCUMENTS)

    @staticmethod
    def stem(column: str) -> str:
        return "tokens" if column == IDS else column

    def write_part(self, index: int, batches: Iterable[Rows]) -> list[str]:
        """Returns the names of the files, which have grown."""
        names = {column: f"{self.stem(column)}.bin" for column in self.dtypes} | {
            name: name for name in (".lengths", ".pieces")
        }
        files = {column: open(self.folder / name, "ab") for column, name in names.items()}  # noqa: SIM115
        try:
            for rows in batches:
                arrays = self.plan.arrays(rows, self.dtypes[IDS]) | {".lengths": rows.lengths, ".pieces": rows.pieces}
                for column, values in arrays.items():
                    dtype = self.dtypes.get(column, "int32")
                    files[column].write(np.ascontiguousarray(values, dtype=dtype).data)
        finally:
            for file in files.values():
                file.close()
        return list(names.values())

    def finish(self) -> dict[str, Any]:
        """Write the indexes. Returns what the index of the export says of the columns."""
        for column, dtype in self.dtypes.items():
            lengths = np.fromfile(self.folder / self._lengths[column], np.int32)
            write_index(self.folder / f"{self.stem(column)}.idx", lengths, dtype)
        return {
            column: {"dtype": dtype, "files": [f"{self.stem(column)}.bin"]} for column, dtype in self.dtypes.items()
        }


def write_index(path: Path, lengths: np.ndarray, dtype: str) -> None:
    """X.idx of sequences of so many numbers each, every one a document."""
    code = next(code for code, name in CODES.items() if name == dtype)
    with open(path, "wb") as file:
        file.write(HEADER.pack(INDEX_MARK.ljust(9, b"\0"), 1, code, len(lengths), len(lengths) + 1))
        file.write(lengths.astype("<i4").data)
        first = 0
        for start in range(0, len(lengths), ROWS_AT_ONCE):
            ends = first + np.cumsum(lengths[start : start + ROWS_AT_ONCE].astype(np.int64)) * np.dtype(dtype).itemsize
            file.write(np.concatenate([[first], ends[:-1]]).astype("<i8").data)
            first = int(ends[-1])
        for start in range(0, len(lengths) + 1, ROWS_AT_ONCE):
            file.write(np.arange(start, min(len(lengths) + 1, start + ROWS_AT_ONCE), dtype="<i8").data)
