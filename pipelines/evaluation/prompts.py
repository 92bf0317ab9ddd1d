"""Prompts against the length that the model takes: the harness cuts longer ones at their beginning, without a word."""

from typing import Any


def max_new_tokens(generation_kwargs: dict[str, Any] | None, default: int) -> int:
    """Tokens that a task's answers may have."""
    from lm_eval.models.utils import normalize_gen_kwargs

    return normalize_gen_kwargs(generation_kwargs or {}, default)["max_gen_toks"]


def refuse_no_room(tasks: list[Any], model: Any) -> None:
    """ValueError for a task whose answers may be as long as all that `model` takes: nothing of its prompts would be left.

    tasks: the harness' objects, groups resolved.
    """
    for task in tasks:
        if task.get_config("output_type") != "generate_until":
            continue
        new = max_new_tokens(task.get_config("generation_kwargs"), model.max_gen_toks)
        if new >= model.max_length:
            raise ValueError(
                f"answers may have {new:,} tokens and the model takes {model.max_length:,} in all, expected room for a "
                "prompt; leave the task out with --skip or from --tasks"
            )


def refuse_long_answer(tasks: list[Any], model: Any) -> None:
    """ValueError where an answer to be scored has more tokens than `model` takes, which the harness merely asserts.

    tasks: with the requests that they have built.
    """
    pairs = (request.args for task in tasks for request in task.instances or [] if len(request.args) == 2)
    for prompt, answer in pairs:
        if not isinstance(answer, str) or len(answer.encode()) < model.max_length:
            continue
        number = len(model._encode_pair(prompt, answer)[1])
        if number > model.max_length:
            raise ValueError(
                f"an answer of its questions has {number:,} tokens and the model takes {model.max_length:,} in all; leave the "
                "task out with --skip or from --tasks"
            )


def count_cut(samples: dict[str, list[dict[str, Any]]], model: Any, backend: str) -> dict[str, int]:
    """For each task the questions with a prompt that was cut: few-shot examples or instructions were missing from it.

    samples: as the harness logs them, once for each filter.
    """
    counts = {}
    for task, rows in samples.items():
        once = [row for row in rows if row["filter"] == rows[0]["filter"]]
        counts[task] = sum(any(_is_cut(request, model, backend) for request in row["arguments"]) for row in once)
    return counts


def _is_cut(request: tuple[Any, ...], model: Any, backend: str) -> bool:
    """request: (prompt, generation settings), (prompt, answer), or (text,), which is scored window by window."""
    if len(request) < 2:
        return False
    prompt, rest = request[:2]
    if isinstance(rest, dict):
        limit, text = model.max_length - max_new_tokens(rest, model.max_gen_toks), prompt
    else:
        # of an answer's tokens the last one is predicted, not read; vLLM wants room for one more nevertheless
        limit, text = model.max_length + (-1 if backend == "vllm" else 1), prompt + rest
    if len(text.encode()) < limit:  # a token has a byte at least, and one may come in front
        return False
    if isinstance(rest, dict):
        return len(model.tok_encode(prompt)) > limit
    return sum(map(len, model._encode_pair(prompt, rest))) > limit
