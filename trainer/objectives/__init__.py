"""Objectives: one small file each, registered in trainer/objectives/settings.py; docs/objectives.md shows how to add one.

Light to import: the settings are part of the command line, whose --help does without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from trainer.objectives.settings import ObjectiveSettings

if TYPE_CHECKING:
    from trainer.objectives.objective import Objective

__all__ = ["ObjectiveSettings", "make_objective"]


def make_objective(settings: ObjectiveSettings) -> "Objective":
    """The objective that `settings` name, from the module of that name."""
    objective: Objective = import_module(f"trainer.objectives.{settings.objective}").make(settings)
    return objective
