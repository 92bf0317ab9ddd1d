"""Inputs that nobody should trust: code in model folders, paths and links that lead out of a folder, bombs; and who
on the network could reach a run."""

import hashlib
import ipaddress
import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import zstandard
from processes import Command
from test_score import compare

from shards import ShardFolder, row_schema
from shards.manifest import Manifest
from shards.message import field_at, follow, record_batch_messages
from shards.record import METADATA_KEY, encode_record, record_name
from shards.sums import sums_of
from shards.zstd_bomb import announced_bytes
from trainer.data import RowReader

pytestmark = pytest.mark.usefixtures("ray_session", "starts_processes")

Remit = Callable[..., tuple[int, str, str]]


def refused(result: tuple[int, str, str], command: str, message: str) -> None:
    """One line that says what is wrong, exit code 1."""
    code, _, error = result
    assert code == 1, result
    assert "Traceback" not in error
    last = error.strip().splitlines()[-1]
    assert last.startswith(f"remit {command}: error: ")
    assert message in last, error


def train_command(shards: Path, model: Path, out: Path) -> list[object]:
    return ["train", "--shards", shards, "--model", model, "--out", out, "--objective", "ntp", "--max-steps", 1]


# --- code and pickles in model folders ------------------------------------------------------------------


def change_json(file: Path, **values: object) -> None:
    value = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(value | values))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(2)}, folder / "pytorch_model.bin")


MODEL_CODE = {
    "config": (
        lambda folder: change_json(folder / "config.json", auto_map={"AutoConfig": "evil.Config"}),
        "config.json: has auto_map",
    ),
    "hub": (
        lambda folder: change_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "user/repo--evil.Model"}),
        "config.json: has auto_map",
    ),
    "tokenizer": (
        lambda folder: change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}),
        "tokenizer_config.json: has auto_map",
    ),
    "script": (
        lambda folder: (folder / "evil.py").write_text("raise SystemExit(9)"),
        "evil.py: Python code in a model",
    ),
    "pickle": (pickled, "has no *.safetensors weights"),
}


@pytest.mark.parametrize("kind", MODEL_CODE)
def test_models_with_code_or_pickles(
    tmp_path: Path, packed: Path, reference_model: Path, remit: Remit, kind: str
) -> None:
    change, message = MODEL_CODE[kind]
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(reference_model, model)
    change(model)
    refused(remit("score", "--shards", packed, "--model", model, "--out", out, "--engine", "fake"), "score", message)
    refused(remit(*train_command(packed, model, out)), "train", message)
    assert not out.exists()


# --- paths and links that lead out of the folder --------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path, packed: Path) -> Path:
    """A copy of the packed folder to spoil."""
    return Path(shutil.copytree(packed, tmp_path / "shards"))


def commands(shards: Path, model: Path, out: Path) -> dict[str, list[object]]:
    return {
        "verify": ["verify", "--shards", shards],
        "score": ["score", "--shards", shards, "--model", model, "--out", out, "--engine", "fake", "--num-engines", 1],
        "train": train_command(shards, model, out),
        "inspect": ["inspect", "--shards", shards],
    }


@pytest.mark.parametrize(
    "name", ["../part-00000.arrow", "/etc/passwd", "a/part-00000.arrow", "part-00000.arrow/../x", ""]
)
def test_part_names_that_lead_elsewhere(
    tmp_path: Path, shards: Path, reference_model: Path, remit: Remit, name: str
) -> None:
    manifest = Manifest.read(shards)
    (shards / "_manifest.json").unlink()
    replace(manifest, parts=(replace(manifest.parts[0], name=name), *manifest.parts[1:])).write(shards)
    for command, arguments in commands(shards, reference_model, tmp_path / "out").items():
        refused(remit(*arguments), command, f"_manifest.json: damaged (part name {name!r} is not of the form")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["../a.jsonl", "/etc/passwd", "sub/../../a.jsonl", ".."])
def test_corpus_paths_that_lead_elsewhere(
    tmp_path: Path, shards: Path, reference_model: Path, remit: Remit, path: str
) -> None:
    manifest = Manifest.read(shards)
    (shards / "_manifest.json").unlink()
    replace(manifest, corpus=(replace(manifest.corpus[0], path=path), *manifest.corpus[1:])).write(shards)
    for command, arguments in commands(shards, reference_model, tmp_path / "out").items():
        refused(remit(*arguments), command, f"_manifest.json: damaged (corpus path {path!r} is not relative")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "part-00001.arrow",
        "_commits/part-00001.json",
        "_manifest.json",
        "_commits",
        "_tokenizer",
        "_tokenizer/tokenizer.json",
    ],
)
def test_symbolic_links(tmp_path: Path, shards: Path, reference_model: Path, remit: Remit, name: str) -> None:
    """What is linked has the very same content, so nothing but the link can be what is refused."""
    (shards / name).rename(tmp_path / "elsewhere")
    (shards / name).symlink_to(tmp_path / "elsewhere")
    message, out = f"{shards / name}: is a symbolic link", tmp_path / "out"
    run = commands(shards, reference_model, out)
    code, output, error = remit(*run["verify"])
    assert (code, message in error) == (1, True), (output, error)
    assert "Traceback" not in error
    code, _, error = remit(*run["score"])
    assert (code, message in error) == (1, True), error
    assert not (out / "_lease").exists()
    assert not (out / "_commits" / "part-00001.json").exists()
    with pytest.raises(ValueError, match="is a symbolic link"):
        read_all(shards)
    code, _, error = remit(*train_command(shards, reference_model, tmp_path / "run"))
    if name != "part-00001.arrow" and not name.startswith(
        "_commits/"
    ):  # whether one step reads it depends on the order
        assert (code, message in error.strip().splitlines()[-1]) == (1, True), error
    with pytest.raises(ValueError, match="is a symbolic link"):
        ShardFolder(shards).copy_tokenizer(tmp_path / "copy") if "_tokenizer" in name else read_all(shards)


def read_all(folder: Path) -> None:
    reader = RowReader(ShardFolder(folder), "packed", None, 10**6)
    for block, count in enumerate(reader.block_rows):
        reader.rows(np.array([(block, row) for row in range(count)]))


def test_output_that_is_linked_away(tmp_path: Path, packed: Path, reference_model: Path, remit: Remit) -> None:
    """Nothing is written through a link that somebody put where records go."""
    out, away = tmp_path / "out", tmp_path / "away"
    out.mkdir()
    away.mkdir()
    for name in ("_commits", "_lease", "_tokenizer", "_quarantine"):
        (out / name).symlink_to(away)
        refused(
            remit("score", "--shards", packed, "--model", reference_model, "--out", out, "--engine", "fake"),
            "score", f"{out / name}: is a symbolic link",
        )  # fmt: skip
        assert list(away.iterdir()) == []
        shutil.rmtree(out)
        out.mkdir()


def test_the_folder_itself_may_be_reached_through_a_link(
    tmp_path: Path, packed: Path, reference_model: Path, remit: Remit
) -> None:
    (tmp_path / "link").symlink_to(packed.parent)
    shards = tmp_path / "link" / packed.name
    for command, arguments in commands(shards, reference_model, tmp_path / "out").items():
        if command == "train":
            continue
        assert remit(*arguments)[0] == 0
    read_all(shards)


# --- bombs ----------------------------------------------------------------------------------------------


def compress(path: Path, piece: bytes, count: int) -> Path:
    with open(path, "wb") as file, zstandard.ZstdCompressor().stream_writer(file) as writer:
        for _ in range(count):
            writer.write(piece)
    assert path.stat().st_size < 1 << 20
    return path


@pytest.mark.parametrize(
    ("piece", "count", "message"),
    [
        (b" " * (1 << 20), 280, ":1: is longer than 268,435,456 bytes"),
        (b'{"text": "' + b"a" * (1 << 20), 280, ":1: is longer than 268,435,456 bytes"),
        (b" " * ((1 << 20) - 1) + b"\n", 1100, "a decompression bomb; leave the file out"),
    ],
)
@pytest.mark.parametrize("rejecting", [False, True])
def test_corpus_bombs(
    tmp_path: Path, tokenizer_folder: Path, remit: Remit, piece: bytes, count: int, message: str, rejecting: bool
) -> None:
    """One endless line; many lines of which too much came out. Leaving bad documents out does not let them pass."""
    bomb, out = compress(tmp_path / "bomb.jsonl.zst", piece, count), tmp_path / "out"
    arguments = ["pack", "--corpus", bomb, "--tokenizer", tokenizer_folder, "--out", out]
    arguments += ["--on-bad-document", "reject"] if rejecting else []
    refused(remit(*arguments), "pack", message)
    assert [path.name for path in tmp_path.iterdir()] == ["bomb.jsonl.zst"]


def commit_bytes(folder: Path, part: str, data: bytes) -> None:
    """Put `data` in the place of a part, with a record that fits it."""
    shards = ShardFolder(folder)
    (folder / part).write_bytes(data)
    record = replace(
        shards.record(part), size=len(data), sha256=hashlib.sha256(data).hexdigest(),
        batches=sums_of(pa.py_buffer(data), shards.schema),
    )  # fmt: skip
    (folder / record_name(part)).write_bytes(encode_record(record))


def arrow_bytes(batches: list[pa.RecordBatch], metadata: dict, compression: str | None = "zstd") -> bytes:
    sink = pa.BufferOutputStream()
    schema = batches[0].schema.with_metadata(metadata)
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def announcing(data: bytes, announced: int) -> bytes:
    """An Arrow file whose largest buffer announces so many bytes."""
    message = next(record_batch_messages(pa.py_buffer(data)))
    header, body = memoryview(message.metadata), message.body.to_pybytes()
    batch = follow(header, field_at(header, follow(header, 0), 2))
    vector = follow(header, field_at(header, batch, 2))
    buffers = [
        struct.unpack_from("<qq", header, vector + 4 + 16 * index)
        for index in range(struct.unpack_from("<I", header, vector)[0])
    ]
    offset, _ = max(buffers, key=lambda buffer: buffer[1])
    start = data.index(body) + offset
    return data[:start] + struct.pack("<q", announced) + data[start + 8 :]


def real_bomb(metadata: dict, folder: Path) -> bytes:
    """Two rows of 50 million zeros."""
    values = pa.array(np.zeros(10**8, np.int32))
    lists = pa.ListArray.from_arrays(pa.array([0, 5 * 10**7, 10**8], pa.int32()), values)
    ones = pa.array([[1], [1]], pa.list_(pa.int32()))
    columns = [lists, ones, ones.cast(pa.list_(pa.int64())), pa.array([0, 0], pa.int32())]
    data = arrow_bytes([pa.record_batch(columns, schema=row_schema())], metadata)
    assert len(data) < 1 << 20
    return data


def hidden_bomb(metadata: dict, folder: Path) -> bytes:
    """Harmless messages in front, and a footer that names the bomb which stands behind them."""
    bomb = real_bomb(metadata, folder)
    sound = (folder / "part-00000.arrow").read_bytes()
    end = len(sound) - 10 - struct.unpack_from("<i", sound, len(sound) - 10)[0]
    body = sound[:end]  # with its end-of-stream mark
    body += bytes(-len(body) % 8)
    footer_size = struct.unpack_from("<i", bomb, len(bomb) - 10)[0]
    footer = bytearray(bomb[len(bomb) - 10 - footer_size : len(bomb) - 10])
    blocks = follow(memoryview(footer), field_at(memoryview(footer), follow(memoryview(footer), 0), 3)) + 4
    offset = struct.unpack_from("<q", footer, blocks)[0]
    struct.pack_into("<q", footer, blocks, len(body))
    message = bomb[offset : len(bomb) - 10 - footer_size]
    data = body + message + bytes(footer) + bomb[-10:]
    assert pa.ipc.open_file(data).num_record_batches == 1
    return data


def many_batches(metadata: dict, folder: Path) -> bytes:
    """A footer with more record batches than a part has: each is small, all of them are not."""
    batch = pa.ipc.open_file((folder / "part-00000.arrow").read_bytes()).get_batch(0)
    return arrow_bytes([batch] * 50, metadata)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (real_bomb, "would decompress to 400,0"),
        (hidden_bomb, "would decompress to 400,0"),
        (many_batches, "record batches"),
        *(
            (lambda _, folder, size=size: announcing((folder / "part-00000.arrow").read_bytes(), size), message)
            for size, message in (
                (1 << 31, "would decompress to 2,147,"),
                (1 << 40, "would decompress to 1,099,511,"),
                ((1 << 63) - 1, "would decompress to 9,223,372,"),
                (-2, "its messages cannot be read (a buffer announces -2 bytes)"),
                (-(1 << 63), "its messages cannot be read (a buffer announces -9223372036854775808 bytes)"),
            )
        ),
    ],
)
def test_part_bombs(
    tmp_path: Path, shards: Path, reference_model: Path, remit: Remit, make: Callable, message: str
) -> None:
    """Record, manifest and schema metadata fit; only what comes out of the buffers is too much. Never allocated."""
    part = "part-00000.arrow"
    metadata = {METADATA_KEY: json.dumps(ShardFolder(shards).part_metadata(part))}
    commit_bytes(shards, part, make(metadata, shards))
    pool = pa.default_memory_pool()
    before = max(pool.bytes_allocated(), pool.max_memory())
    folder = ShardFolder(shards)
    with pytest.raises(ValueError, match=r"part-00000\.arrow: ") as error:
        folder.open_part(part)
    assert message in str(error.value)
    with pytest.raises(ValueError, match="no part that remit wrote"):
        read_all(shards)
    assert pool.max_memory() - before < 1 << 24
    code, _, text = remit("verify", "--shards", shards)
    assert (code, message in text) == (1, True), text
    assert pool.max_memory() - before < 1 << 26
    if make in (real_bomb, hidden_bomb, many_batches):  # an engine opens a part as verify does
        run = commands(shards, reference_model, tmp_path / "out")
        code, _, text = remit(*run["score"])
        assert (code, message in text) == (1, True), text
        assert not (tmp_path / "out" / "_commits" / "part-00000.json").exists()


def test_announced_bytes_are_those_of_an_uncompressed_file(scored_rl: Path) -> None:
    count = 0
    for path in sorted(scored_rl.glob("part-*.arrow")):
        reader = pa.ipc.open_file(path)
        batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        plain = pa.py_buffer(arrow_bytes(batches, {}, None))
        found = list(record_batch_messages(pa.py_buffer(path.read_bytes())))
        assert len(found) == len(batches)
        for message, raw in zip(found, record_batch_messages(plain), strict=True):
            header = memoryview(raw.metadata)
            batch = follow(header, field_at(header, follow(header, 0), 2))
            vector = follow(header, field_at(header, batch, 2))
            lengths = struct.unpack_from("<I", header, vector)[0]
            true = sum(struct.unpack_from("<qq", header, vector + 4 + 16 * index)[1] for index in range(lengths))
            assert announced_bytes(message) == true > 1000
            count += 1
    assert count >= 4


# --- who listens ----------------------------------------------------------------------------------------


def processes_of(run: Command, mark: str) -> set[int]:
    """The processes of a command: of its session, marked in their environment, and all that descend from those."""
    parents, found = {}, {run.pid}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        parents[int(folder.name)] = int(fields[1])
        if int(fields[3]) == run.pid or mark.encode() in environment:
            found.add(int(folder.name))
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def address_of(text: str) -> tuple[str, int]:
    """Address and port of a line of /proc/net/tcp or tcp6: words of 32 bits in the machine's byte order."""
    address, _, port = text.partition(":")
    words = [bytes.fromhex(address[index : index + 8])[::-1] for index in range(0, len(address), 8)]
    ip = ipaddress.ip_address(b"".join(words))
    return str(getattr(ip, "ipv4_mapped", None) or ip), int(port, 16)


def listeners(pids: set[int]) -> set[tuple[str, str]]:
    """(program, address) of every TCP socket on which one of these processes listens."""
    listening = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                listening[f"socket:[{fields[9]}]"] = address_of(fields[1])[0]
    found = set()
    for pid in pids:
        try:
            program = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:90]
            targets = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        found |= {(program, listening[target]) for target in targets if target in listening}
    return found


def test_addresses_by_hand() -> None:
    assert address_of("0100007F:1F90") == ("127.0.0.1", 8080)
    assert address_of("00000000:0016") == ("0.0.0.0", 22)
    assert address_of("00000000000000000000000001000000:1F90") == ("::1", 8080)
    assert address_of("00000000000000000000000000000000:1F90") == ("::", 8080)
    assert address_of("0000000000000000FFFF00000100007F:1F90") == ("127.0.0.1", 8080)


@pytest.mark.parametrize("group", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_nothing_listens_beyond_this_machine(tmp_path: Path, packed: Path, reference_model: Path, group: int) -> None:
    """While vLLM scores in a Ray of its own, with one process per engine and with two, which score right."""
    mark = f"{tmp_path}-{time.time_ns()}"
    arguments = ["score", "--shards", packed, "--model", reference_model, "--out", tmp_path / "out", "--num-engines", 1]
    arguments += ["--tensor-parallel-size", group, "--max-num-batched-tokens", 128, "--dtype", "float32", "--no-canary"]
    run = Command(tmp_path, *arguments, private=True, REMIT_TEST_MARK=mark)
    found: set[tuple[str, str]] = set()
    deadline = time.monotonic() + 900
    while run.process.is_alive() and time.monotonic() < deadline:
        found |= listeners(processes_of(run, mark))
        time.sleep(0.5)
    assert run.finish() == 0, run.errors
    for program in ("raylet", "gcs_server", "ray::ScoringActor"):
        assert any(program in name for name, _ in found), found
    beyond = {(name, address) for name, address in found if not ipaddress.ip_address(address).is_loopback}
    assert beyond == set()
    assert compare(ShardFolder(tmp_path / "out"), reference_model, "rl", "packed", 1 / 128 + 1e-4, every=20) > 300
