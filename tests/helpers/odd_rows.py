"""Rows with all sorts of text, and log-probs whose differences are known by hand: for the tests of remit inspect."""

from pathlib import Path

from annotated import annotate
from conftest import source_texts, write_corpus

from scorer.config import PackConfig
from scorer.pack import pack

# the base's log-prob is -6 everywhere; position t of a row has delta DELTAS[t % 10]
DELTAS = [0.05, -0.05, 0.1, -0.1, 1.0, -1.0, 2.0, -2.0, 5.0, -5.0]
ATTACK = "</script><script>document.title='pwned'</script><img src=http://192.0.2.1/x onerror=alert(1)>&amp;"
HEBREW = "שלום, זה עם 123.45 מספרים"
TEXTS = [
    "x",
    "漢字かな交じり文 你好",
    "emoji 😀👩‍👩‍👧 e\u0301",
    f"The word שלום means\n{HEBREW}\r\nالسلام\n\n\tend  of  it ",
    "null \x00 \u202e\u202eturned\u2069\u2069 \ufeff\u200b",
    ATTACK,
    "needle in a row",
]


def deltas(row: dict) -> list:
    return [None, *(-6 + DELTAS[t % 10] for t in range(1, len(row["input_ids"])))]


def constant(row: dict) -> list:
    return [None, *[-6.0] * (len(row["input_ids"]) - 1)]


def write_odd_rows(folder: Path, tokenizer: Path) -> Path:
    """Rows of 31 tokens, some of which begin or end within a character, the last one a single token: rl and base."""
    write_corpus(folder / "corpus" / "a.jsonl", [*TEXTS, *source_texts(20, seed=8)])
    write_corpus(folder / "corpus" / "b<b>.jsonl", ["x"] * 16)  # two tokens each: 32 = 31 + 1
    pack(PackConfig([str(folder / "corpus")], str(tokenizer), folder / "packed", 31, tokens_per_shard=31 * 12))
    annotate(folder / "packed", folder / "rl", deltas, "packed")
    return annotate(folder / "rl", folder / "both", constant, "packed", name="base")
