"""Which token ids the rows have, and whether two tokenizers mean the same by them.

A base, a reference and the rows need not have one tokenizer: releases of one family differ in tokens that no corpus
has, a padding token more or a special token renamed. They must agree on each id that occurs, and on how text is split.
Parsed tokenizer.json files are compared here; give both as the `tokenizers` library writes them, which spells out
defaults, so that two spellings of one thing are no difference.
"""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from shards.fingerprint import vocabulary

COMPONENTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
# classes with which transformers takes tokenizer.json as it is; the first is known to older releases too, but some kinds
# of model put a class of their own in its place
FAITHFUL = ("PreTrainedTokenizerFast", "TokenizersBackend")
NAMED = 8  # differences that are named; the others are counted


def encode_token_ids(occurs_V: np.ndarray) -> bytes:
    """JSON of the ids that occur, as ranges [first, last]. occurs_V: bool [ids]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], occurs_V, [False]]).astype(np.int8)))
    ranges = np.stack([edges[::2], edges[1::2] - 1], axis=1).tolist()
    return (json.dumps({"ranges": ranges}, separators=(",", ":")) + "\n").encode()


def decode_token_ids(data: bytes, where: str) -> np.ndarray:
    """The inverse, bool [largest id + 1]; ValueError where the file is damaged."""
    try:
        ranges = np.array(json.loads(data)["ranges"], dtype=np.int64).reshape(-1, 2)
        if np.any(ranges[:, 0] > ranges[:, 1]) or np.any(np.diff(ranges.ravel()) < 0) or np.any(ranges < 0):
            raise ValueError("its ranges are out of order")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: damaged ({error}); restore it or write the folder again") from None
    occurs_V = np.zeros(int(ranges[-1, 1]) + 1 if len(ranges) else 0, dtype=bool)
    for first, last in ranges.tolist():
        occurs_V[first : last + 1] = True
    return occurs_V


def added_tokens(tokenizer_json: dict[str, Any]) -> dict[str, int]:
    """Ids of the added tokens of a parsed tokenizer.json, special ones and others."""
    return {token["content"]: token["id"] for token in tokenizer_json.get("added_tokens") or []}


def disagreement(ours: dict[str, Any], theirs: dict[str, Any], occurs_V: np.ndarray, counts: dict[str, int]) -> str:
    """Why rows that `ours` packed are not rows of `theirs`; empty where they are.

    occurs_V: bool [ids], True for the ids of the rows. counts: how often an added token occurs, for the message.
    """
    our_tokens, their_tokens = _by_id(ours), _by_id(theirs)
    for index in np.flatnonzero(occurs_V).tolist():
        token, other = our_tokens.get(index), their_tokens.get(index)
        if token != other:
            times = f" {counts[token]:,} times" if token in counts else ""
            is_other = "no token" if other is None else repr(other)
            return f"id {index} is {token!r} in the rows, where it occurs{times}, and {is_other} in the other tokenizer"
    (_, our_merges, _), (_, merges, _) = vocabulary(ours), vocabulary(theirs)
    if our_merges != merges:
        at = next((i for i, (a, b) in enumerate(zip(our_merges, merges)) if a != b), min(len(our_merges), len(merges)))
        return f"the merges differ from number {at} on ({len(our_merges)} and {len(merges)} of them)"
    if ours["model"].get("type") != theirs["model"].get("type"):
        return f"one is a {ours['model'].get('type')} model, the other a {theirs['model'].get('type')}"
    scores, their_scores = (
        dict(map(tuple, value["model"]["vocab"])) if isinstance(value["model"]["vocab"], list) else {}
        for value in (ours, theirs)
    )
    token = next((token for token in scores.keys() & their_scores.keys() if scores[token] != their_scores[token]), None)
    if token is not None:
        return f"token {token!r} has the score {scores[token]:g} in the one and {their_scores[token]:g} in the other"
    for part in ("normalizer", "pre_tokenizer"):
        if ours.get(part) != theirs.get(part):
            return f"the {part} is {_short(ours.get(part))} in the one and {_short(theirs.get(part))} in the other"
    return ""


def differences(ours: dict[str, Any], theirs: dict[str, Any], occurs_V: np.ndarray) -> list[str]:
    """In what tokens, none of which the rows have, two tokenizers differ: the first few, then how many more."""
    our_tokens, their_tokens = _by_id(ours), _by_id(theirs)
    found = []
    for index in sorted(our_tokens.keys() | their_tokens.keys()):
        token, other = our_tokens.get(index), their_tokens.get(index)
        if token != other and not (index < len(occurs_V) and occurs_V[index]):
            found.append(f"id {index} is {_name(token)} in the rows' tokenizer, {_name(other)} here")
    return found[:NAMED] + ([f"and {len(found) - NAMED:,} more"] if len(found) > NAMED else [])


def differing_components(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Parts in which two parsed tokenizer.json differ so that ids or texts may be others."""

    def model(value: dict[str, Any]) -> dict[str, Any]:
        return {key: entry or None for key, entry in value["model"].items()}  # some classes write "" for null

    def component(value: dict[str, Any], name: str) -> Any:
        entry = value.get(name)
        # a template that adds nothing is none
        empty = (
            isinstance(entry, dict) and entry.get("type") == "TemplateProcessing" and not entry.get("special_tokens")
        )
        return None if empty else entry

    found = [name for name in COMPONENTS if component(theirs, name) != component(ours, name)]
    found += ["vocabulary or merges"] if model(theirs) != model(ours) else []
    return found + (["added tokens"] if added_tokens(theirs) != added_tokens(ours) else [])


def faithful_config(config: dict[str, Any], name: str) -> bytes:
    """A tokenizer_config.json with which transformers takes tokenizer.json as it is, name being one of FAITHFUL.

    What would change it on loading, tokens and settings that the class adds by itself, is left out.
    """
    dropped = ("added_tokens_decoder", "add_prefix_space", "auto_map", "extra_special_tokens")
    kept = {key: value for key, value in config.items() if key not in dropped}
    return (json.dumps(kept | {"tokenizer_class": name}, indent=2, ensure_ascii=False) + "\n").encode()


def ordinary_ids(ours: dict[str, Any], theirs: dict[str, Any]) -> np.ndarray:
    """bool [ids], True for ids that are an added token in neither of two tokenizers: what text is made of.

    For `disagreement` where it is not known yet which ids a corpus will have.
    """
    tokens = _by_id(ours)
    ordinary_V = np.zeros(max(tokens, default=-1) + 1, dtype=bool)
    ordinary_V[list(tokens.keys() - {*added_tokens(ours).values(), *added_tokens(theirs).values()})] = True
    return ordinary_V


def role_of(folder: Path, role: str) -> str | None:
    """The token that the files of a tokenizer folder give a role, eos_token or bos_token; None where they name none."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            config = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise ValueError(f"{folder / name}: not valid JSON ({error})") from None
        entry = config.get(role) if isinstance(config, dict) else None
        entry = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(entry, str):
            return entry
    return None


def own_prefix(encoder: Any) -> list[int]:
    """The ids that a tokenizer's own call puts in front of a text. encoder: a `tokenizers.Tokenizer`."""
    for text in chain(("a", "0", "the"), _some_tokens(encoder)):
        try:
            bare, whole = (encoder.encode(text, add_special_tokens=added).ids for added in (False, True))
        except Exception:  # a vocabulary without this text, and without a token for what it lacks
            continue
        for start in range(len(whole) - len(bare) + 1):
            if bare and whole[start : start + len(bare)] == bare:
                return whole[:start]
    return []


def _some_tokens(encoder: Any) -> Iterator[str]:
    """Asked for only where nothing simpler has an encoding: a large vocabulary takes a while."""
    yield from list(encoder.get_vocab(with_added_tokens=False))[:100]


def other_beginning(encoder: Any, bos_token_id: int | None) -> str:
    """Words for a tokenizer whose own call begins a text in another way than the rows do; empty where it is the same.

    bos_token_id: with which each document in the rows begins, None for none.
    """
    rows, own = [] if bos_token_id is None else [bos_token_id], own_prefix(encoder)
    if rows == own:
        return ""
    adds, packed = ("".join(str(encoder.id_to_token(index)) for index in ids) for ids in (own, rows))
    if not own:
        return f"documents in the rows begin with {packed!r}, which the tokenizer's own call does not add"
    return (
        f"the tokenizer's own call puts {adds!r} in front of a text, documents in the rows begin "
        f"{f'with {packed!r}' if rows else 'without it'}; a model that was trained with it predicts them worse"
    )


def _name(token: str | None) -> str:
    return "no token" if token is None else repr(token)


def _by_id(tokenizer_json: dict[str, Any]) -> dict[int, str]:
    """Token of each id; of two spellings of one id the added token's."""
    return {index: token for token, index in vocabulary(tokenizer_json)[0].items()} | {
        index: token for token, index in added_tokens(tokenizer_json).items()
    }


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."
