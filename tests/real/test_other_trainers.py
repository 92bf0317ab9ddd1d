"""torchtitan and Megatron themselves on exports; in an environment of their own, whose Python OTHER_TRAINERS names."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from annotated import rows_of_step
from oracles import load, read_rows, remit_step

from pipelines.cli import main

pytestmark = pytest.mark.real
PYTHON = Path(os.environ.get("OTHER_TRAINERS", ".cache/other-trainers/bin/python"))
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def environment(starts_processes: None) -> None:
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing; make test-real installs it")


def export(*arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", *map(str, arguments)])
    assert ended.value.code == 0


def run(*arguments: object, **environment: str) -> str:
    path = os.pathsep.join([*environment.pop("PYTHONPATH", "").split(os.pathsep), str(REPOSITORY)]).lstrip(os.pathsep)
    found = subprocess.run(
        [str(PYTHON.absolute()), "-P", *map(str, arguments)], env=os.environ | environment | {"PYTHONPATH": path},
        capture_output=True, text=True, check=False, cwd=REPOSITORY,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-4000:]
    return found.stdout


READ_MEGATRON = """
import json, sys, torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from trainer.integrations.megatron import ScoredRows, weighted_loss
out = sys.argv[1]
columns = {name: IndexedDataset(f"{out}/{name}") for name in ("tokens", "label_mask", "doc_lengths", "rl_logprobs")}
rows = ScoredRows(out)
assert len(rows) == len(columns["tokens"])
found = {name: [column[index].tolist() for index in range(len(column))] for name, column in columns.items()}
found["samples"] = [{name: value.tolist() for name, value in rows[index].items()} for index in range(len(rows))]
batch = {name: torch.stack([rows[index][name] for index in range(4)]) for name in rows[0]}
losses = torch.linspace(0, 5, batch["labels"].numel()).reshape(batch["labels"].shape)
found["loss"] = [value.item() for value in weighted_loss(losses, batch)]
print(json.dumps(found))
"""


def test_megatron_reads_rows(annotated: dict[str, Path], tmp_path: Path) -> None:
    for context, shards in annotated.items():
        export("--to", "megatron", "--shards", shards, "--out", tmp_path / context)
        found = json.loads(run("-c", READ_MEGATRON, tmp_path / context))
        rows = read_rows(shards)
        assert found["tokens"] == [row["input_ids"] for row in rows]
        assert found["doc_lengths"] == [row["doc_lengths"] for row in rows]
        present = [[value is not None for value in row["rl_logprobs"]] for row in rows]
        assert [[bool(value) for value in mask] for mask in found["label_mask"]] == present
        for own, row, sample in zip(found["rl_logprobs"], rows, found["samples"]):
            # NaN is the only number that is not itself
            assert [None if value != value else value for value in own] == row["rl_logprobs"]
            length = len(row["input_ids"])
            assert sample["tokens"][:length] == row["input_ids"]
            for t in range(24):
                predicts = t + 1 < length and row["rl_logprobs"][t + 1] is not None
                assert sample["loss_mask"][t] == float(predicts)
                if predicts:
                    assert (sample["labels"][t], sample["logprobs"][t]) == (
                        row["input_ids"][t + 1],
                        row["rl_logprobs"][t + 1],
                    )
            starts = [0, *torch.tensor(row["doc_lengths"]).cumsum(0).tolist()] if context == "document" else [0]
            assert sample["position_ids"][:length] == [t - max(s for s in starts if s <= t) for t in range(length)]
            if context == "document":
                document = torch.repeat_interleave(
                    torch.arange(len(row["doc_lengths"])), torch.tensor(row["doc_lengths"])
                )
                may = torch.tensor(sample["attention_mask"])[0, :length, :length].logical_not()
                assert torch.equal(may, (document[:, None] == document) & torch.ones(length, length).tril().bool())
        total, count = found["loss"]
        losses = torch.linspace(0, 5, 4 * 24, dtype=torch.float64).reshape(4, 24)
        wanted = 0.0
        for r in range(4):
            places = [t for t, value in enumerate(rows[r]["rl_logprobs"]) if value is not None]
            excess = torch.tensor([losses[r, t - 1] + rows[r]["rl_logprobs"][t] for t in places], dtype=torch.float64)
            weights = (2 * (excess - excess.mean()).sigmoid()).clip(0.8, 1.2)
            wanted += sum(w.item() * losses[r, t - 1].item() for w, t in zip(weights, places))
        assert total == pytest.approx(wanted, rel=1e-5)
        assert count == sum(map(sum, present[:4]))


STEPS_IN_TORCHTITAN = """
import json, sys
from pathlib import Path
from benchmarks.other_trainers import titan_on_cpu
out, *arguments = sys.argv[1:]
sys.argv[1:] = ["--module", "remit_rows", "--config", "benchmarks.other_trainers.titan_config.tiny_qwen3", "--dump_folder", out,
    "--training.local_batch_size", "2", "--training.global_batch_size", "8", "--training.steps", "3", *arguments]
titan_on_cpu.main()
"""


def titan_losses(out: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(out.rglob("events.out.tfevents.*")).parent))
    events.Reload()
    return [event.value for event in events.Scalars("loss_metrics/global_avg_loss")]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    import shutil

    from conftest import make_model

    folder = make_model(tmp_path_factory.mktemp("qwen3"), "Qwen3", tie_word_embeddings=False)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    return folder


@pytest.mark.parametrize("chunks", ["1", "8"])
def test_steps_in_torchtitan(annotated: dict[str, Path], qwen3: Path, tmp_path: Path, chunks: str) -> None:
    """Its own loop and AdamW, against float64 on the rows in the order of remit train."""
    export(
        "--to",
        "torchtitan",
        "--shards",
        annotated["packed"],
        "--reference",
        "rl",
        "--seed",
        3,
        "--out",
        tmp_path / "rows",
    )
    run(
        "-c", STEPS_IN_TORCHTITAN, tmp_path / "run", "--loss.num_chunks", chunks, PYTHONPATH=str(tmp_path / "rows"), BASE=str(qwen3),
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    found, model = titan_losses(tmp_path / "run"), load(qwen3).double()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.0)
    assert len(found) == 3
    for step, loss in enumerate(found):
        expected = remit_step(model, rows_of_step(annotated["packed"], step, 8, seed=3), "packed", "rl_logprobs", 0.2)[
            "loss"
        ]
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5), step
        expected.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


WEIGHTS_OF_HALF_A_ROW = """
from benchmarks.other_trainers.titan_on_cpu import use_cpu
use_cpu()
import torch, torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.distributed.spmd_types import set_current_spmd_mesh
from trainer.integrations.torchtitan import ObjectiveLoss
from trainer.integrations.weights import row_objective, row_weights
mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
generator = torch.Generator().manual_seed(0)
losses, logprobs = torch.rand(3, 16, generator=generator) * 9, -torch.rand(3, 16, generator=generator) * 5
predicted = torch.rand(3, 16, generator=generator) < 0.6
own = slice(8 * mesh.get_local_rank(), 8 * mesh.get_local_rank() + 8)
with set_current_spmd_mesh(mesh):
    found = ObjectiveLoss.Config().build()._weights(losses[:, own], logprobs[:, own], predicted[:, own])
assert torch.equal(found, row_weights(losses, logprobs, predicted, row_objective())[:, own])
torch.distributed.destroy_process_group()
"""


def test_weights_under_context_parallelism(tmp_path: Path) -> None:
    """Two processes, each with half of every row, have the weights of whole rows."""
    (tmp_path / "halves.py").write_text(WEIGHTS_OF_HALF_A_ROW)
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tmp_path / "halves.py")
