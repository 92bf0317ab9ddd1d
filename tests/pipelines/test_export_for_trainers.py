"""remit export: what it writes, read without this project's code; what it refuses; what becomes of an interrupted one."""

import json
import math
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import yaml
from annotated import annotate
from built_once import BuiltOnce
from conftest import pack_inline, source_texts, write_corpus
from oracles import contexts, is_trained, read_rows

from pipelines.export import run as writer
from pipelines.export.titan import absolute
from scorer.config import PackConfig
from shards import ShardFolder

Remit = Callable[..., tuple[int, str, str]]
KINDS = {1: "uint8", 4: "int32", 7: "float32", 8: "uint16"}  # codes of Megatron's index


def made_up(row: dict, context: str, salt: int) -> list:
    """Log-probs that tell every place of every row apart, null where nothing precedes; multiples of 1/64."""
    starts = {start for start, _ in contexts(row, context)}
    return [
        None if t in starts else -((token * 7 + 13 * t + salt) % 997) / 64 for t, token in enumerate(row["input_ids"])
    ]


@pytest.fixture(scope="module")
def shards(built_once: BuiltOnce, tokenizer_folder: Path) -> dict[str, Path]:
    """Unequal rows, a row of one token, odd text, several parts and two references, of which one left rows out; and
    conversations of which only answers are predicted, in document context."""

    def build_plain(folder: Path) -> None:
        texts = [text[:90] for text in source_texts(40, seed=11)]
        write_corpus(folder / "corpus" / "a.jsonl", texts)
        write_corpus(folder / "corpus" / "b|<i>.jsonl", ["x"] * 16)  # two tokens each: 32 = 31 + 1
        config = PackConfig(
            [str(folder / "corpus")], str(tokenizer_folder), folder / "packed", 31, tokens_per_shard=31 * 9
        )
        pack_inline(config)
        annotate(folder / "packed", folder / "one", lambda row: made_up(row, "packed", 5), "packed", 0.0, name="sft2")
        annotate(
            folder / "one", folder / "both", lambda row: made_up(row, "packed", 0), "packed", 1 / 64, unscored=[2, 11]
        )

    def build_chats(folder: Path) -> None:
        template = (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
            "{% else %}{{ m.role + ': ' + m.content }}{% endif %}{% endfor %}"
        )
        texts = [text[:40] for text in source_texts(60, seed=12) if text]
        turns = [
            [{"role": ("user", "assistant")[turn % 2], "content": texts[(5 * n + turn) % len(texts)]} for turn in range(1 + n % 3)]
            for n in range(24)
        ]  # fmt: skip
        (folder / "t.jinja").parent.mkdir(parents=True, exist_ok=True)
        (folder / "t.jinja").write_text(template)
        (folder / "c.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
        packed = pack_inline(
            PackConfig(
                [str(folder / "c.jsonl")], str(tokenizer_folder), str(folder / "packed"), 48, messages_field="messages",
                train_on="assistant", chat_template=str(folder / "t.jinja"), packing="best-fit", tokens_per_shard=48 * 8,
            )
        )  # fmt: skip
        annotate(packed.path, folder / "scored", lambda row: made_up(row, "document", 1), "document")

    def build_top(folder: Path) -> None:
        def own(row: dict) -> list:
            return [None if value is None else value - 1 for value in made_up(row, "packed", 3)]

        def top(row: dict) -> list:
            pairs = zip(row["input_ids"], own(row))
            return [
                None if value is None else ([token, (token + 1) % 500], [value, value - 2]) for token, value in pairs
            ]

        write_corpus(folder / "corpus" / "a.jsonl", [text[:50] for text in source_texts(12, seed=13)])
        config = PackConfig(
            [str(folder / "corpus")], str(tokenizer_folder), folder / "packed", 19, tokens_per_shard=19 * 6
        )
        pack_inline(config)
        annotate(
            folder / "packed", folder / "scored", own, "packed", 1 / 64, top=top, unscored=[3],
            entropy=lambda row: [None, *[0.5] * (len(row["input_ids"]) - 1)],
        )  # fmt: skip

    return {
        "top": built_once("export-top", build_top) / "scored",
        "plain": built_once("export-plain", build_plain) / "both",
        "chats": built_once("export-chats", build_chats) / "scored",
    }


def expected_mask(row: dict, context: str, columns: Sequence[str]) -> list[bool]:
    """What trains, from the definition: something precedes it, it is to be predicted, every reference scored the row."""
    starts = {start for start, _ in contexts(row, context)}
    scored = all(any(value is not None for value in row[c]) or len(row[c]) == len(starts) for c in columns)
    return [scored and t not in starts and is_trained(row, t) for t in range(len(row["input_ids"]))]


def same_floats(found: np.ndarray, wanted: list) -> bool:
    expected = np.array([math.nan if value is None else value for value in wanted], np.float32)
    return found.dtype == np.float32 and np.array_equal(found, expected, equal_nan=True)


def columns_of(rows: list[dict]) -> list[str]:
    return [name for name in rows[0] if name.endswith("_logprobs")]


def test_olmo_core_files(shards: dict[str, Path], remit: Remit, tmp_path: Path) -> None:
    """Bare numbers, read by numpy.memmap alone."""
    for name, context in (("plain", "packed"), ("chats", "document")):
        out = tmp_path / name
        code, said, error = remit("export", "--to", "olmo-core", "--shards", shards[name], "--out", out)
        assert code == 0, error
        assert "exported" in said
        rows, seq_len = read_rows(shards[name]), ShardFolder(shards[name]).manifest.seq_len
        found: dict[str, list] = {}
        for part in sorted(out.glob("part-?????.npy")):
            for path in sorted(out.glob(f"{part.stem}*.npy")):
                column = path.stem.removeprefix(part.stem).lstrip("_") or "ids"
                dtype = {"ids": "<u2", "label_mask": "bool", "lengths": "<i4", "doc_lengths": "<i4"}.get(column, "<f4")
                found.setdefault(column, []).append(np.memmap(path, dtype, "r"))
        ids, mask = (np.concatenate(found[c]).reshape(-1, seq_len) for c in ("ids", "label_mask"))
        lengths, pieces = (
            np.concatenate(found["lengths"]).reshape(-1, 2),
            iter(np.concatenate(found["doc_lengths"]).tolist()),
        )
        floats = {c: np.concatenate(found[c]).reshape(-1, seq_len) for c in columns_of(rows)}
        assert len(ids) == len(mask) == len(lengths) == len(rows)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            assert ids[index].tolist() == row["input_ids"] + [0] * (seq_len - length)
            assert lengths[index].tolist() == [length, len(row["doc_lengths"])]
            assert [next(pieces) for _ in row["doc_lengths"]] == row["doc_lengths"]
            assert mask[index].tolist() == expected_mask(row, context, columns_of(rows)) + [False] * (seq_len - length)
            for column, values in floats.items():
                assert same_floats(values[index], row[column] + [None] * (seq_len - length)), (index, column)
        assert {len(row["input_ids"]) for row in rows} > {seq_len}
    assert 1 in {len(row["input_ids"]) for row in read_rows(shards["plain"])}


def read_indexed(prefix: Path) -> list[np.ndarray]:
    """A Megatron dataset by hand: mark, version, dtype, counts; lengths, first bytes, borders of documents."""
    data = prefix.with_suffix(".idx").read_bytes()
    assert data[:9] == b"MMIDIDX\x00\x00"
    version, code, count, borders = struct.unpack("<QBQQ", data[9:34])
    assert (version, borders) == (1, count + 1)
    lengths = np.frombuffer(data, "<i4", count, 34)
    starts = np.frombuffer(data, "<i8", count, 34 + 4 * count)
    assert np.frombuffer(data, "<i8", borders, 34 + 12 * count).tolist() == list(range(borders))
    assert len(data) == 34 + 12 * count + 8 * borders
    content, dtype = prefix.with_suffix(".bin").read_bytes(), np.dtype(KINDS[code])
    assert len(content) == lengths.sum() * dtype.itemsize
    return [np.frombuffer(content, dtype, length, start) for length, start in zip(lengths.tolist(), starts.tolist())]


def test_megatron_files(shards: dict[str, Path], remit: Remit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.export.megatron.ROWS_AT_ONCE", 7)
    for name, context in (("plain", "packed"), ("chats", "document")):
        out = tmp_path / name
        assert remit("export", "--to", "megatron", "--shards", shards[name], "--out", out)[0] == 0
        rows = read_rows(shards[name])
        found = {path.stem: read_indexed(path.with_suffix("")) for path in out.glob("*.idx")}
        assert set(found) == {"tokens", "label_mask", "doc_lengths", *columns_of(rows)}
        assert all(len(values) == len(rows) for values in found.values())
        for index, row in enumerate(rows):
            assert found["tokens"][index].tolist() == row["input_ids"]
            assert found["doc_lengths"][index].tolist() == row["doc_lengths"]
            assert found["label_mask"][index].astype(bool).tolist() == expected_mask(row, context, columns_of(rows))
            for column in columns_of(rows):
                assert same_floats(found[column][index], row[column]), (index, column)
        assert not [path for path in out.iterdir() if path.name.startswith((".", "_"))]


@pytest.mark.parametrize(("vocabulary", "olmo", "megatron"), [(200, "uint8", "uint16"), (65_499, "uint16", "uint16"), (65_500, "uint16", "int32"), (65_536, "uint16", "int32"), (100_278, "uint32", "int32")])  # fmt: skip
def test_dtypes_hold_every_id(
    shards: dict[str, Path], tmp_path: Path, vocabulary: int, olmo: str, megatron: str
) -> None:
    """Those that the libraries take for a vocabulary of that size: OLMo-core the smallest, Megatron uint16 below 65,500."""
    from pipelines.export.megatron import MegatronFiles
    from pipelines.export.olmo_core import OlmoCoreFiles
    from pipelines.export.tokens import make_plan

    folder = ShardFolder(shards["plain"])
    plan = make_plan(folder, ["rl"])
    folder.manifest = replace(folder.manifest, tokenizer=folder.manifest.tokenizer | {"vocab_size": vocabulary})
    assert OlmoCoreFiles(tmp_path, plan).dtypes["input_ids"] == olmo
    assert MegatronFiles(tmp_path, plan).dtypes["input_ids"] == megatron


def test_datasets_repository(shards: dict[str, Path], remit: Remit, tmp_path: Path) -> None:
    """Read back by datasets, plain and streaming; the card's YAML is what configures it."""
    import datasets

    for name in ("plain", "chats", "top"):
        out = tmp_path / name
        assert remit("export", "--to", "datasets", "--shards", shards[name], "--out", out)[0] == 0
        rows = read_rows(shards[name])
        loaded = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
        assert loaded.to_list() == rows
        assert list(datasets.load_dataset(str(out), split="train", streaming=True)) == rows
        head = yaml.safe_load((out / "README.md").read_text().split("---")[1])
        assert head["configs"][0]["data_files"] == [{"split": "train", "path": "data/*.parquet"}]
        assert "# license: to be filled in" in (out / "README.md").read_text()
    card = (tmp_path / "plain" / "README.md").read_text()
    manifest = ShardFolder(shards["plain"]).manifest
    for wanted in (
        f"{manifest.rows:,} rows", f"{manifest.tokens:,} tokens", "`rl`", "`sft2`", "oracle", manifest.checksum,
        manifest.corpus[0].sha256[:12], "at most 0.0078125 off", "not rounded", "not measured", "rl_logprobs",
    ):  # fmt: skip
        assert wanted in card, wanted
    assert "b\\|&lt;i&gt;.jsonl" in card  # a file's name can neither end a cell nor become HTML
    assert "b|<i>" not in card


def test_card_of_measured_references(shards: dict[str, Path], remit: Remit, tmp_path: Path) -> None:
    figures = {"reference": "rl", "rows": 8, "tokens": 240, "mean": 0.0123, "max": 0.5, "weights_changed": 0.1}
    (tmp_path / "rl.json").write_text(json.dumps(figures))
    arguments = ("export", "--to", "datasets", "--shards", shards["plain"], "--reference", "rl", "--verified")
    assert remit(*arguments, tmp_path / "rl.json", "--out", tmp_path / "out")[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "mean 0.0123, largest 0.5000 nat over 240 tokens of 8 rows" in card
    assert "sft2" not in card
    table = pyarrow.parquet.read_table(tmp_path / "out" / "data")
    assert "sft2_logprobs" not in table.column_names
    (tmp_path / "bad.json").write_text("[1]")
    code, _, error = remit(*arguments, tmp_path / "bad.json", "--out", tmp_path / "other")
    assert code == 1
    assert "cannot be read as figures of remit verify" in error


@pytest.mark.parametrize("to", ["olmo-core", "megatron", "datasets"])
def test_an_interrupted_export_goes_on(
    shards: dict[str, Path], remit: Remit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """Killed in the middle of each part in turn, with what is half written left behind: the same bytes as undisturbed."""
    arguments = ("export", "--to", to, "--shards", shards["plain"], "--out")
    assert remit(*arguments, tmp_path / "whole")[0] == 0
    parts = len(ShardFolder(shards["plain"]).manifest.parts)
    counted, out, seen = writer._counted, tmp_path / "out", []

    def dies(shards, part, columns, progress, done):  # type: ignore[no-untyped-def]
        seen.append(part)
        for rows in counted(shards, part, columns, progress, done):
            yield rows
            if seen.count(part) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(writer, "_counted", dies)
    for _ in range(parts):
        with pytest.raises(KeyboardInterrupt):
            remit(*arguments, out)
        assert not out.exists()
    (writer.staging_of(out) / "half written").write_bytes(b"x")
    assert remit(*arguments, out)[0] == 0
    assert len(seen) == 2 * parts  # a part that was done is not read again
    files = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    whole = tmp_path / "whole"
    assert files == {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert not writer.staging_of(out).exists()
    code, said, _ = remit(*arguments, out)
    assert (code, "nothing to do" in said) == (0, True)
    code, _, error = remit(*arguments, out, "--reference", "rl")
    assert code == 1
    assert "holds another export: references" in error


def test_only_the_name_was_missing(
    shards: dict[str, Path], remit: Remit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the last byte and the rename."""
    arguments = ("export", "--to", "megatron", "--shards", shards["plain"], "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remit(*arguments)
    monkeypatch.setattr(writer, "_counted", None)  # nothing is read again
    assert remit(*arguments)[0] == 0
    assert len(read_indexed(tmp_path / "out" / "tokens")) == ShardFolder(shards["plain"]).manifest.rows


def test_refusals(shards: dict[str, Path], packed: Path, remit: Remit, tmp_path: Path) -> None:
    """One line each, and nothing written."""
    plain = shards["plain"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    mixed = (f"{plain}=0.5", f"{shards['chats']}=0.5")
    cases: list[tuple[int, str, tuple]] = [
        (1, "has no log-probs of a reference named 'nobody'", ("megatron", "--shards", plain, "--reference", "nobody")),
        (1, "has no log-probs", ("olmo-core", "--shards", packed)),
        (1, "no such folder", ("datasets", "--shards", tmp_path / "absent")),
        (2, "expected a folder on this machine", ("datasets", "--shards", plain, "--out", "s3://bucket/x")),
        (2, "takes one folder, 2 are given", ("megatron", "--shards", *mixed)),
        (2, "belongs to --to torchtitan", ("megatron", "--shards", plain, "--epsilon", "0.3")),
        (2, "belongs to --to datasets", ("megatron", "--shards", plain, "--verified", "x.json")),
        (2, "expected one for --to torchtitan", ("torchtitan", "--shards", plain, "--reference", "rl", "sft2")),
        (1, "name one", ("torchtitan", "--shards", plain)),
        (1, "cannot be mixed", ("torchtitan", "--shards", *mixed, "--reference", "rl")),
        (2, "is the folder of --shards", ("megatron", "--shards", plain, "--out", plain)),
        (1, "is not empty and no export", ("megatron", "--shards", plain, "--out", tmp_path / "full")),
        (2, "neither --shards nor --mix", ("torchtitan",)),
    ]
    for code, expected, arguments in cases:
        out = () if "--out" in arguments else ("--out", tmp_path / "out")
        found, _, error = remit("export", "--to", *arguments, *out)
        said = " ".join(error.replace("│", " ").split())  # bad usage comes in a box
        assert (found, expected in said) == (code, True), (expected, said)
        assert code == 2 or len(error.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def rows_argument(out: Path) -> dict:
    """The arguments of on_rows in an exported module."""
    text, names = (out / "remit_rows.py").read_text(), dict[str, dict]()
    exec(text[text.index("ROWS = ") : text.index("def __getattr__")], names)
    return names["ROWS"]


def test_torchtitan_module(shards: dict[str, Path], remit: Remit, tmp_path: Path) -> None:
    """What the module says, without torchtitan: it is Python, its paths are absolute, its options are those asked for."""
    code, said, _ = remit(
        "export", "--to", "torchtitan", "--shards", os.path.relpath(shards["plain"]), "--reference", "rl", "--epsilon", "inf",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    assert rows_argument(tmp_path / "out") == {
        "shards": [str(shards["plain"])], "reference": "rl", "context": "packed", "mix": None, "steps_batch_size": None,
        "seed": 0, "objective": "remit", "epsilon": math.inf,
    }  # fmt: skip
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").exists()
    assert "with the log-probs of `rl`, in packed context" in (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path / "out") in said


def test_torchtitan_mixture(
    shards: dict[str, Path], remit: Remit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose folders are relative to where the command runs means the same from anywhere else."""
    from trainer.dataset import RowDataset

    os.symlink(shards["plain"], tmp_path / "a")
    os.symlink(shards["plain"].parent / "packed", tmp_path / "rest")
    annotate(tmp_path / "rest", tmp_path / "b", lambda row: made_up(row, "packed", 0), "packed", 1 / 64)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "m.yaml").write_text(
        "sources: {one: {shards: a, weight: 0.75}, two: {shards: b, weight: 0.25}}\n"
        "stages: [{after_step: 2, weights: {one: 0.1, two: 0.9}}]\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ("export", "--to", "torchtitan", "--mix", "files/m.yaml", "--reference", "rl", "--out", "out")
    code, _, error = remit(*arguments)
    assert (code, "give --global-batch-size" in error) == (1, True)
    assert remit(*arguments, "--global-batch-size", 8)[0] == 0
    mine = RowDataset((), "rl", mix="files/m.yaml", global_batch_size=8)
    wanted = [row.where for row, _ in zip(mine, range(32))]
    monkeypatch.chdir("/")
    theirs = RowDataset((), "rl", mix=tmp_path / "out" / "mix.yaml", global_batch_size=8)
    assert [os.path.realpath(row.where) for row, _ in zip(theirs, range(32))] == [
        os.path.realpath(tmp_path / where) for where in wanted
    ]


def test_next_token_prediction_has_the_context_of_the_references(
    shards: dict[str, Path], packed: Path, remit: Remit, tmp_path: Path
) -> None:
    """As remit train has it: that of all references together; packed where they differ or there are none."""
    from trainer.dataset import RowDataset

    both = annotate(shards["chats"], tmp_path / "both", lambda row: made_up(row, "packed", 2), "packed", name="sft2")
    for number, (folder, references, context) in enumerate(
        (
            (shards["chats"], (), "document"),
            (shards["chats"], ("--reference", "rl"), "document"),
            (shards["plain"], (), "packed"),
            (packed, (), "packed"),
            (both, ("--reference", "rl"), "packed"),  # its log-probs are not read
        )
    ):
        out = tmp_path / f"out-{number}"
        code, _, error = remit(
            "export", "--to", "torchtitan", "--objective", "ntp", "--shards", folder, *references, "--out", out
        )
        assert code == 0, error
        found = rows_argument(out)
        assert (found["reference"], found["context"]) == (None, context)
        readme = " ".join((out / "README.md").read_text().split())
        assert f"without log-probs, for next-token prediction, in {context} context" in readme
        rows = RowDataset(folder, None, epochs=1)
        assert rows.context == RowDataset(folder, None, context=context).context == context
    trained = sum(int(row.predicted.sum()) for row in RowDataset(shards["chats"], None, epochs=1))
    assert trained == sum(sum(expected_mask(row, "document", ["rl_logprobs"])) for row in read_rows(shards["chats"]))
    assert RowDataset(both, "sft2").context == "packed"
    with pytest.raises(ValueError, match="was scored in document context, packed asked for"):
        RowDataset(both, "rl", context="packed")
    with pytest.raises(ValueError, match="context is 'row', expected auto, packed or document"):
        RowDataset(both, None, context="row")


def test_weights_are_kept_to_the_last_digit(shards: dict[str, Path], remit: Remit, tmp_path: Path) -> None:
    """Rounded shares are other shares, and in the end other rows; as is a folder by another name."""
    one, two = tmp_path / "one", tmp_path / "two"
    os.symlink(shards["plain"], one)
    rest = shards["plain"].parent / "packed"
    annotate(rest, two, lambda row: made_up(row, "packed", 9), "packed", 1 / 64)
    weights = (0.123456789012, 1 / 3)
    given = [f"{path}={weight!r}" for path, weight in zip((one, two), weights)]
    out = tmp_path / "out"
    code, _, error = remit("export", "--to", "torchtitan", "--shards", *given, "--reference", "rl", "--out", out)
    assert code == 0, error
    assert [float(text.rpartition("=")[2]) for text in rows_argument(out)["shards"]] == [*weights]
    assert rows_argument(out)["shards"] == given
    assert absolute("../a/..") == os.path.abspath("../a") + "/.."  # by which name its rows are shuffled


def test_max_epochs_that_nobody_would_keep(shards: dict[str, Path], remit: Remit, tmp_path: Path) -> None:
    """The rows have no end of their own: refused, with the steps that are allowed where they can be told."""
    from trainer.dataset import RowDataset

    rest, two = shards["plain"].parent / "packed", tmp_path / "two"
    annotate(rest, two, lambda row: made_up(row, "packed", 9), "packed", 1 / 64)
    mix, num_rows = tmp_path / "m.yaml", len(read_rows(two))
    sources = {"one": {"shards": str(shards["plain"]), "weight": 1}, "two": {"shards": str(two), "weight": 1, "max_epochs": 1}}  # fmt: skip
    mix.write_text(yaml.safe_dump({"sources": sources}))
    arguments = ("export", "--to", "torchtitan", "--mix", mix, "--reference", "rl", "--out", tmp_path / "out")
    code, _, error = remit(*arguments)
    assert (code, "max_epochs of two is 1, which torchtitan would not keep" in error) == (1, True), error
    code, _, error = remit(*arguments, "--global-batch-size", 2)
    allowed = int(error.split("--training.steps ")[1].split(" of 2 rows")[0])
    assert (code, (tmp_path / "out").exists()) == (1, False)
    later = {"stages": [{"after_step": 2, "weights": {"one": 1, "two": 0}}]}
    mix.write_text(yaml.safe_dump({"sources": sources} | later))
    assert remit(*arguments, "--global-batch-size", 2)[0] == 0  # no number of steps goes through it once
    mix.write_text(yaml.safe_dump({"sources": sources}))

    with pytest.raises(ValueError, match="two: max_epochs is 1, and rows without an end would not keep it"):
        RowDataset((), "rl", mix=mix, global_batch_size=2)
    with pytest.raises(ValueError, match=f"two: {allowed + 1} steps go through it .* times, max_epochs is 1"):
        RowDataset((), "rl", mix=mix, global_batch_size=2, max_steps=allowed + 1)
    seen = [row.where for row in RowDataset((), "rl", mix=mix, global_batch_size=2, max_steps=allowed)]
    assert len(seen) == 2 * allowed  # and there they end
    of_two = [where for where in seen if where.startswith(str(two))]
    assert len(set(of_two)) == len(of_two)
    assert num_rows - 2 <= len(of_two) <= num_rows
    for wrong, words in (
        ({"max_steps": 3}, "give both"),
        ({"max_steps": 0, "global_batch_size": 2}, "expected 1 or more"),
        ({"max_steps": 3, "global_batch_size": 2, "epochs": 1.0}, "expected one of them"),
    ):
        with pytest.raises(ValueError, match=words):
            RowDataset(two, "rl", **wrong)
    del sources["one"]
    mix.write_text(yaml.safe_dump({"sources": sources}))
    with pytest.raises(ValueError, match="two: max_epochs is 1, epochs"):
        RowDataset((), "rl", mix=mix, epochs=1.5)
    assert len([*RowDataset((), "rl", mix=mix, epochs=1)]) == num_rows


def scored_anew(folder: Path, to: Path, salt: int) -> Path:
    """The same rows scored once more, to other values: another hash of each part, under the same manifest."""
    rest = folder.parent / "packed"
    annotate(rest, to, lambda row: made_up(row, "packed", salt), "packed", 1 / 64)
    return to


def test_parts_that_change_under_an_export(
    shards: dict[str, Path], remit: Remit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a half-written nor a finished export of older parts is taken for one of the new parts."""
    old, new = (scored_anew(shards["plain"], tmp_path / f"salt-{salt}", salt) for salt in (1, 2))
    assert ShardFolder(old).manifest.checksum == ShardFolder(new).manifest.checksum
    here, out = tmp_path / "here", tmp_path / "out"
    here.symlink_to(old)
    arguments = ("export", "--to", "olmo-core", "--shards", here, "--out", out)
    counted, seen = writer._counted, list[str]()

    def dies(shards, part, columns, progress, done):  # type: ignore[no-untyped-def]
        seen.append(part)
        if len(seen) == 3:
            raise KeyboardInterrupt
        yield from counted(shards, part, columns, progress, done)

    def change(to: Path) -> None:
        here.unlink()
        here.symlink_to(to)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_counted", dies)
        with pytest.raises(KeyboardInterrupt):
            remit(*arguments)
    change(new)
    assert remit(*arguments)[0] == 0
    values = np.concatenate([np.fromfile(path, "<f4") for path in sorted(out.glob("*rl_logprobs.npy"))])
    rows = read_rows(new)
    padded = [row["rl_logprobs"] + [None] * (31 - len(row["rl_logprobs"])) for row in rows]
    assert same_floats(values, [value for row in padded for value in row])
    change(old)
    code, _, error = remit(*arguments)
    assert (code, "holds another export: parts_sha256" in error, "written anew since" in error) == (1, True, True)

    def changes(shards, part, columns, progress, done):  # type: ignore[no-untyped-def]
        yield from counted(shards, part, columns, progress, done)
        if part == shards.manifest.parts[0].name:
            change(new)

    monkeypatch.setattr(writer, "_counted", changes)
    late = (*arguments[:-1], tmp_path / "late")
    code, _, error = remit(*late)
    assert (code, "parts were written anew during the export" in error) == (1, True), error
    assert not (tmp_path / "late").exists()
