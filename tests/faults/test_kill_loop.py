"""Thirty kills at random moments, of drivers and of real engines: every document is there once, every number right."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import score_to, source_texts, write_corpus
from oracles import read_rows

from scorer.config import PackConfig
from scorer.pack import pack
from shards import ShardFolder
from shards.verify import verify_folder

pytestmark = pytest.mark.usefixtures("ray_session", "starts_processes")

KILLS = 30
TAG = "REMIT_TEST_KILL_LOOP"


def engines(tag: str) -> list[int]:
    """Processes of scoring actors that a driver with this tag has started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"ray::ScoringActor" in (process / "cmdline").read_bytes() and (
                f"{TAG}={tag}".encode() in (process / "environ").read_bytes()
            ):
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_thirty_random_kills_with_the_real_engine(
    tmp_path: Path, tokenizer_folder: Path, reference_model: Path
) -> None:
    rng = random.Random(int(os.environ.get("REMIT_TEST_SEED", "0")))
    texts = [f"{index} {text}" for index, text in enumerate(source_texts(1500, seed=60))]
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts)
    packed = pack(
        PackConfig([str(corpus)], str(tokenizer_folder), str(tmp_path / "packed"), 64, tokens_per_shard=64 * 60)
    )
    undisturbed = read_rows(score_to(tmp_path / "undisturbed", packed.path, reference_model).path)
    kills = folders = 0
    counts: Counter[str] = Counter()
    while kills < KILLS:
        out = tmp_path / f"out-{folders}"
        folders += 1
        finished = False
        while not finished:
            tag = f"{os.getpid()}-{rng.random()}"
            command = [sys.executable, "-m", "pipelines.cli", "score", "--shards", packed.path, "--out", out]
            driver = subprocess.Popen(
                [*command, "--model", reference_model, "--num-engines", "2", "--dtype", "float32"],
                env={**os.environ, TAG: tag},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            while driver.poll() is None and kills < KILLS:
                time.sleep(rng.uniform(0, 25) if rng.random() < 0.5 else rng.uniform(15, 30))
                targets = engines(tag)
                if driver.poll() is not None:
                    break
                kills += 1
                if targets and rng.random() < 0.6:
                    os.kill(rng.choice(targets), signal.SIGKILL)
                    counts["engine"] += 1
                else:
                    driver.kill()
                    counts["driver"] += 1
                    break
            output = driver.communicate(timeout=400)[0]
            finished = driver.returncode == 0
            assert driver.returncode in (0, -signal.SIGKILL), output  # killed, or done in spite of dead engines
        report = verify_folder(ShardFolder(out))
        assert report.problems == []
        assert report.documents == len(texts)
        rows = read_rows(out)
        documents = Counter((row["source"], document) for row in rows for document in set(row["doc_ids"]))
        assert {document for _, document in documents} == set(range(len(texts)))
        for row, want in zip(rows, undisturbed, strict=True):
            assert {key: row[key] for key in row if key != "rl_logprobs"} == {
                key: want[key] for key in want if key != "rl_logprobs"
            }
            got, expected = (np.array(r["rl_logprobs"][1:], dtype=np.float64) for r in (row, want))
            assert np.abs(got - expected).max(initial=0) <= 1 / 64  # one step of the rounding at most
        assert not [path for path in out.rglob("*") if path.name.endswith(".tmp") or path.name == "_lease"]
    print(f"{dict(counts)} kills over {folders} folders")
    assert counts["engine"] > 3
    assert counts["driver"] > 3
