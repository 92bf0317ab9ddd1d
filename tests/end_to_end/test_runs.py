"""The scripts in runs/: run in a shell whose commands only write down how they were called, each call then parsed for real."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cli import expand_config_file, parse

ROOT = Path(__file__).parents[2]
SWITCH = "switch-1b"  # of one arm at a time, see tests/pipelines/test_switch_run.py
SCRIPTS = sorted(script for script in (ROOT / "runs").glob("*.sh") if script.stem != SWITCH)
RECORDER = """#!{python}
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
if sys.argv[0].endswith("curl"):
    with open(sys.argv[sys.argv.index("--output") + 1], "w") as file:
        file.write("  - http://olmo-data.org/b/part-1.npy\\n  - http://olmo-data.org/a/part-0.npy\\n")
"""


def calls(script: Path, folder: Path, **environment: str) -> list[list[str]]:
    """All commands that a script runs, with their arguments as the shell gives them."""
    tools = folder / "tools"
    tools.mkdir()
    for name in ("remit", "torchrun", "python", "curl", "wget", "hf"):
        (tools / name).write_text(RECORDER.format(python=sys.executable))
        (tools / name).chmod(0o755)
    # a copy: the script goes to the folder above its own, and puts .venv there in front of the path
    (folder / "checkout" / "runs").mkdir(parents=True)
    copy = folder / "checkout" / "runs" / script.name
    copy.write_text(script.read_text())
    own = {"PATH": f"{tools}:{os.environ['PATH']}", "RECORD": str(folder / "record"), "WORK": str(folder / "out")}
    done = subprocess.run(["bash", copy], env={**os.environ, **own, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "record").read_text().splitlines()]


def remit_words(call: list[str]) -> list[str] | None:
    """The arguments of remit in a call, whatever launches it; None where it is of something else."""
    return call[call.index("remit") + 1 :] if "remit" in call[:8] else None


@pytest.mark.usefixtures("starts_processes")
@pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
def test_every_command_has_options_that_exist(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = calls(script, tmp_path, HUB="lab", RAY_ADDRESS="head:6379")
    (tmp_path / "checkout" / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "checkout" / "work").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    parsed = [parse(expand_config_file(words)) for call in found if (words := remit_words(call)) is not None]
    kinds = [type(config).__name__ for config in parsed]
    assert kinds.count("TrainConfig") == 2
    assert {"PackConfig", "ScoreConfig", "VerifyConfig", "CompareConfig", "ReportConfig"} <= set(kinds)
    ntp, rem = (config for config in parsed if type(config).__name__ == "TrainConfig")
    assert (ntp.objective, rem.objective) == ("ntp", "remit")
    # the same rows, steps and rates
    for name in (
        "shards",
        "model",
        "global_batch_size",
        "max_steps",
        "learning_rate",
        "schedule",
        "seed",
        "eval_shards",
    ):
        assert getattr(ntp, name) == getattr(rem, name), name
    if "olmo2" in script.name:
        assert (ntp.max_steps, ntp.global_batch_size, ntp.learning_rate) == (23842, 512, 0.000074487)
        assert kinds.count("PushConfig") == 3
        assert [call[0] for call in found].count("wget") == 1
        assert (tmp_path / "out" / "files.txt").read_text().splitlines() == [
            "http://olmo-data.org/a/part-0.npy", "http://olmo-data.org/b/part-1.npy",
        ]  # fmt: skip
        pushed = [call for call in found if call[:2] == ["remit", "push"]]
        again = (
            calls(script, tmp_path / "again", HUB="", RAY_ADDRESS="h:1") if (tmp_path / "again").mkdir() is None else []
        )
        assert [call for call in again if call[:2] == ["remit", "push"]] == []
        assert len(pushed) == 3


@pytest.mark.usefixtures("starts_processes")
def test_laptop_is_what_make_does(tmp_path: Path) -> None:
    ours = {" ".join(words) for call in calls(ROOT / "runs" / "laptop.sh", tmp_path) if (words := remit_words(call))}
    plan = subprocess.run(
        ["make", "-n", "score", "train", "VENV=.none"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = plan.stdout.replace("\\\n", " ").splitlines()
    of_make = [line.split("bin/remit ", 1)[1].split() for line in lines if "bin/remit " in line]
    assert len(of_make) >= 6
    assert [words for words in of_make if " ".join(words) not in ours] == []


@pytest.mark.parametrize("script", [s for s in SCRIPTS if "olmo2" in s.name], ids=lambda script: script.stem)
def test_hours_in_front_are_those_of_the_plan(script: Path, tmp_path: Path, remit: object) -> None:
    """The script's own line of remit plan, with --json beside it."""
    source = script.read_text()
    words = re.search(r"^remit (plan .*)$", source, re.MULTILINE)[1].split()
    assert remit(*words, "--json", tmp_path / "plan.json")[0] == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    for figure in figures(plan):
        assert figure in source, figure


def figures(plan: dict) -> list[str]:
    """The figures of remit plan as the scripts have them in front."""
    found = [
        f"#   {name}: {cost['wall_seconds'] / 3600:.1f} h, {cost['gpu_hours']:.0f} GPU-hours\n"
        for name, cost in plan["costs"].items()
        if "online" not in name
    ]
    found += [f"#   disk of both shard folders: {plan['disk_bytes']['both folders'] / 1e9:.0f} GB\n"]
    return [*found, f"#   memory: {plan['memory_bytes']['in all'] / 1e9:.0f} GB per GPU\n"]
