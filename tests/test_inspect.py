"""remit inspect in the terminal: numbers are never cut, text cannot steer the terminal, and what is left out is said."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_corpus
from oracles import read_rows
from test_plan_weights import annotate_several
from tokenizers.pre_tokenizers import ByteLevel

from pipelines.token_text import printable, spelled, token_label
from scorer.config import PackConfig
from scorer.pack import pack

Remit = Callable[..., tuple[int, str, str]]


def values(row: dict) -> list:
    return [None, *(-12.34375 - token_id / 64 for token_id in row["input_ids"][1:])]


@pytest.mark.parametrize("names", [("rl",), ("base", "rl"), ("a", "b", "c", "d", "a_name_that_is_long")])
@pytest.mark.parametrize("width", [None, 40, 80, 200])
def test_numbers_are_whole_at_any_width(
    small: Path,
    tmp_path: Path,
    remit: Remit,
    monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, ...],
    width: int | None,
) -> None:
    if width is not None:
        monkeypatch.setenv("COLUMNS", str(width))
    shards = annotate_several(small, tmp_path / "scored", dict.fromkeys(names, values))
    row = read_rows(shards)[1]
    code, output, _ = remit("inspect", "--shards", shards, "--row", 1, "--tokens", 0)
    assert code == 0
    lines = [re.split(" *│ *", line.strip()) for line in output.splitlines() if re.match(r" *\d+ │", line)]
    assert [int(cells[0]) for cells in lines] == list(range(len(row["input_ids"])))
    assert [int(cells[2]) for cells in lines] == row["input_ids"]
    for cells, token_id in zip(lines[1:], row["input_ids"][1:]):
        assert [cell for cell in cells[4:] if re.match(r"-\d", cell)] == [f"{-12.34375 - token_id / 64:.4f}"] * len(
            names
        )
    if width == 80 and len(names) <= 2:
        assert max(map(len, output.splitlines())) <= 80
        assert "▪▪▪▪" in output


def test_labels_of_tokens() -> None:
    assert token_label(" a b") == "·a·b"
    assert token_label("·\\n\n") == "\\xb7\\\\n\\n"
    assert token_label("\x1b[31m\x9b\x7f\x00") == "\\x1b[31m\\x9b\\x7f\\x00"
    assert token_label("\u202e\u200d\u00a0\u2028") == "\\u202e\\u200d\\xa0\\u2028"
    assert token_label("\u0301x") == "◌\u0301x"
    assert token_label("שלום 你好 😀") == "שלום·你好·😀"
    assert printable("a b\udcff\t") == "a b\\udcff\\t"


def test_names_of_files_cannot_steer_the_terminal(tmp_path: Path, tokenizer_folder: Path, remit: Remit) -> None:
    write_corpus(tmp_path / "corpus" / "a\x1b[2J\u202eb.jsonl", ["some text \x9b31m of a document"])
    out = tmp_path / "packed"
    pack(PackConfig([str(tmp_path / "corpus")], str(tokenizer_folder), out, 16))
    for options in ((), ("--row", 0, "--tokens", 0)):
        code, output, _ = remit("inspect", "--shards", out, *options)
        assert code == 0
        assert r"a\x1b[2J\u202eb.jsonl" in output
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", output)


def test_what_was_not_looked_at_is_said(small: Path, tmp_path: Path, remit: Remit) -> None:
    """A search that stops at --limit says so; so does one in a folder whose parts are not all there."""
    code, output, error = remit("inspect", "--shards", small, "--search", "e", "--limit", 3)
    assert (code, len(re.findall("^row ", output, re.MULTILINE))) == (0, 3)
    assert "only the first 3 found are shown; --limit shows more" in error
    code, output, error = remit("inspect", "--shards", small, "--search", "e", "--limit", 10_000)
    assert (code, "--limit" in error) == (0, False)

    partial = shutil.copytree(small, tmp_path / "partial")
    (partial / "_commits" / "part-00001.json").unlink()
    code, _, error = remit("inspect", "--shards", partial, "--search", "e", "--limit", 10_000)
    assert (code, "1 of 3 parts are not committed yet and were not looked at" in error) == (0, True), error
    code, _, error = remit("inspect", "--shards", partial, "--search", "no such text")
    assert (code, "parts are not committed yet and were not looked at" in error) == (1, True)


def test_quarantined_rows_say_so(small: Path, tmp_path: Path, remit: Remit) -> None:
    both = annotate_several(small, tmp_path / "both", {"rl": values, "base": values}, quarantined={"rl": {1}})
    output = remit("inspect", "--shards", both, "--rows", "0..1", "--tokens", 2)[1]
    first, second = re.findall("^row .*", output, re.MULTILINE)
    assert "quarantined" not in first
    assert second.endswith("quarantined: no log-probs of rl")


def test_bytes_of_a_character_are_spelled_by_their_numbers() -> None:
    """Against what tokenizers itself makes of characters, for every byte that UTF-8 has."""
    spelling = ByteLevel(add_prefix_space=False, use_regex=False)
    seen: set[int] = set()
    points = [*range(0x800), *range(0x800, 0xD800, 5), *range(0xE000, 0x10000, 5), *range(0x10000, 0x110000, 999)]
    for character in map(chr, points):
        symbol, data = spelling.pre_tokenize_str(character)[0][0], character.encode()
        assert spelled(symbol) == character
        seen |= set(data)
        for length in range(1, len(data)):
            assert spelled(symbol[:length]) == "".join(f"<0x{byte:02X}>" for byte in data[:length])
            assert spelled(symbol[length:]) == "".join(f"<0x{byte:02X}>" for byte in data[length:])
    assert seen == set(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert spelled("Ġ" + spelling.pre_tokenize_str("é")[0][0][0]) == " <0xC3>"
    for symbol in ("<0xE5>", "▁the", "[UNK]", "你"):
        assert spelled(symbol) == symbol
