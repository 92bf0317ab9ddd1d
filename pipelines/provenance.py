"""Where the numbers of a shard folder come from, for people: its references as a table, its selections as lines."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from pipelines.terminal import print_table
from pipelines.token_text import printable
from shards.manifest import Manifest

HASH_CHARACTERS = 12


def print_lines(console: Console, *lines: str) -> None:
    """Each as one line, however long, with escapes for what a terminal would obey."""
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=True)


def print_references(
    console: Console, manifest: Manifest, counts: Mapping[str, Mapping[str, str]] | None = None
) -> None:
    """A line for each reference: what scored it and how. counts: more columns, by header and name of the reference."""
    if not manifest.references:
        return
    top_k = any("top_k" in reference for reference in manifest.references.values())
    entropy = any("entropy" in reference for reference in manifest.references.values())
    headers = ["reference", "model", "revision", "weights", "dtype", "context", "step"]
    headers += [*(["top k"] if top_k else []), *(["entropy"] if entropy else [])]
    lines = [
        [
            name,
            str(reference.get("model", "?")),
            str(reference.get("revision") or "-")[:HASH_CHARACTERS],
            str(reference.get("weights_sha256") or "-")[:HASH_CHARACTERS],
            _dtype(reference),
            reference["context"],
            _step(reference.get("logprob_step", 0)),
            *([_top_k(reference)] if top_k else []),
            *([_entropy(reference)] if entropy else []),
            *(column[name] for column in (counts or {}).values()),
        ]
        for name, reference in manifest.references.items()
    ]
    lines = [[printable(cell) for cell in line] for line in lines]
    print_table(console, [*headers, *(counts or {})], lines, left=len(headers), ruled=False)
    for name, reference in manifest.references.items():
        if differences := reference.get("tokenizer_differences"):
            print_lines(console, f"tokenizer of {name}: {'; '.join(map(str, differences))}")


def _top_k(reference: dict[str, Any]) -> str:
    """How many, and where."""
    threshold = reference.get("top_k_below_entropy")
    return str(reference.get("top_k", "-")) + ("" if threshold is None else f" below {threshold:.4g} nat")


def _entropy(reference: dict[str, Any]) -> str:
    """At which temperatures it is stored."""
    temperature = reference.get("entropy_temperature")
    return "-" if not reference.get("entropy") else "t = 1" + (f" and {temperature:g}" if temperature else "")


def _dtype(reference: dict[str, Any]) -> str:
    """dtype, and the engine where no model scored."""
    dtype = str(reference.get("dtype", "?"))
    return "fake engine" if reference.get("engine") == "fake" else dtype


def _step(step: float) -> str:
    """Of rounding, in nats: 1/64, or exact."""
    if not step:
        return "exact"
    return f"1/{round(1 / step)}" if step < 1 and (1 / step).is_integer() else f"{step:g}"


def selection_line(selection: Mapping[str, Any]) -> str:
    """How rows were kept."""
    rest = {
        name: value[:HASH_CHARACTERS] if name.endswith("sha256") else value
        for name, value in selection.items()
        if name not in ("method", "rows_kept", "rows_read")
    }
    line = f"selection: {selection['method']} kept {selection['rows_kept']:,} of {selection['rows_read']:,} rows"
    return line + "".join(f", {name.replace('_', ' ')} {_plain(value)}" for name, value in rest.items())


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
