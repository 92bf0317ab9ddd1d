"""Budget and length reward against values computed by hand, and by exact arithmetic."""

import math
from fractions import Fraction
from pathlib import Path

import pytest

from pipelines.rmt.budget import budget_at, length_reward
from pipelines.rmt.settings import RmtConfig
from pipelines.rmt.warmup import format_budgets


def test_the_papers_budget_falls_from_800_to_160() -> None:
    assert budget_at(1000, 1000, 800, 1, 0.2) == 160
    assert budget_at(1, 10**9, 800, 1, 0.2) == 799  # already a little below 800
    assert budget_at(500, 1000, 800, 1, 0.2) == math.floor(800 * math.sqrt(0.2)) == 357


def test_the_budget_is_never_below_the_least() -> None:
    assert budget_at(7, 7, 16, 10, 0.2) == 10
    assert budget_at(1, 7, 1, 1, 0.001) == 1
    assert [budget_at(step, 3, 8, 1, 1.0) for step in (1, 2, 3)] == [8, 8, 8]
    assert [budget_at(step, 3, 8, 1, 0.125) for step in (1, 2, 3)] == [4, 2, 1]


def test_whole_numbers_are_not_missed_by_a_rounding() -> None:
    """n is the floor of B_0 g^(t/T) where n^T <= B_0^T g^t < (n + 1)^T, in fractions."""
    decays = [
        Fraction(text)
        for text in (
            ["0.01", "0.07", "0.14", "0.2", "0.25", "0.28", "0.29", "0.5", "0.56", "0.57", "0.58", "0.64", "0.9", "1"]
        )
    ]
    for first in (*range(1, 300, 7), 100, 800, 1000):
        for decay in decays:
            for step, steps in ((1, 1), (7, 7), (1, 2), (2, 4), (1, 3), (2, 3), (3, 5)):
                found = budget_at(step, steps, first, 1, float(decay))
                exact = Fraction(first) ** steps * decay**step
                assert found == 1 or found**steps <= exact
                assert exact < (found + 1) ** steps


def test_the_warm_up_asks_for_budgets_of_the_run(tmp_path: Path) -> None:
    settings = RmtConfig(shards="s", model="m", out=tmp_path / "run", first_budget=100, budget_decay=0.29)
    assert set(format_budgets(settings, 3, 3000)) == {*range(29, 101)}


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0), (4, 0.5), (8, 1), (12, 0.5), (16, 0), (17, 0), (1000, 0)])
def test_the_length_reward_is_a_tent(tokens: int, expected: float) -> None:
    assert length_reward(tokens, 8, 1.0) == expected
    assert length_reward(tokens, 8, 0.25) == 0.25 * expected


def test_an_odd_budget_against_fractions() -> None:
    for tokens in range(20):
        rises, falls = Fraction(tokens, 7), 2 - Fraction(tokens, 7)
        assert length_reward(tokens, 7, 3.0) == pytest.approx(float(3 * max(0, min(rises, falls))), abs=1e-12)


def test_a_budget_of_one_token() -> None:
    assert [length_reward(tokens, 1, 1.0) for tokens in (0, 1, 2, 3)] == [0, 1, 0, 0]
