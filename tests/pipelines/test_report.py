"""remit report: the page's figures against metrics.jsonl, thinning by hand, damaged and old runs, the page in Chromium."""

import base64
import html
import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from annotated import annotate
from annotated import run as train_run
from browser import open_page
from conftest import source_texts, write_corpus
from playwright.sync_api import Browser

from pipelines.report.tables import duration
from scorer.config import PackConfig
from scorer.pack import pack

Remit = Callable[..., tuple[int, str, str]]
ODD_NAME = '<b>שלום</b> & "😀" </script><img src=x onerror=alert(1)> %{x}'


def decoded(value: object) -> object:
    """JSON of plotly with its arrays as lists; a number that is not there as None."""
    if isinstance(value, dict) and "bdata" in value:
        array = np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
        rows = [int(size) for size in str(value.get("shape", len(array))).split(",")]
        return np.where(np.isnan(array), None, array).reshape(rows).tolist()
    if isinstance(value, dict):
        return {key: decoded(entry) for key, entry in value.items()}
    return [decoded(entry) for entry in value] if isinstance(value, list) else value


def panels(page: Path) -> dict[str, list[dict]]:
    """Traces by the title of their panel, in the order of the page. Each has its name, y (and z), steps, tokens."""
    text, found = page.read_text(encoding="utf-8"), {}
    for call in re.finditer(r'Plotly\.newPlot\(\s*"figure-\d+-\d+",\s*', text):
        data, end = json.JSONDecoder().raw_decode(text, call.end())
        layout, _ = json.JSONDecoder().raw_decode(text, text.index("{", end))
        tokens = layout["updatemenus"][0]["buttons"][1]["args"][0]["x"]
        for trace, at in zip(decoded(data), tokens, strict=True):
            number = int(trace["yaxis"].removeprefix("y") or 1)
            title = layout["annotations"][number - 1]["text"]
            named = {"name": html.unescape(trace.get("name", "")), "steps": trace["x"], "tokens": at}
            found.setdefault(title, []).append(trace | named)
    return found


def by_name(traces: list[dict], key: str = "y") -> dict[str, list]:
    return {trace["name"]: trace[key] for trace in traces}


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
    of_training = {} if "stage" in settings else {"objective": "remit"}
    (out / "run.json").write_text(json.dumps(of_training | {"seed": 0} | settings), encoding="utf-8")
    for name, lines in (("metrics", steps), ("evaluation", held_out)):
        if lines is not None:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return out


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


FIGURES = {
    "Next-token loss": "ntp_loss", "Loss of the objective": "loss", "Mean weight": "weight_mean", "Gradient norm": "grad_norm",
    "Learning rate": "lr", "Throughput": "tokens_per_second", "Peak memory": "peak_memory_bytes",
    "Standard deviation of the weights": "weight_std",
}  # fmt: skip


def test_figures_of_real_runs(tmp_path: Path, remit: Remit, real: list[Path]) -> None:
    page = tmp_path / "page.html"
    code, output, _ = remit("report", "--run", real[0], "--run", real[1], "--out", page)
    assert code == 0
    assert output.startswith(f"report of ntp (7 steps), remit (7 steps) -> {page}")
    found = panels(page)
    for folder in real:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for title, key in FIGURES.items():
            (trace,) = [trace for trace in found[title] if trace["name"] == folder.name]
            assert trace["steps"] == [1, 2, 3, 4, 5, 6, 7]
            assert trace["tokens"] == [line["tokens"] for line in lines]
            assert trace["y"] == pytest.approx([line[key] for line in lines], rel=1e-6), key
        share = [line["effective_tokens"] / line["predicted_tokens"] for line in lines]
        assert by_name(found["Effective tokens"])[folder.name] == pytest.approx(share, rel=1e-6)
        held_out = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
        (trace,) = [trace for trace in found["Held-out loss"] if trace["name"] == folder.name]
        assert trace["steps"] == [line["step"] for line in held_out] == [0, 3, 6, 7]
        assert trace["y"] == pytest.approx([line["loss"] for line in held_out], rel=1e-6)
        assert trace["tokens"] == [0, *(lines[step - 1]["tokens"] for step in (3, 6, 7))]
        (trace,) = [trace for trace in found["Held-out loss"] if trace["name"] == f"{folder.name}, exported"]
        assert (trace["steps"], trace["y"]) == ([7], pytest.approx([held_out[-1]["exported_loss"]], rel=1e-6))
    assert list(by_name(found["Mean excess loss"])) == ["remit"]
    of_ntp = {trace["name"] for trace in found["Next-token loss by corpus source"][:3]}
    assert len(of_ntp) == len(found["Next-token loss by corpus source"]) / 2 == 3
    for key, title in (("ntp_loss", "Next-token loss"), ("weight_mean", "Mean weight")):
        for source, values in by_name(found[f"{title} by corpus source"][-3:]).items():
            want = [line["sources"].get(source, {}).get(key) for line in lines]
            assert values == [None if v is None else pytest.approx(v, rel=1e-6) for v in want]
    for side, name in (("low", "remit"), ("high", "remit, high")):
        want = [line[f"clipped_{side}"] for line in lines]
        assert by_name(found["Clipped weights"])[name] == pytest.approx(want, rel=1e-6)
    for share in ("0.01", "0.5", "0.99"):
        want = [line["delta_quantiles"][share] for line in lines]
        assert by_name(found["Quantiles of the excess loss"])[f"{float(share):.0%}"] == pytest.approx(want, rel=1e-6)
    (heat,) = found["Share of the tokens at each weight"]
    assert heat["tokens"] == [line["tokens"] for line in lines]
    for centre, shares in zip(heat["y"], heat["z"], strict=True):
        want = [line["weight_histogram"].get(f"{centre:.2f}", 0) / line["predicted_tokens"] for line in lines]
        assert shares == pytest.approx(want, rel=1e-6)

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
    assert cells["corpus › files"] == ["3", "3"]


def test_overlaid_lines_name_their_runs(tmp_path: Path, remit: Remit) -> None:
    a = write_run(tmp_path / "x" / "out", [figures(1), figures(2)], epsilon=0.2)
    b = write_run(tmp_path / "y" / "out", [figures(1), figures(2), figures(3)], epsilon="inf", extra=None)
    c = write_run(tmp_path / "third", [figures(1)], epsilon=0.2)
    assert remit("report", "--run", a, b, "--run", c, "--out", tmp_path / "page.html")[0] == 0
    found = panels(tmp_path / "page.html")
    assert list(by_name(found["Next-token loss"])) == ["x/out", "y/out", "third"]
    low, high = found["Clipped weights"][:2]
    assert (low["name"], high["name"]) == ("x/out", "x/out, high")
    assert (low["line"]["color"], low["line"]["dash"]) == (high["line"]["color"], "solid")
    assert high["line"]["dash"] == "dot"
    cells = table_rows(tmp_path / "page.html")
    assert cells["≠ epsilon"] == ["0.2", "inf", "0.2"]
    assert cells["≠ extra"] == ["–", "null", "–"]
    # 100 tokens a step at 50 tokens per second are 2 seconds
    assert cells["time of training, from tokens/s"] == ["4 s", "6 s", "2 s"]
    assert by_name(found["Waiting for data"])["y/out"] == [0.25, 0.25, 0.25]
    assert by_name(found["Effective tokens"])["y/out"] == [0.75, 0.75, 0.75]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.25, "0.25 s"), (59.4, "59.4 s"), (59.6, "1 min 0 s"), (297, "4 min 57 s"), (3599.6, "1 h 0 min"),
     (11_520, "3 h 12 min"), (86_399, "1 d 0 h"), (190_800, "2 d 5 h")],
)  # fmt: skip
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_thinning_by_hand(tmp_path: Path, remit: Remit) -> None:
    """1,000 points hold 2,001 steps as windows of three; of 2,000 the first would have two, as here of 2,003."""
    steps = [
        figures(step, ntp_loss=float(step % 7), weight_histogram={"0.95": step, "1.00": 1}) for step in range(1, 2004)
    ]
    steps[2002]["ntp_loss"] = 100.0
    del steps[2001]["ntp_loss"]
    steps[0]["ntp_loss"] = math.nan
    run = write_run(tmp_path / "long", steps, [{"step": 2002, "loss": 2.0, "tokens": 9.0}])
    assert remit("report", "--run", run, "--out", tmp_path / "page.html")[0] == 0
    found = panels(tmp_path / "page.html")
    (shown,) = found["Next-token loss"]
    assert shown["steps"] == [2, *range(5, 2004, 3)]
    assert shown["tokens"] == [100 * step for step in shown["steps"]]
    losses = shown["y"]
    assert losses[0] == 2  # step 1 has no number, step 2 has 2
    assert losses[1] == pytest.approx((3 + 4 + 5) / 3)
    assert losses[2] == pytest.approx((6 + 0 + 1) / 3)
    assert losses[-1] == pytest.approx((2001 % 7 + 100) / 2)  # step 2002 has none
    assert found["Gradient norm"][0]["y"][-1] == 2003  # the mean of 2002, 2003, 2004
    (heat,) = found["Share of the tokens at each weight"]
    assert heat["steps"] == shown["steps"]
    assert heat["y"] == pytest.approx([0.95, 1.0])
    assert [heat["z"][1][0], heat["z"][1][-1]] == pytest.approx([2 / (1 + 2 + 2), 3 / (2001 + 2002 + 2003 + 3)])
    (held_out,) = found["Held-out loss"]
    assert (held_out["steps"], held_out["tokens"], held_out["y"]) == ([2002], [200_200], [2])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "2,003 steps in 668 points. Each is the mean over the 3 steps that end where it stands" in text


def test_rates_of_a_window_by_hand(tmp_path: Path, remit: Remit) -> None:
    """Windows of two steps. A step of 100 tokens at 50 per second and one at 1 per second are 200 tokens in 102
    seconds; a source counts by its tokens."""
    steps = []
    for step in range(1, 2001, 2):
        small, large = {"predicted_tokens": 1, "ntp_loss": 8.0, "weight_mean": 0.5}, {"predicted_tokens": 9, "ntp_loss": 3.0, "weight_mean": 1.5}  # fmt: skip
        steps.append(figures(step, data_wait_seconds=0.0, sources={"a": small, "b": {"ntp_loss": 1.0}}))
        late = {"a": large, "b": {"ntp_loss": 2.0}}
        steps.append(figures(step + 1, tokens_per_second=1.0, data_wait_seconds=51.0, sources=late))
    run = write_run(tmp_path / "run", steps)
    assert remit("report", "--run", run, "--out", tmp_path / "page.html")[0] == 0
    found = panels(tmp_path / "page.html")
    assert found["Throughput"][0]["steps"] == list(range(2, 2001, 2))
    assert found["Throughput"][0]["y"] == [pytest.approx(200 / 102)] * 1000
    assert found["Waiting for data"][0]["y"] == [pytest.approx(51 / 102)] * 1000
    losses, weights = (by_name(found[f"{what} by corpus source"]) for what in ("Next-token loss", "Mean weight"))
    assert (losses["a"], weights["a"]) == ([pytest.approx(3.5)] * 1000, [pytest.approx(1.4)] * 1000)
    assert losses["b"] == [1.5] * 1000  # of a version that did not write the tokens of a source


def test_long_runs_give_a_small_page(tmp_path: Path, remit: Remit) -> None:
    """Five runs of 2,500 steps and 16 sources have as many points as five of 25,000."""
    source = dict.fromkeys(("ntp_loss", "weight_mean"), 1 / 3)
    steps = [
        figures(step, **dict.fromkeys(("loss", "ntp_loss", "weight_mean", "grad_norm", "kd_loss"), 1 / (step + 2)))
        | {"sources": {f"folder-{index}": {**source, "ntp_loss": 1 / (step + index)} for index in range(16)}}
        for step in range(1, 2501)
    ]
    runs = [write_run(tmp_path / f"run-{index}", steps) for index in range(5)]
    assert remit("report", "--run", *runs, "--out", tmp_path / "page.html")[0] == 0
    assert (tmp_path / "page.html").stat().st_size < 10_000_000
    for trace in panels(tmp_path / "page.html")["Next-token loss"]:
        assert trace["steps"][-1] == 2500
        assert len(trace["steps"]) <= 800  # a fifth of 4,000


def test_runs_of_older_versions(tmp_path: Path, remit: Remit) -> None:
    """Figures that are missing, null or no numbers leave their panels out; nothing fails."""
    old = [
        {"step": 1, "tokens": 10, "loss": 2.0, "ntp_loss": 2.0, "lr": None, "grad_norm": "high"},
        {"step": 2, "tokens": 20, "loss": 1.0, "ntp_loss": 1.5, "weight_histogram": None, "delta_quantiles": None},
    ]
    run = write_run(tmp_path / "old", old, [{"step": 2, "loss": None}, {"step": 9, "loss": 1.25}])
    page = tmp_path / "page.html"
    assert remit("report", "--run", run, "--out", page)[0] == 0
    found = panels(page)
    assert list(found) == ["Held-out loss", "Next-token loss", "Loss of the objective"]
    assert (found["Loss of the objective"][0]["y"], found["Next-token loss"][0]["y"]) == ([2, 1], [2, 1.5])
    assert [found["Held-out loss"][0][key] for key in ("steps", "y")] == [[9], [1.25]]
    assert found["Held-out loss"][0]["tokens"] in ([None], [math.nan])  # metrics end before it
    assert "Gradient norm; Learning rate" in page.read_text(encoding="utf-8")

    bare = write_run(tmp_path / "bare", [{"step": 1}])
    empty = write_run(tmp_path / "empty", [])
    none = write_run(tmp_path / "none", None)  # type: ignore[arg-type]
    assert remit("report", "--run", bare, empty, none, "--out", page)[0] == 0
    assert panels(page) == {}
    assert table_rows(page)["state"] == ["not finished", "no step yet", "no step yet"]
    new = write_run(tmp_path / "new", [figures(1), figures(2, kd_loss=0.5, missing_mass=0.125)])
    (new / "model").mkdir()
    assert remit("report", "--run", run, new, empty, "--out", page)[0] == 0
    assert by_name(panels(page)["Distillation loss"]) == {"new": [None, 0.5]}
    assert table_rows(page)["state"] == ["not finished", "finished", "no step yet"]


def test_a_source_that_comes_late_and_one_colour_for_each(tmp_path: Path, remit: Remit) -> None:
    early, late = {"ntp_loss": 2.0, "weight_mean": 1.5}, {"ntp_loss": 3.0, "weight_mean": 0.5}
    one = write_run(
        tmp_path / "one", [figures(1, sources={"a": early}), figures(2, sources={"a": early, ODD_NAME: late}),
                           figures(3, sources={ODD_NAME: late})],
    )  # fmt: skip
    other = write_run(tmp_path / "other", [figures(1, sources={"b": early, "a": late})])
    assert remit("report", "--run", one, other, "--out", tmp_path / "page.html")[0] == 0
    found = panels(tmp_path / "page.html")
    traces = found["Next-token loss by corpus source"]
    assert [trace["name"][-20:] for trace in traces] == [*sorted(["a", ODD_NAME[-20:]], reverse=True), "a", "b"]
    assert {trace["name"][-1]: trace["y"] for trace in traces[:2]} == {"a": [2, 2, None], "}": [None, 3, 3]}
    colors = {(trace["name"], trace["line"]["color"]) for trace in (*traces, *found["Mean weight by corpus source"])}
    assert len(colors) == len({name for name, _ in colors}) == 3
    of_runs = {trace["line"]["color"] for trace in found["Next-token loss"]}
    assert of_runs.isdisjoint(color for _, color in colors)


def test_weights_that_are_all_one_are_not_drawn(tmp_path: Path, remit: Remit) -> None:
    plain = {
        "weight_mean": 1.0, "weight_std": 0.0, "clipped_low": 0.0, "clipped_high": 0.0, "effective_tokens": 80.0,
        "weight_histogram": {"1.00": 80}, "delta_mean": None, "delta_quantiles": None,
    }  # fmt: skip
    sources = {name: {"ntp_loss": 1.0, "weight_mean": 1.0} for name in ("a", "b")}
    run = write_run(tmp_path / "ntp", [figures(1, **plain, sources=sources)], objective="ntp")
    assert remit("report", "--run", run, "--out", tmp_path / "page.html")[0] == 0
    assert list(panels(tmp_path / "page.html")) == [
        "Next-token loss", "Loss of the objective", "Gradient norm", "Learning rate", "Throughput", "Waiting for data",
        "Peak memory", "Next-token loss by corpus source",
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
    assert panels(tmp_path / "page.html")["Next-token loss"][0]["steps"] == [1, 2]
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
    waits = panels(tmp_path / "page.html")["Waiting for data"][0]["y"]
    assert [value is None for value in waits] == [False, False, True, False, True]
    assert table_rows(tmp_path / "page.html")["time of training, from tokens/s"] == ["6 s"]  # steps 1, 2 and 5


def test_names_that_are_no_unicode(tmp_path: Path, remit: Remit) -> None:
    name = os.fsdecode(b"run-\xff")
    run = write_run(tmp_path / name, [figures(1)], note="\ud800")
    code, output, _ = remit("report", "--run", run, "--out", tmp_path / "page.html")
    assert (code, "report of run-\ufffd (1 step" in output) == (0, True)
    assert table_rows(tmp_path / "page.html")["note"] == ["\ufffd"]
    assert list(by_name(panels(tmp_path / "page.html")["Next-token loss"])) == ["run-\ufffd"]


def test_held_out_loss_of_the_exported_model(tmp_path: Path, remit: Remit) -> None:
    lines = [{"step": 0, "loss": 3.0}, {"step": 2, "loss": 2.4119, "exported_loss": 2.503}]
    rounded = write_run(tmp_path / "rounded", [figures(1), figures(2)], lines)
    lines = [{"step": 0, "loss": 3.0}, {"step": 2, "loss": 2.4, "exported_loss": 2.4}]
    same = write_run(tmp_path / "same", [figures(1), figures(2)], lines)
    unexported = write_run(tmp_path / "unexported", [figures(1)], lines[:1])
    assert remit("report", "--run", rounded, same, "--out", tmp_path / "page.html")[0] == 0
    assert table_rows(tmp_path / "page.html")["held-out loss, last"] == [
        "2.5030 (step 2, of the exported model; 2.4119 before rounding)", "2.4000 (step 2, of the exported model)",
    ]  # fmt: skip
    found = panels(tmp_path / "page.html")["Held-out loss"]
    assert [(trace["name"], trace["steps"], trace["mode"]) for trace in found][:2] == [
        ("rounded", [0, 2], "lines+markers"), ("rounded, exported", [2], "markers"),
    ]  # fmt: skip
    assert found[1]["y"] == pytest.approx([2.503])
    assert remit("report", "--run", unexported, "--out", tmp_path / "page.html")[0] == 0
    assert table_rows(tmp_path / "page.html")["held-out loss, last"] == ["3.0000 (step 0, of the float32 weights)"]


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
        said = "do not compare them" in (tmp_path / "page.html").read_text(encoding="utf-8")
        assert said is not compare, runs
    assert remit("report", "--run", same, changed, "--out", tmp_path / "page.html")[0] == 0
    assert table_rows(tmp_path / "page.html")["held-out tokens"] == [
        "1,234 (manifest abababababab)", "1,234 (manifest abababababab); 99 (manifest –)",
    ]  # fmt: skip


def test_what_is_no_run(tmp_path: Path, remit: Remit, packed: Path) -> None:
    run = write_run(tmp_path / "run", [figures(1)])
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "run.json").write_text("[1]")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "run.json").write_text('{"a')
    out = tmp_path / "page.html"
    for options, code, message in (
        (("--run", packed), 1, "holds no run.json, so it is a shard folder; give the --out of remit train"),
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


def rl_line(step: int, **changes: object) -> dict:
    """What TRL's GRPOTrainer logs for a step of remit rl, in round numbers."""
    return {
        "step": step, "loss": 0.5, "grad_norm": 2.0, "learning_rate": 1e-6, "num_tokens": 1000.0 * step,
        "completions/mean_length": 100.0 + step, "completions/clipped_ratio": 0.125, "rewards/answer_reward/mean": step / 100,
        "reward": step / 100, "reward_std": 0.25, "entropy": 1.5, "kl": 0.01, "epoch": step / 50,
    } | changes  # fmt: skip


def write_stages(folder: Path) -> list[Path]:
    """Runs of SFT, which logs every tenth step, of DPO, and two of RL; the second has a reward of its own."""
    settings = {"weights_sha256": "ab" * 32, "data_sha256": "cd" * 32, "log_every": 1}
    sft = [
        {"step": step, "loss": 2 - step / 100, "mean_token_accuracy": step / 100, "num_tokens": 50.0 * step, "learning_rate": 1e-5}
        for step in (10, 20, 30, 50)
    ]  # fmt: skip
    dpo = [
        {"step": step, "loss": 0.7 - step / 10, "rewards/accuracies": 0.75, "rewards/margins": 0.5, "rewards/chosen": 0.25,
         "rewards/rejected": -0.25, "num_tokens": 10.0 * step, "grad_norm": 1.0, "learning_rate": 1e-6}
        for step in (1, 2)
    ]  # fmt: skip
    own = [rl_line(step, correct_rate=0.5) for step in range(1, 31)]
    for line in own:
        del line["rewards/answer_reward/mean"]
    return [
        write_run(folder / "sft", sft, stage="sft", **settings | {"log_every": 10}),
        write_run(folder / "dpo", dpo, stage="dpo", **settings),
        write_run(folder / "rl-ntp", [rl_line(step) for step in range(1, 41)], stage="rl", **settings),
        write_run(folder / "rl-remit", own, stage="rl", reward_sha256="ef" * 32, **settings),
    ]


def test_post_training(tmp_path: Path, remit: Remit) -> None:
    """Losses of SFT and DPO, reward, correct rate and length of RL, each over the steps of its own runs."""
    runs = write_stages(tmp_path)
    page = tmp_path / "page.html"
    code, _, error = remit("report", "--run", *runs, "--out", page)
    assert code == 0, error
    found = panels(page)
    (sft,), (dpo,) = found["SFT loss"], found["DPO loss"]
    assert (sft["steps"], sft["tokens"], sft["y"]) == (
        [10, 20, 30, 50], [500, 1000, 1500, 2500], pytest.approx([1.9, 1.8, 1.7, 1.5]),
    )  # fmt: skip
    assert (dpo["steps"], dpo["y"]) == ([1, 2], pytest.approx([0.6, 0.5]))
    rewards, lengths, rates = (found[title] for title in ("Reward", "Length of the completions", "Correct rate"))
    assert list(by_name(rewards)) == list(by_name(lengths)) == list(by_name(rates)) == ["rl-ntp", "rl-remit"]
    assert rewards[0]["y"] == pytest.approx([step / 100 for step in range(1, 41)])
    assert lengths[1]["y"] == [100 + step for step in range(1, 31)]
    assert by_name(rates) == {"rl-ntp": rewards[0]["y"], "rl-remit": [0.5] * 30}
    assert by_name(found["Implicit rewards"]) == {"dpo": [0.25, 0.25], "dpo, rejected": [-0.25, -0.25]}
    assert list(by_name(found["Learning rate"])) == ["sft", "dpo", "rl-ntp", "rl-remit"]
    text = page.read_text(encoding="utf-8")
    assert [
        text.index(f"<h2>{title}") for title in ("Supervised", "Preferences", "Reinforcement", "Optimizer")
    ] == sorted(text.index(f"<h2>{title}") for title in ("Supervised", "Preferences", "Reinforcement", "Optimizer"))
    assert "Not drawn" not in text  # nothing of training is missed in runs that are none
    cells = table_rows(page)
    assert cells["objective"] == ["SFT", "DPO", "RL", "RL"]
    assert cells["steps"] == ["40; metrics.jsonl lacks 40", "2", "40", "30"]
    assert cells["correct rate, mean of the last tenth"] == ["–", "–", "38.5%", "50.0%"]
    assert cells["length of completions, mean of the last tenth"] == ["–", "–", "138.5", "129.0"]
    assert cells["SFT loss, mean of the last tenth"] == ["1.5000", "–", "–", "–"]
    assert cells["base_weights_sha256"] == ["ab" * 32] * 4
    assert cells["≠ reward_sha256"] == ["–", "–", "–", "ef" * 32]
    # beside a run of remit train, whose loss is another
    train = write_run(tmp_path / "train", [figures(1), figures(2)])
    assert remit("report", "--run", train, *runs[2:], "--out", page)[0] == 0
    found = panels(page)
    assert list(by_name(found["Loss of the objective"])) == ["train"]
    assert list(by_name(found["Reward"])) == ["rl-ntp", "rl-remit"]
    assert len(found["Gradient norm"]) == 3
    assert "SFT loss" not in found


GRAPH = ".js-plotly-plot"
PLOTS_DRAWN = """() => [...document.querySelectorAll('.js-plotly-plot')].map(box =>
    [box.querySelectorAll('svg .scatterlayer .js-line, svg .heatmaplayer image').length, box.clientWidth,
     box.data.filter(trace => trace.mode !== 'markers').length])"""
INK_AND_PAPER = """() => [getComputedStyle(document.querySelector('.xtick text')).fill,
    getComputedStyle(document.querySelector('td')).color, getComputedStyle(document.body).backgroundColor]"""
# pairs of texts of one figure that cover each other, and texts that reach beyond it
CUT_OR_COVERED = """() => [...document.querySelectorAll('.js-plotly-plot')].flatMap(box => {
    const seen = [...box.querySelectorAll('.annotation-text, .legendtext, .updatemenu-item-text, .ytitle, .xtitle')]
        .map(text => [text.textContent, text.getBoundingClientRect()]);
    const frame = box.getBoundingClientRect();
    const outside = seen.filter(([, r]) => r.left < frame.left - 1 || r.right > frame.right + 1 || r.top < frame.top - 1);
    const covered = seen.flatMap(([a, r], i) => seen.slice(i + 1).filter(([, q]) =>
        r.left < q.right && q.left < r.right && r.top < q.bottom && q.top < r.bottom).map(([b]) => [a, b]));
    return [...outside.map(([text]) => text), ...covered];
})"""


def scored(step: int, values: dict[str, float], limit: int | None = None, questions: str = "q") -> dict:
    """A line of tasks.jsonl; a value above 1 is of a perplexity."""
    tasks = {
        name: {"label": name, "metric": "acc,none", "value": value, "stderr": 0.02, "higher_is_better": value <= 1,
               "shots": {name: 5}, "questions": questions}
        for name, value in values.items()
    }  # fmt: skip
    mean = {"value": sum(values.values()) / len(values), "stderr": 0.01} if max(values.values()) <= 1 else None
    groups = {"reasoning": {"value": 0.5, "stderr": None, "tasks": [*values][:2]}} if len(values) > 2 else {}
    settings = {"limit": limit, "chat_template": False, "seed": 1234, "max_length": None}
    return {
        "step": step,
        "suite": None,
        "tasks": tasks,
        "groups": groups,
        "mean": mean,
        "left_out": [],
        "settings": settings,
    }


def write_scores(out: Path, lines: list[dict]) -> Path:
    (out / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return out


def scored_runs(folder: Path) -> list[Path]:
    """Two runs with other tokens a step, one of which has odd names of tasks, and one without scores."""
    tasks = ("GSM8K", ODD_NAME, "bbh_cot_fewshot_tracking_shuffled_objects_seven_objects")
    steps = [figures(step) for step in range(1, 41)]
    remit = write_run(folder / "remit", steps)
    ntp = write_run(folder / "ntp", [line | {"tokens": 50 * line["step"]} for line in steps])
    write_scores(remit, [scored(step, dict(zip(tasks, (0.1 + step / 100, 0.5, 0.9)))) for step in (0, 10, 30, 40)])
    write_scores(ntp, [scored(step, dict(zip(tasks, (0.1 + step / 200, 0.5, 0.8)))) for step in (0, 20, 40)])
    return [remit, ntp, write_run(folder / "without", steps)]


def test_task_scores(tmp_path: Path, remit: Remit) -> None:
    runs = scored_runs(tmp_path)
    write_scores(runs[1], [
        scored(0, {"GSM8K": 0.1}), {"step": 10, "skipped": "why"}, scored(20, {"GSM8K": 0.2}), scored(40, {"GSM8K": 0.3}, 7)
    ])  # fmt: skip
    page = tmp_path / "page.html"
    assert remit("report", "--run", *runs, "--out", page)[0] == 0
    found = panels(page)
    titles = [title for title in found if title.startswith(("Mean of", "GSM8K"))]
    assert titles == ["Mean of all 3 tasks", "Mean of reasoning", "GSM8K, 5-shot"]
    traces = {trace["name"]: trace for trace in found["GSM8K, 5-shot"]}
    assert [*traces] == ["remit", "ntp"]
    for name, steps, tokens, y in (
        ("remit", [0, 10, 30, 40], [0, 1000, 3000, 4000], [0.1, 0.2, 0.4, 0.5]),
        ("ntp", [0, 20, 40], [0, 1000, 2000], [0.1, 0.2, 0.3]),
    ):
        assert (traces[name]["steps"], traces[name]["tokens"]) == (tokens, tokens)  # over tokens at first
        assert traces[name]["y"] == pytest.approx(y, rel=1e-6)
        assert traces[name]["error_y"]["array"] == pytest.approx([0.02] * len(steps), rel=1e-6)
    text = html.unescape(page.read_text(encoding="utf-8"))
    assert "GSM8K, 5-shot: other questions, settings or metrics for some of the points; do not compare them." in text
    assert "ntp: no scores of step 10, which evaluations did not get to." in text
    assert "Mean of reasoning: over 2 tasks, GSM8K, " in text
    cells = table_rows(page)["task scores, last"]
    assert cells == ["mean 63.33% of 3 tasks (step 40; 50.00% at step 0)", "GSM8K 30.00 ± 2.00 % (step 40)", "–"]


def test_task_scores_without_metrics_and_of_a_perplexity(tmp_path: Path, remit: Remit) -> None:
    """No tokens are known: the axis is that of the steps."""
    out = write_scores(write_run(tmp_path / "out", []), [scored(step, {"ppl": 9.5 - step}) for step in (0, 5)])
    assert remit("report", "--run", out, "--out", tmp_path / "page.html")[0] == 0
    (trace,) = panels(tmp_path / "page.html")["ppl, 5-shot"]
    assert (trace["steps"], trace["y"]) == ([0, 5], [9.5, 4.5])
    assert table_rows(tmp_path / "page.html")["task scores, last"] == ["ppl 4.5000 ± 0.0200 (step 5)"]


def luminance(color: str) -> float:
    """Relative luminance of a CSS color rgb(r, g, b), as the contrast formula of WCAG has it."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, real: list[Path]) -> dict[str, Path]:
    """The page of the two real runs; one of odd names and a long run."""
    from pipelines.report.page import write_report
    from pipelines.report.settings import ReportConfig

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
    write_report(ReportConfig([scored_runs(folder / "scored")], folder / "scores.html"))
    return {name: folder / f"{name}.html" for name in ("real", "odd", "scores")}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["real", "odd", "scores"])
def test_page_in_a_browser(browser: Browser, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    with open_page(browser, pages[name], width, scheme) as opened:  # type: ignore[arg-type]
        drawn = opened.page.evaluate(PLOTS_DRAWN)
        assert len(drawn) == pages[name].read_text(encoding="utf-8").count(
            'Plotly.newPlot(                        "figure-'
        )
        for shapes, box_width, num_traces in drawn:
            assert shapes >= num_traces
            assert 250 < box_width < width
        assert opened.page.evaluate(CUT_OR_COVERED) == []
        assert opened.page.locator(".modebar-btn").count() == 0  # no tool bar over a curve
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


@pytest.mark.parametrize("width", [1280, 400])
def test_post_training_in_a_browser(tmp_path: Path, browser: Browser, remit: Remit, width: int) -> None:
    assert remit("report", "--run", *write_stages(tmp_path), "--out", tmp_path / "page.html")[0] == 0
    with open_page(browser, tmp_path / "page.html", width) as opened:
        drawn = opened.page.evaluate(PLOTS_DRAWN)
        assert len(drawn) == 4
        assert all(shapes >= num_traces for shapes, _, num_traces in drawn)
        assert opened.page.evaluate(CUT_OR_COVERED) == []
        assert opened.overflow == 0
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
    for runs, where in (
        ((each, shorter), [r"2\.\d+", r"2\.\d+"]),
        ((each, every_other), [r"2\.\d+", r"\((30|32), 2\.\d+\)"]),
    ):
        assert remit("report", "--run", *runs, "--out", tmp_path / "page.html")[0] == 0
        with open_page(browser, tmp_path / "page.html") as opened:
            losses = opened.page.locator(GRAPH).filter(has_text="Next-token loss").locator(".nsewdrag").first
            losses.scroll_into_view_if_needed()
            box = losses.bounding_box()
            assert box is not None
            # the axis goes from 1 to 101
            opened.page.mouse.move(box["x"] + box["width"] * 30 / 100, box["y"] + box["height"] / 2)
            texts = "[...document.querySelectorAll('.hoverlayer text')].map(text => text.textContent)"
            until(lambda page=opened.page, texts=texts: len(page.evaluate(texts)) == 3)
            title, *lines = opened.page.evaluate(texts)
            assert title == "31"
            for line, run, pattern in zip(lines, runs, where, strict=True):
                assert re.fullmatch(re.escape(f"{run.name} : ") + pattern, line), line


def test_more_runs_than_colours(tmp_path: Path, remit: Remit) -> None:
    """No two of sixteen runs look the same."""
    runs = [write_run(tmp_path / f"run-{index:02}", [figures(1), figures(2)]) for index in range(16)]
    assert remit("report", "--run", *runs, "--out", tmp_path / "page.html")[0] == 0
    found = [traces for traces in panels(tmp_path / "page.html").values() if len(traces) == 16 and "line" in traces[0]]
    assert len(found) >= 10
    for traces in found:
        assert len({(trace["line"]["color"], trace["line"]["dash"]) for trace in traces}) == 16


def test_only_the_scripts_of_the_page_run(browser: Browser, pages: dict[str, Path]) -> None:
    with open_page(browser, pages["odd"]) as opened:
        opened.page.evaluate(
            "() => { const made = document.createElement('script'); made.textContent = 'document.title = \"pwned\"';"
            " document.body.append(made); }"
        )
        assert opened.page.title() != "pwned"
        assert any("Content Security Policy" in problem for problem in opened.problems)


def test_controls_of_the_page(browser: Browser, pages: dict[str, Path]) -> None:
    losses = panels(pages["real"])["Next-token loss"]
    values = (
        "box => box._fullData.filter(t => t.yaxis === 'y2').map(trace => [trace.visible, Array.from(trace.x ?? [])])"
    )
    ticks = "box => [...box.querySelectorAll('.x3tick text')].map(text => text.textContent)"
    with open_page(browser, pages["real"]) as opened:
        page = opened.page
        box = page.locator(GRAPH).filter(has_text="Next-token loss").first
        steps, tokens = ([trace[key] for trace in losses] for key in ("steps", "tokens"))
        assert box.evaluate(values) == [[True, steps[0]], [True, steps[1]]]
        assert all(tick.isdigit() for tick in box.evaluate(ticks))  # whole steps
        assert len(box.evaluate(ticks)) > 3
        box.get_by_text("tokens", exact=True).click()
        until(lambda: box.evaluate(values) == [[True, tokens[0]], [True, tokens[1]]])
        assert box.locator(".x3title").text_content() == "tokens"
        box.locator(".legendtoggle").nth(1).click()
        until(lambda: box.evaluate(values)[1][0] == "legendonly")
        assert box.evaluate(values)[0][0] is True
        ink = page.evaluate(INK_AND_PAPER)[0]
        page.emulate_media(color_scheme="dark")
        until(lambda: page.evaluate(INK_AND_PAPER)[0] != ink)
        page.set_viewport_size({"width": 400, "height": 800})
        until(lambda: page.locator(".main-svg").first.bounding_box()["width"] < 400)
        assert opened.overflow == 0
        assert opened.problems == []
