"""Which rows remit inspect finds, by number, document and text, and the options that it refuses."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from annotated import annotate
from conftest import EOS, pack_inline, source_texts, write_corpus
from odd_rows import TEXTS, constant, write_odd_rows
from oracles import read_rows
from transformers import AutoTokenizer

from pipelines.inspect.find_rows import find_rows
from pipelines.inspect.settings import InspectConfig
from scorer.config import PackConfig

Remit = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return write_odd_rows(tmp_path_factory.mktemp("rows"), tokenizer_folder)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def shown_rows(remit: Remit, *arguments: object) -> list[int]:
    code, output, error = remit("inspect", "--tokens", 1, *arguments)
    assert code == 0, error
    return [int(number) for number in re.findall(r"^row (\d+) \(part", output, re.MULTILINE)]


def test_rows_are_found(shards: Path, remit: Remit, tokenizer: AutoTokenizer) -> None:
    rows = read_rows(shards)
    texts = [tokenizer.decode(row["input_ids"]) for row in rows]
    assert shown_rows(remit, "--shards", shards, "--rows", "10..13") == [10, 11, 12, 13]
    assert shown_rows(remit, shards, "--row", 12) == [12]
    for source, document in ((0, 3), (1, 15), (0, len(TEXTS) + 4)):
        expected = [n for n, row in enumerate(rows) if row["source"] == source and document in row["doc_ids"]]
        assert expected
        arguments = ("--shards", shards, "--doc", document, "--source", source, "--limit", 500)
        assert shown_rows(remit, *arguments) == expected
    for text in ("needle", EOS, "漢字", " "):
        expected = [number for number, shown in enumerate(texts) if text in shown]
        assert expected
        assert shown_rows(remit, "--shards", shards, "--search", text, "--limit", 10**6) == expected
        assert shown_rows(remit, "--shards", shards, "--search", text, "--limit", 2) == expected[:2]
    own = [number for number, row in enumerate(rows) if row["source"] == 1 and EOS in texts[number]]
    assert shown_rows(remit, "--shards", shards, "--search", EOS, "--source", 1) == own


def test_all_rows_of_a_long_document_under_best_fit(tmp_path: Path, tokenizer_folder: Path) -> None:
    """The rest of a long document waits for the end of its window, so that other rows stand between."""
    texts, long = source_texts(40, seed=3), (0, 1, 17)
    for place in long:
        texts[place] = " ".join(source_texts(12, seed=place + 4))
    write_corpus(tmp_path / "c.jsonl", texts)
    config = PackConfig([str(tmp_path / "c.jsonl")], str(tokenizer_folder), str(tmp_path / "out"), 32)
    folder = pack_inline(replace(config, tokens_per_shard=32 * 4, packing="best-fit"))
    rows, apart = read_rows(folder.path), 0
    for document in (*long, 3):
        expected = [number for number, row in enumerate(rows) if document in row["doc_ids"]]
        found = find_rows(folder, InspectConfig(str(folder.path), doc=document, limit=500))
        assert found.rows == expected
        apart += expected[-1] - expected[0] > len(expected) + 8  # two parts at least between them
    assert apart


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--row", 1, "--doc", 2), 2, "--row and --doc are given, expected one of them"),
        (("--rows", "3"), 2, "expected the first and the last row, for instance 8..11"),
        (("--rows", "4..3"), 2, "expected the first and the last row"),
        (("--row", -1), 2, "--row is -1, expected at least 0"),
        (("--search", ""), 2, "--search is empty"),
        (("--search", "x", "--limit", 0), 2, "--limit is 0, expected at least 1"),
        (("--source", 1), 2, "--source is given without --doc or --search"),
        (("--html", "{tmp}/x.html"), 2, "--html is given without rows"),
        (("--row", 0, "--base", "base"), 2, "give --html FILE too"),
        (("--row", 0, "--html", "{tmp}/no/x.html"), 2, "its folder does not exist"),
        (("--row", 0, "--html", "{tmp}"), 2, "is a folder, expected a file"),
        (("--row", 0, "--html", "{tmp}/x.arrow"), 2, "x.arrow, expected the name of a page"),
        (("--row", 0, "--html", "{tmp}/x.html", "--epsilon", 1.5), 2, "--epsilon is 1.5"),
        (("--row", 0, "--html", "{tmp}/x.html", "--base", "rl"), 2, "--reference and --base are both 'rl'"),
        (("--row", 0, "--html", "{tmp}/x.html", "--base", "b", "--model", "m"), 2, "are both given, expected one"),
        (("--row", 10**6), 1, "--row is 1000000, "),
        (("--rows", "0..1000000"), 1, "--rows is 0..1000000, "),
        (("--doc", 1), 1, "add --source, one of: 0 a.jsonl, 1 b<b>.jsonl"),
        (("--doc", 1, "--source", 2), 1, "has corpus files 0..1"),
        (("--doc", 9999, "--source", 1), 1, "no row from corpus file 1, b<b>.jsonl, has document 9999"),
        (("--search", "haystack"), 1, "no row has 'haystack' in its text"),
        (("--row", 0, "--html", "{tmp}/x.html", "--reference", "sft"), 1, "no log-probs of a reference named 'sft'"),
        (("--row", 0, "--html", "{tmp}/x.html", "--base", "other"), 1, "no log-probs of a reference named 'other'"),
    ],
)
def test_what_is_refused(
    shards: Path, tmp_path: Path, remit: Remit, options: tuple[object, ...], code: int, message: str
) -> None:
    found, _, error = remit("inspect", "--shards", shards, *(str(option).format(tmp=tmp_path) for option in options))
    assert found == code, error
    assert message in " ".join(error.replace("│", " ").split())  # bad usage comes in a box
    assert not list(tmp_path.glob("*.html"))


def test_columns_of_different_contexts(shards: Path, tmp_path: Path, remit: Remit) -> None:
    other = annotate(shards.parent / "rl", tmp_path / "both", constant, "document", name="base")
    html = tmp_path / "x.html"
    code, _, error = remit("inspect", "--shards", other, "--row", 0, "--html", html)
    assert code == 1
    assert "score one of them again with the other's --context" in error


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_the_folder_is_given_once(shards: Path, remit: Remit, command: str) -> None:
    outputs = [remit(command, *words) for words in ((shards,), ("--shards", shards))]
    assert [code for code, _, _ in outputs] == [0, 0]
    assert outputs[0][1] == outputs[1][1]
    for words, message in (((), "no shard folder is given"), ((shards, "--shards", shards), "are both given")):
        code, _, error = remit(command, *words)
        assert (code, message in " ".join(error.replace("│", " ").split())) == (2, True)
