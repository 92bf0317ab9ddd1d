"""The folder for torchtitan: a module that its --module takes, the tokenizer, and the commands.

The rows stay where they are: trainer/integrations/torchtitan.py reads them, in the order of remit train.
"""

import math
import os
from pathlib import Path
from typing import Any

import yaml

from pipelines.export.settings import ExportConfig
from shards.folder import TOKEN_IDS
from shards.manifest import Manifest
from shards.store import is_remote, open_store
from trainer.data import context_of_rows
from trainer.mixed_shards import MixedShards, most_steps
from trainer.mixture import Mixture

MODULE, MIX = "remit_rows", "mix.yaml"
TEMPLATE = '''"""Configs of torchtitan on annotated shards, written by remit export: --module {module} --config llama3_8b, or any other
config by its name, my_models.configs.tiny too. What the command line sets, as --dataloader.seed, wins."""

from collections.abc import Callable

from torchtitan.trainer import Trainer
from trainer.integrations.torchtitan import find_config, on_rows

ROWS = {rows}


def __getattr__(name: str) -> Callable[[], Trainer.Config]:
    if name.startswith("_"):
        raise AttributeError(name)
    config = find_config(name)
    return lambda: on_rows(config(), **ROWS)
'''
README = """# Rows for torchtitan

{rows:,} rows of at most {seq_len:,} tokens in {folders}, {columns}, in {context} context.

Install remit beside torchtitan, and start torchtitan with this folder on the path:

    pip install torchtitan
    PYTHONPATH={out} torchrun --nproc-per-node 8 -m torchtitan.train --module {module} --config llama3_8b \\
        --hf_assets_path /path/of/BASE --checkpoint.enable --checkpoint.initial_load_path /path/of/BASE \\
        --checkpoint.initial_load_in_hf

BASE is the Hugging Face folder of the model that is trained, with the tokenizer of the rows.
"""


def absolute(path: str | Path) -> str:
    """The same folder or file for processes with another working directory, with its last name, which a mixture's order is of."""
    if is_remote(path):
        return str(path)
    whole = Path(path).absolute()
    return os.path.join(os.path.abspath(whole.parent), whole.name)


def absolute_shards(mixture: Mixture, shards: tuple[str, ...]) -> list[str]:
    """--shards with absolute paths, names and weights kept to the last digit: torchtitan may run in another folder."""
    if not shards:  # --mix names them
        return []
    if not mixture.is_mixed:
        return [absolute(mixture.sources[0].shards)]
    return [f"{absolute(source.shards)}={source.weight!r}" for source in mixture.sources]


def mix_text(mixture: Mixture) -> str:
    """The file of a mixture with absolute paths: those of the user's may be relative to where this command runs."""
    sources = {source.name: {"shards": absolute(source.shards), "weight": source.weight} for source in mixture.sources}
    stages = [{"after_step": stage.after_step, "weights": dict(stage.weights)} for stage in mixture.stages[1:]]
    return yaml.safe_dump({"sources": sources} | ({"stages": stages} if stages else {}), sort_keys=False)


def rows_of(config: ExportConfig, mixed: MixedShards) -> dict[str, Any]:
    """Arguments of on_rows. ValueError where the folders cannot be trained on together, or lack the reference."""
    names = sorted(set.intersection(*({*folder.manifest.references} for folder in mixed.folders)))
    if not config.reference and config.objective != "ntp" and len(names) != 1:
        raise ValueError(
            f"no --reference is given, and the shards have log-probs of {', '.join(names) or 'no reference'}; name one"
        )
    for name in config.reference:
        mixed.first.require_reference(name)
    # as in remit train, ntp reads no log-probs, and its context does not depend on --reference
    reference = None if config.objective == "ntp" else [*config.reference, *names][0]
    mixed.require_alike(reference)
    for folder in mixed.folders:
        folder.require_complete()
    context = context_of_rows(mixed.folders, reference)
    if len(config.mixture.stages) > 1 and config.global_batch_size is None:
        raise ValueError(
            f"--mix {config.mix}: has stages, which begin after a number of steps; give --global-batch-size"
        )
    _refuse_max_epochs(config, mixed)
    options: dict[str, Any] = {
        "shards": absolute_shards(config.mixture, config.shards),
        "reference": reference,
        "context": context,
        "mix": None if config.mix is None else absolute(config.out / MIX),
        "steps_batch_size": config.global_batch_size,
        "seed": config.seed,
        "objective": config.objective,
    }
    return options | ({"epsilon": config.epsilon} if config.objective == "remit" else {})


def _refuse_max_epochs(config: ExportConfig, mixed: MixedShards) -> None:
    """ValueError where a source has max_epochs that some number of steps exceeds: torchtitan has its steps from its own command
    line, and asks for no limit."""
    limit = next(((s.name, s.max_epochs) for s in config.mixture.sources if s.max_epochs is not None), None)
    if limit is None:
        return
    allowed, batch = "", config.global_batch_size
    if batch is not None:
        steps, _ = most_steps(mixed, mixed.order(config.seed, batch), batch)
        if steps == math.inf:  # the last stage leaves the source out
            return
        allowed = f", and give torchtitan at most --training.steps {steps:.0f} of {batch:,} rows"
    raise ValueError(
        f"--mix {config.mix}: max_epochs of {limit[0]} is {limit[1]:g}, which torchtitan would not keep, since it has its steps "
        f"from its own command line; take it out of the file{allowed}"
    )


def write_module(folder: Path, out: Path, config: ExportConfig, mixed: MixedShards) -> list[str]:
    """Write module, tokenizer and README into `folder`, which will be `out`. Returns the names of the files."""
    options = rows_of(config, mixed)
    lines = "".join(f"    {key!r}: {_literal(value)},\n" for key, value in options.items())
    (folder / f"{MODULE}.py").write_text(TEMPLATE.format(module=MODULE, rows="{\n" + lines + "}"), encoding="utf-8")
    names = []
    if config.mix is not None:
        (folder / MIX).write_text(mix_text(config.mixture), encoding="utf-8")
        names.append(MIX)
    for name in mixed.folders[0].tokenizer_files():
        if name != TOKEN_IDS:
            open_store(folder / "tokenizer").replace(name, mixed.folders[0].tokenizer_file(name))
            names.append(f"tokenizer/{name}")
    manifests: list[Manifest] = [opened.manifest for opened in mixed.folders]
    reference = options["reference"]
    columns = (
        "without log-probs, for next-token prediction" if reference is None else f"with the log-probs of `{reference}`"
    )
    readme = README.format(
        rows=sum(manifest.rows for manifest in manifests), seq_len=max(manifest.seq_len for manifest in manifests),
        folders=", ".join(f"`{opened.path}`" for opened in mixed.folders), columns=columns, context=options["context"],
        out=out.absolute(), module=MODULE,
    )  # fmt: skip
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return [f"{MODULE}.py", "README.md", *names]


def _literal(value: Any) -> str:
    """Python source of a value; infinity has no literal."""
    return f'float("{value}")' if isinstance(value, float) and value in (float("inf"), float("-inf")) else repr(value)
