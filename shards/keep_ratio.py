"""How many of n things a keep ratio keeps: one rule for rows (remit select) and for tokens (RHO-1)."""

from fractions import Fraction


def keep_count(n: int, ratio: float) -> int:
    """The integer nearest to ratio * n, halves up, at least 1; n must be at least 1.

    Computed with the decimal number that was typed: 0.55 of 20 is 11, though 0.55 * 20 is 11.000000000000002.
    """
    return max(1, int(Fraction(str(ratio)) * n + Fraction(1, 2)))
