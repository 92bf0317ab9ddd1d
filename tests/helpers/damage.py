"""A small shard folder, what can be wrong with it, and who reads it: each reader is to name each damage alike.

A reader takes the folder and raises ValueError. One more is one more line of READERS, and of TOPK_READERS where it reads
the most probable tokens.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shards import ShardFolder, write_part
from shards.fingerprint import tokenizer_fingerprint
from shards.manifest import CorpusFile, Manifest, PartPlan

TOKENIZER_JSON = {"model": {"vocab": {"<e>": 0, "é": 1}, "merges": []}, "added_tokens": []}
TOKENIZER = {
    "fingerprint": tokenizer_fingerprint(TOKENIZER_JSON),
    "eos_token_id": 0,
    "vocab_size": 100,
    "special_tokens": "parse",
}
REFERENCE = {"context": "packed", "logprob_step": 0.25}


def rows() -> dict[str, list]:
    """Four rows of at most 4 tokens: document 0 of 6 tokens, 1 of 5, 2 of 3 (EOS is 0)."""
    return {
        "input_ids": [[5, 6, 7, 8], [9, 0, 11, 12], [13, 14, 0, 21], [22, 0]],
        "doc_lengths": [[4], [2, 2], [3, 1], [2]],
        "doc_ids": [[0], [0, 1], [1, 2], [2]],
        "source": [0, 0, 0, 0],
        "rl_logprobs": [[None, -1.0, -0.25, 0.0], [None, -3.5, -1.0, -1.0], [None, -2.0, -2.0, -0.5], [None, -7.75]],
    }


def write_folder(folder: Path, values: dict[str, list], documents: int = 3, **manifest: object) -> ShardFolder:
    """A shard folder that holds `values`, in parts of two rows."""
    (folder / "_tokenizer").mkdir(parents=True)
    (folder / "_tokenizer" / "tokenizer.json").write_text(json.dumps(TOKENIZER_JSON))
    tokens = [len(row) for row in values["input_ids"]]
    plans = tuple(
        PartPlan(f"part-{index:05d}.arrow", len(tokens[first : first + 2]), sum(tokens[first : first + 2]))
        for index, first in enumerate(range(0, len(tokens), 2))
    )
    file = CorpusFile("a.jsonl", 1, "0" * 64, documents + 1, documents, 1, 0, len(tokens), sum(tokens))
    settings: dict = {
        "seq_len": 4, "rows_per_part": 2, "rows_per_batch": 2, "tokenizer": TOKENIZER, "corpus": (file,), "parts": plans,
        "references": {"rl": REFERENCE},
    }  # fmt: skip
    plan = Manifest(**(settings | manifest))
    plan.write(folder)
    schema = plan.schema
    for index, part in enumerate(plans):
        batch = pa.record_batch(
            [pa.array(values[field.name][2 * index : 2 * index + 2], field.type) for field in schema], schema=schema
        )
        write_part(folder, part.name, schema, plan.part_metadata(index), [batch])
    return ShardFolder(folder)


def top_rows() -> dict[str, list]:
    """Those of test_verify with the two best of every place: the row's own token first, and token 50."""
    values: dict = copy.deepcopy(rows())
    own = {-0.25: 0, 0.0: 0, -0.5: 0, -1.0: 0, -2.0: 1, -3.5: 1, -7.75: 1}  # its place
    ids, logprobs = [], []
    for row, tokens in zip(values["rl_logprobs"], values["input_ids"]):
        ids.append([None if v is None else ([t, 50] if own[v] == 0 else [50, t]) for v, t in zip(row, tokens)])
        others = [None if v is None else (min(-2.0, v - 1) if own[v] == 0 else -0.25) for v in row]
        logprobs.append(
            [None if v is None else sorted((v, other), reverse=True) for v, other in zip(row, others)]
        )  # fmt: skip
    return values | {"rl_topk_ids": ids, "rl_topk_logprobs": logprobs}


TOP = {"rl": REFERENCE | {"top_k": 2, "vocab_size": 120}}


def entropy_rows() -> dict[str, list]:
    """The rows with the entropy, that at temperature 2 and its log partition sum: all below log 120 = 4.787."""
    values: dict = copy.deepcopy(rows())
    for column, value in (("rl_entropy", 1.5), ("rl_entropy_t2", 3.0), ("rl_log_partition_t2", 1.25)):
        values[column] = [[None if v is None else value for v in row] for row in values["rl_logprobs"]]
    return values


ENTROPY_OF = {"rl": REFERENCE | {"entropy": True, "entropy_temperature": 2.0, "vocab_size": 120}}


def two_references(values: dict[str, list]) -> dict[str, list]:
    """The rows with a column of a base that is as the reference's."""
    return values | {"base_logprobs": copy.deepcopy(values["rl_logprobs"])}


# --- readers --------------------------------------------------------------------------------------------


def read_to_verify(folder: Path, model: Path) -> None:
    from shards.verify import verify_folder

    for problem in verify_folder(ShardFolder(folder)).problems:
        raise ValueError(problem)


def read_to_train(folder: Path, model: Path, columns: tuple[str, ...] = ("logprobs",)) -> None:
    from trainer.data import RowReader

    reader = RowReader(ShardFolder(folder), "packed", "rl", 100, columns)
    for block, count in enumerate(reader.block_rows):
        reader.rows(np.array([(block, row) for row in range(count)]))


def read_for_kd(folder: Path, model: Path) -> None:
    read_to_train(folder, model, ("logprobs", "topk_ids", "topk_logprobs"))


def read_for_other_loops(folder: Path, model: Path) -> None:
    from trainer.dataset import RowDataset

    list(RowDataset(folder, "rl", epochs=1))


def read_to_select(folder: Path, model: Path) -> None:
    from scorer.config import SelectConfig
    from scorer.select import select

    select(SelectConfig(str(folder), "rl", "base", str(folder.parent / "selected"), num_workers=1))


def read_to_rescore(folder: Path, model: Path) -> None:
    from pipelines.numerics import measure

    measure(ShardFolder(folder), model, "rl", 4, None, 0.2, 0)


def read_to_weigh(folder: Path, model: Path) -> None:
    from pipelines.weights.figures import weights_of_corpus
    from pipelines.weights.settings import WeightsConfig
    from trainer.mixed_shards import MixedShards

    config = WeightsConfig(str(folder))
    weights_of_corpus(MixedShards.open(config.mixture), config, lambda rows, tokens: None)


def read_to_inspect(folder: Path, model: Path) -> None:
    from pipelines.inspect.settings import InspectConfig
    from pipelines.inspect.terminal import show

    show(ShardFolder(folder), InspectConfig(str(folder), rows="0..3"), [0, 1, 2, 3])


def read_for_page(folder: Path, model: Path) -> None:
    from pipelines.inspect.find_rows import Found
    from pipelines.inspect.page import page_of_rows
    from pipelines.inspect.settings import InspectConfig

    config = InspectConfig(str(folder), rows="0..3", html=folder.parent / "page.html")
    page_of_rows(ShardFolder(folder), config, Found([0, 1, 2, 3], "rows 0 to 3"), None, lambda done, total: None)


READERS: dict[str, Callable[[Path, Path], None]] = {
    "verify": read_to_verify,
    "train": read_to_train,
    "inspect": read_to_inspect,
    "inspect --html": read_for_page,
    "other loops": read_for_other_loops,
    "select": read_to_select,
    "weights": read_to_weigh,
    "verify --model": read_to_rescore,
}
TOPK_READERS: dict[str, Callable[[Path, Path], None]] = {
    "verify": read_to_verify,
    "train": read_for_kd,
    "inspect": read_to_inspect,
    "verify --model": read_to_rescore,
}

ENTROPY_READERS: dict[str, Callable[[Path, Path], None]] = {
    "verify": read_to_verify,
    "inspect": read_to_inspect,
    "verify --model": read_to_rescore,
}

# --- damage: the parts are written with it, so their hashes are right -----------------------------------

Change = Callable[[dict[str, list]], Any]
ROWS: dict[str, tuple[Change, str]] = {
    "id too large": (lambda v: v["input_ids"][0].__setitem__(1, 100), "token id 100 is not in 0..99"),
    "id below 0": (lambda v: v["input_ids"][0].__setitem__(1, -1), "token id -1 is not in 0..99"),
    "id is null": (lambda v: v["input_ids"][1].__setitem__(1, None), "input_ids has a null in its list"),
    "row too long": (
        lambda v: [column[2].insert(1, x) for column, x in ((v["input_ids"], 9), (v["rl_logprobs"], -1), (v["base_logprobs"], -1))],
        "has 5 tokens, expected 1..4",
    ),
    "row without tokens": (
        lambda v: [v[name][3].clear() for name in ("input_ids", "rl_logprobs", "base_logprobs")],
        "has 0 tokens, expected 1..4",
    ),
    "short documents": (lambda v: v["doc_lengths"][1].__setitem__(0, 1), "doc_lengths do not sum to the row's length: 3"),
    "documents over the end": (lambda v: v["doc_lengths"][2].__setitem__(1, 2), "do not sum to the row's length: 5"),
    "empty piece": (lambda v: v.__setitem__("doc_lengths", [[4], [4, 0], [3, 1], [2]]), "a document piece is empty"),
    "no piece": (lambda v: [v[name][3].clear() for name in ("doc_lengths", "doc_ids")], "has no document piece"),
    "piece is null": (lambda v: v["doc_lengths"][1].__setitem__(0, None), "doc_lengths has a null in its list"),
    "document too many": (lambda v: v["doc_ids"][0].append(1), "doc_ids and doc_lengths differ: 2 documents, 1 pieces"),
    "document is null": (lambda v: v["doc_ids"][0].__setitem__(0, None), "doc_ids has a null in its list"),
    "documents are null": (lambda v: v["doc_ids"].__setitem__(1, None), "row 1: doc_ids is null"),
    "unknown source": (lambda v: v["source"].__setitem__(0, 1), "source 1 is not the index of a corpus file, 0..0"),
    "null log-prob": (
        lambda v: v["rl_logprobs"][0].__setitem__(1, None), "rl_logprobs is null, expected null exactly where nothing precedes"
    ),
    "log-prob of a first token": (
        lambda v: v["rl_logprobs"][0].__setitem__(0, -1.0), "rl_logprobs is not null, expected null exactly where nothing"
    ),
    "NaN of a first token": (
        lambda v: v["rl_logprobs"][0].__setitem__(0, float("nan")), "rl_logprobs is not null, expected null exactly where"
    ),
    "positive log-prob": (lambda v: v["rl_logprobs"][0].__setitem__(1, 0.25), "is 0.25, which is not finite and <= 0"),
    "NaN": (lambda v: v["rl_logprobs"][0].__setitem__(1, float("nan")), "is nan, which is not finite and <= 0"),
    "infinite log-prob": (lambda v: v["rl_logprobs"][0].__setitem__(1, float("-inf")), "is -inf, which is not finite"),
    "another step": (lambda v: v["rl_logprobs"][0].__setitem__(1, -1.1), "is -1.1, which is not a multiple of 0.25"),
    "log-prob too few": (lambda v: v["rl_logprobs"][0].pop(), "rl_logprobs and input_ids differ in length: 3 and 4"),
    "log-prob too many": (lambda v: v["rl_logprobs"][3].append(-1.0), "rl_logprobs and input_ids differ in length: 3 and 2"),
}  # fmt: skip

TOPK: dict[str, tuple[Callable[[list, list], Any], str]] = {
    "id too large": (lambda ids, _: ids[0][1].__setitem__(1, 120), "an id is not in 0..119"),
    "id below 0": (lambda ids, _: ids[0][1].__setitem__(1, -1), "an id is not in 0..119"),
    "token twice": (lambda ids, _: ids[0][1].__setitem__(1, 6), "a token stands twice"),
    "null ids": (lambda ids, _: ids[0].__setitem__(1, None), "rl_topk_ids is null, expected null exactly where"),
    "ids of a first token": (lambda ids, _: ids[0].__setitem__(0, [1, 2]), "rl_topk_ids is not null, expected null"),
    "null id": (lambda ids, _: ids[0][1].__setitem__(1, None), "rl_topk_ids has a null in an entry"),
    "ids too few": (lambda ids, _: ids[0].pop(), "rl_topk_ids and input_ids differ in length"),
    "log-probs too few": (lambda _, v: v[0].pop(), "rl_topk_logprobs and input_ids differ in length"),
    "null log-probs": (lambda _, v: v[0].__setitem__(2, None), "rl_topk_logprobs is null, expected null exactly"),
    "null log-prob": (lambda _, v: v[0][1].__setitem__(1, None), "rl_topk_logprobs has a null in an entry"),
    "another step": (lambda _, v: v[0][1].__setitem__(1, -2.1), "a log-prob is not a multiple of 0.25"),
    "positive": (lambda _, v: v[0][1].__setitem__(0, 0.25), "a log-prob is 0.25, expected at most 0"),
    "NaN": (lambda _, v: v[0][1].__setitem__(1, float("nan")), "a log-prob is not finite"),
    "infinite": (lambda _, v: v[0][1].__setitem__(1, float("-inf")), "a log-prob is not finite"),
    "unordered": (lambda _, v: v[0][1].__setitem__(1, -0.75), "do not descend"),
    "two log-probs of one token": (lambda _, v: v[0][1].__setitem__(0, -0.5), "own token has another log-prob"),
    "too much": (lambda _, v: v[0][3].__setitem__(1, -0.25), "of an entry sum to 1.77"),
    "own token left out": (
        lambda ids, v: (ids[0][1].__setitem__(0, 7), v[0][1].__setitem__(0, -1.25)), "own token is more probable"
    ),
}  # fmt: skip

ENTROPY: dict[str, tuple[Change, str]] = {
    "null": (lambda v: v["rl_entropy"][0].__setitem__(1, None), "rl_entropy is null, expected null exactly where nothing"),
    "of a first token": (lambda v: v["rl_entropy_t2"][0].__setitem__(0, 1.0), "rl_entropy_t2 is not null, expected null"),
    "negative": (lambda v: v["rl_entropy"][0].__setitem__(1, -0.25), "rl_entropy is -0.25, which is not in 0..4.787"),
    "too large": (lambda v: v["rl_entropy_t2"][0].__setitem__(2, 5.0), "rl_entropy_t2 is 5, which is not in 0..4.787"),
    "partition too large": (
        lambda v: v["rl_log_partition_t2"][0].__setitem__(3, 2.75), "rl_log_partition_t2 is 2.75, which is not in 0..2.394"
    ),
    "NaN": (lambda v: v["rl_entropy"][0].__setitem__(1, float("nan")), "rl_entropy is nan, which is not in 0..4.787"),
    "another step": (lambda v: v["rl_entropy"][0].__setitem__(1, 1.1), "rl_entropy is 1.1, which is not a multiple of 0.25"),
    "too few": (lambda v: v["rl_log_partition_t2"][0].pop(), "rl_log_partition_t2 and input_ids differ in length: 3 and 4"),
}  # fmt: skip


PREDICT: dict[str, tuple[Change, str]] = {
    "null": (lambda v: v["predict"][1].__setitem__(1, None), "predict has a null in its list"),
    "null list": (lambda v: v["predict"].__setitem__(2, None), "predict is null"),
    "too few": (lambda v: v["predict"][0].pop(), "predict and input_ids differ in length: 3 and 4"),
    "too many": (lambda v: v["predict"][3].append(True), "predict and input_ids differ in length: 3 and 2"),
}


def predict_rows() -> dict[str, list]:
    """The rows with what is to be predicted: a token of row 0, nothing of row 1, all of rows 2 and 3."""
    return two_references(rows()) | {"predict": [[False, False, True, False], [False] * 4, [True] * 4, [True] * 2]}


# --- damage of files ------------------------------------------------------------------------------------


def flip(file: Path, place: int | None = None) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    file.write_bytes(data)


def flip_in_column(folder: Path, part: str, column: str) -> None:
    """Flip a bit in the middle of what a record batch has of a column, where its commit record says that this is."""
    (batch,) = json.loads((folder / "_commits" / f"{part}.json").read_text())["batches"]
    piece = next(entry for entry in batch["columns"] if entry["name"] == column)
    flip(folder / f"{part}.arrow", piece["offset"] + piece["size"] // 2)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{
        f"flipped bit of {column}": (
            lambda folder, column=column: flip_in_column(folder, "part-00001", column),
            f"part-00001.arrow: record batch 0, {column}: sha256",
        )
        for column in ("input_ids", "doc_lengths", "rl_logprobs")
    },
    "truncated": (
        lambda folder: (folder / "part-00001.arrow").write_bytes((folder / "part-00001.arrow").read_bytes()[:-9]),
        "bytes, its commit record says",
    ),
    "missing": (lambda folder: (folder / "part-00001.arrow").unlink(), "is committed but missing"),
    "record": (lambda folder: flip(folder / "_commits" / "part-00001.json"), "part-00001"),
    "record of another": (
        lambda folder: (folder / "_commits" / "part-00001.json").write_bytes(
            (folder / "_commits" / "part-00000.json").read_bytes()
        ),
        "not the commit record of part-00001.arrow, or altered",
    ),
}
