"""The stages that a YAML file may give options to, and how options become a command line."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

from trainer.objectives.settings import OPTIONS

LOOP = "the loop decides it"
TOP = "give {} at the top"


@dataclass(frozen=True)
class Section:
    """How options become a command.

    title: what the user calls it; command: module and words that are run; settings: module and name of its dataclass;
    decided: options that are not the section's to give, with who gives them; files: options that name something that is
    read; unkeyed: options that change how fast or safely a stage runs, or what it logs, and not its result.
    """

    title: str
    command: tuple[str, ...]
    settings: str
    decided: Mapping[str, str]
    files: tuple[str, ...] = ()
    unkeyed: tuple[str, ...] = ()

    def settings_class(self) -> Any:
        module, _, name = self.settings.partition(":")
        return getattr(import_module(module), name)

    def options(self) -> list[str]:
        """Names of the options that may be given."""
        return [entry.name for entry in fields(self.settings_class()) if entry.name not in self.decided]


def _posttrain(kind: str) -> Section:
    return Section(
        f"remit {kind}",
        (CLI, kind),
        f"pipelines.posttrain.settings:{kind.capitalize()}Config",
        {"model": LOOP, "out": LOOP, "debug": LOOP, "seed": TOP.format("seed")},
        files=("data",),
        unkeyed=("checkpoint_every", "micro_batch_size", "gradient_checkpointing"),
    )


CLI = "pipelines.cli"
SECTIONS = {
    "pack": Section(
        "remit pack", (CLI, "pack"), "scorer.config:PackConfig",
        {"out": LOOP, "debug": LOOP, **{name: TOP.format(name) for name in ("corpus", "tokenizer", "seq_len")}},
        unkeyed=("num_workers", "grace_seconds"),
    ),
    "score": Section(
        "remit score", (CLI, "score"), "scorer.config:ScoreConfig",
        {"shards": LOOP, "model": LOOP, "out": LOOP, "name": LOOP, "debug": LOOP},
        unkeyed=("num_engines", "max_num_batched_tokens", "progress_timeout_seconds", "grace_seconds"),
    ),
    "train": Section(
        "remit train", (CLI, "train"), "trainer.config:TrainConfig",
        {"shards": LOOP, "model": LOOP, "out": LOOP, "reference": LOOP, "debug": LOOP, "seed": TOP.format("seed")},
        files=("eval_shards",),
        unkeyed=("checkpoint_every", "keep_checkpoints", "timeout_seconds", "ray_workers", "wandb_project",
                 "micro_batch_size", "sharding", "activation_checkpointing", "compile", "deterministic"),
    ),
    "evaluate": Section(
        "remit eval", (CLI, "eval"), "pipelines.evaluation.settings:EvalConfig",
        {"model": LOOP, "out": LOOP, "compare": "use remit eval --compare afterwards", "debug": LOOP},
        files=("task_dir",),
    ),
    "sft": _posttrain("sft"),
    "dpo": _posttrain("dpo"),
    "rl": _posttrain("rl"),
}  # fmt: skip


def words(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Options as words of a command line, in the order of their names."""
    line: list[str] = []
    for name, value in sorted(options.items()):
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            line.append(option if value else f"--no-{option[2:]}")
        elif value is not None:
            line += [option, *map(str, value if isinstance(value, list) else [value])]
    return tuple(line)


def is_unkeyed(section: str, name: str, options: Mapping[str, Any]) -> bool:
    """Whether an option may change without a repetition."""
    if name == "micro_batch_size" and options.get("objective") == "rho1" and options.get("scope") == "micro":
        return False  # there it decides which tokens are ranked together
    return name in SECTIONS[section].unkeyed


def without_objective(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of remit train for next-token prediction: those of the other objectives left out."""
    theirs = {"objective", *(name for names in OPTIONS.values() for name in names)}
    return {name: value for name, value in options.items() if name not in theirs}
