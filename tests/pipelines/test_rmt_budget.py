"""Budget and length reward against values computed by hand, and by exact arithmetic."""

import math
from fractions import Fraction

import pytest

from pipelines.rmt.budget import budget_at, length_reward


def test_the_papers_budget_falls_from_800_to_160() -> None:
    assert budget_at(1000, 1000, 800, 1, 0.2) == 160
    assert budget_at(1, 10**9, 800, 1, 0.2) == 799  # already a little below 800
    assert budget_at(500, 1000, 800, 1, 0.2) == math.floor(800 * math.sqrt(0.2)) == 357


def test_the_budget_is_never_below_the_least() -> None:
    assert budget_at(7, 7, 16, 10, 0.2) == 10
    assert budget_at(1, 7, 1, 1, 0.001) == 1
    assert [budget_at(step, 3, 8, 1, 1.0) for step in (1, 2, 3)] == [8, 8, 8]
    assert [budget_at(step, 3, 8, 1, 0.125) for step in (1, 2, 3)] == [4, 2, 1]


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
