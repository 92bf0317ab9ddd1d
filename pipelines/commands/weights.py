"""remit weights: what an epsilon would do to a corpus."""

import sys
from time import monotonic

from rich.console import Console

from pipelines.pages import write_json
from pipelines.terminal import DONE, ShouldStop, progress_bar
from pipelines.weights.settings import WeightsConfig
from trainer.mixed_shards import MixedShards


def run(config: WeightsConfig, should_stop: ShouldStop) -> int:
    """The command: read, print, write --json."""
    mixed = MixedShards.open(config.mixture)  # a mistyped path is told before the heavy imports
    began, total = monotonic(), sum(folder.manifest.rows for folder in mixed.folders)
    from pipelines.weights.figures import weights_of_corpus
    from pipelines.weights.tables import show

    with progress_bar(desc="weights", unit=" rows", total=min(config.rows or total, total)) as bar:

        def progress(rows: int, tokens: int) -> None:
            bar.set_postfix_str(f"{tokens / max(1e-9, monotonic() - began):,.0f} tokens/s", refresh=False)
            bar.update(rows - bar.n)

        figures = weights_of_corpus(mixed, config, progress)
    show(figures, Console(file=sys.stdout, highlight=False))
    if config.json is not None:
        write_json(config.json, figures)
    return DONE
