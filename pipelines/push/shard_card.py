"""The card of a pushed shard folder: its manifest for people, and how to read it."""

import json
from importlib.metadata import version
from typing import Any

from pipelines.push.markdown import code, table
from pipelines.push.revealing import without_place
from shards.folder import ShardFolder
from shards.manifest import Manifest
from shards.store import Store

SHOWN = 12  # characters of a hash
RIGHTS = (
    "The rows are the texts of the corpora below as token ids, so their licences hold; the log-probs were computed with "
    "models that have licences of their own."
)


def metadata(manifest: Manifest, path: str, licence: str | None) -> dict[str, Any]:
    """The YAML of the card: with `configs`, `load_dataset(NAME)` finds the parts."""
    name = path.replace("/", "-") or "default"
    files = f"{path}/part-*.arrow" if path else "part-*.arrow"
    values: dict[str, Any] = {"license": licence} if licence else {}
    return values | {
        "task_categories": ["text-generation"],
        "tags": ["remit", "token-ids", *(["log-probs"] if manifest.references else [])],
        "configs": [{"config_name": name, "data_files": [{"split": "train", "path": files}]}],
    }


def text(folder: ShardFolder, repo: str, path: str, quarantined: dict[str, int]) -> str:
    """The section of a shard folder. quarantined: rows without log-probs, by reference."""
    manifest = folder.manifest
    parts = [
        f"## {path or 'Rows'}",
        f"{manifest.tokens:,} tokens in {manifest.rows:,} rows of at most {manifest.seq_len:,}, {len(manifest.parts):,} parts; "
        f"documents: {', '.join(f'{kind} {count:,}' for kind, count in manifest.documents.items())}. Written by "
        f"[remit](https://arxiv.org/abs/2602.03075) {version('remit')}.",
        "### Read it",
        _reading(manifest, repo, path),
        "### References" if manifest.references else "",
        _references(manifest, folder.store, quarantined) if manifest.references else "Not scored yet.",
        "### Tokenizer",
        _tokenizer(manifest),
        "### Sources",
        _sources(manifest),
        "### Provenance",
        _provenance(manifest),
    ]
    return "\n\n".join(part.strip() for part in parts if part)


def _reading(manifest: Manifest, repo: str, path: str) -> str:
    where = f"{repo}/{path}" if path else repo
    name = f', "{path.replace("/", "-")}"' if path else ""
    option = f" --reference {next(iter(manifest.references))}" if manifest.references else " --objective ntp"
    return f"""```bash
remit train --shards hf://datasets/{where} --model BASE --out run{option}
```

```python
from datasets import load_dataset

rows = load_dataset("{repo}"{name}, split="train", streaming=True)
```

{table(["column", "what it holds"], _columns(manifest))}"""


def _columns(manifest: Manifest) -> list[list[str]]:
    known = {
        "input_ids": "token ids of a row",
        "doc_lengths": "tokens of each piece of a document in the row, in order",
        "doc_ids": "the documents, by their place in the corpus file",
        "source": "the corpus file, by its place in `_manifest.json`",
        "predict": "whether a token is to be predicted",
    }
    rows = []
    for name in manifest.schema.names:
        reference = next(
            (r for r in sorted(manifest.references, key=len, reverse=True) if name.startswith(f"{r}_")), ""
        )
        what = known.get(name) or _figure(name.removeprefix(f"{reference}_"), reference)
        rows.append([code(name), what])
    return rows


def _figure(kind: str, reference: str) -> str:
    if kind == "logprobs":
        return f"natural log-prob of each token by {code(reference)}; null where nothing precedes it"
    if kind.startswith("topk"):
        return f"the most probable tokens of {code(reference)}"
    if kind.startswith("sample"):
        return f"tokens drawn from {code(reference)}"
    return f"{kind.replace('_', ' ')} of the prediction of {code(reference)}, in nats"


def _references(manifest: Manifest, store: Store, quarantined: dict[str, int]) -> str:
    rows = []
    for name, reference in manifest.references.items():
        step = reference.get("logprob_step", 0)
        rows.append(
            [
                code(name),
                code(reference.get("model", "?")),
                code((reference.get("revision") or "-")[:SHOWN]),
                code((reference.get("weights_sha256") or "-")[:SHOWN]),
                str(reference.get("dtype", "?")),
                f"{reference.get('engine', '?')} {reference.get('engine_version', '')}".strip(),
                str(reference["context"]),
                f"{step / 2:.4g}" if step else "0",
                f"{quarantined.get(name, 0):,}",
            ]
        )
    headers = ["name", "model", "revision", "weights sha256", "dtype", "engine", "context", "rounded by at most, nats"]
    found = table([*headers, "rows without"], rows)
    measured = measured_error(manifest, store)
    return f"{found}\n{measured}\n" if measured else found


def measured_error(manifest: Manifest, store: Store) -> str:
    """What scoring found before it began, where its log is there and of the only reference."""
    try:
        lines = (
            [json.loads(line) for line in store.read("_score.jsonl").splitlines()]
            if len(manifest.references) == 1
            else []
        )
    except (FileNotFoundError, ValueError):
        return ""
    canaries = [line["canary"] for line in lines if line.get("event") == "engine" and line.get("canary")]
    if not canaries:
        return ""
    last = canaries[-1]
    return (
        f"Measured on {last['tokens']:,.0f} tokens before scoring: the engine's log-probs differ from those of a float32 forward of "
        f"transformers by {last['mean']:.3g} nats in the mean and {last['max']:.3g} at most."
    )


def _tokenizer(manifest: Manifest) -> str:
    tokenizer = manifest.tokenizer
    origin = tokenizer.get("model")
    revision = f" at {code(tokenizer['revision'])}" if tokenizer.get("revision") else ""
    rows = [
        ["from", f"{code(origin)}{revision}" if origin else "a folder; its files are in `_tokenizer/`"],
        ["fingerprint of map, merges and special tokens", code(tokenizer["fingerprint"][:SHOWN])],
        ["ids", f"{tokenizer['vocab_size']:,}"],
        ["end of a document", f"{code(tokenizer.get('eos_token', ''))} {tokenizer['eos_token_id']}"],
        [
            "begin of a piece",
            f"{code(tokenizer['bos_token'])} {tokenizer['bos_token_id']}" if tokenizer.get("bos_token") else "none",
        ],
    ]
    return table(["", ""], rows)


def _sources(manifest: Manifest) -> str:
    from trainer.statistics import Sources

    sources = Sources(manifest.corpus)
    sums = [[0, 0, 0] for _ in sources.names]
    for group, file in zip(sources.group, manifest.corpus):
        for place, count in enumerate((1, file.documents_packed, file.tokens)):
            sums[group][place] += count
    rows = [
        [code(without_place(name)), *(f"{count:,}" for count in counts)] for name, counts in zip(sources.names, sums)
    ]
    return table(["source", "files", "documents", "tokens"], rows)


def _provenance(manifest: Manifest) -> str:
    rows = [["manifest sha256", code(manifest.checksum)], ["format", f"remit-shards {manifest.format_version}"]]
    rows += [["packing", code(json.dumps(manifest.packing))]] if manifest.packing else []
    rows += [["conversations", code(json.dumps(manifest.conversations))]] if manifest.conversations else []
    rows += [["selection", code(json.dumps(entry))] for entry in manifest.selections]
    return table(["", ""], rows)
