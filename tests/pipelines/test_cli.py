"""The command line as a process: help, exit codes, configuration files, signals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import make_model, write_corpus
from processes import Command

from pipelines.cli import COMMANDS, expand_config_file, find, parse

Remit = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(remit: Remit, command: str) -> None:
    code, output, _ = remit(command, "--help")
    assert code == 0
    settings = find(COMMANDS[command][0])
    for name in settings.__dataclass_fields__:
        is_positional = name == "folder" or (command, name) in (
            ("completion", "shell"), ("compare", "runs"), ("average", "models"), ("push", "repo"),
        )  # fmt: skip
        assert f"--{name.replace('_', '-')}" in output or is_positional
    assert ("--config" in output) is (command != "completion")


@pytest.mark.usefixtures("starts_processes")
def test_help_is_quick_and_loads_no_model_library() -> None:
    script = (
        "import sys, pipelines.cli\n"
        "try: pipelines.cli.main(['train', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"


@pytest.mark.usefixtures("starts_processes")
def test_a_reader_of_help_that_has_left_is_no_accident() -> None:
    """As in `remit train --help | head -1`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "pipelines.cli", "train", "--help"]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.parametrize("arguments", [[], ["fly"], ["pack"], ["pack", "--seq-len", "x"], ["verify", "--nope"]])
def test_bad_usage_is_two(remit: Remit, arguments: list[str]) -> None:
    code, _, error = remit(*arguments)
    assert code == 2
    assert error.strip()


def test_config_file_and_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "shards: s\nmodel: m\nout: o\nmax_steps: 7\nlearning-rate: 0.001\nseed: 3\ndebug: true\neval_shards: null\n"
    )
    config = parse(expand_config_file(["train", "--seed", "5", "--config", str(file)]))
    assert (config.shards, config.max_steps, config.learning_rate, config.seed) == (("s",), 7, 0.001, 5)
    assert config.debug
    file.write_text("corpus: [a.jsonl, b.jsonl]\ntokenizer: t\nout: o\n")
    assert parse(expand_config_file(["pack", f"--config={file}"])).corpus == ["a.jsonl", "b.jsonl"]
    assert parse(expand_config_file(["pack", f"--config={file}", "--corpus", "c.jsonl"])).corpus == ["c.jsonl"]


@pytest.mark.parametrize(
    ("text", "message"), [("- a", "expected a mapping"), ("a: [", "cannot be read"), (None, "cannot be read")]
)
def test_bad_config_file(tmp_path: Path, remit: Remit, text: str | None, message: str) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    code, _, error = remit("pack", "--config", file)
    assert (code, message in error) == (2, True)
    file.write_text("corpus: x\ntokenizer: t\nout: o\nseqlen: 5\n")
    code, _, error = remit("pack", "--config", file)
    assert (code, "--seqlen" in error) == (2, True)


def test_debug_shows_the_traceback(tmp_path: Path, remit: Remit) -> None:
    for flags, shown in (((), False), (("--debug",), True)):
        code, _, error = remit("verify", "--shards", tmp_path / "none", *flags)
        assert code == 1
        assert ("Traceback" in error) is shown
        assert error.strip().splitlines()[-1].startswith("remit verify: error: ")


def test_inspect_and_verify(tmp_path: Path, packed: Path, remit: Remit) -> None:
    code, output, _ = remit("inspect", "--shards", packed)
    assert code == 0
    manifest = json.loads((packed / "_manifest.json").read_text())
    assert f"{sum(part['tokens'] for part in manifest['parts']):,} tokens" in output
    assert "complete" in output
    code, output, _ = remit("inspect", "--shards", packed, "--row", 51, "--tokens", 5)
    assert code == 0
    assert "row 51 (part-00001.arrow): 64 tokens" in output
    assert "59 more tokens" in output
    code, _, error = remit("inspect", "--shards", packed, "--row", 10**6)
    assert (code, "has rows 0.." in error) == (1, True)
    code, output, _ = remit("verify", "--shards", packed)
    assert (code, output.splitlines()[-1]) == (0, "OK")


def test_verify_names_the_bad_part_and_fails(tmp_path: Path, packed: Path, remit: Remit) -> None:
    import shutil

    shutil.copytree(packed, tmp_path / "bad")
    part = tmp_path / "bad" / "part-00001.arrow"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 4
    part.write_bytes(data)
    code, output, error = remit("verify", "--shards", tmp_path / "bad")
    assert (code, output.splitlines()[-1]) == (1, "FAILED")
    assert "part-00001.arrow" in error
    assert "differs from its commit record" in error


@pytest.mark.usefixtures("starts_processes")
def test_signal_stops_training_resumably(tmp_path: Path, packed: Path, tokenizer_folder: Path) -> None:
    make_model(tmp_path / "model")
    command = [
        sys.executable, "-m", "pipelines.cli", "train", "--shards", packed, "--model", tmp_path / "model", "--out",
        tmp_path / "out", "--objective", "ntp", "--max-steps", "100000", "--global-batch-size", "4", "--checkpoint-every", "5",
    ]  # fmt: skip
    process = subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True, env=os.environ)
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 12):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 3, error
    assert "stopped by SIGTERM; the same command again goes on" in error
    steps = len(metrics.read_text().splitlines())
    assert (tmp_path / "out" / "checkpoints" / f"step-{steps:06d}").is_dir()


@pytest.mark.usefixtures("ray_session")
def test_corpus_named_in_a_config_file_runs(tmp_path: Path, tokenizer_folder: Path, remit: Remit) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", ["some text", "more"], field="body")
    file = tmp_path / "pack.yaml"
    file.write_text(
        f"corpus: {corpus}\ntokenizer: {tokenizer_folder}\nout: {tmp_path / 'out'}\ntext_field: body\nseq_len: 8\n"
    )
    code, output, _ = remit("pack", "--config", file)
    assert code == 0
    assert "from 2 documents" in output


@pytest.mark.usefixtures("ray_session", "starts_processes")
def test_signal_stops_scoring_resumably(tmp_path: Path, packed: Path, reference_model: Path) -> None:
    """While vLLM starts."""
    out = tmp_path / "out"
    run = Command(tmp_path, "score", "--shards", packed, "--model", reference_model, "--out", out, "--num-engines", 1)
    run.until((out / "_manifest.json").exists)
    run.signal(signal.SIGTERM)
    assert run.finish() == 3, run.errors
    assert run.last_error == "remit score: stopped by SIGTERM; the same command again goes on"
    assert not list(out.glob(".*.tmp"))
