"""A repository of the datasets library: the rows of the shards as parquet files, data/train-00000-of-00004.parquet, and a card.

Columns are those of the shards, with their types, so datasets.load_dataset("OUT") gives the same rows.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.export.card import dataset_card
from shards.entropy import entropy_columns
from shards.folder import TOKEN_IDS, ShardFolder
from shards.output_folder import open_store
from shards.rows import Rows
from shards.schema import logprobs_column, sample_column, topk_columns

CARD = "README.md"
TOKENIZER = "tokenizer"


class ParquetFiles:
    """Writes the parts of an export into `folder`. names: references whose columns are written; measured: for the card."""

    def __init__(
        self, folder: Path, shards: ShardFolder, names: tuple[str, ...], measured: list[dict[str, Any]]
    ) -> None:
        self.folder, self.shards, self.names, self.measured = folder, shards, names, measured
        self.schema = pa.schema(
            [field for field in shards.schema if field.name not in {*_columns_of_others(shards, names)}]
        )

    @property
    def read_columns(self) -> list[str] | None:
        return self.schema.names

    @property
    def bytes_per_token(self) -> float:
        return self.shards.store.used_bytes() / max(1, self.shards.manifest.tokens)

    def name(self, index: int) -> str:
        return f"data/train-{index:05d}-of-{len(self.shards.manifest.parts):05d}.parquet"

    def write_part(self, index: int, batches: Iterable[Rows]) -> list[str]:
        """Returns the name of the file."""
        path = self.folder / self.name(index)
        path.parent.mkdir(exist_ok=True)
        with pq.ParquetWriter(path, self.schema, compression="zstd") as writer:
            for rows in batches:
                writer.write_batch(
                    pa.RecordBatch.from_arrays([rows.batch.column(n) for n in self.schema.names], schema=self.schema)
                )
        return [self.name(index)]

    def finish(self) -> dict[str, Any]:
        """Write the tokenizer and the card. Returns what the index of the export says of the columns."""
        for name in self.shards.tokenizer_files():
            if name != TOKEN_IDS:
                open_store(self.folder / TOKENIZER).replace(name, self.shards.tokenizer_file(name))
        card = dataset_card(self.shards.manifest, self.names, self.measured)
        (self.folder / CARD).write_text(card, encoding="utf-8")
        files = [self.name(index) for index in range(len(self.shards.manifest.parts))]
        return {field.name: {"dtype": str(field.type), "files": files} for field in self.schema}


def _columns_of_others(shards: ShardFolder, names: tuple[str, ...]) -> list[str]:
    """Columns of the references that are not among `names`."""
    found = []
    for name, reference in shards.manifest.references.items():
        if name not in names:
            found += [
                logprobs_column(name),
                *topk_columns(name),
                sample_column(name),
                *entropy_columns(name, reference),
            ]
    return found


def read_measured(paths: Iterable[Path], shards: ShardFolder) -> list[dict[str, Any]]:
    """What remit verify --model --json wrote, of references of `shards`; ValueError where a file is something else."""
    found = []
    for path in paths:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            name = value["reference"]
            _ = value["mean"], value["max"], value["tokens"], value["rows"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--verified {path}: cannot be read as figures of remit verify --model MODEL --json FILE "
                f"({type(error).__name__}: {error})"
            ) from None
        shards.require_reference(name)
        found.append(value)
    return found
