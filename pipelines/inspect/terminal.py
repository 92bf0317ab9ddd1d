"""remit inspect: what a shard folder is, and a readable view of its rows in the terminal."""

import json
import sys
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.inspect.find_rows import read_rows
from pipelines.settings import InspectConfig
from shards.folder import ShardFolder
from shards.schema import logprobs_column


def read_row(folder: ShardFolder, row: int) -> dict[str, Any]:
    """Row `row` of a folder, counted over all parts, as plain Python values; its part is verified first."""
    return next(read_rows(folder, [row]))


def token_strings(folder: ShardFolder, input_ids: list[int]) -> list[str]:
    """Text of each token; one that is only a piece of a character shows as its byte-level symbols."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(folder.tokenizer_json()))
    strings = []
    for token_id in input_ids:
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        strings.append(tokenizer.id_to_token(token_id) or "?" if "\ufffd" in text or not text else text)
    return strings


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
    corpus_file = folder.manifest.corpus[row["source"]].path
    console.print(
        Text(
            f"row {number} ({part}): {len(row['input_ids'])} tokens, "
            f"{len(row['doc_lengths'])} document pieces, from {corpus_file}"
        )
    )
    names = list(folder.manifest.references)
    strings = token_strings(folder, row["input_ids"])
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for header in ("pos", "doc", "id", "token"):
        table.add_column(header, justify="left" if header == "token" else "right", no_wrap=True)
    for name in names:
        table.add_column(f"log p {name}", justify="right")
        table.add_column("", width=12, no_wrap=True)
    documents = np.repeat(row["doc_ids"], row["doc_lengths"]).tolist()
    piece_starts = set((np.cumsum(row["doc_lengths"]) - row["doc_lengths"]).tolist())
    shown = len(strings) if tokens == 0 else min(tokens, len(strings))
    for position in range(shown):
        cells = [
            Text(str(position)),
            Text(str(documents[position]) if position in piece_starts else ""),
            Text(str(row["input_ids"][position])),
            Text(json.dumps(strings[position], ensure_ascii=False)[1:-1].replace(" ", "·")),
        ]
        for name in names:
            logprob = row[logprobs_column(name)][position]
            cells.append(Text("-" if logprob is None else f"{logprob:.4f}"))
            # one mark per nat: how surprised the reference is
            cells.append(Text("" if logprob is None else "▪" * min(12, round(-logprob)), style="red"))
        if position in piece_starts and position:
            table.add_section()
        table.add_row(*cells)
    console.print(table)
    if shown < len(strings):
        console.print(Text(f"... {len(strings) - shown} more tokens; --tokens 0 shows all"))


def _show_folder(folder: ShardFolder, console: Console) -> None:
    manifest = folder.manifest
    missing = len(folder.missing_parts())
    lines = [
        f"{folder.path}: {manifest.tokens:,} tokens in {manifest.rows:,} rows of at most {manifest.seq_len}, "
        f"{len(manifest.parts):,} parts" + (f", {missing} of them missing" if missing else ", complete"),
        ("documents as packed: " if manifest.selections else "documents: ")
        + ", ".join(f"{kind} {count:,}" for kind, count in manifest.documents.items()),
        f"tokenizer: {json.dumps(manifest.tokenizer)}",
        *(f"corpus file {index}: {file.path}, {file.tokens:,} tokens" for index, file in enumerate(manifest.corpus)),
        *(f"reference {name}: {json.dumps(reference)}" for name, reference in manifest.references.items()),
        *(f"selection: {json.dumps(selection)}" for selection in manifest.selections),
    ]
    for line in lines:
        console.print(Text(line), soft_wrap=True)
