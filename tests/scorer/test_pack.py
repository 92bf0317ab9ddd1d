"""Packing: against an independent tokenisation, the same bytes whatever the workers, bad input refused whole."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest
import transformers
import zstandard
from conftest import make_tokenizer, source_texts, write_corpus

from scorer.config import PackConfig
from scorer.pack import pack
from shards import ShardFolder
from shards.verify import verify_folder

pytestmark = pytest.mark.usefixtures("ray_session")

Remit = Callable[..., tuple[int, str, str]]


def pack_to(out: Path, corpus: list[Path] | Path, tokenizer: Path, **settings: object) -> ShardFolder:
    names = [str(path) for path in (corpus if isinstance(corpus, list) else [corpus])]
    return pack(PackConfig(names, str(tokenizer), out, **({"seq_len": 64, "tokens_per_shard": 64 * 20} | settings)))


def read_texts(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path)["text"].to_pylist()
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    if path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().decompress(data)
    return [json.loads(line)["text"] for line in data.decode().split("\n") if line]


def test_tokens_equal_transformers(packed: Path, corpus_folder: Path, tokenizer_folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    manifest = json.loads((packed / "_manifest.json").read_text())
    table = pyarrow.dataset.dataset(packed, format="arrow").to_table()
    totals = dict.fromkeys(("read", "packed", "empty", "rejected"), 0)
    for index, file in enumerate(manifest["corpus"]):
        texts = read_texts(corpus_folder / file["path"])
        documents = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        stream = [token for ids in documents if ids for token in [*ids, tokenizer.eos_token_id]]
        rows = table.filter(pa.compute.field("source") == index)
        assert [token for row in rows["input_ids"].to_pylist() for token in row] == stream
        lengths = [len(row) for row in rows["input_ids"].to_pylist()]
        assert set(lengths[:-1]) <= {64}
        assert 1 <= lengths[-1] <= 64
        pieces: dict[int, int] = {}
        for ids, sizes in zip(rows["doc_ids"].to_pylist(), rows["doc_lengths"].to_pylist()):
            for doc, size in zip(ids, sizes):
                pieces[doc] = pieces.get(doc, 0) + size
        assert pieces == {doc: len(ids) + 1 for doc, ids in enumerate(documents) if ids}
        totals["read"] += len(texts)
        totals["packed"] += len(pieces)
        totals["empty"] += sum(not ids for ids in documents)
    assert manifest["documents"] == totals
    assert totals["empty"] > 0
    assert len(manifest["parts"]) > 2


def test_same_bytes_whatever_the_workers_and_the_place(
    tmp_path: Path, corpus_folder: Path, tokenizer_folder: Path
) -> None:
    first = pack_to(tmp_path / "a", corpus_folder, tokenizer_folder, num_workers=1).path
    second = pack_to(tmp_path / "b" / "c", corpus_folder, tokenizer_folder, num_workers=4).path
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)
    assert not list(tmp_path.rglob("*.staging"))


def test_rerun_does_what_is_missing(tmp_path: Path, corpus_folder: Path, tokenizer_folder: Path) -> None:
    folder = pack_to(tmp_path / "a", corpus_folder, tokenizer_folder)
    before = {path.name: path.read_bytes() for path in folder.path.glob("*.arrow")}
    times = {path.name: path.stat().st_mtime_ns for path in folder.path.glob("*.arrow")}
    lost = ["part-00001.arrow", "part-00003.arrow"]
    for part in lost:
        (folder.path / part).unlink()
        (folder.path / "_commits" / part).with_suffix(".json").unlink()
    again = pack_to(tmp_path / "a", corpus_folder, tokenizer_folder)
    assert {path.name: path.read_bytes() for path in again.path.glob("*.arrow")} == before
    kept = {path.name for path in again.path.glob("*.arrow") if path.stat().st_mtime_ns == times[path.name]}
    assert kept == before.keys() - set(lost)
    assert not verify_folder(again).problems


def test_other_settings_are_refused(tmp_path: Path, corpus_folder: Path, tokenizer_folder: Path) -> None:
    pack_to(tmp_path / "a", corpus_folder, tokenizer_folder)
    with pytest.raises(ValueError, match="--seq-len is 64 there, 32 asked for now"):
        pack_to(tmp_path / "a", corpus_folder, tokenizer_folder, seq_len=32, tokens_per_shard=32 * 40)
    with pytest.raises(ValueError, match=r"corpus has 4 entries there, 1 asked"):
        pack_to(tmp_path / "a", corpus_folder / "a.jsonl", tokenizer_folder)


def test_big_document_and_many_small_files(tmp_path: Path, tokenizer_folder: Path) -> None:
    big = "naïve 日本 " * 400_000  # 5.6 MB
    files = [write_corpus(tmp_path / "corpus" / f"{index:02d}.jsonl", ["tiny", ""]) for index in range(12)]
    files.append(write_corpus(tmp_path / "corpus" / "big.jsonl.zst", ["before", big, "after"]))
    folder = pack_to(tmp_path / "out", tmp_path / "corpus", tokenizer_folder, seq_len=512, tokens_per_shard=512 * 1000)
    assert not verify_folder(folder).problems
    assert folder.manifest.documents == {"read": 27, "packed": 15, "empty": 12, "rejected": 0}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in ("before", big, "after"))
    assert folder.manifest.corpus[-1].tokens == tokens
    # parts are cut over all rows, not per file: twelve one-row files do not make twelve parts
    assert len(folder.manifest.parts) == -(-folder.manifest.rows // 1000)


def test_special_tokens_in_the_text(tmp_path: Path, tokenizer_folder: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", ["say <|endoftext|> twice"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    eos = tokenizer.eos_token_id
    for mode, expected in (("parse", 2), ("text", 1)):
        out = tmp_path / mode
        pack_to(out, corpus, tokenizer_folder, special_tokens=mode)
        ids = pyarrow.dataset.dataset(out, format="arrow").to_table()["input_ids"].to_pylist()[0]
        assert ids.count(eos) == expected
        assert tokenizer.decode(ids[:-1]) == "say <|endoftext|> twice"


def test_truncation_of_the_tokenizer_is_ignored(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in tokenizer_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    value = json.loads((folder / "tokenizer.json").read_text())
    value["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    value["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(value))
    corpus = write_corpus(tmp_path / "c.jsonl", source_texts(20, seed=8))
    plain, odd = pack_to(tmp_path / "a", corpus, tokenizer_folder), pack_to(tmp_path / "b", corpus, folder)
    assert plain.manifest.tokens == odd.manifest.tokens
    assert plain.manifest.tokenizer == odd.manifest.tokenizer


def test_datasets_folder_with_suffixes_and_globs(tmp_path: Path, corpus_folder: Path, tokenizer_folder: Path) -> None:
    by_glob = pack_to(
        tmp_path / "a", [Path(f"{corpus_folder}/*.jsonl*"), corpus_folder / "d.parquet"], tokenizer_folder
    )
    assert [file.path for file in by_glob.manifest.corpus] == ["a.jsonl", "b.jsonl.gz", "d.parquet"]
    assert [file.path for file in ShardFolder(pack_to(tmp_path / "b", corpus_folder, tokenizer_folder).path).manifest.corpus] == [
        "a.jsonl", "b.jsonl.gz", "d.parquet", "sub/c.jsonl.zst",
    ]  # fmt: skip


def bad_file(folder: Path, kind: str) -> Path:
    good = source_texts(300, seed=6)
    if kind == "truncated.zst":
        path = write_corpus(folder / "x.jsonl.zst", good)
    elif kind == "truncated.gz":
        path = write_corpus(folder / "x.jsonl.gz", good)
    elif kind == "parquet":
        path = write_corpus(folder / "x.parquet", good)
    else:
        path = folder / "x.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        line = {
            "no field": b'{"other": "x"}',
            "not a string": b'{"text": 17}',
            "null": b'{"text": null}',
            "utf-8": b'{"text": "caf\xe9"}',
            "surrogate": b'{"text": "\\ud800"}',
            "not json": b"hello",
            "array": b'["a"]',
            "cut line": b'{"text": "half',
        }[kind]
        path.write_bytes(b'{"text": "fine"}\n' * 5 + line + b"\n")
        return path
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path


BAD = {
    "no field": "x.jsonl:6: has no field 'text', only other",
    "not a string": "x.jsonl:6: field 'text' is int '17', expected a string",
    "null": "x.jsonl:6: field 'text' is NoneType",
    "utf-8": "x.jsonl:6: byte 13 is 0xe9, which is not valid UTF-8",
    "surrogate": "x.jsonl:6: field 'text' has an unpaired surrogate at character 0",
    "not json": "x.jsonl:6: not JSON",
    "array": "x.jsonl:6: is a JSON list, expected an object",
    "cut line": "x.jsonl:6: not JSON",
    "truncated.zst": "x.jsonl.zst: cannot be read beyond line",
    "truncated.gz": "x.jsonl.gz: cannot be read beyond line",
    "parquet": "x.parquet: not a parquet file",
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_corpus_is_refused_whole(tmp_path: Path, tokenizer_folder: Path, remit: Remit, kind: str) -> None:
    bad_file(tmp_path / "corpus", kind)
    out = tmp_path / "out"
    code, _, error = remit(
        "pack", "--corpus", tmp_path / "corpus", "--tokenizer", tokenizer_folder, "--out", out, "--seq-len", 64
    )
    assert code == 1
    last = error.strip().splitlines()[-1]
    assert last.startswith("remit pack: error: ")
    assert BAD[kind] in last
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]


def test_bad_documents_can_be_rejected_and_are_counted(tmp_path: Path, tokenizer_folder: Path) -> None:
    corpus = tmp_path / "x.jsonl"
    corpus.write_bytes(b'{"text": "one"}\n{"text": 3}\n\n{"text": "caf\xe9"}\n{"text": ""}\n{"text": "two"}\n')
    folder = pack_to(tmp_path / "out", corpus, tokenizer_folder, on_bad_document="reject")
    assert folder.manifest.documents == {"read": 5, "packed": 2, "empty": 1, "rejected": 2}
    rejected = [json.loads(line) for line in (folder.path / "_rejected.jsonl").read_text().splitlines()]
    assert ["x.jsonl:2" in rejected[0]["reason"], "x.jsonl:4" in rejected[1]["reason"]] == [True, True]
    table = pyarrow.dataset.dataset(folder.path, format="arrow").to_table()
    assert np.concatenate(table["doc_ids"].to_pylist()).tolist() == [0, 4]
    assert not verify_folder(folder).problems


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "{tmp}/none.jsonl"], "none.jsonl: no such file"),
        (["--corpus", "{tmp}/*.zst"], "no file matches this pattern"),
        (["--corpus", "{tmp}/empty"], "folder without corpus files"),
        (["--corpus", "{tmp}/void.jsonl"], "the corpus is empty: 1 file(s), 0 documents read"),
        (["--corpus", "{tmp}/void.jsonl.gz"], "0 bytes, which is not a gzip file"),
        (["--corpus", "{tmp}/good.jsonl", "{tmp}/good.jsonl"], "is in the corpus twice"),
        (["--corpus", "{tmp}/readme.txt"], "not a corpus file"),
        (["--corpus", "no-such-user/no-such-dataset"], "neither a local file nor a dataset"),
        (["--corpus", "{tmp}/good.jsonl", "--tokenizer", "{tmp}/empty"], "has no tokenizer"),
        (["--corpus", "{tmp}/good.jsonl", "--tokenizer", "{tmp}/nowhere"], "no such folder"),
        (["--corpus", "{tmp}/good.jsonl", "--out", "{tmp}/full"], "is not empty and not a shard folder"),
    ],
)
def test_bad_arguments(
    tmp_path: Path,
    tokenizer_folder: Path,
    remit: Remit,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    for name in ("void.jsonl", "void.jsonl.gz", "readme.txt"):
        (tmp_path / name).touch()
    write_corpus(tmp_path / "good.jsonl", ["good"])
    asked = [argument.format(tmp=tmp_path) for argument in arguments]
    if "--out" not in asked:
        asked += ["--out", str(tmp_path / "out")]
    if "--tokenizer" not in asked:
        asked += ["--tokenizer", str(tokenizer_folder)]
    before = sorted(tmp_path.rglob("*"))
    code, _, error = remit("pack", *asked, "--seq-len", 16)
    assert code == 1
    assert message in error.strip().splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before


def test_other_tokenizers_have_other_fingerprints(tmp_path: Path, tokenizer_folder: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", ["text"])
    other = make_tokenizer(tmp_path / "other", source_texts(100, seed=77))
    first = pack_to(tmp_path / "a", corpus, tokenizer_folder).manifest.tokenizer["fingerprint"]
    assert first != pack_to(tmp_path / "b", corpus, other).manifest.tokenizer["fingerprint"]
    with pytest.raises(ValueError, match=r"tokenizer.fingerprint is .* there"):
        pack_to(tmp_path / "a", corpus, other)
