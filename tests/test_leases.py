"""One driver per folder: who takes a lease, who is refused, and what a driver that lost it can still do."""

import json
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from scorer.config import PackConfig, ScoreConfig
from scorer.pack import pack
from scorer.reference import Reference
from scorer.score import score
from shards import lease as lease_module
from shards import row_schema, write_part
from shards.lease import Lease, LeaseLost, check_fence, lease_numbers
from shards.part import read_record
from shards.quarantine import rows_name
from shards.store import open_store

Remit = Callable[..., tuple[int, str, str]]
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["scorer.score", "scorer.drive", "pipelines.cli", "shards.verify"])


def run_cli(arguments: list[str], environment: dict[str, str], output: str) -> None:
    """Target of a process: the command line, with what it prints in the file `output`."""
    from pipelines.cli import main

    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(environment)
    fd = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    main(arguments)


class Driver:
    """A command line in a process of its own, forked from one that has the imports done."""

    def __init__(self, output: Path, *arguments: object, **environment: str) -> None:
        self.output = output
        self.process: BaseProcess = PROCESSES.Process(
            target=run_cli, args=([str(argument) for argument in arguments], environment, str(output))
        )
        self.process.start()

    def wait(self, seconds: float = 120) -> tuple[int | None, str]:
        """Exit code and output."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            pytest.fail(f"still runs after {seconds} s: {self.text()}")
        return self.process.exitcode, self.text()

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def wait_until(self, condition: Callable[[], object], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive(), f"ended with {self.process.exitcode}: {self.text()}"
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)


def fake_score(shards: Path, model: Path, out: Path) -> list[object]:
    return ["score", "--shards", shards, "--model", model, "--out", out, "--engine", "fake", "--num-engines", 1]


def content(folder: Path) -> dict[str, bytes]:
    """Every file that a reader may see: parts, records, manifest, tokenizer, quarantine; not the log."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "_score.jsonl"
    }


def commits(folder: Path) -> set[str]:
    return set(open_store(folder).names("_commits"))


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


@pytest.fixture(scope="session")
def fake_scored(
    tmp_path_factory: pytest.TempPathFactory, small: Path, tokenizer_folder: Path, reference_model: Path
) -> tuple[list[Any], dict[str, bytes]]:
    """Shards and model to score, and what an undisturbed run writes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shards, out = folder / "packed", folder / "out"
    pack(PackConfig([str(small.parent / "corpus")], str(tokenizer_folder), str(shards), 24, tokens_per_shard=24 * 10))
    config = ScoreConfig(str(shards), str(reference_model), str(out), engine="fake", num_engines=1)
    score(config, Reference(reference_model, reference_model.name))
    assert len(commits(out)) >= 8
    return [shards, reference_model], content(out)


# --- who gets the lease ---------------------------------------------------------------------------------


def hold(folder: str, ready: Any) -> None:
    Lease(folder).acquire()
    ready.set()
    time.sleep(600)


@pytest.fixture
def killed_holder(tmp_path: Path) -> Iterator[tuple[Path, BaseProcess]]:
    """A folder whose lease is held by a process that was killed with -9 and that nobody has waited for: a zombie."""
    ready = PROCESSES.Event()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(str(tmp_path / "out"), ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(RuntimeError, match=f"pid {process.pid}, since 0 min"):
        Lease(tmp_path / "out").acquire()  # it is alive
    os.kill(process.pid or 0, signal.SIGKILL)
    while "Z" not in Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]:
        time.sleep(0.01)
    yield tmp_path / "out", process
    process.join()


def test_lease_of_a_zombie_and_of_a_process_that_is_gone(killed_holder: tuple[Path, BaseProcess]) -> None:
    folder, process = killed_holder
    began = time.monotonic()
    lease = Lease(folder).acquire(lambda message: pytest.fail(message))
    assert time.monotonic() - began < 1
    assert lease.number == 2
    lease.store.create("_lease/00000003.json", lease.store.read("_lease/00000002.json"))  # as the dead one's was
    forge(folder, 3, pid=process.pid, process_start="1")
    process.join()
    assert not Path(f"/proc/{process.pid}").exists()
    again = Lease(folder).acquire(lambda message: pytest.fail(message))
    assert again.number == 4
    with pytest.raises(LeaseLost):
        lease.check()
    lease.release()
    again.check()
    again.release()
    assert not folder.exists()


def forge(folder: Path, number: int = 1, **changes: object) -> None:
    """Write a lease file as this process would, with some fields changed."""
    other = Lease(folder.parent / ".other")
    value = other.acquire()._value | changes
    other.release()
    (folder / "_lease").mkdir(parents=True, exist_ok=True)
    temporary = folder / "_lease" / ".forged"
    temporary.write_text(json.dumps(value))
    temporary.rename(folder / "_lease" / f"{number:08d}.json")


def test_a_reused_pid_is_not_the_driver_that_had_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    forge(out, 7)  # this very process holds it, it says
    with pytest.raises(RuntimeError, match=f"host .*, pid {os.getpid()}, since 0 min"):
        Lease(out).acquire()
    forge(out, 7, process_start="1")  # the same pid, which began at another time
    lease = Lease(out).acquire(lambda message: pytest.fail(message))
    assert lease.number == 8
    assert [path.name for path in (out / "_lease").iterdir()] == ["00000008.json"]
    lease.release()
    assert not out.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"beats": 1}', '{"pid": 1}', '"beats"'])
def test_a_damaged_lease_is_no_lease(tmp_path: Path, text: str) -> None:
    (tmp_path / "_lease").mkdir()
    (tmp_path / "_lease" / "00000004.json").write_text(text)
    lease = Lease(tmp_path).acquire()
    assert lease.number == 5
    lease.check()
    lease.release()
    assert not (tmp_path / "_lease").exists()


def test_another_machine_is_gone_only_after_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "STALE_SECONDS", 1.5)
    out, notes = tmp_path / "out", []
    forge(out, 3, machine="another boot", host="elsewhere", pid=4711)
    began = time.monotonic()
    lease = Lease(out).acquire(notes.append)
    assert 1.5 <= time.monotonic() - began < 4
    assert lease.number == 4
    assert len(notes) == 1
    assert "elsewhere (pid 4711)" in notes[0]
    lease.release()


def test_another_machine_that_shows_a_heartbeat_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "STALE_SECONDS", 20)
    out = tmp_path / "out"
    started = time.time() - 170
    away = {"machine": "another boot", "host": "elsewhere", "pid": 4711, "token": "t", "started": started}
    forge(out, 3, **away)
    threading.Timer(1, forge, (out, 3), away | {"beats": 1}).start()
    began = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"another driver writes.*host elsewhere, pid 4711, since 2 min 5\d s"
    ) as error:
        Lease(out).acquire()
    assert 1 <= time.monotonic() - began < 5
    assert "\n" not in str(error.value)
    assert lease_numbers(open_store(out)) == [3]
    assert json.loads((out / "_lease" / "00000003.json").read_text())["beats"] == 1


def test_another_machine_that_takes_the_same_number_anew_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended, and a third driver began there while we waited: its number and its count of beats are the same."""
    monkeypatch.setattr(lease_module, "STALE_SECONDS", 20)
    out = tmp_path / "out"
    forge(out, 1, machine="another boot", token="first")
    threading.Timer(0.5, forge, (out, 1), {"machine": "another boot", "token": "second", "pid": 4712}).start()
    with pytest.raises(RuntimeError, match="pid 4712"):
        Lease(out).acquire()


def test_a_driver_elsewhere_that_ends_while_we_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever begins after it has number 1 again and must not be overtaken by a 4 that we meant to take."""
    monkeypatch.setattr(lease_module, "STALE_SECONDS", 20)
    out = tmp_path / "out"
    forge(out, 3, machine="another boot")
    local = {}

    def others() -> None:
        (out / "_lease" / "00000003.json").unlink()
        local["lease"] = Lease(out).acquire()

    threading.Timer(0.5, others).start()
    with pytest.raises(RuntimeError, match=f"pid {os.getpid()}"):
        Lease(out).acquire()
    local["lease"].check()
    local["lease"].release()


def test_heartbeats_are_written_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.1)
    lease = Lease(tmp_path / "out").acquire()
    file = tmp_path / "out" / "_lease" / "00000001.json"
    deadline = time.monotonic() + 10
    while json.loads(file.read_text())["beats"] < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lease.release()
    lease.release()
    time.sleep(0.5)
    assert not (tmp_path / "out").exists()
    lost = Lease(tmp_path / "out").acquire()
    file.unlink()
    time.sleep(0.5)
    assert not file.exists()  # a lease that was taken away is not written again
    lost.release()


def test_release_leaves_what_stands_in_the_folder(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "out").acquire()
    (tmp_path / "out" / "kept").write_text("x")
    lease.release()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept"]


# --- a driver that lost it ------------------------------------------------------------------------------

ROWS = {"input_ids": [[5, 6, 0]], "doc_lengths": [[3]], "doc_ids": [[0]], "source": [0]}


def write_one_part(folder: Path, fence: Callable[[], None]) -> None:
    schema = row_schema()
    batch = pa.record_batch([pa.array(ROWS[field.name], field.type) for field in schema], schema=schema)
    write_part(folder, "part-00000.arrow", schema, {}, [batch], may_publish=fence)


def take_over(folder: Path) -> None:
    """What a driver on another machine does that saw no heartbeat of ours."""
    numbers = lease_numbers(open_store(folder))
    forge(folder, max(numbers) + 1, machine="another boot", token="theirs")
    (folder / "_lease" / f"{max(numbers):08d}.json").unlink()


@pytest.mark.parametrize("at_call", [1, 2])
def test_a_lost_lease_commits_no_part(tmp_path: Path, at_call: int) -> None:
    """Taken over before the part is published, and between the part and its record."""
    lease, store = Lease(tmp_path / "out").acquire(), open_store(tmp_path / "out")
    calls = []

    def fence() -> None:
        calls.append(1)
        if len(calls) == at_call:
            take_over(tmp_path / "out")
        check_fence(store, *lease.fence)

    with pytest.raises(LeaseLost, match="another driver has taken this folder over"):
        write_one_part(tmp_path / "out", fence)
    assert len(calls) == at_call
    assert read_record(store, "part-00000.arrow") is None
    assert store.names() == (["part-00000.arrow"] if at_call == 2 else [])  # an orphan, which the next run replaces
    with pytest.raises(LeaseLost):
        lease.check()
    lease.release()
    assert lease_numbers(store) == [2]  # not ours to give back
    forge(tmp_path / "out", 2, process_start="1")
    with_lease = Lease(tmp_path / "out").acquire()
    write_one_part(tmp_path / "out", with_lease.check)
    assert read_record(store, "part-00000.arrow") is not None
    with_lease.release()


def test_a_number_that_begins_anew_is_another_lease(tmp_path: Path) -> None:
    """A driver slept while another took over, ended, and a third began: it has the sleeper's number."""
    out = tmp_path / "out"
    sleeper = Lease(out).acquire()
    take_over(out)
    (out / "_lease" / "00000002.json").unlink()
    third = Lease(out).acquire()
    assert sleeper.number == third.number == 1
    third.check()
    with pytest.raises(LeaseLost):
        sleeper.check()
    with pytest.raises(LeaseLost):
        write_one_part(out, sleeper.check)
    sleeper.release()
    third.check()
    third.release()
    assert not out.exists()


def test_an_engine_of_a_driver_that_lost_the_lease_leaves_the_side_files_alone(
    tmp_path: Path, fake_scored: tuple[list[Any], dict[str, bytes]]
) -> None:
    """Rows that its successor has quarantined stay listed."""
    from scorer.actor import ScoringActor, ScoringTask
    from scorer.engine import EngineConfig

    (shards, model), files = fake_scored
    out = tmp_path / "out"
    for name, data in files.items():
        if not name.startswith(("part-", "_commits")):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(data)
    lease = Lease(out).acquire()
    take_over(out)
    part = "part-00001.arrow"
    side = out / rows_name(part)
    side.parent.mkdir(parents=True)
    side.write_text("of the successor")
    engine = EngineConfig(model, "float32", 24, 521, kind="fake")
    task = ScoringTask(str(shards), str(out), lease.fence, "rl", "packed", 1 / 64, 521)
    with pytest.raises(LeaseLost):
        ScoringActor(engine, {}, 1, task).score_part(part)
    assert side.read_text() == "of the successor"
    assert not list(out.glob("part-*"))
    lease.release()


def test_another_scoring_that_began_while_we_waited_is_not_continued(
    tmp_path: Path, fake_scored: tuple[list[Any], dict[str, bytes]], remit: Remit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both looked at an empty folder; the other one, in document context, had the lease first and left parts over."""
    (shards, model), _ = fake_scored
    out = tmp_path / "out"
    arguments = fake_score(shards, model, out)
    acquire = Lease.acquire

    def slow_acquire(self: Lease, *rest: Any) -> Lease:
        monkeypatch.setattr(Lease, "acquire", acquire)
        assert remit(*arguments, "--context", "document")[0] == 0
        (out / "_commits" / "part-00001.json").unlink()
        return acquire(self, *rest)

    monkeypatch.setattr(Lease, "acquire", slow_acquire)
    code, _, error = remit(*arguments)
    assert (code, "context is 'document' there, 'packed' asked for now" in last_line(error)) == (1, True), error
    assert "part-00001.json" not in commits(out)


# --- races ----------------------------------------------------------------------------------------------


def race(barrier: Any, rounds: list[str], results: Any, release: bool) -> None:
    """In each round, try to take a lease together with the others; report who has one that passes its check."""
    for folder in rounds:
        barrier.wait(60)
        lease, problem = None, ""
        try:
            lease = Lease(folder).acquire()
            lease.check()
            if release:
                os.close(os.open(f"{folder}-held", os.O_CREAT | os.O_EXCL))  # fails where another one is in here
                time.sleep(0.002)
                lease.check()
                os.unlink(f"{folder}-held")
                lease.release()
        except RuntimeError as error:
            problem = type(error).__name__ if isinstance(error, LeaseLost) else str(error)
            lease = None
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        barrier.wait(60)
        holds = False
        if lease is not None and not release:
            try:
                lease.check()
                holds = True
            except LeaseLost:
                problem = "lost"
        barrier.wait(60)
        if lease is not None:
            lease.release()
        results.put((folder, holds, lease is not None, problem))


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_never_two_holders(tmp_path: Path, kind: str, release: bool) -> None:
    """Rounds of five who try at once. Without release one holds it and four are refused, by name; with release
    they come one after the other, and no two are ever in at the same time. Half of the rounds find a dead lease."""
    rounds = [str(tmp_path / f"{index}") for index in range(50)]
    for folder in rounds[::2]:
        forge(Path(folder), 5, process_start="1")
    context = multiprocessing.get_context("fork")
    barrier: Any
    results: Any
    if kind == "threads":
        import queue

        barrier, results = threading.Barrier(5), queue.Queue()
        workers: list[Any] = [
            threading.Thread(target=race, args=(barrier, rounds, results, release), daemon=True) for _ in range(5)
        ]
    else:
        barrier, results = context.Barrier(5), context.Queue()
        workers = [context.Process(target=race, args=(barrier, rounds, results, release)) for _ in range(5)]
    for worker in workers:
        worker.start()
    found: dict[str, list[tuple[bool, bool, str]]] = {}
    for _ in range(5 * len(rounds)):
        folder, *outcome = results.get(timeout=120)
        found.setdefault(folder, []).append(tuple(outcome))
    for worker in workers:
        worker.join(60)
    assert len(found) == len(rounds)
    for folder, outcomes in found.items():
        assert sum(took for _, took, _ in outcomes) >= 1, outcomes
        if not release:
            assert sum(holds for holds, _, _ in outcomes) == 1, outcomes
            assert sum(took for _, took, _ in outcomes) == 1, outcomes
        for _, took, problem in outcomes:
            assert took == (not problem), problem
            assert took or re.search(r"another driver writes to this folder: host .*, pid (\d+|None),", problem), (
                problem
            )
        assert not Path(folder).exists(), outcomes
        assert not Path(f"{folder}-held").exists()


def session_cluster() -> dict[str, str]:
    """Environment with which a process joins the Ray cluster of this test run."""
    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


def two_drivers(tmp_path: Path, fake_scored: tuple[list[Any], dict[str, bytes]], rounds: int, stagger: float) -> list:
    """Two drivers on one folder within a second of each other; the exit codes of each round."""
    (shards, model), undisturbed = fake_scored
    found = []
    for index in range(rounds):
        out = tmp_path / f"out-{index}"
        arguments = fake_score(shards, model, out)
        drivers = []
        for number in range(2):
            drivers.append(Driver(tmp_path / f"{index}-{number}.log", *arguments, **session_cluster()))
            time.sleep(stagger * index / rounds if number == 0 else 0)
        ends = [driver.wait() for driver in drivers]
        codes = [code for code, _ in ends]
        assert sorted(codes) in ([0, 0], [0, 1]), ends
        if 1 in codes:
            refused, winner = ends[codes.index(1)][1], drivers[codes.index(0)].process.pid
            assert f"{out}: another driver writes to this folder: host" in last_line(refused)
            assert f"pid {winner}, since 0 min" in last_line(refused)
            assert "Traceback" not in refused
        assert content(out) == undisturbed, (index, codes)
        found.append(codes)
    return found


def test_two_drivers_within_a_second(tmp_path: Path, fake_scored: tuple[list[Any], dict[str, bytes]]) -> None:
    two_drivers(tmp_path, fake_scored, 4, 1.0)


@pytest.mark.slow
def test_two_drivers_within_a_second_fifty_times(
    tmp_path: Path, fake_scored: tuple[list[Any], dict[str, bytes]]
) -> None:
    outcomes = two_drivers(tmp_path, fake_scored, 50, 1.0)
    assert [0, 1] in outcomes or [1, 0] in outcomes


# --- through the command line ---------------------------------------------------------------------------


def test_second_driver_killed_driver_and_lost_lease(
    tmp_path: Path, fake_scored: tuple[list[Any], dict[str, bytes]]
) -> None:
    """A driver at work: a second one is refused; killed with -9, the next takes over at once; that one loses its
    lease to another machine and publishes nothing more; a last one ends the work, with the bytes of a quiet run."""
    (shards, model), undisturbed = fake_scored
    out = tmp_path / "out"
    arguments = fake_score(shards, model, out)
    slow = {"REMIT_FAKE_ENGINE": json.dumps({"seconds": 0.4})}
    first = Driver(tmp_path / "first.log", *arguments, **slow)
    first.wait_until(lambda: commits(out))
    code, text = Driver(tmp_path / "second.log", *arguments, **session_cluster()).wait()
    assert code == 1, text
    pattern = (
        rf"remit score: error: {out}: another driver writes .*: host \S+, pid {first.process.pid}, since 0 min \d+ s;"
    )
    assert re.match(pattern, last_line(text)), text
    assert first.process.is_alive(), first.text()
    first.process.kill()
    first.process.join()
    before = commits(out)
    assert len(before) < len(undisturbed) - 3

    began = time.monotonic()
    second = Driver(tmp_path / "third.log", *arguments, **slow)
    second.wait_until(lambda: (out / "_lease" / "00000002.json").exists())
    assert time.monotonic() - began < 25  # of which Ray starts most; no waiting for heartbeats
    assert "waiting up to" not in second.text()
    second.wait_until(lambda: len(commits(out)) > len(before))
    take_over(out)
    time.sleep(0.1)  # what had passed the fence
    published = commits(out)
    code, text = second.wait()
    assert code == 1, text
    assert f"{out}: another driver has taken this folder over; this one publishes nothing more" in last_line(text)
    assert "Traceback" not in text
    assert len([line for line in text.splitlines() if "error" in line]) == 1, text
    assert commits(out) == published
    assert len(published) < len([name for name in undisturbed if name.startswith("_commits")])
    assert lease_numbers(open_store(out)) == [3]

    forge(out, 3, process_start="1")
    code, text = Driver(tmp_path / "last.log", *arguments, **session_cluster()).wait()
    assert code == 0, text
    assert content(out) == undisturbed
