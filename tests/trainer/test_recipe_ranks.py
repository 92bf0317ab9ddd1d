"""The recipe's options over two processes: what one decides all do, and sharded weights give the same average."""

import json
from pathlib import Path

import pytest
from annotated import run
from processes import Ranks
from safetensors.torch import load_file
from test_recipe import bad, strip  # noqa: F401  # a fixture

pytestmark = pytest.mark.usefixtures("starts_processes")

OPTIONS: dict = {
    "max_steps": 8, "global_batch_size": 2, "micro_batch_size": 1, "checkpoint_every": 3, "z_loss": 1e-4, "schedule": "linear",
    "min_learning_rate": 0.0, "average": "last:4", "on_nonfinite": "skip:2", "learning_rate": 1e-3, "export_dtype": "float32",
    "skip_spikes": 6.0,
}  # fmt: skip


def launch(out: Path, shards: Path, model: Path, sharding: str, **options: object) -> Ranks:
    words = [word for name, value in (OPTIONS | options).items() for word in (f"--{name.replace('_', '-')}", value)]
    arguments = [
        "train",
        "--shards",
        shards,
        "--model",
        model,
        "--out",
        out,
        "--dtype",
        "float32",
        "--sharding",
        sharding,
    ]
    return Ranks(out.parent, [*arguments, *words], 2, 1)


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("sharding", ["replicate", "full"])
def test_two_ranks_leave_out_the_same_steps(
    tmp_path: Path,
    annotated: dict[str, Path],
    bad: tuple[Path, int],  # noqa: F811
    sharding: str,
) -> None:
    """A row of one rank gives NaN; the other rank's is sound. Then the run is cut and goes on, bit for bit."""
    base, step = bad
    shards = annotated["packed"]
    one = run(tmp_path / "one", shards, base, **OPTIONS)
    assert one[-1]["skipped_nonfinite"] >= 1
    both = launch(tmp_path / "two", shards, base, sharding)
    output, _ = both.communicate(timeout=300)
    assert both.returncode == 0, output
    two = lines_of(tmp_path / "two")
    assert [line["step"] for line in two] == [line["step"] for line in one]
    assert step not in [line["step"] for line in two]
    for got, want in zip(two, one):
        for key in ("loss", "grad_norm", "z_loss", "skipped_nonfinite", "skipped_spikes", "tokens", "lr"):
            assert got[key] == pytest.approx(want[key], rel=1e-4, abs=1e-9), (got["step"], key)
    for name in ("model", "model-average"):
        parts = [load_file(tmp_path / out / name / "model.safetensors") for out in ("two", "one")]
        for weight, value in parts[0].items():
            assert (value - parts[1][weight]).abs().nan_to_num(0).max() < 1e-4, (name, weight)
    whole = {name: (tmp_path / "two" / name / "model.safetensors").read_bytes() for name in ("model", "model-average")}
    for folder in (
        "model",
        "model-average",
        "checkpoints/step-000008",
    ):  # as if it had been killed on its way from step 6
        (tmp_path / "two" / folder).rename(tmp_path / folder.replace("/", "-"))
    again = launch(tmp_path / "two", shards, base, sharding)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert strip(lines_of(tmp_path / "two")) == strip(two)
    for name, data in whole.items():
        assert (tmp_path / "two" / name / "model.safetensors").read_bytes() == data, name
