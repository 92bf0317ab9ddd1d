"""remit train --wandb-project in offline mode: what the library keeps in OUT/wandb against metrics.jsonl."""

import itertools
import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from annotated import annotate
from conftest import source_texts, write_corpus
from processes import until

from pipelines.beside.setup import send_scores
from scorer.config import PackConfig
from scorer.pack import pack
from trainer.config import TrainConfig
from trainer.train import train

pytestmark = pytest.mark.usefixtures("starts_processes")

Remit = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """Two corpus files of short rows with made-up log-probs."""
    folder = tmp_path_factory.mktemp("logged")
    for index in range(2):
        write_corpus(folder / "corpus" / f"{index}.jsonl", [text[:50] for text in source_texts(15, seed=80 + index)])
    pack(PackConfig([str(folder / "corpus")], str(tokenizer_folder), folder / "packed", seq_len=16))

    def logprobs(row: dict) -> list:
        return [None, *(-(token % 50) / 8 for token in row["input_ids"][1:])]

    return annotate(folder / "packed", folder / "scored", logprobs, "packed", 1 / 64)


def records(file: Path) -> Iterator[bytes]:
    """What a .wandb file holds: a log in blocks of 32 KiB as LevelDB writes them, after seven bytes of its own."""
    data, position, parts = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # no room for a header at the end of a block
            position += 32768 - position % 32768
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def logged(out: Path) -> list[tuple[str, dict[int, dict]]]:
    """Id of the run and its figures by step, of each session in OUT/wandb, oldest first."""
    from wandb.proto import wandb_internal_pb2

    sessions = []
    for file in sorted((out / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        run_id, steps = "", {}
        for data in records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                run_id = record.run.run_id
            if record.HasField("history"):
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                steps[record.history.step.num] = {key: json.loads(value) for key, value in items.items()}
        sessions.append((run_id, steps))
    return sessions


def test_offline_and_resumed(
    tmp_path: Path, shards: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after step 12 with a checkpoint of step 10: both sessions under one id, all steps, the same figures."""
    pytest.importorskip("wandb", reason="pip install '.[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = TrainConfig(
        str(shards), str(models["base"]), tmp_path / "out", max_steps=14, global_batch_size=16, checkpoint_every=10,
        dtype="float32", wandb_project="mid-training",
    )  # fmt: skip

    class Killed(BaseException):
        pass

    def kill(done: int, total: int, metrics: dict) -> None:
        if done == 12:
            raise Killed

    with pytest.raises(Killed):
        train(config, kill)
    assert "wandb_project" not in json.loads((tmp_path / "out/run.json").read_text())
    scores = {"step": 10, "tasks": {"t": {"label": "Öl", "value": 0.5}}, "groups": {}, "mean": None}
    table = tmp_path / "out/tasks.jsonl"  # as an evaluation beside the training has left it
    table.write_text(json.dumps(scores) + "\n")
    train(config)
    lines = {line["step"]: line for line in map(json.loads, (tmp_path / "out/metrics.jsonl").read_text().splitlines())}
    (first_id, before), (second_id, after) = logged(tmp_path / "out")
    assert first_id == second_id == json.loads((tmp_path / "out/wandb.json").read_text())["mid-training"]
    assert sorted(before) == list(range(1, 13))
    assert sorted(after) == [11, 12, 13, 14]
    rows = {step: figures for step, figures in after.items() if "tasks/step" in figures}
    assert {step: (row["tasks/step"], row["tasks/Öl"]) for step, row in rows.items()} == {11: (10, 0.5)}
    with table.open("a") as file:
        file.write(json.dumps(scores | {"step": 14}) + "\n")
    send_scores("mid-training", tmp_path / "out")  # those that come after the last step
    until(lambda: logged(tmp_path / "out")[-1][1])  # the library's process writes a little later
    last_id, late = logged(tmp_path / "out")[-1]
    assert (last_id, [row["tasks/step"] for row in late.values()]) == (first_id, [14])
    send_scores("mid-training", tmp_path / "out")
    assert len(logged(tmp_path / "out")) == 3
    for steps in (before, after):
        for step, figures in steps.items():
            for key in ("loss", "ntp_loss", "grad_norm", "lr", "effective_tokens", "delta_mean"):
                assert figures[f"train/{key}"] == lines[step][key], (step, key)
            assert "train/sources" not in figures
            assert ("train/weights/values" in figures) is (step in (1, 10))
    for step in (1, 10):
        assert before[step]["train/delta_quantile_0.5"] == lines[step]["delta_quantiles"]["0.5"]
        names = {key.split("/")[0] for key in before[step] if key.startswith("source ")}
        assert names == {"source 0.jsonl", "source 1.jsonl"}
        edges, values = before[step]["train/weights/bins"], before[step]["train/weights/values"]
        centres = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
        counts = {f"{centre:.2f}": count for centre, count in zip(centres, values, strict=True) if count}
        assert counts == lines[step]["weight_histogram"]


def test_without_the_library(
    tmp_path: Path, shards: Path, models: dict[str, Path], remit: Remit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what makes an import fail
    common = ("train", "--shards", shards, "--model", models["base"], "--out", tmp_path / "out", "--max-steps", 1)
    code, _, error = remit(*common, "--wandb-project", "mid-training")
    assert (
        code,
        "--wandb-project: wandb is not installed; in your checkout of remit: pip install '.[wandb]'" in error,
    ) == (1, True)
    assert not (tmp_path / "out").exists()
    code, _, error = remit(*common, "--wandb-project", " ")
    words = " ".join(error.replace("│", " ").split())
    assert (code, "--wandb-project is ' ', expected the name of a project" in words) == (2, True)


def test_a_damaged_id_is_named(tmp_path: Path) -> None:
    from trainer.loggers import run_id

    one = run_id(tmp_path, "a")
    assert run_id(tmp_path, "b") != one == run_id(tmp_path, "a")
    (tmp_path / "wandb.json").write_text("[]")
    with pytest.raises(ValueError, match=r"wandb\.json: is not JSON of project names and run ids; delete it"):
        run_id(tmp_path, "a")
