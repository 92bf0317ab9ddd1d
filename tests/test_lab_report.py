"""The laboratory's report: statistics against scipy and by hand, verdicts, refusals, the Markdown and the page."""

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser
from scipy import stats

from pipelines.lab.recipe import RECIPES
from pipelines.lab.report.__main__ import main
from pipelines.lab.report.claims import (
    CLAIMS,
    CONTRADICTED,
    MISSING,
    ONE_SEED,
    PREMISE,
    REPRODUCED,
    UNDECIDED,
    Claim,
    collapsed_norm,
    difference,
    first_step,
    judge,
    judge_all,
    lost_lead,
    tokens_saved,
)
from pipelines.lab.report.data import Results, read_results
from pipelines.lab.report.page import to_html, to_markdown
from pipelines.lab.report.plots import make_plots
from pipelines.lab.report.sentences import (
    checks_sentence,
    control_sentence,
    others_sentence,
    power_sentence,
    sft_sentence,
    summary,
)
from pipelines.lab.report.statistics import Estimate, detectable, estimate, holm, paired, power, probability
from pipelines.lab.report.tables import found_text, make_tables

COMMITTED = Path(__file__).resolve().parent.parent / "docs" / "lab-report"
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
    (folder / "results").mkdir(parents=True, exist_ok=True)
    for record in records:
        (folder / "results" / f"seed-{record['seed']}.json").write_text(json.dumps(record), encoding="utf-8")
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


def test_interval_by_hand() -> None:
    # mean 2, standard deviation 1, t = 4.302653 with two degrees of freedom (any printed table)
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.num_seeds) == (2.0, 3)
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert (found.high, found.low) == pytest.approx((2 + 2.484138, 2 - 2.484138), rel=1e-6)
    # t = 2.776445 with four; p of t = mean / (deviation / root of 3) = 3.464 with two is 0.0742
    found = estimate([0.0, 1.0, 2.0, 3.0, 4.0])
    assert found.half_width == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert probability([1.0, 2.0, 3.0]) == pytest.approx(0.0742, abs=1e-4)
    assert probability([1.0, 2.0, 3.0], null=2.0) == pytest.approx(1.0)


def test_no_interval_without_spread() -> None:
    assert estimate([3.0]) == Estimate(3.0, None, None, 1)
    assert estimate([0.1 + 0.2, 0.3, 0.3]).low is None
    assert probability([0.3, 0.3]) is None
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


@pytest.mark.parametrize(("num", "share"), [(2, 0.8), (3, 0.3), (5, 0.8), (9, 0.95)])
def test_power_against_simulated_seeds(num: int, share: float) -> None:
    difference = detectable(3.0, num, share)
    assert power(difference, 3.0, num) == pytest.approx(share, abs=1e-6)
    assert power(-difference, 3.0, num) == pytest.approx(share, abs=1e-6)
    assert power(0.0, 3.0, num) == pytest.approx(0.05, abs=3e-4)
    seeds = np.random.default_rng(num).normal(difference, 3.0, (40_000, num))
    decided = stats.ttest_1samp(seeds, 0, axis=1).pvalue < 0.05
    assert decided.mean() == pytest.approx(share, abs=0.008)


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
    assert (finding.p is None) == (verdict == PREMISE)


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
    results = read_results([lab])
    found = {finding.claim.text: finding for finding in judge_all(results)}
    assert found["ReMiT is above NTP after mid-training"].verdict == REPRODUCED
    assert found["ReMiT is above NTP after mid-training"].agree == 5
    assert found["ReMiT is above NTP after mid-training"].survives
    assert found["KD is above ReMiT right after mid-training"].verdict == CONTRADICTED
    assert found["ReMiT² is above ReMiT"].verdict == CONTRADICTED
    assert found["Without the clip the gradient norm collapses"].verdict == REPRODUCED
    assert found["A post-trained reference is better than a plain one: ReMiT is above NTP-guided"].verdict == REPRODUCED
    assert all(finding.verdict != MISSING for finding in found.values())
    assert "a plain later model as the reference does not explain all of it" in control_sentence(list(found.values()))


def test_control_decides_what_is_said(tmp_path: Path) -> None:
    records = [made_up(seed) for seed in range(5)]
    for record in records:  # the control gains as much
        remit = {row["metric"]: row["value"] for row in record["measurements"] if row["arm"] == "remit"
                 and row["stage"] == "mid" and row["step"] is None}  # fmt: skip
        for row in record["measurements"]:
            if row["arm"] == "ntp-guided":
                row["value"] = remit[row["metric"]] + random.Random(record["seed"]).gauss(0, 0.01)
    findings = judge_all(read_results([write(tmp_path / "lab", *records)]))
    assert "may be that of any later model" in control_sentence(findings)


def test_a_control_that_is_beaten_is_no_gain(tmp_path: Path) -> None:
    """ReMiT below NTP and above NTP-guided."""
    records = [made_up(seed, better=-0.05) for seed in range(5)]
    for record in records:
        for row in record["measurements"]:
            if row["arm"] == "ntp-guided":
                row["value"] -= 0.1
    findings = judge_all(read_results([write(tmp_path / "lab", *records)]))
    assert "above the control NTP-guided, but below NTP: " in control_sentence(findings)


def test_what_the_checks_do_not_show_is_said(tmp_path: Path) -> None:
    """RL that lowers accuracy: the summary says so first, and the rows that rest on it are marked."""
    records = [made_up(seed) for seed in range(5)]
    for record in records:
        after = {row["stage"]: row for row in record["measurements"] if row["arm"] == "ntp"
                 and row["metric"] == "greedy_all" and row["step"] is None}  # fmt: skip
        after["rl"]["value"] = after["dpo"]["value"] - random.Random(record["seed"]).gauss(0.05, 0.01)
    results = read_results([write(tmp_path / "lab", *records)])
    findings = judge_all(results)
    assert "RL itself raises accuracy: above the model before it: -" in checks_sentence(findings)
    assert checks_sentence(findings) in summary(results, findings)
    (row,) = [row for row in make_tables(results, findings)[0].rows if row[0] == "ReMiT is above SFT-guided"]
    assert row[-1].endswith("; supposes what is not shown")


def test_arms_that_no_claim_is_about(lab: Path) -> None:
    """By hand from the files: which arms have an interval beside NTP's."""
    results = read_results([lab])
    sentence = others_sentence(results)
    for arm, name in (("kd", "KD"), ("rho1", "RHO-1"), ("no-clip", "ReMiT, no clip"), ("remit2", "ReMiT²")):
        gains = [
            100 * (results.get(arm, "mid", "greedy_all")[s] - results.get("ntp", "mid", "greedy_all")[s])
            for s in results.seeds
        ]
        low, high = stats.t.interval(0.95, 4, np.mean(gains), stats.sem(gains))
        assert (f"{name} {np.mean(gains):+.1f} ({low:+.1f} to {high:+.1f})" in sentence) == (low * high > 0)
    assert "ReMiT +" not in sentence
    assert "standard deviation of" in power_sentence(results)
    assert sft_sentence(judge_all(results))


def test_seed_by_seed(lab: Path) -> None:
    results = read_results([lab])
    (table,) = [table for table in make_tables(results, judge_all(results)) if table.title == "Seed by seed"]
    (row,) = [row for row in table.rows if row[:2] == ["ReMiT", "RL"]]
    assert row[2:] == [f"{100 * results.get('remit', 'rl', 'greedy_all')[seed]:.1f}" for seed in results.seeds]


def test_one_seed_claims_nothing(tmp_path: Path) -> None:
    results = read_results([write(tmp_path / "lab", made_up(3, better=0.4))])
    findings = judge_all(results)
    assert {finding.verdict for finding in findings} == {ONE_SEED}
    assert not any(finding.survives for finding in findings)
    text = to_markdown(results, findings)
    assert "One seed has no interval" in text
    assert "0 are reproduced, 0 contradicted" in text
    assert "±" not in text.split("## After mid-training")[1].split("## Set-up")[0].replace("± half", "")
    assert all(low is None for plot in make_plots(results) for series in plot.series for low in series.low)


def test_missing_arms_and_no_numbers(tmp_path: Path) -> None:
    records = [made_up(seed) for seed in range(4)]
    for record in records:
        record["measurements"] = [row for row in record["measurements"] if row["arm"] not in ("kd", "remit2")]
    for row in records[2]["measurements"]:
        if (row["arm"], row["stage"], row["metric"], row["step"]) == ("remit", "mid", "greedy_all", None):
            row["value"] = math.nan
    results = read_results([write(tmp_path / "lab", *records)])
    assert results.left_out == ["seed 2, remit, mid, greedy_all: nan, no number"]
    findings = {finding.claim.text: finding for finding in judge_all(results)}
    assert findings["ReMiT² is above ReMiT"].verdict == MISSING
    assert "| 3 of 3; not of seed 2 |" in to_markdown(results, list(findings.values()))
    assert list(findings["ReMiT is above NTP after mid-training"].values) == [0, 1, 3]
    text = to_markdown(results, list(findings.values()))
    assert "seed 2, remit, mid, greedy\\_all" in text or "seed 2, remit, mid, greedy_all: nan" in text
    assert re.search(r"ReMiT² is above ReMiT; [^|]* \| above, by a figure \| – \| – \| not measured", text)
    assert "nan" not in text.replace("greedy_all: nan", "")


def test_nothing_but_ntp(tmp_path: Path) -> None:
    record = made_up(0)
    record["measurements"] = [row for row in record["measurements"] if row["arm"] == "ntp" and row["step"] is None]
    results = read_results([write(tmp_path / "lab", record)])
    text = to_markdown(results, judge_all(results))
    assert "whether a gain is due to post-training cannot be told" in text
    assert to_html(results, judge_all(results))


def changed(seed: int, **values: Any) -> dict[str, Any]:
    return made_up(seed) | values


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lab: write(lab, changed(1, size="small")), "its size differs"),
        (lambda lab: write(lab, changed(1, recipe={"layers": 4})), "its recipe differs"),
        (lambda lab: (lab / "results" / "seed-1.json").write_text("{"), "damaged"),
        (lambda lab: write(lab, changed(1, measurements=[entry("ntp", "mid", "x", "0.5")])), "value is '0.5'"),  # type: ignore[arg-type]
        (lambda lab: write(lab, changed(1, measurements=[{"arm": "ntp"}])), "damaged"),
        (lambda lab: (lab / "results" / "seed-01.json").write_text(json.dumps(made_up(1))), "is there twice"),
    ],
)
def test_results_of_no_use(
    lab: Path, spoil: Callable[[Path], Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(lab)
    with pytest.raises(SystemExit) as exit_:
        main([str(lab)])
    error = capsys.readouterr().err
    assert exit_.value.code == 1
    assert message in error
    assert error.count("\n") == 1


def test_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path)])
    assert exit_.value.code == 1
    assert "no results/seed-N.json" in capsys.readouterr().err


def test_seeds_of_several_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one", made_up(0), made_up(1))
    other = write(tmp_path / "other", made_up(2))
    main([str(one), str(other), "--html", str(tmp_path / "x.html")])
    assert capsys.readouterr().out.startswith("3 seeds at size full. Of 18 claims of the paper")
    assert (one / "report.md").read_text(encoding="utf-8").count("| 3 of 3 |") >= 2
    assert (tmp_path / "x.html").exists()


def test_committed_report_is_that_of_its_results(tmp_path: Path) -> None:
    results = read_results([COMMITTED])
    assert (results.seeds, results.size, len(results.code)) == ([1, 2, 3, 4, 5], "full", 1)
    assert results.recipe == json.loads(json.dumps(asdict(RECIPES["full"])))
    main([str(COMMITTED), "--html", str(tmp_path / "report.html"), "--markdown", str(tmp_path / "report.md")])
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == (COMMITTED / "report.md").read_text(encoding="utf-8")


def test_markdown_tables_are_whole(lab: Path) -> None:
    results = read_results([lab])
    text = to_markdown(results, judge_all(results))
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block
    assert len(re.findall(r"^## ", text, re.MULTILINE)) == 11
    assert summary(results, judge_all(results))[0] in text


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser(tmp_path: Path, lab: Path, browser: Browser, width: int, scheme: str) -> None:
    main([str(lab)])
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if not request.url.startswith("file:") else None)
    page.goto((lab / "report.html").as_uri())
    page.wait_for_function("document.querySelectorAll('.plot .main-svg').length >= 9")
    assert not problems
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    marks = page.evaluate("document.querySelector('.plot').data.map((trace) => trace.x.length)")
    assert marks == [5 * 9, 9]  # the seeds of nine arms beside NTP, and their means
    ends = page.evaluate("document.querySelector('.plot').data[1].error_x.array")
    results = read_results([lab])
    pairs = paired(results.get("remit", "mid", "greedy_all"), results.get("ntp", "mid", "greedy_all"))
    assert ends[0] == pytest.approx(100 * (estimate(list(pairs.values())).half_width or 0), rel=1e-3)
    page.close()
