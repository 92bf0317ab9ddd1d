"""What GPUs reach at most in bfloat16 matrix products, by the names that their driver gives them.

In: torch.cuda.get_device_name(). Out: dense FLOP/s, from the makers' data sheets, or None where the card is not in the table: a
guess would make a share of the peak that looks measured.
"""

import math
import re
from dataclasses import dataclass

import torch

from trainer.distributed import World


@dataclass(frozen=True)
class Peak:
    """name: a pattern of the driver's name without "NVIDIA"; teraflops: dense bfloat16, sums in float32, per second."""

    name: str
    teraflops: float
    source: str


# Data sheets give twice these figures where they count sparsity of two in four. The first pattern that matches counts.
PEAKS = (
    Peak(r"GB200\b", 2500, "NVIDIA GB200 NVL72 data sheet: 360 PFLOPS of 72 GPUs with sparsity"),
    Peak(r"B200\b", 2250, "NVIDIA HGX B200 data sheet: 36 PFLOPS of 8 GPUs with sparsity"),
    Peak(r"H200 NVL\b", 835, "NVIDIA H200 data sheet, NVL: 1,671 with sparsity"),
    Peak(r"H200\b", 989, "NVIDIA H200 data sheet, SXM: 1,979 with sparsity"),
    Peak(r"GH200\b", 989, "NVIDIA GH200 data sheet: 1,979 with sparsity"),
    Peak(r"H100 PCIe\b", 756, "NVIDIA H100 data sheet, PCIe: 1,513 with sparsity"),
    Peak(r"H100 NVL\b", 835, "NVIDIA H100 data sheet, NVL: 1,671 with sparsity"),
    Peak(r"H100 80GB HBM3\b|H100 SXM", 989, "NVIDIA H100 data sheet, SXM: 1,979 with sparsity"),
    Peak(r"A100\b", 312, "NVIDIA A100 data sheet, PCIe and SXM: 312, 624 with sparsity"),
    Peak(r"L40S\b", 362, "NVIDIA L40S data sheet: 362, 733 with sparsity"),
    Peak(r"L40\b", 181, "NVIDIA L40 data sheet: 181, 362 with sparsity"),
    Peak(r"L4\b", 121, "NVIDIA L4 data sheet: 242 with sparsity"),
    Peak(r"A40\b", 149.7, "NVIDIA A40 data sheet: 149.7, 299.4 with sparsity"),
    Peak(r"A30\b", 165, "NVIDIA A30 data sheet: 165, 330 with sparsity"),
    Peak(r"A10\b", 125, "NVIDIA A10 data sheet: 125, 250 with sparsity"),
    Peak(r"GeForce RTX 4090$", 165.2, "NVIDIA Ada GPU architecture, appendix A: 165.2, sums in float32"),
)


def bfloat16_peak(name: str) -> float | None:
    """FLOP/s of the card that the driver calls so; None for one that is not in the table, or of which there is only a part (MIG)."""
    if "MIG" in name:
        return None
    short = name.removeprefix("NVIDIA ")
    return next((1e12 * peak.teraflops for peak in PEAKS if re.match(peak.name, short)), None)


def peak_of_all(world: World, dtype: torch.dtype) -> float | None:
    """bfloat16 FLOP/s of all processes' devices together; None unless all are known and products run in bfloat16. All ranks
    take part."""
    own = None
    if world.device.type == "cuda" and dtype == torch.bfloat16:
        own = bfloat16_peak(torch.cuda.get_device_name(world.device))
    total = world.sum(torch.tensor(math.nan if own is None else own, dtype=torch.float64)).item()
    return None if math.isnan(total) else total
