"""Files and folders of the user's own that are called as remit's packages are, with a plain and an editable install."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import source_texts, write_corpus

pytestmark = pytest.mark.usefixtures("starts_processes")

ROOT = Path(__file__).parents[2]
Run = Callable[..., str]


@pytest.fixture(scope="module", params=[pytest.param("plain", marks=pytest.mark.slow), "editable"])
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment in which a copy of this tree is installed, over the packages of this one."""
    folder = tmp_path_factory.mktemp(request.param)
    source, made = folder / "source", folder / "environment"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "work", "build", "*.egg-info", "__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made], check=True)
    (site,) = made.glob("lib/python*/site-packages")
    # a path alone: the editable install of the environment that the tests run in does not come along
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ["install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed"]
    how = [source] if request.param == "plain" else ["-e", source]
    command = [sys.executable, "-m", "pip", "--python", made / "bin" / "python", *install, *how]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if request.param == "plain":
        shutil.rmtree(source)
    return made


@pytest.fixture
def run(environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command of the environment where the user stands; its output."""
    monkeypatch.chdir(tmp_path)
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    clean |= {"PATH": f"{environment / 'bin'}:{clean['PATH']}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def of(program: str, *arguments: object, code: int = 0, **variables: str) -> str:
        command = [str(environment / "bin" / program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=clean | variables)
        assert done.returncode == code, f"{command}: {done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    return of


def lay_out(folder: Path, model: Path, tokenizer: Path, decoys: list[str]) -> None:
    """A corpus, a model with its tokenizer, and modules that end whatever imports them."""
    write_corpus(folder / "a.jsonl", source_texts(30, seed=6))
    shutil.copytree(model, folder / "base")
    shutil.copytree(tokenizer, folder / "base", dirs_exist_ok=True)
    for name in decoys:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"raise SystemExit('the decoy {name}')\n")


TRAIN = ["--shards", "packed", "--model", "base", "--objective", "ntp", "--max-steps", 2, "--global-batch-size", 4]
DECOYS = ["trainer.py", "scorer.py", "shards/__init__.py", "pipelines/__init__.py", "tests/__init__.py"]


def test_commands_among_files_of_the_same_names(
    run: Run, tmp_path: Path, models: dict[str, Path], tokenizer_folder: Path
) -> None:
    """The command itself, the stages of a loop, a rank of torchrun, and Ray's workers."""
    lay_out(tmp_path, models["base"], tokenizer_folder, DECOYS)
    (tmp_path / "own.sh").write_text('cp -r "$REMIT_MODEL"/* "$REMIT_OUTPUT"\n')
    loop = {
        "base": "base", "corpus": "a.jsonl", "out": "loop", "seq_len": 32, "rounds": 0,
        "train": {"max_steps": 2, "global_batch_size": 4}, "posttrain": [{"command": ["bash", "own.sh"]}],
        "launch": {"train": ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1, "-m"]},
    }  # fmt: skip
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump(loop))
    run("remit", "flywheel", "--config", "loop.yaml")
    (manifest,) = (tmp_path / "loop").rglob("_manifest.json")
    manifest.parent.rename("packed")
    score = ["score", "--shards", "packed", "--model", "base", "--num-engines", 1, "--dtype", "float32", "--no-canary"]
    assert "scored as 'rl'" in run("remit", *score, "--out", "scored")
    run("remit", "inspect", "--shards", "scored", "--row", 0, "--html", "row.html", "--model", "base")
    assert "--reward" in run("remit", "rl", "--help")
    assert "RUN RUN" in run("remit", "compare", "--help")


@pytest.mark.slow
def test_more_of_them(run: Run, tmp_path: Path, models: dict[str, Path], tokenizer_folder: Path) -> None:
    """Packing and the fake engine by themselves; one, two and Ray's two ranks with the same losses."""
    lay_out(tmp_path, models["base"], tokenizer_folder, DECOYS)
    pack = ["pack", "--corpus", "a.jsonl", "--tokenizer", "base", "--seq-len", 32, "--out"]
    assert "packed " in run("remit", *pack, "packed")
    score = ["score", "--shards", "packed", "--model", "base", "--num-engines", 1, "--out"]
    assert "scored as 'rl'" in run("remit", *score, "fake", "--engine", "fake")
    assert "scored as 'rl'" in run("remit", *score, "scored", "--dtype", "float32")
    assert "trained 2 steps" in run("remit", "train", *TRAIN, "--out", "run")
    assert "trained 2 steps" in run("remit", "train", *TRAIN, "--out", "run-ray", "--ray-workers", 2)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    assert "trained 2 steps" in run("python", *torchrun, "--no-python", "remit", "train", *TRAIN, "--out", "run-two")
    metrics = [Path(f"run{kind}/metrics.jsonl").read_text().splitlines() for kind in ("", "-two", "-ray")]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in metrics]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_python_m_without_p(run: Run, tmp_path: Path, models: dict[str, Path], tokenizer_folder: Path) -> None:
    """Where nothing is called pipelines, the shorter forms hold too, also in a process of torchrun."""
    lay_out(tmp_path, models["base"], tokenizer_folder, [name for name in DECOYS if "pipelines" not in name])
    pack = ["pack", "--corpus", "a.jsonl", "--tokenizer", "base", "--seq-len", 32, "--out", "packed"]
    assert "packed " in run("python", "-m", "pipelines.cli", *pack)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1, "-m", "pipelines.cli"]
    assert "trained 2 steps" in run("python", *torchrun, "train", *TRAIN, "--out", "run-two")


def test_folders_of_data_called_like_packages(
    run: Run, tmp_path: Path, models: dict[str, Path], small: Path, tokenizer_folder: Path
) -> None:
    lay_out(tmp_path, models["base"], tokenizer_folder, [])
    for name in ("trainer", "scorer", "pipelines"):
        (tmp_path / name).mkdir()
    shutil.copytree(small, tmp_path / "shards")
    run("remit", "score", "--shards", "shards", "--model", "base", "--engine", "fake", "--num-engines", 1, "--out", "o")
    assert "OK" in run("remit", "verify", "--shards", "shards")
    (tmp_path / "pipelines").rmdir()
    assert "OK" in run("python", "-m", "pipelines.cli", "verify", "--shards", "shards")


def test_what_cannot_be_avoided_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text("raise SystemExit('decoy')\n")
    for program in (["remit"], ["python", "-P", "-m", "pipelines.cli"]):
        said = run(*program, "verify", "--shards", "x", code=1, PYTHONPATH=str(tmp_path))
        assert said.startswith(
            f"remit: error: {tmp_path / 'trainer.py'} is in the way of remit's own package trainer ("
        )
        assert said.endswith("rename it, or take that folder off PYTHONPATH\n")
        assert said.count("\n") == 1
    run(
        "python", "-c", "import sys; sys.argv[0] = 'x'; sys.path.insert(0, ''); import pipelines; assert '' in sys.path"
    )
