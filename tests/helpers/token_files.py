"""Corpora of token ids, written by the libraries whose formats they are, or as their public descriptions say."""

import struct
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet

Documents = list[list[int]]


def flat(documents: Documents, dtype: str) -> np.ndarray:
    return np.array([token for ids in documents for token in ids], dtype=dtype)


def write_raw_npy(path: Path, documents: Documents, dtype: str = "uint16") -> Path:
    """As Dolma's tools write it, and as OLMo-core reads it: np.memmap, no header."""
    ids = flat(documents, dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.memmap(path, dtype=dtype, mode="w+", shape=(len(ids),))
    array[:] = ids
    array.flush()
    return path


def write_ds(folder: Path, documents: Documents, size: int = 2, loss: bool = False, metadata: bool = True) -> Path:
    """By datatrove."""
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile

    file = TokenizedFile(
        str(folder), "a.ds", save_loss_metadata=loss, token_size=size, save_final_metadata=metadata,
        tokenizer_name_or_path="some/tokenizer",
    )  # fmt: skip
    for ids in documents:
        file.write(ids, np.ones(len(ids)) if loss else None)
    file.close()
    return folder / "a.ds"


def write_megatron_by_datatrove(folder: Path, documents: Documents, size: int = 2) -> Path:
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile

    file = MegatronTokenizedFile(str(folder), "a", token_size=size)
    for ids in documents:
        file.write(ids)
    file.close()
    return folder / "a.bin"


def write_megatron(
    folder: Path, documents: list[Documents], dtype: str = "int32", code: int = 4, order: str = "<"
) -> Path:
    """As the documentation of Megatron Core's datasets describes it. documents: the sequences of each."""
    folder.mkdir(parents=True, exist_ok=True)
    sequences = [ids for document in documents for ids in document]
    size = np.dtype(dtype).itemsize
    (folder / "a.bin").write_bytes(
        b"".join(np.array(ids, dtype=order + dtype_code(dtype)).tobytes() for ids in sequences)
    )
    lengths = [len(ids) for ids in sequences]
    pointers = [size * sum(lengths[:index]) for index in range(len(lengths))]
    borders = [0]
    for document in documents:
        borders.append(borders[-1] + len(document))
    (folder / "a.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack(f"{order}QBQQ", 1, code, len(sequences), len(borders))
        + struct.pack(f"{order}{len(lengths)}i", *lengths)
        + struct.pack(f"{order}{len(pointers)}q", *pointers)
        + struct.pack(f"{order}{len(borders)}q", *borders)
    )
    return folder / "a.bin"


def dtype_code(dtype: str) -> str:
    """numpy's short name of a dtype, without its order."""
    return np.dtype(dtype).str[1:]


def write_parquet(path: Path, documents: Documents, type_: pa.DataType, **columns: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"input_ids": pa.array(documents, type_), **columns})
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    return path


def write_arrow(path: Path, documents: Documents, open_writer: Callable = pa.ipc.new_file) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"input_ids": pa.array(documents, pa.list_(pa.int32()))})
    with pa.OSFile(str(path), "wb") as file, open_writer(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    return path


def write_dataset(folder: Path, documents: Documents) -> Path:
    """By `datasets`: an Arrow stream."""
    datasets.Dataset.from_dict({"input_ids": documents}).save_to_disk(str(folder))
    return folder
