"""remit inspect: what a shard folder is, and a readable view of its rows in the terminal."""

import json
import sys
from typing import Any

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.console import tokens_summary
from pipelines.inspect.find_rows import read_rows
from pipelines.settings import InspectConfig
from pipelines.token_text import printable, token_label, token_strings
from shards.folder import ShardFolder
from shards.schema import logprobs_column

MAX_LABEL = 24  # characters of a token
BAR = 12  # marks, one per nat


def read_row(folder: ShardFolder, row: int) -> dict[str, Any]:
    """Row `row` of a folder, counted over all parts, as plain Python values; its part is verified first."""
    return next(read_rows(folder, [row]))


def show(folder: ShardFolder, config: InspectConfig, rows: list[int]) -> None:
    """Print the rows, or the folder's provenance where there are none."""
    console = Console(file=sys.stdout, highlight=False)
    if not rows:
        _show_folder(folder, console)
    for number, row in zip(rows, read_rows(folder, rows)):
        _show_row(folder, number, row, config.tokens, console)


def _show_row(folder: ShardFolder, number: int, row: dict[str, Any], tokens: int, console: Console) -> None:
    """tokens: how many to show, 0 for all."""
    part = folder.manifest.parts[number // folder.manifest.rows_per_part].name
    corpus_file = printable(folder.manifest.corpus[row["source"]].path)
    line = f"row {number} ({part}): {len(row['input_ids'])} tokens, {len(row['doc_lengths'])} document pieces"
    quarantined = "".join(f"; quarantined: no log-probs of {name}" for name in row["quarantined"])
    console.print(Text(f"{line}, from {corpus_file}{quarantined}"), soft_wrap=True)
    documents = np.repeat(row["doc_ids"], row["doc_lengths"]).tolist()
    piece_starts = set((np.cumsum(row["doc_lengths"]) - row["doc_lengths"]).tolist())
    strings = token_strings(folder, row["input_ids"][: tokens or None])
    columns = {
        "pos": [str(position) for position in range(len(strings))],
        "doc": [str(documents[place]) if place in piece_starts else "" for place in range(len(strings))],
        "id": [str(token_id) for token_id in row["input_ids"][: len(strings)]],
        "token": [token_label(string) for string in strings],
    }
    logprobs = {name: row[logprobs_column(name)][: len(strings)] for name in folder.manifest.references}
    columns |= {f"log p {name}": [_number(value) for value in values] for name, values in logprobs.items()}

    # the bars get what the numbers leave, which are never cut: a line may be wider than the terminal
    widths = [
        min(MAX_LABEL if header == "token" else 99, max(map(cell_len, [*header.split(), *cells])))
        for header, cells in columns.items()
    ]
    taken = sum(widths) + 3 * (len(widths) - 1)
    bar = min(BAR, (console.width - taken) // max(1, len(logprobs)) - 3)
    if bar < 4:
        bar = 0
        console.width = max(console.width, taken)
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for header, width in zip(columns, widths):
        is_text = header == "token"
        table.add_column(
            header, justify="left" if is_text else "right", min_width=width, max_width=width, no_wrap=is_text
        )
        if header.startswith("log p") and bar:
            table.add_column("", width=bar, no_wrap=True)
    for place, cells in enumerate(zip(*columns.values())):
        texts = [Text(cell) for cell in cells[:4]]
        for cell, values in zip(cells[4:], logprobs.values()):
            surprise = round(-(values[place] or 0))  # nats
            texts += [Text(cell), *([Text("▪" * min(bar, surprise), style="red")] if bar else [])]
        if place in piece_starts and place:
            table.add_section()
        table.add_row(*texts)
    console.print(table)
    if len(strings) < len(row["input_ids"]):
        console.print(Text(f"... {len(row['input_ids']) - len(strings)} more tokens; --tokens 0 shows all"))


def _number(logprob: float | None) -> str:
    return "-" if logprob is None else f"{logprob:.4f}"


def _show_folder(folder: ShardFolder, console: Console) -> None:
    manifest = folder.manifest
    missing = len(folder.missing_parts())
    lines = [
        f"{folder.path}: {manifest.tokens:,} tokens in {manifest.rows:,} rows of at most {manifest.seq_len}, "
        f"{len(manifest.parts):,} parts" + (f", {missing} of them missing" if missing else ", complete"),
        ("documents as packed: " if manifest.selections else "documents: ")
        + ", ".join(f"{kind} {count:,}" for kind, count in manifest.documents.items()),
        f"tokenizer: {manifest.tokenizer['fingerprint'][:12]}.., ids 0 to {manifest.tokenizer['vocab_size'] - 1}",
        tokens_summary(manifest),
        *(f"corpus file {index}: {file.path}, {file.tokens:,} tokens" for index, file in enumerate(manifest.corpus)),
        *(f"reference {name}: {json.dumps(reference)}" for name, reference in manifest.references.items()),
        *(f"selection: {json.dumps(selection)}" for selection in manifest.selections),
    ]
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=True)
