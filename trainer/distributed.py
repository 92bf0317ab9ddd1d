"""The processes of a run: who they are, how they add numbers, how the model is spread over them.

torchrun (or Ray Train) starts one process per device; without it there is one process and nothing to agree on.
Gradients are summed over the ranks: the loss is divided by the predicted tokens of the whole global batch
(Eq. 6), so each rank's share of it only has to be added.
"""

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(hours=2)
"""For what one process does for all, or reads and writes by itself. A process that is gone is noticed at once: its connections
close; one whose machine is gone with them open, after this time."""


@dataclass(frozen=True)
class World:
    """This process among those of the run. local_size: processes on each machine. patient: a group of all processes that waits
    for PATIENCE; without it they wait for `timeout`."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_size: int = 1
    timeout: timedelta = timedelta(minutes=10)
    patient: dist.ProcessGroup | None = field(default=None, repr=False)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """`values` added up over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """CPU tensors of all ranks, of any lengths, one after the other."""
        if self.size == 1:
            return values
        lengths: list[Any] = [0] * self.size
        dist.all_gather_object(lengths, (len(values), values.dtype, values.shape[1:]))
        _, dtype, shape = max(lengths, key=lambda entry: entry[0])  # an empty rank may not know them
        longest = max(length for length, *_ in lengths)
        padded = torch.zeros((longest, *shape), dtype=dtype)
        if len(values):
            padded[: len(values)] = values
        everyones = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(everyones, padded)
        return torch.cat([entry[:length] for entry, (length, *_) in zip(everyones, lengths)])

    def from_first(self, value: Any) -> Any:
        """The object of rank 0, on all ranks."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def from_all(self, value: Any) -> list[Any]:
        """The objects of all ranks, in their order."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def meet(self) -> None:
        """Wait until all ranks are here, up to PATIENCE for one that reads or writes before."""
        if self.size > 1:
            dist.barrier(group=self.patient)

    def first_problem(self, problem: str | None) -> str | None:
        """Of what each rank says, that of the lowest one that says something, on all ranks, which wait up to PATIENCE."""
        if self.size == 1:
            return problem
        problems: list[Any] = [None] * self.size
        dist.all_gather_object(problems, problem, group=self.patient)
        return next((each for each in problems if each is not None), None)


@contextlib.contextmanager
def connect(timeout_seconds: float) -> Iterator[World]:
    """The world that the launcher's environment variables (RANK, WORLD_SIZE, ...) describe.

    timeout_seconds: how long a rank waits for the others before it gives up. A process group that the caller
    has made is used and left as it is.
    """
    has_gpu = torch.cuda.is_available()
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if size == 1:
        yield World(device)
        return
    own = not dist.is_initialized()
    if own:
        # gloo beside NCCL: counts and checkpoints do not go over the GPU
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=timedelta(seconds=timeout_seconds)
        )  # fmt: skip
    local_sizes: list[Any] = [None] * size
    dist.all_gather_object(local_sizes, int(os.environ.get("LOCAL_WORLD_SIZE", str(size))))
    # machines with different numbers of processes cannot be replicas of each other: they count as one
    local_size = local_sizes[0] if len(set(local_sizes)) == 1 else size
    patient = dist.new_group(backend="gloo", timeout=max(PATIENCE, timedelta(seconds=timeout_seconds)))
    yield World(device, dist.get_rank(), size, local_size, timedelta(seconds=timeout_seconds), patient)
    # not where the block raised: the others are still in a collective, and the launcher ends them
    if own:
        dist.barrier()
        # A replica of DDP that goes after the group would drop the last reference to it, with Python's lock held, while
        # the group's threads wait for that lock: the process would never end. The model is in reference cycles.
        gc.collect()
        dist.destroy_process_group()


def make_mesh(world: World, sharding: str) -> DeviceMesh:
    """The ranks as "full" sharding has them, or as "hybrid" has them: one dimension of machines, one of their processes."""
    machines = world.size // world.local_size
    if sharding == "hybrid" and machines > 1:
        shape, names = (machines, world.local_size), ("replicate", "shard")
        return init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))


def shard(module: nn.Module, layers: list[nn.Module], mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Have FSDP2 keep a part of each weight of `module` on each rank and gather them layer by layer, in `dtype`."""
    low = dtype if dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)


def spread(
    module: nn.Module,
    layers: list[nn.Module],
    world: World,
    sharding: str,
    dtype: torch.dtype,
    mesh: DeviceMesh | None = None,
) -> nn.Module:
    """The module to call for the forward of `module`, spread over the ranks.

    layers: its decoder layers, each a unit of sharding. sharding: "replicate" (DDP), "full" (FSDP2 over all ranks) or
    "hybrid" (FSDP2 within a machine, replicas across machines); trainer/memory.py has "auto". dtype: of the
    matrix products; parameters, gradients and their sum over the ranks stay in float32. mesh: of an earlier call.
    """
    if world.size == 1:
        return module
    if sharding == "replicate":
        return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
    shard(module, layers, mesh or make_mesh(world, sharding), dtype)
    return module


def accumulate_only(model: nn.Module) -> Any:
    """Context for all micro-batches of a step but the last: replicas exchange their gradients once per step.

    Sharded gradients are summed within the shards after each micro-batch, since keeping them whole would take the memory that
    sharding saves; with replicas of shards (hybrid) what is summed so far waits for the last one.
    """
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return _without_all_reduce(model) if isinstance(model, FSDPModule) else contextlib.nullcontext()


@contextlib.contextmanager
def _without_all_reduce(model: FSDPModule) -> Iterator[None]:
    model.set_requires_all_reduce(False)
    try:
        yield
    finally:
        model.set_requires_all_reduce(True)


def whole(value: Tensor) -> Tensor:
    """A tensor that may be spread over the ranks, whole on each."""
    return value.full_tensor() if isinstance(value, DTensor) else value
