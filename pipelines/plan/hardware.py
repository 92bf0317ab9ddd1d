"""GPUs as their makers describe them, and the machines of a plan."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """Dense peaks in TFLOP/s, memory in GB (10^9 bytes), link to the others of its machine in GB/s and direction."""

    bfloat16: float
    float32: float
    memory_gb: float
    link_gbps: float
    source: str


GPUS = {
    "h200": GPU(989, 67, 141, 450, "NVIDIA H200 SXM data sheet, dense"),
    "h100": GPU(989, 67, 80, 450, "NVIDIA H100 SXM data sheet, dense"),
    "a100": GPU(312, 19.5, 80, 300, "NVIDIA A100 80 GB SXM data sheet, dense"),
    "b200": GPU(2250, 80, 180, 900, "NVIDIA B200 data sheet, dense"),
    "l40s": GPU(362, 91.6, 48, 32, "NVIDIA L40S data sheet, dense"),
    "rtx4090": GPU(165, 82.6, 24, 32, "NVIDIA Ada architecture paper, dense, float32 accumulation"),
    "cpu": GPU(0.15, 0.15, 16, 10, "a guess for two cores of a laptop; give --train-rate and --score-rate"),
}
UNKNOWN_GPU = GPU(math.nan, math.nan, math.nan, 32, "PCIe 4.0 x16")  # its peak and memory have to be given


def compute_dtype(gpu: str, dtype: str) -> str:
    """What --dtype means, of the matrix products."""
    return dtype if dtype != "auto" else "float32" if gpu == "cpu" else "bfloat16"


@dataclass(frozen=True)
class Machine:
    """All GPUs of a plan.

    gpu: its name; dtype: of the matrix products; of one GPU: peak_flops per second, memory_bytes, and bytes per second to the
    others of its machine (link) and to other machines (network).
    """

    gpu: str
    num_gpus: int
    gpus_per_node: int
    dtype: str
    peak_flops: float
    memory_bytes: float
    memory_share: float
    link: float = math.inf
    network: float = math.inf

    @property
    def nodes(self) -> int:
        return math.ceil(self.num_gpus / self.gpus_per_node)

    @property
    def replicas(self) -> int:
        """Machines that hybrid sharding replicates over: 1 where they have different numbers of GPUs."""
        return 1 if self.num_gpus % self.gpus_per_node else self.nodes

    @property
    def usable_bytes(self) -> float:
        return self.memory_bytes * self.memory_share

    @property
    def element_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2
