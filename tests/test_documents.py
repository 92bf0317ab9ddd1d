"""The examples of docs/objectives.md train, and its commands parse."""

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from annotated import rows_of_step, run
from oracles import load, row_distributions

from pipelines.cli import parse
from trainer.objectives import settings as registry

DOCS = Path(__file__).parent.parent / "docs"


def blocks(document: str, language: str) -> list[str]:
    text = (DOCS / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


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
    exec(blocks("objectives.md", "python")[example], module.__dict__)
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


@pytest.mark.parametrize("document", [path.name for path in sorted(DOCS.glob("*.md"))])
def test_commands_parse(document: str) -> None:
    """Every `remit ...` line of a shell block has options that exist."""
    for block in blocks(document, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "remit":
                assert parse(words[1:])
