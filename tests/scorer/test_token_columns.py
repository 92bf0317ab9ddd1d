"""Columns of token ids and what stands beside them: padding, masks, names with dots, bad rows, blocks of bounded size."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from inline_ray import pack_inline

from scorer.config import PackConfig
from scorer.faults import BadFile
from shards import ShardFolder

Write = Callable[[Path, list[dict]], str]


def _parquet(folder: Path, rows: list[dict]) -> str:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return str(folder / "a.parquet")


def _arrow(folder: Path, rows: list[dict]) -> str:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(str(folder / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    return str(folder / "a.arrow")


def _dataset(folder: Path, rows: list[dict]) -> str:
    _parquet(folder, rows)
    return f"{folder}::"


def _lines(folder: Path, rows: list[dict]) -> str:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "a.jsonl")


WRITERS: dict[str, Write] = {"parquet": _parquet, "arrow": _arrow, "dataset": _dataset, "lines": _lines}


@pytest.fixture(params=WRITERS)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[list[dict]], str]:
    """Writes rows as one of the readers takes them, and says what to name."""
    (tmp_path / "corpus").mkdir()
    return lambda rows: WRITERS[request.param](tmp_path / "corpus", rows)


def pack_ids(out: Path, corpus: str, tokenizer: Path, field: str = "input_ids", **settings: object) -> ShardFolder:
    more = {"seq_len": 16, "tokens_per_shard": 640, "tokens_field": field} | settings
    return pack_inline(PackConfig([corpus], str(tokenizer), str(out), **more))


def rows_of(folder: ShardFolder) -> list[dict]:
    rows = []
    for plan in folder.manifest.parts:
        reader = pa.ipc.open_file(folder.store.buffer(plan.name))
        rows += [row for index in range(reader.num_record_batches) for row in reader.get_batch(index).to_pylist()]
    return rows


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"attention_mask": [1, 1, 1, 0]}, "attention_mask is 0 somewhere, so it has padding among its ids"),
        ({"attention_mask": [1, 1]}, "attention_mask has 2 values for 4 ids"),
        ({"attention_mask": 1}, "attention_mask is .* expected a list"),
    ],
)
def test_padding_is_refused(
    tmp_path: Path, written: Callable, columns: dict, message: str, tokenizer_folder: Path
) -> None:
    whole = {"input_ids": [4, 0], "attention_mask": [1, 1]}
    if not isinstance(columns["attention_mask"], list):
        whole["attention_mask"] = 1
    corpus = written([whole, {"input_ids": [5, 6, 0, 9]} | columns])
    with pytest.raises(BadFile, match=message):
        pack_ids(tmp_path / "out", corpus, tokenizer_folder)
    assert not (tmp_path / "out").exists()


def test_a_whole_attention_mask_changes_nothing(tmp_path: Path, written: Callable, tokenizer_folder: Path) -> None:
    corpus = written([{"input_ids": [5, 0], "attention_mask": None}, {"input_ids": [6, 0], "attention_mask": [1, 1]}])
    folder = pack_ids(tmp_path / "out", corpus, tokenizer_folder)
    assert [row["input_ids"] for row in rows_of(folder)] == [[5, 0, 6, 0]]
    assert not folder.manifest.predict
