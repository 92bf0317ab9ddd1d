"""Compiled layers stay compiled, whatever an evaluation before the first step has asked of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import make_base

import trainer.model
from trainer.model import load_base

SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}


class Counted:
    """A backend that runs what it is given, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        def run(*given: Any) -> Any:
            self.calls += 1
            return graph.forward(*given)

        return run


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """What layers are compiled by."""
    counted = Counted()

    def compile_(module: torch.nn.Module, **named: Any) -> None:
        module._compiled_call_impl = torch.compile(module._call_impl, backend=counted, **named)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):  # what torch begins with, and what the test leaves
        yield counted
    torch._dynamo.reset()


def calls_of_a_step(folder: Path, backend: Counted) -> int:
    """Compiled calls of a step after an evaluation whose batches have several shapes, the last an empty one's."""
    base = load_base(folder, "bfloat16", torch.device("cpu"))
    base.prepare(activation_checkpointing=True, compile_layers="on")
    base.model.eval()
    with torch.no_grad():
        for shape in ((4, 24), (4, 24), (3, 24), (1, 24), (4, 17), (1, 2)):
            base.hidden_states(torch.ones(shape, dtype=torch.long))
    base.model.train()
    for shape in ((4, 24), (4, 20), (1, 24)):
        before = backend.calls
        base.hidden_states(torch.ones(shape, dtype=torch.long)).sum().backward()
    return backend.calls - before


@pytest.mark.parametrize(("kind", "changes"), [("SmolLM3", {"no_rope_layers": [1, 0]}), ("Olmo3", SLIDING)])
def test_training_is_compiled_after_an_evaluation(
    tmp_path: Path, backend: Counted, kind: str, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_base(tmp_path / "base", kind, **changes)
    assert calls_of_a_step(folder, backend) >= 2
    assert torch._dynamo.config.recompile_limit == trainer.model.VARIANTS
