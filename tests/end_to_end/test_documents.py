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
import ray
import torch
import yaml
from annotated import rows_of_step, run
from conftest import make_model, source_texts, write_corpus
from oracles import load, row_distributions

from pipelines.cli import parse
from trainer.objectives import settings as registry

pytestmark = pytest.mark.usefixtures("starts_processes")

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PACKAGES = ("shards", "scorer", "trainer", "pipelines")
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


def make_workspace(folder: Path, tokenizer: Path) -> Path:
    """A folder with what the snippets take for granted: a corpus, a base and a reference of one family."""
    for index in range(2):
        texts = [*source_texts(60, seed=50 + index), "plain words " * 400]
        write_corpus(folder / "data" / f"{index}.jsonl.zst", texts)
    for seed, name in enumerate(("base", "rl")):
        make_model(folder / name, seed=seed, positions=4096)
        shutil.copytree(tokenizer, folder / name, dirs_exist_ok=True)
    (folder / "path" / "to").mkdir(parents=True)
    for name, target in (("base-model", "base"), ("rl-model", "rl")):
        (folder / "path" / "to" / name).symlink_to(folder / target)
    return folder


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return make_workspace(tmp_path_factory.mktemp("documents"), tokenizer_folder)


def environment_of_a_reader() -> dict[str, str]:
    """Without a cluster, with this remit on the path."""
    own = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return inherited | own | {"CUDA_VISIBLE_DEVICES": ""}


def execute(document: Path, workspace: Path, **variables: str) -> None:
    """Run the bash and Python blocks of a page one after the other, as its reader would."""
    environment = environment_of_a_reader() | variables
    for language, block in blocks(document, "bash", "python"):
        command = [sys.executable, "-c", block] if language == "python" else ["bash", "-euo", "pipefail", "-c", block]
        done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{document.name}:\n{block}\n{done.stdout}\n{done.stderr}"


@pytest.mark.usefixtures("ray_session")
def test_own_corpus_page_runs(workspace: Path) -> None:
    """On the cluster of the tests, where none of its commands waits for a Ray of its own."""
    execute(DOCS / "own-corpus.md", workspace, RAY_ADDRESS=ray.get_runtime_context().gcs_address)
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


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the repository as its user gets it."""
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tmp_path / name)
    for package in ("shards", "scorer", "trainer", "pipelines"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def installed(block: str) -> str:
    """The block with the environment of these tests in place of one that make would install."""
    venv = Path(sys.executable).parent.parent
    return block.replace("make ", f"make EXTRA=cpu VENV={venv} -o {venv}/.installed-cpu ")


def read(tree: Path, block: str) -> str:
    """What a shell block prints to its reader, on stdout."""
    environment = environment_of_a_reader() | {"PYTHONPATH": str(tree)}
    command = ["bash", "-euo", "pipefail", "-c", block]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_readme_first_block_runs(tree: Path) -> None:
    """`make score train` from nothing, with a smaller sample project; the second time there is nothing to do."""
    first = blocks(ROOT / "README.md", "bash")[0][1]
    assert first == "make score train\n"
    small = "SAMPLE_ARGS='--documents 2400 --base-steps 30 --reference-steps 60'"
    output = read(tree, installed(first).replace("make ", f"make {small} "))
    for step in ("sample: corpus", "sample: reference", "packed ", "scored as 'rl' ", "trained "):
        assert f"\n{step}" in f"\n{output}", output
    assert re.search(r"^After \d+ steps on the same rows ReMiT is ", output, re.MULTILINE), output
    for folder in ("run", "run-ntp"):
        assert (tree / "work" / folder / "model" / "model.safetensors").exists()
    models = {file: file.stat().st_mtime_ns for file in (tree / "work").rglob("*.safetensors")}
    again = read(tree, installed(first).replace("make ", f"make {small} "))
    assert again.count("nothing to do") == 5, again  # pack, score, pack of the held-out text, two runs
    assert "sample: " not in again
    assert {file: file.stat().st_mtime_ns for file in (tree / "work").rglob("*.safetensors")} == models
    (snippet,) = blocks(ROOT / "README.md", "python")
    subprocess.run([sys.executable, "-c", snippet[1]], cwd=tree, check=True)


@pytest.mark.slow
def test_readme_commands_run(workspace: Path, tree: Path) -> None:
    """The commands for one's own corpus and models."""
    for name in ("data", "path"):  # a folder of its own: the pages have other folders called packed and scored
        (tree / name).symlink_to(workspace / name)
    shell = [block for language, block in blocks(ROOT / "README.md", "bash") if "score train" not in block]
    assert len(shell) == 2
    for block in shell:
        read(tree, installed(block))
    assert (tree / "big" / "run" / "model").exists()


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


def test_files_that_contributors_are_sent_to_exist() -> None:
    """Names in docs/architecture.md and CONTRIBUTING.md; without a folder they stand in the package named before."""
    for page in (DOCS / "architecture.md", ROOT / "CONTRIBUTING.md"):
        package = None
        for name in re.findall(r"`([\w/]+\.py)`", page.read_text(encoding="utf-8")):
            first = name.partition("/")[0]
            if first in (*PACKAGES, "tests", "benchmarks"):
                package = ROOT / first
                assert (ROOT / name).is_file(), (page.name, name)
            else:
                folders = [ROOT / folder for folder in PACKAGES] if package is None else [package]
                assert any(list(folder.rglob(name)) for folder in folders), (page.name, name)
