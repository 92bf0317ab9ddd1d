"""What was left out of a pack: documents and whole files, each with its reason, in _rejected.jsonl of its folder."""

import json

from shards.store import Store

REJECTED = "_rejected.jsonl"


def save_rejected(staged: list[dict], out: Store) -> None:
    """List the documents and whole files that were left out, with the reason of each, in _rejected.jsonl."""
    lines = []
    for index, record in enumerate(staged):
        file = record["file"]
        reasons = [f"the whole file: {file['left_out']}"] if file["left_out"] else record["rejected"]
        for reason in reasons:
            entry = {"source": index, "path": file["path"], "reason": reason}
            lines.append(json.dumps(entry, ensure_ascii=False))
    if lines:
        out.replace(REJECTED, ("\n".join(lines) + "\n").encode())
    else:
        out.delete(REJECTED)
