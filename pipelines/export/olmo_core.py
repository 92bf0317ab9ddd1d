"""OLMo-core's files: bare numbers without numpy's header, one set of files a part, in which every row has seq_len tokens.

X.npy has token ids, X_label_mask.npy a byte each, X_NAME_logprobs.npy float32. NumpyFSLDataset with sequence_length = seq_len then
gives row after row. Short rows are padded with EOS, which the mask leaves out; X_lengths.npy, int32 [rows, 2], has the tokens and
document pieces of each row, X_doc_lengths.npy, int32, the tokens of each piece.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.export.tokens import Plan, eos_of
from scorer.tokens.npy import smallest_dtype
from shards.rows import Rows
from shards.schema import logprobs_column
from trainer.integrations.folder import DOCUMENTS, IDS, LENGTHS, MASK


class OlmoCoreFiles:
    """Writes the parts of an export into `folder`."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self.dtypes = {IDS: smallest_dtype(plan.manifest.tokenizer["vocab_size"]), MASK: "bool"}
        self.dtypes |= {logprobs_column(name): "float32" for name in plan.names} | {
            LENGTHS: "int32",
            DOCUMENTS: "int32",
        }

    @property
    def read_columns(self) -> list[str] | None:
        return self.plan.columns

    @property
    def bytes_per_token(self) -> float:
        """Of the files, about."""
        return sum(
            np.dtype(dtype).itemsize for column, dtype in self.dtypes.items() if column not in (LENGTHS, DOCUMENTS)
        )

    def name(self, part: str, column: str) -> str:
        stem = part.removesuffix(".arrow")
        return f"{stem}.npy" if column == IDS else f"{stem}_{column}.npy"

    def write_part(self, index: int, batches: Iterable[Rows]) -> list[str]:
        """Returns the names of the files."""
        part = self.plan.manifest.parts[index].name
        names = {column: self.name(part, column) for column in self.dtypes}
        files = {column: open(self.folder / name, "wb") for column, name in names.items()}  # noqa: SIM115
        try:
            for rows in batches:
                for column, values in self._padded(rows).items():
                    files[column].write(np.ascontiguousarray(values).data)
        finally:
            for file in files.values():
                file.close()
        return list(names.values())

    def _padded(self, rows: Rows) -> dict[str, np.ndarray]:
        """The columns of a batch, those of tokens [rows, seq_len]."""
        arrays = self.plan.arrays(rows, self.dtypes[IDS])
        shape = (len(rows), self.plan.manifest.seq_len)
        present = np.arange(shape[1])[None] < rows.lengths[:, None]
        fill: dict[str, Any] = {IDS: eos_of(self.plan.manifest), MASK: False}
        found = {
            LENGTHS: np.stack([rows.lengths, rows.pieces], axis=1).astype(np.int32),
            DOCUMENTS: arrays.pop(DOCUMENTS).astype(np.int32),
        }
        for column, values in arrays.items():
            found[column] = np.full(shape, fill.get(column, np.nan), dtype=self.dtypes[column])
            found[column][present] = values
        return found

    def finish(self) -> dict[str, Any]:
        """What the index says of the columns."""
        parts = [part.name for part in self.plan.manifest.parts]
        return {
            column: {"dtype": dtype, "files": [self.name(part, column) for part in parts]}
            for column, dtype in self.dtypes.items()
        }
