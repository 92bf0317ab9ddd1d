"""remit flywheel with stages that are quick stand-ins (looping.py): what repeats, kills, signals."""

import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from looping import FakeLoop
from processes import Command, alive, until

Remit = Callable[..., tuple[int, str, str]]
STAGES = [
    "pack", "round-0/train", "round-0/own", "round-0/evaluate-midtrained", "round-0/evaluate-posttrained",
    "round-1/score", "round-1/train", "round-1/own", "round-1/evaluate-midtrained", "round-1/evaluate-posttrained",
]  # fmt: skip
ONCE = {"pack": 1, "score": 1, "train": 2, "own": 2, "eval": 4}


def counts(fake_loop: FakeLoop) -> dict[str, int]:
    return {name: fake_loop.starts.count(name) for name in ONCE}


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def planned(output: str) -> dict[str, str]:
    """State of each stage in the table of --dry-run."""
    table = output.partition("\npack\n")[0]
    rows = re.findall(r"^ *\d+ +(\S+) +(.+?) *$", table, re.MULTILINE)
    return {name: re.sub(r"  +\d+$", "", state) for name, state in rows}


@pytest.mark.usefixtures("starts_processes")
def test_loop_runs_and_runs_only_what_changed(
    fake_loop: FakeLoop, remit: Remit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ("flywheel", "--config", fake_loop.file)
    code, output, _ = remit(*arguments, "--dry-run")
    assert code == 0
    assert not fake_loop.out.exists()
    plan = planned(output)
    assert list(plan) == STAGES
    assert plan["pack"] == "to run"
    assert plan["round-1/score"] == "depends on pack, round-0/own"

    code, output, error = remit(*arguments)
    assert (code, counts(fake_loop)) == (0, ONCE), error
    assert "[3/10] round-0/own: done" in error
    models = re.findall(r"(\S+-trained)(?: \((\w+)\))?: (\S+)", output)
    assert [(kind, objective) for kind, objective, _ in models] == [
        ("mid-trained", "ntp"), ("post-trained", ""), ("mid-trained", "remit"), ("post-trained", ""),
    ]  # fmt: skip
    assert all(Path(path, "config.json").exists() for _, _, path in models)
    assert output.count("round 1 posttrained") == 1
    assert "0.5000 ± 0.1000" in output
    own = fake_loop.out / fake_loop.overview()["round-1/own"]["result"] / "own.txt"
    assert own.read_text() == "1 7 prompts\n"
    whole = fake_loop.fingerprints()

    before = tree(fake_loop.out)
    code, output, _ = remit(*arguments, "--dry-run")
    assert set(planned(output).values()) == {state for state in planned(output).values() if state.startswith("done (")}
    assert "10 of 10 stages are done" in output
    assert tree(fake_loop.out) == before
    code, output, error = remit(*arguments)
    assert (code, counts(fake_loop)) == (0, ONCE)
    assert error.count("done before") == 10
    assert "other code" not in output
    record = fake_loop.out / "records" / f"{fake_loop.overview()['pack']['key']}.json"
    ours = record.read_text()
    record.write_text(json.dumps(json.loads(ours) | {"code": "0"}))
    for more in (["--dry-run"], []):
        assert "made by other code than this: 1 of the 10 stages that are done" in remit(*arguments, *more)[1]
    record.write_text(ours)

    # a changed word of post-training: everything before its first use stands
    (fake_loop.folder / "prompts.txt").write_text("other prompts\n")
    code, output, _ = remit(*arguments, "--dry-run")
    waiting = {name for name, state in planned(output).items() if not state.startswith("done")}
    assert planned(output)["round-0/own"] == "to run"
    code, _, error = remit(*arguments)
    assert code == 0
    ran = set(re.findall(r"\] (\S+): done \(", error))
    assert ran == waiting == set(STAGES) - {"pack", "round-0/train", "round-0/evaluate-midtrained"}
    assert fake_loop.fingerprints()["round-1/train"] != whole["round-1/train"]
    assert [counts(fake_loop)[name] for name in ("pack", "train", "own")] == [1, 3, 4]

    # what only says how fast or how safely
    fake_loop.values["train"]["checkpoint_every"] = 3
    fake_loop.write()
    assert remit(*arguments)[0] == 0
    assert counts(fake_loop)["train"] == 3
    fake_loop.values["train"]["learning_rate"] = "1e-4"
    fake_loop.write()
    assert remit(*arguments)[0] == 0
    assert [counts(fake_loop)[name] for name in ("pack", "score", "train")] == [1, 3, 5]


@pytest.mark.usefixtures("starts_processes")
def test_words_with_an_equals_sign_reach_the_command_whole(fake_loop: FakeLoop, remit: Remit) -> None:
    conf = fake_loop.folder / "conf.yaml"
    conf.write_text("one\n")
    (fake_loop.folder / "own.sh").write_text(
        'cp "$REMIT_MODEL"/* "$REMIT_OUTPUT"; cp "${1#--config=}" "$REMIT_OUTPUT"/own.txt'
    )
    fake_loop.values["posttrain"] = [
        {"command": ["bash", str(fake_loop.folder / "own.sh"), f"--config={conf}"], "name": "own"}
    ]
    fake_loop.values |= {"rounds": 0, "evaluate": None}
    for content in ("one\n", "two\n"):
        conf.write_text(content)
        assert remit("flywheel", "--config", fake_loop.write())[0] == 0
        assert (fake_loop.out / fake_loop.overview()["round-0/own"]["result"] / "own.txt").read_text() == content


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, reference_model: Path) -> dict[str, str]:
    """Fingerprints of a loop that was left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    fake_loop = FakeLoop(folder, reference_model)
    command = Command(folder, "flywheel", "--config", fake_loop.file, private=True, FAKE=str(folder))
    assert command.finish(600) == 0, command.errors
    return fake_loop.fingerprints()


@pytest.mark.parametrize("victim", ["driver", "stage", "both"])
@pytest.mark.parametrize("kind", ONCE)
@pytest.mark.usefixtures("starts_processes")
def test_kill_in_every_kind_of_stage(fake_loop: FakeLoop, kind: str, victim: str, undisturbed: dict[str, str]) -> None:
    """The same command repeats that stage alone, or goes on in it, and ends with the results of a run left alone.

    A stage whose driver alone is killed goes on; the next driver waits for it by name, and starts nothing beside it.
    """
    arguments = ("flywheel", "--config", fake_loop.file)
    gate = fake_loop.hold(kind)
    first = Command(fake_loop.folder, *arguments, private=True, FAKE=str(fake_loop.folder))
    first.until(lambda: kind in fake_loop.starts, 600)
    pid = fake_loop.last_pid()
    if victim != "stage":
        first.signal(signal.SIGKILL)
        assert first.finish(600) == -signal.SIGKILL
    if victim != "driver":
        kill(pid)
        until(lambda: not alive(pid))
    if victim == "stage":
        assert first.finish(600) == 1, first.errors
        assert re.search(r"error: stage \S+ was ended by signal 9", first.last_error)
    if victim == "driver":
        assert alive(pid)
    else:
        gate.unlink()
    again = Command(fake_loop.folder, *arguments, private=True, FAKE=str(fake_loop.folder))
    if victim == "driver":
        again.until(lambda: f"goes on as process {pid} " in again.errors, 600)
        assert fake_loop.starts.count(kind) == 1
        gate.unlink()
    assert again.finish(600) == 0, again.errors
    assert counts(fake_loop) == ONCE | {kind: ONCE[kind] + 1}
    found = fake_loop.fingerprints()
    # the stand-ins name their inputs by content, and the paths differ from folder to folder
    assert found == undisturbed
    assert not list((fake_loop.out / "stages").glob(".*"))
    assert not list((fake_loop.out / "running").iterdir())
    assert [stage["state"] for stage in fake_loop.overview().values()] == ["done"] * 10
    tried = [name for name, stage in fake_loop.overview().items() if stage["attempts"] == 2]
    assert len(tried) == 1
    assert kind in tried[0].replace("evaluate", "eval")


@pytest.mark.usefixtures("starts_processes")
def test_a_killed_rmt_goes_on_and_is_shown(fake_loop: FakeLoop, remit: Remit) -> None:
    """kill -9 of driver and stage within remit rmt; the same command goes on in it, and repeats nothing else."""
    (fake_loop.folder / "heldout.jsonl").write_text('{"text": "b"}\n')
    heldout = str(fake_loop.folder / "heldout.jsonl")
    fake_loop.values |= {"rmt": {"max_steps": 9}, "heldout": heldout, "evaluate": None}
    arguments = ("flywheel", "--config", fake_loop.write())
    gate = fake_loop.hold("rmt")
    first = Command(fake_loop.folder, *arguments, private=True, FAKE=str(fake_loop.folder))
    first.until(lambda: "rmt" in fake_loop.starts, 600)
    first.signal(signal.SIGKILL)
    assert first.finish(600) == -signal.SIGKILL
    kill(pid := fake_loop.last_pid())
    until(lambda: not alive(pid))
    assert planned(remit(*arguments, "--dry-run")[1])["round-1/rmt"].startswith("goes on")
    gate.unlink()
    code, output, error = remit(*arguments)
    assert code == 0, error
    assert fake_loop.starts.count("rmt") == 2
    assert len(fake_loop.starts) == 9  # one more than there are stages
    overview = fake_loop.overview()
    assert [stage["state"] for stage in overview.values()] == ["done"] * 8
    assert f"mid-trained (rmt): {fake_loop.out / overview['round-1/rmt']['result']}" in output


@pytest.mark.usefixtures("starts_processes")
def test_a_driver_that_waits_can_be_stopped(fake_loop: FakeLoop) -> None:
    """SIGTERM ends the wait, with exit code 3, and leaves what is waited for alone."""
    arguments = ("flywheel", "--config", fake_loop.file)
    gate = fake_loop.hold("train")
    first = Command(fake_loop.folder, *arguments, private=True, FAKE=str(fake_loop.folder))
    first.until(lambda: "train" in fake_loop.starts, 600)
    pid = fake_loop.last_pid()
    first.signal(signal.SIGKILL)
    first.finish(600)
    second = Command(fake_loop.folder, *arguments, private=True, FAKE=str(fake_loop.folder))
    second.until(lambda: f"process {pid} " in second.errors, 600)
    second.signal(signal.SIGTERM)
    assert second.finish(600) == 3, second.errors
    assert alive(pid)
    gate.unlink()
    until(lambda: not alive(pid))


@pytest.mark.usefixtures("starts_processes")
def test_an_edited_result_is_refused_by_name(fake_loop: FakeLoop, remit: Remit) -> None:
    """And made again where its folder is deleted; what was made of it stands, since the result is equal."""
    arguments = ("flywheel", "--config", fake_loop.file)
    assert remit(*arguments)[0] == 0
    entry = fake_loop.overview()["round-0/train"]
    (fake_loop.out / entry["result"] / "config.json").write_text("{}")
    code, _, error = remit(*arguments)
    assert code == 1
    assert re.search(
        r"stage round-0/train: its result was changed since it was made: files were edited, added or deleted, "
        r"\S+/model/config.json is the last that was written; put it back, or delete \S+/stages/round-0-train-\w+, and the same command makes it again",
        error,
    )
    code, plan, _ = remit(*arguments, "--dry-run")
    assert planned(plan)["round-0/train"].startswith("refused, its result was changed"), plan
    assert counts(fake_loop) == ONCE
    shutil.rmtree(fake_loop.out / entry["output"])
    assert remit(*arguments)[0] == 0
    assert counts(fake_loop) == ONCE | {"train": 3}
    assert fake_loop.overview()["round-0/train"]["fingerprint"] == entry["fingerprint"]


@pytest.mark.usefixtures("starts_processes")
def test_signal_is_handed_on_and_the_state_survives(fake_loop: FakeLoop) -> None:
    """SIGTERM: a stage of ours ends resumably, a command that does not listen ends; exit code 3 in both cases."""
    arguments = ("flywheel", "--config", fake_loop.file)
    for kind in ("train", "own"):
        gate = fake_loop.hold(kind)
        command = Command(fake_loop.folder, *arguments, private=True, FAKE=str(fake_loop.folder))
        command.until(lambda kind=kind: kind in fake_loop.starts, 600)
        time.sleep(0.2)
        command.signal(signal.SIGTERM)
        assert command.finish(600) == 3, command.errors
        assert "stopped by SIGTERM; the same command again goes on" in command.last_error
        gate.unlink()
    command = Command(fake_loop.folder, *arguments, private=True, FAKE=str(fake_loop.folder))
    assert command.finish(600) == 0, command.errors
    log = fake_loop.out / fake_loop.overview()["round-0/own"]["log"]
    assert log.read_text().split()[-1] == "2"  # lines in its state: that of the attempt before is there
    assert not list((fake_loop.out / "state").iterdir())


@pytest.mark.usefixtures("starts_processes")
def test_a_command_that_leaves_with_0_when_told_to_end_is_not_done(fake_loop: FakeLoop, remit: Remit) -> None:
    """The usual handler: save what there is and leave well. Its half-trained model must not be taken for the result."""
    (fake_loop.folder / "own.sh").write_text(
        'if test -e "$REMIT_STATE/half"; then cp "$REMIT_MODEL"/* "$REMIT_OUTPUT"; exit; fi\n'
        'touch "$REMIT_STATE/half"; trap \'cp "$REMIT_MODEL"/* "$REMIT_OUTPUT"; exit 0\' TERM\n'
        f"touch {fake_loop.folder}/up; while true; do sleep 0.1; done"
    )
    fake_loop.values["posttrain"] = [{"command": ["bash", str(fake_loop.folder / "own.sh")], "name": "own"}]
    fake_loop.values |= {"rounds": 0, "evaluate": None}
    fake_loop.write()
    command = Command(
        fake_loop.folder, "flywheel", "--config", fake_loop.file, private=True, FAKE=str(fake_loop.folder)
    )
    command.until((fake_loop.folder / "up").exists, 600)
    command.signal(signal.SIGTERM)
    assert command.finish(600) == 3, command.errors
    assert fake_loop.overview()["round-0/own"]["state"] != "done"
    code, plan, error = remit("flywheel", "--config", fake_loop.file, "--dry-run")
    assert code == 0, error
    assert re.search(r"round-0/own +goes on", plan), plan
    code, _, error = remit("flywheel", "--config", fake_loop.file)
    assert code == 0, error
    assert fake_loop.overview()["round-0/own"]["attempts"] == 2


@pytest.mark.usefixtures("starts_processes")
def test_two_drivers(fake_loop: FakeLoop, remit: Remit) -> None:
    gate = fake_loop.hold("train")
    first = Command(fake_loop.folder, "flywheel", "--config", fake_loop.file, private=True, FAKE=str(fake_loop.folder))
    first.until(lambda: "train" in fake_loop.starts, 600)
    code, _, error = remit("flywheel", "--config", fake_loop.file)
    assert code == 1
    assert f"another driver writes to this folder: host {socket.gethostname()}, pid {first.pid}, since" in error
    assert remit("flywheel", "--config", fake_loop.file, "--dry-run")[0] == 0
    gate.unlink()
    assert first.finish(600) == 0, first.errors
    assert counts(fake_loop) == ONCE


@pytest.mark.usefixtures("starts_processes")
def test_failing_stage_shows_its_log(fake_loop: FakeLoop, remit: Remit) -> None:
    (fake_loop.folder / "own.sh").write_text("echo first line; echo out of luck >&2; exit 9")
    code, _, error = remit("flywheel", "--config", fake_loop.file)
    assert code == 1
    lines = error.strip().splitlines()
    assert "remit flywheel: error: stage round-0/own failed with exit code 9: out of luck (log: " in lines[-1]
    assert "  | first line" in error
    assert "Traceback" not in error
    assert counts(fake_loop) == {"pack": 1, "train": 1, "own": 0, "score": 0, "eval": 0}


@pytest.mark.usefixtures("starts_processes")
def test_stage_that_stops_unasked_shows_its_log(fake_loop: FakeLoop, remit: Remit) -> None:
    (fake_loop.folder / "own.sh").write_text("echo first line; echo no machine is free >&2; exit 3")
    code, _, error = remit("flywheel", "--config", fake_loop.file)
    assert code == 3
    assert error.index("  | first line") < error.index("  | no machine is free") < error.index("ended with exit code 3")
    assert "round-0/own: ended with exit code 3, stopped and can go on, expected 0 since nothing here" in error
    assert str(next((fake_loop.out / "logs").glob("round-0-own-*.log"))) in error


@pytest.mark.usefixtures("starts_processes")
def test_broken_model_of_an_own_command_is_refused_by_name(fake_loop: FakeLoop, remit: Remit) -> None:
    (fake_loop.folder / "own.sh").write_text(
        'cp "$REMIT_MODEL"/* "$REMIT_OUTPUT"; echo "{}" > "$REMIT_OUTPUT/config.json"'
    )
    code, _, error = remit("flywheel", "--config", fake_loop.file)
    assert code == 1
    line = error.strip().splitlines()[-1]
    assert "stage round-0/own: its command ended well, but its result is refused" in line
    assert "transformers cannot make a model of it" in line
    assert "round-0/own" not in [name for name, entry in fake_loop.overview().items() if entry["state"] == "done"]
    (fake_loop.folder / "own.sh").write_text('cp "$REMIT_MODEL"/* "$REMIT_OUTPUT"')
    assert remit("flywheel", "--config", fake_loop.file)[0] == 0
    assert counts(fake_loop)["train"] == 2


@pytest.mark.usefixtures("starts_processes")
def test_words_reach_an_own_command_as_they_are_written(
    fake_loop: FakeLoop, remit: Remit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that happen to name a file: their content decides whether the command runs again."""
    monkeypatch.chdir(fake_loop.folder)
    for name in ("6", "text.txt"):
        Path(name).write_text(name)
    script = 'echo "$@" >> said; ' + (fake_loop.folder / "own.sh").read_text()
    Path("own.sh").write_text(script)
    fake_loop.values["posttrain"] = [
        {"command": ["bash", "own.sh", "prompts.txt", "6", "--text=text.txt"], "name": "own"}
    ]
    fake_loop.values.pop("evaluate")
    for content in ("a", "b", "b"):
        Path("text.txt").write_text(content)
        assert remit("flywheel", "--config", fake_loop.write())[0] == 0
    # once for each content in round 0 and in round 1
    assert Path("said").read_text().splitlines() == ["prompts.txt 6 --text=text.txt"] * 4
