"""Measure a model: accuracy on held-out problems, loss on held-out texts, distance from a reference.

    python -m benchmarks.lab.measure --model DIR --data DIR --out DIR [--reference DIR]
    python -m benchmarks.lab.measure --model DIR --start DIR --exports DIR --steps N --data DIR --out DIR

Data: problems.jsonl with {"level", "prompt", "answer", "solution"}, and one NAME.jsonl with {"text"} per general text.
Out: measurements.json, a flat mapping of metric to value. All losses are natural logarithms, means per token.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.lab.command import run_command
from benchmarks.lab.results import RESULT

GENERAL = ("stories", "notes")


@dataclass(frozen=True)
class MeasureConfig:
    """Measure a model on the laboratory's held-out data."""

    data: Path
    """Folder of the held-out data."""
    out: Path
    """Folder to write measurements.json into."""
    model: Path | None = None
    """Model folder."""
    exports: Path | None = None
    """Folder of the models that a run wrote on its way, step-000100 and so on; measurements.json then has metrics by
    step, from that of --start, which is step 0, to that of --model, which is step --steps."""
    start: Path | None = None
    """With --exports: the model that the run began with."""
    steps: int | None = None
    """With --exports: steps of the run, whose end is --model."""
    reference: Path | None = None
    """Model that the KL divergence is measured from."""
    problems: int | None = None
    """At most so many problems of each level, the first ones; default: all."""
    sampled: int = 500
    """Problems of each level that are also solved by sampling at temperature 1; 0: none."""
    batch_size: int = 250
    """Prompts that are solved at once."""
    max_new_tokens: int = 64
    """Longest solution."""
    seed: int = 0
    """Of the sampling."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if self.model is None:
            raise ValueError("--model is not given, expected the model to measure, with --exports that at the end")
        if len({self.exports is None, self.start is None, self.steps is None}) > 1:
            raise ValueError("--exports, --start and --steps go together, expected all of them or none")


def solve(model: Any, tokenizer: Any, prompts: Sequence[str], config: MeasureConfig, sample: bool) -> list[str]:
    """The model's completion of each prompt, up to its end token; greedy, or sampled at temperature 1.

    Prompts of similar length are solved together, padded on the left; attention masks and positions leave the padding
    out, so that a completion does not depend on its batch but for rounding.
    """
    import torch

    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(ids[index]))
    completions = [""] * len(prompts)
    if sample:
        torch.manual_seed(config.seed)
    for start in range(0, len(order), config.batch_size):
        batch = order[start : start + config.batch_size]
        width = max(len(ids[index]) for index in batch)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        input_ids_BT = torch.full((len(batch), width), pad)
        mask_BT = torch.zeros_like(input_ids_BT)
        for row, index in enumerate(batch):
            input_ids_BT[row, width - len(ids[index]) :] = torch.tensor(ids[index])
            mask_BT[row, width - len(ids[index]) :] = 1
        # top_k=0 and top_p=1: the distribution itself
        kind = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
        with torch.no_grad():
            output = model.generate(
                input_ids_BT,
                attention_mask=mask_BT,
                max_new_tokens=config.max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=pad,
                **kind,
            )
        for index, tokens in zip(batch, output[:, width:].tolist(), strict=True):
            end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else len(tokens)
            completions[index] = tokenizer.decode(tokens[:end])
    return completions


def accuracies(problems: Sequence[dict[str, str]], completions: Sequence[str], name: str) -> dict[str, float]:
    """Share of right answers by level as NAME_LEVEL, and over both levels as NAME_all (each level counts the same)."""
    from pipelines.posttrain.rewards import final_answer

    right: dict[str, list[bool]] = {}
    for problem, completion in zip(problems, completions, strict=True):
        right.setdefault(problem["level"], []).append(final_answer(completion) == problem["answer"])
    shares = {level: sum(hits) / len(hits) for level, hits in right.items()}
    return {f"{name}_{level}": share for level, share in shares.items()} | {
        f"{name}_all": sum(shares.values()) / len(shares)
    }


def logprobs_of(model: Any, rows: Sequence[list[int]], batch_size: int = 64) -> Iterator[tuple[int, Any]]:
    """(index of the row, log-probs over the vocabulary for all but its first token, [T - 1, V]), by falling length."""
    import torch

    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = len(rows[batch[0]])
        input_ids_BT = torch.zeros((len(batch), width), dtype=torch.long)
        mask_BT = torch.zeros_like(input_ids_BT)
        for row, index in enumerate(batch):  # padded on the right: what follows a token does not change it
            input_ids_BT[row, : len(rows[index])] = torch.tensor(rows[index])
            mask_BT[row, : len(rows[index])] = 1
        with torch.no_grad():
            logprobs_BTV = model(input_ids_BT, attention_mask=mask_BT).logits.float().log_softmax(-1)
        for row, index in enumerate(batch):
            yield index, logprobs_BTV[row, : len(rows[index]) - 1]


def text_loss(model: Any, rows: Sequence[list[int]], skip: Sequence[int] | None = None) -> float:
    """Mean loss per predicted token of the rows; skip: that many tokens at the start of each row are not counted."""
    import torch

    total, count = 0.0, 0
    for index, logprobs_TV in logprobs_of(model, rows):
        targets = torch.tensor(rows[index][1:])
        first = max(0, (skip[index] if skip else 1) - 1)
        losses = -logprobs_TV.gather(1, targets[:, None])[first:, 0]
        total += float(losses.double().sum())
        count += len(losses)
    return total / count


def mean_kl(model: Any, reference: Any, rows: Sequence[list[int]], skip: Sequence[int]) -> float:
    """Mean over the tokens after the first `skip` of each row of KL(reference || model), over the vocabulary."""
    total, count = 0.0, 0
    for (index, ours_TV), (other, theirs_TV) in zip(logprobs_of(model, rows), logprobs_of(reference, rows)):
        assert index == other
        first = max(0, skip[index] - 1)
        kl_T = (theirs_TV.exp() * (theirs_TV - ours_TV)).sum(-1)[first:]
        total += float(kl_T.double().sum())
        count += len(kl_T)
    return total / count


def measure(config: MeasureConfig, folder: Path) -> dict[str, float]:
    """All metrics of the model in `folder`."""
    import transformers

    def load(path: Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()

    model, tokenizer = load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    problems = first_of_each(read_lines(config.data / "problems.jsonl"), config.problems)
    metrics = accuracies(
        problems, solve(model, tokenizer, [p["prompt"] for p in problems], config, sample=False), "greedy"
    )
    if config.sampled:
        some = first_of_each(problems, config.sampled)
        metrics |= accuracies(
            some, solve(model, tokenizer, [p["prompt"] for p in some], config, sample=True), "sampled"
        )
    rows, prompt_lengths = solution_rows(tokenizer, problems)
    metrics["loss_solutions"] = text_loss(model, rows, prompt_lengths)
    end = [tokenizer.eos_token_id]
    for name in GENERAL:
        texts = [line["text"] for line in read_lines(config.data / f"{name}.jsonl")]
        metrics[f"loss_{name}"] = text_loss(model, [tokenizer(text)["input_ids"] + end for text in texts])
    if config.reference is not None:
        metrics["kl_reference"] = mean_kl(model, load(config.reference), rows, prompt_lengths)
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise ValueError(f"{folder}: {name} is {value}, expected a number; the model is broken")
    return metrics


def solution_rows(tokenizer: Any, problems: Sequence[dict[str, str]]) -> tuple[list[list[int]], list[int]]:
    """Token ids of each problem with its right solution and an end token; lengths of the prompts."""
    prompts = [tokenizer(problem["prompt"])["input_ids"] for problem in problems]
    solutions = [tokenizer(problem["solution"])["input_ids"] for problem in problems]
    rows = [prompt + solution + [tokenizer.eos_token_id] for prompt, solution in zip(prompts, solutions, strict=True)]
    return rows, [len(prompt) for prompt in prompts]


def first_of_each(problems: Sequence[dict[str, str]], count: int | None) -> list[dict[str, str]]:
    """The first `count` problems of each level, in order."""
    seen: dict[str, int] = {}
    kept = []
    for problem in problems:
        seen[problem["level"]] = seen.get(problem["level"], 0) + 1
        if count is None or seen[problem["level"]] <= count:
            kept.append(problem)
    return kept


def read_lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(config: MeasureConfig) -> int:
    assert config.model is not None
    if config.exports is None:
        result: Any = measure(config, config.model)
        print(", ".join(f"{name} {value:.4f}" for name, value in result.items()))
    else:
        assert config.start is not None
        assert config.steps is not None
        folders = {int(folder.name.removeprefix("step-")): folder for folder in config.exports.glob("step-*")}
        if not folders or max(folders) >= config.steps:
            raise ValueError(
                f"--exports {config.exports}: has the steps {sorted(folders)}, expected folders step-* of some before "
                f"--steps {config.steps}"
            )
        folders |= {0: config.start, config.steps: config.model}
        result = {str(step): measure(config, folder) for step, folder in sorted(folders.items())}
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / RESULT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_command("lab.measure", MeasureConfig, lambda config, stop: run(config), __doc__)
