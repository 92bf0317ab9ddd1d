"""Files of token ids: those that a shell names beside them, and of which dtype their numbers are."""

from pathlib import Path

import numpy as np
import pytest

from scorer.sources import find_corpus


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
