"""How many of a ranking are kept, one rule for all who keep a share of something."""

import math
from fractions import Fraction


def keep_count(n: int, ratio: float) -> int:
    """The nearest integer to ratio * n, halves up, and at least 1.

    n: how many there are, at least 1; ratio: share to keep, more than 0 and at most 1, taken for the decimal number
    that it is written as (0.55 of 20 is 11, although the float 0.55 is a little more), so computed without rounding.
    ValueError for an n or a ratio out of these bounds.
    """
    if n < 1:
        raise ValueError(f"there are {n} to choose from, expected at least 1")
    if not 0 < ratio <= 1:
        raise ValueError(f"the share to keep is {ratio}, expected more than 0 and at most 1, for instance 0.8")
    return max(1, math.floor(Fraction(str(ratio)) * n + Fraction(1, 2)))
