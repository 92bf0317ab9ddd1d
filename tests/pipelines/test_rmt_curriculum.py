"""Tiers, their distribution over the steps, and the draw: by hand, by brute force, and by chi-squared at fixed seeds."""

from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from pipelines.rmt.curriculum import FORMAT, Draw, distribution_at, draw, require_enough, tier_of

FIRST, LAST = (0.6, 0.3, 0.1), (0.1, 0.3, 0.6)


def test_a_threshold_belongs_to_the_tier_above() -> None:
    entropies = np.array([0.0, 0.4999, 0.5, 0.99, 1.0, 1.4999, 1.5, 9.0], dtype=np.float32)
    assert tier_of(entropies, (0.5, 1.0, 1.5)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert tier_of(entropies, (1.0,)).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_the_distribution_stays_rises_and_stays() -> None:
    at = lambda step: distribution_at(step, 100, FIRST, LAST).tolist()  # noqa: E731
    assert at(1) == at(30) == pytest.approx(FIRST)
    assert at(50) == pytest.approx([0.35, 0.3, 0.35])
    assert at(40) == pytest.approx([0.475, 0.3, 0.225])
    assert at(70) == at(100) == pytest.approx(LAST)


def test_a_draw_follows_from_seed_and_step_alone() -> None:
    shares, counts = np.array([0.0, 0.5, 0.5]), [3, 50, 70]
    assert draw(1, 2, shares, counts, 20) == draw(1, 2, shares, counts, 20)
    others = [draw(1, 3, shares, counts, 20), draw(2, 2, shares, counts, 20), draw(1, 2, shares, counts, 20, FORMAT)]
    assert all(other != draw(1, 2, shares, counts, 20) for other in others)


def test_no_position_comes_twice_in_a_step_and_a_whole_tier_can_be_drawn() -> None:
    drawn = draw(0, 1, np.array([0.0, 1.0]), [0, 20], 20)
    assert sorted(each.ordinal for each in drawn) == list(range(20))
    assert {each.tier for each in drawn} == {1}


def test_tiers_come_as_often_as_they_should() -> None:
    """Also where a tier is so small that the same positions are drawn again and again."""
    shares, counts = np.array([0.0, 0.6, 0.3, 0.1]), [1000, 12, 5000, 30]
    found = Counter(each.tier for step in range(4000) for each in draw(7, step, shares, counts, 8))
    assert found[0] == 0
    observed = [found[tier] for tier in (1, 2, 3)]
    assert chisquare(observed, 4000 * 8 * shares[1:]).pvalue > 0.01


def test_positions_of_a_tier_come_equally_often() -> None:
    found = Counter(each.ordinal for step in range(6000) for each in draw(3, step, np.array([0, 1.0]), [9, 40], 4))
    assert chisquare([found[place] for place in range(40)]).pvalue > 0.01


def test_steps_do_not_follow_from_each_other() -> None:
    pairs = Counter()
    for step in range(4000):
        one, two = (draw(5, step + more, np.array([1.0]), [4], 1)[0].ordinal for more in (0, 1))
        pairs[one, two] += 1
    assert chisquare([pairs[one, two] for one in range(4) for two in range(4)]).pvalue > 0.01


def test_a_tier_that_is_too_small_is_refused_by_name_and_number() -> None:
    names, shares = ("below", "easy", "medium", "hard"), [np.array([0, *FIRST]), np.array([0, 0.0, 0.4, 0.6])]
    require_enough([0, 8, 8, 8], shares, 8, names, "shards")
    with pytest.raises(ValueError, match=r"shards: has 7 positions of the tier 'easy' .*hard 9.* at least 8"):
        require_enough([0, 7, 8, 9], shares, 8, names, "shards")
    require_enough([0, 0, 8, 8], [np.array([0, 0.0, 0.4, 0.6])], 8, names, "shards")
    assert Draw(1, 2) == Draw(1, 2)
