"""The index of tiers and the positions that it leads to, against brute force over the rows by pyarrow."""

from pathlib import Path

import numpy as np
import pytest
from built_once import BuiltOnce
from oracles import contexts, read_rows
from rmt_shards import THRESHOLDS, places_by_tier, with_entropy, with_predict

from pipelines.rmt.curriculum import Draw
from pipelines.rmt.positions import PositionReader, rows_without
from pipelines.rmt.tier_index import Limits, count_tiers, counted_for, load_or_count
from shards import ShardFolder


@pytest.fixture(scope="module")
def shards(built_once: BuiltOnce, small: Path) -> Path:
    return built_once("rmt-entropy", lambda out: with_entropy(small, out))


@pytest.fixture(scope="module")
def masked(built_once: BuiltOnce, shards: Path) -> Path:
    """Rows of which some are predicted in every third place, some in their second half, some not at all."""

    def predict(row: dict) -> list[bool]:
        number, size = sum(row["input_ids"]) % 3, len(row["input_ids"])
        return [(place % 3 == 0, 2 * place >= size, False)[number] for place in range(size)]

    return built_once("rmt-masked", lambda out: with_predict(shards, out, predict))


def test_what_is_not_to_be_predicted_is_neither_drawn_nor_learned(masked: Path) -> None:
    folder, expected, rows = ShardFolder(masked), places_by_tier(masked), read_rows(masked)
    index = count_tiers(folder, "rl", THRESHOLDS)
    assert index.counts == [len(places) for places in expected]
    assert 0 < sum(index.counts) < sum(len(row["input_ids"]) for row in rows) / 2
    reader = PositionReader(folder, index, "rl", THRESHOLDS, "packed", 10**6)
    for tier, places in enumerate(expected):
        drawn = [reader.position(Draw(tier, ordinal)) for ordinal in range(len(places))]
        assert [(position.row, position.place) for position in drawn] == places
        for row in rows_without(drawn, reader):
            number = int(row.where.rpartition(" ")[2]) + folder.manifest.rows_per_part * [
                row.where.startswith(str(masked / plan.name)) for plan in folder.manifest.parts
            ].index(True)
            here, ids = {place for of_row, place in places if of_row == number}, rows[number]["input_ids"]
            wanted = [place > 0 and rows[number]["predict"][place] and place not in here for place in range(len(ids))]
            assert row.predicted.tolist() == wanted


def test_limits_are_those_of_token_and_prefix(shards: Path) -> None:
    folder, rows = ShardFolder(shards), read_rows(shards)
    limits = Limits(np.arange(1000) % 3 > 0, 5)
    expected, beyond = [], 0
    for places in places_by_tier(shards):
        kept = []
        for number, place in places:
            start = max(start for start, _ in contexts(rows[number], "document") if start <= place)
            if rows[number]["input_ids"][place] % 3 and place - start <= 5:
                kept.append((number, place))
        beyond += len(places) - len(kept)
        expected.append(kept)
    index = count_tiers(folder, "rl", THRESHOLDS, limits=limits)
    assert (index.counts, index.beyond) == ([len(places) for places in expected], beyond)
    reader = PositionReader(folder, index, "rl", THRESHOLDS, "packed", 10**6, limits=limits)
    for tier, places in enumerate(expected):
        found = [reader.position(Draw(tier, ordinal)) for ordinal in range(len(places))]
        assert [(position.row, position.place) for position in found] == places


@pytest.mark.parametrize("thresholds", [THRESHOLDS, (1.0,)])
def test_every_draw_leads_to_its_place(shards: Path, thresholds: tuple[float, ...]) -> None:
    folder, expected, rows = ShardFolder(shards), places_by_tier(shards, thresholds), read_rows(shards)
    index = count_tiers(folder, "rl", thresholds)
    assert index.counts == [len(places) for places in expected]
    assert min(index.counts) > 20
    reader = PositionReader(folder, index, "rl", thresholds, "packed", 10**6)
    for tier, places in enumerate(expected):
        for ordinal in range(0, len(places), 7):
            found = reader.position(Draw(tier, ordinal))
            row, place = places[ordinal]
            start, end = next(span for span in contexts(rows[row], "document") if span[0] <= place < span[1])
            ids = rows[row]["input_ids"]
            assert (found.row, found.place, found.tier) == (row, place, tier)
            assert list(found.prefix_ids) == ids[start:place]
            assert list(found.continuation_ids) == ids[place:end]
            assert found.target == ids[place]
            assert found.entropy == rows[row]["rl_entropy"][place]
            assert np.isnan(found.baseline)


def test_the_baseline_is_the_stored_column(shards: Path) -> None:
    folder, rows = ShardFolder(shards), read_rows(shards)
    reader = PositionReader(folder, count_tiers(folder, "rl", (1.0,), ["rl"]), "rl", (1.0,), "packed", 10**6, "rl")
    found = reader.position(Draw(1, 5))
    assert found.baseline == rows[found.row]["rl_logprobs"][found.place]


def test_positions_of_a_step_are_not_predicted_and_all_others_are(shards: Path) -> None:
    folder, rows = ShardFolder(shards), read_rows(shards)
    reader = PositionReader(folder, count_tiers(folder, "rl", THRESHOLDS), "rl", THRESHOLDS, "packed", 10**6)
    drawn = [reader.position(Draw(tier, ordinal)) for tier, ordinal in ((1, 3), (2, 40), (3, 0), (3, 1), (3, 2))]
    ours = rows_without(drawn, reader)
    numbers = sorted({position.row for position in drawn})
    assert len(ours) == len(numbers) < len(drawn)
    for row, number in zip(ours, numbers, strict=True):
        places = {position.place for position in drawn if position.row == number}
        assert row.input_ids.tolist() == rows[number]["input_ids"]
        assert row.predicted.tolist() == [place > 0 and place not in places for place in range(len(row.input_ids))]


def test_the_index_is_made_once_and_again_where_it_is_damaged(shards: Path, tmp_path: Path) -> None:
    folder, made = ShardFolder(shards), []

    def count() -> object:
        made.append(1)
        return count_tiers(folder, "rl", THRESHOLDS)

    first = load_or_count(tmp_path, count)
    again = load_or_count(tmp_path, count)
    assert len(made) == 1
    before = np.array(first.before_TR)
    assert np.array_equal(before, again.before_TR)
    file = tmp_path / "_curriculum" / "tiers.npy"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert np.array_equal(load_or_count(tmp_path, count).before_TR, before)
    assert len(made) == 2


def test_an_index_that_was_counted_for_something_else_is_counted_again(
    shards: Path, masked: Path, tmp_path: Path
) -> None:
    few = Limits(longest_prefix=3)
    asked = [
        (shards, THRESHOLDS, ()), (shards, (1.0, 1.2, 1.9), ()), (shards, (1.0,), ()), (shards, (), ()),
        (masked, (), ()), (masked, (), ("rl",)),
    ]  # fmt: skip
    for limits in ({}, {"limits": few}):
        for path, borders, others in asked:
            folder = ShardFolder(path)
            wanted = counted_for(folder, "rl", borders, others, **limits)
            count = lambda: count_tiers(folder, "rl", borders, others, **limits)  # noqa: B023, E731
            found = load_or_count(tmp_path, count, wanted=wanted)
            assert len(found.counts) == len(borders) + 1
            of_all = [len(places) for places in places_by_tier(path, borders)]
            assert found.counts == of_all or (limits and sum(found.counts) + found.beyond == sum(of_all))
            assert np.array_equal(load_or_count(tmp_path, lambda: 1 / 0, wanted=wanted).before_TR, found.before_TR)


def test_shards_without_entropy_are_refused_with_the_remedy(annotated: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"has no entropy of the reference 'rl'.*--entropy"):
        count_tiers(ShardFolder(annotated["packed"]), "rl", THRESHOLDS)
