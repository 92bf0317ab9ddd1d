"""The wheel that others install: built from the tracked files, it has all that the code opens, and runs outside the checkout."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from built_once import BuiltOnce

pytestmark = pytest.mark.usefixtures("starts_processes")

ROOT = Path(__file__).parents[2]
PACKAGES = ("shards", "scorer", "trainer", "pipelines")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COPIED = ("pyproject.toml", "README.md", "LICENSE", "docs/recipes", *PACKAGES)
"""What a wheel is made of."""


def tracked(*paths: str) -> list[str]:
    """Files of the repository, without what lies about in this checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", *paths]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"not a checkout of git: {listed.stderr.strip()}")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def wheel(built_once: BuiltOnce, starts_processes: None) -> Path:
    def build(folder: Path) -> None:
        for name in tracked(*COPIED):
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-index",
            "--no-build-isolation",
            "--no-cache-dir",
        ]
        done = subprocess.run([*command, "-w", folder / "wheel", folder / "source"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    (file,) = (built_once("wheel", build) / "wheel").glob("remit-*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel installed into a folder of its own, without what it needs."""
    folder = tmp_path_factory.mktemp("installed")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--target",
        folder,
        wheel,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def opened_files() -> set[str]:
    """Files beside the code that a string constant in it names."""
    found = set()
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.Constant)
                    and isinstance(node.value, str)
                    and re.fullmatch(r"[\w.-]+\.\w+", node.value)
                ):
                    beside = file.parent / node.value
                    if beside.is_file() and beside.suffix != ".py":
                        found.add(str(beside.relative_to(ROOT)))
    return found


def test_the_wheel_has_what_the_code_opens(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    opened = opened_files()
    assert {"pipelines/inspect/page.css", "pipelines/evaluation/paper.json"} <= opened
    assert opened - names == set()
    # and every other file in the packages, and each recipe
    assert {name for name in tracked(*PACKAGES) if not name.endswith("/README.md")} - names == set()
    recipes = {name.rpartition("/")[2] for name in tracked("docs/recipes")}
    assert recipes
    assert {name.rpartition("/")[2] for name in names if "/recipes/" in name} == recipes
    own = {name.split("/")[0] for name in names}
    assert {name for name in own if "." not in name} == set(PACKAGES)  # no tests, no benchmarks


def test_it_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    script = """
import json, sys
import pipelines.cli, pipelines.inspect.page, pipelines.plot_pages, pipelines.evaluation.paper
from pipelines.recipes import recipes
read = [pipelines.cli.expand_config_file(["train", "--config", name]) for name in recipes()]
print(json.dumps([pipelines.cli.__file__, sorted(recipes()), len(read[0])]))
pipelines.cli.main(["--version"])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment | {"PYTHONPATH": str(installed)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, version = done.stdout.splitlines()
    where, recipes, options = json.loads(first)
    assert where.startswith(str(installed))
    assert recipes == sorted(Path(name).stem for name in tracked("docs/recipes"))
    assert options > 10
    assert version == f"remit {PROJECT['version']}"


def test_releases_agree_on_their_number() -> None:
    titles = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    released = [title.split()[0] for title in titles if title != "Unreleased"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert released[0] == PROJECT["version"] == citation["version"]
    assert citation["license"] == PROJECT["license"]
    for needed in ("cff-version", "message", "title", "authors"):  # what the format asks for
        assert citation[needed]


def test_images_copy_what_a_wheel_is_made_of() -> None:
    for file in (ROOT / "docs" / "jobs").glob("Dockerfile*"):
        copied = [
            word for line in re.findall(r"^COPY (.+)$", file.read_text(), re.MULTILINE) for word in line.split()[:-1]
        ]
        assert set(COPIED) <= set(copied), file.name
        for extras in re.findall(r"'\.\[([\w,]+)\]'", file.read_text()):
            assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
