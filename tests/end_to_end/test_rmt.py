"""remit rmt as a process: with real vLLM engines and kill -9, and on two processes with scripted engines."""

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from built_once import BuiltOnce
from processes import Command
from rmt_shards import with_entropy
from safetensors.torch import load_file

SCRIPTED = """
import contextlib
import pipelines.rmt.run as running
from fake_rollouts import FakeEngines

@contextlib.contextmanager
def engines(run, session):
    yield FakeEngines(run.prompter.close_ids, 500) if session.world.first else None

running.engines = engines
"""


@pytest.fixture
def arguments(built_once: BuiltOnce, packed: Path, reference_model: Path) -> list[Any]:
    shards = built_once("rmt-rows", lambda out: with_entropy(packed, out))
    return [
        "rmt", "--shards", shards, "--model", reference_model, "--first-budget", 6, "--budget-decay", 0.5,
        "--positions-per-step", 4, "--num-generations", 2, "--micro-batch-size", 3, "--learning-rate", 1e-3,
        "--format-steps", 2, "--max-steps", 5, "--dtype", "float32",
    ]  # fmt: skip


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_killed_run_with_real_engines_finishes_with_the_same_positions(
    tmp_path: Path, arguments: list[Any], ray_session: None, engine: None, starts_processes: None
) -> None:
    out = tmp_path / "run"
    command = [*arguments, "--out", out, "--checkpoint-every", 1]
    first = Command(tmp_path, *command)
    first.until(lambda: len(lines(out / "metrics.jsonl")) >= 4)
    first.signal(signal.SIGKILL)
    first.finish()
    before = lines(out / "positions.jsonl")
    again = Command(tmp_path, *command)
    assert again.finish() == 0, again.errors
    assert "going on after step" in again.errors
    after = lines(out / "positions.jsonl")
    assert [line["step"] for line in after] == list(range(1, 8))
    assert after[: len(before)] == before[: len(after)]
    metrics = lines(out / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 8))
    # the engine says of its own tokens what the model that trains says of them: it has had all the new weights
    assert max(line["engine_difference"] for line in metrics[2:]) < 1e-3
    assert all(line["rollout_tokens"] > 0 for line in metrics)
    assert load_file(out / "model" / "model.safetensors")


def test_two_processes_draw_and_learn_what_one_does(
    tmp_path: Path, arguments: list[Any], starts_processes: None, ray_session: None
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    for ranks in (1, 2):
        started = [
            Command(
                tmp_path, *arguments, "--out", tmp_path / str(ranks), private=True, first=SCRIPTED,
                **({} if ranks == 1 else {**world, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}),
            )
            for rank in range(ranks)
        ]  # fmt: skip
        for process in started:
            assert process.finish() == 0, process.errors
    one, two = (lines(tmp_path / ranks / "positions.jsonl") for ranks in ("1", "2"))
    assert one == two
    one, two = (lines(tmp_path / ranks / "metrics.jsonl") for ranks in ("1", "2"))
    for ours, theirs in zip(one, two, strict=True):
        for name in ("rl_loss", "ntp_loss", "grad_norm", "tokens", "outcome", "thought_tokens", "reward"):
            if name in ours:
                assert theirs[name] == pytest.approx(ours[name], rel=2e-4, abs=2e-6), (name, ours["step"])
    assert os.path.exists(tmp_path / "2" / "model")
