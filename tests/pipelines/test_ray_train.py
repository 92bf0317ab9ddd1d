"""remit train --ray-workers: a signal reaches the workers, who save; the command that goes on is told."""

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import Command

from pipelines.commands.train import with_remedy, with_step
from pipelines.ray_train import fit, for_workers
from trainer.config import TrainConfig


class TakesSigint:
    """As Ray Train's trainer: in the main thread, and only there, fit() puts its own handler over the one that is there."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.before = error, signal.getsignal(signal.SIGINT)

    def fit(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.error:
            raise self.error


def test_ray_leaves_the_handler_of_signals_alone() -> None:
    trainer: Any = TakesSigint()
    fit(trainer)
    assert signal.getsignal(signal.SIGINT) is trainer.before
    failing: Any = TakesSigint(ValueError("mine"))
    with pytest.raises(ValueError, match="mine"):
        fit(failing)


def test_paths_reach_workers_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mix.yaml").write_text("sources: {a: {shards: a, weight: 1}, b: {shards: s3://x/b, weight: 2}}")
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    given: Any = {
        "model": "m",
        "out": Path("out"),
        "resume_from": Path("r/checkpoints/step-000001"),
        "prometheus": Path("p"),
        "mirror": "elsewhere",
    }
    sent = for_workers(TrainConfig(("a=0.5", "s3://x/b=0.5"), **given))
    assert sent.shards == (f"{tmp_path}/a=0.5", "s3://x/b=0.5")
    assert for_workers(TrainConfig(("a",), **given)).shards == (f"{tmp_path}/a",)
    mixed = for_workers(TrainConfig((), mix=Path("mix.yaml"), **given))
    assert (mixed.shards, mixed.mix) == ((), tmp_path / "mix.yaml")
    local = for_workers(TrainConfig(("a",), **given | {"mirror": "file:///mnt/m"}))
    assert local.mirror == "/mnt/m"
    monkeypatch.chdir("/")
    assert mixed.mixture.folders == [f"{tmp_path}/a", "s3://x/b"]
    paths = (sent.model, sent.out, sent.resume_from, sent.prometheus, sent.mirror)
    assert [str(path) for path in paths] == [
        f"{tmp_path}/{name}" for name in ("m", "out", "r/checkpoints/step-000001", "p", "elsewhere")
    ]


@pytest.mark.parametrize("kind", [FloatingPointError, RuntimeError])
def test_the_command_that_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, kind: type) -> None:
    monkeypatch.setattr("sys.argv", ["remit", "train", "--out", "my run", "--max-steps", "9"])

    def stops() -> Any:
        raise kind("step 7: loss nan; the same command with --skip-steps 7..7 goes on past this batch")

    with pytest.raises(kind):
        with_remedy(stops)
    assert "remit train --out 'my run' --max-steps 9 --skip-steps 7..7" in capsys.readouterr().err
    assert with_step(["train", "--skip-steps", "3..3", "--out", "x"], "7..7") == [
        "train", "--skip-steps", "7..7", "3..3", "--out", "x",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session", "starts_processes")
def test_ctrl_c_saves(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], remit: Callable[..., tuple[int, str, str]]
) -> None:
    out = tmp_path / "out"
    command = Command(
        tmp_path, "train", "--shards", annotated["packed"], "--model", models["base"], "--out", out, "--dtype", "float32",
        "--global-batch-size", 4, "--max-steps", 100_000, "--ray-workers", 2,
    )  # fmt: skip
    command.until(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") > 2)
    command.signal(signal.SIGINT)
    assert command.finish() == 3, command.errors
    assert "remit train: stopped by SIGINT; the same command again goes on" in command.errors
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{last:06d}"]
