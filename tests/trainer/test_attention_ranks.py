"""Ranks that would attend in different ways take the same one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from in_shares import on_ranks

import trainer.attention_choice
from trainer.attention_choice import agree, choose_attention
from trainer.distributed import World
from trainer.document_attention import DOCUMENTS, VARLEN, Attention
from trainer.loss_model import LossModel
from trainer.model import load_base

EACH = "PyTorch's scaled_dot_product_attention, one document after the other"


def disagree(world: World, folder: Path) -> None:
    for sharding in ("full", "replicate"):
        for failing, form, text in (
            ("does not ask for attention", "sdpa", "masks of T x T (LlamaForCausalLM does not ask for attention)"),
            (None, DOCUMENTS, EACH),
        ):
            base = load_base(folder, "float32", world.device, "document", world, sharding)
            if world.rank == 1 and failing:
                trainer.attention_choice.problem_of_class = failed(trainer.attention_choice.problem_of_class, failing)
            base.attention = base.ask(choose_attention)
            before = base.attention
            agree(base, world)
            trainer.attention_choice.problem_of_class = PROBLEM
            suffix = ", on all processes since no better one was found on process 1" if failing else ""
            assert base.attention == Attention(form, text + suffix)
            assert not failing or (before.form == form) == (world.rank == 1)
            base.prepare(False, "off")
            assert base.model.config._attn_implementation == form
            loss_model = LossModel(base)
            base.spread(loss_model, world)


PROBLEM = trainer.attention_choice.problem_of_class


def failed(call: Any, reason: str) -> Any:
    def problem(*arguments: Any) -> str:
        call(*arguments)  # of a base in shares all ranks run the model
        return reason

    return problem


@pytest.mark.usefixtures("starts_processes")
def test_a_trial_that_fails_on_one_rank_decides_for_all(tmp_path: Path) -> None:
    on_ranks(tmp_path, disagree, 2, make_model(tmp_path / "model", "Llama"))


class Two(World):
    """This rank, and another one that says `other`."""

    def __init__(self, other: tuple[str, Attention | None]) -> None:
        super().__init__(torch.device("cpu"), 0, 2)
        object.__setattr__(self, "other", other)

    def from_all(self, value: Any) -> list[Any]:
        return [value, self.other]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("other", "form", "text"),
    [
        ((VARLEN, Attention(VARLEN, "PyTorch's varlen_attn")), DOCUMENTS, f"{EACH}, on all processes since no better one was found on process 0"),
        ((DOCUMENTS, Attention(DOCUMENTS, EACH)), DOCUMENTS, EACH),
        (("eager", Attention("eager", "the class's own")), "eager", "the class's own, on all processes since no better one was found on process 1"),
    ],
)  # fmt: skip
def test_the_slowest_is_taken(tmp_path: Path, other: Any, form: str, text: str) -> None:
    base = load_base(make_model(tmp_path / "model", "Llama"), "float32", torch.device("cpu"))
    base.attention = choose_attention(base)
    agree(base, Two(other))
    assert base.attention == Attention(form, text)
    assert base.model.config._attn_implementation == form
