"""The file of --calibration: rates that remit plan --measure found on a machine, kept for plans made elsewhere."""

import json
import math
from pathlib import Path
from typing import Any

VERSION = 1
SHARES = ("mfu_train", "mfu_online", "mfu_score")
POSITIVE = ("remit_cost", "gpu_memory_gb")
OPTIONAL = ("peak_tflops", "update_seconds", "score_start_seconds")


def write_calibration(path: Path, calibration: dict[str, Any]) -> None:
    """Keep a calibration."""
    path.write_text(json.dumps(calibration, indent=1, allow_nan=False) + "\n", "utf-8")


def read_calibration(path: Path) -> dict[str, Any]:
    """A calibration that write_calibration has kept; ValueError where it is none."""
    remedy = "; write it again with remit plan --measure"
    if not path.exists():
        raise ValueError(f"--calibration {path}: no such file; write it with remit plan --measure --calibration {path}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--calibration {path}: cannot be read ({' '.join(str(error).split())[:120]}){remedy}"
        ) from None
    if not isinstance(values, dict) or values.get("version") != VERSION:
        found = values.get("version") if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"--calibration {path}: its version is {found}, expected {VERSION}{remedy}")
    for name in (*SHARES, *POSITIVE, *OPTIONAL):
        value = values.get(name)
        if value is None and name in OPTIONAL:
            continue
        least = math.ulp(0.0) if name in SHARES + POSITIVE or name == "peak_tflops" else 0.0
        most = 2.0 if name in SHARES else 1e12
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise ValueError(f"--calibration {path}: {name} is {value!r}, expected a number above 0{remedy}")
    for name in ("gpu", "dtype"):
        if not isinstance(values.get(name), str):
            raise ValueError(f"--calibration {path}: {name} is {values.get(name)!r}, expected a name{remedy}")
    measured = values.get("measured")
    keys = {"what", "measured_seconds", "predicted_seconds", "ratio"}
    if not isinstance(measured, list) or any(not isinstance(entry, dict) or set(entry) != keys for entry in measured):
        raise ValueError(f"--calibration {path}: measured is damaged, expected a list of {sorted(keys)}{remedy}")
    return values
