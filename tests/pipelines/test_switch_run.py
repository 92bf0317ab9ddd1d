"""runs/switch-1b.sh: each command that it would run is one that the parsers take, with the published settings."""

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cli import expand_config_file, parse
from scorer.config import parse_below
from trainer.config import learning_rate_at

RUNS = Path(__file__).resolve().parents[2] / "runs"
SHARES = {"dclm": 0.472, "math": 0.208, "flan": 0.166, "wiki": 0.0711, "pes2o": 0.0585, "stackexchange": 0.0245}


def commands(tmp_path: Path, *words: str, **environment: str) -> list[list[str]]:
    """The commands that the script prints with DRY=1, as lists of arguments."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run(
        ["bash", RUNS / "switch-1b.sh", *words], capture_output=True, text=True, cwd=tmp_path,
        env=keep | {"DRY": "1"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def settings(command: list[str]) -> Any:
    words = ["1.5" if word == "NATS" else word for word in command[command.index("remit") + 1 :]]
    return parse(expand_config_file(words))


@pytest.mark.usefixtures("starts_processes")
@pytest.mark.parametrize("store", ["sure", "full"])
def test_every_command_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    monkeypatch.chdir(tmp_path)
    by_name: dict[str, list[Any]] = {}
    found = commands(tmp_path, "all", STORE=store)
    for command in found:
        by_name.setdefault(command[command.index("remit") + 1], []).append(settings(command))
    arms = ["ntp", "remit", "switch", *(["kd", "rkl"] if store == "full" else [])]
    assert [config.objective for config in by_name["train"]] == arms
    for config in by_name["train"]:
        assert {source.name: source.weight for source in config.mixture.sources} == SHARES
        assert config.max_steps * config.global_batch_size * 4096 == pytest.approx(60.4e9, rel=1e-3)
        assert (config.context, config.reference, config.seed) == ("document", "teacher", 42)
        assert config.model == "allenai/OLMo-2-0425-1B@stage1-step1907359-tokens4001B"
        if config.objective in ("switch", "kd", "rkl"):
            assert config.temperature == 2
        if config.objective in ("kd", "rkl"):
            assert config.kd_weight == 0.5
    switch = by_name["train"][2]
    assert (switch.gate_quantile, switch.scope) == (0.2, "global")
    # one option, and what only its objective reads, tells the arms apart
    trains = [command for command in found if "train" in command]
    ntp = trains[0]
    for arm, command in zip(arms, trains, strict=True):
        own = command.index("--objective")
        assert command[:own] == ntp[:own]
        assert set(command[own + 2 : -2 : 2]) <= {"--temperature", "--gate-quantile", "--scope", "--kd-weight"}, arm
    scored = [config for config in by_name["score"] if config.shards != "packed-pilot"]
    assert [Path(config.shards).name for config in scored] == list(SHARES)
    assert {config.out for config in scored} == {f"scored-{store}/{source}" for source in SHARES}
    assert all((config.top_k_below_entropy is not None) == (store == "sure") for config in scored)
    for config in by_name["score"]:
        assert (config.name, config.context, config.top_k, config.temperatures) == ("teacher", "document", 32, (1, 2))
    assert all((config.bos, config.seq_len) == ("always", 4096) for config in by_name["pack"])
    (plan,) = by_name["plan"]
    assert (plan.num_tokens, plan.num_gpus, plan.top_k_share) == (60_400_000_000, 32, 0.25 if store == "sure" else None)
    if store == "sure":
        (pilot,) = [config for config in by_name["score"] if config.shards == "packed-pilot"]
        assert vars(parse_below(pilot.top_k_below_entropy)) == {"threshold": None, "quantile": 0.2, "margin": 0.05}
    assert [config.model for config in by_name["eval"]] == [f"trained/{arm}/model" for arm in arms]


def test_published_rates() -> None:
    config = settings(["remit", "train", "--config", str(RUNS / "switch-1b.yaml"), "--shards", "s", "--model", "m", "--out", "o"])  # fmt: skip
    for name, value in yaml.safe_load((RUNS / "switch-1b.yaml").read_text()).items():
        assert getattr(config, name) == value, name
    rates = [learning_rate_at(step, config, config.max_steps) for step in (1, 14_400, 28_800)]
    assert rates == pytest.approx([7.4487e-5, 7.4487e-5 / 2, 0], rel=1e-3, abs=1e-12)
    assert config.decay_embeddings is False


@pytest.mark.usefixtures("starts_processes")
def test_options_of_the_shell(tmp_path: Path) -> None:
    (score, *_) = commands(tmp_path, "score", TEACHER_ARGS="--no-canary --engine-args quantization=fp8", STORE="full")
    config = settings(score)
    assert (config.canary, config.engine_args) == (False, ["quantization=fp8"])
    (train,) = commands(tmp_path, "train", "switch", LAUNCH="torchrun --nproc-per-node=4 --no-python", SCOPE="micro")
    assert train[:4] == ["torchrun", "--nproc-per-node=4", "--no-python", "remit"]
    assert (settings(train).scope, settings(train).micro_batch_size) == ("micro", 8)  # as published


@pytest.mark.usefixtures("starts_processes")
def test_the_pilot_has_the_shares_of_the_mix(tmp_path: Path) -> None:
    """Whole lines, from every file of a source, in proportion."""
    import gzip

    for source in SHARES:
        (tmp_path / "corpus" / source / "deep").mkdir(parents=True)
        lines = [json.dumps({"text": f"{source} {number} " + "word é " * 20}, ensure_ascii=False) + "\n" for number in range(40_000)]  # fmt: skip
        with gzip.open(tmp_path / "corpus" / source / "a.json.gz", "wt", encoding="utf-8", compresslevel=1) as stream:
            stream.writelines(lines[:20_000])
        (tmp_path / "corpus" / source / "deep" / "b.jsonl").write_text("".join(lines[20_000:]), encoding="utf-8")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "remit").write_text("#!/bin/sh\nexit 0\n")
    (programs / "remit").chmod(0o755)
    commands(tmp_path, "threshold", DRY="", PILOT_BYTES="8000000", PATH=f"{programs}:{os.environ['PATH']}")
    sizes = {}
    for source in SHARES:
        lines = (tmp_path / "pilot" / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()
        numbers = [int(json.loads(line)["text"].split()[1]) for line in lines]
        assert min(numbers) == 0
        assert 20_000 in numbers  # of the second file too
        sizes[source] = sum(len(line.encode()) + 1 for line in lines) - 40_000
    for source, share in SHARES.items():
        assert sizes[source] / 8e6 == pytest.approx(share, abs=0.001)
