"""Stages by content: keys, identities, what repeats and what does not, failures, kills. Commands are shell lines."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from annotated import annotate
from processes import alive, until

from pipelines.flywheel import run as run_module
from pipelines.flywheel.folder import code_fingerprint, made_by_other_code, survey
from pipelines.flywheel.run import Outcome, StageFailed, run_stages
from pipelines.flywheel.stages import At, Given, Stage, change_of, files_of, given, identity, stage_key
from scorer import known
from scorer.formats import text_of_path
from scorer.sources import Source

pytestmark = pytest.mark.usefixtures("starts_processes")

ROOT = Path(__file__).parents[2]


def shell(name: str, line: str, inputs: Mapping[str, Stage | Path] | None = None, **settings: object) -> Stage:
    """A stage that runs a line of bash: $0 is its output, $1, $2 the results of its inputs."""
    found = {key: given(value) if isinstance(value, Path) else value for key, value in (inputs or {}).items()}
    return Stage(name, ("bash", "-c", line, At("out"), *map(At, found)), found, **settings)


def run(folder: Path, *stages: Stage) -> tuple[Outcome, list[str]]:
    """The outcome, and the names of the stages that ran."""
    outcome = run_stages(stages, folder)
    return outcome, outcome.ran


GIVEN = Given("p", lambda: "ff")
BASE = Stage(
    "a",
    ("tool", "--x", "1", At("out", "o"), At("in", "sub")),
    {"in": GIVEN},
    result="model",
    seed=3,
    settings={"k": 1.5},
)


def test_key_is_the_hash_of_what_it_says() -> None:
    text = (
        '{"command":["tool","--x","1",["out","o"],["in","sub"]],"inputs":{"in":"ff"},'
        '"remit":"0.1.0","result":"model","seed":3,"settings":{"k":1.5}}'
    )
    assert stage_key(BASE, {"in": "ff"}) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "b"},
        {"launcher": ("torchrun", "-m")},
        {"resumes": True},
        {"inputs": {"in": Given("elsewhere", GIVEN.identity)}},
        {"more": ("--fast",)},
        {"environment": {"WHERE": "here"}},
    ],
)
def test_what_does_not_enter_the_key(changes: dict) -> None:
    assert stage_key(replace(BASE, **changes), {"in": "ff"}) == stage_key(BASE, {"in": "ff"})


@pytest.mark.parametrize(
    "changes",
    [
        {"command": ("tool", "--x", "2", At("out", "o"), At("in", "sub"))},
        {"command": ("tool", "--x", "1", At("out", "p"), At("in", "sub"))},
        {"command": ("tool", "--x", "1", At("state", "o"), At("in", "sub"))},
        {"command": ("tool", "--x", "1", At("out", "o"), At("in"))},
        {"result": ""},
        {"seed": None},
        {"settings": {"k": 1.25}},
    ],
)
def test_what_enters_the_key(changes: dict) -> None:
    assert stage_key(replace(BASE, **changes), {"in": "ff"}) != stage_key(BASE, {"in": "ff"})
    assert stage_key(BASE, {"in": "fe"}) != stage_key(BASE, {"in": "ff"})
    assert stage_key(BASE, {"in": "ff", "more": "ff"}) != stage_key(BASE, {"in": "ff"})


def test_bad_lists(tmp_path: Path) -> None:
    first = shell("a/b", "echo > $0/f")
    with pytest.raises(ValueError, match="does not stand before it"):
        run_stages([shell("c", "true", {"in": first})], tmp_path)
    with pytest.raises(ValueError, match=r"are \['a/b', 'a-b'\], expected different names"):
        run_stages([first, shell("a-b", "true")], tmp_path)
    with pytest.raises(ValueError, match=r"nowhere: does not exist"):
        shell("c", "true", {"in": tmp_path / "nowhere"})


def test_key_where_remit_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    installed = stage_key(BASE, {"in": "ff"})
    monkeypatch.setattr("pipelines.flywheel.stages.version", missing)
    assert stage_key(BASE, {"in": "ff"}) != installed


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "a").write_text("1")
    (folder / "link").symlink_to(folder / "nowhere")
    with pytest.raises(ValueError, match=r"f/link: is a link that leads nowhere, expected a file"):
        identity(folder)
    (folder / "link").unlink()
    os.mkfifo(folder / "pipe")
    for path in (folder, folder / "pipe"):
        with pytest.raises(ValueError, match=r"f/pipe: is a pipe or a device, expected"):
            identity(path)
    with pytest.raises(ValueError, match=r"none: does not exist, expected files"):
        identity(tmp_path / "none")


def test_a_folder_that_cannot_be_listed_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "closed").mkdir()

    def refuse(really: Callable, path: str | Path) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return really(path)

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, partial(refuse, getattr(os, name)))
    with pytest.raises(PermissionError, match="closed"):
        files_of(tmp_path)


def test_folders_that_link_to_each_other(tmp_path: Path) -> None:
    for one, other in ("ab", "ba"):
        (tmp_path / one).mkdir()
        (tmp_path / one / "file").write_text(one)
        (tmp_path / one / "link").symlink_to(tmp_path / other)
    assert list(files_of(tmp_path)) == ["a/file", "a/link/file", "b/file", "b/link/file"]


def test_identity_leaves_the_memory_of_pack_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "RACY_SECONDS", -1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("1")
    (tmp_path / "corpus.jsonl").write_text('{"text": "a"}')
    file = str(tmp_path / "corpus.jsonl")
    sources = [Source(text_of_path(file), file)]
    known.remember(str(tmp_path / "out"), sources, known.stamps(sources), ["abc"])
    identity(tmp_path / "out")
    assert known.remembered(str(tmp_path / "out"), sources) == ["abc"]


def test_identity_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"two")
    (tmp_path / "sub" / "a.txt").write_bytes(b"one")
    for name in ("_hidden", ".hidden", "sub/_h"):
        (tmp_path / name).write_bytes(b"no")
    lines = [["b.txt", hashlib.sha256(b"two").hexdigest()], ["sub/a.txt", hashlib.sha256(b"one").hexdigest()]]
    expected = hashlib.sha256("".join(f"{json.dumps(line)}\n" for line in lines).encode()).hexdigest()
    assert identity(tmp_path) == expected
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(tmp_path)
    (tmp_path / "sub" / "up").symlink_to(tmp_path)  # and does not end there
    assert identity(link) == expected
    assert list(files_of(tmp_path / "b.txt")) == [""]
    (tmp_path / "empty" / ".x").mkdir(parents=True)
    with pytest.raises(ValueError, match="is empty"):
        identity(tmp_path / "empty")


def test_which_files_of_a_folder_count(tmp_path: Path) -> None:
    for name in ("a.py", "_b.json", ".c", "_sub/d.py", ".git/e", ".cache/f", "__pycache__/a.pyc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert set(files_of(tmp_path)) == {"a.py"}
    assert set(files_of(tmp_path, all_files=True)) == {".c", "_b.json", "_sub/d.py", "a.py"}


def test_identity_of_shards(tmp_path: Path, small: Path) -> None:
    """Parts by their commit records, manifest and tokenizer count; what a run writes about itself does not; no part is read."""
    zero = lambda row: [0.0] * len(row["input_ids"])  # noqa: E731
    out = annotate(small, tmp_path / "shards", zero, "packed")
    before = identity(out)
    (out / "_score.jsonl").write_text("{}\n")
    assert identity(out) == before
    assert change_of(out, before) == ""
    other = annotate(small, tmp_path / "other", lambda row: [-1.0] * len(row["input_ids"]), "packed")
    assert identity(other) != before
    part = out / "part-00001.arrow"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not what its commit record says"):
        identity(out)
    assert "not what its commit record says" in change_of(out, before)
    (out / "_commits" / "part-00001.json").unlink()
    with pytest.raises(ValueError, match="are not committed"):
        identity(out)


def test_changes_are_found(tmp_path: Path) -> None:
    file = tmp_path / "f" / "x"
    file.parent.mkdir()
    file.write_text("abc")
    was, times = identity(tmp_path / "f"), file.stat().st_mtime_ns
    assert change_of(tmp_path / "f", was) == ""
    os.utime(file, ns=(1, 1))  # copied without its time: read, and found equal
    assert change_of(tmp_path / "f", was) == ""
    for content, other in (("abd", False), ("abc", True)):  # of one size, and with the time that it had
        file.write_text(content)
        os.utime(file, ns=(times, times))
        (tmp_path / "f" / "y").touch() if other else None
        last = tmp_path / "f" / ("y" if other else "x")
        assert (
            change_of(tmp_path / "f", was)
            == f"files were edited, added or deleted, {last} is the last that was written"
        )


def test_rerun_does_nothing_and_equal_results_repeat_nothing(tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text("b\na\n")

    def stages(line: str) -> tuple[Stage, Stage]:
        first = shell("first", line, {"data": data})
        return first, shell("second", "cat $1/x > $0/y", {"first": first})

    folder = tmp_path / "f"
    outcome, ran = run(folder, *stages("sort $1 > $0/x"))
    assert (outcome.finished, ran) == (True, ["first", "second"])
    assert (outcome.result("second") / "y").read_text() == "a\nb\n"
    assert run(folder, *stages("sort $1 > $0/x"))[1] == []
    assert run(folder, *stages("cat $1 | sort > $0/x"))[1] == ["first"]  # early cut-off
    data.write_text("a\nb\n")
    assert run(folder, *stages("sort $1 > $0/x"))[1] == ["first"]
    data.write_text("c\n")
    assert run(folder, *stages("sort $1 > $0/x"))[1] == ["first", "second"]
    data.write_text("b\na\n")
    assert run(folder, *stages("sort $1 > $0/x"))[1] == []  # all of it is still there
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert run(moved, *stages("sort $1 > $0/x"))[1] == []


def test_changed_results_are_refused_and_deleted_ones_made_again(tmp_path: Path) -> None:
    first = shell("first", "echo 1 > $0/x")
    second = shell("second", "cat $1/x > $0/y", {"first": first})
    outcome, _ = run(tmp_path, first, second)
    result = outcome.result("first")
    (result / "x").write_text("2\n")
    assert survey([first, second], tmp_path)[0].change
    with pytest.raises(
        ValueError,
        match=r"stage first: its result was changed since it was made: .*/x is the last that was written; put",
    ):
        run(tmp_path, first, second)
    (result / "x").write_text("1\n")
    assert run(tmp_path, first, second)[1] == []  # put back
    shutil.rmtree(result)
    assert run(tmp_path, first, second)[1] == ["first"]  # equal again, so the second one stands
    record = tmp_path / "records" / f"{outcome.records['first']['key']}.json"
    record.write_text(record.read_text()[:50])  # damaged: as if it were not there
    assert run(tmp_path, first, second)[0].finished
    assert json.loads(record.read_text())["fingerprint"] == outcome.records["first"]["fingerprint"]


def test_one_work_under_two_names_is_done_once(tmp_path: Path) -> None:
    stages = [shell(name, f"echo x >> {tmp_path}/count; echo 1 > $0/x") for name in ("a", "b")]
    outcome, ran = run(tmp_path / "f", *stages)
    assert ran == ["a"]
    assert (tmp_path / "count").read_text() == "x\n"
    assert outcome.result("a") == outcome.result("b")


def test_environment_state_and_record(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_text("d")
    environment = {"OUT": At("out"), "DATA": At("data"), "KEEP": At("state"), "PLAIN": "p"}
    stage = Stage(
        "round-1/x", ("bash", "-c", 'test -d "$KEEP" && echo "$(cat $DATA) $PLAIN" > $OUT/model'), {"data": given(data)},
        result="model", seed=5, settings={"a": 1}, environment=environment,
    )  # fmt: skip
    outcome, _ = run(tmp_path / "f", stage)
    assert outcome.result("round-1/x").read_text() == "d p\n"
    (entry,) = json.loads((tmp_path / "f" / "flywheel.json").read_text())["stages"]
    assert (entry["name"], entry["state"], entry["seed"], entry["settings"]) == ("round-1/x", "done", 5, {"a": 1})
    assert entry["result"] == f"stages/round-1-x-{entry['key'][:12]}/model"
    assert entry["inputs"]["data"] == {"path": str(data), "fingerprint": identity(data), "stage": None}
    assert entry["fingerprint"] == identity(outcome.result("round-1/x"))
    assert entry["seconds"] >= 0
    assert entry["versions"]["python"].startswith("3.")
    assert entry["code"] == code_fingerprint()
    assert not list((tmp_path / "f" / "state").iterdir())
    assert (tmp_path / "f" / entry["log"]).exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("echo it went wrong; exit 4", "stage bad failed with exit code 4: it went wrong"),
        ("exit 1", "stage bad failed with exit code 1: it printed nothing"),
        ("kill -9 $$", "stage bad was ended by signal 9"),
        ("exit 255", "stage bad failed with exit code 255"),
        ("true", r"its result is refused: .*bad-.*: is empty"),
    ],
)
def test_failures_are_named(tmp_path: Path, line: str, message: str) -> None:
    good = shell("good", "echo 1 > $0/x")
    bad = shell("bad", line, {"good": good})
    for _ in range(2):
        with pytest.raises(StageFailed, match=message):
            run_stages([good, bad], tmp_path)
    assert sum(path.suffix == ".json" for path in (tmp_path / "records").iterdir()) == 1
    states = {entry["name"]: entry["state"] for entry in json.loads((tmp_path / "flywheel.json").read_text())["stages"]}
    assert states == {"good": "done", "bad": "to run"}


def test_failure_shows_the_lines_of_its_own_attempt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = shell("a", f"test -e {tmp_path}/again && exit 5; touch {tmp_path}/again; echo before; exit 4")
    for message in ("exit code 4: before", "exit code 5: it printed nothing"):
        with pytest.raises(StageFailed, match=message):
            run_stages([stage], tmp_path / "f")
        assert ("  | before" in capsys.readouterr().err) == ("before" in message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ln -s {base}/x $0/x", "x: is a link to {base}/x, expected a copy"),
        ("mkdir $0/a && ln -s {base} $0/a/b", "a/b: is a link to {base}, expected a copy"),
        ("rmdir $0 && ln -s {base} $0", "is a link to {base}, expected a copy"),
    ],
)
def test_results_that_are_elsewhere_are_refused(tmp_path: Path, line: str, message: str) -> None:
    """And the next attempt begins in an empty folder, while what a link led to is left as it was."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "x").write_text("1")
    bad = shell("bad", f"test -e {tmp_path}/mended && echo 2 > $0/x && exit 0; {line.format(base=base)}")
    with pytest.raises(StageFailed, match=re.escape(message.format(base=base))):
        run(tmp_path, bad)
    (tmp_path / "mended").touch()
    outcome, _ = run(tmp_path, bad)
    assert (outcome.result("bad") / "x").read_text() == "2\n"
    assert [path.name for path in base.iterdir()] == ["x"]


def test_links_within_a_result_are_its_own(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, shell("a", "echo 1 > $0/x && ln -s x $0/y"))
    assert (outcome.result("a") / "y").read_text() == "1\n"


def test_command_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=r"failed with exit code 127: .*no-such-tool"):
        run_stages([Stage("a", ("no-such-tool", At("out")))], tmp_path)


def test_stop_asks_then_kills(tmp_path: Path) -> None:
    deaf = shell("deaf", f"trap '' TERM; touch {tmp_path}/up; while :; do sleep 0.05; done; echo 1 > $0/x")
    began = time.monotonic()
    outcome = run_stages([deaf], tmp_path / "f", should_stop=(tmp_path / "up").exists, stop_seconds=0.5)
    assert not outcome.finished
    assert time.monotonic() - began < 60
    states = json.loads((tmp_path / "f" / "flywheel.json").read_text())["stages"]
    assert [entry["state"] for entry in states] == ["to run"]


GRAPH = """
from pathlib import Path
from pipelines.flywheel.run import run_stages
from pipelines.flywheel.stages import At, Stage
line = 'echo $$ > {folder}/pid; sleep 1000 & echo $! > {folder}/left; echo . >> {folder}/starts; '
line += 'until test -e {folder}/go; do sleep 0.02; done; mkdir -p $0; echo 1 > $0/x'
run_stages([Stage("a", ("bash", "-c", line, At("out")), resumes={resumes})], Path("{folder}/f"))
"""


@pytest.mark.parametrize("resumes", [False, True])
def test_a_stage_outlives_its_driver_and_the_next_one_waits(tmp_path: Path, resumes: bool) -> None:
    """Two drivers never run one command beside another; what a command has left behind ends with it."""
    command = [sys.executable, "-c", GRAPH.format(folder=tmp_path, resumes=resumes)]
    driver = subprocess.Popen(command, cwd=ROOT)
    until(lambda: (tmp_path / "left").exists() and (tmp_path / "left").read_text().strip())
    pid = int((tmp_path / "pid").read_text())
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert f"another driver writes to this folder: host {os.uname().nodename}, pid {driver.pid}, since" in second.stderr
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    third = subprocess.Popen(command, cwd=ROOT)
    time.sleep(1.5)
    assert alive(pid)
    assert third.poll() is None
    assert (tmp_path / "starts").read_text() == ".\n"
    (tmp_path / "go").touch()
    assert third.wait() == 0
    assert (tmp_path / "starts").read_text() == ".\n.\n"  # the second time with what is there, in a stage that resumes
    until(lambda: not alive(int((tmp_path / "left").read_text())))
    assert (next((tmp_path / "f" / "stages").iterdir()) / "x").read_text() == "1\n"
    assert not list((tmp_path / "f" / "stages").glob(".*"))
    for left in subprocess.run(["pgrep", "-f", "sleep 1000"], capture_output=True, text=True).stdout.split():
        if os.getpgid(int(left)) == pid:  # of the command whose driver was gone
            os.kill(int(left), signal.SIGKILL)


CRASH = """
import os, signal, sys
from pathlib import Path
from pipelines.flywheel import run as module
from pipelines.flywheel.folder import Folder
from pipelines.flywheel.stages import At, Stage
where, folder = sys.argv[1], Path(sys.argv[2])
def die(*arguments, **options): os.kill(os.getpid(), signal.SIGKILL)
if where == "before the command": module.Driver.run = die
if where == "after the command": module.log_tail = die
if where == "before the name": module.sync = die
if where == "before the record": module.write_record = die
if where == "after the record": module.shutil.rmtree = lambda path, ignore_errors=False: "state" in str(path) and die()
first = Stage("first", ("bash", "-c", "echo first >> $1; echo 1 > $0/x", At("out"), str(folder / "starts")))
line = "echo second >> $2; mkdir -p $0; cat $1/x >> $0/y; sort -u -o $0/y $0/y"
second = Stage("second", ("bash", "-c", line, At("out"), At("in"), str(folder / "starts")), {"in": first}, resumes=True)
module.run_stages([first, second], folder / "f")
"""


@pytest.mark.parametrize(
    ("where", "starts"),
    [
        ("before the command", []),
        ("after the command", ["first", "first"]),
        ("before the name", ["first", "first"]),
        ("before the record", ["first"]),  # its folder has its name, and is not made twice
        ("after the record", ["first"]),
    ],
)
def test_kill_at_each_point_of_the_driver(tmp_path: Path, where: str, starts: list[str]) -> None:
    killed = subprocess.run([sys.executable, "-c", CRASH, where, tmp_path], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    done = subprocess.run([sys.executable, "-c", CRASH, "nowhere", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "starts").read_text().split() == [*(starts or ["first"]), "second"]
    stages = {stage["name"]: stage for stage in json.loads((tmp_path / "f" / "flywheel.json").read_text())["stages"]}
    assert [stage["state"] for stage in stages.values()] == ["done", "done"]
    assert stages["first"]["attempts"] == max(len(starts), 1)
    assert (tmp_path / "f" / stages["second"]["result"] / "y").read_text() == "1\n"
    assert not list((tmp_path / "f" / "stages").glob(".*"))


@pytest.mark.parametrize("line", ["rm {folder}/logs/*", r"head -c 30000 /dev/zero | tr '\0' '\r'"])
def test_a_log_without_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """Deleted, or long and all of it a progress bar that is closed: the stage goes on."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)  # looks at the log each second
    outcome, ran = run(tmp_path, shell("a", f"{line.format(folder=tmp_path)}; sleep 1.5; echo 1 > $0/x"))
    assert ran == ["a"]
    log = tmp_path / outcome.records["a"]["log"]
    assert run_module.log_tail(log, 1) == []


def test_stages_made_by_other_code_are_counted(tmp_path: Path) -> None:
    stages = [shell(name, f"echo {name} > $0/x") for name in "ab"]
    outcome, _ = run(tmp_path, *stages)
    assert made_by_other_code(outcome.records.values()) == ""
    file = tmp_path / "records" / f"{outcome.records['a']['key']}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"code": "0"}))
    again, ran = run(tmp_path, *stages)
    assert ran == []
    assert made_by_other_code(again.records.values()).startswith(
        "made by other code than this: 1 of the 2 stages that are done"
    )


def test_a_full_disk_under_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(result: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module, "sync", full)
    stage = shell("a", "echo 1 > $0/x")
    with pytest.raises(StageFailed, match=r"stage a: .* its result is refused: .*No space left on device"):
        run(tmp_path, stage)
    monkeypatch.undo()
    assert run(tmp_path, stage)[1] == ["a"]
