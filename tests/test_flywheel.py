"""Stages by content: keys, fingerprints, what repeats and what does not, cores, failures. Commands are shell lines."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from annotated import annotate

from pipelines.flywheel import runner
from pipelines.flywheel.fingerprint import Known, fingerprint, first_change, read_files
from pipelines.flywheel.records import code_fingerprint, made_by_other_code
from pipelines.flywheel.runner import Outcome, StageFailed, run_stages
from pipelines.flywheel.stage import Input, Output, Pattern, Stage, State, Unkeyed, stage_key
from pipelines.flywheel.survey import survey

ROOT = Path(__file__).parent.parent


def shell(name: str, line: str, inputs: Mapping[str, Stage | Path] | None = None, **settings: object) -> Stage:
    """A stage that runs a line of bash: $0 is its output, $1, $2 the results of its inputs."""
    inputs = inputs or {}
    return Stage(name, ("bash", "-c", line, Output(), *map(Input, inputs)), inputs, **settings)


class Seen:
    """What happened, by the name of the stage."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def __call__(self, what: str, stage: Stage, facts: dict) -> None:
        if what not in ("running", "reading"):
            self.events.append((what, stage.name))

    def ran(self) -> list[str]:
        return [name for what, name in self.events if what == "finished"]


def run(folder: Path, *stages: Stage, **options: object) -> tuple[Outcome, list[str]]:
    """The outcome, and the names of the stages that ran."""
    seen = Seen()
    return run_stages(stages, folder, watch=seen, **options), seen.ran()


BASE = Stage("a", ("tool", "--x", "1", Output("o"), Input("in", "sub")), {"in": Path("p")}, "model", 3, {"k": 1.5})


def test_key_is_the_hash_of_what_it_says() -> None:
    text = (
        '{"command":["tool","--x","1",["output","o"],["input","in","sub"]],"environment":{},"inputs":{"in":"ff"},'
        '"remit":"0.1.0","result":"model","seed":3,"settings":{"k":1.5}}'
    )
    assert stage_key(BASE, {"in": "ff"}) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "b"},
        {"launcher": ("torchrun", "-m")},
        {"threads": 2},
        {"resumes": True},
        {"inputs": {"in": Path("elsewhere")}},
        {"command": (*BASE.command, Unkeyed("--fast"))},
        {"environment": {"WHERE": Unkeyed("here")}},
    ],
)
def test_what_does_not_enter_the_key(changes: dict) -> None:
    assert stage_key(replace(BASE, **changes), {"in": "ff"}) == stage_key(BASE, {"in": "ff"})


@pytest.mark.parametrize(
    "changes",
    [
        {"command": ("tool", "--x", "2", Output("o"), Input("in", "sub"))},
        {"command": ("tool", "--x", "1", Output("p"), Input("in", "sub"))},
        {"command": ("tool", "--x", "1", State("o"), Input("in", "sub"))},
        {"command": ("tool", "--x", "1", Output("o"), Input("in"))},
        {"result": ""},
        {"seed": None},
        {"settings": {"k": 1.25}},
        {"environment": {"A": "1"}},
        {"inputs": {"in": Path("p"), "more": Path("q")}},
    ],
)
def test_what_enters_the_key(changes: dict) -> None:
    fingerprints = {"in": "ff", "more": "ff"}
    assert stage_key(replace(BASE, **changes), fingerprints) != stage_key(BASE, fingerprints)
    assert stage_key(BASE, {"in": "fe"}) != stage_key(BASE, {"in": "ff"})


def test_this_python_is_the_same_everywhere() -> None:
    ours, plain = (replace(BASE, command=(word, "-c", "1")) for word in (sys.executable, "python"))
    assert stage_key(ours, {"in": "ff"}) == stage_key(plain, {"in": "ff"})


@pytest.mark.parametrize("name", ["", "/a", "a//b", "a b", "../a", ".a", "a/"])
def test_bad_names(name: str) -> None:
    with pytest.raises(ValueError, match="expected a name of"):
        Stage(name, ("true",))


def test_bad_graphs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reads 'x', expected one of its inputs"):
        Stage("a", (Input("x"),))
    first = shell("a/b", "echo > $0/f")
    with pytest.raises(ValueError, match="does not stand before it"):
        run_stages([shell("c", "true", {"in": first})], tmp_path)
    with pytest.raises(ValueError, match="stages a/b and a-b have one name"):
        run_stages([first, shell("a-b", "true")], tmp_path)
    with pytest.raises(ValueError, match=r"stage c, input in: .*nowhere: does not exist"):
        run_stages([shell("c", "true", {"in": tmp_path / "nowhere"})], tmp_path / "f")


def test_fingerprint_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"two")
    (tmp_path / "sub" / "a.txt").write_bytes(b"one")
    for name in ("_hidden", ".hidden", "sub/_h"):
        (tmp_path / name).write_bytes(b"no")
    lines = [["b.txt", hashlib.sha256(b"two").hexdigest()], ["sub/a.txt", hashlib.sha256(b"one").hexdigest()]]
    expected = hashlib.sha256("".join(f"{json.dumps(line)}\n" for line in lines).encode()).hexdigest()
    assert fingerprint(read_files(tmp_path)) == expected
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(tmp_path)
    (tmp_path / "_up").symlink_to(tmp_path)
    assert fingerprint(read_files(link)) == expected
    assert list(read_files(tmp_path / "b.txt")) == [""]
    (tmp_path / "empty" / ".x").mkdir(parents=True)
    with pytest.raises(ValueError, match="is empty"):
        read_files(tmp_path / "empty")


def test_which_files_of_a_folder_count(tmp_path: Path) -> None:
    for name in ("a.py", "_b.json", ".c", "_sub/d.py", ".git/e", ".cache/f", "__pycache__/a.pyc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    plain = {".c", "_b.json", "_sub/d.py", "a.py"}
    assert set(read_files(tmp_path)) == {"a.py"}
    assert set(read_files(tmp_path, counting="all")) == plain | {".git/e", ".cache/f"}
    assert set(read_files(tmp_path, counting="model")) == plain
    assert set(read_files(tmp_path, counting="python")) == {"a.py", "_sub/d.py"}


def test_fingerprint_of_shards(tmp_path: Path, small: Path) -> None:
    """Parts, manifest and tokenizer count; what a run writes about itself does not; no part is read."""
    zero = lambda row: [0.0] * len(row["input_ids"])  # noqa: E731
    out = annotate(small, tmp_path / "shards", zero, "packed")
    before = read_files(out)
    (out / "_score.jsonl").write_text("{}\n")
    assert read_files(out) == before
    part = out / "part-00001.arrow"
    assert before["part-00001.arrow"].sha256 == hashlib.sha256(part.read_bytes()).hexdigest()
    other = annotate(small, tmp_path / "other", lambda row: [-1.0] * len(row["input_ids"]), "packed")
    assert fingerprint(read_files(other)) != fingerprint(before)
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(data)
    assert "part-00001.arrow has other content" in first_change(out, before)
    part.unlink()
    assert "part-00001.arrow is gone" in first_change(out, before)
    with pytest.raises(ValueError, match="not what its commit record says"):
        read_files(out)
    (out / "_commits" / "part-00001.json").unlink()
    with pytest.raises(ValueError, match="are not committed"):
        read_files(out)


def test_changes_are_found(tmp_path: Path) -> None:
    file = tmp_path / "f" / "x"
    file.parent.mkdir()
    file.write_text("abc")
    files = read_files(tmp_path / "f")
    assert first_change(tmp_path / "f", files) == ""
    os.utime(file, ns=(1, 1))  # copied without its time: read, and found equal
    assert first_change(tmp_path / "f", files) == ""
    file.write_text("abd")
    assert "has other content" in first_change(tmp_path / "f", files)
    file.write_text("abcd")
    assert "has 4 bytes, had 3" in first_change(tmp_path / "f", files)
    file.write_text("abc")
    (tmp_path / "f" / "y").touch()
    assert "y is new" in first_change(tmp_path / "f", files)


def test_known_hashes_are_used_and_renewed(tmp_path: Path) -> None:
    file, known = tmp_path / "x", Known(tmp_path / "known.json")
    file.write_text("one")
    read_files(file, known)
    known.save()
    again = Known(tmp_path / "known.json")
    (tmp_path / "known.json").write_text(
        (tmp_path / "known.json").read_text().replace(hashlib.sha256(b"one").hexdigest(), "remembered")
    )
    assert read_files(file, Known(tmp_path / "known.json"))[""].sha256 == "remembered"
    file.write_text("other")
    assert read_files(file, again)[""].sha256 == hashlib.sha256(b"other").hexdigest()
    (tmp_path / "known.json").write_text("damaged")
    assert read_files(file, Known(tmp_path / "known.json"))[""].sha256 == hashlib.sha256(b"other").hexdigest()


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


def test_changed_results_are_made_again(tmp_path: Path) -> None:
    first = shell("first", "echo 1 > $0/x")
    second = shell("second", "cat $1/x > $0/y", {"first": first})
    outcome, _ = run(tmp_path, first, second)
    result = outcome.result("first")
    for change in (lambda: (result / "x").write_text("2\n"), lambda: (result / "x").unlink()):
        change()
        (look, _) = survey([first, second], tmp_path)
        assert look.change
        assert run(tmp_path, first, second)[1] == ["first"]  # equal again, so the second one stands
        assert (result / "x").read_text() == "1\n"
    aside = sorted((tmp_path / "set-aside").iterdir())
    assert len(aside) == 2
    assert (aside[0] / "x").read_text() == "2\n"
    (outcome.result("second") / "y").write_text("edited by hand")
    assert run(tmp_path, first, second)[1] == ["second"]
    record = next((tmp_path / "records").glob(f"{outcome.records['first']['key']}.json"))
    record.write_text(record.read_text()[:50])  # damaged: as if it were not there
    assert run(tmp_path, first, second)[1] == ["first"]


def test_one_work_under_two_names_is_done_once(tmp_path: Path) -> None:
    stages = [shell(name, f"echo x >> {tmp_path}/count; sleep 0.3; echo 1 > $0/x") for name in ("a", "b")]
    outcome, ran = run(tmp_path / "f", *stages, jobs=2)
    assert ran == ["a"]
    assert (tmp_path / "count").read_text() == "x\n"
    assert outcome.result("a") == outcome.result("b")


def test_jobs_run_at_once_on_cores_of_their_own(tmp_path: Path) -> None:
    """Each waits for the other to have begun, which one after the other could not."""
    line = (
        "touch {folder}/{own}; for i in $(seq 500); do test -e {folder}/{other} && break; sleep 0.02; done; "
        'test -e {folder}/{other}; echo "$OMP_NUM_THREADS $(taskset -cp $$ | sed "s/.*: //")" > $0/cores'
    )
    stages = [
        shell(own, line.format(folder=tmp_path, own=own, other=other), threads=1)
        for own, other in (("a", "b"), ("b", "a"))
    ]
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    outcome, ran = run(tmp_path / "f", *stages, jobs=2)
    assert sorted(ran) == ["a", "b"]
    given = [(outcome.result(name) / "cores").read_text().split() for name in ("a", "b")]
    assert [threads for threads, _ in given] == ["1", "1"]
    assert given[0][1] != given[1][1]


def test_no_more_cores_than_there_are(tmp_path: Path) -> None:
    line = f"test ! -e {tmp_path}/busy; touch {tmp_path}/busy; sleep 0.2; rm {tmp_path}/busy; env -u OMP_NUM_THREADS nproc > $0/n"
    stages = [shell(name, f"set -e; {line}; # {name}", threads=10_000) for name in ("a", "b")]
    outcome, _ = run(tmp_path / "f", *stages, jobs=2)
    assert int((outcome.result("a") / "n").read_text()) == len(os.sched_getaffinity(0))


def test_environment_state_and_record(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_text("d")
    environment = {"OUT": Output(), "DATA": Input("data"), "KEEP": State("s"), "PLAIN": "p", "FREE": Unkeyed("f")}
    stage = Stage(
        "round-1/x", ("bash", "-c", 'test -d "$KEEP" && echo "$(cat $DATA) $PLAIN $FREE" > $OUT/model'), {"data": data},
        result="model", seed=5, settings={"a": 1}, environment=environment,
    )  # fmt: skip
    outcome, _ = run(tmp_path / "f", stage)
    assert outcome.result("round-1/x").read_text() == "d p f\n"
    (entry,) = json.loads((tmp_path / "f" / "flywheel.json").read_text())["stages"]
    assert (entry["name"], entry["state"], entry["seed"], entry["settings"]) == ("round-1/x", "done", 5, {"a": 1})
    assert entry["result"] == f"stages/round-1-x-{entry['key'][:12]}/model"
    assert entry["environment"]["OUT"] == entry["output"]
    assert entry["inputs"]["data"]["path"] == str(data)
    assert entry["inputs"]["data"]["fingerprint"] == fingerprint(read_files(data))
    assert entry["seconds"] >= 0
    assert entry["versions"]["python"].startswith("3.")
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


def test_an_input_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    """What was made of half the one and half the other gets no record, and the next run knows the new content."""
    data = tmp_path / "data"
    data.write_text("1\n")
    stage = shell("a", "cat $1 > $0/x; test -e $1.again || echo 2 >> $1; touch $1.again", {"data": data})
    with pytest.raises(StageFailed, match=r"data: was changed while the stage ran"):
        run_stages([stage], tmp_path / "f")
    outcome, _ = run(tmp_path / "f", stage)
    assert (outcome.result("a") / "x").read_text() == "1\n2\n"


@pytest.mark.parametrize("end", ["exit 0", "exit 9"])
@pytest.mark.parametrize("harm", ["echo 2 > $1/x", "echo 2 > $1/y", "rm $1/x"])
def test_a_command_that_writes_into_what_it_reads_spoils_nothing(tmp_path: Path, harm: str, end: str) -> None:
    """It is refused by name; what it has changed is made again, and what was begun with it is begun again."""
    folder, once = tmp_path / "f", tmp_path / "once"
    first = shell("first", "echo 1 > $0/x")
    line = f"mkdir -p $0; cat $1/* >> $0/y; test -e {once} || {{ touch {once}; cat $1/x >> $0/y; {harm}; {end}; }}"
    bad = shell("bad", line, {"first": first}, resumes=True)
    after = shell("after", "cat $1/* > $0/z", {"first": first})
    with pytest.raises(StageFailed) as failed:
        run_stages([first, bad, after], folder)
    if end == "exit 0":
        assert re.search(
            r"stage bad: .*first-[0-9a-f]{12}/[xy] .*: the result of stage first was changed while this stage ran",
            str(failed.value),
        )
    outcome, ran = run(folder, first, bad, after)
    assert ran == ["first", "bad", "after"]
    assert (outcome.result("bad") / "y").read_text() == "1\n"
    assert (outcome.result("after") / "z").read_text() == "1\n"
    assert run(folder, first, bad, after)[1] == []


def test_what_reads_a_result_while_another_command_changes_it_is_refused(tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    up, done = tmp_path / "up", tmp_path / "done"
    first = shell("first", "echo 1 > $0/x")
    bad = shell("bad", f"test -e {done} || echo 2 > $1/x; touch {up}; cat $1/x > $0/y; sleep 1000", {"first": first})
    wait = f"until test -e {up}; do sleep 0.02; done; cat $1/x > $0/z"
    beside = shell("beside", wait, {"first": first})
    with pytest.raises(StageFailed, match=r"stage beside: .* the result of stage first was changed"):
        run_stages([first, bad, beside], tmp_path / "f", jobs=2)
    assert run(tmp_path / "f", first, beside)[1] == ["first", "beside"]


def test_failure_shows_the_lines_of_its_own_attempt(tmp_path: Path) -> None:
    stage = shell("a", f"test -e {tmp_path}/again && exit 5; touch {tmp_path}/again; echo before; exit 4")
    for message in ("exit code 4: before", "exit code 5: it printed nothing"):
        with pytest.raises(StageFailed, match=message) as failed:
            run_stages([stage], tmp_path / "f")
    assert failed.value.log == [line for line in failed.value.log if line.startswith("---")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mkfifo $0/pipe; echo 1 > $0/x", "pipe: is a pipe or a device, expected files"),
        ("ln -s {base}/x $0/x", "x: is a link to {base}/x, expected a copy"),
        ("mkdir $0/a && ln -s {base} $0/a/b", "a/b: is a link to {base}, expected a copy"),
        ("rmdir $0 && ln -s {base} $0", "is a link to {base}, expected a folder with copies"),
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


def test_stages_made_by_other_code_are_counted(tmp_path: Path) -> None:
    stages = [shell(name, f"echo {name} > $0/x") for name in "ab"]
    outcome, _ = run(tmp_path, *stages)
    assert outcome.records["a"]["code"] == code_fingerprint()
    assert made_by_other_code(outcome.records.values()) == ""
    file = tmp_path / "records" / f"{outcome.records['a']['key']}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"code": "0"}))
    again, ran = run(tmp_path, *stages)
    assert ran == []
    assert made_by_other_code(again.records.values()).startswith(
        "made by other code than this: 1 of the 2 stages that are done"
    )


def test_command_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="no-such-tool: cannot be started"):
        run_stages([Stage("a", ("no-such-tool", Output()))], tmp_path)


def test_failure_stops_the_others_which_go_on_later(tmp_path: Path) -> None:
    """The one beside it is asked to end, and ends as it likes."""
    slow = Stage(
        "slow", ("bash", "-c", f'mkdir -p $0; echo . >> $0/x; test -e {tmp_path}/again && exit 0; '
        f"trap 'exit 3' TERM; touch {tmp_path}/up; while :; do sleep 0.05; done", Output()), resumes=True,
    )  # fmt: skip
    bad = shell("bad", f"until test -e {tmp_path}/up; do sleep 0.02; done; test -e {tmp_path}/again && echo 1 > $0/x")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    with pytest.raises(StageFailed, match="stage bad failed"):
        run_stages([slow, bad], tmp_path / "f", jobs=2)
    (tmp_path / "again").touch()
    outcome, ran = run(tmp_path / "f", slow, bad, jobs=2)
    assert sorted(ran) == ["bad", "slow"]
    assert (outcome.result("slow") / "x").read_text() == ".\n.\n"
    assert outcome.records["slow"]["attempts"] == 2


def test_stop_asks_then_kills(tmp_path: Path) -> None:
    deaf = shell("deaf", f"trap '' TERM; touch {tmp_path}/up; while :; do sleep 0.05; done; echo 1 > $0/x")
    began = time.monotonic()
    outcome = run_stages([deaf], tmp_path / "f", should_stop=(tmp_path / "up").exists, stop_seconds=0.5)
    assert not outcome.finished
    assert time.monotonic() - began < 60
    states = json.loads((tmp_path / "f" / "flywheel.json").read_text())["stages"]
    assert [entry["state"] for entry in states] == ["to run"]


GRAPH = """
import sys
from pathlib import Path
from pipelines.flywheel.runner import run_stages
from pipelines.flywheel.stage import Output, Stage
line = 'echo $$ > {folder}/pid; setsid sleep 1000 & echo $! > {folder}/orphan; echo . >> {folder}/starts; '
line += 'until test -e {folder}/go; do sleep 0.02; done; mkdir -p $0; echo 1 > $0/x'
run_stages([Stage("a", ("bash", "-c", line, Output()), resumes=False)], Path("{folder}/f"))
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nothing_outlives_a_killed_driver(tmp_path: Path) -> None:
    """Not the command, not what it has put into a session of its own; and the lock is free at once."""
    command = [sys.executable, "-c", GRAPH.format(folder=tmp_path)]
    driver = subprocess.Popen(command, cwd=ROOT)
    until(lambda: (tmp_path / "orphan").exists() and (tmp_path / "orphan").read_text().strip())
    pids = [int((tmp_path / name).read_text()) for name in ("pid", "orphan")]
    assert all(map(alive, pids))
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert f"process {driver.pid} on" in second.stderr
    assert "works here; wait for it or stop it" in second.stderr
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    (tmp_path / "go").touch()
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    until(lambda: not any(map(alive, pids)))
    assert not alive(int((tmp_path / "orphan").read_text()))  # that of the run which ended well
    assert (tmp_path / "starts").read_text() == ".\n.\n"
    assert not list((tmp_path / "f" / "stages").glob(".*"))


def test_files_that_come_to_match_while_a_stage_runs_refuse_its_result(tmp_path: Path) -> None:
    """The command expands the pattern when it starts, the key is of the files that matched before."""
    (tmp_path / "a.txt").write_text("a")
    pattern = str(tmp_path / "*.txt")

    def stage(line: str) -> Stage:
        files = Pattern.expand(pattern)
        inputs = {f"{number}": Path(file) for number, file in enumerate(files)}
        return Stage("x", ("bash", "-c", line, Output(), Pattern(pattern, files)), inputs)

    with pytest.raises(StageFailed, match="other files match since the stage was planned"):
        run_stages([stage(f"echo b > {tmp_path}/b.txt; cat $1 > $0/all")], tmp_path / "f")
    outcome, ran = run(tmp_path / "f", stage("cat $1 > $0/all"))
    assert ran == ["x"]
    assert (outcome.result("x") / "all").read_text() == "ab\n"


def test_an_error_at_one_stage_asks_the_others_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk under the record of one must not cost another what it has not saved."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")

    def full(result: Path, files: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runner, "sync", full)
    kept = tmp_path / "kept"
    long = f'trap "touch {kept}; exit 3" TERM; touch {tmp_path}/begun; while true; do sleep 0.05; done'
    short = f"while ! test -e {tmp_path}/begun; do sleep 0.05; done; echo 1 > $0/x"
    with pytest.raises(StageFailed, match=r"stage short: .*No space left on device; the same command again goes on"):
        run_stages([shell("long", long, threads=1), shell("short", short, threads=1)], tmp_path / "f", jobs=2)
    assert kept.exists()
    kept.unlink()

    monkeypatch.undo()
    data = tmp_path / "data"
    data.write_text("d")
    gone = f"while ! test -e {tmp_path}/begun; do sleep 0.05; done; rm {data}; echo 1 > $0/x"
    (tmp_path / "begun").unlink()
    first = shell("first", gone, threads=1)
    with pytest.raises(StageFailed, match="data"):
        run_stages(
            [shell("long", long, threads=1), first, shell("later", "cp $2 $0", {"first": first, "data": data})],
            tmp_path / "g", jobs=2,
        )  # fmt: skip
    assert kept.exists()
