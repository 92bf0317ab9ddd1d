"""Corpora that `datasets` streams: a hub on loopback, local folders with configs and splits, what cannot be opened."""

import gzip
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest
from conftest import source_texts, write_corpus
from hub_server import REVISION, Hub
from tokenizers import Tokenizer

from scorer import hf_datasets
from scorer.corpus import BadDocument, read_documents
from scorer.hf_datasets import MAX_HUB_SHARDS, Shard, find_shards
from scorer.sources import find_sources
from shards.manifest import Manifest

Remit = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]
TRAIN = [source_texts(40, seed=70 + index) for index in range(3)]
GERMAN = source_texts(20, seed=80)
README = """---
configs:
- config_name: en
  data_files: en/*.json.gz
- config_name: de
  data_files:
  - {split: train, path: de/a.jsonl}
  - {split: validation, path: de/b.jsonl}
---
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """org/plain: parquet, three files to train and one to test; org/configs: two configs, one has two splits."""
    plain, configs = tmp_path / "hub" / "org" / "plain" / "data", tmp_path / "hub" / "org" / "configs"
    for index, texts in enumerate(TRAIN):
        write_corpus(plain / f"train-{index:05d}-of-00003.parquet", texts)
    write_corpus(plain / "test-00000-of-00001.parquet", ["never to be seen"])
    write_corpus(configs / "de" / "a.jsonl", ["nicht gefragt"])
    write_corpus(configs / "de" / "b.jsonl", GERMAN)
    (configs / "en").mkdir()
    (configs / "en" / "0.json.gz").write_bytes(gzip.compress(b'{"text": "english"}\n'))
    (configs / "README.md").write_text(README)
    server = Hub(tmp_path / "hub")
    yield server
    server.close()


def environment(hub: Hub, home: Path) -> dict[str, str]:
    return os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}


def ids_of(shards: Path, source: int) -> list[int]:
    """All tokens of one corpus file, in order."""
    table = pyarrow.dataset.dataset(shards, format="arrow").to_table().to_pydict()
    rows = [ids for ids, name in zip(table["input_ids"], table["source"]) if name == source]
    return [token for row in rows for token in row]


def test_hub_datasets_are_streamed(tmp_path: Path, hub: Hub, tokenizer_folder: Path) -> None:
    out, home = tmp_path / "packed", tmp_path / "home"
    command = [sys.executable, "-m", "pipelines.cli", "pack", "--corpus", "org/plain", "hf://org/configs:de:validation",
               "--tokenizer", tokenizer_folder, "--out", out, "--seq-len", "64"]  # fmt: skip
    for expected in ("packed ", "nothing to do"):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment(hub, home))
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(expected)
        assert (
            f"from {sum(map(len, TRAIN)) + len(GERMAN) - 4} documents (4 empty" in done.stdout
        )  # source_texts has a ""
    names = [f"hf://org/plain@{REVISION}::train#{index:05d}-of-00003" for index in range(3)]
    names.append(f"hf://org/configs@{REVISION}:de:validation")
    assert [file.path for file in Manifest.read(out).corpus] == names
    assert {(file.size, file.sha256) for file in Manifest.read(out).corpus} == {(None, None)}
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    for source, texts in enumerate([*TRAIN, GERMAN]):
        encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        assert ids_of(out, source) == [token for ids in encoded if ids for token in [*ids, 0]]
    # no other split is looked at, and no data file is kept
    assert {Path(path).name for path in hub.served if "train-" not in path} == {"README.md", "b.jsonl"}
    assert {file.name for file in home.rglob("*") if file.suffix in (".parquet", ".jsonl", ".gz", ".arrow")} == set()


READ = """
import json, resource, sys
from scorer.corpus import read_documents
from scorer.sources import find_sources
(source,) = find_sources([sys.argv[1]])
count = sum(len(batch) for batch, _ in read_documents(source, "text"))
print(json.dumps([count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def test_memory_does_not_grow_with_a_file_of_the_hub(tmp_path: Path, hub: Hub) -> None:
    """Row groups of 2 MB, 4 and 80 of them, beside a column as large that nobody asked for."""
    found = {}
    for groups in (4, 80):
        folder = hub.root / "org" / f"groups{groups}"
        folder.mkdir()
        schema = pa.schema({"text": pa.string(), "other": pa.binary()})
        with pyarrow.parquet.ParquetWriter(folder / "train.parquet", schema, compression="none") as writer:
            for _ in range(groups):
                texts, others = [os.urandom(5000).hex() for _ in range(200)], [os.urandom(10000) for _ in range(200)]
                writer.write_table(pa.table({"text": texts, "other": others}, schema=schema))
        command = [sys.executable, "-c", READ, f"org/groups{groups}"]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment(hub, tmp_path / "home"), cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        count, found[groups] = json.loads(done.stdout)
        assert count == 200 * groups
    assert found[80] - found[4] < 60 << 10  # KiB; the file grew by 300 MB


def test_many_files_of_the_hub_share_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    class Builder:
        config = type("Config", (), {"data_files": {}})

    stream = type("Stream", (), {"num_shards": 5000})
    monkeypatch.setattr("scorer.hf_datasets.open_stream", lambda shard: (Builder, stream))
    monkeypatch.setattr("scorer.hf_datasets._commit", lambda entry, name, revision: f"{name} {revision}")
    shards = find_shards("hf://org/name@v1.0:en")
    assert len(shards) == MAX_HUB_SHARDS
    assert shards[7] == (Shard("org/name", "org/name v1.0", "en", "train", 7, MAX_HUB_SHARDS), None)
    assert shards[7][0].name == "hf://org/name@org/name v1.0:en:train#00007-of-01024"


# --- local folders ---------------------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mine"
    write_corpus(folder / "splits" / "train-0.jsonl", ["one"])
    write_corpus(folder / "splits" / "train-1.jsonl", ["two"])
    write_corpus(folder / "splits" / "test.jsonl", ["three"])
    write_corpus(folder / "configs" / "de" / "a.jsonl", ["eins"])
    write_corpus(folder / "configs" / "de" / "b.jsonl", ["zwei"])
    write_corpus(folder / "configs" / "en" / "0.jsonl.gz", ["four"])
    (folder / "configs" / "README.md").write_text(README.replace(".json.gz", ".jsonl.gz"))
    (folder / "csv").mkdir()
    (folder / "csv" / "x.csv").write_text("text,other\nfive,1\nsix,2\n")
    (folder / "zipped").mkdir()
    with zipfile.ZipFile(folder / "zipped" / "train.zip", "w") as file:
        file.writestr("a.jsonl", '{"text": "seven"}\n')
    saved = {
        "train": datasets.Dataset.from_dict({"text": ["eight"]}),
        "test": datasets.Dataset.from_dict({"text": ["9"]}),
    }
    datasets.DatasetDict(saved).save_to_disk(folder / "saved")
    saved["train"].save_to_disk(folder / "saved-alone")
    monkeypatch.chdir(folder)
    return folder


def texts_of(*corpus: str) -> list[str | BadDocument]:
    found = []
    for source in find_sources(list(corpus)):
        found += [text for batch, _ in read_documents(source, "text") for text in batch]
    return found


@pytest.mark.parametrize(
    ("entry", "texts"),
    [
        ("splits:", ["one", "two"]),
        ("splits::test", ["three"]),
        ("configs:en", ["four"]),
        ("configs:de:validation", ["zwei"]),
        ("./csv::train", ["five", "six"]),
        ("zipped:", ["seven"]),
        ("saved::test", ["9"]),
        ("saved-alone:", ["eight"]),
    ],
)
def test_local_datasets(local: Path, entry: str, texts: list[str]) -> None:
    assert texts_of(entry) == texts


@pytest.mark.usefixtures("ray_session")
def test_files_of_a_local_dataset_are_told_apart(local: Path, tokenizer_folder: Path, remit: Remit) -> None:
    files = find_sources(["splits:"])
    assert [file.name for file in files] == ["splits::train#00000-of-00002", "splits::train#00001-of-00002"]
    assert [file.location for file in files] == [str(local / "splits" / f"train-{index}.jsonl") for index in range(2)]
    with pytest.raises(ValueError, match=r"train-1\.jsonl: is in the corpus twice"):
        find_sources(["splits:", "splits/train-1.jsonl"])
    command = ["pack", "--corpus", "splits:", "--tokenizer", tokenizer_folder, "--out", local / "out", "--seq-len", 8]
    assert remit(*command)[0] == 0
    assert remit("verify", "--shards", local / "out")[0] == 0
    write_corpus(local / "splits" / "train-1.jsonl", ["TWO"])
    code, _, error = remit(*command)
    assert (code, "holds another pack: corpus" in error) == (1, True)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("configs:", "configs:: cannot be opened as a dataset (ValueError: Config name is missing. Please pick one"),
        ("configs:fr", "BuilderConfig 'fr' not found. Available: ['en', 'de']"),
        ("splits::dev", "Bad split: dev. Available splits: ["),
        ("scripted:", "cannot be opened as a dataset (RuntimeError: Dataset scripts are no longer supported"),
        ("scripted", ".ds with .ds.index, or scripted:CONFIG:SPLIT for one that `datasets` opens"),
        ("nowhere/else:en", "neither a local file nor a dataset that the Hugging Face hub answers for"),
    ],
)
def test_datasets_that_cannot_be_opened(
    local: Path, tokenizer_folder: Path, remit: Remit, monkeypatch: pytest.MonkeyPatch, entry: str, message: str
) -> None:
    (local / "scripted").mkdir()
    (local / "scripted" / "scripted.py").write_text("raise SystemExit\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, error = remit("pack", "--corpus", entry, "--tokenizer", tokenizer_folder, "--out", local / "out")
    assert (code, message in error) == (1, True), error
    assert "Traceback" not in error
    assert not (local / "out").exists()


def test_a_disk_that_fails_is_no_bad_file(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--on-bad-file reject would leave the dataset out, though nothing is known of its bytes."""

    def fail(shard: Shard, *rest: Any) -> Any:
        try:
            raise PermissionError(13, "Permission denied", "x.csv")
        except PermissionError as error:
            raise RuntimeError("as datasets puts it") from error

    assert texts_of("csv:") == ["five", "six"]
    monkeypatch.setattr(hf_datasets, "_open_rows", fail)
    with pytest.raises(OSError, match=r"csv::train: cannot be read beyond row 0 \(RuntimeError: as datasets puts it\)"):
        texts_of("csv:")


def test_documents_that_cannot_be_read(local: Path) -> None:
    write_corpus(local / "field" / "train.jsonl", ["a"], field="body")
    (bad,) = texts_of("field:")
    assert "field/train.jsonl:1: has no field 'text', only body; set --text-field" in str(bad)
    write_corpus(local / "column" / "train.parquet", ["a"])
    pyarrow.parquet.write_table(pa.table({"body": ["a"]}), local / "column" / "train.parquet")
    with pytest.raises(ValueError, match=r"column::train: has no column 'text', only body; set --text-field"):
        texts_of("column:")
    write_corpus(local / "broken" / "train.jsonl", ["a"] * 3)
    with (local / "broken" / "train.jsonl").open("a") as file:
        file.write("{not JSON\n")
    assert "broken/train.jsonl:4: not JSON" in str(texts_of("broken:")[3])
    write_corpus(local / "cut" / "train.parquet", ["a"] * 3)
    (local / "cut" / "train.parquet").write_bytes((local / "cut" / "train.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"cut:: cannot be opened as a dataset"):
        texts_of("cut:")
    (local / "gaps").mkdir()
    (local / "gaps" / "train.jsonl").write_text('{"text": "a"}\n{"other": 1}\n')
    good, bad = texts_of("gaps:")
    assert good == "a"
    assert "gaps/train.jsonl:2: has no field 'text', only other" in str(bad)
