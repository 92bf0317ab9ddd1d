"""The documentation: it builds without a warning, its snippets run, the messages it explains exist."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from annotated import rows_of_step, run
from conftest import make_model, source_texts, write_corpus
from oracles import load, row_distributions

from pipelines.cli import parse
from trainer.objectives import settings as registry

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [path.name for path in sorted(DOCS.glob("*.md"))]


def blocks(document: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks in these languages, in order."""
    fences = re.findall(r"^```(\w+)\n(.*?)^```$", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [(language, text) for language, text in fences if language in languages]


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        assert (tmp_path / page.replace(".md", ".html")).stat().st_size > 1000


def source_strings() -> str:
    """All string constants of the packages, the pieces of one f-string after the other."""
    constants = []
    for package in ("shards", "scorer", "trainer", "pipelines"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    constants.append(node.value)
    return "\n".join(constants)


def test_messages_that_are_explained_exist() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", (DOCS / "operations.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 30
    known = source_strings()
    assert [message for message in rows if message not in known] == []


@pytest.mark.parametrize("document", [*(f"docs/{page}" for page in PAGES), "README.md"])
def test_commands_parse(document: str) -> None:
    """Every `remit ...` line of a shell block has options that exist, every block is valid shell."""
    for _, block in blocks(ROOT / document, "bash", "sh"):
        assert subprocess.run(["bash", "-n"], input=block, text=True).returncode == 0, block
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "remit" and "--config" not in words:
                assert parse(words[1:])


def test_job_files() -> None:
    scripts = sorted((DOCS / "jobs").glob("*.sh"))
    assert len(scripts) == 2
    for script in scripts:
        assert subprocess.run(["bash", "-n", script]).returncode == 0
        assert re.search(r"^#SBATCH --signal=\S*TERM@\d+", script.read_text(), re.MULTILINE)
    objects = [part for file in sorted((DOCS / "jobs").glob("*.yaml")) for part in yaml.safe_load_all(file.read_text())]
    assert [(part["apiVersion"], part["kind"]) for part in objects] == [
        ("ray.io/v1", "RayJob"), ("v1", "Service"), ("batch/v1", "Job"),
    ]  # fmt: skip
    assert parse(objects[0]["spec"]["entrypoint"].split()[1:]).name == "rl"
    (container,) = objects[2]["spec"]["template"]["spec"]["containers"]
    command = container["command"]
    assert parse(command[command.index("train") :]).global_batch_size == 512
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in objects[2]["spec"]["template"]["spec"]["volumes"]}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A folder with what the snippets take for granted: a corpus, a base and a reference of one family."""
    folder = tmp_path_factory.mktemp("documents")
    for index in range(2):
        texts = [*source_texts(60, seed=50 + index), "plain words " * 400]
        write_corpus(folder / "data" / f"{index}.jsonl.zst", texts)
    for seed, name in enumerate(("base", "rl")):
        make_model(folder / name, seed=seed, positions=4096)
        shutil.copytree(tokenizer_folder, folder / name, dirs_exist_ok=True)
    (folder / "path" / "to").mkdir(parents=True)
    for name, target in (("base-model", "base"), ("rl-model", "rl")):
        (folder / "path" / "to" / name).symlink_to(folder / target)
    return folder


def execute(document: Path, workspace: Path) -> None:
    """Run the bash and Python blocks of a page one after the other, as its reader would."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    environment.pop("RAY_ADDRESS", None)  # as on a machine of one's own
    for language, block in blocks(document, "bash", "python"):
        command = [sys.executable, "-c", block] if language == "python" else ["bash", "-euo", "pipefail", "-c", block]
        done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{document.name}:\n{block}\n{done.stdout}\n{done.stderr}"


def test_own_corpus_page_runs(workspace: Path) -> None:
    execute(DOCS / "own-corpus.md", workspace)
    assert (workspace / "run" / "model" / "config.json").exists()


@pytest.mark.slow
def test_other_pages_run(workspace: Path) -> None:
    """In the order of the table of contents, each on what the pages before it have made."""
    if not (workspace / "scored").exists():
        execute(DOCS / "own-corpus.md", workspace)
    first = ["objectives.md", "training.md", "inspect.md"]
    pages = first + [page for page in PAGES if page not in ("own-corpus.md", "index.md", "log.md", *first)]
    ran = 0
    for page in pages:
        if page == "objectives.md":  # its Python blocks are files of the package: see below
            for _, block in blocks(DOCS / page, "bash"):
                (workspace / "page.md").write_text(f"```bash\n{block}```\n", encoding="utf-8")
                execute(workspace / "page.md", workspace)
        else:
            execute(DOCS / page, workspace)
        ran += len(blocks(DOCS / page, "bash", "python"))
    assert ran > 5
    assert (workspace / "run-miniplm" / "model").exists()
    assert (workspace / "run-two" / "model").exists()
    assert (workspace / "rows.html").stat().st_size > 10_000
    assert (workspace / "report.html").stat().st_size > 1_000_000


@pytest.mark.slow
def test_readme_commands_run(workspace: Path, tmp_path: Path) -> None:
    """The commands for one's own corpus and models; the sample project is the README's first block and a test of its own."""
    for name in ("data", "path"):  # a folder of its own: the pages have other folders called packed and scored
        (tmp_path / name).symlink_to(workspace / name)
    for name in ("pyproject.toml", "Makefile"):
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parent.parent)
    shell = [block for language, block in blocks(ROOT / "README.md", "bash") if "score train" not in block]
    assert len(shell) == 2
    for block in shell:
        (tmp_path / "page.md").write_text(
            f"```bash\n{block.replace('make ', 'make EXTRA=cpu -o .venv/.installed-cpu ')}```\n", encoding="utf-8"
        )
        execute(tmp_path / "page.md", tmp_path)
    assert (tmp_path / "big" / "run" / "model").exists()


def focal(logprobs_V: torch.Tensor, target: int) -> torch.Tensor:
    loss = -logprobs_V[target]
    return (1 - torch.exp(-loss.detach())) * loss


def smoothed(logprobs_V: torch.Tensor, target: int) -> torch.Tensor:
    return -0.9 * logprobs_V[target] - 0.1 * logprobs_V.mean()


@pytest.mark.parametrize(("example", "token_loss"), [(0, focal), (1, smoothed)])
def test_objectives_of_the_documentation_train(
    tmp_path: Path,
    annotated: dict[str, Path],
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    example: int,
    token_loss: Callable,
) -> None:
    """Registered as the text says, through remit train: the first step against float64."""
    module = ModuleType("trainer.objectives.mine")
    exec(blocks(DOCS / "objectives.md", "python")[example][1], module.__dict__)
    monkeypatch.setitem(sys.modules, "trainer.objectives.mine", module)
    monkeypatch.setitem(registry.OPTIONS, "mine", ())
    metrics = run(tmp_path / "out", annotated["packed"], models["base"], objective="mine", seed=4)[0]
    base, losses = load(models["base"]), []
    for row in rows_of_step(annotated["packed"], 0, 8, seed=4):
        for t, logprobs_V in enumerate(row_distributions(base, row, "packed")):
            if logprobs_V is not None:
                losses.append(token_loss(logprobs_V, row["input_ids"][t]))
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.sqrt(sum(p.grad.double().square().sum() for p in base.parameters() if p.grad is not None))
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
