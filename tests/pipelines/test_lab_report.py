"""The laboratory's results and report: intervals by hand, verdicts, refusals, the Markdown and the page."""

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import open_page
from playwright.sync_api import Browser
from scipy import stats

from benchmarks.lab import results as lab_results
from benchmarks.lab.claims import (
    CLAIMS,
    CONTRADICTED,
    MISSING,
    ONE_SEED,
    PREMISE,
    REPRODUCED,
    UNDECIDED,
    Claim,
    Estimate,
    collapsed_norm,
    difference,
    estimate,
    first_step,
    holm,
    is_counted,
    judge,
    judge_all,
    lost_lead,
    paired,
    tokens_saved,
)
from benchmarks.lab.plots import make_plots
from benchmarks.lab.recipe import RECIPES
from benchmarks.lab.report import MARK, PICTURES, lead, main, markdown_table, to_markdown, to_page
from benchmarks.lab.results import Results, read
from benchmarks.lab.tables import cell, claims_table, differences_table, found_text, make_tables

COMMITTED = Path(__file__).resolve().parents[2] / "docs" / "lab-report"
ARMS = ["ntp", "remit", "remit2", "ntp-guided", "sft-guided", "rho1", "miniplm", "kd", "no-clip", "remit-rl10"]


def entry(arm: str, stage: str, metric: str, value: float | None, step: int | None = None) -> dict:
    return {"arm": arm, "stage": stage, "metric": metric, "value": value, "step": step}


def made_up(seed: int, better: float = 0.05) -> dict[str, Any]:
    """All arms and stages; ReMiT is `better` than NTP, which is as good as all others, and noise is small."""
    noise = random.Random(seed)
    rows = []
    models = [("base", "pretrained"), *((arm, "mid") for arm in ARMS), ("ntp-rl10", "rl")]
    models += [(arm, stage) for arm in ("ntp", "kd", "remit") for stage in ("sft", "dpo", "rl")]
    for arm, stage in models:
        level = 0.2 if arm == "base" else 0.5 + (better if arm == "remit" else 0) + (0.1 if stage == "rl" else 0)
        for metric in ("greedy_easy", "greedy_hard", "greedy_all", "sampled_all"):
            rows.append(entry(arm, stage, metric, level + noise.gauss(0, 0.01)))
        for metric in ("loss_solutions", "loss_stories", "loss_notes", "kl_reference"):
            rows.append(entry(arm, stage, metric, 1 + noise.gauss(0, 0.01)))
    for arm in ("ntp", "remit", "no-clip"):
        for step in (100, 200, 300, 400):
            gain = step / 1000 + (better if arm == "remit" else 0)
            rows.append(entry(arm, "mid", "greedy_all", gain + noise.gauss(0, 0.001), step))
            rows.append(entry(arm, "mid", "loss_heldout", 2 - gain, step))
            rows.append(entry(arm, "mid", "loss_solutions", 1 - gain + noise.gauss(0, 0.001), step))
            rows.append(entry(arm, "mid", "grad_norm", 0.1 if arm == "no-clip" else 1 + noise.random(), step))
            rows.append(entry(arm, "rl", "train_reward", gain, step))
    recipe = {"layers": 3, "arms": ["remit"]}
    return {
        "seed": seed,
        "size": "full",
        "recipe": recipe,
        "seconds": {"data": 3600.0},
        "versions": {"torch": ["2"]},
        "code": ["ab" * 32],
        "measurements": rows,
    }


def write(folder: Path, *records: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        lab_results.write(folder, record)
    return folder


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    return write(tmp_path / "lab", *(made_up(seed) for seed in range(5)))


def results_of(measured: dict[tuple[str, str], list[float]], metric: str = "greedy_all") -> Results:
    """Values by (arm, stage), one for each seed."""
    results = Results(list(range(9)), "full")
    for (arm, stage), values in measured.items():
        results.values[arm, stage, metric] = dict(enumerate(values))
    return results


def test_numbers_are_collected_from_the_stages(tmp_path: Path) -> None:
    """A mid-training, its curve, an RL and both measurements, written by hand as the stages write them."""
    files = {
        "mid/evaluation.jsonl": [{"step": 0, "loss": 2.0}, {"step": 40, "loss": 1.5}],
        "mid/metrics.jsonl": [{"step": step, "grad_norm": float(step), "clipped_low": None} for step in range(1, 41)],
        "rl/metrics.jsonl": [{"step": 1, "reward": 0.5, "entropy": 3.0, "loss": 9.0}],
        "measured-mid/measurements.json": [{"greedy_all": 0.25}],
        "measured-rl/measurements.json": [{"greedy_all": 0.75}],
        "curve/measurements.json": [{"0": {"greedy_all": 0.0}, "40": {"greedy_all": 0.25}}],
    }
    for name, lines in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def stages(**names: str) -> dict[tuple[str, str], Any]:
        return {("ntp", kind): SimpleNamespace(name=f"seed-3/{name}") for kind, name in names.items()}

    seed: Any = SimpleNamespace(
        seed=3, size="full", recipe=RECIPES["full"], models=stages(mid="mid", rl="rl"),
        measured=stages(mid="measured-mid", rl="measured-rl"), curves={"ntp": SimpleNamespace(name="seed-3/curve")},
    )  # fmt: skip
    outputs = {f"seed-3/{name.partition('/')[0]}": tmp_path / name.partition("/")[0] for name in files}
    found = lab_results.collect(seed, outputs, {"mid": 1.5}, {"torch": ["2"]}, ["ab"])
    assert found["recipe"] == asdict(RECIPES["full"])
    rows = [tuple(row[key] for key in ("arm", "stage", "metric", "step", "value")) for row in found["measurements"]]
    norms = [row for row in rows if row[2] == "grad_norm"]
    assert norms == [("ntp", "mid", "grad_norm", 2 * n, 2 * n - 0.5) for n in range(1, 21)]  # means of two steps each
    assert [row for row in rows if row not in norms] == [
        ("ntp", "mid", "greedy_all", None, 0.25), ("ntp", "rl", "greedy_all", None, 0.75),
        ("ntp", "mid", "greedy_all", 0, 0.0), ("ntp", "mid", "greedy_all", 40, 0.25),
        ("ntp", "mid", "loss_heldout", 0, 2.0), ("ntp", "mid", "loss_heldout", 40, 1.5),
        ("ntp", "rl", "train_reward", 1, 0.5), ("ntp", "rl", "train_entropy", 1, 3.0),
    ]  # fmt: skip
    assert re.search(r"^ntp +rl +- +- +75.0 %", lab_results.table(found), re.MULTILINE)
    lab_results.write(tmp_path, found)
    assert read([tmp_path]).curve("ntp", "mid", "loss_heldout") == {3: [(0, 2.0), (40, 1.5)]}


def test_results_are_read_by_others(tmp_path: Path) -> None:
    """Every number that was written, as another Parquet reader sees it; seeds in any order, one of them twice."""
    records = [made_up(7), made_up(2)]
    write(tmp_path, made_up(2, better=0.3), *records)
    frame = polars.read_parquet(tmp_path / "results.parquet")
    assert frame.columns == ["seed", "arm", "stage", "metric", "step", "value"]
    expected = [{"seed": record["seed"]} | row for record in reversed(records) for row in record["measurements"]]
    assert frame.to_dicts() == [{name: row[name] for name in frame.columns} for row in expected]
    about = json.loads(polars.read_parquet_metadata(tmp_path / "results.parquet")["seeds"])
    assert about == [{key: record[key] for key in lab_results.ABOUT} for record in reversed(records)]
    assert [path.name for path in tmp_path.iterdir()] == ["results.parquet"]


def test_results_by_seed_and_step(tmp_path: Path) -> None:
    record = made_up(4)
    rows = [entry("ntp", "mid", "x", 0.25), entry("ntp", "mid", "x", 0.2, 90), entry("ntp", "mid", "x", 0.1, 10)]
    results = read([write(tmp_path, record | {"measurements": rows})])
    assert results.get("ntp", "mid", "x") == {4: 0.25}
    assert results.curve("ntp", "mid", "x") == {4: [(10, 0.1), (90, 0.2)]}
    assert (results.seeds, results.seconds, results.code) == ([4], {4: 3600.0}, ["ab" * 32])


def test_interval_by_hand() -> None:
    # mean 2, standard deviation 1, t = 4.302653 with two degrees of freedom (any printed table)
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert (found.high, found.low) == pytest.approx((2 + 2.484138, 2 - 2.484138), rel=1e-6)
    # t = 2.776445 with four; p of t = mean / (deviation / root of 3) = 3.464 with two is 0.0742
    four = estimate([0.0, 1.0, 2.0, 3.0, 4.0])
    assert four.half_width == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert found.p == pytest.approx(0.0742, abs=1e-4)
    assert estimate([1.0, 2.0, 3.0], null=2.0).p == pytest.approx(1.0)
    assert estimate([1.0, 2.0, 3.0], null=2.0).low == pytest.approx(found.low)


def test_no_interval_without_spread() -> None:
    assert estimate([3.0]) == Estimate(3.0, None, None, None)
    assert estimate([0.1 + 0.2, 0.3, 0.3]) == Estimate(pytest.approx(0.3), None, None, None)
    for values in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="expected finite numbers"):
            estimate(values)


def test_pairs_are_of_the_same_seeds() -> None:
    assert paired({3: 1.0, 1: 5.0, 7: 2.0}, {1: 2.0, 3: 4.0, 9: 1.0}) == {1: 3.0, 3: -3.0}


def test_holm_by_hand() -> None:
    # sorted: 0.001 <= 0.05/4, 0.012 <= 0.05/3, 0.03 > 0.05/2 ends it, although 0.04 <= 0.05/1
    assert holm([0.04, 0.001, None, 0.03, 0.012]) == [False, True, False, False, True]
    assert holm([0.06]) == [False]
    assert holm([]) == []


CLAIM = Claim("A is above B", "1 and 0", difference(("a", "mid"), ("b", "mid")))


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict", "text"),
    [
        # differences of 4, 5, 6 points: 5 ± 2.484
        ([0.54, 0.56, 0.57], [0.50, 0.51, 0.51], REPRODUCED, "+5.0 (+2.5 to +7.5) points"),
        ([0.50, 0.51, 0.51], [0.54, 0.56, 0.57], CONTRADICTED, "-5.0 (-7.5 to -2.5) points"),
        # 1, 2, 6: 3 ± 6.57
        ([0.51, 0.52, 0.56], [0.50, 0.50, 0.50], UNDECIDED, "+3.0 (-3.6 to +9.6) points"),
        ([0.90], [0.10], ONE_SEED, "+80.0 points"),
        ([0.6, 0.6], [0.5, 0.5], UNDECIDED, "+10.0 points"),
        ([0.9, 0.8, 0.7], [], MISSING, "–"),
    ],
)
def test_verdicts(ours: list[float], theirs: list[float], verdict: str, text: str) -> None:
    measured = {("a", "mid"): ours, ("b", "mid"): theirs}
    finding = judge(CLAIM, results_of({key: values for key, values in measured.items() if values}))
    assert (finding.verdict, found_text(finding)) == (verdict, text)


def test_lead_that_is_lost() -> None:
    results = results_of(
        {
            ("kd", "mid"): [0.6, 0.7],
            ("remit", "mid"): [0.5, 0.5],
            ("kd", "sft"): [0.6, 0.6],
            ("remit", "sft"): [0.6, 0.7],
        }
    )
    assert lost_lead(results) == pytest.approx({0: 10.0, 1: 30.0})


@pytest.mark.parametrize(
    ("lead", "later", "verdict"),
    [(3, 1, REPRODUCED), (3, 6, CONTRADICTED), (-3, -7, PREMISE), (0, -7, PREMISE)],
)
def test_a_lead_that_is_not_there_is_not_lost(lead: float, later: float, verdict: str) -> None:
    noise = [0.001, -0.002, 0.002, -0.001]
    claim = next(claim for claim in CLAIMS if claim.values is lost_lead)
    results = results_of(
        {
            ("kd", "mid"): [0.5 + lead / 100 + value for value in noise],
            ("remit", "mid"): [0.5] * 4,
            ("kd", "sft"): [0.5 + later / 100 + value / 2 for value in noise],
            ("remit", "sft"): [0.5] * 4,
        }
    )
    finding = judge(claim, results)
    assert finding.verdict == verdict
    assert is_counted(finding) == (verdict != PREMISE)


def test_first_step() -> None:
    curve = [(100, 0.2), (200, 0.4), (300, 0.3), (400, 0.6)]
    assert first_step(curve, 0.3, rising=True) == pytest.approx(150)
    assert first_step(curve, 0.1, rising=True) == 100
    assert first_step(curve, 0.5, rising=True) == pytest.approx(300 + 100 * 2 / 3)
    assert first_step(curve, 0.7, rising=True) is None
    assert first_step([(10, 3.0), (20, 1.0)], 2.0, rising=False) == pytest.approx(15)


def test_tokens_saved() -> None:
    results = Results([0, 1, 2], "full")
    ntp = {
        0: [(0, 0.0), (100, 0.1), (200, 0.3), (600, 0.5)],
        1: [(0, 0.0), (300, 0.5), (600, 0.5)],  # is there half-way already: it is not held against ReMiT's curve
        2: [(0, 0.0), (300, 0.6), (600, 0.9)],
    }
    remit = {
        0: [(0, 0.0), (100, 0.5), (600, 0.6)],
        1: [(0, 0.0), (100, 0.5), (600, 0.6)],
        2: [(0, 0.0), (100, 0.1), (600, 0.6)],  # behind: NTP has its end after half of the steps
    }
    results.curves["ntp", "mid", "greedy_all"], results.curves["remit", "mid", "greedy_all"] = ntp, remit
    saved = tokens_saved("greedy_all", True)(results)
    assert saved == pytest.approx({0: math.log(6), 1: math.log(3), 2: -math.log(2)})
    results.curves["ntp", "mid", "greedy_all"], results.curves["remit", "mid", "greedy_all"] = remit, ntp
    assert tokens_saved("greedy_all", True)(results) == pytest.approx({seed: -value for seed, value in saved.items()})
    falling = {seed: [(step, 1 - value) for step, value in curve] for seed, curve in ntp.items()}
    results.curves["ntp", "mid", "loss"] = falling
    results.curves["remit", "mid", "loss"] = {s: [(step, 1 - value) for step, value in c] for s, c in remit.items()}
    assert tokens_saved("loss", False)(results) == pytest.approx(saved)
    results.curves["ntp", "mid", "greedy_all"], results.curves["remit", "mid", "greedy_all"] = ntp, remit
    claim = next(claim for claim in CLAIMS if claim.figure == 6)
    assert found_text(judge(claim, results)).startswith("× 2.08 (")  # cube root of 9
    table = next(
        table for table in make_tables(results, [judge(claim, results)]) if table.title.startswith("The paper")
    )
    assert table.rows[0][-1] == "not decided; 6 lies inside the interval"


def test_collapse_is_below_half() -> None:
    results = Results([0], "full")
    results.curves["remit", "mid", "grad_norm"] = {0: [(100, 9.0), (800, 2.0), (1000, 4.0)], 1: [(1000, 1.0)]}
    results.curves["no-clip", "mid", "grad_norm"] = {0: [(100, 9.0), (1000, 1.0)], 1: [(1000, 0.0)]}
    # a norm of zero is a collapse, not a seed to leave out
    assert collapsed_norm(results) == pytest.approx({0: math.log(3), 1: math.log(1000)})
    claim = next(claim for claim in CLAIMS if claim.values is collapsed_norm)
    halves = {seed: [(1000, 1.0 + 0.01 * seed)] for seed in range(4)}
    for size, verdict in ((0.1, REPRODUCED), (0.5, UNDECIDED), (0.9, CONTRADICTED)):
        noise = [1.001, 0.999, 1.002, 0.998]
        results.curves["remit", "mid", "grad_norm"] = halves
        results.curves["no-clip", "mid", "grad_norm"] = {
            seed: [(1000, size * curve[0][1] * noise[seed])] for seed, curve in halves.items()
        }
        assert judge(claim, results).verdict == verdict


def test_made_up_results(lab: Path) -> None:
    results = read([lab])
    found = {finding.claim.text: finding for finding in judge_all(results)}
    assert found["ReMiT is above NTP after mid-training"].verdict == REPRODUCED
    assert found["ReMiT is above NTP after mid-training"].agree == 5
    assert found["ReMiT is above NTP after mid-training"].survives
    assert found["KD is above ReMiT right after mid-training"].verdict == CONTRADICTED
    assert found["ReMiT² is above ReMiT"].verdict == CONTRADICTED
    assert found["Without the clip the gradient norm collapses"].verdict == REPRODUCED
    assert found["A post-trained reference is better than a plain one: ReMiT is above NTP-guided"].verdict == REPRODUCED
    assert all(finding.verdict != MISSING for finding in found.values())


def test_claims_that_rest_on_what_is_not_shown(tmp_path: Path) -> None:
    """RL that lowers accuracy: the rows that rest on it are marked."""
    records = [made_up(seed) for seed in range(5)]
    for record in records:
        after = {row["stage"]: row for row in record["measurements"] if row["arm"] == "ntp"
                 and row["metric"] == "greedy_all" and row["step"] is None}  # fmt: skip
        after["rl"]["value"] = after["dpo"]["value"] - random.Random(record["seed"]).gauss(0.05, 0.01)
    results = read([write(tmp_path / "lab", *records)])
    rows = {row[0]: row[-1] for table in make_tables(results, judge_all(results))[:3] for row in table.rows}
    assert rows["RL itself raises accuracy: above the model before it"] == "no, the other way round"
    assert rows["ReMiT is above SFT-guided"] == "reproduced *; rests on what is not shown"
    assert rows["ReMiT is above RHO-1"] == "reproduced *"


def test_differences_are_paired(lab: Path) -> None:
    """A cell of each table from the seeds' values by hand."""
    results = read([lab])
    tables = {table.title: table for table in make_tables(results, judge_all(results))}
    kd, ntp = (np.array(list(results.get(arm, "mid", "greedy_all").values())) for arm in ("kd", "ntp"))
    for title, values, sign in (("After mid-training", kd, ""), ("Differences from NTP", kd - ntp, "+")):
        low, high = stats.t.interval(0.95, 4, np.mean(100 * values), stats.sem(100 * values))
        (row,) = [row for row in tables[title].rows if row[0] == "KD"]
        expected = f"{np.mean(100 * values):{sign}.1f} ± {(high - low) / 2:.1f}"
        assert row[tables[title].columns.index("both, %")] == expected
    assert cell("loss_notes", {1: 0.5}, signed=True) == "+0.5000"
    assert cell("loss_notes", {}) == "–"


def test_seed_by_seed(lab: Path) -> None:
    results = read([lab])
    (table,) = [table for table in make_tables(results, judge_all(results)) if table.title == "Seed by seed"]
    (row,) = [row for row in table.rows if row[:2] == ["ReMiT", "RL"]]
    assert row[2:] == [f"{100 * results.get('remit', 'rl', 'greedy_all')[seed]:.1f}" for seed in results.seeds]


def test_one_seed_claims_nothing(tmp_path: Path) -> None:
    results = read([write(tmp_path / "lab", made_up(3, better=0.4))])
    findings = judge_all(results)
    assert {finding.verdict for finding in findings} == {ONE_SEED}
    assert not any(finding.survives for finding in findings)
    text = to_markdown(results, findings)
    assert "One seed has no interval" in text
    assert "The 18 claims of the paper: 18 not decided (one seed)." in text
    assert "±" not in text.split("## After mid-training")[1].split("## Set-up")[0].replace("± half", "")
    bars = [bar for plot in make_plots(results) for trace in plot.figure.data for bar in (trace.error_x, trace.error_y)]
    assert not any(length for bar in bars for length in bar.array or ())
    assert not any(trace.fill for plot in make_plots(results) for trace in plot.figure.data)


def test_missing_arms_and_no_numbers(tmp_path: Path) -> None:
    records = [made_up(seed) for seed in range(4)]
    for record in records:
        record["measurements"] = [row for row in record["measurements"] if row["arm"] not in ("kd", "remit2")]
    for row in records[2]["measurements"]:
        if (row["arm"], row["stage"], row["metric"], row["step"]) == ("remit", "mid", "greedy_all", None):
            row["value"] = math.nan
    results = read([write(tmp_path / "lab", *records)])
    assert results.left_out == ["seed 2, remit, mid, greedy_all: the value is nan, not a finite number"]
    findings = {finding.claim.text: finding for finding in judge_all(results)}
    assert findings["ReMiT² is above ReMiT"].verdict == MISSING
    assert "| 3 of 3; without seed 2 |" in to_markdown(results, list(findings.values()))
    assert list(findings["ReMiT is above NTP after mid-training"].values) == [0, 1, 3]
    text = to_markdown(results, list(findings.values()))
    assert text.endswith("\n## Left out\n\n- seed 2, remit, mid, greedy_all: the value is nan, not a finite number\n")
    assert re.search(r"ReMiT² is above ReMiT; [^|]* \| above \(shown in a figure\) \| – \| – \| not measured", text)
    assert text.count("nan") == 1


def test_nothing_but_ntp(tmp_path: Path) -> None:
    record = made_up(0)
    record["measurements"] = [row for row in record["measurements"] if row["arm"] == "ntp" and row["step"] is None]
    results = read([write(tmp_path / "lab", record)])
    assert lead(results, judge_all(results))[0].endswith("The 18 claims of the paper: 18 not measured.")
    assert "Difference in accuracy" not in to_page(results, judge_all(results))


def changed(seed: int, **values: Any) -> dict[str, Any]:
    return made_up(seed) | values


def spoil_table(lab: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    file = lab / "results.parquet"
    pq.write_table(change(pq.read_table(file)), file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lab: write(lab, changed(1, size="small")), "the size of seed 1 differs"),
        (lambda lab: write(lab, changed(1, recipe={"layers": 4})), "the recipe of seed 1 differs"),
        (lambda lab: (lab / "results.parquet").write_bytes(b"PAR1"), "damaged"),
        (lambda lab: (lab / "results.parquet").unlink(), "is missing, expected a folder of make lab"),
        (
            lambda lab: spoil_table(lab, lambda table: table.drop_columns(["step"])),
            "damaged (columns pyarrow.Field<seed",
        ),
        (lambda lab: spoil_table(lab, lambda table: table.cast(table.schema.remove_metadata())), "damaged"),
        (
            lambda lab: spoil_table(lab, lambda table: table.replace_schema_metadata({"seeds": "[]"})),
            "damaged (metadata of a seed",
        ),
        (lambda lab: write(lab.parent / "other", made_up(1)), "seed 1 is in another folder too"),
    ],
)
def test_results_of_no_use(
    lab: Path, spoil: Callable[[Path], Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(lab)
    with pytest.raises(SystemExit) as exit_:
        main([str(folder) for folder in sorted(lab.parent.iterdir())])
    error = str(exit_.value.code)  # a text: printed to stderr, with exit code 1
    assert message in error
    assert error.startswith("error: ")
    assert "\n" not in error
    assert not list(lab.glob("report*"))


def test_seeds_of_several_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one", made_up(0), made_up(1))
    other = write(tmp_path / "other", made_up(2))
    main([str(one), str(other), "--html", str(tmp_path / "x.html")])
    assert capsys.readouterr().out.startswith("3 seeds at size full. The 18 claims of the paper: ")
    assert (one / "report.md").read_text(encoding="utf-8").count("| 3 of 3 |") >= 2
    assert (tmp_path / "x.html").exists()
    assert sorted(path.name for path in one.iterdir()) == ["report.md", "results.parquet"]


def test_a_summary_by_hand_stays(lab: Path) -> None:
    report = lab / "report.md"
    main([str(lab)])
    first = report.read_text(encoding="utf-8")
    assert MARK not in first
    report.write_text(f"# By hand\n\nIn short.\n\n{MARK}\n\nold\n", encoding="utf-8")
    for _ in range(2):
        main([str(lab)])
        tables = first[first.index("## The paper's claims") :]
        assert report.read_text(encoding="utf-8") == f"# By hand\n\nIn short.\n\n{MARK}\n\n{tables}"


def test_committed_report_is_that_of_its_results(tmp_path: Path) -> None:
    """Its tables are what the command writes; each number of the summary by hand is in them."""
    results = read([COMMITTED])
    assert (results.seeds, results.size, len(results.code)) == ([1, 2, 3, 4, 5], "full", 1)
    recipe = json.loads(json.dumps(asdict(RECIPES["full"])))
    later = ["rkl", "switch"]  # arms that joined after those seeds had run, and change nothing for the others
    assert results.recipe | {"arms": [*results.recipe["arms"], *later]} == recipe
    committed = (COMMITTED / "report.md").read_text(encoding="utf-8")
    summary, _, tables = committed.partition(MARK)
    findings = judge_all(results)
    assert to_markdown(results, findings, summary) == committed
    assert "3 reproduced, 2 contradicted, 13 not decided." in lead(results, findings)[0]
    assert "3 are reproduced, 2 are contradicted and 13" in summary
    page = (COMMITTED.parent / "lab.md").read_text(encoding="utf-8")
    for text in (summary, page[page.index("In short") : page.index("The rules for the claims")]):
        numbers = re.findall(r"[-+][\d.]+ \([-+][\d.]+ to [-+][\d.]+\)|[-+][\d.]+ ± [\d.]+\d", text)
        assert len(numbers) > 5
        assert not [number for number in numbers if number not in tables]
    rl = estimate(list(difference(("ntp", "rl"), ("ntp", "dpo"), "sampled_all")(results).values()))
    assert f"the paired interval is {rl.low:.1f} to {rl.high:.1f} points" in " ".join(page.split())
    assert set(PICTURES) <= {plot.title for plot in make_plots(results)}
    assert set(PICTURES.values()) == {file.name for file in COMMITTED.glob("*.png")}


def test_switch_has_a_table_where_it_was_measured(tmp_path: Path) -> None:
    """By hand: 3 points above NTP in every seed but for a little, and no row of what was not measured."""
    records = [made_up(seed) for seed in range(4)]
    for record, ahead in zip(records, (0.029, 0.03, 0.031, 0.03)):
        values = {
            (row["arm"], row["metric"]): row["value"]
            for row in record["measurements"]
            if row["stage"] == "mid" and row["step"] is None
        }
        level = values["ntp", "greedy_all"] + ahead
        record["measurements"] += [
            entry("switch", "mid", "greedy_all", level),
            entry("switch", "mid", "gate_without_topk", 0.01, 100),
        ]
    results = read([write(tmp_path / "lab", *records)])
    (table,) = [table for table in make_tables(results, judge_all(results)) if table.title == "Switch distillation"]
    assert [row[4] for row in table.rows if row[2] == "–"] == [
        "not measured"
    ] * 4  # no reverse KL, no losses of the arm
    assert table.rows[0][1:4] == ["44.7 and 26.1 (reasoning)", "+3.0 (+2.9 to +3.1) points", "4 of 4"]
    assert table.rows[0][4].startswith("reproduced")
    assert results.curve("switch", "mid", "gate_without_topk") == {seed: [(100, 0.01)] for seed in range(4)}


def test_page_of_the_switch_is_that_of_its_results() -> None:
    results = read([COMMITTED.parent / "lab-switch"])
    assert results.size == "small"
    assert results.seeds == sorted({1, 2, 3, 4, 5} & set(results.seeds))
    page = (COMMITTED.parent / "lab-switch.md").read_text(encoding="utf-8")
    findings = judge_all(results)
    for table in (claims_table(results, findings, "switch"), differences_table(results, "ntp")):
        assert markdown_table(table) in page
    summary, tables = page[page.index("In short") : page.index("## What ran")], page[page.index("## What was found") :]
    numbers = re.findall(r"[-+][\d.]+ \([-+][\d.]+ to [-+][\d.]+\)|[-+][\d.]+ ± [\d.]+\d", summary)
    assert len(numbers) > 3
    assert not [number for number in numbers if number not in tables]


def test_markdown_tables_are_whole(lab: Path) -> None:
    results = read([lab])
    text = to_markdown(results, judge_all(results))
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block
    assert len(re.findall(r"^## ", text, re.MULTILINE)) == 11
    assert lead(results, judge_all(results))[0] in text


# texts of a plot that its picture, or the picture's box in the page, cuts off
CUT = """() => [...document.querySelectorAll('.plotly-graph-div')].flatMap((plot) => {
  const box = plot.getBoundingClientRect();
  return [...plot.querySelectorAll('text')].filter((text) => {
    const own = text.getBoundingClientRect();
    return own.width && (own.left < box.left - 1 || own.right > box.right + 1 || own.top < box.top - 1 || own.bottom > box.bottom + 1);
  }).map((text) => text.textContent);
})"""


@pytest.mark.parametrize(
    ("width", "scheme", "ink"), [(1280, "light", "rgb(29, 35, 41)"), (400, "dark", "rgb(230, 233, 236)")]
)
def test_page_in_a_browser(tmp_path: Path, lab: Path, browser: Browser, width: int, scheme: Any, ink: str) -> None:
    main([str(lab)])
    with open_page(browser, lab / "report.html", width, scheme) as opened:
        page = opened.page
        page.wait_for_function("document.querySelectorAll('.plots .main-svg').length >= 9")
        assert not opened.problems
        assert not opened.requests
        assert opened.overflow <= 0
        assert page.locator(".modebar").count() == 0 or not page.locator(".modebar").first.is_visible()
        assert page.evaluate(CUT) == []
        colors = "[...document.querySelectorAll('.plots .xtick text')].map((text) => getComputedStyle(text).fill)"
        assert set(page.evaluate(colors)) == {ink}
        data = "document.querySelector('.plotly-graph-div').data"
        # the seeds of nine arms minus NTP, and their means
        assert page.evaluate(f"{data}.map((trace) => trace.x.length)") == [5 * 9, 9]
        results = read([lab])
        pairs = paired(results.get("remit", "mid", "greedy_all"), results.get("ntp", "mid", "greedy_all"))
        values = 100 * np.array(list(pairs.values()))
        half = stats.t.ppf(0.975, 4) * stats.sem(values)
        assert page.evaluate(f"{data}[1].error_x.array")[0] == pytest.approx(half, rel=1e-9)
        assert page.evaluate(f"{data}[1].x")[0] == pytest.approx(values.mean(), rel=1e-9)
