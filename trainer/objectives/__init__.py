"""Objectives: one small file each, registered in trainer/objectives/settings.py; docs/objectives.md shows how to add one."""

from importlib import import_module

from trainer.objectives.objective import Objective, Tokens, Weighted
from trainer.objectives.settings import ObjectiveSettings

__all__ = ["Objective", "ObjectiveSettings", "Tokens", "Weighted", "make_objective"]


def make_objective(settings: ObjectiveSettings) -> Objective:
    """The objective that `settings` name, from the module of that name."""
    objective: Objective = import_module(f"trainer.objectives.{settings.objective}").make(settings)
    return objective
