"""What verify alone can see. What each reader must see is in test_damage.py, damage of any byte in test_sums.py."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from damage import REFERENCE, TOKENIZER_JSON, rows, write_folder

from shards import ShardFolder, row_schema, write_part
from shards.record import encode_record, read_record, record_name
from shards.schema import has_predecessor
from shards.verify import verify_folder
from trainer.data import RowReader


def test_sound_folder_has_no_problems(tmp_path: Path) -> None:
    report = verify_folder(write_folder(tmp_path, rows()))
    assert report.problems == []
    assert (report.parts, report.rows, report.tokens, report.documents, report.logprobs) == (2, 4, 14, 3, {"rl": 10})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["input_ids"][1].__setitem__(1, 5), "does not end in EOS"),
        (lambda v: v["doc_ids"][2].__setitem__(0, 5), "out of order"),
        (lambda v: v["doc_ids"][3].__setitem__(0, 3), "does not end in EOS"),
        (lambda v: v["input_ids"][3].__setitem__(1, 7), "its last document does not end in EOS"),
    ],
)
def test_broken_invariants_are_named(tmp_path: Path, change: Callable, message: str) -> None:
    values = rows()
    change(values)
    problems = verify_folder(write_folder(tmp_path, values)).problems
    assert any(message in problem for problem in problems), problems


SELECTIONS = ({"rows_read": 9, "rows_kept": 3},)


def without_row(values: dict[str, list], row: int) -> dict[str, list]:
    return {name: [*column[:row], *column[row + 1 :]] for name, column in values.items()}


@pytest.mark.parametrize("row", range(4))
def test_a_selection_may_lack_any_row(tmp_path: Path, row: int) -> None:
    values = without_row(rows(), row)
    report = verify_folder(write_folder(tmp_path / "selected", values, documents=5, selections=SELECTIONS))
    assert report.problems == []
    assert report.documents == len({document for documents in values["doc_ids"] for document in documents})
    assert verify_folder(write_folder(tmp_path / "packed", values, documents=5)).problems


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["input_ids"][1].__setitem__(2, 5), "does not end in EOS"),
        (lambda v: v["doc_ids"][0].__setitem__(0, 2), "out of order"),
        (lambda v: v["doc_ids"][1].__setitem__(1, 1), "out of order"),
    ],
)
def test_all_else_holds_for_a_selection(tmp_path: Path, change: Callable, message: str) -> None:
    values = without_row(rows(), 1)
    change(values)
    problems = verify_folder(write_folder(tmp_path, values, selections=SELECTIONS)).problems
    assert any(message in problem for problem in problems), problems


def test_a_row_after_a_short_row(tmp_path: Path) -> None:
    values = rows()
    for column in ("input_ids", "rl_logprobs"):
        values[column][0].pop()
    values["doc_lengths"][0] = [3]
    assert any("short last row" in problem for problem in verify_folder(write_folder(tmp_path, values)).problems)


def test_counts_are_recounted(tmp_path: Path) -> None:
    problems = verify_folder(write_folder(tmp_path, rows(), documents=4)).problems
    assert any("3 documents found, the manifest says 4" in problem for problem in problems)


def copy_record_for(folder: ShardFolder, part: str) -> None:
    """Have the record of a part say that it belongs to this manifest."""
    record = read_record(folder.store, part)
    assert record is not None
    record = replace(record, manifest_sha256=folder.manifest.checksum)
    folder.store.replace(record_name(part), encode_record(record))


def test_parts_of_another_folder_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", rows())
    other = write_folder(tmp_path / "b", rows(), references={"rl": REFERENCE | {"model": "other"}})
    for file in ("part-00001.arrow", "_commits/part-00001.json"):
        shutil.copyfile(other.path / file, folder.path / file)
    assert any("not of a part of this manifest" in problem for problem in verify_folder(folder).problems)
    copy_record_for(folder, "part-00001.arrow")
    assert any("schema metadata" in problem for problem in verify_folder(folder).problems)


def test_another_or_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, rows())
    file = tmp_path / "_tokenizer" / "tokenizer.json"
    file.write_text(json.dumps(TOKENIZER_JSON | {"added_tokens": [{"id": 2, "content": "<pad>", "special": True}]}))
    assert "is not the tokenizer of the manifest" in verify_folder(folder).problems[0]
    file.write_text('{"model"')
    assert "damaged" in verify_folder(folder).problems[0]
    file.unlink()
    assert "missing" in verify_folder(folder).problems[0]


def test_missing_extra_and_uncommitted_parts(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, rows())
    shutil.copyfile(tmp_path / "part-00001.arrow", tmp_path / "part-00007.arrow")
    (tmp_path / "part-00001.arrow").unlink()
    (tmp_path / "_commits" / "part-00000.json").unlink()
    problems = " ".join(verify_folder(folder).problems)
    assert "part-00000.arrow: not committed" in problems
    assert "part-00001.arrow: is committed but missing" in problems
    assert "part-00007.arrow: is not in the manifest" in problems
    with pytest.raises(ValueError, match="1 of 2 parts are not committed"):
        RowReader(folder, "packed", "rl", 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["parts"][0].__setitem__("name", "../part-00000.arrow"), "not of the form"),
        (lambda m: m["corpus"][0].__setitem__("path", "/etc/passwd"), "not relative"),
        (lambda m: m["corpus"][0].__setitem__("path", "../x"), "not relative"),
        (lambda m: m.__setitem__("format_version", 99), "format version 99"),
        (lambda m: m.__setitem__("format", "other"), "not a remit shard folder"),
        (lambda m: m["parts"][1].__setitem__("tokens", 7), "tokens in parts"),
        (lambda m: m.__setitem__("seq_len", 0), "seq_len is 0"),
        (lambda m: m.pop("tokenizer"), "tokenizer"),
        (lambda m: m["documents"].__setitem__("read", 9), "do not agree"),
    ],
)
def test_manifest_is_checked(tmp_path: Path, change: Callable, message: str) -> None:
    write_folder(tmp_path, rows())
    manifest = json.loads((tmp_path / "_manifest.json").read_text())
    change(manifest)
    (tmp_path / "_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        ShardFolder(tmp_path)


def test_committed_parts_are_never_overwritten_and_orphans_are(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, rows())
    part, schema = "part-00000.arrow", row_schema(("rl",))
    batch = folder.open_part(part).get_batch(0)
    with pytest.raises(ValueError, match="committed already"):
        write_part(tmp_path, part, schema, folder.part_metadata(part), [batch])
    before = (tmp_path / part).read_bytes()
    (tmp_path / "_commits" / "part-00000.json").unlink()
    (tmp_path / part).write_bytes(b"half a part of a run that died")
    write_part(tmp_path, part, schema, folder.part_metadata(part), [batch])
    assert (tmp_path / part).read_bytes() == before
    assert not verify_folder(folder).problems


def test_a_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "_commits").mkdir()

    def batches():
        yield pa.record_batch([[[1]], [[1]], [[0]], [0]], schema=row_schema())
        raise RuntimeError("the engine died")

    with pytest.raises(RuntimeError, match="engine died"):
        write_part(tmp_path, "part-00000.arrow", row_schema(), {}, batches())
    assert [path.name for path in tmp_path.iterdir()] == ["_commits"]


def test_predecessors_by_hand() -> None:
    rows_, pieces = np.array([4, 1, 3]), np.array([1, 3, 1, 2, 1])
    assert has_predecessor(rows_, pieces, "packed").astype(int).tolist() == [0, 1, 1, 1, 0, 0, 1, 1]
    assert has_predecessor(rows_, pieces, "document").astype(int).tolist() == [0, 0, 1, 1, 0, 0, 1, 0]
