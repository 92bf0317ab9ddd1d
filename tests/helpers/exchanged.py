"""What processes hand to each other, as each of them writes it down: bytes of the tensors that torch.distributed is given."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

COLLECTIVES = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor")


def write_down(folder: Path) -> str:
    """Code that has a rank write its calls to a file in `folder`."""
    return f"from exchanged import wrap_collectives\nwrap_collectives({str(folder)!r})"


def wrap_collectives(folder: str) -> None:
    import torch.distributed as dist

    def wrap(name: str) -> Callable[..., Any]:
        original = getattr(dist, name)

        def call(*inputs: Any, **named: Any) -> Any:
            tensors = [value for value in (*inputs, *named.values()) if hasattr(value, "nbytes")]
            group = named.get("group")
            if group is not None:
                ranks = dist.get_process_group_ranks(group)
                line = {"what": name, "ranks": ranks, "bytes": max(tensor.nbytes for tensor in tensors)}
                with open(f"{folder}/exchanged-{dist.get_rank()}.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
            return original(*inputs, **named)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, wrap(name))


def exchanged(folder: Path, rank: int) -> Counter[tuple[str, tuple[int, ...]]]:
    """Bytes of a rank by what was called and among which ranks."""
    counts: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for line in map(json.loads, (folder / f"exchanged-{rank}.jsonl").read_text().splitlines()):
        counts[line["what"], tuple(line["ranks"])] += line["bytes"]
    return counts
