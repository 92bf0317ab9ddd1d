"""remit upgrade: give a shard folder of an earlier release the sums by which a reader hashes just what it reads."""

from dataclasses import dataclass, field

from pipelines.settings import OneFolder
from pipelines.terminal import DONE, STOPPED, ShouldStop, counted, note, progress_bar
from shards.folder import ShardFolder
from shards.output_folder import SHARD_FOLDERS, writing
from shards.upgrade import upgrade


@dataclass(frozen=True)
class UpgradeConfig(OneFolder):
    """Add the sums of format 2 to a shard folder of format 1, without scoring again; its files keep their bytes.

    Each part is checked whole against its commit record once. Afterwards training reads and hashes only the rows and
    columns that it needs. The same command again goes on where it was stopped.
    """

    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        _ = self.path


def run(config: UpgradeConfig, should_stop: ShouldStop) -> int:
    folder = ShardFolder(config.path)
    manifest = folder.manifest
    if manifest.format_version != 1:
        print(f"nothing to do: {folder.path} is of format {manifest.format_version}")
        return DONE
    with (
        writing(folder.store, note, SHARD_FOLDERS) as lease,
        progress_bar(desc="upgrade", unit=" tokens", unit_scale=True, total=manifest.tokens) as bar,
    ):
        added = upgrade(folder, lease, lambda plan: bar.update(plan.tokens), should_stop)
        stopped = bar.n < manifest.tokens
    if stopped:
        return STOPPED
    missing = folder.missing_parts()
    print(
        f"{counted(added, 'part')} got sums, {len(manifest.parts) - added - len(missing):,} had them -> {folder.path}"
    )
    if missing:
        note(
            f"{len(missing):,} of {len(manifest.parts):,} parts are not committed yet (first: {missing[0]}); run the command that "
            "writes this folder, then remit upgrade again"
        )
    return DONE
