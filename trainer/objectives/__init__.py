"""Objectives: one small file each, registered in trainer/objectives/settings.py; docs/objectives.md shows how to add one.

Light to import: the settings are part of the command line, whose --help does without torch.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from trainer.objectives.settings import ObjectiveSettings

if TYPE_CHECKING:
    from trainer.objectives.objective import Objective

__all__ = ["ObjectiveSettings", "make_objective"]


def make_objective(settings: ObjectiveSettings, reference: Mapping[str, Any] | None = None) -> "Objective":
    """The objective that `settings` name, from the module of that name.

    reference: what is stored of the reference, as the manifest has it; an objective that depends on it has a function fit
    beside make.
    """
    module = import_module(f"trainer.objectives.{settings.objective}")
    if reference is not None and hasattr(module, "fit"):
        fitted: Objective = module.fit(settings, reference)
        return fitted
    objective: Objective = module.make(settings)
    return objective
