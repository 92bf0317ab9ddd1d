"""Does the base read the rows as they were packed? Its tokenizer against that of the shards.

Ids are those of tokenizer.json, as the `tokenizers` library loads it; transformers is asked only where there is no such
file, since it builds some classes anew and leaves parts of the file out.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from shards.folder import ShardFolder
from shards.tokens import (
    FAITHFUL,
    differences,
    differing_components,
    disagreement,
    faithful_config,
    other_beginning,
    role_of,
)


def load_encoder(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model folder; None where it has none, ValueError where it cannot be loaded."""
    try:
        if (folder / "tokenizer.json").exists():
            encoder = Tokenizer.from_file(str(folder / "tokenizer.json"))
            eos_token = role_of(folder, "eos_token")
            if eos_token is not None and encoder.token_to_id(eos_token) is None:  # transformers appends it too
                encoder.add_special_tokens([AddedToken(eos_token, special=True, normalized=False)])
            return encoder
        if (folder / "tokenizer_config.json").exists():
            theirs: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            return Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder}: its tokenizer cannot be loaded ({reason})") from None
    return None


def check_tokenizer(folder: Path, *shards: ShardFolder, note: Callable[[str], None] = lambda line: None) -> list[str]:
    """In which tokens that no row has the base's tokenizer differs from the rows'; ValueError where it matters.

    shards: one folder, or several that can be mixed. note: told of such tokens, and of another BOS or end token than the
    base's own.
    """
    encoder, rows = load_encoder(folder), shards[0].manifest.tokenizer
    if encoder is None:
        return []
    differing = require_tokenizer(shards, encoder.to_str(), str(folder))
    if replaced := replaced_components(folder):
        note(
            f"{folder}: transformers would put others in the place of the {', '.join(replaced)} of tokenizer.json, by the "
            f"class that it takes for it; the ids are those of the file, and the exported model will name {FAITHFUL[0]}"
        )
    if differing:
        note(f"{folder}: its tokenizer differs in tokens that no row has: {'; '.join(differing)}")
    if line := other_beginning(encoder, rows.get("bos_token_id")):
        note(f"{folder}: {line}")
    if line := other_end(folder, encoder, rows["eos_token_id"]):
        note(f"{folder}: {line}")
    return differing


def require_tokenizer(shards: Sequence[ShardFolder], theirs: str, model: str) -> list[str]:
    """ShardFolder.require_tokenizer of several folders: the differences in tokens that none of their rows has.

    theirs: the model's tokenizer.json as the library writes it. Folders with one tokenizer are asked together, for all ids that
    they have, and only where it is another than the model's: a comparison takes seconds where the vocabulary is large.
    """
    same: dict[bytes, list[ShardFolder]] = {}
    for folder in shards:
        same.setdefault(folder.tokenizer_file("tokenizer.json"), []).append(folder)
    found: list[str] = []
    for data, folders in same.items():
        if _is(data, theirs):
            continue
        occurs_V, parsed = union([folder.token_ids() for folder in folders]), json.loads(theirs)
        ours = _canonical(folders[0].tokenizer_json())
        if disagreement(ours, parsed, occurs_V, {}):
            for folder in folders:  # one of them raises, and says what it has
                folder.require_tokenizer(parsed, model, _canonical)
        found += differences(ours, parsed, occurs_V)
    return list(dict.fromkeys(found))


def _is(data: bytes, theirs: str) -> bool:
    """Whether a tokenizer.json is one that the library writes as `theirs`."""
    try:
        return bool(Tokenizer.from_str(data.decode()).to_str() == theirs)
    except Exception:  # damaged, which those say who read it
        return False


def _canonical(value: dict[str, Any]) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(Tokenizer.from_str(json.dumps(value)).to_str())
    return parsed


def union(occurs: Sequence[np.ndarray]) -> np.ndarray:
    """Where one of several arrays of bool, of any lengths, is True."""
    found = np.zeros(max(map(len, occurs)), dtype=bool)
    for own in occurs:
        found[: len(own)] |= own
    return found


def replaced_components(folder: Path) -> list[str]:
    """Parts of a folder's tokenizer.json in whose place transformers puts others as it loads the folder."""
    if not (folder / "tokenizer.json").exists():
        return []
    try:
        theirs: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        loaded = theirs.backend_tokenizer.to_str()
    except Exception as error:
        return [f"whole ({(str(error).splitlines() or [type(error).__name__])[0]})"]
    own = Tokenizer.from_file(str(folder / "tokenizer.json")).to_str()
    return [] if loaded == own else differing_components(json.loads(loaded), json.loads(own))


def make_faithful(folder: Path) -> None:
    """Change the class in a folder's tokenizer_config.json where with it transformers gives other ids than tokenizer.json."""
    file = folder / "tokenizer_config.json"
    original = file.read_bytes() if file.exists() else None
    for name in FAITHFUL if replaced_components(folder) else ():
        file.write_bytes(faithful_config(json.loads(original) if original else {}, name))
        if not replaced_components(folder):
            return
    if original is not None:  # no class helps, or all is well; what the user has is better known
        file.write_bytes(original)
    else:
        file.unlink(missing_ok=True)


def other_end(folder: Path, encoder: Tokenizer, eos_token_id: int) -> str:
    """Words for a base whose own end token is another than that of the rows; empty where it is the same or unknown."""
    named = role_of(folder, "eos_token")
    own = {encoder.token_to_id(named)} if named is not None else _config_eos(folder)
    if not own - {None} or eos_token_id in own:
        return ""
    theirs = ", ".join(f"{encoder.id_to_token(index)!r} ({index})" for index in sorted(own - {None}))
    return (
        f"documents in the rows end with {encoder.id_to_token(eos_token_id)!r} ({eos_token_id}), the base's own end token is "
        f"{theirs}: training teaches it to end with the rows'"
    )


def _config_eos(folder: Path) -> set[Any]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
    return set(own) if isinstance(own, list) else {own}
