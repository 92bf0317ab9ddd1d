"""Which files a corpus can be made of, told by their names and, for .json, by how they begin.

In: a file's name or its first bytes. Out: its format and codec, what it is called in messages and manifests, or why
it is not read.
"""

import codecs
import json
import os
import re

LINES = (".jsonl", ".ndjson", ".json")
TABLES = (".parquet", ".arrow")
TOKENS = (".npy", ".bin", ".ds")  # OLMo-core's, Megatron's, datatrove's
CODECS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bzip2", ".xz": "xz"}
EXPECTED = (
    ".jsonl, .ndjson or .json with an object a line, also with .gz, .zst, .bz2 or .xz behind it, .parquet or .arrow, or "
    "tokens as .npy, .bin with .idx or .ds with .ds.index"
)
HEAD_BYTES = 1 << 16  # of a .json file, to see whether it has an object a line
HIDDEN = (".", "_")
NO_SUFFIX = "no suffix"
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"PAR1": "parquet",
         b"ARROW1": "arrow", b"PK\x03\x04": "zip"}  # fmt: skip
_SUFFIX = re.compile(r"\.(?=[0-9]*[a-z])[a-z0-9_+-]{1,12}")


def format_of(name: str) -> tuple[str, str] | None:
    """Format (".jsonl", ".parquet" and so on) and codec ("" or as in CODECS) by a file's suffixes in any case, or None
    where a corpus cannot have such a file."""
    stem, suffix = os.path.splitext(name.rpartition("/")[2].lower())
    if suffix in TABLES + TOKENS:
        return suffix, ""
    codec = CODECS.get(suffix, "")
    if codec:
        suffix = os.path.splitext(stem)[1]
    return (suffix, codec) if suffix in LINES else None


def fault_of_name(name: str) -> str:
    """Why a file with this name is not read."""
    stem, suffix = os.path.splitext(name.rpartition("/")[2].lower())
    inner = os.path.splitext(stem)[1]
    if suffix in CODECS and inner in TABLES + TOKENS:
        return f"not a corpus file: {inner} files are read at any place, so not compressed; decompress it"
    return f"not a corpus file; expected {EXPECTED}"


def suffix_of(name: str) -> str:
    """What kind of file that is: its suffix in lower case, with the one before it where it is compressed."""
    stem, suffix = os.path.splitext(name.rpartition("/")[2].lower())
    inner = os.path.splitext(stem)[1] if suffix in CODECS else ""
    if not _SUFFIX.fullmatch(suffix):  # of part.0001 and its like there are as many as files
        return NO_SUFFIX
    return inner + suffix if _SUFFIX.fullmatch(inner) else suffix


def text_of_path(path: str) -> str:
    """A path as valid Unicode: bytes that are not UTF-8 as \\xNN, all others as they are.

    Different paths give different texts: a backslash before such a byte, or before what looks like one, is doubled.
    """

    def escaped(match: re.Match) -> str:
        backslashes, what = match.groups()
        return backslashes * 2 + (f"\\x{ord(what) - 0xDC00:02x}" if what >= "\udc80" else what)

    return re.sub("(\\\\*)(x[0-9a-f]{2}|[\udc80-\udcff])", escaped, path)


def encoding_of(head: bytes) -> str | None:
    """The Unicode encoding other than UTF-8 that JSON beginning with `head` is in, or None."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    # JSON begins with two ASCII characters, so the places of its zero bytes tell
    zeros = [byte == 0 for byte in head[:4]]
    if zeros in ([True, True, True, False], [False, True, True, True]):
        return "UTF-32"
    if zeros in ([True, False, True, False], [False, True, False, True]):
        return "UTF-16"
    return None


def fault_of_head(head: bytes, kind: str) -> str | None:
    """Why a file whose bytes begin with `head` is not what its suffix says, or None. kind: its codec, "parquet", "arrow", or
    "" for plain JSON lines."""
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the file itself; run git lfs pull"
    if not kind and (encoding := encoding_of(head)):
        return f"is {encoding}, expected UTF-8; iconv -f {encoding} -t UTF-8 makes that of it"
    if not kind and head and not head.strip(b"\0"):
        return "begins with zero bytes, as after a crash or a broken download; write it again"
    if kind in CODECS.values() and not head:
        return f"0 bytes, which is not a {kind} file; write it again"
    if kind == "zstd" and re.match(rb"[\x50-\x5f]\x2a\x4d\x18", head, re.DOTALL):  # a skippable frame
        return None
    found = next((name for magic, name in MAGIC.items() if head.startswith(magic)), "")
    if found == kind or (kind in ("parquet", "arrow") and not found):  # its reader says more
        return None
    if found:
        return f"holds {found} data, its name says {kind or 'JSON lines'}; give it the suffix of what it is"
    return f"holds no {kind} data (it begins with {head[:8]!r}); give it the suffix of what it is, or write it again"


def fault_of_json(head: bytes, whole: bool) -> str | None:
    """Why the JSON text that begins with `head` (whole: and ends with it) is not an object a line, or None."""
    lines = [line for line in head.removeprefix(codecs.BOM_UTF8).split(b"\n") if line.strip()]
    if not lines or fault_of_head(head, ""):  # which says more
        return None
    remedy = "expected one object a line"
    if lines[0].lstrip().startswith(b"["):
        return f"is one JSON array, {remedy}; jq -c '.[]' makes that of it"
    if len(lines) == 1 and not whole:
        return None  # a first document that is longer
    try:
        value = json.loads(lines[0].decode())
    except json.JSONDecodeError as error:
        if not lines[0].lstrip().startswith(b"{"):
            return f"begins with {lines[0][:20]!r}, {remedy}"
        more = error.pos >= len(error.doc.rstrip())
        return f"has a JSON object over several lines, {remedy}; jq -c . makes that of it" if more else None
    except (ValueError, RecursionError):  # a bad document
        return None
    return None if isinstance(value, dict) else f"is one JSON {type(value).__name__}, {remedy}"


def lacks_field(head: bytes, field: str) -> bool:
    """Whether `head`, the whole text of a file, is one object alone and has no `field`."""
    lines = [line for line in head.removeprefix(codecs.BOM_UTF8).split(b"\n") if line.strip()]
    try:
        value = json.loads(lines[0]) if len(lines) == 1 else None
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and field not in value
