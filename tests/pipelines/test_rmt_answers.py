"""Completions taken apart by hand, the two match rewards, and the bytes of tokens against the library's own decoding."""

from pathlib import Path

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pipelines.rmt.answers import (
    boxed,
    can_be_boxed,
    information_gain,
    match_reward,
    prefix_reward,
    read_completion,
    token_bytes,
)

TOKENS = [b"a", b"</thi", b"nk>", b"nk>x", b"b", b"", b"</think>", b"y</"]
CLOSE = b"</think>"


@pytest.mark.parametrize(
    ("ids", "thought", "closed", "answer"),
    [
        ([0, 1, 2, 4, 0], 1, True, (4, 0)),
        ([1, 2], 0, True, ()),
        ([0, 4, 6], 2, True, ()),
        ([0, 4, 6, 6, 4], 2, True, (6, 4)),  # the first tag counts
        ([0, 1, 3, 4], 1, True, ()),  # a token holds the tag's end and more: no answer begins with a token
        ([0, 7, 0], 3, False, ()),
        ([0, 1], 2, False, ()),
        ([], 0, False, ()),
    ],
)
def test_a_completion_is_taken_apart_at_its_first_closing_tag(
    ids: list[int], thought: int, closed: bool, answer: tuple[int, ...]
) -> None:
    read = read_completion(ids, TOKENS, CLOSE)
    assert (read.thought_tokens, read.closed, read.answer_ids) == (thought, closed, answer)


def test_a_token_that_holds_the_thoughts_end_and_the_tags_beginning_is_one_of_the_thought() -> None:
    read = read_completion([0, 7, 8], [*TOKENS, b"think>"], CLOSE)
    assert (read.thought_tokens, read.closed) == (2, True)


def test_match_is_the_next_token_alone() -> None:
    assert [match_reward(answer, 4) for answer in ((4,), (4, 9), (9, 4), ())] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"so \\boxed{x}", b"x"),
        (b"\\boxed{x} or \\boxed{ y }.", b" y "),
        (b"\\boxed{f{g}{}h}", b"f{g}{}h"),
        (b"\\boxed{}", b""),
        (b"\\boxed{x} \\boxed{y", b"x"),
        (b"\\boxed{x", None),
        (b"boxed{x}", None),
        ("\\boxed{é漢}".encode(), "é漢".encode()),
    ],
)
def test_the_last_closed_box_counts(text: bytes, expected: bytes | None) -> None:
    assert boxed(text) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(b" the", 1), (b" the cat", 1), (b" the c", 0), (b"the", 0), (b" the cat sat", 0), (b"", 0), (None, 0)],
)
def test_the_prefix_rule_wants_the_right_bytes_and_a_token_border(answer: bytes | None, expected: float) -> None:
    assert prefix_reward(answer, [b" the", b" ca", b"t"]) == expected
    assert prefix_reward(b" ca", [b" ", b"ca", b"\xe6", b"\xbc\xa2"]) == 1
    assert prefix_reward(b" ca\xe6", [b" ", b"ca", b"\xe6", b"\xbc\xa2"]) == 1  # bytes, not characters


def test_the_gain_is_a_difference_of_log_probs() -> None:
    assert information_gain(-0.25, -1.5) == 1.25
    assert information_gain(-3.0, -1.0) == -2.0


def test_bytes_of_byte_level_tokens(tokenizer_folder: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    spelled = token_bytes(theirs, 600)
    for text in ("def f(x):\n\treturn 'é' # 漢字 😀", "null \x00 byte", "<|endoftext|> and more", " "):
        ids = theirs.encode(text, add_special_tokens=False)
        assert b"".join(spelled[index] for index in ids) == text.encode()
    assert len(spelled) == 600
    assert spelled[599] == b""


def test_bytes_of_sentencepiece_tokens() -> None:
    pieces = [("<unk>", 0.0), ("\u2581the", -1.0), ("\u2581", -2.0), ("cat", -2.0), ("<0xE6>", -9.0), ("<0x0A>", -9.0)]
    inner = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    spelled = token_bytes(transformers.PreTrainedTokenizerFast(tokenizer_object=inner), 6)
    assert spelled == [b"<unk>", b" the", b" ", b"cat", b"\xe6", b"\n"]


def test_bytes_of_added_tokens_are_what_the_library_decodes() -> None:
    """Such as Gemma's, which are runs of spaces."""
    vocabulary = {"<unk>": 0, "</s>": 1, "\u2581": 2, "a": 3, "b": 4}
    inner = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Replace(" ", "\u2581")
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_tokens([AddedToken("\u2581\u2581", normalized=False), AddedToken("\u2581\u2581\u2581", normalized=True)])
    inner.add_special_tokens(["<eot>"])
    spelled = token_bytes(transformers.PreTrainedTokenizerFast(tokenizer_object=inner), 8)
    for index in range(8):  # between letters, since decoders may take a space from the beginning
        assert spelled[index] == inner.decode([3, index, 4], skip_special_tokens=False)[1:-1].encode()


def test_what_a_box_can_hold() -> None:
    tokens = [
        b"a",
        b"{",
        b"}",
        b"{}",
        b"}{",
        b"f{x",
        b"{ {} }",
        b"\\boxed{",
        b"\\boxed{x}",
        b"",
        b"\xe6",
        b" ",
        b"<end>",
    ]
    found = can_be_boxed(tokens, {12}).tolist()
    # by hand; a box within a box is the last one, and says something else
    assert found == [True, False, False, True, False, False, True, False, False, False, True, True, False]


def test_a_tokenizer_whose_bytes_are_not_known_is_refused() -> None:
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(ValueError, match="expected a byte-level one or SentencePiece's"):
        token_bytes(transformers.PreTrainedTokenizerFast(tokenizer_object=inner), 2)
