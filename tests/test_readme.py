"""The README's snippets run, its file tree is the repository's, its targets exist."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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


def test_file_tree_is_complete() -> None:
    tree = next(block for block in blocks("") if block.startswith("shards/ "))
    for package in ("shards", "scorer", "trainer", "pipelines"):
        section = re.search(rf"^{package}/ .*?(?=^\S|\Z)", tree, re.DOTALL | re.MULTILINE).group()
        listed = set(re.findall(r"^  (\w+(?:\.py|/))", section, re.MULTILINE))
        folders = {f"{folder.parent.name}/" for folder in (ROOT / package).glob("*/__init__.py")}
        assert listed == {file.name for file in (ROOT / package).glob("*.py")} - {"__init__.py"} | folders


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
