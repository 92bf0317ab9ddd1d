"""Corpora as people have them: spellings, links, names, marks, encodings, long windows, files that are not whole."""

import bz2
import codecs
import errno
import gzip
import io
import json
import lzma
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from conftest import source_texts, write_corpus
from test_pack import pack_to

from scorer.corpus import BadDocument, BadFile, read_documents
from scorer.decompress import Damaged, Decompressed, window_of_each
from scorer.formats import format_of, suffix_of, text_of_path
from scorer.sources import Source, find_corpus, find_sources
from shards.manifest import Manifest
from shards.store_errors import StoreForbidden, StoreRefused, StoreSilent
from shards.verify import verify_folder

Remit = Callable[..., tuple[int, str, str]]
TEXTS = ["one", "zwei – 2", "line\u2028separator\u0085next", "nul \x00", "drei\r\nvier", ""]
LINES = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()


def zstd_frame(data: bytes, window_log: int = 20) -> bytes:
    """A frame without its content's size, which would make a small window of a large one."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=window_log, enable_ldm=window_log > 27)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(data) + compressor.flush()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstd_frame, ".zstd": zstd_frame, ".bz2": bz2.compress,
            ".xz": lzma.compress}  # fmt: skip


def documents(source: object, **settings: int) -> list[str | BadDocument]:
    return [text for batch, _ in read_documents(source, "text", **settings) for text in batch]


def texts_of(*corpus: object) -> list[str | BadDocument]:
    return [text for source in find_sources(list(map(str, corpus))) for text in documents(source)]


def names_of(*corpus: object) -> list[str]:
    return [source.name for source in find_sources(list(map(str, corpus)))]


# --- which files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", COMPRESS)
@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".ndjson", ".NdJson", ".json", ".JSON"])
def test_every_spelling_gives_the_same_documents(tmp_path: Path, suffix: str, codec: str) -> None:
    for spelled in {codec, codec.upper()}:
        file = tmp_path / spelled / f"a.b{suffix}{spelled}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(COMPRESS[codec](LINES))
        for corpus in (file, file.parent, f"{file.parent}/*"):
            assert texts_of(corpus) == TEXTS
            assert names_of(corpus) == [file.name]
        file.unlink()


@pytest.mark.usefixtures("ray_session")
def test_a_folder_reads_what_it_can_and_counts_the_rest(tmp_path: Path, tokenizer_folder: Path, remit: Remit) -> None:
    corpus, readable = tmp_path / "corpus", ["B.JSONL", "a.jsonl", "c.json.gz", "d.ndjson", "e.jsonl.bz2", "f.json"]
    (corpus / "sub").mkdir(parents=True)
    for name in readable:
        (corpus / name).write_bytes(COMPRESS["." + name.rpartition(".")[2] if name[-2:] in ("gz", "z2") else ""](LINES))
    pa.parquet.write_table(pa.table({"text": TEXTS}), corpus / "sub" / "G.Parquet")
    (corpus / ".git").mkdir()
    for name in ("_g.jsonl", ".git/x.jsonl", ".git/y", "h.jsonl.gz.part", "README", "n.txt", "m.TXT", "shard.0001"):
        (corpus / name).write_text("x")
    (corpus / "stats.json").write_text('{"documents": 3}')
    (corpus / "pretty.json").write_text(json.dumps({"text": "x"}, indent=1))
    (corpus / "array.json").write_text(json.dumps([{"text": "x"}]))
    (corpus / "sub" / "archive.csv.gz").write_text("x")
    expected = {".csv.gz": 1, ".json without an object a line": 3, ".part": 1, ".txt": 2, "hidden": 2, "no suffix": 2}
    out = corpus / "packed"  # the output may lie in the folder that is packed
    command = ["pack", "--corpus", corpus, "--tokenizer", tokenizer_folder, "--out", out, "--seq-len", 64]
    code, _, error = remit(*command)
    assert code == 0, error
    manifest = Manifest.read(out)
    assert [file.path for file in manifest.corpus] == [*readable, "sub/G.Parquet"]
    assert {file.documents_read for file in manifest.corpus} == {len(TEXTS)}
    assert manifest.passed_over == expected
    (line,) = [line for line in error.splitlines() if "passed over" in line]
    assert " passed over 11 in " in line  # behind date and time, as in a file
    for what in (
        ".json without an object a line (3, such as array.json)",
        ".csv.gz (sub/archive.csv.gz)",
        ".part (h.j",
    ):
        assert what in line
    (corpus / "later.txt").write_text("y")  # comes and goes without making another corpus of it
    assert remit(*command)[0] == 0
    part = next(out.glob("*.arrow"))
    part.unlink()
    (out / "_commits" / f"{part.stem}.json").unlink()
    assert remit(*command)[0] == 0
    assert Manifest.read(out).passed_over == expected
    assert remit("verify", "--shards", out)[0] == 0
    found = json.loads(pa.ipc.open_file(part).schema.metadata[b"remit"])
    assert found["passed_over"] == expected


def test_nothing_passed_over_leaves_no_trace(packed: Path) -> None:
    assert "passed_over" not in (packed / "_manifest.json").read_text()
    assert "left_out" not in (packed / "_manifest.json").read_text()


def test_a_glob_reads_what_it_can(tmp_path: Path) -> None:
    for name in ("a.jsonl", "B.JSONL", "c.txt", "_d.jsonl", "sub/e.jsonl"):
        write_corpus(tmp_path / name, ["x"])
    found = find_corpus([f"{tmp_path}/*"])
    assert [source.name for source in found.sources] == ["B.JSONL", "_d.jsonl", "a.jsonl"]
    assert found.passed_over == {".txt": 1, "folder": 1}
    assert names_of(f"{tmp_path}/**/*.jsonl") == ["_d.jsonl", "a.jsonl", "sub/e.jsonl"]
    with pytest.raises(ValueError, match=r"\*\.txt: 1 file matches, none of them a corpus file \(there are \.txt"):
        find_sources([f"{tmp_path}/*.txt"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"}]', "is one JSON array, expected one object a line; jq -c '.[]'"),
        ('\n [\n {"text": "a"}\n]', "is one JSON array"),
        ('{\n "text": "a"\n}\n', "has a JSON object over several lines"),
        ('{"text": "a",\n "b": 1}\n', "has a JSON object over several lines"),
        ('"text"', "is one JSON str"),
        ("hello", "begins with b'hello', expected one object a line"),
    ],
)
def test_json_that_is_no_lines_is_named(tmp_path: Path, text: str, message: str) -> None:
    plain, packed = tmp_path / "x.json", tmp_path / "x.json.gz"
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(ValueError, match=r"x\.json: " + re.escape(message)):
        texts_of(plain)
    with pytest.raises(BadFile, match=re.escape(message)):
        texts_of(packed)


def test_bad_first_document_of_json_is_a_document(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(b'{"text": "caf\xe9"}\n{"text": 1}\n{"text": "cut\n{"text": "good"}\n')
    kinds = [type(document) for document in texts_of(tmp_path)]
    assert kinds == [BadDocument, BadDocument, BadDocument, str]


def test_one_long_line_of_json_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"text": "a" * 200_000, "more": 1}))
    assert texts_of(tmp_path) == ["a" * 200_000]


# --- links ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_session")
def test_links_of_a_cache_have_their_own_names(tmp_path: Path, tokenizer_folder: Path) -> None:
    """The hub's cache: a relative link with a suffix to a blob without one."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123abcd").write_bytes(LINES)
    folder = tmp_path / "snapshots" / "r1"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").symlink_to("../../blobs/0123abcd")
    for number, corpus in enumerate((folder, folder / "train.jsonl", Path(f"{folder}/*.jsonl"))):
        manifest = pack_to(tmp_path / f"out{number}", corpus, tokenizer_folder).manifest
        assert [file.path for file in manifest.corpus] == ["train.jsonl"]
        assert manifest.documents["read"] == len(TEXTS)


def test_linked_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write_corpus(tmp_path / "disk" / "deep" / "a.jsonl", ["a"])
    write_corpus(tmp_path / "corpus" / "b.jsonl", ["b"])
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "deep" / "up").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "self").symlink_to("self")
    found = find_corpus([str(tmp_path / "corpus")])
    assert [source.name for source in found.sources] == ["b.jsonl", "linked/deep/a.jsonl"]
    assert found.passed_over == {"link to a folder above it": 1, "no suffix": 1}
    (tmp_path / "again").symlink_to("corpus")
    assert names_of(tmp_path / "again") == ["b.jsonl", "linked/deep/a.jsonl"]


@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_two_names_of_one_file_are_both_shown(tmp_path: Path, make: Callable[[Path, Path], None]) -> None:
    first = write_corpus(tmp_path / "one.jsonl", ["x"])
    make(first, tmp_path / "two.jsonl")
    with pytest.raises(ValueError, match=r"one\.jsonl and /.*two\.jsonl: are one file by two names"):
        find_sources([str(tmp_path)])
    with pytest.raises(ValueError, match=r"one\.jsonl: is in the corpus twice"):
        find_sources([str(first), f"{tmp_path}/sub/../one.jsonl"] if (tmp_path / "sub").mkdir() is None else [])


def test_folders_given_twice_are_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a" / "one.jsonl", ["x"])
    with pytest.raises(ValueError, match=r"one\.jsonl: is in the corpus twice; name it once"):
        find_sources([str(tmp_path / "a")] * 2)


def test_broken_links_are_named(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "b.txt").symlink_to("nowhere")
    assert find_corpus([str(tmp_path)]).passed_over == {".txt": 1}
    (tmp_path / "b.jsonl.gz").symlink_to(".annex/objects/b")
    for corpus in (tmp_path, tmp_path / "b.jsonl.gz", f"{tmp_path}/*.gz"):
        with pytest.raises(ValueError, match=r"b\.jsonl\.gz: is a link to \.annex/objects/b, which does not exist"):
            find_sources([str(corpus)])


def test_a_link_without_suffix_to_a_corpus_file(tmp_path: Path) -> None:
    write_corpus(tmp_path / "2024.jsonl.gz", ["x"])
    (tmp_path / "latest").symlink_to("2024.jsonl.gz")
    assert texts_of(tmp_path / "latest") == ["x"]


def test_a_pipe_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jsonl")
    for corpus in (tmp_path, tmp_path / "x.jsonl"):
        with pytest.raises(ValueError, match=r"x\.jsonl: is not a regular file"):
            find_sources([str(corpus)])


def test_dots_after_a_link_mean_what_the_system_means(tmp_path: Path) -> None:
    write_corpus(tmp_path / "disk" / "x.jsonl", ["right"])
    write_corpus(tmp_path / "x.jsonl", ["wrong"])
    (tmp_path / "disk" / "deep").mkdir()
    (tmp_path / "link").symlink_to("disk/deep")
    assert texts_of(f"{tmp_path}/link/../x.jsonl") == ["right"]


# --- names ------------------------------------------------------------------------------------------------


def test_paths_become_text_that_tells_them_apart() -> None:
    rng = random.Random(0)
    pieces = [b"\\", b"x", b"e9", b"\xe9", "é".encode(), b"a", b"\\x41", b"\\\\xff", b"\xff"]
    paths = {os.fsdecode(b"".join(rng.choices(pieces, k=rng.randint(1, 6)))) for _ in range(20_000)}
    assert len({text_of_path(path) for path in paths}) == len(paths)
    for path in paths:
        text_of_path(path).encode()
    for plain in ("a b.jsonl", "é/[1]*%41#,:.jsonl", "back\\slash", "日本"):
        assert text_of_path(plain) == plain
    assert text_of_path(os.fsdecode(b"caf\xe9.jsonl")) == "caf\\xe9.jsonl"
    assert text_of_path("caf\\xe9.jsonl") == "caf\\\\xe9.jsonl"


def test_suffixes() -> None:
    assert format_of("a.JSON.ZSTD") == (".json", "zstd")
    assert format_of("d.x/a.parquet") == (".parquet", "")
    for name in ("jsonl", "a.gz", "a.txt.gz", "a.parquet.gz", "a.jsonl.gz.part", "a.jsonl~", "x.jsonl/README"):
        assert format_of(name) is None
    found = [suffix_of(name) for name in ("A.TXT", "a.tar.gz", "README", "x.0001", "a.v2", "we. are many", ".jsonl")]
    assert found == [".txt", ".tar.gz", "no suffix", "no suffix", ".v2", "no suffix", "no suffix"]


@pytest.mark.usefixtures("ray_session")
def test_a_name_that_is_not_utf8_goes_all_the_way(tmp_path: Path, tokenizer_folder: Path, remit: Remit) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    write_corpus(corpus / "a.jsonl", ["fine"])
    odd = Path(os.fsdecode(os.fsencode(corpus) + b"/caf\xe9"))
    write_corpus(odd / os.fsdecode(b"\xff.jsonl"), ["odd"])
    (odd / os.fsdecode(b"\xfe.jsonl")).write_bytes(b'{"text": 3}\n{"text": "odd too"}\n')
    pa.parquet.write_table(pa.table({"text": ["column"]}), corpus / "p.parquet")
    os.rename(os.fsencode(corpus / "p.parquet"), os.fsencode(odd) + b"/p\xe9.parquet")
    command = ["pack", "--corpus", corpus, "--tokenizer", tokenizer_folder, "--out", out, "--seq-len", 64]
    code, _, error = remit(*command)
    assert (code, "caf\\xe9/\\xfe.jsonl:1: field 'text' is int" in error) == (1, True), error
    code, _, error = remit(*command, "--on-bad-document", "reject")
    assert code == 0, error
    names = ["a.jsonl", "caf\\xe9/p\\xe9.parquet", "caf\\xe9/\\xfe.jsonl", "caf\\xe9/\\xff.jsonl"]
    assert [file.path for file in Manifest.read(out).corpus] == names
    (rejected,) = [json.loads(line) for line in (out / "_rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rejected["path"] == names[2]
    assert remit("verify", "--shards", out)[0] == 0
    code, output, _ = remit("inspect", "--shards", out, "--row", 1)
    assert (code, "p\\xe9.parquet" in output) == (0, True)
    assert "nothing to do" in remit(*command, "--on-bad-document", "reject")[1]
    code, output, error = remit(
        "pack", "--corpus", odd / os.fsdecode(b"\xff.jsonl"), *command[3:-4], "--out", out / "2"
    )
    assert code == 0, error


# --- what is in them --------------------------------------------------------------------------------------


def test_marks_are_skipped_wherever_a_file_begins(tmp_path: Path) -> None:
    mark, line = codecs.BOM_UTF8, b'{"text": "\xef\xbb\xbfkept"}\n'
    lines = [mark + line, *[line] * 498, mark + line, line, mark + mark + line, mark + b"\n", mark, b"\r\n", b" \t\n"]
    (tmp_path / "x.jsonl").write_bytes(b"".join(lines))
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
    assert texts_of(tmp_path) == ["\ufeffkept"] * 1004


def test_a_number_of_any_length_in_another_field(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a", "n": ' + "7" * 9999 + '}\n{"text": ' + "7" * 9999 + "}\n")
    good, bad = texts_of(tmp_path)
    assert good == "a"
    assert "x.jsonl:2: field 'text' is float" in str(bad)


def test_lines_end_in_newlines_alone(tmp_path: Path) -> None:
    raw = b'{"text": "a"}\r\n\r\n\n{"text": "b\xe2\x80\xa8c"}\n   \n{"text": "d\\u0000"}'
    (tmp_path / "x.jsonl").write_bytes(raw)
    assert texts_of(tmp_path) == ["a", "b\u2028c", "d\0"]


@pytest.mark.parametrize("codec", ["", ".gz", ".zst"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_other_encodings_are_one_line(tmp_path: Path, encoding: str, codec: str) -> None:
    data = LINES.decode().encode(encoding)
    (tmp_path / f"x.json{codec}").write_bytes(COMPRESS[codec](data))
    name = encoding[:6].upper()
    with pytest.raises(BadFile, match=rf"x\.json{codec}: is {name}, expected UTF-8; iconv -f {name} -t UTF-8"):
        texts_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.jsonl", gzip.compress(LINES, mtime=0), "holds gzip data, its name says JSON lines"),
        ("x.jsonl", zstd_frame(LINES), "holds zstd data"),
        ("x.jsonl.gz", LINES, "holds no gzip data (it begins with b'{\"text\":')"),
        ("x.jsonl.zst", gzip.compress(LINES, mtime=0), "holds gzip data, its name says zstd"),
        ("x.jsonl.xz", b"", "0 bytes, which is not a xz file"),
        ("x.parquet", LINES, "x.parquet: not a parquet file"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run git lfs pull"),
        ("x.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run git lfs pull"),
        ("x.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run git lfs pull"),
        ("x.jsonl", b"\0" * 5000, "begins with zero bytes"),
    ],
)
@pytest.mark.usefixtures("ray_session")
def test_a_file_is_something_else_than_its_name_says(
    tmp_path: Path, name: str, data: bytes, message: str, tokenizer_folder: Path, remit: Remit
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / name).write_bytes(data)
    code, _, error = remit(
        "pack", "--corpus", tmp_path / "corpus", "--tokenizer", tokenizer_folder, "--out", tmp_path / "out"
    )
    assert (code, message in error) == (1, True), error
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


# --- compressed files -------------------------------------------------------------------------------------


def decompressed(data: bytes, codec: str, max_window: int = 1 << 31) -> bytes:
    return io.BufferedReader(Decompressed(io.BytesIO(data), codec, max_window), 1 << 20).read()


@pytest.mark.parametrize(("codec", "suffix"), [("gzip", ".gz"), ("zstd", ".zst"), ("bzip2", ".bz2"), ("xz", ".xz")])
def test_every_frame_is_read_and_every_cut_is_seen(codec: str, suffix: str) -> None:
    compress, data = COMPRESS[suffix], random.Random(0).randbytes(70_000) + b"text " * 400_000
    whole, empty = compress(data), compress(b"")
    assert decompressed(whole, codec) == data
    assert decompressed(empty + whole + empty + empty + whole + empty, codec) == data * 2
    assert decompressed(empty, codec) == b""
    for before in (b"", whole, empty * 3):
        for length in (1, 3, 7, len(whole) // 3, len(whole) // 2, len(whole) - 5, len(whole) - 1):
            with pytest.raises(Damaged, match="cut off"):
                decompressed(before + whole[:length], codec)
    with pytest.raises(Damaged):
        decompressed(whole + b"not a frame, whatever else", codec)


def test_padding_and_skippable_frames() -> None:
    for codec, suffix in (("gzip", ".gz"), ("xz", ".xz")):
        assert decompressed(COMPRESS[suffix](b"a") + bytes(1000) + COMPRESS[suffix](b"b") + bytes(8), codec) == b"ab"
    frame = zstd_frame(b"a")
    for length in (0, 40, 400_000):
        skipped = b"\x53\x2a\x4d\x18" + length.to_bytes(4, "little") + bytes(length)
        assert decompressed(skipped + frame + skipped + skipped + frame + skipped, "zstd") == b"aa"
    assert decompressed(gzip.compress(b"") * 5000 + gzip.compress(b"end"), "gzip") == b"end"


def test_counts_of_odd_frames(tmp_path: Path) -> None:
    skipped = b"\x5f\x2a\x4d\x18" + (40).to_bytes(4, "little") + bytes(40)
    (tmp_path / "a.jsonl.zst").write_bytes(skipped + zstd_frame(LINES) + zstd_frame(b"") + zstd_frame(LINES) + skipped)
    (tmp_path / "b.jsonl.gz").write_bytes(
        gzip.compress(b"") * 5000 + gzip.compress(LINES[:9]) + gzip.compress(LINES[9:])
    )
    assert texts_of(tmp_path) == TEXTS * 3


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_long_windows(tmp_path: Path, window_log: int) -> None:
    data = b"".join(json.dumps({"text": f"{n} " * 50}).encode() + b"\n" for n in range(1000))
    frame = zstd_frame(data, window_log)
    assert zstandard.get_frame_parameters(frame).window_size == 1 << window_log
    file = tmp_path / "x.jsonl.zst"
    file.write_bytes(zstd_frame(b'{"text": "first"}\n') + frame)
    (source,) = find_sources([str(file)])
    assert len(documents(source)) == 1001
    if window_log > 27:
        with pytest.raises(BadFile, match=r"a long window: .* more than 128 MiB .* zstd --long=31 -d") as error:
            documents(source, max_window=1 << 27)
        assert "damaged" not in str(error.value)
    else:
        assert len(documents(source, max_window=1 << 27)) == 1001
    file.write_bytes(frame[:-3])
    with pytest.raises(BadFile, match=r"x\.jsonl\.zst: cannot be read beyond line \d+: the file ends in the middle"):
        documents(source)


def test_windows_of_all_files_fit_into_half_of_the_memory() -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = os.cpu_count() or 1
    for threads in (1, 2, cores):
        at_once = max(1, cores // threads)
        assert 1 << 27 <= window_of_each(threads) <= max(1 << 27, memory // 2 // at_once)


def test_a_bomb_takes_little_memory() -> None:
    """Two gigabytes of zeros out of one piece: what comes out at once is bounded."""
    compressor = zstandard.ZstdCompressor().compressobj()
    bomb = b"".join(compressor.compress(bytes(1 << 20)) for _ in range(512)) + compressor.flush()
    stream = Decompressed(io.BytesIO(bomb), "zstd")
    largest = total = 0
    buffer = bytearray(1 << 16)
    while count := stream.readinto(buffer):
        total, largest = total + count, max(largest, len(stream._output))
    assert total == 512 << 20
    assert largest <= 64 << 20


# --- one bad file among many ------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


@pytest.fixture
def many(tmp_path: Path) -> Path:
    for index in range(8):
        write_corpus(tmp_path / "corpus" / f"{index}.jsonl.zst", source_texts(60, seed=index))
    cut(tmp_path / "corpus" / "3.jsonl.zst")
    write_corpus(tmp_path / "corpus" / "8.parquet", source_texts(60, seed=8))
    cut(tmp_path / "corpus" / "8.parquet")
    return tmp_path / "corpus"


@pytest.mark.usefixtures("ray_session")
def test_a_bad_file_stops_and_says_the_way_out(many: Path, tokenizer_folder: Path, remit: Remit) -> None:
    command = ["pack", "--corpus", many, "--tokenizer", tokenizer_folder, "--out", many.parent / "out", "--seq-len", 64]
    for more in ([], ["--on-bad-document", "reject"]):
        code, _, error = remit(*command, *more)
        assert code == 1
        assert "3.jsonl.zst: cannot be read beyond line" in error or "8.parquet: not a parquet file" in error
        assert "--on-bad-file reject to leave such files out whole" in error.strip().splitlines()[-1]
    assert not (many.parent / "out").exists()


@pytest.mark.usefixtures("ray_session")
def test_bad_files_are_left_out_whole_and_counted(many: Path, tokenizer_folder: Path, remit: Remit) -> None:
    out, good = many.parent / "out", many.parent / "good"
    command = ["pack", "--corpus", many, "--tokenizer", tokenizer_folder, "--seq-len", 64, "--on-bad-file", "reject"]
    code, output, error = remit(*command, "--out", out)
    assert code == 0, error
    assert "without 2 bad files" in output
    assert (
        "left out 2 of 9 files (_rejected.jsonl lists them), such as 3.jsonl.zst: cannot be read beyond line" in error
    )
    manifest = Manifest.read(out)
    left = {file.path: file.left_out for file in manifest.corpus if file.left_out}
    assert list(left) == ["3.jsonl.zst", "8.parquet"]
    assert str(many) not in "".join(left.values())
    assert all(file.documents_read == file.rows == file.tokens == 0 for file in manifest.corpus if file.left_out)
    lines = [json.loads(line) for line in (out / "_rejected.jsonl").read_text().splitlines()]
    assert [(line["source"], line["reason"].startswith("the whole file: ")) for line in lines] == [(3, True), (8, True)]
    assert not verify_folder(
        pack_to(out, many, tokenizer_folder, on_bad_file="reject", tokens_per_shard=1 << 22)
    ).problems
    # what is packed is what is packed without them
    files = [path for path in sorted(many.iterdir()) if path.name not in left]
    alone = pack_to(good, files, tokenizer_folder, tokens_per_shard=1 << 22).manifest
    assert (alone.tokens, alone.documents) == (manifest.tokens, manifest.documents)
    for workers in (1, 3):
        again = many.parent / f"again{workers}"
        assert remit(*command, "--out", again, "--num-workers", workers)[0] == 0
        assert (again / "_manifest.json").read_bytes() == (out / "_manifest.json").read_bytes()
        for part in out.glob("*.arrow"):
            assert (again / part.name).read_bytes() == part.read_bytes()
    # the mended file makes another corpus of it
    write_corpus(many / "3.jsonl.zst", source_texts(60, seed=3))
    code, _, error = remit(*command, "--out", out)
    assert (code, "holds another pack: corpus[3]" in error) == (1, True)


class Refusing(io.FileIO):
    """A file whose store refuses to give more than its first `limit` bytes and its last 64."""

    def __init__(self, path: Path, limit: int, error: Exception) -> None:
        super().__init__(path)
        self.limit, self.error, self.size = limit, error, path.stat().st_size

    def readall(self) -> bytes:
        return self.read(self.size)

    def read(self, count: int | None = -1) -> bytes:
        at = self.tell()
        end = self.size if count is None or count < 0 else min(self.size, at + count)
        if end > self.limit and at < self.size - 64:
            raise self.error
        return super().read(end - at)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


REFUSALS = [
    StoreForbidden("s3://b/x: expired"),
    StoreRefused("status 400"),
    StoreSilent("600 s"),
    PermissionError("no"),
]
REFUSALS += [FileNotFoundError("s3://b/x"), OSError(errno.EIO, "Input/output error")]


@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("name", ["x.parquet", "file.arrow", "stream.arrow", "x.jsonl", "x.jsonl.gz"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_a_store_refuses_is_no_bad_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception, share: float
) -> None:
    """--on-bad-file reject would leave it out, though its bytes are sound."""
    table = pa.table({"text": [f"{random.Random(row).random()}" * 9 for row in range(2000)]})
    path = tmp_path / name
    if name.endswith(".parquet"):
        pa.parquet.write_table(table, path, row_group_size=100)
    elif name.endswith(".arrow"):
        new = pa.ipc.new_file if name.startswith("file") else pa.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    else:
        write_corpus(path, table["text"].to_pylist())
    size = path.stat().st_size
    monkeypatch.setattr(Source, "open", lambda self: pa.PythonFile(Refusing(path, int(size * share), error), mode="r"))
    with pytest.raises((OSError, ValueError)) as found:
        for _ in read_documents(Source(name, str(path)), "text"):
            pass
    assert not isinstance(found.value, BadFile)
    assert "on-bad-file" not in str(found.value)
    if not error.errno:  # one of the disk has words of its own
        assert found.value is error


@pytest.mark.usefixtures("ray_session")
def test_only_bad_files_are_an_empty_corpus(tmp_path: Path, tokenizer_folder: Path) -> None:
    file = write_corpus(tmp_path / "c" / "x.jsonl.gz", ["text"] * 50)
    cut(file)
    with pytest.raises(
        ValueError, match=r"the corpus is empty: 1 file.*for instance cannot be read beyond line \d+: the"
    ):
        pack_to(tmp_path / "out", tmp_path / "c", tokenizer_folder, on_bad_file="reject")
    assert not (tmp_path / "out").exists()


# --- datasets of JSON -------------------------------------------------------------------------------------


def test_only_the_text_needs_a_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [{"text": f"{n}", "meta": {"x": "text" if n < 2000 else n}} for n in range(2500)]
    lines[7]["more"] = [1]
    lines[9]["meta"] = 3
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name, some in (("train-0.jsonl", lines[:1300]), ("train-1.jsonl.gz", lines[1300:])):
        data = "".join(json.dumps(line) + "\n" for line in some).encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else codecs.BOM_UTF8 + data)
    expected = [line["text"] for line in lines]
    assert texts_of("mixed") == texts_of("mixed:") == expected
    with (folder / "train-0.jsonl").open("a") as file:
        file.write('{"text": 4}\n')
    plain, dataset = (
        [str(text) if isinstance(text, BadDocument) else text for text in texts_of(entry)]
        for entry in ("mixed", "mixed:")
    )
    assert plain == dataset
    assert len(plain) == 2501


def test_an_array_is_left_to_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arrays").mkdir()
    (tmp_path / "arrays" / "train-0.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}]))
    (tmp_path / "arrays" / "train-1.json").write_text('{"text": "c"}\n{"text": "d"}\n')
    assert texts_of("arrays:") == ["a", "b", "c", "d"]


def test_a_dataset_folder_has_the_name_of_the_link_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "3f2a" / "train.jsonl", ["a"])
    shutil.copy(tmp_path / "3f2a" / "train.jsonl", tmp_path / "3f2a" / "blob")
    (tmp_path / "mine").symlink_to("3f2a")
    assert names_of("mine:") == ["mine::train"]
    assert texts_of("mine:") == ["a"]


# --- a finished folder ------------------------------------------------------------------------------------


@pytest.fixture
def read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the sources whose bytes this process hashes; files count as old enough from the start."""
    hashed: list[str] = []
    own = Source.sha256

    def sha256(source: Source) -> str | None:
        hashed.append(source.name)
        return own(source)

    monkeypatch.setattr(Source, "sha256", sha256)
    monkeypatch.setattr("scorer.known.RACY_SECONDS", -1e9)
    monkeypatch.setenv("REMIT_CACHE", str(tmp_path / "cache"))
    return hashed


@pytest.mark.usefixtures("ray_session")
def test_a_finished_folder_does_not_read_its_corpus(
    tmp_path: Path, corpus_folder: Path, tokenizer_folder: Path, read_again: list[str]
) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    shutil.copytree(corpus_folder, corpus)
    names = [file.path for file in pack_to(out, corpus, tokenizer_folder).manifest.corpus]
    assert read_again == []  # the workers' hashes are the driver's too
    pack_to(out, corpus, tokenizer_folder)
    assert read_again == []
    shutil.rmtree(tmp_path / "cache")  # nothing is known
    pack_to(out, corpus, tokenizer_folder)
    assert sorted(read_again) == sorted(names)
    for damage in (b"", b"[]", b'{"x": 1}', b"\xff"):
        (file,) = (tmp_path / "cache" / "corpus").iterdir()
        file.write_bytes(damage)
        read_again.clear()
        pack_to(out, corpus, tokenizer_folder)
        assert sorted(read_again) == sorted(names)
    # what is remembered cannot make another corpus of it
    known = json.loads(file.read_text())
    file.write_text(json.dumps({name: [seen, "0" * 64] for name, (seen, _) in known.items()}))
    read_again.clear()
    pack_to(out, corpus, tokenizer_folder)
    assert sorted(read_again) == sorted(names)
    # a copy elsewhere is read, since nothing is known of it
    shutil.copytree(corpus, tmp_path / "copy")
    read_again.clear()
    pack_to(out, tmp_path / "copy", tokenizer_folder)
    assert sorted(read_again) == sorted(names)


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.usefixtures("ray_session")
def test_an_edit_of_the_same_size_is_noticed(
    tmp_path: Path, corpus_folder: Path, tokenizer_folder: Path, read_again: list[str], restore: bool
) -> None:
    """Also with the old time put back, which the time of the inode's last change gives away."""
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    shutil.copytree(corpus_folder, corpus)
    pack_to(out, corpus, tokenizer_folder)
    file, before = corpus / "a.jsonl", (corpus / "a.jsonl").stat()
    data = file.read_bytes()
    file.write_bytes(data.replace(b"e", b"a", 1))
    if restore:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    with pytest.raises(ValueError, match=r"holds another pack: corpus\[0\]\.sha256"):
        pack_to(out, corpus, tokenizer_folder)
    assert read_again == ["a.jsonl"]
    file.write_bytes(data)
    pack_to(out, corpus, tokenizer_folder)


@pytest.mark.usefixtures("ray_session")
def test_files_written_just_now_are_read(
    tmp_path: Path, tokenizer_folder: Path, read_again: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within one tick of the clock a second edit would leave no mark."""
    monkeypatch.setattr("scorer.known.RACY_SECONDS", 60)
    corpus = write_corpus(tmp_path / "c.jsonl", ["text"])
    for expected in ([], ["c.jsonl"]):
        pack_to(tmp_path / "out", corpus, tokenizer_folder)
        assert read_again == expected
