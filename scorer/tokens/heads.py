"""Is a file of bare numbers what its name says? Of these formats nothing in the file tells, but other formats have marks.

In: the first bytes of a file. Out: a fault in words, or None. Token ids that happen to look like one of the marks are as
rare as the mark is long.
"""

import re

MARKS = (
    (re.compile(rb"\x1f\x8b\x08[\x00-\x1f]"), "gzip data; gzip -d makes tokens of it"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "zstd data; zstd -d makes tokens of it"),
    (re.compile(rb"BZh[1-9]1AY&SY"), "bzip2 data; bzip2 -d makes tokens of it"),
    (re.compile(rb"\xfd7zXZ\0"), "xz data; xz -d makes tokens of it"),
    (re.compile(rb"PAR1"), "parquet data; give it that suffix"),
    (re.compile(rb"ARROW1\0\0"), "Arrow data; give it that suffix"),
    (re.compile(rb"PK\x03\x04"), "a zip archive; unpack it"),
)
PICKLE = re.compile(
    # a number, an empty dict or list that is remembered, a class by its module; or a frame, its length below 2^40 in 8 bytes
    rb"\x80[\x02\x03](\x8a\x0a\x6c\xfc\x9c\x46|[}\]]q\x00|c[A-Za-z_]{4})|\x80[\x04\x05]\x95.{5}\x00{3}",
    re.DOTALL,
)
"""How pickles begin, also those of torch. Longer than it need be: 0x80 and a version are an id of two bytes, too."""
NUMPY_MARK = b"\x93NUMPY"
INDEX_MARK = b"MMIDIDX\x00\x00"
TEXT_BYTES = 32  # of printable text, before it is taken for text
_TEXT = re.compile(rb"[\t\n\r\x20-\x7e]{%d}" % TEXT_BYTES)


def fault_of_numbers(head: bytes, npy: bool = False, given: bool = False) -> str | None:
    """Why a file that begins with `head` holds no bare token ids. npy: whether it may have numpy's header; given: whether the
    user says of which dtype its numbers are."""
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the file itself; run git lfs pull"
    for mark, what in MARKS:
        if mark.match(head):
            return f"holds {what}"
    if PICKLE.match(head) and not given:
        return "holds a pickle, which may hold code and is never read; --tokens-dtype takes it for ids"
    if head.startswith(INDEX_MARK):
        return "holds an index of Megatron's (.idx), not tokens; give it the suffix of what it is"
    if head.startswith(NUMPY_MARK) and not npy:
        return "holds a numpy array; give it the suffix .npy"
    if _TEXT.match(head):
        return f"holds text (it begins with {head[:20]!r}), not token ids; give it the suffix of what it is"
    return None
