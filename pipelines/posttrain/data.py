"""Read examples from JSON lines, check them, and leave out what is too long for the model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Example = dict[str, Any]


def read_examples(path: Path, fields: tuple[str, ...]) -> list[Example]:
    """The objects of a .jsonl file; ValueError with file and line for anything that is not one with text in `fields`."""
    if not path.is_file():
        raise ValueError(f"--data {path}: no such file, expected JSON lines with {', '.join(fields)}")
    examples: list[Example] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"--data {path} line {number}"
            try:
                example = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: no JSON ({error}); expected an object with {', '.join(fields)}") from None
            if not isinstance(example, dict):
                raise ValueError(f"{where}: {type(example).__name__}, expected an object with {', '.join(fields)}")
            for field in fields:
                if field not in example:
                    raise ValueError(f"{where}: has no {field!r}, expected an object with {', '.join(fields)}")
                if not isinstance(example[field], str):
                    raise ValueError(
                        f"{where}: {field} is {json.dumps(example[field])[:60]}, expected a text in quotes"
                    )
            if not example["prompt"]:
                raise ValueError(f"{where}: prompt is empty, expected a text that the completion goes on from")
            if examples and example.keys() != examples[0].keys():
                other = sorted(example.keys() ^ examples[0].keys())[0]
                raise ValueError(f"{where}: {other!r} is in some of the examples only, expected the same fields in all")
            examples.append(example)
    if not examples:
        raise ValueError(f"--data {path}: is empty, expected JSON lines with {', '.join(fields)}")
    return examples


def keep_short(
    examples: list[Example], num_tokens: Callable[[list[str]], list[int]], pairs: tuple[str, ...], limit: int | None
) -> list[Example]:
    """The examples whose prompt followed by each of the fields `pairs`, and an end token, has at most `limit` tokens.

    num_tokens: numbers of tokens of a list of texts. No fields: the prompts alone, without an end token.
    """
    if limit is None:
        return examples
    longest = [0] * len(examples)
    for field in pairs or ("",):
        lengths = num_tokens([example["prompt"] + (example[field] if field else "") for example in examples])
        longest = [max(before, length + bool(field)) for before, length in zip(longest, lengths, strict=True)]
    return [example for example, length in zip(examples, longest, strict=True) if length <= limit]
