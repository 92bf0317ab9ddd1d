"""Several real processes under torchrun: the same rows, the same losses, whoever holds which weights."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from annotated import annotate, by_model, rows_of_step, run, top_by_model
from conftest import make_model
from exchanged import exchanged, write_down
from exporting import make_base
from oracles import load, read_rows, remit_step
from processes import Ranks
from safetensors.torch import load_file

from shards.lease import Lease

pytestmark = pytest.mark.usefixtures("starts_processes")

ROOT = Path(__file__).parents[2]
STEPS = 5
Remit = Callable[..., tuple[int, str, str]]
VOLATILE = ("tokens_per_second", "data_wait_seconds", "peak_memory_bytes")


def arguments(out: Path, shards: Path | None, model: Path, options: tuple[object, ...]) -> list[object]:
    """shards: None where the options say what trains."""
    return [
        "train", *(() if shards is None else ("--shards", shards)), "--model", model, "--out", out, "--dtype", "float32", "--global-batch-size", 7,
        "--micro-batch-size", 2, "--max-steps", STEPS, "--checkpoint-every", 0, *options,
    ]  # fmt: skip


def launch(
    out: Path, shards: Path | None, model: Path, ranks: int, *options: object, machines: int = 1, first: str = ""
) -> Ranks:
    """remit train on several ranks, forked from a process that has imported all: what a rank does is the same."""
    return Ranks(out.parent, arguments(out, shards, model, options), ranks, machines, first)


def torchrun(
    out: Path, shards: Path, model: Path, ranks: int, *options: object, launcher: tuple[object, ...] = ("--standalone",)
) -> subprocess.Popen:
    """remit train under torchrun."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [
        sys.executable, "-m", "torch.distributed.run", *launcher, "--nproc-per-node", ranks, "-m", "pipelines.cli",
        *arguments(out, shards, model, options),
    ]  # fmt: skip
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT
    )


def finish(process: subprocess.Popen | Ranks) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def metrics_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same(got: list[dict], want: list[dict], tolerance: float = 1e-5) -> None:
    assert [line["step"] for line in got] == [line["step"] for line in want]
    for a, b in zip(got, want):
        assert a["tokens"] == b["tokens"]
        for key in ("loss", "ntp_loss", "weight_mean", "delta_mean", "grad_norm", "clipped_low", "clipped_high"):
            # the mean of differences may be near 0, and those of float32 losses of several nats are not exact
            nearly = 1e-6 if key == "delta_mean" else 1e-7
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=nearly), (a["step"], key)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, annotated: dict[str, Path], models: dict[str, Path]) -> Path:
    out = tmp_path_factory.mktemp("one") / "out"
    run(out, annotated["packed"], models["base"], max_steps=STEPS, global_batch_size=7, micro_batch_size=2)
    return out


@pytest.mark.parametrize(
    ("start", "ranks", "sharding"), [(torchrun, 2, "replicate"), (launch, 2, "full"), (launch, 3, "full")]
)
def test_ranks_agree_with_one_process(
    tmp_path: Path,
    annotated: dict[str, Path],
    models: dict[str, Path],
    one: Path,
    start: Callable,
    ranks: int,
    sharding: str,
) -> None:
    finish(start(tmp_path / "out", annotated["packed"], models["base"], ranks, "--sharding", sharding))
    assert_same(metrics_of(tmp_path / "out"), metrics_of(one))
    got, want = (load_file(folder / "model/model.safetensors") for folder in (tmp_path / "out", one))
    assert got.keys() == want.keys()
    assert all((got[name] - want[name]).abs().max() < 1e-4 for name in want)
    load(tmp_path / "out" / "model")


@pytest.mark.parametrize("sharding", ["replicate", "full"])
def test_rounding_for_an_evaluation_leaves_the_training_alone(
    tmp_path: Path, annotated: dict[str, Path], sharding: str
) -> None:
    """Of a tied bfloat16 base over two ranks: what is evaluated is what is exported, and the next step is as without."""
    base, shards, out = make_base(tmp_path / "start", "SmolLM3"), annotated["packed"], tmp_path / "out"
    alone = run(tmp_path / "one", shards, base, max_steps=STEPS, global_batch_size=7, micro_batch_size=2)
    finish(launch(out, shards, base, 2, "--sharding", sharding, "--eval-shards", shards, "--export-every", 2))
    assert_same(metrics_of(out), alone)
    lines = [json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 5]
    for line, name in zip(lines[1:], ("exports/step-000002", "exports/step-000004", "model")):
        want = remit_step(load(out / name), read_rows(shards), "packed", None, 0.2)["ntp_loss"]
        assert line["exported_loss"] == pytest.approx(want, abs=1e-5)
        assert abs(line["loss"] - want) > 1e-5
    got, want = (load_all(folder / "model") for folder in (out, tmp_path / "one"))
    assert got.keys() == want.keys()
    assert all((got[name].float() - want[name].float()).abs().max() < 1e-2 for name in want)
    records = [
        json.loads((folder / "exported.json").read_text())["models"]["model"] for folder in (out, tmp_path / "one")
    ]
    assert records[0]["returned_share"] == pytest.approx(records[1]["returned_share"], abs=0.01)


def load_all(folder: Path) -> dict:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def chosen(metrics: list[dict]) -> list[dict]:
    """How many tokens of which corpus file train at each step."""
    return [{name: figures["weight_histogram"] for name, figures in line["sources"].items()} for line in metrics]


@pytest.mark.parametrize("sharding", ["replicate", pytest.param("full", marks=pytest.mark.slow)])
def test_rho1_ranks_the_whole_batch(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], sharding: str
) -> None:
    """Eight rows: one rank with eight micro-batches, two with four each, one with a single batch, three unequal ones."""
    settings = {"objective": "rho1", "keep_ratio": 0.6, "max_steps": STEPS, "global_batch_size": 8}
    shards, model = annotated["packed"], models["base"]
    whole = run(tmp_path / "1x8", shards, model, micro_batch_size=8, **settings)
    divided = run(tmp_path / "8x1", shards, model, micro_batch_size=1, **settings)
    common = ("--objective", "rho1", "--keep-ratio", 0.6, "--global-batch-size", 8, "--sharding", sharding)
    finish(launch(tmp_path / "2 ranks", shards, model, 2, *common, "--micro-batch-size", 1))
    finish(launch(tmp_path / "3 ranks", shards, model, 3, *common, "--micro-batch-size", 2))
    assert all(0.55 < line["weight_histogram"]["1.65"] / line["predicted_tokens"] < 0.65 for line in whole)
    for other in (divided, metrics_of(tmp_path / "2 ranks"), metrics_of(tmp_path / "3 ranks")):
        assert chosen(other) == chosen(whole)
        assert_same(other, whole)
    # and it is not what each micro-batch by itself would choose
    local = run(tmp_path / "micro", shards, model, micro_batch_size=1, scope="micro", **settings)
    assert abs(local[0]["loss"] - whole[0]["loss"]) > 1e-3


def test_kd_on_ranks(tmp_path: Path, small: Path, models: dict[str, Path]) -> None:
    model, top = models["reference"], top_by_model(models["reference"], "packed", 4, 1 / 64)
    shards = annotate(small, tmp_path / "shards", by_model(model, "packed", 1 / 64), "packed", 1 / 64, top=top)
    settings = {"objective": "kd", "max_steps": STEPS, "global_batch_size": 7}
    one = run(tmp_path / "one", shards, models["base"], micro_batch_size=2, **settings)
    finish(launch(tmp_path / "out", shards, models["base"], 2, "--objective", "kd", "--sharding", "full"))
    assert_same(metrics_of(tmp_path / "out"), one)
    for got, want in zip(metrics_of(tmp_path / "out"), one):
        assert got["kd_loss"] == pytest.approx(want["kd_loss"], rel=1e-5)
        assert got["missing_mass"] == pytest.approx(want["missing_mass"], rel=1e-5)


def two_launchers(*arguments: object) -> list[subprocess.Popen]:
    """As docs/training.md says for several machines: each launcher has two ranks, the first one's port is known."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = ("--nnodes", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}")
    return [torchrun(*arguments, launcher=rendezvous) for _ in range(2)]


def four_ranks(out: Path, shards: Path, model: Path, ranks: int, *options: object) -> list[Ranks]:
    return [launch(out, shards, model, 2 * ranks, *options, machines=2)]


@pytest.mark.parametrize("start", [four_ranks, pytest.param(two_launchers, marks=pytest.mark.slow)])
def test_hybrid_over_two_machines(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], one: Path, start: Callable
) -> None:
    """Two machines with two ranks each; killed after a checkpoint, then one process."""
    options = ("--sharding", "hybrid", "--checkpoint-every", 2)
    processes = start(tmp_path / "out", annotated["packed"], models["base"], 2, *options)
    wait_for(lambda: (tmp_path / "out/checkpoints/step-000002").exists(), processes[0])
    for process in processes:
        kill_tree(process)
    assert (tmp_path / "out/checkpoints/step-000002").exists()  # or the one process would do all the work
    assert not (tmp_path / "out/model").exists()
    finish(launch(tmp_path / "out", annotated["packed"], models["base"], 1))
    assert_same(metrics_of(tmp_path / "out"), metrics_of(one))


EACH_TIME = """
import contextlib
import trainer.train
trainer.train.accumulate_only = lambda model: contextlib.nullcontext()
"""


@pytest.mark.parametrize(
    ("before", "exchanges"),
    [("", 1), pytest.param(EACH_TIME, 3, marks=pytest.mark.slow)],
    ids=["as it is", "each time"],
)
def test_gradients_cross_machines_once_per_step(
    tmp_path: Path, small: Path, models: dict[str, Path], before: str, exchanges: int
) -> None:
    """Two machines with two ranks; three micro-batches a step, the last of one rank without a row, others of rows that train nothing.

    Counted are the bytes of gradients in the groups that span the machines, held against the shards of all weights in float32.
    """
    base, unscored = models["base"], {0, 1, 2, 3, 9, 14, 15}
    shards = annotate(
        small, tmp_path / "shards", by_model(models["reference"], "packed", 0), "packed", unscored=unscored
    )
    size = ("--global-batch-size", 11, "--micro-batch-size", 1)
    run(tmp_path / "one", shards, base, max_steps=STEPS, global_batch_size=11, micro_batch_size=2)
    out, first = tmp_path / "out", write_down(tmp_path) + before
    finish(launch(out, shards, base, 4, "--sharding", "hybrid", *size, machines=2, first=first))
    assert_same(metrics_of(out), metrics_of(tmp_path / "one"))
    got, want = (load_file(folder / "model/model.safetensors") for folder in (out, tmp_path / "one"))
    assert all((got[name] - want[name]).abs().max() < 1e-5 for name in want)
    shard_bytes = sum(4 * -(-len(weight) // 2) * weight[0].numel() for weight in load_all(base).values())
    for rank in range(4):
        counts = exchanged(tmp_path, rank)
        across, within = (rank % 2, rank % 2 + 2), (rank - rank % 2, rank - rank % 2 + 1)
        assert counts["all_reduce", across] == exchanges * STEPS * shard_bytes
        assert counts["reduce_scatter", within] == 3 * STEPS * 2 * shard_bytes
        assert counts.keys() == {("all_reduce", across), ("reduce_scatter", within), ("all_gather", within)}


@pytest.mark.parametrize("sharding", [pytest.param("replicate", marks=pytest.mark.slow), "full"])
def test_bfloat16_ranks_are_near_one_process(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], one: Path, sharding: str
) -> None:
    arguments = ("--sharding", sharding, "--dtype", "bfloat16")
    finish(launch(tmp_path / "out", annotated["packed"], models["base"], 2, *arguments))
    for got, want in zip(metrics_of(tmp_path / "out"), metrics_of(one), strict=True):
        assert got["ntp_loss"] == pytest.approx(want["ntp_loss"], rel=0.01)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=0.05)


@pytest.mark.parametrize(
    "options", [("--activation-checkpointing",), pytest.param(("--compile", "on"), marks=pytest.mark.slow)]
)
def test_sharded_tied_and_document_context_against_float64(
    tmp_path: Path, annotated: dict[str, Path], options: tuple[str, ...]
) -> None:
    """Tied embeddings, grouped-query attention, fewer rows than ranks in the last micro-batch."""
    make_model(tmp_path / "model", "Llama", seed=5, tie_word_embeddings=True)
    shards = annotated["document"]
    finish(launch(tmp_path / "out", shards, tmp_path / "model", 2, "--sharding", "full", "--seed", 4, *options))
    rows = rows_of_step(shards, 0, 7, seed=4)
    want = remit_step(load(tmp_path / "model"), rows, "document", "rl_logprobs", 0.2)
    got = metrics_of(tmp_path / "out")[0]
    for key, value in want.items():
        assert got[key] == pytest.approx(float(value), abs=1e-4), key


def test_another_world_size_goes_on(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], one: Path
) -> None:
    """1 -> 2 -> 1 processes, through checkpoints of sharded and of whole weights."""
    out, shards = tmp_path / "out", annotated["packed"]
    for ranks, stop_at in ((1, 2), (2, 4)):
        process = launch(out, shards, models["base"], ranks, "--sharding", "full", "--checkpoint-every", 1)
        wait_for(lambda stop_at=stop_at: (out / f"checkpoints/step-{stop_at:06d}").exists(), process)
        kill_tree(process)
        assert (out / f"checkpoints/step-{stop_at:06d}").exists()  # or the next one would do all the work
        assert not (out / "model").exists()
    finish(launch(out, shards, models["base"], 1, "--checkpoint-every", 1))
    assert_same(metrics_of(out), metrics_of(one))


def wait_for(condition, process: subprocess.Popen | Ranks, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_tree(process: subprocess.Popen | Ranks) -> None:
    """kill -9 of the ranks, and of the launcher where there is one."""
    if isinstance(process, Ranks):
        process.kill()
        return
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    for pid in [process.pid, *map(int, children)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.communicate()


@pytest.mark.usefixtures("ray_session")
def test_ray_train_launches_the_same(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], one: Path, remit: Remit
) -> None:
    arguments = [
        "train", "--shards", annotated["packed"], "--model", models["base"], "--out", tmp_path / "out", "--dtype",
        "float32", "--global-batch-size", 7, "--micro-batch-size", 2, "--max-steps", STEPS, "--ray-workers",
    ]  # fmt: skip
    lease = Lease(tmp_path / "out").acquire()
    code, _, error = remit(*arguments, 1)
    assert code == 1
    assert f"another driver writes to this folder: host {socket.gethostname()}, pid {os.getpid()}, since" in error
    lease.release()
    code, _, error = remit(*arguments, 2)
    assert code == 0, error
    assert_same(metrics_of(tmp_path / "out"), metrics_of(one))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
