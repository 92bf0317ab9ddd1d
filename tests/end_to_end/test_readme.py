"""The README is short, its snippets run, its layout is the repository's, its targets exist."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("shards", "scorer", "trainer", "pipelines")
FOLDERS = {*PACKAGES, "benchmarks", "tests", "docs"}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for name, text in fences if name == language]


def test_python_snippets_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], scored_rl: Path
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "scored").symlink_to(scored_rl)
    monkeypatch.chdir(tmp_path)
    assert len(blocks("python")) == 1
    for block in blocks("python"):
        exec(block, {})
    assert re.search(r"[\d,]+ rows, [\d,]+ tokens, mean log p -\d+\.\d+ nat", capsys.readouterr().out)


def test_layout_names_every_folder() -> None:
    layout = next(block for block in blocks("") if block.startswith("shards/ "))
    listed = set(re.findall(r"^(\w+)/", layout, re.MULTILINE))
    assert listed == {folder.name for folder in ROOT.iterdir() if folder.is_dir() and folder.name in FOLDERS}
    assert set(PACKAGES) < listed


def test_one_screen() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.usefixtures("starts_processes")
def test_make_targets_and_options_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in re.findall(r"(?:^|`)make ([a-z ]+?)(?: [A-Z]|`|$)", README, re.MULTILINE):
        assert set(command.split()) <= targets, command
    for target in ("score", "train"):
        plan = subprocess.run(
            ["make", "-n", target, "BASE=b", "CORPUS=c", "REF=r"], cwd=ROOT, capture_output=True, text=True
        )
        assert plan.returncode == 0, plan.stderr
        assert f"remit {target} --shards" in plan.stdout


def test_documents_name_no_machine() -> None:
    for file in [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"/root/|/home/|/work/", file.read_text(encoding="utf-8")), file


EXTRAS = "|".join(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def asks_the_index(text: str) -> list[str]:
    """Places of a text that have the package index give somebody remit, a name that anyone may take there."""
    flat = re.sub(r"[\s\"'`#();]+", " ", text)
    by_name = r"(?:pipx?3? install|(?:uv|poetry) add) (?:-\S+ )*(?:\S+ ){0,2}remit(?:[=<>~!]\S*)?(?=[ .,]|$)(?! @)"
    with_extra = rf"remit\[(?:(?:{EXTRAS})\b|\{{|\$)[^\]]*\](?! @)"
    return re.findall(by_name, flat) + re.findall(with_extra, flat)


def test_nobody_is_sent_to_the_index_for_remit() -> None:
    for text in ("pip install remit", "`pip install 'remit[s3]'`", "(pip install -U\n  remit)", "uv pip install remit==1",
                 "needs 'remit[gpu]'", "pip install torch \"remit[cpu,s3]\"", "pip install 'remit[{extra}]'"):  # fmt: skip
        assert asks_the_index(text), text
    for text in ("pip install '.[s3]'  # in your checkout of remit", "pip install 'remit[s3] @ git+URL'",
                 "in your checkout of remit: pip install '.[gpu]', or '.[cpu]'", "pip install -e .", "remit[step]"):  # fmt: skip
        assert not asks_the_index(text), text
    files = [file for folder in (*PACKAGES, "docs", "benchmarks", "tests") for file in (ROOT / folder).rglob("*")]
    for file in [ROOT / "README.md", ROOT / "Makefile", ROOT / "pyproject.toml", *files]:
        if (
            file.suffix in (".md", ".py", ".toml", ".yaml", ".sh", "")
            and file.is_file()
            and file.name != "test_readme.py"
        ):
            places = asks_the_index(file.read_text(encoding="utf-8"))
            # extras that take in others of the checkout, which pip has in its hands then
            assert places == (
                ["remit[float8]", "remit[s3,docs,wandb,flywheel]"] if file.name == "pyproject.toml" else []
            ), file
