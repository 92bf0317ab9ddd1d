"""Templates over several fields, and fields that are kept beside the rows."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest
from conftest import source_texts, write_corpus
from inline_ray import pack_inline

from scorer.config import PackConfig
from scorer.faults import BadDocument
from scorer.fields import Fields, parse_template
from scorer.kept_fields import field_types, join, kind_of
from shards import ShardFolder
from shards.output_folder import begin_shards, writing
from shards.side_table import copy_tables, fields_of
from shards.store import open_store
from shards.verify import verify_folder

Remit = Callable[..., tuple[int, str, str]]


def pack_to(out: Path, corpus: object, tokenizer: Path, **settings: object) -> ShardFolder:
    words = [str(word) for word in (corpus if isinstance(corpus, list) else [corpus])]
    return pack_inline(
        PackConfig(words, str(tokenizer), str(out), **({"seq_len": 48, "tokens_per_shard": 480} | settings))
    )


def write_lines(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


# --- templates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{q}\n{a}", "why?\nbecause {x}"),
        (r"{q}\n\t{a}", "why?\n\tbecause {x}"),
        (r"{q}\\n\d{a}", r"why?\n\dbecause {x}"),
        ("{{{q}}} {{}}", "{why?} {}"),
        ("{q}{q}", "why?why?"),
        ("{meta.title}: {a}", "Ünï: because {x}"),
        ("{a.b}", "dotted"),
        ("{deep.one.two}", "2"),
        ("{deep.x.y}", "three"),
        ("Q: {q}", "Q: why?"),
        ("{with space}", "spaced"),
    ],
)
def test_template(template: str, expected: str) -> None:
    record = {"q": "why?", "a": "because {x}", "meta": {"title": "Ünï"}, "a.b": "dotted", "deep": {"one": {"two": "2"}, "x.y": "three"},
              "with space": "spaced"}  # fmt: skip
    assert Fields(template=template).text_of("file:1", record) == expected


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"q": "x"}, "file:1: has no field 'a', only q; set --template"),
        ({"q": "x", "a": None}, "field 'a' is NoneType 'None', expected a string"),
        ({"q": 3, "a": "x"}, "field 'q' is int '3', expected a string"),
        ({"q": "x", "a": ["y"]}, "field 'a' is list"),
        ({"q": "x", "a": "\ud800"}, "unpaired surrogate"),
    ],
)
def test_what_a_template_lacks_is_a_bad_document(record: dict, message: str) -> None:
    found = Fields(template="{q} {a}").text_of("file:1", record)
    assert isinstance(found, BadDocument)
    assert message in str(found)


@pytest.mark.parametrize("template", ["", "no field", "{", "}", "{}", "{q", "q}", "{q!r}", "{q:>3}", "{ }", "{{q}}"])
def test_what_is_no_template_is_bad_usage(template: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--template .*expected fields in braces") as error:
        parse_template(template)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="--template"):
        PackConfig(["c.jsonl"], "t", str(tmp_path / "o"), template=template)


def test_options_that_exclude_each_other() -> None:
    for settings, message in [
        ({"template": "{q}", "text_field": "q"}, "--template and --text-field are both given"),
        ({"template": "{q}", "tokens_field": "q"}, "--template and --tokens-field are both given"),
        ({"text_field": "q", "tokens_field": "q"}, "--tokens-field and --text-field are both given"),
        ({"keep_fields": "a,,b"}, "--keep-fields is 'a,,b', expected names with commas"),
        ({"keep_fields": "a,b,a"}, "each once"),
        ({"keep_fields": ""}, "expected names"),
        ({"keep_fields": "_doc_id"}, "names a column of the table itself"),
        ({"tokens_field": ""}, "--tokens-field is empty"),
        ({"messages_field": "m", "template": "{q}"}, "--template and --messages-field are both given"),
        ({"messages_field": "m", "tokens_field": "q"}, "--tokens-field and --messages-field are both given"),
    ]:
        with pytest.raises(ValueError, match=message):
            PackConfig(["c.jsonl"], "t", "o", **settings)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "dataset"])
def test_template_gives_the_rows_of_its_text(tmp_path: Path, kind: str, tokenizer_folder: Path) -> None:
    texts = source_texts(40, seed=90)
    records = [{"q": one, "a": other, "n": index} for index, (one, other) in enumerate(zip(texts, reversed(texts)))]
    plain = write_corpus(tmp_path / "plain.jsonl", [f"Q: {record['q']}\nA: {record['a']}" for record in records])
    table = pa.Table.from_pylist(records)
    corpus: object = tmp_path / f"c.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, corpus, row_group_size=7)
    elif kind == "arrow":
        with pa.OSFile(str(corpus), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=9)
    else:
        folder = tmp_path / "folder"
        write_lines(folder / "train.jsonl", records)
        corpus = f"{folder}::train" if kind == "dataset" else folder / "train.jsonl"
    folder_of = pack_to(tmp_path / "out", corpus, tokenizer_folder, template=r"Q: {q}\nA: {a}")
    expected = pack_to(tmp_path / "expected", plain, tokenizer_folder)
    rows = [
        pyarrow.dataset.dataset(one.path, format="arrow").to_table().replace_schema_metadata(None)
        for one in (folder_of, expected)
    ]
    assert rows[0].equals(rows[1])
    assert folder_of.manifest.reading == {"template": r"Q: {q}\nA: {a}"}
    with pytest.raises(ValueError, match=r"--template is 'Q: .* there, '{q}{a}' asked for now"):
        pack_to(tmp_path / "out", corpus, tokenizer_folder, template="{q}{a}")
    with pytest.raises(ValueError, match="'b', only q, a, n; set --template"):
        pack_to(tmp_path / "other", corpus, tokenizer_folder, template="{q}{b}")


# --- kept fields --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([None, None], "null"), ([True, None, False], "bool"), ([1, -5, 1 << 62], "int"), ([1, 2.5], "float"), ([0.5], "float"),
        ([(1 << 53) + 1, 0.5], "json"), ([1 << 63], "json"), (["a", None], "string"), (["a", 1], "json"), ([True, 1], "json"),
        ([[1]], "json"), ([{"a": 1}, None], "json"), ([float("nan")], "json"),
    ],
)  # fmt: skip
def test_one_type_for_all_values(values: list, kind: str) -> None:
    assert join({kind_of(value) for value in values}) == kind


def test_a_field_that_nobody_has_is_refused() -> None:
    assert field_types(("a", "b"), [[["null"], ["string"]], [["small"], []]]) == {"a": "int", "b": "string"}
    with pytest.raises(ValueError, match="no document of the corpus has a field 'a'"):
        field_types(("a",), [[["null"]], [[]]])


RECORDS = [
    {"text": "one two three " * 9, "url": "http://a/ü", "score": 3, "meta": {"lang": "de"}, "tags": ["x", "y"]},
    {"text": "", "url": "http://empty", "score": 1, "tags": None},
    {"text": "four " * 40, "score": 0.25, "meta": {"lang": "en"}, "tags": "z"},
    {"text": "five", "url": None, "score": None, "meta": None, "tags": 5},
]


@pytest.fixture(scope="session")
def kept(built_once: Callable, tokenizer_folder: Path) -> Path:
    """Two corpus files, of which one has whole numbers where the other has fractions."""

    def build(folder: Path) -> None:
        write_lines(folder / "c" / "a.jsonl", RECORDS)
        table = pa.table({"text": ["from parquet", "again"], "url": ["p", "q"], "score": [7, 8], "meta": [{"lang": "fr"}, None],
                          "tags": [["t"], None]})  # fmt: skip
        pyarrow.parquet.write_table(table, folder / "c" / "b.parquet")
        pack_to(folder / "out", folder / "c", tokenizer_folder, keep_fields="url,score,meta.lang,tags")

    return built_once("kept-fields", build)


def test_kept_fields_stand_beside_the_rows(kept: Path) -> None:
    folder = ShardFolder(kept / "out")
    assert folder.manifest.kept_fields == {"url": "string", "score": "float", "meta.lang": "string", "tags": "json"}
    expected = {
        0: {"url": "http://a/ü", "score": 3.0, "meta.lang": "de", "tags": '["x", "y"]'},
        2: {"url": None, "score": 0.25, "meta.lang": "en", "tags": '"z"'},
        3: {"url": None, "score": None, "meta.lang": None, "tags": "5"},
    }
    assert fields_of(folder, 0, [0, 1, 2, 3]) == expected
    assert fields_of(folder, 1, [1]) == {1: {"url": "q", "score": 8.0, "meta.lang": None, "tags": None}}
    table = pyarrow.dataset.dataset(
        list(map(str, sorted((kept / "out" / "_fields").iterdir()))), format="arrow"
    ).to_table()
    assert table["_source"].to_pylist() == [0, 0, 0, 1, 1]
    assert table["_doc_id"].to_pylist() == [0, 2, 3, 0, 1]
    assert (
        len(pyarrow.dataset.dataset(kept / "out", format="arrow").to_table()) == folder.manifest.rows
    )  # nobody stumbles over it
    assert not verify_folder(folder).problems


def test_inspect_shows_them(kept: Path, remit: Remit) -> None:
    code, output, _ = remit("inspect", kept / "out", "--row", 0)
    assert code == 0
    assert (
        "documents 0 to 2 of a.jsonl: lines 1 to 3, empty ones not counted" in output
        or "document 0 of a.jsonl: line 1" in output
    )
    assert "document 0: meta.lang de, score 3.0, tags" in output
    assert "kept fields: meta.lang, score, tags, url" in remit("inspect", kept / "out")[1]


def test_damage_of_the_table_is_found(kept: Path, tmp_path: Path, remit: Remit) -> None:
    folder = shutil.copytree(kept / "out", tmp_path / "out")
    table = folder / "_fields" / "source-00000.arrow"
    data = bytearray(table.read_bytes())
    data[random.Random(1).randrange(len(data))] ^= 4
    table.write_bytes(data)
    (folder / "_fields" / "more.arrow").write_bytes(b"")
    problems = verify_folder(ShardFolder(folder)).problems
    assert ["source-00000.arrow: sha256" in problems[1], "more.arrow: is not in the manifest" in problems[0]] == [
        True,
        True,
    ]
    code, _, error = remit("inspect", folder, "--row", 0)
    assert (code, "source-00000.arrow: sha256" in error) == (1, True)
    with pytest.raises(ValueError, match=r"source-00000\.arrow: sha256"):
        copy_tables(ShardFolder(folder), open_store(tmp_path / "copy"))
    assert not [path for path in (tmp_path / "copy").rglob("*") if path.is_file()]
    table.unlink()
    assert "missing" in verify_folder(ShardFolder(folder)).problems[1]


def test_another_list_of_fields_is_another_pack(kept: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = shutil.copytree(kept, tmp_path / "copy")
    again = {"keep_fields": "url,score,meta.lang,tags"}
    assert (
        pack_to(folder / "out", folder / "c", tokenizer_folder, **again).manifest.checksum
        == ShardFolder(kept / "out").manifest.checksum
    )
    with pytest.raises(ValueError, match="--keep-fields"):
        pack_to(folder / "out", folder / "c", tokenizer_folder, keep_fields="url")
    for part in (folder / "out").glob("part-*"):  # of a run that died: the tables are made again, the same
        part.unlink()
        (folder / "out" / "_commits" / f"{part.stem}.json").unlink()
    assert not verify_folder(pack_to(folder / "out", folder / "c", tokenizer_folder, **again)).problems


def test_a_field_without_a_column_is_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_corpus(tmp_path / "a.parquet", ["x"])
    with pytest.raises(ValueError, match="has no column 'url', only text; set --keep-fields"):
        pack_to(tmp_path / "o", tmp_path / "a.parquet", tokenizer_folder, keep_fields="url")
    write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(ValueError, match="no document of the corpus has a field 'url'"):
        pack_to(tmp_path / "o", tmp_path / "a.jsonl", tokenizer_folder, keep_fields="url")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.parquet"]


def test_they_go_along_when_rows_are_scored_or_selected(tmp_path: Path, kept: Path) -> None:
    """What scoring and selecting begin an output folder with."""
    shards = ShardFolder(kept / "out")
    manifest = replace(shards.manifest, references={})
    with writing(open_store(tmp_path / "out")) as lease:
        folder = begin_shards(shards, open_store(tmp_path / "out"), manifest, lease)
    assert fields_of(folder, 0, [2]) == fields_of(shards, 0, [2])
