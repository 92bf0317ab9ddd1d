"""remit inspect in the terminal: numbers are never cut, text cannot steer the terminal, and what is left out is said."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from annotated import annotate
from conftest import EOS, write_corpus
from odd_rows import write_odd_rows
from oracles import read_rows
from test_weights import annotate_several
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

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


@pytest.mark.usefixtures("ray_session")
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


def marked_tokens(output: str) -> tuple[list[int], list[int]]:
    """Positions of the tokens that are shown, and of those of them that are marked."""
    lines = re.findall(r"^ *(> )?(\d+) │", output, re.MULTILINE)
    return [int(place) for _, place in lines], [int(place) for mark, place in lines if mark]


@pytest.mark.usefixtures("ray_session")
def test_search_shows_the_match(tmp_path: Path, tokenizer_folder: Path, remit: Remit) -> None:
    """The tokens around the first match of a row, with those marked that have some of its text."""
    texts = [
        "needle " + "a b " * 300,
        "a b " * 150 + "needle" + " a b" * 50 + "needle" + " a b" * 100,
        "a b " * 300 + "needle",
    ]
    write_corpus(tmp_path / "corpus" / "a.jsonl", texts)
    pack(PackConfig([str(tmp_path / "corpus")], str(tokenizer_folder), tmp_path / "packed", 4096))
    ids = read_rows(tmp_path / "packed")[0]["input_ids"]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ends = [len(tokenizer.decode(ids[: place + 1])) for place in range(len(ids))]
    text = tokenizer.decode(ids)
    matches = [
        [
            place
            for place, (start, end) in enumerate(zip([0, *ends], ends))
            if start < match.end() and end > match.start()
        ]
        for match in re.finditer("needle", text)
    ]
    assert len(matches) == 4
    assert any(len(match) > 1 for match in matches), "no match is of several tokens"

    code, output, _ = remit("inspect", tmp_path / "packed", "--search", "needle", "--tokens", 0)
    assert (code, marked_tokens(output)) == (
        0,
        (list(range(len(ids))), [place for match in matches for place in match]),
    )
    output = remit("inspect", tmp_path / "packed", "--search", "needle", "--tokens", 20)[1]
    assert marked_tokens(output) == (list(range(20)), matches[0])
    assert f"more of 'needle' from token {matches[1][0]} on" in output
    assert f"... {len(ids) - 20:,} more tokens; --tokens 0 shows all" in output
    output = remit("inspect", tmp_path / "packed", "--search", "b needle a", "--tokens", 20)[1]
    shown, found = marked_tokens(output)
    assert set(matches[1]) < set(found) <= set(shown)
    assert len(shown) == 20
    assert (
        f"... {shown[0]:,} tokens before and {len(ids) - shown[-1] - 1:,} after these; --tokens 0 shows all" in output
    )
    shown, found = marked_tokens(remit("inspect", tmp_path / "packed", "--search", f"needle{EOS}", "--tokens", 20)[1])
    assert shown == list(range(len(ids) - 20, len(ids)))
    assert found == [*matches[3], len(ids) - 1]


@pytest.mark.usefixtures("ray_session")
def test_a_match_within_a_character(tmp_path: Path, tokenizer_folder: Path, remit: Remit) -> None:
    """All tokens that a character is made of are marked, and nothing beside them."""
    shards = write_odd_rows(tmp_path, tokenizer_folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    (row,) = [row for row in read_rows(shards) if "你" in tokenizer.decode(row["input_ids"])]
    pieces = tokenizer.encode("你")
    assert len(pieces) == 3
    places = [t for t in range(31) if row["input_ids"][t : t + 3] == pieces]
    found = marked_tokens(remit("inspect", shards, "--search", "你")[1])[1]
    assert found == [places[0], places[0] + 1, places[0] + 2]


def test_quarantined_rows_say_so(small: Path, tmp_path: Path, remit: Remit) -> None:
    both = annotate_several(small, tmp_path / "both", {"rl": values, "base": values}, quarantined={"rl": {1}})
    output = remit("inspect", "--shards", both, "--rows", "0..1", "--tokens", 2)[1]
    first, second = re.findall("^row .*", output, re.MULTILINE)
    assert "quarantined" not in first
    assert second.endswith("quarantined: no log-probs of rl")


def test_entropies_have_numbers_and_bars(
    small: Path, tmp_path: Path, remit: Remit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def undecided(row: dict) -> list:
        return [None, *(t % 7 + 0.25 for t in range(1, len(row["input_ids"])))]

    monkeypatch.setenv("COLUMNS", "200")
    shards = annotate(small, tmp_path / "rl", values, "packed", entropy=undecided)
    code, output, error = remit("inspect", shards, "--row", 0)
    assert code == 0, error
    row, logprobs = read_rows(shards)[0], read_rows(shards)[0]["rl_logprobs"]
    lines = {line.split()[0]: line for line in output.splitlines() if line.strip()}
    assert "entropy" in output
    for t in range(1, len(row["input_ids"])):
        assert f" {t % 7 + 0.25:.4f} " in lines[str(t)]
        assert lines[str(t)].count("▪") == min(12, round(-logprobs[t])) + t % 7
    described = remit("inspect", shards)[1]
    assert "t = 1" in next(line for line in described.splitlines() if line.startswith("rl "))


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


def test_the_folder_is_described_for_people(small: Path, tmp_path: Path, remit: Remit) -> None:
    """References as a table with hashes cut to 12, and no JSON; what documents end with, by name and number."""
    entry = {
        "model": "org/olmo", "revision": "b" * 40, "weights_sha256": "a" * 64, "dtype": "bfloat16", "engine": "vllm",
        "logprob_step": 1 / 64,
    }  # fmt: skip
    names = {"rl": values, "exact": values}
    shards = annotate_several(small, tmp_path / "scored", names, rl=entry, exact=entry | {"logprob_step": 0.0})
    for command in ("inspect", "verify"):
        code, output, error = remit(command, shards)
        assert code == 0, error
        lines = {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}
        assert lines["reference"][1:7] == ["model", "revision", "weights", "dtype", "context", "step"]
        assert lines["rl"][1:7] == ["org/olmo", "b" * 12, "a" * 12, "bfloat16", "packed", "1/64"]
        assert lines["exact"][6] == "exact"
        assert "{" not in output
        assert "a" * 13 not in output
    assert f"end with {EOS} (0)" in remit("inspect", shards)[1]
    log_probs = sum(len(row["input_ids"]) - 1 for row in read_rows(shards))
    assert lines["rl"][7:] == [f"{log_probs:,}", "0"]


@pytest.mark.usefixtures("ray_session")
def test_one_of_each(tmp_path: Path, tokenizer_folder: Path, remit: Remit) -> None:
    write_corpus(tmp_path / "corpus" / "a.jsonl", ["x"])
    pack(PackConfig([str(tmp_path / "corpus")], str(tokenizer_folder), tmp_path / "packed", 16))
    assert "2 tokens in 1 row of at most 16, 1 part, complete" in remit("inspect", tmp_path / "packed")[1]
    assert ": 2 tokens, 1 document piece, from a.jsonl" in remit("inspect", tmp_path / "packed", "--row", 0)[1]
    assert "1 of 1 part are sound" not in remit("verify", tmp_path / "packed")[1]
