"""One driver per folder: who takes a lease, who is refused, and what a driver that lost it can still do."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import VOCABULARY
from faulty import SEQ_LEN, Faulty
from processes import Command, committed, content

from scorer.actor import ScoringActor, ScoringTask
from scorer.engine import EngineConfig
from shards import lease as lease_module
from shards import row_schema, write_part
from shards.fingerprint import config_fingerprint, weights_fingerprint
from shards.lease import Lease, LeaseLost, check_fence, lease_numbers
from shards.part import CommittedAlready, read_record
from shards.quarantine import rows_name
from shards.store import LocalStore, open_store

Remit = Callable[..., tuple[int, str, str]]
FORKS = multiprocessing.get_context("fork")


def fake_score(faulty: Faulty, out: Path) -> list[object]:
    return faulty.command("score", out)


# --- who gets the lease ---------------------------------------------------------------------------------


def hold(folder: str, ready: Any) -> None:
    Lease(folder).acquire()
    ready.set()
    time.sleep(600)


@pytest.fixture
def killed_holder(tmp_path: Path) -> Iterator[tuple[Path, BaseProcess]]:
    """A folder whose lease is held by a process that was killed with -9 and that nobody has waited for: a zombie."""
    ready = FORKS.Event()
    process = FORKS.Process(target=hold, args=(str(tmp_path / "out"), ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(RuntimeError, match=f"pid {process.pid}, since 0 min"):
        Lease(tmp_path / "out").acquire()  # it is alive
    os.kill(process.pid or 0, signal.SIGKILL)
    while "Z" not in Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]:
        time.sleep(0.01)
    yield tmp_path / "out", process
    process.join()


@pytest.mark.usefixtures("starts_processes")
def test_lease_of_a_zombie_and_of_a_process_that_is_gone(killed_holder: tuple[Path, BaseProcess]) -> None:
    folder, process = killed_holder
    lease = Lease(folder).acquire(lambda message: pytest.fail(message))  # it would say that it waits
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
    assert 1.5 <= time.monotonic() - began < 15
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
    began = time.monotonic()
    threading.Timer(1, forge, (out, 3), away | {"beats": 1}).start()
    with pytest.raises(
        RuntimeError, match=r"another driver writes.*host elsewhere, pid 4711, since 2 min 5\d s"
    ) as error:
        Lease(out).acquire()
    assert 1 <= time.monotonic() - began < 15
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
    threading.Timer(1.5, forge, (out, 1), {"machine": "another boot", "token": "second", "pid": 4712}).start()
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

    threading.Timer(1.5, others).start()
    with pytest.raises(RuntimeError, match=f"pid {os.getpid()}"):
        Lease(out).acquire()
    local["lease"].check()
    local["lease"].release()


def test_heartbeats_are_written_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.1)
    lease = Lease(tmp_path / "out").acquire()
    file = tmp_path / "out" / "_lease" / "00000001.json"
    deadline = time.monotonic() + 60
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


class HalfWritten:
    """Stands before LocalStore.read: a lease file shows only its first bytes to the next `times` reads, as on HDFS while it
    is replaced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times, self.bytes = 0, 0
        read = LocalStore.read

        def half(store: LocalStore, name: str) -> bytes:
            data = read(store, name)
            if name.startswith("_lease/") and self.times:
                self.times -= 1
                return data[: self.bytes]
            return data

        monkeypatch.setattr(LocalStore, "read", half)


@pytest.mark.parametrize("shown", [0, 40])
def test_a_lease_file_that_is_being_replaced_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: int
) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 600)
    monkeypatch.setattr(lease_module, "UNREADABLE_SECONDS", 0.6)
    half = HalfWritten(monkeypatch)
    half.bytes = shown
    lease = Lease(tmp_path / "out").acquire()
    half.times = 3
    lease.check()  # not lost
    assert half.times == 0
    half.times = 3
    with pytest.raises(RuntimeError, match=f"pid {os.getpid()}"):  # nor to be taken
        Lease(tmp_path / "out").acquire()
    half.times = 1_000_000
    with pytest.raises(LeaseLost):
        lease.check()
    taken = Lease(tmp_path / "out").acquire()  # what stays unreadable is nobody's
    assert taken.number == 2
    half.times = 0
    taken.release()
    lease.release()


# --- a driver that lost it ------------------------------------------------------------------------------

ROWS = {"input_ids": [[5, 6, 0]], "doc_lengths": [[3]], "doc_ids": [[0]], "source": [0]}


def write_one_part(folder: Path, fence: Callable[[], None], metadata: dict[str, Any] | None = None) -> None:
    schema = row_schema()
    batch = pa.record_batch([pa.array(ROWS[field.name], field.type) for field in schema], schema=schema)
    write_part(folder, "part-00000.arrow", schema, metadata or {}, [batch], may_publish=fence)


def take_over(folder: Path) -> None:
    """What a driver on another machine does that saw no heartbeat of ours."""
    numbers = lease_numbers(open_store(folder))
    forge(folder, max(numbers) + 1, machine="another boot", token="theirs")
    (folder / "_lease" / f"{max(numbers):08d}.json").unlink()


@pytest.mark.parametrize("clock", [0, 1])
def test_a_check_in_a_loop_looks_again_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: int
) -> None:
    """By either clock: one of them stands still while the machine sleeps."""
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 600)
    now = [1000.0, 1000.0]
    monkeypatch.setattr(lease_module, "_clocks", lambda: tuple(now))
    lease = Lease(tmp_path / "out").acquire()
    lease.check_often()
    take_over(tmp_path / "out")
    now[clock] += 9.9
    lease.check_often()
    now[clock] += 0.2
    for _ in range(2):
        with pytest.raises(LeaseLost):
            lease.check_often()
    lease.release()


def test_a_heartbeat_that_finds_the_lease_lost_ends_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.05)
    lease = Lease(tmp_path / "out").acquire()
    lease.check_often()
    take_over(tmp_path / "out")
    time.sleep(1)  # much less than TRUSTED_SECONDS
    with pytest.raises(LeaseLost):
        lease.check_often()
    lease.release()


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


def test_an_engine_of_a_driver_that_lost_the_lease_leaves_the_side_files_alone(tmp_path: Path, faulty: Faulty) -> None:
    """Rows that its successor has quarantined stay listed."""
    out = tmp_path / "out"
    for name, data in faulty.undisturbed("score").items():
        if not name.startswith(("part-", "_commits")):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(data)
    lease = Lease(out).acquire()
    take_over(out)
    part = "part-00001.arrow"
    side = out / rows_name(part)
    side.parent.mkdir(parents=True)
    side.write_text("of the successor")
    engine = EngineConfig(
        faulty.model, "float32", SEQ_LEN, VOCABULARY,
        weights_fingerprint(faulty.model), config_fingerprint(faulty.model), kind="fake",
    )  # fmt: skip
    task = ScoringTask(str(faulty.packed), str(out), lease.fence, "rl", "packed", 1 / 64, VOCABULARY)
    actor = ScoringActor(engine, {}, 1, task)
    actor.start()
    with pytest.raises(LeaseLost):
        actor.score_part(part)
    assert side.read_text() == "of the successor"
    assert not list(out.glob("part-*"))
    lease.release()


def test_a_part_that_an_engine_which_was_given_up_has_committed(
    tmp_path: Path, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that lost its raylet goes on for a while. Its part, scored again elsewhere, is done and no failure."""
    out = tmp_path / "out"
    shutil.copytree(faulty.scored, out)
    part, before = "part-00001.arrow", faulty.undisturbed("score")
    side, record = out / rows_name(part), out / "_commits" / "part-00001.json"
    record.unlink()
    lease = Lease(out).acquire()
    engine = EngineConfig(
        faulty.model, "float32", SEQ_LEN, VOCABULARY,
        weights_fingerprint(faulty.model), config_fingerprint(faulty.model), kind="fake",
    )  # fmt: skip
    task = ScoringTask(str(faulty.packed), str(out), lease.fence, "rl", "packed", 1 / 64, VOCABULARY)
    actor = ScoringActor(engine, {}, 1, task)
    actor.start()
    fill = actor._fill

    def fill_while_the_other_commits(*arguments: Any) -> None:
        fill(*arguments)
        record.write_bytes(before["_commits/part-00001.json"])
        side.parent.mkdir(parents=True)
        side.write_text("of the other engine")

    monkeypatch.setattr(actor, "_fill", fill_while_the_other_commits)
    assert actor.score_part(part)["quarantined"] == 0
    assert side.read_text() == "of the other engine"
    side.unlink()
    side.parent.rmdir()
    side.parent.parent.rmdir()
    lease.release()
    assert content(out) == before


def test_an_orphan_is_replaced_but_not_a_part_that_got_its_record_meanwhile(tmp_path: Path) -> None:
    write_one_part(tmp_path / "theirs", lambda: None)
    calls = []

    def commit_theirs() -> None:
        calls.append(1)
        if len(calls) == 1:
            shutil.copytree(tmp_path / "theirs", tmp_path / "out", dirs_exist_ok=True)

    write_one_part(tmp_path / "out", commit_theirs)  # the same bytes: fine
    shutil.rmtree(tmp_path / "out")
    calls.clear()
    with pytest.raises(CommittedAlready):
        write_one_part(tmp_path / "out", commit_theirs, {"other": "bytes"})
    assert content(tmp_path / "out") == content(tmp_path / "theirs")


def test_a_part_that_does_not_fit_its_record_is_named_by_the_same_command(
    tmp_path: Path, faulty: Faulty, remit: Remit
) -> None:
    """As two engines may leave it, the second of which was killed: no word of nothing to do."""
    out = tmp_path / "out"
    shutil.copytree(faulty.scored, out)
    part = out / "part-00001.arrow"
    part.write_bytes(part.read_bytes() + b"x")
    code, output, error = remit(*fake_score(faulty, out))
    assert (code, "nothing to do" in output) == (1, False)
    assert re.search(r"part-00001\.arrow: \d+ bytes, its commit record says \d+; run remit verify", error)
    assert remit("verify", "--shards", out, "--repair")[0] == 1
    code, output, error = remit(*fake_score(faulty, out))
    assert code == 0, error
    assert committed(out) == committed(faulty.scored)


def test_another_scoring_that_began_while_we_waited_is_not_continued(
    tmp_path: Path, faulty: Faulty, remit: Remit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both looked at an empty folder; the other one, in document context, had the lease first and left parts over."""
    out = tmp_path / "out"
    arguments = fake_score(faulty, out)
    acquire = Lease.acquire

    def slow_acquire(self: Lease, *rest: Any) -> Lease:
        monkeypatch.setattr(Lease, "acquire", acquire)
        assert remit(*arguments, "--context", "document")[0] == 0
        (out / "_commits" / "part-00001.json").unlink()
        return acquire(self, *rest)

    monkeypatch.setattr(Lease, "acquire", slow_acquire)
    code, _, error = remit(*arguments)
    assert (code, "context is 'document' there, 'packed' asked for now" in error.strip().splitlines()[-1]) == (
        1,
        True,
    ), error
    assert "part-00001.json" not in committed(out)


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
@pytest.mark.usefixtures("starts_processes")
def test_never_two_holders(tmp_path: Path, kind: str, release: bool) -> None:
    """Rounds of five who try at once. Without release one holds it and four are refused, by name; with release
    they come one after the other, and no two are ever in at the same time. Half of the rounds find a dead lease."""
    rounds = [str(tmp_path / f"{index}") for index in range(50)]
    for folder in rounds[::2]:
        forge(Path(folder), 5, process_start="1")
    barrier: Any
    results: Any
    if kind == "threads":
        import queue

        barrier, results = threading.Barrier(5), queue.Queue()
        workers: list[Any] = [
            threading.Thread(target=race, args=(barrier, rounds, results, release), daemon=True) for _ in range(5)
        ]
    else:
        barrier, results = FORKS.Barrier(5), FORKS.Queue()
        workers = [FORKS.Process(target=race, args=(barrier, rounds, results, release)) for _ in range(5)]
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


def two_drivers(tmp_path: Path, faulty: Faulty, rounds: int) -> list[list[int]]:
    """Two drivers on one folder, the second up to a second after the first; the exit codes of each round."""
    found = []
    for index in range(rounds):
        out = tmp_path / f"out-{index}"
        first = Command(tmp_path, *fake_score(faulty, out))
        time.sleep(index / rounds)
        second = Command(tmp_path, *fake_score(faulty, out))
        codes = [first.finish(), second.finish()]
        assert sorted(codes) in ([0, 0], [0, 1]), first.errors + second.errors
        if 1 in codes:
            refused, winner = (first, second) if codes[0] else (second, first)
            assert f"{out}: another driver writes to this folder: host" in refused.last_error
            assert f"pid {winner.pid}, since 0 min" in refused.last_error
            assert "Traceback" not in refused.errors
        assert content(out) == faulty.undisturbed("score"), (index, codes)
        found.append(codes)
    return found


def test_two_drivers_within_a_second(tmp_path: Path, faulty: Faulty) -> None:
    two_drivers(tmp_path, faulty, 4)


@pytest.mark.slow
def test_two_drivers_within_a_second_fifty_times(tmp_path: Path, faulty: Faulty) -> None:
    outcomes = two_drivers(tmp_path, faulty, 50)
    assert [0, 1] in outcomes or [1, 0] in outcomes


# --- through the command line ---------------------------------------------------------------------------


def test_second_driver_killed_driver_and_lost_lease(tmp_path: Path, faulty: Faulty) -> None:
    """A driver at work: a second one is refused; killed with -9, the next takes over at once; that one loses its
    lease to another machine and publishes nothing more; a last one ends the work, with the bytes of a quiet run."""
    out, slow = tmp_path / "out", {"REMIT_FAKE_ENGINE": json.dumps({"seconds": 0.8})}
    arguments = fake_score(faulty, out)
    first = Command(tmp_path, *arguments, private=True, **slow)
    first.until(lambda: committed(out))
    refused = Command(tmp_path, *arguments)
    assert refused.finish() == 1
    pattern = rf"remit score: error: {out}: another driver writes .*: host \S+, pid {first.pid}, since 0 min \d+ s;"
    assert re.match(pattern, refused.last_error), refused.errors
    assert first.process.is_alive(), first.errors
    first.signal(signal.SIGKILL)
    assert first.finish() == -signal.SIGKILL
    before = committed(out)
    assert len(before) < faulty.num_parts - 2

    second = Command(tmp_path, *arguments, **slow)
    second.until(lambda: lease_numbers(open_store(out)) == [2])
    second.until(lambda: len(committed(out)) > len(before))
    assert "waiting up to" not in second.errors
    take_over(out)
    time.sleep(1)  # for what had passed the fence
    published = committed(out)
    assert second.finish() == 1
    want = f"remit score: error: {out}: another driver has taken this folder over; this one publishes nothing more"
    assert second.last_error == want
    assert "Traceback" not in second.errors
    assert second.errors.count("error") == 1, second.errors
    assert committed(out) == published
    assert len(published) < faulty.num_parts
    assert lease_numbers(open_store(out)) == [3]

    forge(out, 3, process_start="1")
    last = Command(tmp_path, *arguments)
    assert last.finish() == 0, last.errors
    assert content(out) == faulty.undisturbed("score")
