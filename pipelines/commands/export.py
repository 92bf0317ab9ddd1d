"""remit export: annotated shards for other trainers."""

from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

from pipelines.export.settings import ExportConfig
from pipelines.terminal import DONE, STOPPED, ShouldStop, counted, note, progress_bar
from scorer.stopping import Stopped
from shards.folder import ShardFolder, require_shards


def run(config: ExportConfig, should_stop: ShouldStop) -> int:
    for folder in config.mixture.folders:  # a mistyped path is told before the imports
        require_shards(folder)
    export = _torchtitan if config.to == "torchtitan" else _rows
    try:
        return export(config, should_stop)
    except Stopped:
        return STOPPED


def _torchtitan(config: ExportConfig, should_stop: ShouldStop) -> int:
    from pipelines.export.run import is_finished, made_of, write_small
    from pipelines.export.titan import MODULE, mix_text, rows_of, write_module
    from trainer.mixed_shards import MixedShards

    mixed = MixedShards.open(config.mixture)
    options = {name: str(value) for name, value in rows_of(config, mixed).items()}
    asked = made_of(config, mixed.folders, options=options, mixture=mix_text(config.mixture))
    if not is_finished(config.out, asked):
        write_small(config.out, asked, lambda folder: write_module(folder, config.out, config, mixed), note)
    print(
        f"torchtitan: PYTHONPATH={config.out} ... --module {MODULE} --config NAME; {config.out}/README.md has the whole line"
    )
    return DONE


def _rows(config: ExportConfig, should_stop: ShouldStop) -> int:
    from pipelines.export import run as writer
    from pipelines.export.megatron import MegatronFiles
    from pipelines.export.olmo_core import OlmoCoreFiles
    from pipelines.export.parquet import ParquetFiles, read_measured
    from pipelines.export.tokens import eos_of, make_plan

    began, shards = monotonic(), ShardFolder(config.mixture.folders[0])
    manifest, described, more = shards.manifest, dict[str, Any](), dict[str, Any]()
    if config.to == "datasets":
        shards.require_complete()
        names = config.reference or tuple(sorted(manifest.references))
        for name in names:
            shards.require_reference(name)
        measured = read_measured(config.verified, shards)
        more["measured"] = measured
        make_files: Any = partial(ParquetFiles, shards=shards, names=names, measured=measured)
    else:
        plan = make_plan(shards, config.reference)
        names = plan.names
        described = {
            "to": config.to, "rows": manifest.rows, "seq_len": manifest.seq_len, "context": plan.context,
            "vocab_size": manifest.tokenizer["vocab_size"], "eos_token_id": eos_of(manifest),
            "references": {name: manifest.references[name] for name in names},
        }  # fmt: skip
        make_files = partial(OlmoCoreFiles if config.to == "olmo-core" else MegatronFiles, plan=plan)
    asked = writer.made_of(
        config, [shards], references=list(names), **{writer.PARTS: writer.parts_sha256(shards)}, **more
    )
    what = f"{counted(manifest.rows, 'row')}, {counted(manifest.tokens, 'token')}"
    if writer.is_finished(Path(config.out), asked):
        print(f"nothing to do, exported before: {what} -> {config.out}")
        return DONE
    with progress_bar(desc="export", unit=" tokens", unit_scale=True, total=manifest.tokens) as bar:

        def progress(done: int) -> None:
            if not bar.n:
                bar.initial = done
            bar.update(done - bar.n)

        writer.write_export(config.out, asked, described, shards, make_files, progress, should_stop, note)
    print(
        f"exported {what}, of {', '.join(names) or 'no reference'}, for {config.to} -> {config.out} ({monotonic() - began:.0f} s)"
    )
    return DONE
