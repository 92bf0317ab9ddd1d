"""The folders of a mixture, opened: whether they can be mixed, what each contributes, what run.json says of them."""

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.folder import ShardFolder
from shards.manifest import Manifest
from trainer.mix import SUPERBLOCK, MixedOrder, Stage, whole_counts
from trainer.mixture import Mixture, require_folders

MAY_DIFFER = ("model", "revision", "engine_version", "engine_distribution", "device", "tensor_parallel_size")
"""Of a reference, in a mixture: who computed the log-probs of its weights. A difference is noted."""
GATE_NOTES = ("top_k_below_entropy", "top_k_quantile")
"""Of a reference, in a mixture for an objective with a gate: where the top k is stored. The gate is of the entropies, which are
stored everywhere, and it counts what is missing. A difference is noted."""
KINDS = ("top_k", "sample", "entropy")  # of stored columns, as their settings begin, beside log-probs
MANY_EPOCHS = 4
"""Beyond this many repetitions data was found to be worth little (Muennighoff et al. 2023, Scaling Data-Constrained LMs)."""


def block_rows(manifest: Manifest) -> np.ndarray:
    """Rows of each block of a folder, a record batch of a part: int64 [blocks]."""
    rows = np.array([plan.rows for plan in manifest.parts], dtype=np.int64)
    size = manifest.rows_per_batch
    lasts = np.cumsum(-(-rows // size)) - 1
    found = np.full(lasts[-1] + 1 if len(rows) else 0, size, dtype=np.int64)
    found[lasts] = (rows - 1) % size + 1
    return found


def open_folders(mixture: Mixture) -> list[ShardFolder]:
    """The complete shard folders of a mixture's sources; ValueError where two are one."""

    def opened(path: str) -> ShardFolder:
        folder = ShardFolder(path)
        folder.require_complete()
        return folder

    require_folders(mixture)
    with ThreadPoolExecutor(8) as pool:  # each reads a few files, perhaps of an object store
        folders = list(pool.map(opened, mixture.folders))
    names: dict[str, str] = {}
    for source, folder in zip(mixture.sources, folders):
        other = names.setdefault(folder.manifest.checksum, source.name)
        if other != source.name:
            raise ValueError(f"{source.name} and {other} have the same rows (one manifest); give them once")
        if not folder.manifest.rows:
            raise ValueError(f"{folder.path}: there are no rows to train on")
    return folders


@dataclass(frozen=True)
class MixedShards:
    """A mixture and its opened folders, in the order of its sources."""

    mixture: Mixture
    folders: list[ShardFolder]

    @classmethod
    def open(cls, mixture: Mixture) -> "MixedShards":
        return cls(mixture, open_folders(mixture))

    @property
    def first(self) -> ShardFolder:
        """One of the folders, which are alike in tokenizer, length of the rows and context."""
        return self.folders[0]

    @property
    def names(self) -> list[str]:
        return [source.name for source in self.mixture.sources]

    def require_alike(self, reference: str | None, columns: Iterable[str] = ("logprobs",)) -> list[str]:
        """ValueError where rows of these folders must not be mixed, with the field and both values; else what to note.

        reference: the one whose columns are read, which must be the same model in all of them, or None; columns: which, as of
        trainer.data.RowReader.
        """
        notes, columns = [], tuple(columns)
        for name, folder in zip(self.names[1:], self.folders[1:]):
            ours, theirs = (_of_rows(one.manifest) for one in (self.first, folder))
            if reference is not None:
                ours, theirs = (
                    {**of, **_of_reference(one, reference)} for of, one in ((ours, self.first), (theirs, folder))
                )
            for field in dict.fromkeys([*ours, *theirs]):
                mine, other = ours.get(field), theirs.get(field)
                key = field.rsplit(".", 1)[-1]
                if mine == other or not _is_read(key, columns):
                    continue
                both = f"{field} is {_text(mine)} in {self.names[0]}, {_text(other)} in {name}"
                if field.startswith("references.") and key in MAY_DIFFER:
                    notes.append(f"{both}; the weights are the same")
                    continue
                if key in GATE_NOTES and _is_gated(columns):
                    notes.append(f"{both}; the gate counts the tokens whose top k it misses")
                    continue
                raise ValueError(f"{self.names[0]} and {name} cannot be mixed: {both}; {_remedy(field)}")
        return notes

    def shares(self, weights: Iterable[float]) -> list[float]:
        """Shares of the rows, which sum to 1, from weights of the tokens."""
        rows = [weight * folder.manifest.rows / folder.manifest.tokens for weight, folder in zip(weights, self.folders)]
        return [of_one / sum(rows) for of_one in rows]

    def stages(self, global_batch_size: int) -> list[Stage]:
        """The stages by position; ValueError where a weight comes to no row at all."""
        found = []
        for stage in self.mixture.stages:
            weights = [stage.weights[name] for name in self.names]
            shares = self.shares(weights)
            for name, weight, count in zip(self.names, weights, whole_counts(shares)):
                if weight and not count:
                    raise ValueError(
                        f"{name}: weight {weight:g} of {sum(weights):g} comes to less than one row of {SUPERBLOCK:,}; give it a "
                        "larger one, or 0"
                    )
            found.append(Stage(stage.after_step * global_batch_size, dict(zip(self.names, shares))))
        return found

    def order(self, seed: int, global_batch_size: int) -> MixedOrder:
        """The order of the mixture's rows."""
        rows = {name: block_rows(folder.manifest) for name, folder in zip(self.names, self.folders)}
        return MixedOrder(rows, self.stages(global_batch_size), seed)

    def identity(self) -> dict[str, Any]:
        """What decides which rows train, for run.json: shares of the tokens, and the manifest of each source."""
        return {
            "sources": {
                name: {"manifest_sha256": folder.manifest.checksum, "rows": folder.manifest.rows,
                       "tokens": folder.manifest.tokens}
                for name, folder in zip(self.names, self.folders)
            },
            "stages": [
                {"after_step": stage.after_step,
                 "weights": {name: round(weight / sum(stage.weights.values()), 6) for name, weight in stage.weights.items()}}
                for stage in self.mixture.stages
            ],
        }  # fmt: skip

    def common(self, reference: str | None) -> dict[str, Any]:
        """What is the same in all folders, for run.json."""
        manifest = self.first.manifest
        references = {} if reference is None else {reference: manifest.references[reference]}
        tokenizer = {key: value for key, value in manifest.tokenizer.items() if key not in ("files", "added_tokens")}
        return {"seq_len": manifest.seq_len, "tokenizer": tokenizer, "references": references}


def _of_rows(manifest: Manifest) -> dict[str, Any]:
    """What rows must have in common, by field."""
    tokenizer = {
        f"tokenizer.{key}": manifest.tokenizer.get(key) for key in ("fingerprint", "special_tokens", "eos_token_id")
    }
    return {"seq_len": manifest.seq_len, **tokenizer, "tokenizer.bos_token_id": manifest.tokenizer.get("bos_token_id")}


def _of_reference(folder: ShardFolder, name: str) -> dict[str, Any]:
    return {f"references.{name}.{key}": value for key, value in folder.require_reference(name).items()}


def _is_read(field: str, columns: Iterable[str]) -> bool:
    """Whether what these columns hold depends on a field of their reference's provenance."""
    kind = next((kind for kind in KINDS if field.startswith(kind)), None)
    read = any(column.startswith(kind.replace("_", "")) for column in columns) if kind else True
    return read and field != "tokenizer_differences"


def _is_gated(columns: Iterable[str]) -> bool:
    """Whether an objective that reads these columns has a gate: only one takes the top k where the entropy says so."""
    return any(column.startswith("topk") for column in columns) and any(
        column.startswith("entropy") for column in columns
    )


def _text(value: Any) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:13]}..{text[-1]}"


def _remedy(field: str) -> str:
    if field.startswith("references."):
        return "score one of them again, with the same model and options"
    return "pack one of them again, with the same tokenizer and options"


@dataclass(frozen=True)
class Drawn:
    """What a run takes of a source. rows, tokens: expected from it, up to the last step; epochs: passes over it."""

    name: str
    rows: int
    tokens: int
    epochs: float


def share_to_predict(manifest: Manifest) -> float | None:
    """Share of the tokens that are to be predicted: 1 in a folder without a mask, None where that was not counted."""
    if not manifest.predict:
        return 1.0
    counts = [file.predicted_tokens for file in manifest.corpus]
    if None in counts:
        return None  # rows were selected
    return sum(count or 0 for count in counts) / max(1, manifest.tokens)


def drawn(mixed: MixedShards, order: MixedOrder, num_rows: int, first_row: int = 0) -> list[Drawn]:
    """What positions first_row .. num_rows - 1 take of each source."""
    found = []
    counts = order.counts(num_rows) - order.counts(first_row)
    for name, folder, rows in zip(mixed.names, mixed.folders, counts.tolist()):
        manifest = folder.manifest
        found.append(Drawn(name, rows, round(rows * manifest.tokens / manifest.rows), rows / manifest.rows))
    return found


def most_steps(mixed: MixedShards, order: MixedOrder, global_batch_size: int, first_step: int = 0) -> tuple[float, str]:
    """The steps that max_epochs of the sources allow, inf without any, and the source that allows no more.

    first_step: only rows after this many steps train, all steps are counted.
    """
    found = (math.inf, "")
    before = order.counts(first_step * global_batch_size)
    for number, (source, folder) in enumerate(zip(mixed.mixture.sources, mixed.folders)):
        if source.max_epochs is None:
            continue
        rows, low, high = source.max_epochs * folder.manifest.rows + before[number], 0, 1
        while high < 2**48 and order.counts(high * global_batch_size)[number] <= rows:
            low, high = high, 2 * high
        if high >= 2**48:  # the last stage leaves it out
            continue
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if order.counts(middle * global_batch_size)[number] <= rows else (low, middle)
        found = min(found, (low, source.name))
    return found


def require_epochs(
    mixed: MixedShards, order: MixedOrder, num_steps: int, global_batch_size: int, first_step: int = 0
) -> None:
    """ValueError where a source would be repeated more than its max_epochs allow; first_step: as of most_steps."""
    allowed, name = most_steps(mixed, order, global_batch_size, first_step)
    if num_steps <= allowed:
        return
    of_run = drawn(mixed, order, num_steps * global_batch_size, first_step * global_batch_size)
    epochs = next(of.epochs for of in of_run if of.name == name)
    limit = next(source.max_epochs for source in mixed.mixture.sources if source.name == name)
    raise ValueError(
        f"{name}: {num_steps:,} steps go through it {epochs:.3g} times, max_epochs is {limit:g}; at most --max-steps "
        f"{allowed:.0f}, or give it a smaller weight"
    )


def choose_steps(
    mixed: MixedShards, order: MixedOrder, max_steps: int | None, epochs: float, batch: int
) -> tuple[int, int | None]:
    """Steps of a run of `batch` rows a step, and the position at which its data ends (None: with the last step)."""
    if mixed.mixture.is_mixed and not max_steps:
        once = [(folder.manifest.rows / share, name) for name, folder, share in
                zip(mixed.names, mixed.folders, order.stages[0].shares.values()) if share]  # fmt: skip
        (shortest, first), (longest, last) = min(once), max(once)
        raise ValueError(
            f"a mixture of {len(mixed.names)} sources needs --max-steps, since it has no end of its own: {first} has been read "
            f"once after {math.floor(shortest / batch):,} steps, {last} after {math.ceil(longest / batch):,}"
        )
    last_row = None if max_steps else math.ceil(epochs * order.num_rows)
    return max_steps or math.ceil(last_row / batch), last_row  # type: ignore[operator]


def table(
    mixed: MixedShards, order: MixedOrder, num_steps: int, global_batch_size: int, first_step: int = 0
) -> list[str]:
    """Lines that say what the run takes of each source; first_step: the step after which its rows train."""
    of_run = drawn(mixed, order, num_steps * global_batch_size, first_step * global_batch_size)
    width = max(len(name) for name in mixed.names)
    tokens = sum(of.tokens for of in of_run)
    steps = f"{num_steps:,} step{'' if num_steps == 1 else 's'}"
    lines = [
        f"mixture of {len(of_run)} sources, {steps}, about {tokens:,} tokens; of the whole run, with shares of all tokens:"
    ]
    masked = any(folder.manifest.predict for folder in mixed.folders)
    for of, folder in zip(of_run, mixed.folders):
        repeated = f", repeated {of.epochs:.1f} times" if of.epochs > 1.005 else ""
        repeated += f": more than {MANY_EPOCHS} epochs are rarely worth it" if of.epochs > MANY_EPOCHS else ""
        lines.append(
            f"  {of.name:{width}} {of.tokens / max(1, tokens):7.2%} {of.tokens:>16,} tokens {_to_predict(of, folder) * masked}"
            f"{of.rows:>12,} rows {of.epochs:8.3f} epochs{repeated}"
        )
    stages = mixed.mixture.stages
    for stage in stages if len(stages) > 1 else ():
        total = sum(stage.weights.values())
        shares = ", ".join(f"{name} {weight / total:.1%}" for name, weight in stage.weights.items())
        lines.append(f"  {f'after step {stage.after_step:,}' if stage.after_step else 'from step 1'}: {shares}")
    for stage in mixed.mixture.stages:
        total = sum(stage.weights.values())
        if abs(total - 1) > 1e-6:
            lines.append(
                f"  weights after step {stage.after_step:,} sum to {total:g}; they are taken as shares of that"
            )
    return lines


def _to_predict(of: Drawn, folder: ShardFolder) -> str:
    share = share_to_predict(folder.manifest)
    return f"{'unknown' if share is None else f'{round(of.tokens * share):,}':>16} to predict "
