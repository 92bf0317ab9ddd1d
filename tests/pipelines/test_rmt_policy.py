"""What the first process asks the engines for, between threads that stand for processes; and the lines at the end of a run."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.commands.rmt import held_out_summary
from pipelines.rmt.policy import Policy, on_first
from scorer.stopping import Stopped


def asked_by_all(size: int, call: Any, stops: bool = False) -> list[Any]:
    """What each of `size` processes gets of on_first, or raises."""
    barrier, said = Barrier(size, timeout=20), list[Any]()

    def of_rank(rank: int) -> Any:
        def from_first(value: Any) -> Any:
            if rank == 0:
                said.append(value)
            barrier.wait()
            return said[0]

        world = SimpleNamespace(first=rank == 0, from_first=from_first)
        session: Any = SimpleNamespace(world=world, should_stop=lambda: stops)
        try:
            return on_first(session, call)
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(of_rank, range(size)))


def test_the_answer_of_the_first_process_is_that_of_all() -> None:
    calls: list[int] = []
    assert asked_by_all(3, lambda: calls.append(1) or [["a"], []]) == [[["a"], []]] * 3
    assert calls == [1]


@pytest.mark.parametrize("stops", [False, True])
def test_what_goes_wrong_on_the_first_process_ends_all_at_once(stops: bool) -> None:
    def fails() -> None:
        raise RuntimeError("the engine fails: out of memory")

    first, *others = asked_by_all(3, fails, stops)
    assert str(first) == "the engine fails: out of memory"
    for other in others:
        assert type(other) is (Stopped if stops else RuntimeError)
        assert "the engine fails: out of memory" in str(other)


def test_a_stop_on_the_first_process_is_one_on_all() -> None:
    def stopped() -> None:
        raise Stopped("stopped by a signal")

    assert [type(found) for found in asked_by_all(2, stopped)] == [Stopped, Stopped]


def test_samples_come_through_the_first_process() -> None:
    class Gone:
        def sample(self, *asked: Any) -> Any:
            raise ValueError(f"gone with {asked}")

    world = SimpleNamespace(first=True, from_first=lambda value: value)
    session: Any = SimpleNamespace(world=world, should_stop=lambda: False)
    run: Any = SimpleNamespace(first_step=0)
    with pytest.raises(ValueError, match="gone with"):
        Policy(run, session, Gone()).sample([[1]], [], 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "shown"),
    [([], []), ([0], [0]), ([0, 9], [0, 9]), ([0, 80, 140], [0, 80, 140]), ([0, 5, 10, 15, 20, 25], [0, 15, 25])],
)
def test_the_summary_has_the_first_the_middle_and_the_last_evaluation(
    tmp_path: Path, steps: list[int], shown: list[int]
) -> None:
    entry = {"accuracy": 0.25, "accuracy_with_thought": 0.5}
    text = "".join(json.dumps({"step": step, "loss": 1.5, "tiers": {"easy": entry}}) + "\n" for step in steps)
    (tmp_path / "evaluation.jsonl").write_text(text)
    config: Any = SimpleNamespace(out=tmp_path)
    found = held_out_summary(config)
    ending = "steps: loss 1.5000; next token right, bare / with thought: easy 25.0% / 50.0%"
    assert found == [f"held out after {step} {ending}" for step in shown]
