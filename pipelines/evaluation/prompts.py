"""What is asked of a model: how long the answers may be, and prompts that the harness cuts without a word."""

from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs


def is_drawn(task: Any) -> bool:
    """Whether the answers to a task of the harness are drawn at random."""
    return bool(normalize_gen_kwargs(task.get_config("generation_kwargs") or {})["do_sample"])


def refuse_no_room(name: str, tasks: list[Any], model: Any) -> None:
    """ValueError where answers may be as long as all that `model` takes: nothing of the prompts would be left.

    tasks: the harness' objects for `name`, groups resolved.
    """
    for task in tasks:
        if task.get_config("output_type") != "generate_until":
            continue
        new = _max_new_tokens(task.get_config("generation_kwargs"), model)
        if new >= model.max_length:
            raise ValueError(
                f"{name}: answers may have {new:,} tokens and the model takes {model.max_length:,} in all, expected room for "
                "a prompt; leave the task out with --skip or from --tasks"
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
        limit, text = model.max_length - _max_new_tokens(rest, model), prompt
    else:
        # of an answer's tokens the last one is predicted, not read; vLLM wants room for one more nevertheless
        limit, text = model.max_length + (-1 if backend == "vllm" else 1), prompt + rest
    if len(text.encode()) < limit:  # a token has a byte at least, and one may come in front
        return False
    if isinstance(rest, dict):
        return len(model.tok_encode(prompt)) > limit
    return sum(map(len, model._encode_pair(prompt, rest))) > limit


def _max_new_tokens(generation_kwargs: dict[str, Any] | None, model: Any) -> int:
    return normalize_gen_kwargs(generation_kwargs or {}, model.max_gen_toks)["max_gen_toks"]
