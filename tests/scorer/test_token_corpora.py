"""Corpora of token ids: the rows of the same documents as text, in every format, written and read by the format's owner."""

import gzip
import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import token_files as write
import tokenizers
import transformers
from conftest import VOCABULARY, source_texts, write_corpus
from inline_ray import pack_inline

from scorer.config import PackConfig
from scorer.faults import BadFile
from scorer.sources import find_corpus, find_sources
from scorer.tokens import npy
from scorer.tokens.read import Reading, read_tokens
from shards import ShardFolder
from shards.side_table import fields_of
from shards.verify import verify_folder

Remit = Callable[..., tuple[int, str, str]]
TEXTS = [*source_texts(60, seed=31), "", "x", "", "end"]


def pack_to(out: Path, corpus: object, tokenizer: Path, **settings: object) -> ShardFolder:
    words = [str(word) for word in (corpus if isinstance(corpus, list) else [corpus])]
    return pack_inline(
        PackConfig(words, str(tokenizer), str(out), **({"seq_len": 48, "tokens_per_shard": 48 * 40} | settings))
    )


def batches_of(folder: ShardFolder) -> list[list[pa.RecordBatch]]:
    """The record batches of each part."""
    parts = []
    for plan in folder.manifest.parts:
        reader = pa.ipc.open_file(folder.store.buffer(plan.name))
        parts.append([reader.get_batch(index) for index in range(reader.num_record_batches)])
    return parts


def bytes_of(folder: ShardFolder) -> list[list[bytes]]:
    """The bytes of each record batch, without the provenance of its part."""
    return [
        [batch.replace_schema_metadata(None).serialize().to_pybytes() for batch in part] for part in batches_of(folder)
    ]


def tokenised(tokenizer_folder: Path, texts: list[str] = TEXTS) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    return [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]


@pytest.fixture(scope="session")
def documents(tokenizer_folder: Path) -> list[list[int]]:
    return tokenised(tokenizer_folder)


@pytest.fixture(scope="session")
def as_text(built_once: Callable, tokenizer_folder: Path) -> ShardFolder:
    """The documents packed as text."""

    def build(folder: Path) -> None:
        corpus = write_corpus(folder / "text.jsonl", TEXTS)
        pack_to(folder / "out", corpus, tokenizer_folder)

    return ShardFolder(built_once("as-text", build) / "out")


def two_sequences_each(documents: list[list[int]]) -> list[list[list[int]]]:
    """Documents of several sequences, one of them empty."""
    return [[ids[:3], [], ids[3:]] for ids in documents]


FORMATS: dict[str, tuple[Callable[[Path, list[list[int]]], Path], dict]] = {
    "npy": (lambda folder, docs: write.write_raw_npy(folder / "a.npy", docs), {}),
    "npy uint32": (lambda folder, docs: write.write_raw_npy(folder / "a.npy", docs, "uint32"), {"tokens_dtype": "uint32"}),
    "npy with header": (lambda folder, docs: _saved(folder / "a.NPY", write.flat(docs, "int64")), {}),
    "ds": (lambda folder, docs: write.write_ds(folder, docs), {}),
    "ds of 4 bytes": (lambda folder, docs: write.write_ds(folder, docs, 4), {}),
    "ds without metadata": (lambda folder, docs: write.write_ds(folder, docs, 4, metadata=False), {}),
    "megatron": (lambda folder, docs: write.write_megatron(folder, two_sequences_each(docs)), {}),
    "megatron int64": (lambda folder, docs: write.write_megatron(folder, [[ids] for ids in docs], "int64", 5), {}),
    "megatron of datatrove": (lambda folder, docs: write.write_megatron_by_datatrove(folder, docs), {}),
    "parquet": (lambda folder, docs: write.write_parquet(folder / "a.parquet", docs, pa.list_(pa.uint16())), {"tokens_field": "input_ids"}),
    "parquet large": (lambda folder, docs: write.write_parquet(folder / "a.parquet", docs, pa.large_list(pa.int64())), {"tokens_field": "input_ids"}),
    "arrow file": (lambda folder, docs: write.write_arrow(folder / "a.arrow", docs), {"tokens_field": "input_ids"}),
    "arrow stream": (lambda folder, docs: write.write_arrow(folder / "a.arrow", docs, pa.ipc.new_stream), {"tokens_field": "input_ids"}),
    "saved dataset": (lambda folder, docs: write.write_dataset(folder, docs), {"tokens_field": "input_ids"}),
    "opened dataset": (lambda folder, docs: Path(f"{write.write_dataset(folder, docs)}::"), {"tokens_field": "input_ids"}),
    "json lines": (lambda folder, docs: _lines(folder / "a.jsonl.gz", docs), {"tokens_field": "input_ids"}),
}  # fmt: skip


def _saved(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        np.save(file, array)
    return path


def _lines(path: Path, documents: list[list[int]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps({"input_ids": ids}) + "\n" for ids in documents).encode()))
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_same_rows_as_text(
    tmp_path: Path, name: str, documents: list[list[int]], as_text: ShardFolder, tokenizer_folder: Path
) -> None:
    writer, settings = FORMATS[name]
    corpus = writer(tmp_path / "corpus", documents)
    folder = pack_to(tmp_path / "out", corpus, tokenizer_folder, **settings)
    assert bytes_of(folder) == bytes_of(as_text)
    assert folder.manifest.documents == as_text.manifest.documents
    assert folder.manifest.documents["empty"] == TEXTS.count("")
    assert not verify_folder(folder).problems
    (file,) = folder.manifest.corpus
    assert (file.documents_with_bos, file.eos_added, file.bos_tokens) == (0, 0, 0)


@pytest.mark.parametrize("name", ["parquet", "saved dataset", "json lines"])
def test_missing_eos_is_put_there_and_counted(
    tmp_path: Path, name: str, documents: list[list[int]], as_text: ShardFolder, tokenizer_folder: Path
) -> None:
    writer, settings = FORMATS[name]
    corpus = writer(tmp_path / "corpus", [ids[:-1] if index % 2 else ids for index, ids in enumerate(documents)])
    folder = pack_to(tmp_path / "out", corpus, tokenizer_folder, **settings)
    assert bytes_of(folder) == bytes_of(as_text)
    assert folder.manifest.corpus[0].eos_added == sum(len(ids) > 1 for ids in documents[1::2])
    with pytest.raises(BadFile, match=r"document 1 does not end in EOS \(id 0\)"):
        pack_to(tmp_path / "again", corpus, tokenizer_folder, **settings, on_missing_eos="stop")
    assert not (tmp_path / "again").exists()


# --- documents that begin with BOS, and odd documents -----------------------------------------------------------------


@pytest.fixture(scope="session")
def with_bos(built_once: Callable, tokenizer_folder: Path) -> Path:
    """The same tokenizer, whose own call puts a BOS in front of a text."""

    def build(folder: Path) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
        tokenizer.add_special_tokens({"bos_token": "<bos>"})
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
        )
        tokenizer.save_pretrained(folder)

    return built_once("tokenizer-with-bos", build)


@pytest.mark.parametrize("name", ["npy", "ds", "megatron", "parquet"])
def test_documents_with_bos_give_the_rows_of_text(
    tmp_path: Path, name: str, documents: list[list[int]], with_bos: Path
) -> None:
    text = pack_to(tmp_path / "text", write_corpus(tmp_path / "t.jsonl", TEXTS), with_bos)
    bos = text.manifest.tokenizer["bos_token_id"]
    writer, settings = FORMATS[name]
    corpus = writer(tmp_path / "corpus", [[bos, *ids] for ids in documents])
    folder = pack_to(tmp_path / "out", corpus, with_bos, **settings)
    assert bytes_of(folder) == bytes_of(text)
    file = folder.manifest.corpus[0]
    assert file.documents_with_bos == file.documents_packed > 50
    assert file.bos_tokens == text.manifest.corpus[0].bos_tokens
    assert not verify_folder(folder).problems
    as_found = pack_to(tmp_path / "never", corpus, with_bos, **settings, bos="never")
    stream = [token for ids in documents if len(ids) > 1 for token in [bos, *ids]]
    assert [
        token for part in batches_of(as_found) for batch in part for token in batch["input_ids"].flatten().to_pylist()
    ] == stream


def test_bos_of_some_documents_wants_a_decision(
    tmp_path: Path, documents: list[list[int]], with_bos: Path, as_text: ShardFolder
) -> None:
    plain = write.write_ds(tmp_path / "plain", documents)
    folder = pack_to(tmp_path / "a", plain, with_bos)
    assert bytes_of(folder) == bytes_of(as_text)
    assert folder.manifest.tokenizer["bos_token_id"] is None
    mixed = write.write_ds(
        tmp_path / "mixed", [[VOCABULARY, *ids] if index > 9 else ids for index, ids in enumerate(documents)]
    )
    with pytest.raises(BadFile, match=r"document 10 begins with BOS \(id 521\), others begin without; --bos always"):
        pack_to(tmp_path / "b", mixed, with_bos)
    text = write_corpus(tmp_path / "t.jsonl", TEXTS)
    always = pack_to(tmp_path / "c", mixed, with_bos, bos="always")
    assert bytes_of(always) == bytes_of(pack_to(tmp_path / "d", text, with_bos))
    with pytest.raises(ValueError, match="begin without BOS, and those that are text would begin with it"):
        pack_to(tmp_path / "e", [plain, text], with_bos)


ODD: list[list[list[int]]] = [
    [[7, 0]],
    [[0], [0], [5, 0], [0]],
    [[9, 0]] * 5 + [[3] * 47 + [0]] + [[4] * 48 + [0]] + [[5] * 500 + [0]],
    [[8, 0, 9, 0]],
    [[1, 0]] * 200,
]


@pytest.mark.parametrize("name", ["ds", "megatron of datatrove", "megatron", "parquet", "arrow stream", "npy"])
@pytest.mark.parametrize("number", range(len(ODD)))
def test_odd_documents(tmp_path: Path, name: str, number: int, tokenizer_folder: Path) -> None:
    """One-token documents, empty ones, EOS inside of one: by a reading of the rows that has nothing to do with packing."""
    writer, settings = FORMATS[name]
    documents = ODD[number]
    if name == "npy":  # where EOS ends a document, and one-token documents alone look like uint32
        documents = [[*part, 0] for ids in documents for part in _split(ids)]
        settings = {"tokens_dtype": "uint16"}
    folder = pack_to(tmp_path / "out", writer(tmp_path / "corpus", documents), tokenizer_folder, **settings)
    found: dict[int, list[int]] = {}
    for part in batches_of(folder):
        for row in (row for batch in part for row in batch.to_pylist()):
            ends = np.cumsum(row["doc_lengths"]).tolist()
            for doc_id, end, length in zip(row["doc_ids"], ends, row["doc_lengths"]):
                found.setdefault(doc_id, []).extend(row["input_ids"][end - length : end])
    assert found == {index: ids for index, ids in enumerate(documents) if ids != [0]}
    assert not verify_folder(folder).problems


def _split(ids: list[int]) -> Iterator[list[int]]:
    part: list[int] = []
    for token in ids:
        if token:
            part.append(token)
        else:
            yield part
            part = []


# --- files that are not what they should be -----------------------------------------------------------------------------

IDS = [[5, 6, 7, 0], [300, 0], [9] * 70 + [0]]


def damage_file(name: str) -> Callable[[Path], None]:
    """Cut the file `name` off in its middle, at an even place."""

    def cut(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 4 * 2])

    return cut


def replace(name: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        assert old in data
        (folder / name).write_bytes(data.replace(old, new, 1))

    return change


def overwrite(name: str, data: bytes, at: int | None = None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / name
        before = file.read_bytes() if at is not None else b""
        file.write_bytes(before[: at or 0] + data + before[(at or 0) + len(data) :])

    return change


def nothing(folder: Path) -> None:
    return


NPY = lambda folder: write.write_raw_npy(folder / "a.npy", IDS)  # noqa: E731
DS = lambda folder: write.write_ds(folder, IDS)  # noqa: E731
MEGATRON = lambda folder: write.write_megatron(folder, [[ids] for ids in IDS])  # noqa: E731
PARQUET = lambda folder: write.write_parquet(folder / "a.parquet", IDS * 9, pa.list_(pa.int32()))  # noqa: E731
ARROW = lambda folder: write.write_arrow(folder / "a.arrow", IDS * 9)  # noqa: E731
STREAM = lambda folder: write.write_arrow(folder / "a.arrow", IDS * 9, pa.ipc.new_stream)  # noqa: E731


def _array(array: np.ndarray) -> Callable[[Path], Path]:
    return lambda folder: _saved(folder / "a.npy", array)


def _pickled(folder: Path) -> Path:
    folder.mkdir()
    np.save(folder / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return folder / "a.npy"


def _text(name: str) -> Callable[[Path], None]:
    return overwrite(name, b'{"text": "not tokens at all but a document"}\n' * 4)


def _numpy_header(count: int) -> bytes:
    text = f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({count},), }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n"


FAULTS: list[tuple[Callable[[Path], Path], Callable[[Path], None], str]] = [
    (NPY, overwrite("a.npy", b"\x05\x00\x06"), "3 bytes, expected a multiple of 2"),
    (NPY, overwrite("a.npy", b""), "0 bytes, expected token ids"),
    (NPY, damage_file("a.npy"), "document 2 does not end in EOS"),
    (NPY, _text("a.npy"), "holds text"),
    (NPY, overwrite("a.npy", gzip.compress(b"tokens" * 9)), "holds gzip data"),
    (lambda folder: write.write_raw_npy(folder / "a.npy", IDS, ">u2"), nothing, "id 1,280, expected ids 0 to 520; all would be ids if they were big-endian"),
    (lambda folder: write.write_raw_npy(folder / "a.npy", IDS * 9, "uint32"), nothing, "could be uint32 as well as uint16"),
    (lambda folder: write.write_raw_npy(folder / "a.npy", [[600, 0]]), nothing, "document 0: token 0 has id 600"),
    (lambda folder: write.write_raw_npy(folder / "a.npy", [[5, 0], [6, 521, 0]]), nothing, "document 1: token 1 has id 521"),
    (_array(write.flat(IDS, ">u2")), nothing, "is big-endian"),
    (_array(write.flat(IDS, "float32")), nothing, "dtype float32, expected integers"),
    (_array(write.flat(IDS, "int32").reshape(-1, 1)), nothing, "expected one dimension"),
    (_array(write.flat([[-1, 0]], "int32")), nothing, "has id -1"),
    (_array(write.flat(IDS, "uint16")), damage_file("a.npy"), "cut off"),
    (_pickled, nothing, "dtype object, expected integers"),
    (NPY, overwrite("a.npy", _numpy_header(1 << 62)), "counts 4,611,686,018,427,387,904 of 2"),
    (NPY, overwrite("a.npy", b"\x93NUMPY\x01\x00\xff\xff{" + b"[" * 70000), "numpy header cannot be read"),
    (DS, overwrite("a.ds", b"", None), "0 bytes, its metadata say 77 tokens"),
    (DS, damage_file("a.ds"), "its metadata say 77 tokens of 2 bytes"),
    (DS, damage_file("a.ds.index"), "12 bytes, expected a multiple of 8"),
    (DS, lambda folder: (folder / "a.ds.index").unlink(), "has no .ds.index beside it"),
    (DS, overwrite("a.ds.index", struct.pack("<3Q", 6, 4, 77)), "document 1 ends at token 4, expected 6 to 77"),
    (DS, overwrite("a.ds.index", struct.pack("<3Q", 4, 1 << 63, 77)), "document 1 ends at token 9,223,372,036,854,775,808"),
    (DS, overwrite("a.ds.index", struct.pack("<2Q", 4, 6)), "ends at token 6, X.ds has 77"),
    (DS, overwrite("a.ds.index", struct.pack(">3Q", 4, 6, 77)), "document 0 ends at token 288,230,376,151,711,744"),
    (DS, overwrite("a.ds.metadata", b"tokenizer|3\n77\n"), "expected TOKENIZER|2 or TOKENIZER|4"),
    (DS, overwrite("a.ds.metadata", b"tokenizer|4\n77\n"), "154 bytes, its metadata say 77 tokens of 4"),
    (DS, _text("a.ds"), "holds text"),
    (MEGATRON, damage_file("a.bin"), "a.bin: 154 bytes, expected a multiple of 4"),
    (MEGATRON, overwrite("a.bin", bytes(400)), "its sequences have 77 tokens, X.bin has 100"),
    (MEGATRON, overwrite("a.bin", b"", None), "document 2 ends at token 77 by its index, the file has 0"),
    (MEGATRON, damage_file("a.idx"), "its header counts 3 sequences and 4 document borders, which take 102"),
    (MEGATRON, overwrite("a.idx", b"", None), "0 bytes without the mark"),
    (MEGATRON, lambda folder: (folder / "a.idx").unlink(), "has no .idx beside it"),
    (MEGATRON, overwrite("a.idx", b"MMIDIDX\x00\x01", 0), "without the mark"),
    (MEGATRON, overwrite("a.idx", struct.pack("<Q", 2), 9), "version 2, expected 1"),
    (MEGATRON, overwrite("a.idx", b"\x07", 17), "dtype code 7 (float32)"),
    (MEGATRON, overwrite("a.idx", b"\x63", 17), "dtype code 99 (unknown)"),
    (MEGATRON, overwrite("a.idx", b"\x05", 17), "308 bytes, expected a multiple of 8"),
    (MEGATRON, overwrite("a.idx", struct.pack("<Q", 1 << 62), 18), "counts 4,611,686,018,427,387,904 sequences"),
    (MEGATRON, overwrite("a.idx", struct.pack("<i", -4), 34), "sequence 0 has -4 tokens"),
    (MEGATRON, overwrite("a.idx", struct.pack("<q", 400), 46), "sequence 0 begins at byte 400, expected 0"),
    (MEGATRON, overwrite("a.idx", struct.pack("<4q", 0, 2, 1, 3), 70), "document borders are out of order at document 1"),
    (MEGATRON, overwrite("a.idx", struct.pack("<4q", 0, 1, 2, 2), 70), "its documents have 2 of its 3 sequences"),
    (MEGATRON, overwrite("a.idx", struct.pack("<4q", 0, 1, 2, 9), 70), "document borders are out of order"),
    (lambda folder: write.write_megatron(folder, [[ids] for ids in IDS], order=">"), nothing, "it is big-endian"),
    (lambda folder: write.write_megatron(folder, [[ids] for ids in IDS], "uint16", 4), nothing, "154 bytes, expected a multiple of 4"),
    (lambda folder: write.write_megatron(folder, [[[-3, 0]]]), nothing, "has id -3"),
    (PARQUET, damage_file("a.parquet"), "not a parquet file"),
    (PARQUET, overwrite("a.parquet", b"", None), "not a parquet file"),
    (PARQUET, _text("a.parquet"), "not a parquet file"),
    (ARROW, damage_file("a.arrow"), "not an Arrow file or stream"),
    (STREAM, damage_file("a.arrow"), "cut off"),
    (ARROW, overwrite("a.arrow", b"", None), "not an Arrow file"),
    (lambda folder: write.write_parquet(folder / "a.parquet", IDS, pa.list_(pa.float32())), nothing, "expected lists of integers"),
    (lambda folder: write.write_parquet(folder / "a.parquet", [[1, None, 0]], pa.list_(pa.int32())), nothing, "has a null among its ids"),
    (lambda folder: write.write_parquet(folder / "a.parquet", [None, [1, 0]], pa.list_(pa.int32())), nothing, "row 0: input_ids is null"),
    (lambda folder: write.write_parquet(folder / "a.parquet", [[4, 1], [1, 0]], pa.list_(pa.int32()), attention_mask=[[1, 1], [1, 0]]), nothing, "row 1: attention_mask is 0"),
    (lambda folder: write_corpus(folder / "a.jsonl", ["text"]), nothing, "has no field 'input_ids'"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_a_fault_is_one_line_and_nothing_is_written(tmp_path: Path, number: int, tokenizer_folder: Path) -> None:
    writer, damage, message = FAULTS[number]
    corpus = writer(tmp_path / "corpus")
    damage(tmp_path / "corpus")
    before = sorted(tmp_path.rglob("*"))
    settings = {} if corpus.suffix in (".npy", ".ds", ".bin") else {"tokens_field": "input_ids"}
    with pytest.raises(ValueError, match=".*" + re.escape(message)) as error:
        pack_to(tmp_path / "out", corpus, tokenizer_folder, **settings)
    assert str(corpus.parent) in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


# --- what the owners of the formats read ---------------------------------------------------------------------------------


def rows_of(folder: ShardFolder) -> list[list[int]]:
    return [row for part in batches_of(folder) for batch in part for row in batch["input_ids"].to_pylist()]


def document_starts(folder: ShardFolder) -> list[tuple[int, int]]:
    """First token and one past the last of each document, in the stream of all rows."""
    lengths: dict[int, int] = {}
    for part in batches_of(folder):
        for batch in part:
            for doc_id, length in zip(
                batch["doc_ids"].flatten().to_pylist(), batch["doc_lengths"].flatten().to_pylist()
            ):
                lengths[doc_id] = lengths.get(doc_id, 0) + length
    ends = np.cumsum(list(lengths.values())).tolist()
    return list(zip([0, *ends], ends))


def test_olmo_core_reads_the_same(tmp_path: Path, documents: list[list[int]], tokenizer_folder: Path) -> None:
    """Its dataset of fixed sequence length cuts the same rows, its reader of documents finds the same ones."""
    utils = pytest.importorskip("olmo_core.data.utils")
    from olmo_core.data import NumpyFSLDataset

    full = [ids for ids in documents if len(ids) > 1]
    file = write.write_raw_npy(tmp_path / "corpus" / "part-0-00000.npy", full)
    folder = pack_to(tmp_path / "out", file, tokenizer_folder)
    theirs = NumpyFSLDataset(
        file,
        sequence_length=48,
        pad_token_id=1,
        eos_token_id=0,
        vocab_size=VOCABULARY,
        dtype=np.uint16,
        bos_token_id=None,
    )
    theirs.prepare()
    assert [theirs[index]["input_ids"].tolist() for index in range(len(theirs))] == rows_of(folder)[: len(theirs)]
    assert len(rows_of(folder)) - len(theirs) in (0, 1)  # it drops the short last one
    assert list(utils.iter_document_indices(file, eos_token_id=0, dtype=np.uint16)) == document_starts(folder)

    inside = [
        [5, 0, 6, 0],
        [0, 7],
        *full,
    ]  # documents with EOS inside and without one at the end: the index tells them apart
    file = write.write_raw_npy(tmp_path / "indexed" / "part-0-00000.npy", inside)
    ends = np.cumsum([len(ids) for ids in inside]).tolist()
    lines = "".join(
        f"{start},{end},id,src.jsonl.gz,{number}\r\n" for number, (start, end) in enumerate(zip([0, *ends], ends))
    )
    (tmp_path / "indexed" / "part-0-00000.csv.gz").write_bytes(gzip.compress(lines.encode()))
    found = list(utils.iter_document_indices(file, eos_token_id=0, dtype=np.uint16, use_array_if_local=False))
    blocks = list(read_tokens(find_sources([str(file)])[0], Reading(None, "auto", VOCABULARY, 0), 1 << 27))
    assert [end - start for start, end in found] == [length for block in blocks for length in block.lengths.tolist()]
    assert np.concatenate([block.ids for block in blocks]).tolist() == [token for ids in inside for token in ids]
    folder = pack_to(tmp_path / "again", tmp_path / "indexed", tokenizer_folder)
    assert (folder.manifest.documents["packed"], folder.manifest.corpus[0].eos_added) == (len(inside), 1)
    assert list(folder.manifest.corpus[0].beside or {}) == ["part-0-00000.csv.gz"]
    assert not folder.manifest.passed_over
    utils.write_document_indices(file, dtype=np.uint16, eos_token_id=0)
    with pytest.raises(ValueError, match=r"corpus\[0\]\.beside\.part-0-00000\.csv\.gz"):
        pack_to(tmp_path / "again", tmp_path / "indexed", tokenizer_folder)


@pytest.mark.parametrize("size", [2, 4])
def test_datatrove_reads_the_same(
    tmp_path: Path, size: int, documents: list[list[int]], tokenizer_folder: Path
) -> None:
    from datatrove.utils.dataset import DatatroveFileDataset

    full = [ids for ids in documents if len(ids) > 1]
    file = write.write_ds(tmp_path, full, size)
    folder = pack_to(tmp_path / "out", file, tokenizer_folder)
    theirs = DatatroveFileDataset(str(file), seq_len=47, token_size=size)
    assert [theirs[index]["input_ids"].tolist() for index in range(len(theirs))] == rows_of(folder)[: len(theirs)]
    assert len(theirs) > 50


def test_what_says_where_documents_end_must_fit(tmp_path: Path, tokenizer_folder: Path) -> None:
    file = write.write_raw_npy(tmp_path / "corpus" / "a.npy", IDS)
    index = file.with_suffix(".csv.gz")
    for lines, message in [
        ("0,4\n4,6\n", "ends at token 6, the tokens at 77 as uint16"),
        ("0,4\n4,6\n6,78\n", "a.csv.gz:3: document from token 6 to 78"),
        ("0,4\n5,77\n", "a.csv.gz:2: document from token 5 to 77, expected one from 4 on"),
        ("0,4\n4,2\n", "a.csv.gz:2: document from token 4 to 2"),
        ("id,text\n", "a.csv.gz:1: is b'id,text"),
        ("0," + "9" * 30 + "\n", "a.csv.gz:1: is b'0,999"),
    ]:
        index.write_bytes(gzip.compress(lines.encode()))
        with pytest.raises(BadFile, match=re.escape(message)):
            pack_to(tmp_path / "out", tmp_path / "corpus", tokenizer_folder)
    index.write_bytes(gzip.compress(b"0,4\n4,6\n6,77\n")[:-9])
    with pytest.raises(BadFile, match="cannot be read beyond line"):
        pack_to(tmp_path / "out", tmp_path / "corpus", tokenizer_folder)


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
@pytest.mark.parametrize("kind", ["npy", "ds"])
def test_masks_say_what_is_predicted(tmp_path: Path, kind: str, packing: str, with_bos: Path) -> None:
    """As open-instruct writes them for OLMo-core (token_ids_part_0000.npy, labels_mask_part_0000.npy), and as datatrove does.
    The rows' mask is that of the file, token by token, whatever the rows' own BOS."""
    documents = [[5, 6, 7, 0], [300, 0], [9] * 70 + [0], [0], [11, 12, 0]]
    mask = [[0, 1, 1, 0], [1, 1], [1, 0] * 35 + [1], [1], [0, 0, 1]]
    for bos in ("never", "always"):
        folder = tmp_path / bos
        if kind == "npy":
            corpus = write.write_raw_npy(folder / "token_ids_part_0000.npy", documents)
            np.array([value for values in mask for value in values], dtype=bool).tofile(
                folder / "labels_mask_part_0000.npy"
            )
        else:
            corpus = write.write_ds(folder, documents, loss=True)
            (folder / "a.ds.loss").write_bytes(bytes(value for values in mask for value in values))
        assert [source.name for source in find_sources([str(folder)])] == [corpus.name]
        packed = pack_to(folder / "out", corpus, with_bos, bos=bos, packing=packing)
        found: dict[int, list[tuple[int, bool]]] = {}
        bos_predicted = 0
        for part in batches_of(packed):
            for row in (row for batch in part for row in batch.to_pylist()):
                ends = np.cumsum(row["doc_lengths"]).tolist()
                for doc_id, end, length in zip(row["doc_ids"], ends, row["doc_lengths"]):
                    piece = list(zip(row["input_ids"], row["predict"]))[end - length : end]
                    if bos == "always":
                        whole = all(mask[doc_id])  # then its BOS is predicted as every token is
                        assert piece[0] == (VOCABULARY, whole)
                        bos_predicted += whole
                        piece = piece[1:]
                    found.setdefault(doc_id, []).extend(piece)
        expected = {
            index: list(zip(ids, map(bool, values)))
            for index, (ids, values) in enumerate(zip(documents, mask))
            if index != 3
        }
        assert found == expected
        assert packed.manifest.corpus[0].predicted_tokens == sum(sum(values) for values in mask) - 1 + bos_predicted
        assert not verify_folder(packed).problems


def test_masks_must_fit(tmp_path: Path, tokenizer_folder: Path) -> None:
    write.write_raw_npy(tmp_path / "c" / "token_ids_part_0000.npy", IDS)
    mask = tmp_path / "c" / "labels_mask_part_0000.npy"
    for data, message in [
        (b"\1" * 76, "154 bytes, the mask beside it is of 76 tokens"),
        (b"\1" * 38 + b"\2" + b"\1" * 38, "byte 38 is 2, expected 0 or 1; it is no mask"),
        (b"", "is of 0 tokens"),
    ]:
        mask.write_bytes(data)
        with pytest.raises(BadFile, match=message):
            pack_to(tmp_path / "out", tmp_path / "c", tokenizer_folder)
    write.write_ds(tmp_path / "d", IDS, loss=True)
    (tmp_path / "d" / "a.ds.loss").write_bytes(b"\1" * 78)
    with pytest.raises(BadFile, match=r"a\.ds\.loss: is of 78 tokens, the file beside it has 77"):
        pack_to(tmp_path / "out", tmp_path / "d", tokenizer_folder)


@pytest.mark.parametrize("name", ["npy", "ds", "parquet"])
def test_best_fit_gives_the_rows_of_text(
    tmp_path: Path, name: str, documents: list[list[int]], tokenizer_folder: Path
) -> None:
    writer, settings = FORMATS[name]
    text = pack_to(tmp_path / "text", write_corpus(tmp_path / "t.jsonl", TEXTS), tokenizer_folder, packing="best-fit")
    folder = pack_to(
        tmp_path / "out", writer(tmp_path / "corpus", documents), tokenizer_folder, **settings, packing="best-fit"
    )
    assert bytes_of(folder) == bytes_of(text)
    assert not verify_folder(folder).problems


def test_folders_of_token_files(tmp_path: Path, tokenizer_folder: Path, as_text: ShardFolder) -> None:
    """What belongs to a file of tokens is not counted beside it; what has lost its partner is."""
    write.write_ds(tmp_path / "c" / "ds", IDS, loss=False)
    write.write_megatron(tmp_path / "c" / "megatron", [[ids] for ids in IDS])
    write.write_raw_npy(tmp_path / "c" / "x.npy", IDS)
    (tmp_path / "c" / "x.csv.gz").write_bytes(gzip.compress(b"0,4\n4,6\n6,77\n"))
    for name in (
        "pytorch_model.bin",
        "lonely.idx",
        "labels_mask_9.npy",
        "x.npy.gz",
        "cache-0123.arrow",
        "other.csv.gz",
    ):
        (tmp_path / "c" / name).write_bytes(b"?")
    for corpus in (tmp_path / "c", f"{tmp_path}/c/**/*"):
        found = find_corpus([str(corpus)])
        assert [source.name for source in found.sources] == ["ds/a.ds", "megatron/a.bin", "x.npy"]
        left = {
            ".bin without .idx": 1,
            ".idx": 1,
            "mask without token ids": 1,
            ".npy.gz": 1,
            "cache of datasets": 1,
            ".csv.gz": 1,
        }
        assert {kind: count for kind, count in found.passed_over.items() if kind != "folder"} == left
    folder = pack_to(tmp_path / "out", tmp_path / "c", tokenizer_folder)
    assert [file.documents_packed for file in folder.manifest.corpus] == [3, 3, 3]
    assert not verify_folder(folder).problems
    with pytest.raises(
        ValueError, match=r"x\.npy\.gz: not a corpus file: \.npy files are read at any place, so not compressed"
    ):
        find_corpus([str(tmp_path / "c" / "x.npy.gz")])


def test_bad_files_can_be_left_out(tmp_path: Path, tokenizer_folder: Path) -> None:
    write.write_raw_npy(tmp_path / "c" / "a.npy", [[5, 0], [999, 0]])
    write.write_ds(tmp_path / "c" / "b", IDS)
    (tmp_path / "c" / "b" / "a.ds.index").unlink()
    write.write_megatron(tmp_path / "c" / "d", [[ids] for ids in IDS])
    folder = pack_to(tmp_path / "out", tmp_path / "c", tokenizer_folder, on_bad_file="reject")
    assert [bool(file.left_out) for file in folder.manifest.corpus] == [True, True, False]
    assert not verify_folder(folder).problems


def test_documents_of_a_table_can_be_left_out(tmp_path: Path, tokenizer_folder: Path) -> None:
    write.write_parquet(tmp_path / "a.parquet", [[1, 0], None, [2, 0]], pa.list_(pa.int32()), url=["a", "b", "c"])
    folder = pack_to(
        tmp_path / "out", tmp_path / "a.parquet", tokenizer_folder, tokens_field="input_ids", on_bad_document="reject",
        keep_fields="url",
    )  # fmt: skip
    assert folder.manifest.documents == {"read": 3, "packed": 2, "empty": 0, "rejected": 1}
    assert fields_of(folder, 0, [0, 1, 2]) == {0: {"url": "a"}, 2: {"url": "c"}}
    assert not verify_folder(folder).problems


def test_dtypes_that_cannot_hold_the_ids_want_a_word(tmp_path: Path, tokenizer_folder: Path) -> None:
    """uint16 with a vocabulary beyond it: refused where the file says so, taken where the user does."""
    source = find_sources([str(write.write_ds(tmp_path, IDS, 2))])[0]
    with pytest.raises(BadFile, match="is uint16, which ends at 65,535, and the tokenizer's ids at 99,999"):
        list(read_tokens(source, Reading(None, "auto", 100_000, 0), 1 << 27))
    blocks = list(read_tokens(source, Reading(None, "uint16", 100_000, 0), 1 << 27))
    assert blocks[0].ids.tolist() == [token for ids in IDS for token in ids]
    with pytest.raises(BadFile, match="is uint16 by its index, --tokens-dtype says uint32"):
        list(read_tokens(source, Reading(None, "uint32", 521, 0), 1 << 27))
    assert [npy.smallest_dtype(size) for size in (256, 257, 65_536, 65_537, 1 << 33)] == [
        "uint8",
        "uint16",
        "uint16",
        "uint32",
        "uint64",
    ]


def test_a_document_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scorer.tokens.blocks.MAX_DOCUMENT_TOKENS", 1000)
    monkeypatch.setattr("scorer.tokens.npy.BLOCK_TOKENS", 100)
    source = find_sources([str(write.write_raw_npy(tmp_path / "a.npy", [[5] * 5000]))])[0]
    with pytest.raises(BadFile, match="document 0 has more than 1,000 tokens; is the file of this tokenizer"):
        list(read_tokens(source, Reading(None, "auto", 521, 0), 1 << 27))


def test_long_documents_in_small_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: list[list[int]]
) -> None:
    monkeypatch.setattr("scorer.tokens.npy.BLOCK_TOKENS", 7)
    monkeypatch.setattr("scorer.tokens.blocks.BLOCK_TOKENS", 7)
    for module in ("blocks", "npy", "datatrove", "megatron"):
        monkeypatch.setattr(f"scorer.tokens.{module}.BLOCK_DOCUMENTS", 3)
    monkeypatch.setattr("scorer.tokens.megatron.SEQUENCES_AT_ONCE", 2)
    for name in ("npy", "ds", "megatron"):
        source = find_sources([str(FORMATS[name][0](tmp_path / name, documents))])[0]
        blocks = list(read_tokens(source, Reading(None, "auto", 521, 0), 1 << 27))
        assert [length for block in blocks for length in block.lengths.tolist()] == [len(ids) for ids in documents]
        assert np.concatenate([block.ids for block in blocks]).tolist() == [token for ids in documents for token in ids]
        assert len(blocks) > 20
