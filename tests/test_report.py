"""remit report: the page's data against metrics.jsonl, thinning by hand, damaged and old runs, the page in Chromium."""

import html
import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from annotated import annotate
from annotated import run as train_run
from browser import open_page
from conftest import source_texts, write_corpus
from playwright.sync_api import Browser

from pipelines.report.data import read_run
from scorer.config import PackConfig
from scorer.pack import pack

Remit = Callable[..., tuple[int, str, str]]
ODD_NAME = '<b>שלום</b> & "😀" </script><img src=x onerror=alert(1)> %{x}'


def page_data(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(data)


def table_rows(page: Path) -> dict[str, list[str]]:
    """Cells of the tables by label; the mark of a difference is part of the label."""
    text = page.read_text(encoding="utf-8")
    rows = {}
    for row in re.findall(r"<tr[^>]*>(<th scope=\"row\">.*?)</tr>", text):
        label, *cells = [html.unescape(re.sub("<.*?>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)]
        rows[label] = cells
    return rows


def figures(step: int, **changes: object) -> dict:
    """What a step of the current trainer writes, in round numbers."""
    return {
        "step": step, "tokens": 100 * step, "predicted_tokens": 80, "loss": 4.0 - step / 8, "ntp_loss": 4.0 - step / 16,
        "weight_mean": 1.0 + step / 64, "weight_std": 0.125, "clipped_low": 0.25, "clipped_high": 0.125,
        "effective_tokens": 60.0, "weight_histogram": {"0.80": 20, "1.00": 40, "1.20": 20}, "delta_mean": 0.5,
        "delta_quantiles": {"0.05": -1.0, "0.5": 0.25, "0.95": 2.0}, "sources": {}, "grad_norm": 1.0 + step,
        "lr": 1e-3 / step, "tokens_per_second": 50.0, "data_wait_seconds": 0.5, "peak_memory_bytes": 3 * 2**30,
    } | changes  # fmt: skip


def write_run(out: Path, steps: list[dict], held_out: list[dict] | None = None, **settings: object) -> Path:
    out.mkdir(parents=True)
    (out / "run.json").write_text(json.dumps({"objective": "remit", "seed": 0} | settings), encoding="utf-8")
    for name, lines in (("metrics", steps), ("evaluation", held_out)):
        if lines is not None:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return out


def titles(data: dict) -> list[str]:
    return [plot["title"] for plot in data["plots"]]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, models: dict[str, Path]) -> list[Path]:
    """Two tiny runs of the trainer over three corpus files, with held-out losses."""
    folder = tmp_path_factory.mktemp("runs")
    for index in range(3):
        texts = [text[:60] for text in source_texts(20, seed=70 + index)]
        write_corpus(folder / "corpus" / f"{index} שלום.jsonl", texts)
    pack(PackConfig([str(folder / "corpus")], str(tokenizer_folder), folder / "packed", seq_len=24))

    def logprobs(row: dict) -> list:
        return [None, *(-(token % 50) / 8 for token in row["input_ids"][1:])]

    shards = annotate(folder / "packed", folder / "scored", logprobs, "packed", 1 / 64)
    for objective in ("ntp", "remit"):
        train_run(
            folder / objective, shards, models["base"], objective=objective, max_steps=7, eval_shards=str(shards),
            eval_every=3, learning_rate=1e-3,
        )  # fmt: skip
    return [folder / "ntp", folder / "remit"]


def test_figures_of_real_runs(tmp_path: Path, remit: Remit, real: list[Path]) -> None:
    page = tmp_path / "page.html"
    code, output, _ = remit("report", "--run", real[0], "--run", real[1], "--out", page)
    assert code == 0
    assert output.startswith(f"report of ntp (7 steps), remit (7 steps) -> {page}")
    data = page_data(page)
    for folder, shown in zip(real, data["runs"], strict=True):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert (shown["name"], shown["window"]) == (folder.name, 1)
        assert shown["step"] == [1, 2, 3, 4, 5, 6, 7]
        assert shown["tokens"] == [line["tokens"] for line in lines]
        for key in ("loss", "ntp_loss", "weight_mean", "clipped_low", "clipped_high", "grad_norm", "lr"):
            assert shown["curves"][key] == pytest.approx([line[key] for line in lines], rel=1e-5), key
        share = [line["effective_tokens"] / line["predicted_tokens"] for line in lines]
        assert shown["curves"]["effective_share"] == pytest.approx(share, rel=1e-5)
        assert len(shown["sources"]) == len(lines[0]["sources"]) > 1
        for source, curves in shown["sources"].items():
            for key in ("ntp_loss", "weight_mean"):
                want = [line["sources"].get(source, {}).get(key) for line in lines]
                assert curves[key] == [None if v is None else pytest.approx(v, rel=1e-5) for v in want]
        held_out = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
        assert shown["held_out"]["step"] == [line["step"] for line in held_out] == [0, 3, 6, 7]
        assert shown["held_out"]["loss"] == pytest.approx([line["loss"] for line in held_out], rel=1e-5)
        assert shown["held_out"]["tokens"] == [0, *(lines[step - 1]["tokens"] for step in (3, 6, 7))]
    ntp, remit_run = data["runs"]
    assert "delta_mean" not in ntp["curves"]
    lines = [json.loads(line) for line in (real[1] / "metrics.jsonl").read_text().splitlines()]
    for share in ("0.01", "0.5", "0.99"):
        want = [line["delta_quantiles"][share] for line in lines]
        assert remit_run["curves"][f"delta_quantile_{share}"] == pytest.approx(want, rel=1e-5)
    shares = dict(zip(remit_run["heat"]["centres"], remit_run["heat"]["shares"], strict=True))
    for column, line in enumerate(lines):
        for centre, values in shares.items():
            want = line["weight_histogram"].get(centre, 0) / line["predicted_tokens"]
            assert values[column] == pytest.approx(want, rel=1e-5)

    cells = table_rows(page)
    assert cells["state"] == ["finished", "finished"]
    assert cells["≠ objective"] == ["ntp", "remit"]
    assert cells["seed"] == ["0", "0"]
    assert cells["tokens"] == [f"{line['tokens']:,}" for line in (lines[-1], lines[-1])]
    settings = json.loads((real[1] / "run.json").read_text())
    assert cells["base_weights_sha256"] == [settings["base_weights_sha256"]] * 2
    assert cells["tokenizer › fingerprint"] == [settings["shards"]["tokenizer"]["fingerprint"]] * 2
    assert cells["references › rl › model"] == ["oracle", "oracle"]
    assert cells["references › rl › logprob_step"] == ["0.015625", "0.015625"]


def test_overlaid_lines_name_their_runs(tmp_path: Path, remit: Remit) -> None:
    a = write_run(tmp_path / "x" / "out", [figures(1), figures(2)], epsilon=0.2)
    b = write_run(tmp_path / "y" / "out", [figures(1), figures(2), figures(3)], epsilon="inf", extra=None)
    c = write_run(tmp_path / "third", [figures(1)], epsilon=0.2)
    assert remit("report", "--run", a, b, "--run", c, "--out", tmp_path / "page.html")[0] == 0
    data = page_data(tmp_path / "page.html")
    assert [run["name"] for run in data["runs"]] == ["x/out", "y/out", "third"]
    by_title = {plot["title"]: plot for plot in data["plots"]}
    assert [(line["run"], line["label"]) for line in by_title["Next-token loss"]["lines"]] == [
        (0, "x/out"), (1, "y/out"), (2, "third"),
    ]  # fmt: skip
    clipped = by_title["Clipped weights"]["lines"]
    assert [line["label"] for line in clipped][:2] == ["x/out, low", "x/out, high"]
    assert clipped[0]["dash"] != clipped[1]["dash"]
    cells = table_rows(tmp_path / "page.html")
    assert cells["≠ epsilon"] == ["0.2", "inf", "0.2"]
    assert cells["≠ extra"] == ["–", "null", "–"]
    # 100 tokens a step at 50 tokens per second are 2 seconds
    assert cells["hours of training, from tokens/s"] == ["0.00111", "0.00167", "0.000556"]
    assert data["runs"][1]["curves"]["data_wait_share"] == [0.25, 0.25, 0.25]
    assert data["runs"][1]["curves"]["effective_share"] == [0.75, 0.75, 0.75]


def test_thinning_by_hand(tmp_path: Path, remit: Remit) -> None:
    """2,000 points hold 4,001 steps as windows of three, the first one of two; 250 columns as windows of 17."""
    steps = [
        figures(step, ntp_loss=float(step % 7), weight_histogram={"0.95": step, "1.00": 1}) for step in range(1, 4002)
    ]
    steps[4000]["ntp_loss"] = 100.0
    del steps[3999]["ntp_loss"]
    steps[0]["ntp_loss"] = math.nan
    run = write_run(tmp_path / "long", steps, [{"step": 4000, "loss": 2.0, "tokens": 9.0}])
    assert remit("report", "--run", run, "--out", tmp_path / "page.html")[0] == 0
    (shown,) = page_data(tmp_path / "page.html")["runs"]
    assert shown["window"] == 3
    assert shown["step"] == [2, *range(5, 4002, 3)]
    assert shown["tokens"] == [100 * step for step in shown["step"]]
    losses = shown["curves"]["ntp_loss"]
    assert losses[0] == 2  # step 1 has no number, step 2 has 2
    assert losses[1] == pytest.approx((3 + 4 + 5) / 3)
    assert losses[2] == pytest.approx((6 + 0 + 1) / 3, rel=1e-5)
    assert losses[-1] == pytest.approx((3999 % 7 + 100) / 2)  # step 4000 has none
    assert shown["curves"]["grad_norm"][-1] == 4001  # the mean of 4000, 4001, 4002
    edges = shown["heat"]["edges"]
    assert edges["step"][:3] == [0.5, 6.5, 23.5]  # 4001 = 235 x 17 + 6
    assert (edges["step"][-1], edges["tokens"][0], edges["tokens"][-1]) == (4001.5, 0, 400_100)
    assert shown["heat"]["centres"] == ["0.95", "1.00"]
    assert shown["heat"]["shares"][1][0] == pytest.approx(6 / (1 + 2 + 3 + 4 + 5 + 6 + 6), rel=1e-5)
    assert shown["held_out"] == {"step": [4000], "tokens": [400_000], "loss": [2]}
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "4,001 steps in 1,334 points. Each is the mean over the 3 steps that end where it stands" in text


def test_rates_of_a_window_by_hand(tmp_path: Path, remit: Remit) -> None:
    """Windows of two steps. A step of 100 tokens at 50 per second and one at 1 per second are 200 tokens in 102
    seconds; a source counts by its tokens."""
    steps = []
    for step in range(1, 4001, 2):
        small, large = {"predicted_tokens": 1, "ntp_loss": 8.0, "weight_mean": 0.5}, {"predicted_tokens": 9, "ntp_loss": 3.0, "weight_mean": 1.5}  # fmt: skip
        steps.append(figures(step, data_wait_seconds=0.0, sources={"a": small, "b": {"ntp_loss": 1.0}}))
        late = {"a": large, "b": {"ntp_loss": 2.0}}
        steps.append(figures(step + 1, tokens_per_second=1.0, data_wait_seconds=51.0, sources=late))
    run = write_run(tmp_path / "run", steps)
    assert remit("report", "--run", run, "--out", tmp_path / "page.html")[0] == 0
    (shown,) = page_data(tmp_path / "page.html")["runs"]
    assert (shown["window"], shown["step"]) == (2, list(range(2, 4001, 2)))
    assert shown["curves"]["tokens_per_second"] == [pytest.approx(200 / 102, rel=1e-5)] * 2000
    assert shown["curves"]["data_wait_share"] == [pytest.approx(51 / 102, rel=1e-5)] * 2000
    assert shown["sources"]["a"]["ntp_loss"] == [pytest.approx(3.5)] * 2000
    assert shown["sources"]["a"]["weight_mean"] == [pytest.approx(1.4)] * 2000
    assert shown["sources"]["b"]["ntp_loss"] == [1.5] * 2000  # of a version that did not write the tokens of a source


def test_long_runs_give_a_small_page(tmp_path: Path, remit: Remit) -> None:
    """Four runs of 2,500 steps and 16 sources have as many points as four of 25,000: at most 2,000 each."""
    source = dict.fromkeys(("ntp_loss", "weight_mean"), 1 / 3)
    steps = [
        figures(step, **dict.fromkeys(("loss", "ntp_loss", "weight_mean", "grad_norm", "kd_loss"), 1 / (step + 2)))
        | {"sources": {f"folder-{index}": {**source, "ntp_loss": 1 / (step + index)} for index in range(16)}}
        for step in range(1, 2501)
    ]
    runs = [write_run(tmp_path / f"run-{index}", steps) for index in range(5)]
    assert remit("report", "--run", *runs, "--out", tmp_path / "page.html")[0] == 0
    assert (tmp_path / "page.html").stat().st_size < 10_000_000
    for shown in page_data(tmp_path / "page.html")["runs"]:
        assert shown["step"][-1] == 2500
        assert len(shown["step"]) <= 1600  # a fifth of 8,000


def test_runs_of_older_versions(tmp_path: Path, remit: Remit) -> None:
    """Figures that are missing, null or no numbers leave their plots out; nothing fails."""
    old = [
        {"step": 1, "tokens": 10, "loss": 2.0, "ntp_loss": 2.0, "lr": None, "grad_norm": "high", "weight_std": True},
        {"step": 2, "tokens": 20, "loss": 1.0, "ntp_loss": 1.5, "weight_histogram": [1], "delta_quantiles": {"a": 1}},
    ]
    run = write_run(tmp_path / "old", old, [{"step": 2, "loss": None}, {"step": 9, "loss": 1.25}])
    assert remit("report", "--run", run, "--out", tmp_path / "page.html")[0] == 0
    data = page_data(tmp_path / "page.html")
    assert titles(data) == ["Next-token loss", "Loss of the objective", "Held-out loss"]
    assert data["runs"][0]["curves"] == {"loss": [2, 1], "ntp_loss": [2, 1.5]}
    assert data["runs"][0]["held_out"] == {"step": [9], "tokens": [None], "loss": [1.25]}  # metrics end before it
    assert "Gradient norm; Learning rate" in (tmp_path / "page.html").read_text(encoding="utf-8")

    bare = write_run(tmp_path / "bare", [{"step": 1}])
    empty = write_run(tmp_path / "empty", [])
    none = write_run(tmp_path / "none", None)  # type: ignore[arg-type]
    assert remit("report", "--run", bare, empty, none, "--out", tmp_path / "page.html")[0] == 0
    assert titles(page_data(tmp_path / "page.html")) == []
    assert table_rows(tmp_path / "page.html")["state"] == ["not finished", "no step yet", "no step yet"]
    with_old = tmp_path / "both.html"
    new = write_run(tmp_path / "new", [figures(1), figures(2, kd_loss=0.5, missing_mass=0.125)])
    (new / "model").mkdir()
    assert remit("report", "--run", run, new, "--out", with_old)[0] == 0
    data = page_data(with_old)
    kd = next(plot for plot in data["plots"] if plot["title"] == "Distillation loss")
    assert [line["run"] for line in kd["lines"]] == [1]
    assert data["runs"][1]["curves"]["kd_loss"] == [None, 0.5]
    assert table_rows(with_old)["state"] == ["not finished", "finished"]


def test_a_source_that_comes_late(tmp_path: Path, remit: Remit) -> None:
    early, late = {"ntp_loss": 2.0, "weight_mean": 1.5}, {"ntp_loss": 3.0, "weight_mean": 0.5}
    steps = [
        figures(1, sources={"a": early}),
        figures(2, sources={"a": early, ODD_NAME: late}),
        figures(3, sources={ODD_NAME: late}),
    ]
    assert remit("report", "--run", write_run(tmp_path / "run", steps), "--out", tmp_path / "page.html")[0] == 0
    data = page_data(tmp_path / "page.html")
    assert data["runs"][0]["sources"] == {
        "a": {"ntp_loss": [2, 2, None], "weight_mean": [1.5, 1.5, None]},
        ODD_NAME: {"ntp_loss": [None, 3, 3], "weight_mean": [None, 0.5, 0.5]},
    }
    lines = next(plot for plot in data["plots"] if plot["title"] == "Next-token loss by corpus source: run")["lines"]
    assert [line["source"] for line in lines] == sorted(["a", ODD_NAME])


def test_weights_that_are_all_one_are_not_drawn(tmp_path: Path, remit: Remit) -> None:
    plain = {
        "weight_mean": 1.0, "weight_std": 0.0, "clipped_low": 0.0, "clipped_high": 0.0, "effective_tokens": 80.0,
        "weight_histogram": {"1.00": 80}, "delta_mean": None, "delta_quantiles": None,
    }  # fmt: skip
    sources = {name: {"ntp_loss": 1.0, "weight_mean": 1.0} for name in ("a", "b")}
    run = write_run(tmp_path / "ntp", [figures(1, **plain, sources=sources)], objective="ntp")
    assert remit("report", "--run", run, "--out", tmp_path / "page.html")[0] == 0
    assert titles(page_data(tmp_path / "page.html")) == [
        "Next-token loss", "Loss of the objective", "Gradient norm", "Learning rate", "Throughput", "Waiting for data",
        "Peak memory", "Next-token loss by corpus source: ntp",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "tail", [b'{"step": 3, "tok', '{"step": 3, "name": "é'.encode()[:-1], b"[3]", b"{}", b"\x00\x00"]
)
def test_damaged_last_line(tmp_path: Path, remit: Remit, tail: bytes) -> None:
    run = write_run(tmp_path / "run", [figures(1), figures(2)])
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(tail)
    code, output, _ = remit("report", "--run", run, "--out", tmp_path / "page.html")
    assert (code, "run (2 steps, not finished)" in output) == (0, True)
    assert page_data(tmp_path / "page.html")["runs"][0]["step"] == [1, 2]
    assert table_rows(tmp_path / "page.html")["left out"] == [
        "metrics.jsonl: line 3 is not a JSON object with a step; left out, as the last one"
    ]
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b"\n" + json.dumps(figures(3)).encode() + b"\n")
    code, _, error = remit("report", "--run", run, "--out", tmp_path / "page.html")
    assert (code, "metrics.jsonl: line 3 is not a JSON object with a step, and lines follow it" in error) == (1, True)


@pytest.mark.parametrize("step", [1, 2])
def test_steps_that_go_back(tmp_path: Path, remit: Remit, step: int) -> None:
    """Two runs in one file would draw a curve that is neither's."""
    run = write_run(tmp_path / "run", [figures(1), figures(2), figures(step), figures(3)])
    code, _, error = remit("report", "--run", run, "--out", tmp_path / "page.html")
    assert (code, f"metrics.jsonl: line 3 has step {step}, the one before it 2, and lines" in error) == (1, True)


def test_steps_that_are_missing(tmp_path: Path, remit: Remit) -> None:
    """The one after a gap has no time of its own: the tokens since the line before it are of several steps."""
    run = write_run(tmp_path / "run", [figures(step) for step in (1, 2, 4, 5, 9)])
    assert remit("report", "--run", run, "--out", tmp_path / "page.html")[0] == 0
    assert table_rows(tmp_path / "page.html")["steps"] == ["5; metrics.jsonl lacks 3, 6 to 8"]
    own = read_run(run)
    waits = own.curves["data_wait_share"]
    assert [value is None for value in waits] == [False, False, True, False, True]
    assert own.hours == pytest.approx(sum(100 / figures(step)["tokens_per_second"] for step in (1, 2, 5)) / 3600)


def test_names_that_are_no_unicode(tmp_path: Path, remit: Remit) -> None:
    name = os.fsdecode(b"run-\xff")
    run = write_run(tmp_path / name, [figures(1)], note="\ud800")
    code, output, _ = remit("report", "--run", run, "--out", tmp_path / "page.html")
    assert (code, "report of run-\\udcff (1 steps" in output) == (0, True)
    assert table_rows(tmp_path / "page.html")["note"] == ["\ufffd"]
    assert page_data(tmp_path / "page.html")["runs"][0]["name"] == "run-\ufffd"


def test_held_out_loss_of_the_exported_model(tmp_path: Path, remit: Remit) -> None:
    lines = [{"step": 0, "loss": 3.0}, {"step": 2, "loss": 2.4119, "exported_loss": 2.503}]
    rounded = write_run(tmp_path / "rounded", [figures(1), figures(2)], lines)
    lines = [{"step": 0, "loss": 3.0}, {"step": 2, "loss": 2.4, "exported_loss": 2.4}]
    same = write_run(tmp_path / "same", [figures(1), figures(2)], lines)
    assert remit("report", "--run", rounded, same, "--out", tmp_path / "page.html")[0] == 0
    assert table_rows(tmp_path / "page.html")["held-out loss, last"] == [
        "2.5030 (step 2, of the exported model; 2.4119 before rounding)", "2.4000 (step 2)",
    ]  # fmt: skip
    plot = next(p for p in page_data(tmp_path / "page.html")["plots"] if p["title"] == "Held-out loss")
    assert "before rounding" in plot["note"]
    assert remit("report", "--run", same, "--out", tmp_path / "page.html")[0] == 0
    plot = next(p for p in page_data(tmp_path / "page.html")["plots"] if p["title"] == "Held-out loss")
    assert "before rounding" not in plot["note"]


def test_held_out_losses_that_do_not_compare(tmp_path: Path, remit: Remit) -> None:
    def evaluated(name: str, *sets: dict, **settings: object) -> Path:
        lines = [{"step": step, "loss": 2.0, **own} for step, own in enumerate(sets)]
        return write_run(tmp_path / name, [figures(1), figures(2)], lines, **{"context": "packed"} | settings)

    one = {"tokens": 1234.0, "manifest_sha256": "ab" * 32}
    same, again = evaluated("same", one, one), evaluated("again", one)
    other = evaluated("other", {"tokens": 1234.0, "manifest_sha256": "cd" * 32})
    before = evaluated("before", {"tokens": 1234.0})  # by an older version
    changed = evaluated("changed", one, {"tokens": 99.0})
    elsewhere = evaluated("elsewhere", one, context="document")
    for runs, compare in (
        ((same, again, before), True),
        ((same, other), False),
        ((changed,), False),
        ((same, elsewhere), False),
    ):
        assert remit("report", "--run", *runs, "--out", tmp_path / "page.html")[0] == 0
        plot = next(p for p in page_data(tmp_path / "page.html")["plots"] if p["title"] == "Held-out loss")
        assert ("do not compare them" not in plot["note"]) is compare, runs
    assert remit("report", "--run", same, changed, "--out", tmp_path / "page.html")[0] == 0
    assert table_rows(tmp_path / "page.html")["held-out tokens"] == [
        "1,234 (manifest abababababab)", "1,234 (manifest abababababab); 99",
    ]  # fmt: skip


def test_what_is_no_run(tmp_path: Path, remit: Remit, packed: Path) -> None:
    run = write_run(tmp_path / "run", [figures(1)])
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "run.json").write_text("[1]")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "run.json").write_text('{"a')
    out = tmp_path / "page.html"
    for options, code, message in (
        (("--run", packed), 1, "holds no run.json, so it is not a run of remit train; give the --out of remit train"),
        (("--run", run, tmp_path / "missing"), 1, "missing: no such folder"),
        (("--run", run / "metrics.jsonl"), 1, "is a file; give the --out of remit train"),
        (("--run", tmp_path / "odd"), 1, "run.json: is not a JSON object"),
        (("--run", tmp_path / "torn"), 1, "run.json: cannot be read"),
        ((), 2, "--run is not given"),
        (("--run", run, "--run", tmp_path / "run" / ".." / "run"), 2, "is given twice"),
        (("--run", run, "--out", run / "metrics.jsonl"), 2, "expected the name of a page"),
        (("--run", run, "--out", tmp_path / "none" / "page.html"), 2, "its folder does not exist"),
    ):
        got, _, error = remit("report", "--out", out, *options)
        words = " ".join(error.replace("│", " ").split())
        assert (got, message in words) == (code, True), error
    assert not out.exists()
    assert json.loads((run / "metrics.jsonl").read_text())["step"] == 1


PLOTS_DRAWN = """() => [...document.querySelectorAll('.plot')].map(box =>
    [box.querySelectorAll('svg .scatterlayer .js-line, svg .heatmaplayer image').length, box.clientWidth])"""
INK_AND_PAPER = """() => [getComputedStyle(document.querySelector('.plot .xtick text')).fill,
    getComputedStyle(document.querySelector('td')).color, getComputedStyle(document.body).backgroundColor]"""


def luminance(color: str) -> float:
    """Relative luminance of a CSS color rgb(r, g, b), as the contrast formula of WCAG has it."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, real: list[Path]) -> dict[str, Path]:
    """The page of the two real runs; one of odd names and a long run."""
    from pipelines.report.page import write_report
    from pipelines.settings import ReportConfig

    folder = tmp_path_factory.mktemp("pages")
    sources = {
        name: {"ntp_loss": 1.0 + i / 8, "weight_mean": 1.0 + i / 64} for i, name in enumerate([ODD_NAME, "x" * 90])
    }
    many = sources | {f"folder-{index:02d}/with/a/path": {"ntp_loss": 2.0, "weight_mean": 0.5} for index in range(14)}
    steps = [figures(step, sources=many, kd_loss=0.5, missing_mass=0.125) for step in range(1, 3000)]
    odd = write_run(
        folder / ODD_NAME.replace("/", "_"),
        steps,
        note=ODD_NAME,
        shards={"references": {ODD_NAME: {"model": ODD_NAME}}},
    )
    single = write_run(folder / "single", [figures(1)])
    write_report(ReportConfig([real], folder / "real.html"))
    write_report(ReportConfig([[odd, single]], folder / "odd.html"))
    return {"real": folder / "real.html", "odd": folder / "odd.html"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["real", "odd"])
def test_page_in_a_browser(browser: Browser, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    data = page_data(pages[name])
    with open_page(browser, pages[name], width, scheme) as opened:  # type: ignore[arg-type]
        drawn = opened.page.evaluate(PLOTS_DRAWN)
        assert len(drawn) == len(data["plots"])
        for plot, (shapes, box_width) in zip(data["plots"], drawn):
            assert shapes >= (1 if plot["kind"] == "heat" else len(plot["lines"])), plot["title"]
            assert 250 < box_width < width
        assert opened.overflow == 0
        for ink in opened.page.evaluate(INK_AND_PAPER)[:2]:
            paper = opened.page.evaluate(INK_AND_PAPER)[2]
            light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) > 7
            assert (luminance(paper) < 0.1) is (scheme == "dark")
        assert opened.page.locator("img").count() == 0
        if name == "odd":
            assert ODD_NAME.replace("/", "_") in opened.page.locator("thead bdi").first.inner_text()
            legend = opened.page.evaluate("[...document.querySelectorAll('.legendtext')].map(e => e.textContent)")
            assert any("onerror" in text for text in legend)
        assert (opened.problems, opened.requests) == ([], [])


def until(holds: Callable[[], bool]) -> None:
    """Ask again until it holds, for ten seconds; the page itself forbids the evaluation of strings."""
    for _ in range(100):
        if holds():
            return
        time.sleep(0.1)
    pytest.fail("it does not hold after ten seconds")


def test_pointing_at_curves(tmp_path: Path, browser: Browser, remit: Remit) -> None:
    """Runs whose points stand at different steps each say where theirs is; a name is never read as a format."""
    shorter = write_run(tmp_path / "b %{x}", [figures(step) for step in range(1, 51)])
    every_other = write_run(tmp_path / "every-other", [figures(step) for step in range(2, 101, 2)])
    each = write_run(tmp_path / "each", [figures(step) for step in range(1, 102)])
    for runs, suffixes in (((each, shorter), ["", ""]), ((each, every_other), [" at 31", " at (30|32)"])):
        assert remit("report", "--run", *runs, "--out", tmp_path / "page.html")[0] == 0
        with open_page(browser, tmp_path / "page.html") as opened:
            box = opened.page.locator(".plot").first.locator(".nsewdrag").first.bounding_box()
            assert box is not None
            # the axis goes from 1 to 101
            opened.page.mouse.move(box["x"] + box["width"] * 30 / 100, box["y"] + box["height"] / 2)
            texts = "[...document.querySelectorAll('.hoverlayer text')].map(text => text.textContent)"
            until(lambda page=opened.page, texts=texts: len(page.evaluate(texts)) == 3)
            title, *lines = opened.page.evaluate(texts)
            assert title == "31"
            for line, run, suffix in zip(lines, runs, suffixes, strict=True):
                assert re.fullmatch(re.escape(f"{run.name} : ") + r"2\.\d+" + suffix, line), line


def test_more_runs_than_colours(tmp_path: Path, browser: Browser, remit: Remit) -> None:
    """No two of sixteen runs look the same."""
    runs = [write_run(tmp_path / f"run-{index:02}", [figures(1), figures(2)]) for index in range(16)]
    assert remit("report", "--run", *runs, "--out", tmp_path / "page.html")[0] == 0
    with open_page(browser, tmp_path / "page.html") as opened:
        drawn = opened.page.evaluate(
            "[...document.querySelectorAll('.plot')].filter(plot => plot.data.length >= 16)"
            ".map(plot => plot.data.map(trace => trace.line.color + trace.line.dash))"
        )
        swatches = opened.page.evaluate("[...document.querySelectorAll('.runs .swatch')].map(s => s.style.background)")
        assert len(set(swatches)) == 16
    assert len(drawn) >= 10
    assert all(len(set(looks)) == len(looks) for looks in drawn)


def test_only_the_scripts_of_the_page_run(browser: Browser, pages: dict[str, Path]) -> None:
    with open_page(browser, pages["odd"]) as opened:
        opened.page.evaluate(
            "() => { const made = document.createElement('script'); made.textContent = 'document.title = \"pwned\"';"
            " document.body.append(made); }"
        )
        assert opened.page.title() != "pwned"
        assert any("Content Security Policy" in problem for problem in opened.problems)


def test_controls_of_the_page(browser: Browser, pages: dict[str, Path]) -> None:
    data = page_data(pages["real"])
    values = "() => document.querySelector('.plot').data.map(trace => [trace.visible, Array.from(trace.x)])"
    with open_page(browser, pages["real"]) as opened:
        page = opened.page
        steps, tokens = [run["step"] for run in data["runs"]], [run["tokens"] for run in data["runs"]]
        assert page.evaluate(values) == [[True, steps[0]], [True, steps[1]]]
        page.get_by_role("radio", name="tokens").check()
        assert page.evaluate(values) == [[True, tokens[0]], [True, tokens[1]]]
        heat = next(index for index, plot in enumerate(data["plots"]) if plot["kind"] == "heat")
        box = page.locator(".plot").nth(heat)
        assert box.evaluate("box => Array.from(box.data[0].x)") == data["runs"][1]["heat"]["edges"]["tokens"]
        page.get_by_role("checkbox", name="remit").uncheck()
        assert page.evaluate(values) == [[True, tokens[0]], [False, tokens[1]]]
        assert not box.is_visible()
        page.get_by_role("checkbox", name="remit").check()
        assert box.is_visible()
        ink = page.evaluate(INK_AND_PAPER)[0]
        page.emulate_media(color_scheme="dark")
        until(lambda: page.evaluate(INK_AND_PAPER)[0] != ink)
        page.set_viewport_size({"width": 400, "height": 800})
        until(lambda: page.locator(".plot .main-svg").first.bounding_box()["width"] < 400)
        assert opened.overflow == 0
        assert opened.problems == []


def test_a_source_has_the_same_colour_in_all_plots(tmp_path: Path, remit: Remit) -> None:
    def line(step: int, *names: str) -> dict:
        own = {"predicted_tokens": 10, "ntp_loss": 2.0, "weight_mean": 1.0 + step / 10}
        return figures(step) | {"sources": dict.fromkeys(names, own)}

    one = write_run(tmp_path / "one", [line(1, "b", "c"), line(2, "a", "c")])
    other = write_run(tmp_path / "other", [line(1, "c", "b"), line(2, "b", "c")])
    assert remit("report", "--run", one, other, "--out", tmp_path / "page.html")[0] == 0
    plots = [plot for plot in page_data(tmp_path / "page.html")["plots"] if "by corpus source" in plot["title"]]
    found = {(entry["label"], entry["color"]) for plot in plots for entry in plot["lines"]}
    assert len(plots) == 4
    assert found == {("a", 0), ("b", 1), ("c", 2)}
