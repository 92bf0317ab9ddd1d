"""remit average: the mean of several exported models, a soup of runs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.models import resolve_model
from pipelines.terminal import DONE, BadUsage, ShouldStop, progress_bar
from shards.output_folder import require_new_folder


@dataclass(frozen=True)
class AverageConfig:
    """Average the weights of exported models of one base, as runs with different seeds, into a new model folder."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="EXPORT...")]
    """Model folders, or runs of remit train, whose models are taken: at least two."""
    out: Path
    """Model folder to write; the first model's config, tokenizer and other files are copied."""
    weights: tuple[float, ...] = ()
    """How much each model counts, in their order, as 2 1 1; default: all the same."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise ValueError(
                f"{len(self.models)} model is given, expected at least two: remit average RUN-1 RUN-2 --out OUT"
            )
        for model in self.models:
            require_new_folder(self.out, "remit average", models=model)


def run(config: AverageConfig, should_stop: ShouldStop) -> int:
    from trainer.soup import average, shares_of

    try:
        shares_of(config.weights, len(config.models))
    except ValueError as error:
        raise BadUsage(str(error)) from None
    folders = [resolve_model("remit average:", model).path for model in config.models]
    with progress_bar(desc="average", unit="B", unit_scale=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        is_new = average(folders, config.out, config.weights, progress)
    what = "averaged" if is_new else "nothing to do, averaged before:"
    print(f"{what} {len(folders)} models -> {config.out}")
    return DONE
