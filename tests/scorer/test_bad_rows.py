"""Rows without log-probs: the lines, the end of a run with too many, the sample with too many. By hand."""

import numpy as np
import pytest

from scorer.bad_rows import BadRows, TooManyBadRows, main_reason
from scorer.canary import CanaryFailed
from scorer.config import ScoreConfig
from scorer.engine import Answer
from scorer.estimate import fault_of, require_few

NAN = "scored twice, 3 of 47 log-probs are not finite, for instance nan"


def test_lines_at_a_thousandth_and_at_a_hundredth() -> None:
    rows = BadRows(0.05, "float16", "OUT/_quarantine/rows")
    assert rows.add(2000, 2, NAN) is None  # exactly a thousandth
    line = rows.add(1000, 2, "token id 9 is not in the reference's embedding, 0..8")
    assert line is not None
    assert line.startswith("4 of 3,000 rows came out without log-probs (0.1%), mostly: scored twice, 3 of 47 log-probs")
    assert "the run ends where they are more than 0.05 (--max-bad-rows)" in line
    assert rows.add(1000, 10, NAN) is None
    assert "110 of 5,000" in (rows.add(1000, 96, NAN) or "")
    assert rows.add(1000, 1, NAN) is None
    assert rows.facts == {"rows": 6000, "rows_bad": 111, "reason": NAN}
    assert BadRows(0.05, "float16", "").add(10**6, 0, "") is None


@pytest.mark.parametrize(
    ("dtype", "reason", "remedy"),
    [
        (
            "float16",
            NAN,
            "score with --dtype bfloat16, which has a larger range (the run is in float16), into another --out, see",
        ),
        ("bfloat16", NAN, "score with --dtype float32 (the run is in bfloat16), into another --out, see"),
        ("float32", NAN, "(--max-bad-rows); see"),
        ("float16", "token id 9 is not in the reference's embedding, 0..8", "(--max-bad-rows); see"),
    ],
)
def test_too_many_end_the_run(dtype: str, reason: str, remedy: str) -> None:
    rows = BadRows(0.05, dtype, "OUT/_quarantine/rows")
    assert rows.add(299, 299, reason)  # too few to tell
    with pytest.raises(
        TooManyBadRows, match=r"400 of 1,000 rows came out without log-probs \(40.0%\), mostly: "
    ) as error:
        rows.add(701, 101, reason)
    assert remedy in str(error.value)
    assert reason in str(error.value)
    assert str(error.value).endswith("see OUT/_quarantine/rows, or go on with a larger --max-bad-rows")
    for most in (0.4, 1.0):
        assert BadRows(most, dtype, "").add(1000, 400, reason)
    assert BadRows(1.0, dtype, "").add(1000, 1000, reason)


def test_the_reason_of_most() -> None:
    assert main_reason([]) == ""
    others = ["token id 521 is not in", "2 of 9 log-probs are positive, for instance 0.5", "token id 7 is not in"]
    assert main_reason(others) == others[0]
    assert main_reason([*others, *["4 of 12 log-probs are positive, for instance 1e-3"] * 2]) == others[1]


def test_the_share_is_checked() -> None:
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="--max-bad-rows"):
            ScoreConfig("a", "b", "c", max_bad_rows=share)


def test_answers_about_a_sample() -> None:
    bounds = {
        "rl_entropy": (0.0, np.log(100)),
        "rl_entropy_t2": (0.0, np.log(100)),
        "rl_log_partition_t2": (0.0, np.log(10)),
    }
    logprobs = np.full(4, -1.0, np.float32)
    good = np.full((4, 3), 2.0, np.float32)
    assert fault_of(Answer(logprobs, entropies=good), bounds) is None
    assert "gave none" in str(fault_of(Answer(logprobs), bounds))
    for column, value in ((0, np.nan), (1, np.inf), (1, -0.5), (0, 5.0), (2, 2.5)):
        bad = good.copy()
        bad[2, column] = value
        assert f"{[*bounds][column]} is {value:g}, expected" in str(fault_of(Answer(logprobs, entropies=bad), bounds))
    assert "not finite" in str(fault_of(Answer(np.array([-1, np.nan, -1, -1], np.float32), entropies=good), bounds))


@pytest.mark.parametrize(
    ("rows", "bad", "most", "passes"),
    [
        (100, 0, 0.05, True),
        (100, 5, 0.05, True),
        (100, 6, 0.05, False),
        (10, 3, 0.05, True),  # of a small sample a few are no share
        (4, 3, 0.05, False),
        (100, 99, 1.0, True),
        (100, 100, 1.0, False),
        (1, 1, 1.0, False),
    ],
)
def test_a_sample_with_too_many(rows: int, bad: int, most: float, passes: bool) -> None:
    if passes:
        require_few(rows, bad, most, NAN, "float16")
        return
    with pytest.raises(
        CanaryFailed, match=rf"{bad} of {rows} rows of the sample .*--dtype bfloat16.*give a threshold in nats"
    ):
        require_few(rows, bad, most, NAN, "float16")
