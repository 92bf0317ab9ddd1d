"""The average of exported models, tensor by tensor: a soup of runs (Wortsman et al. 2022, arXiv 2203.05482).

In: Hugging Face folders of one model with several weights. Out: a folder like the first of them with the weighted mean of
each tensor, and average.json, which says what it was made of. One tensor of each model is in memory at a time.
"""

import contextlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from shards.fingerprint import weights_fingerprint
from shards.output_folder import differences
from shards.part import sha256_file
from shards.publish import fsync_folder
from shards.record import encode_json
from shards.store import temporary_name
from trainer.layout import INDEX, Files, Stored, read_stored, weight_files

AVERAGE = "average.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
NOT_OF_THE_MODEL = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
"""Keys of config.json that may differ; dtypes are compared tensor by tensor."""


def shares_of(weights: Sequence[float], models: int) -> list[float]:
    """Weights that sum to 1, equal where none are given; ValueError where they do not fit the models."""
    if not weights:
        return [1 / models] * models
    if len(weights) != models:
        raise ValueError(f"--weights has {len(weights)} numbers, expected one for each of the {models} models")
    if not all(0 <= weight < math.inf for weight in weights) or not sum(weights):
        raise ValueError(
            f"--weights is {' '.join(map(str, weights))}, expected numbers of 0 or more, not all of them 0"
        )
    return [weight / sum(weights) for weight in weights]


def require_same_model(folders: Sequence[Path]) -> dict[str, Stored]:
    """The tensors of the first folder; ValueError, with the field, where another one holds another kind of model."""
    first = folders[0]
    stored, config, tokenizer = read_stored(first), _config(first), _tokenizer(first)
    for folder in folders[1:]:
        others = read_stored(folder)
        if missing := sorted(stored.keys() ^ others.keys()):
            where = first if missing[0] in stored else folder
            raise ValueError(f"{folder}: not the model of {first}: only {where} has a tensor {missing[0]}")
        for name, entry in stored.items():
            for what in ("shape", "dtype"):
                ours, theirs = getattr(entry, what), getattr(others[name], what)
                if ours != theirs:
                    raise ValueError(
                        f"{folder}: not the model of {first}: {what} of {name} is {theirs} there, {ours} in the first"
                    )
        for what, ours, theirs in (
            ("config.json", config, _config(folder)),
            ("its tokenizer", tokenizer, _tokenizer(folder)),
        ):
            if found := differences(ours, theirs):
                raise ValueError(f"{folder}: not the model of {first}: {what} has another {found[0][0]}")
    return stored


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: is not a model folder ({error}); give folders that remit train exported") from None
    if config.get("quantization_config"):
        raise ValueError(
            f"{folder}: its weights are quantised (quantization_config in config.json), whose mean means nothing; give the models "
            "that they were made from"
        )
    return {key: value for key, value in config.items() if key not in NOT_OF_THE_MODEL}


def _tokenizer(folder: Path) -> dict[str, str]:
    return {name: sha256_file(folder / name) for name in TOKENIZER_FILES if (folder / name).exists()}


def mean(parts: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The weighted mean in the dtype of the parts, summed in float32 (float64 for float64)."""
    dtype = parts[0].dtype
    total = torch.zeros(parts[0].shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for part, share in zip(parts, shares):
        total.add_(part.to(total.dtype), alpha=share)
    return total.to(dtype)


def average(
    folders: Sequence[Path],
    out: Path,
    weights: Sequence[float] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> bool:
    """Write the average of the models in `folders` to `out`, whole or not at all; False where it is there already.

    progress: called with the bytes written and those in all. ValueError where the models do not fit each other, where a
    tensor of integers differs, or where `out` holds something else.
    """
    if len(folders) < 2:
        raise ValueError(f"{len(folders)} model is given, expected at least two")
    shares = shares_of(weights, len(folders))
    stored = require_same_model(folders)
    record = {
        "models": [
            {"path": str(folder), "weights_sha256": weights_fingerprint(folder), "weight": share}
            for folder, share in zip(folders, shares)
        ]
    }
    if out.exists():
        if (out / AVERAGE).is_file() and _same(json.loads((out / AVERAGE).read_text(encoding="utf-8")), record):
            return False
        raise ValueError(f"{out}: exists and is not this average; choose another --out, or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(f".{out.name}.*.tmp"):
        shutil.rmtree(leftover)  # of an average that was cut off
    temporary = temporary_name(out)
    temporary.mkdir()
    try:
        _copy_the_rest(folders[0], temporary)
        total, done = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in stored.values()), 0
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(Files(folder)) for folder in folders]
            places = [read_stored(folder) for folder in folders]

            def read(name: str) -> Tensor:
                nonlocal done
                parts = [file.read(place[name].file, name) for file, place in zip(files, places)]
                done += parts[0].nbytes
                progress(done, total)
                if parts[0].is_floating_point():
                    return mean(parts, shares)
                if not all(torch.equal(parts[0], part) for part in parts[1:]):
                    raise ValueError(f"{name}: holds integers that differ between the models, expected the same ones")
                return parts[0]

            for file in weight_files(folders[0]):
                rewrite(folders[0] / file, temporary / file, read)
        (temporary / AVERAGE).write_bytes(encode_json(record))
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(out.parent)
    return True


def _same(there: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether two averages are of the same weights, wherever the folders were."""
    facts = [[(entry["weights_sha256"], entry["weight"]) for entry in one["models"]] for one in (there, record)]
    return facts[0] == facts[1]


def _copy_the_rest(folder: Path, out: Path) -> None:
    for path in sorted(folder.rglob("*")):
        kept = path.is_file() and (path.suffix != ".safetensors") and path.name not in ("README.md", AVERAGE)
        if kept and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            copy = out / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    assert (folder / INDEX).exists() == (out / INDEX).exists()


def rewrite(source: Path, target: Path, value_of: Callable[[str], Tensor]) -> None:
    """A safetensors file with the header of `source` and other values of the same shapes and dtypes, one after the other.

    safetensors writes a file from tensors that are all in memory; its format is a length of eight bytes, a header of JSON
    with the place of each tensor, and the tensors' bytes (github.com/huggingface/safetensors, README).
    """
    with open(source, "rb") as file:
        length = file.read(8)
        header = file.read(struct.unpack("<Q", length)[0])
    places = {name: entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"}
    with open(target, "wb") as file:
        file.write(length + header)
        begin = file.tell()
        for name, (first, last) in sorted(places.items(), key=lambda item: item[1]):
            data = value_of(name).contiguous().flatten().view(torch.uint8).numpy()
            assert (file.tell() - begin, data.nbytes) == (first, last - first), name
            file.write(data.data)
        file.flush()
        os.fsync(file.fileno())
    with safe_open(target, "pt") as written:  # the library reads what it did not write
        assert set(written.keys()) == set(places)
