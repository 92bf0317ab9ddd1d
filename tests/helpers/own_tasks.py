"""Questions as tasks of the harness, and a model in float64 that answers them: for the tests of remit eval."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

QUESTIONS = [
    ("The sum of two and three is", ["five", "seven", "a banana"], 0),
    ("Öl auf Wasser — was schwimmt?", ["das Öl", "nichts"], 0),
    ("for i in range(", ["10):", "))", "import", "class Ünïcode"], 0),
    ("def f(x): return", ["x", "None of these at all"], 1),
    ("x", ["=", "😀👩‍👩‍👧", "y"], 1),
    ("שלום", ["עולם", "self"], 0),
    ("import", ["os", "json", "numpy as np"], 2),
]
NEW_TOKENS = 6


class Oracle:
    """A model in float64 by transformers alone."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def loglikelihood(self, question: str, answer: str) -> float:
        start = len(self.tokenizer(question, add_special_tokens=False).input_ids)
        ids = torch.tensor([self.tokenizer(f"{question} {answer}", add_special_tokens=False).input_ids])
        logprobs = self.model(ids).logits[0, :-1].log_softmax(-1)
        return logprobs.gather(1, ids[0, 1:, None])[start - 1 :].sum().item()

    @torch.no_grad()
    def continuation(self, question: str) -> str:
        ids = self.tokenizer(question, add_special_tokens=False).input_ids
        start = len(ids)
        for _ in range(NEW_TOKENS):
            ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == self.tokenizer.eos_token_id:
                break
        return self.tokenizer.decode(ids[start:], skip_special_tokens=True)

    def right_choices(self) -> list[float]:
        right = []
        for question, choices, answer in QUESTIONS:
            scores = [self.loglikelihood(question, choice) for choice in choices]
            right.append(float(scores.index(max(scores)) == answer))
        return right


def write_tasks(folder: Path, oracle: Oracle) -> Path:
    """Five tasks and a group. The first answer, asked for as text, is the model's own for every other question, else a wrong one."""
    rows = []
    for index, (question, choices, answer) in enumerate(QUESTIONS):
        own = oracle.continuation(question)
        rows.append({"q": question, "choices": choices, "answer": answer, "first": choices[0]})
        rows[-1]["text"] = own if index % 2 == 0 else own + "!"
        rows[-1]["head"] = own[:1] if index % 3 == 0 else "no"
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    few = folder / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]), encoding="utf-8")
    aggregate = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    group = {"group": "own_group", "task": ["own_choice", "own_few"], "aggregate_metric_list": aggregate}
    (folder / "group.yaml").write_text(yaml.safe_dump(group))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
        "doc_to_text": "{{q}}",
    }  # fmt: skip
    tasks: dict[str, dict[str, Any]] = {
        "own_choice": {
            "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "own_loglikelihood": {
            "output_type": "loglikelihood", "doc_to_target": "{{' ' + first}}", "metric_list": [{"metric": "perplexity"}],
        },
        "own_filtered": {
            "output_type": "generate_until", "doc_to_target": "head", "repeats": 2,
            "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {"until": ["\u2603"], "do_sample": False, "max_gen_toks": NEW_TOKENS},
            "filter_list": [
                {"name": "head", "filter": [
                    {"function": "regex", "regex_pattern": "(?s)^(.)"}, {"function": "majority_vote"},
                    {"function": "take_first"}]},
                {"name": "whole", "filter": [{"function": "take_first"}]},
            ],
        },
        "own_few": {
            "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
            "dataset_kwargs": {"data_files": {"test": str(few)}}, "metric_list": [{"metric": "acc"}],
        },
        "own_text": {
            "output_type": "generate_until", "doc_to_target": "text", "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {"until": ["\u2603"], "do_sample": False, "max_gen_toks": NEW_TOKENS},
        },
    }  # fmt: skip
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | common | task))
    return folder
