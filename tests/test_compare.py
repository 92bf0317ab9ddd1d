"""Which runs compare: the same but for the objective, evaluated on the same tokens."""

import json
import shutil
from pathlib import Path

import pytest
from annotated import run
from conftest import make_model
from pipelines.compare import MAY_DIFFER, main, read_losses, require_comparable

from trainer.config import TrainConfig
from trainer.objectives.settings import OPTIONS

COMMON = {"max_steps": 2, "eval_every": 1, "global_batch_size": 8, "micro_batch_size": 8}


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
    run(folder / "longer", shards, base, objective="remit", **common | {"max_steps": 3})
    return {path.name: path for path in folder.iterdir() if (path / "run.json").exists()}


def test_runs_that_compare(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("remit", "rho1", "unscored"):  # the last from the shards before they were scored: the same rows
        require_comparable(runs["ntp"], runs[other])
    monkeypatch.setattr("sys.argv", ["compare", "--ntp", str(runs["ntp"]), "--remit", str(runs["remit"])])
    main()
    said = capsys.readouterr().out
    assert "After 2 steps on the same rows ReMiT is" in said
    assert f"{read_losses(runs['remit'])[2]:.4f}" in said


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("rate", "learning_rate is 0.0003 in the first and 0.002 in the second"),
        ("longer", "max_steps is 2 in the first and 3 in the second"),
        ("base", "base_weights_sha256 is '"),
        ("heldout", "manifest_sha256 of the held-out shards is '"),
    ],
)
def test_runs_that_do_not(runs: dict[str, Path], other: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=message) as error:
        require_comparable(runs["ntp"], runs[other])
    if other == "heldout":
        first, second = (
            json.loads((runs[name] / "evaluation.jsonl").read_text().splitlines()[0])["manifest_sha256"]
            for name in ("ntp", "heldout")
        )
        assert first != second
        assert f"{first!r} in the first and {second!r} in the second" in str(error.value)
    monkeypatch.setattr("sys.argv", ["compare", "--ntp", str(runs["ntp"]), "--remit", str(runs[other])])
    with pytest.raises(SystemExit, match=r"error: .* do not compare"):
        main()


def test_other_corpora_and_changed_evaluations(runs: dict[str, Path], tmp_path: Path) -> None:
    changed = shutil.copytree(runs["remit"], tmp_path / "changed")
    values = json.loads((changed / "run.json").read_text())
    values["shards"]["corpus"][3]["sha256"] = "another"
    (changed / "run.json").write_text(json.dumps(values))
    with pytest.raises(
        ValueError, match=r"shards.corpus\[3\].sha256 is '\w+' in the first and 'another' in the second"
    ):
        require_comparable(runs["ntp"], changed)
    mixed = shutil.copytree(runs["remit"], tmp_path / "mixed")
    with (mixed / "evaluation.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "loss": 1.0, "manifest_sha256": "another"}) + "\n")
    with pytest.raises(ValueError, match="resumed with other --eval-shards"):
        require_comparable(runs["ntp"], mixed)
    with pytest.raises(ValueError, match=r"run\.json: missing or damaged"):
        require_comparable(runs["ntp"], tmp_path)


def test_only_settings_of_objectives_may_differ() -> None:
    """Whoever gives train a new setting decides here whether it may."""
    fields = set(vars(TrainConfig("s", "m", Path("o"))))
    assert fields & MAY_DIFFER == {
        *(name for names in OPTIONS.values() for name in names),
        *("objective", "reference", "eval_every", "micro_batch_size", "leave_out"),
    }
