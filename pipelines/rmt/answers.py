"""What a completion holds: its thought, and the prediction after it. Bytes decide, since tokens may straddle a tag.

In: token ids and the bytes of each token. Out: tokens of thought, the answer's tokens, the bytes in its last box.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from pipelines.token_text import BYTES

BOX = b"\\boxed{"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Completion:
    """thought_tokens: before the closing tag; closed: whether there is one; answer_ids: the tokens after it, none where
    a token holds the end of the tag and what follows."""

    thought_tokens: int
    closed: bool
    answer_ids: tuple[int, ...]


def read_completion(completion_ids: Sequence[int], token_bytes: Sequence[bytes], close: bytes) -> Completion:
    """Take a completion apart at its first closing tag; token_bytes: of each id of the vocabulary."""
    pieces = [token_bytes[index] for index in completion_ids]
    ends = list(accumulate(map(len, pieces)))
    at = b"".join(pieces).find(close)
    if at < 0:
        return Completion(len(pieces), False, ())
    starts = [0, *ends[:-1]]
    thought = sum(start < at for start in starts)
    first = int(np.searchsorted(ends, at + len(close))) + 1  # one past the token that ends the tag
    is_clean = ends[first - 1] == at + len(close)
    return Completion(min(thought, len(pieces)), True, tuple(completion_ids[first:]) if is_clean else ())


def match_reward(answer_ids: Sequence[int], target: int) -> float:
    """RMT's: 1 where the token right after the thought is the true one."""
    return float(len(answer_ids) > 0 and answer_ids[0] == target)


def boxed(answer: bytes) -> bytes | None:
    """What stands in the last \\boxed{...} whose braces are closed; None without one."""
    for start in sorted((match.start() for match in re.finditer(re.escape(BOX), answer)), reverse=True):
        depth = 1
        for place in range(start + len(BOX), len(answer)):
            depth += {ord("{"): 1, ord("}"): -1}.get(answer[place], 0)
            if not depth:
                return answer[start + len(BOX) : place]
    return None


def prefix_reward(answer: bytes | None, continuation: Sequence[bytes]) -> float:
    """RPT's: 1 where `answer` is a prefix of the true continuation, byte for byte, and ends on one of its token borders.

    continuation: bytes of each token of the true text from the position on.
    """
    return float(answer is not None and answer != b"" and answer in set(accumulate(continuation)))


def can_be_boxed(token_bytes: Sequence[bytes], never: Collection[int]) -> np.ndarray:
    """Where a box with the token of this id alone would earn RPT's reward, bool [ids]: braces have to be balanced in it.

    never: ids that cannot be written in a box, such as that of the end token.
    """
    earns = [prefix_reward(boxed(BOX + one + b"}"), [one]) == 1 for one in token_bytes]
    return np.array([earned and index not in never for index, earned in enumerate(earns)])


def information_gain(logprob: float, baseline: float) -> float:
    """RLP's, in nats: log p(x_t | x_<t, thought) of the model less the frozen base's stored log p(x_t | x_<t)."""
    return logprob - baseline


def token_bytes(tokenizer: Any, num_embeddings: int) -> list[bytes]:
    """The bytes that each id below num_embeddings stands for; ids without a token have none: embeddings may be padded.

    tokenizer: a fast one of transformers.

    ValueError for a tokenizer whose tokens are neither byte-level nor SentencePiece pieces: their bytes are not known.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    kinds = set(_kinds(described.get("decoder")))
    byte_level, pieces = "ByteLevel" in kinds, bool({"ByteFallback", "Metaspace", "Replace"} & kinds)
    if not (byte_level or pieces):
        raise ValueError(
            f"the tokenizer decodes by {', '.join(sorted(kinds)) or 'nothing'}, expected a byte-level one or SentencePiece's: "
            "what bytes a token stands for is not known otherwise"
        )
    added = {entry["id"]: entry["content"] for entry in described.get("added_tokens", [])}
    found = [b""] * max(len(tokenizer), num_embeddings)
    for token, index in tokenizer.get_vocab().items():
        if byte_level and index in added:
            found[index] = added[index].encode()
        elif byte_level:
            found[index] = (
                bytes(BYTES[letter] for letter in token) if all(c in BYTES for c in token) else token.encode()
            )
        elif match := _BYTE.fullmatch(token):
            found[index] = bytes([int(match[1], 16)])
        else:
            found[index] = token.replace("\u2581", " ").encode()
    return found


def _kinds(decoder: Any) -> list[str]:
    if not isinstance(decoder, dict):
        return []
    return [decoder.get("type", ""), *(kind for part in decoder.get("decoders", []) for kind in _kinds(part))]
