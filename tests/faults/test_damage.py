"""Damage of a folder is named by every command that reads its rows, and by all of them in the same line."""

import re
from pathlib import Path

import pytest
from conftest import make_model
from damage import (
    ENTROPY,
    ENTROPY_OF,
    ENTROPY_READERS,
    FILES,
    PREDICT,
    READERS,
    REFERENCE,
    ROWS,
    TOP,
    TOPK,
    TOPK_READERS,
    entropy_rows,
    predict_rows,
    read_to_verify,
    rows,
    top_rows,
    two_references,
    write_folder,
)

from shards.fingerprint import weights_fingerprint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "reference", vocabulary=120)


def scored_by(model: Path, *names: str, **reference: object) -> dict[str, dict]:
    entry = REFERENCE | {"model": "reference", "weights_sha256": weights_fingerprint(model), "dtype": "float32"}
    return dict.fromkeys(names, entry | reference)


def line_of(reader, folder: Path, model: Path) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - what it says is compared by the caller
        reader(folder, model)
    return str(error.value)


@pytest.mark.parametrize("reader", READERS)
def test_a_sound_folder_is_read(tmp_path: Path, model: Path, reader: str) -> None:
    write_folder(tmp_path / "sound", two_references(rows()), references=scored_by(model, "rl", "base"))
    READERS[reader](tmp_path / "sound", model)


@pytest.mark.parametrize("reader", TOPK_READERS)
def test_sound_entries_are_read(tmp_path: Path, model: Path, reader: str) -> None:
    write_folder(tmp_path / "sound", top_rows(), references=scored_by(model, "rl", **TOP["rl"]))
    TOPK_READERS[reader](tmp_path / "sound", model)


@pytest.mark.parametrize("reader", ENTROPY_READERS)
def test_sound_entropies_are_read(tmp_path: Path, model: Path, reader: str) -> None:
    write_folder(tmp_path / "sound", entropy_rows(), references=scored_by(model, "rl", **ENTROPY_OF["rl"]))
    ENTROPY_READERS[reader](tmp_path / "sound", model)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", ROWS)
def test_rows(tmp_path: Path, model: Path, damage: str, reader: str) -> None:
    change, message = ROWS[damage]
    values = two_references(rows())
    change(values)
    write_folder(tmp_path / "bad", values, references=scored_by(model, "rl", "base"))
    line = line_of(READERS[reader], tmp_path / "bad", model)
    assert message in line
    assert re.match(rf"{tmp_path}/bad/part-0000[01]\.arrow row [01]: ", line), line
    assert line == line_of(read_to_verify, tmp_path / "bad", model)


@pytest.mark.parametrize("reader", TOPK_READERS)
@pytest.mark.parametrize("damage", TOPK)
def test_most_probable_tokens(tmp_path: Path, model: Path, damage: str, reader: str) -> None:
    change, message = TOPK[damage]
    values = top_rows()
    change(values["rl_topk_ids"], values["rl_topk_logprobs"])
    write_folder(tmp_path / "bad", values, references=scored_by(model, "rl", **TOP["rl"]))
    line = line_of(TOPK_READERS[reader], tmp_path / "bad", model)
    assert message in line
    assert f"{tmp_path}/bad/part-00000.arrow row 0: " in line
    assert line == line_of(read_to_verify, tmp_path / "bad", model)


@pytest.mark.parametrize("reader", ENTROPY_READERS)
@pytest.mark.parametrize("damage", ENTROPY)
def test_entropies(tmp_path: Path, model: Path, damage: str, reader: str) -> None:
    change, message = ENTROPY[damage]
    values = entropy_rows()
    change(values)
    write_folder(tmp_path / "bad", values, references=scored_by(model, "rl", **ENTROPY_OF["rl"]))
    line = line_of(ENTROPY_READERS[reader], tmp_path / "bad", model)
    assert message in line
    assert f"{tmp_path}/bad/part-00000.arrow row 0: " in line
    assert line == line_of(read_to_verify, tmp_path / "bad", model)


@pytest.mark.parametrize("reader", READERS)
def test_what_is_to_be_predicted(tmp_path: Path, model: Path, reader: str) -> None:
    settings = {"references": scored_by(model, "rl", "base"), "predict": True}
    write_folder(tmp_path / "sound", predict_rows(), **settings)
    READERS[reader](tmp_path / "sound", model)
    for damage, (change, message) in PREDICT.items():
        values = predict_rows()
        change(values)
        write_folder(tmp_path / damage / "bad", values, **settings)
        line = line_of(READERS[reader], tmp_path / damage / "bad", model)
        assert message in line
        assert line == line_of(read_to_verify, tmp_path / damage / "bad", model)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", FILES)
def test_files(tmp_path: Path, model: Path, damage: str, reader: str) -> None:
    change, message = FILES[damage]
    write_folder(tmp_path / "bad", two_references(rows()), references=scored_by(model, "rl", "base"))
    change(tmp_path / "bad")
    line = line_of(READERS[reader], tmp_path / "bad", model)
    assert message in line
    assert line == line_of(read_to_verify, tmp_path / "bad", model)
