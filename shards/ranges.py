"""Ranges of a command's options: one line that gives option, value and expectation where a value is outside.

`names` are fields of a settings dataclass, each an option of the same name with dashes; None is not given and passes.
"""

import math
from collections.abc import Callable, Collection
from typing import Any


def require(settings: Any, holds: Callable[[Any], bool], expected: str, *names: str) -> None:
    """ValueError for the first of the fields `names` whose value does not hold; expected: what should have been given."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not holds(value):
            raise ValueError(f"--{name.replace('_', '-')} is {value!r}, expected {expected}")


def require_at_least(settings: Any, least: float, *names: str) -> None:
    """ValueError for a number below `least`, infinite or NaN."""
    require(settings, lambda value: least <= value < math.inf, f"at least {least}", *names)


def require_not_negative(settings: Any, *names: str, expected: str = "0 or more") -> None:
    """ValueError for a number below 0, infinite or NaN."""
    require(settings, lambda value: 0 <= value < math.inf, expected, *names)


def require_positive(settings: Any, *names: str) -> None:
    """ValueError for a number that is not above 0, infinite or NaN."""
    require(settings, lambda value: 0 < value < math.inf, "a number above 0", *names)


def require_one_of(settings: Any, choices: Collection[str], name: str) -> None:
    """ValueError for another word."""
    require(settings, choices.__contains__, f"one of {', '.join(choices)}", name)
