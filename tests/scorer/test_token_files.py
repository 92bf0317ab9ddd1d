"""Files of token ids: those that a shell names beside them, and of which dtype their numbers are."""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from scorer.faults import BadFile
from scorer.sources import find_corpus, find_sources
from scorer.tokens.documents import Found, Rules, make_ready
from scorer.tokens.heads import fault_of_numbers
from scorer.tokens.read import Reading, read_tokens


def test_files_beside_that_a_shell_names_go_with_their_own(tmp_path: Path) -> None:
    """`ids/*` as a shell hands it on, in any order; what has no owner is refused."""
    for name in ("token_ids_part_0000.npy", "b.npy", "c.bin", "d.ds"):
        (tmp_path / name).write_bytes(b"\5\0\0\0")
    ours = (
        "labels_mask_part_0000.npy",
        "b_label_mask.npy",
        "b.csv.gz",
        "c.idx",
        "d.ds.index",
        "d.ds.metadata",
        "d.ds.loss",
    )
    for name in ours:
        (tmp_path / name).write_bytes(b"\1\1")
    named = sorted(str(path) for path in tmp_path.iterdir())
    for words in (named, named[::-1]):
        found = find_corpus(words)
        assert sorted(source.name for source in found.sources) == ["b.npy", "c.bin", "d.ds", "token_ids_part_0000.npy"]
        beside = [Path(one).name for source in found.sources for one in source.beside]
        assert sorted(beside) == sorted(ours)
    for name in ours:
        with pytest.raises(ValueError, match="only says more about a file of token ids beside it"):
            find_corpus([str(tmp_path / name)])
    (tmp_path / "b.npy").unlink()
    with pytest.raises(ValueError, match=r"b_label_mask\.npy: is a mask .* and b\.npy with the ids is not there"):
        find_corpus([str(tmp_path / "b_label_mask.npy"), str(tmp_path / "d.ds")])
    with pytest.raises(ValueError, match="not a corpus file"):
        find_corpus([str(tmp_path / "b.csv.gz"), str(tmp_path / "d.ds")])


def raw(path: Path, ids: list[int], dtype: str) -> str:
    np.array(ids, dtype=dtype).tofile(path)
    return str(path)


def read(name: str, dtype: str = "auto", vocabulary: int = 2000, eos: int = 0) -> list[int]:
    """The ids of the documents as they are packed, checked as they are."""
    (source,) = find_sources([name])
    rules = Rules(name, vocabulary, np.zeros(0, int), eos, None, None, "auto", "stop", "stop", is_raw=True)
    blocks = read_tokens(source, Reading(None, dtype, vocabulary, eos), 1 << 27)
    return [int(token) for block in blocks for token in make_ready(block, rules, Found()).ids]


@pytest.mark.parametrize("eos", [0, 1])
@pytest.mark.parametrize("vocabulary", [200, 2000, 100_000])
@pytest.mark.parametrize("ids", [[5, 6, 7], [*range(5, 35)] * 300])
@pytest.mark.parametrize("wide", ["uint16", "uint32", "int64", "uint64"])
def test_no_dtype_reads_zeros_between_the_ids(
    tmp_path: Path, wide: str, ids: list[int], vocabulary: int, eos: int
) -> None:
    """Whatever is asked for, the ids that were written come out or nothing does; no advice leads elsewhere or in a circle."""
    written = [*ids, eos]
    name, dtype = raw(tmp_path / "a.npy", written, wide), "auto"
    for _ in range(4):
        try:
            assert read(name, dtype, vocabulary, eos) == written
            break
        except BadFile as error:
            advice = re.findall(r"--tokens-dtype (u\w+)", str(error))
            if not advice:
                break
            dtype = advice[0]
    else:
        pytest.fail(f"the advice leads nowhere, at last to {dtype}")
    for given in ("uint8", "uint16", "uint32", "uint64"):
        if np.dtype(given).itemsize <= np.dtype(wide).itemsize:
            try:
                found = read(name, given, vocabulary, eos)
            except BadFile:
                continue
            assert found == written


def test_what_else_a_file_could_be_is_named(tmp_path: Path) -> None:
    name = raw(tmp_path / "a.npy", [5, 6, 7, 0], "int64")
    with pytest.raises(
        BadFile, match=r"could be uint32, uint64 as well as uint16: .* pass --tokens-dtype uint64 if it is"
    ):
        read(name)
    with pytest.raises(BadFile, match=r"could be uint64 as well as uint32: .* pass --tokens-dtype uint64, by all"):
        read(name, "uint32")
    assert read(raw(tmp_path / "b.npy", [5, 0, 9, 0], "uint16"), "uint16") == [5, 0, 9, 0]  # as uint32 without EOS


def test_a_header_or_a_mask_must_hold_the_ids_too(tmp_path: Path) -> None:
    """As an index must: a dtype too small for the tokenizer's ids wants the word of the user."""
    ids = [5, 6, 0, 50_000, 0]
    np.save(tmp_path / "header.npy", np.array(ids, "uint16"))
    raw(tmp_path / "mask.npy", ids, "uint16")
    np.ones(5, bool).tofile(tmp_path / "mask_label_mask.npy")
    for name in ("header", "mask"):
        file = str(tmp_path / f"{name}.npy")
        with pytest.raises(BadFile, match="is uint16, which ends at 65,535, and the tokenizer's ids at 99,999"):
            read(file, vocabulary=100_000)
        assert read(file, "uint16", 100_000) == ids
        assert read(file, vocabulary=60_000) == ids
    with pytest.raises(BadFile, match="is uint16 by its header, --tokens-dtype says uint32"):
        read(str(tmp_path / "header.npy"), "uint32")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_are_told_from_ids(tmp_path: Path, protocol: int) -> None:
    for value in ({}, {"a": [1] * 9}, [1, 2], Path("x"), np.arange(9)):
        head = pickle.dumps(value, protocol)[:64]
        if len(head) > 10:
            assert "pickle" in (fault_of_numbers(head) or "")
    for second in (0x618A, 0x0195, 0x417D, 0x6363):  # ids that begin as a pickle does
        ids = [protocol << 8 | 0x80, second, 4660, 22136, 39612, 0]
        assert fault_of_numbers(np.array(ids, "<u2").tobytes()) is None
    name = raw(tmp_path / "a.npy", [protocol << 8 | 0x80, 0x7163, 0x6161, 0x6161, 0], "uint16")
    assert len(read(name, "uint16", 60_000)) == 5
    assert (fault_of_numbers(Path(name).read_bytes()) is None) == (protocol > 3)
