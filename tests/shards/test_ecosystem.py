"""A shard folder opened by the tools that people have, without this project."""

import os
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset
import pytest
from damage import rows, write_folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_folder(tmp_path / "shards", rows())
    return tmp_path / "shards"


MEAN = float(np.mean([v for row in rows()["rl_logprobs"] for v in row if v is not None]))


def test_pyarrow(shards: Path) -> None:
    table = pyarrow.dataset.dataset(shards, format="arrow").to_table()
    assert table.select(list(rows())).to_pydict() == rows()
    assert pa.compute.mean(pa.compute.list_flatten(table["rl_logprobs"])).as_py() == pytest.approx(MEAN)


def test_polars(shards: Path) -> None:
    frame = polars.read_ipc(f"{shards}/part-*.arrow")
    assert frame.to_dict(as_series=False) == rows()
    assert frame["rl_logprobs"].explode().mean() == pytest.approx(MEAN)


def test_duckdb(shards: Path) -> None:
    dataset = pyarrow.dataset.dataset(shards, format="arrow")  # DuckDB finds it by its name
    assert dataset is not None
    mean, tokens = duckdb.sql(
        "select avg(x), (select sum(len(input_ids)) from dataset) from (select unnest(rl_logprobs) as x from dataset)"
    ).fetchall()[0]
    assert (mean, tokens) == (pytest.approx(MEAN), 14)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.usefixtures("starts_processes")
def test_datasets(shards: Path, tmp_path: Path, streaming: bool) -> None:
    """In a process of its own, with a cache of its own."""
    script = f"""
import datasets
data = datasets.load_dataset("arrow", data_files="{shards}/*.arrow", split="train", streaming={streaming})
print([{{key: row[key] for key in row}} for row in data])
"""
    env = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_DATASETS_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    values = rows()
    assert eval(result.stdout) == [{key: values[key][index] for key in values} for index in range(4)]
