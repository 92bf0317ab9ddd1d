"""remit plan: what scoring and training will cost, from two configs."""

import sys

from rich.console import Console

from pipelines.pages import write_json
from pipelines.plan.hardware import compute_dtype
from pipelines.plan.presets import find_model, read_config
from pipelines.plan.settings import PlanConfig
from pipelines.plan.tables import show
from pipelines.terminal import DONE, ShouldStop, quiet_libraries


def run(config: PlanConfig, should_stop: ShouldStop) -> int:
    """The command: count both models, print, write --json."""
    options = {"--base": config.base, "--reference": config.reference}
    models = {option: find_model(option, model) for option, model in options.items()}  # a mistyped path is told at once
    mixed = None
    if config.is_mixed:
        from pipelines.plan.mixture import add_mixture, with_folders

        config, mixed = with_folders(config)
    from pipelines.plan.figures import plan_costs
    from trainer.model_shape import count

    quiet_libraries()
    configs = [(option, read_config(option, found), name) for option, (found, name) in models.items()]
    dtype = compute_dtype(config.gpu, config.dtype)
    base, reference = (count(*entry, config.seq_len, dtype) for entry in configs)
    figures = plan_costs(config, base, reference, mixed)
    if mixed is not None:
        add_mixture(figures, mixed)
    show(figures, Console(file=sys.stdout, highlight=False))
    if config.json is not None:
        write_json(config.json, figures)
    return DONE
