"""What a transformers forward of a model takes: memory and time, by the headers of its weights. None is read."""

import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

MEMORY_TIMES = 1.2  # the float32 weights, once
# Of a machine that is slower than any we have seen do its work: storage, and one core's products
STORAGE_BYTES_PER_SECOND, FLOPS_PER_CORE = 20e6, 5e9
LEAST_SECONDS = 1800.0


@dataclass(frozen=True)
class ForwardCost:
    """parameters: numbers in the weights; file_bytes: their size on the disk; tokens: of all prompts; passes: dtypes."""

    parameters: int
    file_bytes: int
    tokens: int
    passes: int

    @property
    def memory_bytes(self) -> int:
        """Of the largest pass, which is the one in float32."""
        return math.ceil(MEMORY_TIMES * 4 * self.parameters)

    def seconds(self, threads: int) -> float:
        """After which a forward on so many cores is taken for one that will not end."""
        read, flops = self.file_bytes / STORAGE_BYTES_PER_SECOND, 2.0 * self.parameters * self.tokens
        return LEAST_SECONDS + self.passes * (read + flops / (FLOPS_PER_CORE * max(1, threads)))


def forward_cost(model: Path, tokens: int, passes: int) -> ForwardCost:
    """Of the model in a folder of *.safetensors files; quantised weights count as the numbers that the files hold."""
    parameters = file_bytes = 0
    for path in sorted(model.glob("*.safetensors")):
        file_bytes += path.stat().st_size
        with safe_open(path, framework="np") as file:
            parameters += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  # no mapping
    return ForwardCost(parameters, file_bytes, tokens, passes)


def gib(bytes_: float) -> str:
    """38 GiB, 0.4 GiB."""
    value = bytes_ / 2**30
    return f"{value:.0f} GiB" if value >= 10 else f"{value:.1f} GiB"
