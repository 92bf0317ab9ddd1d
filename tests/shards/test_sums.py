"""A reader hashes what it reads, reads what it needs, and gives no row of which a bit is not what was written."""

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from counting import Reads
from many_rows import COLUMNS, write_many_rows
from s3_server import REGION, S3Server

from shards import ShardFolder
from shards.contract import check
from shards.folder import ShardFolder as Folder
from shards.verify import verify_folder

PAGE = Path(__file__).parents[2] / "docs" / "shard-format.md"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sums") / "scored"
    write_many_rows(folder, num_rows=20)
    return folder


@pytest.fixture
def bad(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "bad"))


@pytest.fixture(scope="module")
def server(starts_processes: None) -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "y"), ("DEFAULT_REGION", REGION),
                        ("ENDPOINT_URL", server.endpoint)):  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    return server


def read_all(folder: Folder | Path | str, columns: tuple[str, ...] | None) -> list[dict]:
    """Every record batch in turn, checked as the trainer does it."""
    folder = folder if isinstance(folder, ShardFolder) else ShardFolder(folder)
    return [rows.batch.to_pydict() for rows in folder.batches(columns)]


def library_rows(folder: Path, columns: tuple[str, ...]) -> list[dict]:
    """The same by pyarrow's reader of files."""
    found = []
    for path in sorted(folder.glob("part-*.arrow")):
        reader = pa.ipc.open_file(path)
        batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        found += [{name: batch.column(name).to_pylist() for name in columns} for batch in batches]
    return found


def records(folder: Path) -> dict[str, dict]:
    paths = sorted((folder / "_commits").glob("*.json"))
    return {f"{path.stem}.arrow": json.loads(path.read_text()) for path in paths}


def places_of(record: dict, columns: tuple[str, ...]) -> list[range]:
    """Where the bytes are of which a reader of `columns` makes rows."""
    found = []
    for batch in record["batches"]:
        pieces = [batch, *(entry for entry in batch["columns"] if entry["name"] in columns)]
        found += [range(piece["offset"], piece["offset"] + piece["size"]) for piece in pieces]
    return found


@pytest.mark.parametrize("objective", COLUMNS)
def test_rows_are_those_of_pyarrow(sound: Path, objective: str) -> None:
    asked, read = COLUMNS[objective]
    assert read_all(sound, asked) == library_rows(sound, read)


def test_sums_cover_every_record_batch(sound: Path) -> None:
    """The pieces are hashed and put together by hand: each message is whole, and decodes to what pyarrow has there."""
    for part, record in records(sound).items():
        data, reader = (sound / part).read_bytes(), pa.ipc.open_file(sound / part)
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (record["sha256"], record["size"])
        assert len(record["batches"]) == reader.num_record_batches > 1
        for index, batch in enumerate(record["batches"]):
            message = b""
            for piece in (batch, *batch["columns"]):
                here = data[piece["offset"] : piece["offset"] + piece["size"]]
                assert hashlib.sha256(here).hexdigest() == piece["sha256"]
                assert piece["offset"] == batch["offset"] + len(message)
                message += here
            decoded = pa.ipc.read_record_batch(pa.ipc.read_message(message), reader.schema)
            assert decoded.equals(reader.get_batch(index))


# --- damage ---------------------------------------------------------------------------------------------


def problems_of(folder: Path) -> list[str]:
    try:
        return verify_folder(ShardFolder(folder)).problems
    except ValueError as error:  # the manifest itself cannot be read
        return [str(error)]


def spoil(data: bytes, rng: random.Random, cut: bool) -> tuple[bytes, int]:
    """With a bit flipped, or less of it; and where."""
    if cut:
        place = rng.randrange(len(data))
        return data[:place], place
    bit = rng.randrange(8 * len(data))
    spoiled = bytearray(data)
    spoiled[bit // 8] ^= 1 << bit % 8
    return bytes(spoiled), bit // 8


def test_no_flipped_bit_is_read(sound: Path, bad: Path) -> None:
    """Parts, records and manifest. Whoever reads a piece refuses it; what nobody reads of a part, verify sees."""
    rng, known = random.Random(0), records(sound)
    targets = [*known, *(f"_commits/{part.replace('.arrow', '.json')}" for part in known), "_manifest.json"]
    for objective, (asked, read) in COLUMNS.items():
        expected, refused = read_all(sound, asked), 0
        for trial in range(110):
            target, cut = rng.choice(targets), trial >= 100
            (bad / target).write_bytes((data := spoil((sound / target).read_bytes(), rng, cut))[0])
            if trial % 4 == 0:
                assert problems_of(bad), (target, trial)
            seen = cut or target not in known or any(data[1] in place for place in places_of(known[target], read))
            refused += seen
            if seen:
                with pytest.raises(ValueError, match=r"part-|_manifest"):
                    read_all(bad, asked)
            else:
                assert read_all(bad, asked) == expected, (objective, target, trial)
            shutil.copyfile(sound / target, bad / target)
        assert refused > 50, objective


def test_every_piece_is_hashed(sound: Path, bad: Path) -> None:
    """One flip in each piece of a part: metadata and columns are named, and only by those who read them."""
    part, record = next(iter(records(sound).items()))
    data = (sound / part).read_bytes()
    for number, batch in enumerate(record["batches"]):
        for piece in (batch, *batch["columns"]):
            place = piece["offset"] + piece["size"] // 2
            (bad / part).write_bytes(data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :])
            name = piece.get("name", "metadata")
            message = f"{part}: record batch {number}, {name}: sha256 .* differs from its commit record"
            assert re.search(message, "".join(problems_of(bad)))
            for asked, read in COLUMNS.values():
                if name in (*read, "metadata"):
                    with pytest.raises(ValueError, match=message):
                        read_all(bad, asked)
                else:
                    assert read_all(bad, asked) == read_all(sound, asked)


def test_bytes_that_no_reader_needs_are_checked_by_verify(sound: Path, bad: Path) -> None:
    part, record = next(iter(records(sound).items()))
    data = (sound / part).read_bytes()
    first, last = record["batches"][0]["offset"], record["batches"][-1]["columns"][-1]
    for place in (0, first // 2, first - 1, last["offset"] + last["size"], len(data) - 12, len(data) - 1):
        (bad / part).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert read_all(bad, ("input_ids",)) == read_all(sound, ("input_ids",))
        assert any(f"{part}: sha256" in problem for problem in problems_of(bad))


def test_records_of_other_parts_and_folders(sound: Path, bad: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_many_rows(other, seed=1)
    for file in ("part-00001.arrow", "_commits/part-00001.json"):
        shutil.copyfile(other / file, bad / file)
    with pytest.raises(ValueError, match=r"part-00001\.arrow: (record batch|its commit record)"):
        read_all(bad, ("input_ids",))
    shutil.copyfile(sound / "_commits" / "part-00000.json", bad / "_commits" / "part-00001.json")
    with pytest.raises(ValueError, match=r"part-00001.json: not the commit record of part-00001\.arrow, or altered"):
        read_all(bad, ("input_ids",))
    (bad / "part-00001.arrow").unlink()
    (bad / "part-00001.arrow").symlink_to(sound / "part-00001.arrow")
    shutil.copyfile(sound / "_commits" / "part-00001.json", bad / "_commits" / "part-00001.json")
    with pytest.raises(ValueError, match="is a symbolic link"):
        read_all(bad, ("input_ids",))


def forge(record: Path, change: Callable[[dict], object]) -> None:
    """Change a record, and give it the checksum of its new bytes."""
    value = json.loads(record.read_text())
    del value["checksum"]
    change(value)
    rest = json.dumps(value, indent=1, sort_keys=True).removeprefix("{\n") + "\n"
    record.write_text(f'{{\n "checksum": "{hashlib.sha256(rest.encode()).hexdigest()}",\n{rest}')


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value["batches"].reverse(),
        lambda value: value["batches"].append(value["batches"][-1]),
        lambda value: value["batches"].__setitem__(1, value["batches"][0]),
        *(
            lambda value, rows=rows: value["quarantined"].update(rl=rows)
            for rows in (3, None, "0", ["0"], [[0]], {"0": 1}, [True], [0.0], [-1], [8])
        ),
    ],
)
def test_records_with_a_checksum_that_cannot_be(bad: Path, change: Callable[[dict], object]) -> None:
    record = bad / "_commits" / "part-00001.json"
    forge(record, lambda value: None)
    read_all(bad, ("input_ids",))
    forge(record, change)
    with pytest.raises(
        ValueError, match=r"part-00001\.json: not the commit record of part-00001\.arrow, or altered; run"
    ) as seen:
        read_all(bad, ("input_ids",))
    assert "\n" not in str(seen.value)


def test_records_of_references_that_are_not_there(bad: Path) -> None:
    forge(bad / "_commits" / "part-00001.json", lambda value: value.update(quarantined={"nobody": [0]}))
    with pytest.raises(
        ValueError, match=r"lists rows that 'nobody' could not score, which is no reference of the manifest"
    ):
        read_all(bad, ("input_ids",))


@pytest.mark.parametrize("name", ["_commits/part-00001.json", "_manifest.json", "_sums/part-00001.json"])
def test_json_that_is_nested_too_deep(bad: Path, tmp_path: Path, name: str) -> None:
    folder = bad
    if name.startswith("_sums"):
        folder = tmp_path / "one"
        write_many_rows(folder, format_version=1)
        (folder / "_sums").mkdir()
    (folder / name).write_bytes(b"[" * 100_000)
    with pytest.raises(ValueError, match=rf"{name}: not valid JSON \(maximum recursion depth exceeded") as seen:
        read_all(folder, ("input_ids",))
    assert "\n" not in str(seen.value)


def test_a_part_that_goes_away_while_it_is_read(sound: Path, bad: Path) -> None:
    rows = ShardFolder(bad).open_rows("part-00000.arrow", ["input_ids"])
    check(rows.batch(0))
    data = (bad / "part-00000.arrow").read_bytes()
    (bad / "part-00000.arrow").write_bytes(data[: records(sound)["part-00000.arrow"]["batches"][1]["offset"] + 20])
    with pytest.raises(ValueError, match=r"the file ends at byte .* its commit record says otherwise"):
        rows.batch(1)
    (bad / "part-00000.arrow").unlink()
    with pytest.raises(ValueError, match="is committed but missing"):
        rows.batch(0)


# --- what is read ---------------------------------------------------------------------------------------


def needed(folder: Path, read: tuple[str, ...]) -> int:
    return sum(len(place) for record in records(folder).values() for place in places_of(record, read))


@pytest.mark.parametrize("objective", COLUMNS)
def test_an_epoch_reads_the_needed_columns_once(sound: Path, objective: str) -> None:
    asked, read = COLUMNS[objective]
    folder = ShardFolder(sound)
    reads = Reads(folder.store)
    read_all(folder, asked)
    assert reads.of(".arrow") == needed(sound, read) < sum(record["size"] for record in records(sound).values())
    assert reads.of(".json") == sum(path.stat().st_size for path in (sound / "_commits").iterdir())
    batches = sum(len(record["batches"]) for record in records(sound).values())
    parts = sum(count for name, count in reads.requests.items() if name.endswith(".arrow"))
    assert parts == batches * (2 if "rl_logprobs" in read else 1)  # base_logprobs lies between


@pytest.mark.parametrize("objective", COLUMNS)
def test_an_epoch_from_s3_moves_the_needed_columns_once(sound: Path, s3: S3Server, objective: str) -> None:
    asked, read = COLUMNS[objective]
    url = s3.upload(sound, f"epoch-{objective}")
    before = int(s3.tell("sent .arrow"))
    assert read_all(url, asked) == read_all(sound, asked)
    assert int(s3.tell("sent .arrow")) - before == needed(sound, read)


def test_no_flipped_bit_comes_from_s3(sound: Path, s3: S3Server) -> None:
    rng, known = random.Random(1), records(sound)
    url = s3.upload(sound, "flips")
    for objective, (asked, read) in COLUMNS.items():
        expected = read_all(sound, asked)
        for _ in range(12):
            target = rng.choice([*known, *(f"_commits/{part.replace('.arrow', '.json')}" for part in known)])
            data, place = spoil((sound / target).read_bytes(), rng, cut=False)
            s3.put(f"flips/{target}", data)
            if target not in known or any(place in range_ for range_ in places_of(known[target], read)):
                with pytest.raises(ValueError, match="part-"):
                    read_all(url, asked)
            else:
                assert read_all(url, asked) == expected, (objective, target)
            s3.put(f"flips/{target}", (sound / target).read_bytes())


def test_blocks_are_read_by_many_threads(tmp_path: Path) -> None:
    folder = write_many_rows(tmp_path / "threads", num_rows=60, seq_len=200, rows_per_part=30, rows_per_batch=2)
    for version in ("of format 2", "of format 1"):
        if version == "of format 1":
            folder = write_many_rows(tmp_path / "one", 60, 200, 30, 2, format_version=1)
        rows = folder.open_rows("part-00001.arrow", ["rl_topk_ids"])
        expected = [rows.batch(number).batch for number in range(len(rows))]
        order = np.random.default_rng(0).integers(0, len(rows), 300).tolist()
        with ThreadPoolExecutor(8) as pool:
            found = [rows.batch for rows in pool.map(rows.batch, order)]
        assert all(batch.equals(expected[number]) for number, batch in zip(order, found)), version


def test_the_snippet_of_the_page(
    sound: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(sound.parent)
    exec(snippet, {})
    batch = pa.ipc.open_file(sound / "part-00000.arrow").get_batch(0)
    assert capsys.readouterr().out.split()[0] == str(batch.num_rows)
