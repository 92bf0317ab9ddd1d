"""remit compare: the table by hand, the settings that differ, what does not compare, what is no run."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from annotated import run
from conftest import make_model

from pipelines.commands.train import held_out_summary
from pipelines.report.compare import MAX_ROWS, MAY_DIFFER, OF_AN_OBJECTIVE, compare
from trainer.config import TrainConfig
from trainer.objectives.settings import OPTIONS
from trainer.train import train

Remit = Callable[..., tuple[int, str, str]]
COMMON = {"max_steps": 2, "eval_every": 1, "global_batch_size": 8, "micro_batch_size": 8}
START = {"step": 0, "loss": 2.5862}


def written(out: Path, *lines: dict, finished: bool = True, **settings: object) -> Path:
    """A run of which only what is compared is there."""
    (out / "model").mkdir(parents=True) if finished else out.mkdir(parents=True)
    (out / "run.json").write_text(json.dumps({"objective": "remit", "seed": 0, "shards": {}} | settings))
    of_tokens = {"tokens": 9.0, "manifest_sha256": "ab"}
    (out / "evaluation.jsonl").write_text("".join(json.dumps(of_tokens | line) + "\n" for line in lines))
    return out


def losses(values: dict[int, float]) -> list[dict]:
    return [{"step": step, "loss": loss} for step, loss in values.items()]


def test_table_by_hand(tmp_path: Path) -> None:
    ntp = written(tmp_path / "a", *losses({0: 2.0, 5: 1.5, 9: 1.25}), objective="ntp")
    remit = written(tmp_path / "b", *losses({0: 2.0, 5: 1.25, 9: 1.0, 11: 0.5}), finished=False, epsilon=0.2)
    assert compare([ntp, remit]).splitlines() == [
        "  step   held-out loss: NTP    ReMiT    ReMiT - NTP",
        "     0               2.0000   2.0000        +0.0000",
        "     5               1.5000   1.2500        -0.2500",
        "     9               1.2500   1.0000        -0.2500",
        "After 9 steps on the same rows ReMiT is 0.2500 nat per token better than NTP on held-out tokens.",
    ]
    many = [written(tmp_path / name, *losses(dict.fromkeys(range(100), 2.0))) for name in ("c", "d")]
    shown = [line.split()[0] for line in compare(many).splitlines()[1:-1]]
    assert (len(shown), shown[0], shown[-1]) == (MAX_ROWS, "0", "99")


def test_three_runs_of_one_objective(tmp_path: Path) -> None:
    """They are called by their folders, and what they differ in is listed."""
    runs = [
        written(tmp_path / name, *losses({0: 2.0, 4: loss}), epsilon=epsilon, base_weights_sha256=base)
        for name, loss, epsilon, base in (
            ("a", 1.5, 0.2, "f" * 50 + "1" * 14), ("b", 1.5004, 0.4, "f" * 50 + "1" * 14), ("c", 1.75, 0.2, "f" * 50 + "2" * 14)
        )
    ]  # fmt: skip
    assert compare(runs).splitlines() == [
        "  step   held-out loss: a        b        c    b - a    c - a",
        "     0             2.0000   2.0000   2.0000  +0.0000  +0.0000",
        "     4             1.5000   1.5004   1.7500  +0.0004  +0.2500",
        "The runs differ in:",
        "  epsilon: 0.2 (a), 0.4 (b), 0.2 (c)",
        f"  base_weights_sha256: ...{'f' * 6}{'1' * 14} (a), ...{'f' * 6}{'1' * 14} (b), ...{'f' * 6}{'2' * 14} (c)",
        "After 4 steps on the same rows b is level with a on held-out tokens.",
        "After 4 steps c is 0.2500 nat per token worse than a on held-out tokens.",
    ]


def test_losses_of_exported_models_end_the_table_where_rounding_changed_them(tmp_path: Path) -> None:
    ntp = written(tmp_path / "ntp", START, {"step": 4, "loss": 2.4170, "exported_loss": 2.5050}, objective="ntp")
    remit = written(tmp_path / "remit", START, {"step": 4, "loss": 2.4119, "exported_loss": 2.5030})
    assert compare([ntp, remit]).splitlines()[2:] == [
        "     4               2.4170   2.4119        -0.0051",
        " model               2.5050   2.5030        -0.0020",
        "After 4 steps on the same rows the exported model of ReMiT is 0.0020 nat per token better than NTP on held-out "
        "tokens.",
    ]
    # of older runs, where nothing was rounded, and where the dtypes of the exports are not the same
    same = {"step": 4, "loss": 2.4119, "exported_loss": 2.4119}
    for one, other in (({}, {}), ({"exported_loss": 2.4170}, same), ({}, {"exported_loss": 2.503}),
                       ({"exported_loss": 2.4170, "export_dtype": "float32"}, {"exported_loss": 2.503, "export_dtype": "base"})):  # fmt: skip
        shutil.rmtree(ntp), shutil.rmtree(remit)
        written(ntp, START, {"step": 4, "loss": 2.4170} | one, objective="ntp")
        written(remit, START, {"step": 4, "loss": 2.4119} | other)
        assert compare([ntp, remit]).splitlines()[3:] == [
            "After 4 steps on the same rows ReMiT is 0.0051 nat per token better than NTP on held-out tokens."
        ]


def with_scores(out: Path, by_step: dict[int, list[float]], shots: int = 0) -> Path:
    """Task scores as remit train --eval-tasks leaves them: the table, and results.json of each model."""
    lines = []
    for step, right in by_step.items():
        record = {
            "label": "Öl", "metric": "acc,none", "value": sum(right) / len(right), "stderr": 0.25, "higher_is_better": True,
            "shots": {"oil": shots}, "questions": "q", "task_versions": {}, "num_samples": {"oil": len(right)},
            "samples": {"oil": [[f"question {index}", value] for index, value in enumerate(right)]},
        }  # fmt: skip
        file = out / f"tasks/step-{step}/results.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"suite": None, "settings": {}, "tasks": {"oil": record}}))
        lines.append({"step": step, "tasks": {"oil": record}, "results": str(file.relative_to(out))})
    lines.append({"step": 9, "skipped": "why"})
    (out / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def test_task_scores_by_hand(tmp_path: Path) -> None:
    """At the newest step that both have; paired: differences 0, 1, 0, 0 have a mean of 0.25 and an error of 0.5 / 2."""
    plain = [written(tmp_path / name, *losses({0: 2.0, 9: 1.0}), objective=name) for name in ("ntp", "remit")]
    without = compare(plain)
    ntp = with_scores(plain[0], {0: [0, 0, 0, 0], 4: [1, 0, 1, 0]})
    remit = with_scores(plain[1], {0: [0, 0, 0, 0], 4: [1, 1, 1, 0], 8: [1, 1, 1, 1]})
    *table, title, line, last = compare([ntp, remit]).splitlines()
    assert [*table, last] == without.splitlines()
    assert title == "Task scores after 4 steps:"
    assert line == "  Öl: 75.00 % (ReMiT), 50.00 % (NTP), +25.00 ± 25.00 %, no difference beyond its error"
    shutil.rmtree(ntp / "tasks")
    with_scores(ntp, {4: [1, 0, 1, 0]}, shots=5)
    assert "  Öl: ReMiT and NTP do not compare: shots is " in compare([ntp, remit])
    shutil.rmtree(ntp / "tasks")
    assert compare([ntp, remit]) == without


def test_runs_of_different_lengths(tmp_path: Path) -> None:
    """Finished ones compare at their ends; one that goes on, where both were evaluated."""
    short = written(tmp_path / "short", *losses({0: 2.0, 4: 1.5}), max_steps=4)
    long = written(tmp_path / "long", *losses({0: 2.0, 4: 1.75, 8: 1.25}), max_steps=8)
    said = compare([short, long]).splitlines()
    assert said[3].split() == ["last", "1.5000", "1.2500", "-0.2500"]
    assert said[-1] == "After 8 and 4 steps long is 0.2500 nat per token better than short on held-out tokens."
    (long / "model").rmdir()
    assert compare([short, long]).splitlines()[-1].startswith("After 4 steps long is 0.2500 nat per token worse")
    apart = written(tmp_path / "apart", *losses({3: 1.5}))
    assert compare([short, apart]).splitlines()[-1].startswith("After 3 and 4 steps apart is level with short")


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, annotated: dict[str, Path], small: Path, models: dict[str, Path]
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    shards, base = annotated["packed"], models["base"]
    common = COMMON | {"eval_shards": str(small)}
    run(folder / "ntp", shards, base, objective="ntp", **common)
    run(folder / "remit", shards, base, objective="remit", **common)
    run(folder / "rho1", shards, base, objective="rho1", scope="micro", **common)
    run(folder / "rate", shards, base, objective="remit", **common | {"learning_rate": 2e-3})
    run(folder / "base", shards, make_model(folder / "other-base", seed=9), objective="remit", **common)
    run(folder / "unscored", small, base, objective="ntp", **common)
    run(folder / "heldout", shards, base, objective="remit", **common | {"eval_shards": str(shards)})
    return {path.name: path for path in folder.iterdir() if (path / "run.json").exists()}


def test_runs_on_the_same_rows(runs: dict[str, Path], remit: Remit) -> None:
    code, output, _ = remit("compare", runs["ntp"], runs["remit"], runs["rho1"])
    assert code == 0
    assert "differ" not in output  # in their objectives alone
    assert output.count("After 2 steps on the same rows ") == 2
    last = json.loads((runs["rho1"] / "evaluation.jsonl").read_text().splitlines()[-1])
    assert f" {last['loss']:.4f} " in output
    # from the shards before they were scored: the same rows
    assert "on the same rows unscored is" in remit("compare", runs["ntp"], runs["unscored"])[1]


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ("rate", r"  learning_rate: 0.0003 \(NTP\), 0.002 \(ReMiT\)"),
        ("base", r"  base_weights_sha256: \w{20}\.\.\. \(NTP\), "),
    ],
)
def test_runs_of_other_settings(runs: dict[str, Path], remit: Remit, other: str, line: str) -> None:
    code, output, _ = remit("compare", runs["ntp"], runs[other])
    assert (code, "on the same rows" in output) == (0, False)
    assert re.search(rf"^The runs differ in:\n{line}", output, re.MULTILINE), output


def test_other_held_out_tokens(runs: dict[str, Path], tmp_path: Path, remit: Remit) -> None:
    code, output, error = remit("compare", runs["ntp"], runs["heldout"])
    first, second = (
        json.loads((runs[name] / "evaluation.jsonl").read_text().splitlines()[0])["manifest_sha256"]
        for name in ("ntp", "heldout")
    )
    assert first != second
    said = f"manifest_sha256 of the held-out shards is {first!r} in the first and {second!r} in the second"
    assert (code, output, said in error) == (1, "", True), error
    mixed = shutil.copytree(runs["remit"], tmp_path / "mixed")
    with (mixed / "evaluation.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "loss": 1.0, "manifest_sha256": "another"}) + "\n")
    assert "resumed with other --eval-shards" in remit("compare", runs["ntp"], mixed)[2]
    packed, document = (written(tmp_path / name, START, context=name) for name in ("packed", "document"))
    with pytest.raises(ValueError, match="context is 'packed' in the first and 'document' in the second"):
        compare([packed, document])


def test_other_corpora(runs: dict[str, Path], tmp_path: Path) -> None:
    changed = shutil.copytree(runs["remit"], tmp_path / "changed")
    values = json.loads((changed / "run.json").read_text())
    values["shards"]["corpus"][3]["sha256"] = "another"
    (changed / "run.json").write_text(json.dumps(values))
    said = compare([runs["ntp"], changed])
    assert "corpus › sha256: " in said
    assert "anoth" in said
    assert "on the same rows" not in said


def test_training_says_what_it_was_worth(
    annotated: dict[str, Path], small: Path, models: dict[str, Path], tmp_path: Path, remit: Remit
) -> None:
    options = {"shards": annotated["packed"], "model": models["base"], "objective": "ntp", "max-steps": 2,
               "global-batch-size": 8, "eval-shards": small, "out": tmp_path / "out"}  # fmt: skip
    code, output, _ = remit("train", *(word for name, value in options.items() for word in (f"--{name}", value)))
    first, last = map(json.loads, (tmp_path / "out" / "evaluation.jsonl").read_text().splitlines())
    line = f"held-out loss: {last['loss']:.4f} nat per token after 2 steps, {first['loss']:.4f} before\n"
    assert (code, line in output) == (0, True), output
    phases: list[str] = []
    settings = {name.replace("-", "_"): value for name, value in options.items()} | {"out": tmp_path / "again"}
    train(
        TrainConfig(
            **{
                name: value if name in ("out", "max_steps", "global_batch_size") else str(value)
                for name, value in settings.items()
            }
        ),
        phase=phases.append,
    )
    assert phases == ["evaluate", "train"] * 2  # before the first step and after the last
    rounded = written(
        tmp_path / "rounded", START, {"step": 4, "loss": 2.4, "exported_loss": 2.5, "export_dtype": "base"}
    )
    assert held_out_summary(rounded).endswith(
        "before; 2.5000 of the exported model, whose weights are rounded (--export-dtype base)"
    )


def test_what_is_no_run(tmp_path: Path, remit: Remit) -> None:
    one, other = written(tmp_path / "one", START), written(tmp_path / "other", START)
    unevaluated = written(tmp_path / "unevaluated")
    (tmp_path / "scored").mkdir()
    (tmp_path / "scored" / "_manifest.json").write_text("{}")
    for options, code, message in (
        (
            (one, tmp_path / "otherr"),
            1,
            f"otherr: no such folder; {tmp_path} has the runs one, other, unevaluated; give",
        ),
        ((one, other / "model"), 1, f"model: is a part of the run {other}; give"),
        ((one, tmp_path), 1, "it is not a run; "),
        ((one, tmp_path / "scored"), 1, "holds no run.json, so it is a shard folder; give the --out of remit train"),
        ((one, other / "run.json"), 1, "is a file"),
        ((one, unevaluated), 1, "has no held-out loss; run remit train with --eval-shards and --eval-every"),
        ((one, other / ".." / "one"), 2, "is given twice, expected different runs"),
        ((one,), 2, "1 run given, expected two or more"),
    ):
        got, _, error = remit("compare", *options)
        words = " ".join(error.replace("│", " ").split())
        assert (got, message in words) == (code, True), error


def test_only_settings_of_objectives_may_differ() -> None:
    """Whoever gives train a new setting decides here whether runs with another value trained on the same rows."""
    assert {field.name for field in fields(TrainConfig)} & MAY_DIFFER == {
        *(name for names in OPTIONS.values() for name in names),
        *("objective", "reference", "eval_every", "micro_batch_size", "leave_out"),
    }
    assert OF_AN_OBJECTIVE < MAY_DIFFER
