"""Folders of format 1: read as before, finished as they were begun, and given the sums of format 2 by remit upgrade."""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from counting import Reads
from damage import flip
from many_rows import write_many_rows

from pipelines.cli import main
from scorer.config import SelectConfig
from scorer.select import select
from shards import Manifest, ShardFolder
from shards.output_folder import as_begun, writing
from shards.record import encode_record, record_name
from shards.upgrade import upgrade
from shards.verify import verify_folder
from trainer.data import RowReader

PARTS = 3
BEFORE = Path(__file__).parent / "format1"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder as releases before format 2 wrote it."""
    write_many_rows(tmp_path / "old", num_rows=21, rows_per_part=8, format_version=1)
    return tmp_path / "old"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read(folder: Path, columns: tuple[str, ...] = ("rl_logprobs",)) -> list[dict]:
    return [rows.batch.to_pydict() for rows in ShardFolder(folder).batches(columns)]


def upgraded(folder: Path) -> int:
    shards = ShardFolder(folder)
    with writing(shards.store) as lease:
        return upgrade(shards, lease)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


def test_records_of_format_1_are_those_of_the_release_before(old: Path) -> None:
    record = json.loads((old / "_commits" / "part-00001.json").read_text())
    data = (old / "part-00001.arrow").read_bytes()
    assert record == {
        "part": "part-00001.arrow", "quarantined": {}, "rows": 8, "sha256": hashlib.sha256(data).hexdigest(),
        "size": len(data), "tokens": 320,
    }  # fmt: skip
    manifest = (old / "_manifest.json").read_bytes()
    first, _, rest = manifest.removeprefix(b"{\n").partition(b"\n")
    assert json.loads(b"{" + first[:-1] + b"}") == {"checksum": hashlib.sha256(rest).hexdigest()}
    assert json.loads(manifest)["format_version"] == 1


def test_a_folder_that_the_release_before_wrote(tmp_path: Path) -> None:
    """Its own files, which lie beside this test: packed and annotated by the commit before format 2 (6736884)."""
    folder = Path(shutil.copytree(BEFORE, tmp_path / "before"))
    words = [[(i * 3 + j) % 10 + 2 for j in range(1 + i % 7)] + [0] for i in range(13)]  # EOS is 0, the unknown word 1
    ids = list(itertools.chain(*words))
    rows = [ids[first : first + 8] for first in range(0, len(ids), 8)]
    logprobs = [[None, *[-(token + 1) / 64 for token in row[1:]]] for row in rows]
    logprobs[6] = [None] * len(rows[6])
    for _ in range(2):  # as it is, and with sums
        found = read(folder, ("input_ids", "rl_logprobs"))
        assert [row for batch in found for row in batch["input_ids"]] == rows
        assert [row for batch in found for row in batch["rl_logprobs"]] == logprobs
        report = verify_folder(ShardFolder(folder))
        assert (report.problems, report.quarantined, report.documents) == ([], {"rl": 1}, 13)
        trained = RowReader(ShardFolder(folder), "packed", "rl", 12)
        silent = [row.predicted.any() for block in range(len(trained.block_rows)) for row in trained.read_block(block)]
        assert silent == [number != 6 for number in range(len(rows))]
        assert upgraded(folder) in (2, 0)
    for name, data in files(BEFORE).items():
        assert (folder / name).read_bytes() == data
    again = tmp_path / "again"
    again.mkdir()
    ShardFolder(BEFORE).manifest.write(again)
    assert (again / "_manifest.json").read_bytes() == (BEFORE / "_manifest.json").read_bytes()
    for part in ("part-00000.arrow", "part-00001.arrow"):
        record = ShardFolder(BEFORE).record(part)
        assert encode_record(record) == (BEFORE / record_name(part)).read_bytes()
        (piece,) = json.loads((folder / record_name(part, "_sums")).read_text())["batches"][0]["columns"][-1:]
        flip(folder / part, piece["offset"] + piece["size"] // 2)
        with pytest.raises(ValueError, match=rf"{part}: record batch 0, rl_logprobs: sha256"):
            read(folder, ("input_ids", "rl_logprobs"))
        shutil.copyfile(BEFORE / part, folder / part)


def test_format_1_is_read_by_the_hash_of_the_whole_part(old: Path, tmp_path: Path) -> None:
    new = write_many_rows(tmp_path / "new", num_rows=21, rows_per_part=8)
    assert read(old) == [rows.batch.to_pydict() for rows in new.batches(("rl_logprobs",))]
    assert not verify_folder(ShardFolder(old)).problems
    for place in (0, 500, None, -12):  # also in the footer, and in columns that are not read
        data = (old / "part-00001.arrow").read_bytes()
        flip(old / "part-00001.arrow", place)
        with pytest.raises(ValueError, match=r"part-00001.arrow: sha256 .* differs from its commit record"):
            read(old)
        (old / "part-00001.arrow").write_bytes(data)


def test_an_upgraded_folder_is_read_by_its_sums(old: Path) -> None:
    before, rows = files(old), read(old)
    assert (upgraded(old), upgraded(old)) == (PARTS, 0)
    after = files(old)
    assert {name for name in after if name not in before} == {f"_sums/part-{index:05d}.json" for index in range(PARTS)}
    assert before.items() <= after.items()
    folder = ShardFolder(old)
    reads = Reads(folder.store)
    assert [one.batch.to_pydict() for one in folder.batches(("rl_logprobs",))] == rows
    assert (
        reads.of(".arrow") < sum(size for name, size in ((n, len(d)) for n, d in before.items()) if "part" in name) / 2
    )
    assert not verify_folder(ShardFolder(old)).problems
    assert ShardFolder(old).manifest.checksum == json.loads(before["_manifest.json"])["checksum"]


def test_the_sums_are_those_that_format_2_has(old: Path, tmp_path: Path) -> None:
    """The messages of a part are the same in both formats; its schema metadata is not, so places may differ."""
    write_many_rows(tmp_path / "new", num_rows=21, rows_per_part=8)
    upgraded(old)
    for index in range(PARTS):
        one = json.loads((old / "_sums" / f"part-{index:05d}.json").read_text())
        two = json.loads((tmp_path / "new" / "_commits" / f"part-{index:05d}.json").read_text())
        hashes = [[[b["sha256"], *(c["sha256"] for c in b["columns"])] for b in r["batches"]] for r in (one, two)]
        assert hashes[0] == hashes[1]


def test_damaged_sums_are_refused_and_made_again(old: Path) -> None:
    rows = read(old)
    upgraded(old)
    sums = old / "_sums" / "part-00001.json"
    sound = sums.read_bytes()
    for place in range(0, len(sound), 41):
        sums.write_bytes(sound)
        flip(sums, place)
        with pytest.raises(ValueError, match=r"_sums/part-00001.json: .*; run remit upgrade again"):
            read(old)
    assert verify_folder(ShardFolder(old)).bad_parts == ["part-00001.arrow"]
    assert upgraded(old) == 1
    assert sums.read_bytes() == sound
    shutil.copyfile(old / "_sums" / "part-00000.json", sums)
    with pytest.raises(ValueError, match="run remit upgrade again"):
        read(old)
    assert upgraded(old) == 1
    assert read(old) == rows


def test_damaged_parts_get_no_sums(old: Path) -> None:
    flip(old / "part-00001.arrow")
    with pytest.raises(ValueError, match=r"part-00001.arrow: sha256 .*; run remit verify --repair"):
        upgraded(old)
    assert not (old / "_sums" / "part-00001.json").exists()


def test_repair_takes_the_sums_out_too(old: Path) -> None:
    upgraded(old)
    flip(old / "part-00001.arrow")
    assert run("verify", old, "--repair") == 1
    assert not (old / "_sums" / "part-00001.json").exists()
    assert (old / "_sums" / "part-00000.json").exists()


def test_the_command(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (old / "_commits" / "part-00002.json").unlink()  # not finished yet
    assert run("upgrade", "--shards", old) == 0
    output, error = capsys.readouterr()
    assert f"2 parts got sums, 0 had them -> {old}" in output
    assert "1 of 3 parts are not committed yet" in error
    assert run("upgrade", old) == 0
    assert "0 parts got sums, 2 had them" in capsys.readouterr()[0]
    write_many_rows(tmp_path / "new")
    assert run("upgrade", tmp_path / "new") == 0
    assert "nothing to do: " in capsys.readouterr()[0]
    assert not (tmp_path / "new" / "_sums").exists()


@pytest.mark.usefixtures("starts_processes")
def test_killed_at_any_part(old: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(old, tmp_path / "whole"))
    upgraded(whole)
    command = [sys.executable, "-m", "pipelines.cli", "upgrade", str(old)]
    killed = subprocess.run(command, env=os.environ | {"REMIT_CRASH_AT": "driver.committed"}, capture_output=True)
    assert killed.returncode == -9
    assert 0 < len(list((old / "_sums").glob("part-*.json"))) <= PARTS
    assert read(old) == read(whole)
    (old / "_sums" / ".part-00002.json.1-0.tmp").write_bytes(b"half")
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert files(old) == files(whole)


def test_a_folder_is_finished_in_the_format_that_it_was_begun_in(old: Path, tmp_path: Path) -> None:
    plan = replace(ShardFolder(old).manifest, references={})
    assert as_begun(ShardFolder(old).store, plan).format_version == 1
    store = write_many_rows(tmp_path / "new").store
    assert as_begun(store, plan).format_version == Manifest.read(store).format_version == 2
    (tmp_path / "empty").mkdir()
    assert as_begun(type(store)(tmp_path / "empty"), plan).format_version == 2


def test_a_selection_that_an_earlier_release_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write_many_rows(tmp_path / "corpus", num_rows=60)
    settings = SelectConfig(str(tmp_path / "corpus"), "rl", "base", str(out), num_workers=1)
    with monkeypatch.context() as earlier:
        earlier.setattr("shards.output_folder.FORMAT_VERSION", 1)
        select(settings)
    whole = files(out)
    assert "batches" not in json.loads(whole["_commits/part-00001.json"])
    for name in ("part-00001.arrow", "_commits/part-00001.json"):
        (out / name).unlink()
    select(settings)
    assert files(out) == whole
    select(replace(settings, out=str(tmp_path / "new")))
    assert Manifest.read(tmp_path / "new").format_version == 2


def test_a_record_of_the_other_format_is_refused(old: Path, tmp_path: Path) -> None:
    new = write_many_rows(tmp_path / "new", num_rows=21, rows_per_part=8).path
    for there, here in ((old, new), (new, old)):
        folder = Path(shutil.copytree(here, tmp_path / f"mixed-{here.name}"))
        for file in ("part-00001.arrow", "_commits/part-00001.json"):
            shutil.copyfile(there / file, folder / file)
        with pytest.raises(ValueError, match=r"part-00001\.json: not of format . like its manifest"):
            read(folder)
