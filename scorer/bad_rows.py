"""Rows that come out without log-probs: told when they are no rare exception, and too many of them end the run.

A few are normal: training skips them. Many are a dtype that overflows, a reference that does not fit the corpus, or a device.
"""

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

TOLD_SHARES = (0.001, 0.01)  # a line when the first and when the second is passed
LEAST_ROWS = 300  # of which a share says something


class TooManyBadRows(RuntimeError):
    """More rows have no log-probs than --max-bad-rows allows."""


def main_reason(faults: Collection[str]) -> str:
    """The first of the most frequent kind of fault, numbers apart; empty without faults."""
    kinds = Counter(map(_kind, faults))
    return next((fault for fault in faults if _kind(fault) == kinds.most_common(1)[0][0]), "")


def _kind(fault: str) -> str:
    return re.sub(r"[-+]?(\d[\d.]*(e[-+]?\d+)?|nan|inf)", "", fault)


def dtype_remedy(dtype: str, reason: str) -> str:
    """What to do about it where the dtype may be the reason, with a comma behind; else empty."""
    if reason.startswith("token id") or dtype == "float32":
        return ""
    other = "bfloat16, which has a larger range" if dtype == "float16" else "float32"
    return f"score with --dtype {other} (the run is in {dtype}), into another --out, "


@dataclass
class BadRows:
    """Of the parts that this run has scored. most: the share that is allowed."""

    most: float
    dtype: str
    where: str
    rows: int = 0
    bad: int = 0
    _reasons: Counter[str] = field(default_factory=Counter)
    _examples: dict[str, str] = field(default_factory=dict)
    _told: int = 0

    def add(self, rows: int, bad: int, reason: str) -> str | None:
        """Count a part. A line, if one is due; TooManyBadRows where they are too many."""
        self.rows, self.bad = self.rows + rows, self.bad + bad
        if bad:
            self._reasons[_kind(reason)] += bad
            self._examples.setdefault(_kind(reason), reason)
        share = self.bad / max(1, self.rows)
        if self.rows >= LEAST_ROWS and share > self.most:
            raise TooManyBadRows(
                f"{self._count()}, expected at most {self.most:.3g} of them (--max-bad-rows); "
                f"{dtype_remedy(self.dtype, self.reason)}see {self.where}, or go on with a larger --max-bad-rows"
            )
        passed = sum(share > told for told in TOLD_SHARES)
        if passed <= self._told:
            return None
        self._told = passed
        return f"{self._count()}; training skips them; the run ends where they are more than {self.most:.3g} (--max-bad-rows)"

    @property
    def facts(self) -> dict[str, Any]:
        """For the log."""
        return {"rows": self.rows, "rows_bad": self.bad, "reason": self.reason}

    @property
    def reason(self) -> str:
        """Of most of them."""
        return self._examples[self._reasons.most_common(1)[0][0]] if self._reasons else ""

    def _count(self) -> str:
        share = self.bad / max(1, self.rows)
        return f"{self.bad:,} of {self.rows:,} rows came out without log-probs ({share:.1%}), mostly: {self.reason}"
