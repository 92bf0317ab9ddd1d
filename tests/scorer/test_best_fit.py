"""Whole documents in rows: against packing by brute force, through the cutter, the folder and verify."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pytest
import transformers
from conftest import EOS, make_tokenizer, pack_inline, source_texts, write_corpus

from scorer.best_fit import BestFitCutter
from scorer.config import PackConfig
from scorer.documents import TokenDocument
from shards import ShardFolder
from shards.packing import Window, best_fit
from shards.verify import verify_folder

Row = list[tuple[int, list[int]]]


def by_hand(lengths: list[int], seq_len: int) -> list[list[int]]:
    """Best-fit decreasing by looking at every row for every piece."""
    rows: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        room = [seq_len - sum(lengths[other] for other in row) for row in rows]
        fits = [index for index in range(len(rows)) if room[index] >= lengths[place]]
        if fits:
            rows[min(fits, key=lambda index: (room[index], index))].append(place)
        else:
            rows.append([place])
    return sorted((sorted(row) for row in rows), key=max)


@pytest.mark.parametrize("seed", range(30))
def test_rows_of_a_window_equal_those_by_hand(seed: int) -> None:
    rng = random.Random(seed)
    seq_len = rng.choice([1, 2, 7, 30])
    lengths = [rng.randint(1, seq_len) for _ in range(rng.choice([0, 1, 5, 60]))]
    assert best_fit(lengths, seq_len) == by_hand(lengths, seq_len)


def stream_by_hand(documents: list[list[int]], seq_len: int, window: Window, bos: int | None) -> list[Row]:
    """Rows as (document, ids) of each piece: full pieces at once, the others window by window."""
    rows: list[Row] = []
    waiting: list[tuple[int, list[int]]] = []

    def close() -> None:
        rows.extend([waiting[place] for place in row] for row in by_hand([len(ids) for _, ids in waiting], seq_len))
        waiting.clear()

    for number, ids in enumerate(documents):
        own = seq_len if bos is None else seq_len - 1
        for start in range(0, len(ids), own):
            piece = ([] if bos is None else [bos]) + ids[start : start + own]
            if len(piece) == seq_len:
                rows.append([(number, piece)])
            else:
                waiting.append((number, piece))
        if len(waiting) >= window.pieces or sum(len(ids) for _, ids in waiting) >= window.tokens:
            close()
    close()
    return rows


@pytest.mark.parametrize("seed", range(40))
def test_cutter_equals_packing_by_hand(seed: int) -> None:
    rng = random.Random(seed)
    seq_len, per_batch, bos = rng.choice([2, 3, 8, 16]), rng.choice([1, 3, 8]), rng.choice([None, 500])
    lengths = [1, 2, seq_len - 1, seq_len, seq_len + 1, 2 * seq_len, 2 * seq_len + 1, 3, 5]
    documents = [[rng.randrange(400) for _ in range(max(1, rng.choice(lengths)))] for _ in range(rng.randrange(60))]
    masks = [[rng.random() < 0.5 for _ in ids] for ids in documents]
    window = Window(rng.choice([1, 5, 1000]), rng.choice([1, 4 * seq_len, 10**6]))
    cutter = BestFitCutter(seq_len, per_batch, 3, bos, predict=True, window=window)
    batches = []
    for number, (ids, mask) in enumerate(zip(documents, masks)):
        batches += list(cutter.add(number, TokenDocument(np.array(ids, np.int32), np.array(mask))))
    assert all(batch.num_rows == per_batch for batch in batches)
    batches += list(cutter.finish())
    assert all(batch.num_rows == per_batch for batch in batches[:-1])
    rows = [row for batch in batches for row in batch.to_pylist()]
    expected = stream_by_hand(documents, seq_len, window, bos)
    assert [row["input_ids"] for row in rows] == [[token for _, ids in row for token in ids] for row in expected]
    assert [row["doc_ids"] for row in rows] == [[document for document, _ in row] for row in expected]
    assert [row["doc_lengths"] for row in rows] == [[len(ids) for _, ids in row] for row in expected]
    assert {row["source"] for row in rows} <= {3}
    assert cutter.bos_tokens == (0 if bos is None else sum(map(len, expected)))
    found: dict[int, list[bool]] = {}
    for row in rows:
        start = 0
        for document, length in zip(row["doc_ids"], row["doc_lengths"]):
            piece = row["predict"][start : start + length]
            assert bos is None or piece[0] == all(masks[document])
            found.setdefault(document, []).extend(piece[bos is not None :])
            start += length
    assert found == dict(enumerate(masks))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tok"), source_texts(100))


def pack(corpus: Path, tokens: Path, out: Path, **settings: Any) -> ShardFolder:
    defaults = {"seq_len": 64, "tokens_per_shard": 64 * 20, "packing": "best-fit"}
    return pack_inline(PackConfig([str(corpus)], str(tokens), str(out), **(defaults | settings)))


def texts_of(tokens: Path, *lengths: int) -> list[str]:
    """One text for each number of tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokens)
    ids = tokenizer("".join(source_texts(60)), add_special_tokens=False)["input_ids"]
    found = []
    for length in lengths:  # a cut of a text may merge to other tokens
        for start in range(0, len(ids) - length, 3):
            text = tokenizer.decode(ids[start : start + length])
            if len(tokenizer(text, add_special_tokens=False)["input_ids"]) == length:
                found.append(text)
                break
    assert len(found) == len(lengths)
    return found


def rows_of(folder: ShardFolder) -> list[dict[str, Any]]:
    return pyarrow.dataset.dataset(folder.path, format="arrow").to_table().to_pylist()


@pytest.mark.parametrize("window", [Window(), Window(7, 10**6), Window(10**6, 300)])
@pytest.mark.parametrize("bos", [False, True])
def test_the_folder_is_what_the_manifest_says(
    tmp_path: Path, tokens: Path, window: Window, bos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scorer.plan.Window", lambda: window)
    if bos:
        config = json.loads((tokens / "tokenizer_config.json").read_text()) | {"bos_token": EOS}
        (tmp_path / "tok").mkdir()
        (tmp_path / "tok/tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "tok/tokenizer.json").write_bytes((tokens / "tokenizer.json").read_bytes())
        tokens = tmp_path / "tok"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokens)
    exact = texts_of(tokens, 1, 61, 62, 63, 64, 65, 125, 126, 127, 128, 129, 300)
    files = {"a": [*source_texts(90), *exact], "b": ["", *exact[::-1]], "c": [""], "d": source_texts(40, seed=1)}
    for name, texts in files.items():
        write_corpus(tmp_path / f"corpus/{name}.jsonl", texts)
    folder = pack(tmp_path / "corpus", tokens, tmp_path / "out", bos="always" if bos else "never")
    assert verify_folder(folder).problems == []
    rows, first = rows_of(folder), 0
    begin = [tokenizer.bos_token_id] if bos else []
    recorded = Window(folder.manifest.packing["window_pieces"], folder.manifest.packing["window_tokens"])
    for source, texts in enumerate(files.values()):
        documents = {
            number: [*ids, tokenizer.eos_token_id]
            for number, text in enumerate(texts)
            if (ids := tokenizer(text, add_special_tokens=False)["input_ids"])
        }
        expected = stream_by_hand(list(documents.values()), 64, recorded, begin[0] if bos else None)
        here = rows[first : first + folder.manifest.corpus[source].rows]
        first += len(here)
        assert [row["input_ids"] for row in here] == [[token for _, ids in row for token in ids] for row in expected]
        numbers = list(documents)
        assert [row["doc_ids"] for row in here] == [[numbers[number] for number, _ in row] for row in expected]
        assert {row["source"] for row in here} <= {source}
        pieces: dict[int, int] = {}
        for row in here:
            for number in row["doc_ids"]:
                pieces[number] = pieces.get(number, 0) + 1
        for number, ids in documents.items():  # cut only where it is longer than a row, with BOS and EOS
            assert (pieces[number] == 1) == (len(ids) + bos <= 64)
    assert first == len(rows)
    assert all(row["input_ids"][0] == begin[0] for row in rows if bos)


def test_workers_and_restarts_change_nothing(tmp_path: Path, tokens: Path) -> None:
    for name in "ab":
        write_corpus(tmp_path / f"corpus/{name}.jsonl", source_texts(150, seed=ord(name)))
    one = pack(tmp_path / "corpus", tokens, tmp_path / "one")
    lost = one.path / "part-00001.arrow"
    before = {path.name: path.read_bytes() for path in one.path.iterdir() if path.is_file()}
    lost.unlink()
    (one.path / "_commits/part-00001.json").unlink()
    again = pack(tmp_path / "corpus", tokens, tmp_path / "one", num_workers=3)
    assert {path.name: path.read_bytes() for path in again.path.iterdir() if path.is_file()} == before
    with pytest.raises(ValueError, match="--packing is 'best-fit' there, 'concat' asked for now"):
        pack(tmp_path / "corpus", tokens, tmp_path / "one", packing="concat")
    texts = {tuple(map(tuple, (row["input_ids"], row["doc_ids"]))) for row in rows_of(one)}
    assert len(texts) > 10


def test_little_is_unused(tmp_path: Path, tokens: Path) -> None:
    corpus = write_corpus(tmp_path / "a.jsonl", [text for text in source_texts(400) if len(text) < 100])
    manifest = pack(corpus, tokens, tmp_path / "out").manifest
    assert manifest.tokens / (manifest.rows * 64) > 0.98


def damaged(folder: ShardFolder, out: Path, change: Any) -> list[str]:
    """Problems of a folder whose rows were changed before they were written."""
    from shards.part import write_part

    rows = rows_of(folder)
    change(rows)
    manifest = folder.manifest
    manifest.write(out)
    (out / "_tokenizer").mkdir()
    for path in (folder.path / "_tokenizer").iterdir():
        (out / "_tokenizer" / path.name).write_bytes(path.read_bytes())
    first = 0
    for index, plan in enumerate(manifest.parts):
        mine = rows[first : first + plan.rows]
        first += plan.rows
        batches = [
            pyarrow.RecordBatch.from_pylist(mine[start : start + manifest.rows_per_batch], manifest.schema)
            for start in range(0, len(mine), manifest.rows_per_batch)
        ]
        write_part(out, plan.name, manifest.schema, manifest.part_metadata(index), batches)
    return verify_folder(ShardFolder(out)).problems


def test_other_rows_than_the_rule_gives_are_found(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scorer.plan.Window", lambda: Window(12, 10**6))
    corpus = write_corpus(tmp_path / "a.jsonl", [text for text in source_texts(120) if text])
    folder = pack(corpus, tokens, tmp_path / "out", tokens_per_shard=64 * 1000)
    rows = rows_of(folder)
    short = [number for number, row in enumerate(rows) if len(row["doc_ids"]) > 1]
    full = [number for number, row in enumerate(rows) if len(row["input_ids"]) == 64 and len(row["doc_ids"]) == 1]
    assert len(short) > 5
    assert full

    def swap(one: int, other: int) -> Any:
        def change(rows: list) -> None:
            rows[one], rows[other] = rows[other], rows[one]

        return change

    def renumber(rows: list) -> None:
        rows[short[2]]["doc_ids"] = [number + 1000 for number in rows[short[2]]["doc_ids"]]

    def no_eos(rows: list) -> None:
        rows[short[1]]["input_ids"][-1] = rows[short[1]]["input_ids"][0] + 1

    assert damaged(folder, tmp_path / "same", lambda rows: None) == []
    neighbours = next(place for place in range(len(rows) - 1) if {place, place + 1} <= set(short))
    for index, change in enumerate((swap(neighbours, neighbours + 1), swap(short[0], short[-1]), renumber)):
        problems = damaged(folder, tmp_path / str(index), change)
        assert any("best-fit" in problem or "out of order" in problem for problem in problems), problems
    problems = damaged(folder, tmp_path / "eos", no_eos)
    assert any("does not end in EOS" in problem for problem in problems), problems
