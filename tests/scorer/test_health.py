"""Whose fault, which nodes are left alone, when a run ends: by hand, with times that are passed in."""

import pytest

from scorer.health import (
    FAILURES_IN_A_ROW,
    JOIN_SECONDS,
    LONGEST_REST_SECONDS,
    REST_SECONDS,
    NodeHealth,
    PartAttempts,
)
from scorer.waiting import AGAIN_SECONDS, Waits, duration

DAY = 86400.0


def fails(health: NodeHealth, node: str, *times: float, kind: str = "out of memory") -> None:
    """An engine that began a second before each time fails at it."""
    for now in times:
        health.failed(node, now - 1, now, kind, f"{kind} at {now:g}")


def test_a_node_is_left_alone_after_two_failures_and_ever_longer() -> None:
    health = NodeHealth(may_join=True)
    fails(health, "a", 10)
    assert (health.failures("a"), health.left_alone(10)) == (1, frozenset())
    fails(health, "a", 20)
    assert health.left_alone(20) == {"a"}
    assert health.rest("a", 20) == REST_SECONDS
    assert health.left_alone(20 + REST_SECONDS - 1) == {"a"}
    assert health.left_alone(20 + REST_SECONDS) == frozenset()
    now, rests = 1000.0, []
    for _ in range(8):
        fails(health, "a", now)
        rests.append(health.rest("a", now))
        now += rests[-1] + 10
    assert rests[:3] == [2 * REST_SECONDS, 4 * REST_SECONDS, 8 * REST_SECONDS]
    assert rests[-1] == LONGEST_REST_SECONDS
    assert health.rest("b", now) == 0


def test_engines_that_fail_together_are_one_failure() -> None:
    """Eight GPUs of a node without credentials: all their engines were on their way when the first one failed."""
    health = NodeHealth(may_join=True)
    for late in range(8):
        health.failed("a", 0.0, 10 + late / 10, "no credentials", "no credentials")
    assert health.failures("a") == 1
    for late in range(8):
        health.failed("a", 11.0, 20 + late / 10, "no credentials", "no credentials")
    assert (health.failures("a"), health.rest("a", 21)) == (2, pytest.approx(REST_SECONDS, abs=2))


def test_a_success_counts_only_from_an_engine_that_began_after_the_failure() -> None:
    """Seven good GPUs of a node say nothing of the eighth; the eighth's own success does."""
    health = NodeHealth(may_join=True)
    fails(health, "a", 100)
    health.worked("a", began=5)
    assert health.failures("a") == 1
    health.worked("a", began=101)
    assert health.failures("a") == 0
    fails(health, "a", 5 * DAY)  # days later it is a first failure again
    assert health.left_alone(5 * DAY) == frozenset()


def test_a_node_that_computes_wrongly_is_out_for_good() -> None:
    health = NodeHealth(may_join=True)
    health.ever_ready = True
    health.failed("a", 1, 2, "wrong", "the engine's log-probs are not the model's", for_good=True)
    assert health.left_alone(30 * DAY) == {"a"}
    health.worked("a", began=3)  # another engine of it that passed: its numbers are good, the node stays suspect
    assert health.left_alone(30 * DAY) == {"a"}
    assert health.hopeless(10 * DAY, ["a", "b"], []) is None
    health.failed("b", 1, 3, "wrong", "the engine's log-probs are not the model's", for_good=True)
    assert "not the model's" in (health.hopeless(10, ["a", "b"], []) or "")
    assert health.hopeless(10, ["a", "b"], [("a", 0)]) is None  # an engine of it that passed is at work
    assert health.hopeless(10, ["a", "b", "c"], []) is None


def test_no_number_of_failures_ends_a_run_that_had_an_engine() -> None:
    health = NodeHealth(may_join=True)
    health.ever_ready = True
    for node in "abcdefg":
        fails(health, node, 1, 2, 3 * DAY, 9 * DAY)
    assert health.hopeless(9 * DAY, "abcdefg", []) is None


def test_several_nodes_that_fail_alike_end_a_run_that_had_none() -> None:
    health = NodeHealth(may_join=True)
    nodes = [f"n{i}" for i in range(64)]
    fails(health, "n0", 5)
    fails(health, "n1", 6)
    assert health.hopeless(6, nodes, []) is None
    fails(health, "n2", 7, kind="no credentials")
    assert health.hopeless(7, nodes, []) is None  # not alike
    fails(health, "n3", 8)
    assert health.hopeless(8, nodes, [("n0", 7), ("n60", 1)]) is None  # on another node one still loads
    assert health.hopeless(8, nodes, [("n0", 4)]) is None  # another GPU of the same node, loading since before
    assert health.hopeless(8, nodes, [("n0", 7)]) == "out of memory at 8"
    assert health.hopeless(8, [], []) is None  # they have left the cluster


def test_all_nodes_that_there_are() -> None:
    health = NodeHealth(may_join=True)
    fails(health, "a", 5)
    fails(health, "b", 3, 6, kind="no credentials")
    assert health.hopeless(6, "ab", []) is None
    fails(health, "a", 7)
    assert health.hopeless(7, "ab", []) == "out of memory at 7"
    assert health.hopeless(7, "abc", []) is None
    health.keep_only(["b", "c"])
    assert health.failures("a") == 0
    assert health.hopeless(7, "bc", []) is None


def test_one_bad_node_of_a_cluster_that_starts_is_given_company() -> None:
    health = NodeHealth(may_join=True)
    fails(health, "a", 5, 8)
    assert health.hopeless(9, ["a"], []) is None
    assert health.hopeless(5 + JOIN_SECONDS, ["a"], []) == "out of memory at 8"
    assert health.hopeless(5 + JOIN_SECONDS, ["a", "b"], []) is None


def test_a_private_ray_gets_no_other_node() -> None:
    health = NodeHealth(may_join=False)
    assert health.hopeless(0, ["a"], []) is None
    fails(health, "a", 5)
    assert health.hopeless(5, ["a"], [("a", 3)]) is None  # its other engine may be better
    assert health.hopeless(5, ["a"], [("a", 6)]) == "out of memory at 5"


def test_attempts_of_a_part_and_where_it_is_tried_next() -> None:
    attempts = PartAttempts()
    assert not attempts.suspect("p")
    assert attempts.welcome("p", "a", {"a"})
    assert attempts.failed("p", "a") == 1
    assert attempts.suspect("p")
    assert not attempts.welcome("p", "a", {"a", "b"})
    assert attempts.welcome("p", "b", {"a", "b"})
    assert attempts.welcome("p", "a", {"a"})  # there is no other
    assert [attempts.failed("p", "b"), attempts.failed("p", "b")] == [2, 3]
    assert attempts.welcome("p", "a", {"a", "b"})  # both have failed with it
    assert not attempts.suspect("q")
    assert FAILURES_IN_A_ROW == 2


def test_what_is_waited_for_has_a_beginning_and_an_end() -> None:
    waits = Waits()
    assert waits.update(0, "store", None) is None
    assert waits.update(1, "store", "s3://bucket", after=5) is None
    assert waits.update(2, "store", None) is None  # over before it was worth a line
    assert waits.update(10, "store", "s3://bucket", after=5) is None
    assert waits.update(15, "store", "s3://bucket", after=5) == "waiting for s3://bucket"
    assert waits.update(16, "store", "s3://bucket", after=5) is None
    assert waits.update(16, "place", "room") == "waiting for room"  # each by itself
    again = waits.update(15 + AGAIN_SECONDS, "store", "s3://bucket", after=5)
    assert again == "still waiting, for 10 min, for s3://bucket"
    assert waits.update(1000, "store", None, over="s3://bucket answers") == "s3://bucket answers, after 16 min"
    assert waits.update(1001, "store", None) is None


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.6, 119, 125, 7100, 7300)] == [
        "0 s",
        "60 s",
        "119 s",
        "2 min",
        "118 min",
        "2 h 2 min",
    ]
