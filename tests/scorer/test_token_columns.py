"""Columns of token ids and what stands beside them: padding, masks, names with dots, bad rows, blocks of bounded size."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from inline_ray import pack_inline

from scorer.config import PackConfig
from scorer.faults import BadFile
from scorer.sources import find_sources
from scorer.tokens.blocks import TokenBlock
from scorer.tokens.documents import begins_with
from scorer.tokens.read import Reading, read_tokens
from shards import ShardFolder
from shards.side_table import fields_of
from shards.verify import verify_folder

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


def tokens_of(folder: ShardFolder) -> list[tuple[int, bool]]:
    """The ids of all rows in order, and whether each is to be predicted."""
    return [pair for row in rows_of(folder) for pair in zip(row["input_ids"], row["predict"])]


def test_labels_and_loss_masks_say_what_is_predicted(tmp_path: Path, written: Callable, tokenizer_folder: Path) -> None:
    ids = [[5, 6, 7, 0], [8], [9, 4, 0], [0], [3, 0]]
    told = [[0, 0, 1, 1], [1], [0, 1, 0], [1], [1, 1]]
    labels = [[one if mask else -100 for one, mask in zip(*pair)] for pair in zip(ids, told)]
    want = [(one, bool(mask)) for number in (0, 1, 2, 4) for one, mask in zip(ids[number], told[number])]
    want.insert(5, (0, True))  # the EOS that the second document lacks, as predicted as its last token
    rows = {
        "labels": [{"input_ids": one, "labels": label} for one, label in zip(ids, labels)],
        "loss_mask": [{"input_ids": one, "loss_mask": mask} for one, mask in zip(ids, told)],
        "both": [{"input_ids": one, "labels": label, "loss_mask": mask} for one, label, mask in zip(ids, labels, told)],
        "some": [
            {"input_ids": one, "labels": None if all(mask) else label} for one, label, mask in zip(ids, labels, told)
        ],
    }
    for name, one in rows.items():
        folder = pack_ids(tmp_path / name, written(one), tokenizer_folder)
        assert tokens_of(folder) == want
        assert not verify_folder(folder).problems


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"labels": [-100, 6, 0]}, "labels is 6 where the id is 5, expected the id or -100; labels are not shifted"),
        ({"labels": [5, 0]}, "labels has 2 values for 3 ids"),
        ({"labels": 1}, "labels is .* expected a list"),
        ({"loss_mask": [0, 1, 2]}, "loss_mask is 2, expected 0 or 1"),
        ({"labels": [4, -100, -100], "loss_mask": [1, 1, 0]}, "labels and loss_mask disagree"),
    ],
)
def test_masks_that_are_none_are_refused(
    tmp_path: Path, written: Callable, beside: dict, message: str, tokenizer_folder: Path
) -> None:
    with pytest.raises(BadFile, match=message):
        pack_ids(tmp_path / "out", written([{"input_ids": [4, 5, 0]} | beside]), tokenizer_folder)


def test_rows_that_were_cut_from_a_stream_are_refused(
    tmp_path: Path, written: Callable, tokenizer_folder: Path
) -> None:
    """Nothing says where their documents end, and an EOS behind each row would stand in the middle of text."""
    for number, (ids, message) in enumerate(
        [
            ([[5, 6, 0, 7], [8, 0, 9, 4], [4, 4, 0, 3]], "document 0 has EOS .* inside and none at its end"),
            ([[5, 0], [6, 0, 8]], "document 1 has EOS .* inside and none at its end"),
            ([[5, 6, 7], [8, 9, 4]], "document 0 does not end in EOS .* and all have 3 tokens"),
            ([[5, 6, 7], [8, 9, 4], [3, 3, 3], [1]], "and all have 3 tokens"),
        ]
    ):
        corpus = written([{"input_ids": one} for one in ids])
        with pytest.raises(BadFile, match=f"{message}.*pass --on-missing-eos append"):
            pack_ids(tmp_path / "out", corpus, tokenizer_folder)
        folder = pack_ids(tmp_path / f"out-{number}", corpus, tokenizer_folder, on_missing_eos="append")
        assert folder.manifest.corpus[0].eos_added == sum(one[-1] != 0 for one in ids)
    corpus = written([{"input_ids": one} for one in ([0, 5, 6], [0, 7], [8, 0])])  # EOS begins some documents
    assert pack_ids(tmp_path / "whole", corpus, tokenizer_folder).manifest.corpus[0].eos_added == 2


def test_names_with_a_dot(tmp_path: Path, written: Callable, tokenizer_folder: Path) -> None:
    """The column of that name first, then the one in an object, with the mask and the kept fields beside it."""
    inside = {"ids": [7, 8, 0], "loss_mask": [0, 1, 1], "url": "u"}
    corpus = written([{"a.ids": [5, 0], "a": {"ids": [1, 0]}, "meta": inside}])
    assert [row["input_ids"] for row in rows_of(pack_ids(tmp_path / "a", corpus, tokenizer_folder, "a.ids"))] == [
        [5, 0]
    ]
    folder = pack_ids(tmp_path / "b", corpus, tokenizer_folder, "meta.ids", keep_fields="meta.url,meta.ids")
    assert tokens_of(folder) == [(7, False), (8, True), (0, True)]
    assert fields_of(folder, 0, [0]) == {0: {"meta.ids": "[7, 8, 0]", "meta.url": "u"}}
    with pytest.raises(ValueError, match=r"meta\.nothing.*set --tokens-field"):
        pack_ids(tmp_path / "c", corpus, tokenizer_folder, "meta.nothing")


def test_one_bad_document_is_left_out_alone(tmp_path: Path, written: Callable, tokenizer_folder: Path) -> None:
    ids = [[5, 0], [6, None, 0], None, [7, 999_999, 0], [-1, 0], [8, 0]]
    corpus = written(
        [{"input_ids": one, "loss_mask": one and [1] * len(one), "u": str(i)} for i, one in enumerate(ids)]
    )
    settings = {"on_bad_document": "reject", "keep_fields": "u,input_ids"}
    folder = pack_ids(tmp_path / "out", corpus, tokenizer_folder, **settings)
    assert [row["input_ids"] for row in rows_of(folder)] == [[5, 0, 8, 0]]
    assert folder.manifest.documents == {"read": 6, "packed": 2, "empty": 0, "rejected": 4}
    kept = fields_of(folder, 0, list(range(6)))
    assert kept == {0: {"input_ids": "[5, 0]", "u": "0"}, 5: {"input_ids": "[8, 0]", "u": "5"}}
    with pytest.raises(ValueError, match=r"null|None"):
        pack_ids(tmp_path / "stop", corpus, tokenizer_folder)


def test_numbers_of_any_size_in_json_lines(tmp_path: Path, tokenizer_folder: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"input_ids": [5, 99999999999999999999999]}\n{"input_ids": [6, 0], "u": "\\ud800"}\n')
    settings = {"on_bad_document": "reject", "keep_fields": "u"}
    folder = pack_ids(tmp_path / "out", str(file), tokenizer_folder, **settings)
    assert [row["input_ids"] for row in rows_of(folder)] == [[6, 0]]
    assert folder.manifest.kept_fields == {"u": "json"}  # no table can hold half of a pair of surrogates
    assert list(fields_of(folder, 0, [1]).values()) == [{"u": '"\\ud800"'}]


def test_blocks_are_bounded_whatever_the_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows first, long ones behind them, in row groups of their own and in one."""
    monkeypatch.setattr("scorer.tokens.columns.BLOCK_TOKENS", 1000)
    ids = [[5]] * 2000 + [[6] * 400] * 30 + [[7] * 3000, [8]]
    type_ = pa.list_(pa.int32())
    schema = pa.schema([("input_ids", type_)])
    for number, cuts in enumerate(([0, 2000, len(ids)], [0, len(ids)])):
        with pyarrow.parquet.ParquetWriter(tmp_path / f"{number}.parquet", schema) as writer:
            for first, last in pairwise(cuts):
                writer.write_table(pa.table({"input_ids": pa.array(ids[first:last], type_)}))
        (source,) = find_sources([str(tmp_path / f"{number}.parquet")])
        blocks = list(read_tokens(source, Reading("input_ids", "auto", 521, 0), 1 << 27))
        assert max(len(block.ids) for block in blocks if len(block.lengths) > 1) <= 1000
        assert max(len(block.ids) for block in blocks) == 3000
        assert [length for block in blocks for length in block.lengths.tolist()] == [len(one) for one in ids]
        assert np.concatenate([block.ids for block in blocks]).tolist() == [token for one in ids for token in one]


def test_bos_is_judged_by_the_first_document_with_text() -> None:
    def block(*documents: list[int]) -> TokenBlock:
        lengths = np.array([len(ids) for ids in documents], np.int64)
        return TokenBlock(np.array([token for ids in documents for token in ids], np.int32), lengths)

    empty = ([], [0], [9, 0], [9])  # with BOS 9 and EOS 0
    assert begins_with(iter([block(*empty), block([0], [9, 5, 0], [6, 0])]), 9, 0) is True
    assert begins_with(iter([block(*empty, [5, 0], [9, 6, 0])]), 9, 0) is False
    assert begins_with(iter([block(*empty)]), 9, 0) is None
