"""What processes hand to each other, as each of them writes it down: bytes of the tensors that torch.distributed is given."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

COLLECTIVES = {  # releases of PyTorch have other names for the same
    "all_reduce": ("all_reduce",),
    "reduce_scatter": ("reduce_scatter_single", "reduce_scatter_tensor"),
    "all_gather": ("all_gather_single", "all_gather_into_tensor"),
}


def write_down(folder: Path) -> str:
    """Code that has a rank write its calls with a group of their own to a file in `folder`."""
    return f"from exchanged import wrap_collectives\nwrap_collectives({str(folder)!r})"


def wrap_collectives(folder: str) -> None:
    import torch.distributed as dist

    inside = []

    def wrap(what: str, name: str) -> Callable[..., Any]:
        original = getattr(dist, name)

        def call(*inputs: Any, **named: Any) -> Any:
            group = named.get("group")
            if group is not None and not inside:
                tensors = [value for value in (*inputs, *named.values()) if hasattr(value, "nbytes")]
                ranks = dist.get_process_group_ranks(group)
                line = {"what": what, "ranks": ranks, "bytes": max(tensor.nbytes for tensor in tensors)}
                with open(f"{folder}/exchanged-{dist.get_rank()}.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
            inside.append(name)
            try:
                return original(*inputs, **named)
            finally:
                inside.pop()

        return call

    for what, names in COLLECTIVES.items():
        for name in filter(lambda name: hasattr(dist, name), names):
            setattr(dist, name, wrap(what, name))


def exchanged(folder: Path, rank: int) -> Counter[tuple[str, tuple[int, ...]]]:
    """Bytes of a rank by what was called and among which ranks."""
    counts: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for line in map(json.loads, (folder / f"exchanged-{rank}.jsonl").read_text().splitlines()):
        counts[line["what"], tuple(line["ranks"])] += line["bytes"]
    return counts
