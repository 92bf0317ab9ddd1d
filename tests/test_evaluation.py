"""The exported model in lm-evaluation-harness, against log-likelihoods computed here."""

import json
from pathlib import Path

import lm_eval
import pytest
import torch
import transformers
import yaml
from annotated import run
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

QUESTIONS = [
    ("The sum of two and three is", ["five", "seven", "a banana"], 0),
    ("Öl auf Wasser — was schwimmt?", ["das Öl", "nichts"], 0),
    ("for i in range(", ["10):", "))", "import", "class Ünïcode"], 0),
    ("def f(x): return", ["x", "None of these at all"], 1),
    ("import", ["os", "json", "numpy as np"], 2),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, annotated: dict[str, Path], models: dict[str, Path]) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    run(out, annotated["packed"], models["base"], max_steps=3, learning_rate=1e-3)
    return out / "model"


def test_lm_evaluation_harness(tmp_path: Path, exported: Path) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"q": q, "choices": c, "answer": a}) + "\n" for q, c, a in QUESTIONS))
    task = {
        "task": "remit_local", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer", "metric_list": [{"metric": "acc"}], "target_delimiter": " ",
    }  # fmt: skip
    (tmp_path / "remit_local.yaml").write_text(yaml.safe_dump(task))
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(exported), dtype="float32", device="cpu", batch_size=2),
        tasks=["remit_local"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert results is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    right = 0
    for (question, choices, answer), sample in zip(QUESTIONS, results["samples"]["remit_local"], strict=True):
        scores = []
        for choice, response in zip(choices, sample["filtered_resps"], strict=True):
            start = len(tokenizer(question, add_special_tokens=False).input_ids)
            ids = torch.tensor([tokenizer(f"{question} {choice}", add_special_tokens=False).input_ids])
            with torch.no_grad():
                logprobs = model(ids).logits[0, :-1].log_softmax(-1)
            scores.append(logprobs.gather(1, ids[0, 1:, None])[start - 1 :].sum().item())
            assert float(response[0]) == pytest.approx(scores[-1], abs=1e-3)
        right += scores.index(max(scores)) == answer
    assert results["results"]["remit_local"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
