"""Text of tokens: of one, for a table; and of a row, in groups that show each character once.

A byte-level token may be a piece of a character. In: token ids. Out: groups of consecutive tokens, each with its text;
the texts one after the other are the decoded row.
"""

import json
import re
import unicodedata
from bisect import bisect_right
from itertools import accumulate
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from tokenizers.pre_tokenizers import ByteLevel

from shards.folder import ShardFolder

_LETTERS = sorted(ByteLevel.alphabet())  # a byte that is no visible character has a letter beyond the first 256
_OTHERS = [byte for byte in range(256) if chr(byte) not in _LETTERS]
BYTES = {letter: ord(letter) for letter in _LETTERS if ord(letter) < 256}
BYTES |= dict(zip((letter for letter in _LETTERS if ord(letter) >= 256), _OTHERS, strict=True))


class TokenText:
    """The tokenizer of a folder. ValueError where it cannot be loaded."""

    def __init__(self, folder: ShardFolder) -> None:
        self.tokenizer: Any = Tokenizer.from_str(json.dumps(folder.tokenizer_json()))

    def symbol(self, token_id: int) -> str:
        """How the vocabulary spells a token: byte-level symbols, where the tokenizer has such."""
        return self.tokenizer.id_to_token(token_id) or "?"

    def strings(self, input_ids: list[int]) -> list[str]:
        """Text of each token; bytes that are only a piece of a character show as <0xE5>."""
        texts = [self.decode([token_id]) for token_id in input_ids]
        return [
            spelled(self.symbol(token_id)) if "\ufffd" in text or not text else text
            for token_id, text in zip(input_ids, texts)
        ]

    def decode(self, input_ids: list[int]) -> str:
        return self.tokenizer.decode(input_ids, skip_special_tokens=False)

    def groups(self, input_ids: list[int]) -> tuple[list[tuple[int, str]], bool]:
        """Pairs of a number of tokens and their text, and whether the texts are those of the decoded row.

        They are not for a tokenizer that changes text across tokens; its groups are single tokens as it spells them.
        """
        groups: list[tuple[int, str]] = []
        pending: list[int] = []
        stream = DecodeStream(skip_special_tokens=False)
        try:
            for token_id in input_ids:
                pending.append(token_id)
                text = stream.step(self.tokenizer, token_id)
                if text is not None:
                    groups += self._split(pending, text)
                    pending = []
        except Exception:  # of the library: a prefix that decodes otherwise than before
            groups = [(0, "\ufffd")]
        done = "".join(text for _, text in groups)
        whole = self.decode(input_ids)
        if pending and whole.startswith(done):  # the row ends within a character
            groups += self._split(pending, whole[len(done) :])
            done = whole
        if done == whole and sum(count for count, _ in groups) == len(input_ids):
            return groups, True
        return [(1, self.symbol(token_id)) for token_id in input_ids], False

    def _split(self, input_ids: list[int], text: str) -> list[tuple[int, str]]:
        """Smaller groups, where their texts alone make up `text`: bytes of no character before a whole token."""
        groups: list[tuple[int, str]] = []
        while len(input_ids) > 1:
            for cut in range(1, len(input_ids)):
                left, right = self.decode(input_ids[:cut]), self.decode(input_ids[cut:])
                if left + right == text and left:
                    groups.append((cut, left))
                    input_ids, text = input_ids[cut:], right
                    break
            else:
                break
        return [*groups, (len(input_ids), text)]


def token_strings(folder: ShardFolder, input_ids: list[int]) -> list[str]:
    """Text of each token by the tokenizer of a folder, as TokenText.strings gives it."""
    return TokenText(folder).strings(input_ids)


def spelled(symbol: str) -> str:
    """A symbol of a vocabulary; <0xE5> for bytes that a byte-level one has by its own letters and that are no text."""
    if not all(letter in BYTES for letter in symbol):
        return symbol
    data = bytes(BYTES[letter] for letter in symbol)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" if byte >= 0x80 else chr(byte) for byte in data)


def printable(text: str) -> str:
    """`text` with escapes for what a terminal would not show, or obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def token_label(text: str) -> str:
    """The text of a token in one line of visible characters: · for a space, escapes, ◌ under a mark that combines."""
    shown = text.replace("\\", "\\\\").replace("·", "\\xb7").replace(" ", "·")
    stands_on = "◌" if unicodedata.category(text[:1] or " ").startswith("M") else ""
    return stands_on + printable(shown)


def find_in_groups(groups: list[tuple[int, str]], wanted: str) -> list[list[tuple[int, int]]]:
    """Where `wanted` is in the text of the groups: of each group, the first character and one past the last, in its text.

    A match that reaches over several groups has a range in each of them.
    """
    ranges: list[list[tuple[int, int]]] = [[] for _ in groups]
    ends = list(accumulate(len(text) for _, text in groups))
    for match in re.finditer(re.escape(wanted), "".join(text for _, text in groups)):
        for index in range(bisect_right(ends, match.start()), len(groups)):
            start = ends[index] - len(groups[index][1])
            if start >= match.end():
                break
            if groups[index][1]:
                ranges[index].append((max(match.start() - start, 0), min(match.end(), ends[index]) - start))
    return ranges
