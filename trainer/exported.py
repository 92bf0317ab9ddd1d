"""What became of a run's training in the models that it exported: OUT/exported.json, and a line for the user.

Rounding a weight to the dtype of the export may return it to the base's value, so that its training is lost.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shards.lease import Lease
from shards.output_folder import MODEL
from shards.store import temporary_name
from trainer.export import Rounding
from trainer.layout import Layout

EXPORTED = "exported.json"
CHECKPOINTS = "checkpoints"
BEGUN = "begun"
"""How many commands have begun or gone on with the run; written once what they make again is deleted, and by nothing else."""
FOR_TASKS = "for_tasks"
"""Set in the entry of an export that is there for --eval-tasks alone, which deletes it."""
LOSS_THAT_COUNTS = 5e-4
"""Nats per token: what rounding may cost without a word. Comparing runs calls less than this level."""
GAIN_THAT_COUNTS = 0.05
"""Share of the gain in held-out loss that rounding may cost without a word."""
RETURNED_THAT_COUNTS = 0.5
"""Share of the updated weights that rounding may return to the base's values without a word."""


class Exported:
    """OUT/exported.json: what the base's files hold beside the model, and each export of the run."""

    def __init__(self, out: Path, lease: Lease | None = None) -> None:
        self.out, self.lease = out, lease

    def read(self) -> dict[str, Any]:
        path = self.out / EXPORTED
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"models": {}}

    def require_dtype(self, export_dtype: str) -> None:
        """ValueError where the run is finished and its model was exported with another --export-dtype."""
        entry = self.read()["models"].get(MODEL, {"export_dtype": "base"})  # older versions had no other and no file
        if (self.out / MODEL).exists() and entry["export_dtype"] != export_dtype:
            has_checkpoint = any((self.out / CHECKPOINTS).glob("step-*"))
            remedy = (
                "delete that folder to have the run's newest checkpoint exported again"
                if has_checkpoint
                else "the run has no checkpoint to export again: train into another --out"
            )
            raise ValueError(
                f"{self.out / MODEL}: was exported with --export-dtype {entry['export_dtype']}, {export_dtype} asked for "
                f"now; {remedy}"
            )

    def begin(self, layout: Layout) -> None:
        """Write down what is carried over and what is not trained, forget exports that are not there, and count the command."""
        value = self.read()
        models = {name: entry for name, entry in value["models"].items() if (self.out / name).exists()}
        begun = value.get(BEGUN, 0) + 1
        self._write({"carried_over": layout.carried_over, "not_trained": layout.frozen, BEGUN: begun, "models": models})

    def add(
        self, name: str, step: int, export_dtype: str, rounding: Rounding, more: dict[str, Any] | None = None
    ) -> None:
        """Write down an export that gets its name next; LeaseLost where another process has taken `out` over.

        more: to be written besides.
        """
        if self.lease:
            self.lease.check()
        value = self.read()
        entry = {
            "step": step,
            "export_dtype": export_dtype,
            **asdict(rounding),
            "returned_share": rounding.returned_share,
            **(more or {}),
        }
        self._write(value | {"models": value["models"] | {name: entry}})

    def rename(self, names: dict[str, str]) -> None:
        """Give exports that were moved their new names."""
        value = self.read()
        moved = {names[name]: entry for name, entry in value["models"].items() if name in names}
        models = {name: entry for name, entry in value["models"].items() if name not in names} | moved
        self._write(value | {"models": models})

    def _write(self, value: dict[str, Any]) -> None:
        path = self.out / EXPORTED
        temporary = temporary_name(path)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def untrained_notes(layout: Layout, class_name: str) -> list[str]:
    """A line on the weights of the base that a run will not change, where there are some."""
    kinds = [
        f"{len(names)} {'weights' if len(names) > 1 else 'weight'} of the base {why} ({_examples(names)})"
        for names, why in (
            (layout.carried_over, f"not read by {class_name}"),
            (layout.frozen, "not used on text"),
        )
        if names
    ]
    return [f"{' and '.join(kinds)}: not trained, exported as they are, and listed in {EXPORTED}"] if kinds else []


def _examples(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]}, {names[1]}{', ...' if len(names) > 2 else ''}"


def rounding_notes(rounding: Rounding, first_loss: float | None, last: dict[str, Any]) -> list[str]:
    """A line where rounding costs a noticeable part of what was trained.

    first_loss: held-out loss of the base, last: the last line of evaluation.jsonl; without them the share of the weights
    counts.
    """
    remedy = "--export-dtype float32 keeps all of it"
    share = f"rounding returned {rounding.returned_share:.0%} of the updated weights to the base's values"
    if "exported_loss" in last:
        cost = last["exported_loss"] - last["loss"]
        gain = 0.0 if first_loss is None else first_loss - last["loss"]
        if cost < max(LOSS_THAT_COUNTS, GAIN_THAT_COUNTS * gain):
            return []
        part = f", {cost / gain:.0%} of the gain" if gain > 0 else ""
        return [
            f"the exported model has a held-out loss of {last['exported_loss']:.4f}, the weights before rounding "
            f"{last['loss']:.4f}: rounding costs {cost:.4f} nat per token{part} ({share}); {remedy}"
        ]
    if rounding.returned_share > RETURNED_THAT_COUNTS:
        return [f"{share}, so that a part of the training is not in the exported model; {remedy}"]
    return []
