"""Memory of each process of a sharded training, phase by phase, beside what it should be.

    python -m benchmarks.load_memory --gigabytes 2 --processes 4

makes a random base of that many GB in float32, trains one step on it under gloo, saves and exports. What a process holds is its
RssAnon, sampled: memory of its own, without pages of mapped files, which the kernel takes back when it wants them. The memory
before the load (Python, torch and transformers) is taken off. --limit-gb: the most that each process may hold, that memory
included, as the kernel enforces it (benchmarks/memory_limit.py); --phase load stops after the load, export exports the base as it
was loaded.
"""

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.memory_limit import LimitBy, Limits, own_bytes

SEQ_LEN = 64


@dataclass(frozen=True)
class Settings:
    """See the module."""

    gigabytes: float = 2.0
    processes: int = 4
    vocabulary: int = 32_000
    sharding: Literal["full", "replicate"] = "full"
    phase: Literal["load", "export", "all"] = "all"
    limit_gb: float | None = None
    limit_by: LimitBy = "auto"
    json: Path | None = None


class Phases:
    """The most that the process held in each phase, above what it held at first."""

    def __init__(self) -> None:
        self.name, self.most, self.first = "start", dict[str, int](), own_bytes()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self.look()
            time.sleep(0.005)

    def look(self) -> None:
        self.most[self.name] = max(self.most.get(self.name, 0), own_bytes() - self.first)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, self.name = self.name, name
        try:
            yield
        finally:
            self.look()
            self.name = before

    def wrap(self, where: Any, function: str, name: str) -> None:
        call: Callable[..., Any] = getattr(where, function)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            with self.phase(name):
                return call(*arguments, **named)

        setattr(where, function, wrapped)


def make_base(
    folder: Path, gigabytes: float, vocabulary: int, hidden: int = 1024, dtype: str = "float32"
) -> dict[str, int]:
    """A Llama of about that many GB in float32, saved in `dtype`; its parameters, those of the largest tensor, of a layer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    inner = 11 * hidden // 4
    layer = 4 * hidden * hidden + 3 * hidden * inner
    layers = max(1, round((gigabytes * 1e9 / 4 - 2 * vocabulary * hidden) / layer))
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=SEQ_LEN, tie_word_embeddings=False, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="200MB")
    return {"parameters": model.num_parameters(), "largest": vocabulary * hidden, "layer": layer}


def work(rank: int, settings: Settings, folder: Path, limits: Limits | None) -> None:
    """One process: what it held goes to folder/rank.json."""
    if limits and limits.group(rank):
        limits.enter(rank)  # what is imported counts, too
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(settings.processes), "GLOO_SOCKET_IFNAME": "lo"}
    import torch
    import torch.distributed as dist
    from transformers.utils import logging

    import trainer.checkpoint
    import trainer.model
    import trainer.train
    import trainer.trainable
    from trainer.config import TrainConfig

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=settings.processes,
        timeout=timedelta(seconds=600),
    )  # fmt: skip
    phases = Phases()
    if limits and not limits.group(rank):
        limits.enter(rank)
    began = time.perf_counter()
    phases.wrap(trainer.model, "load_sharded", "read")
    if settings.phase == "all":
        phases.wrap(trainer.trainable, "load_base", "checks")
        phases.wrap(trainer.train, "train_step", "train")
        phases.wrap(trainer.checkpoint.Checkpoints, "save", "save")
        phases.wrap(trainer.checkpoint.Checkpoints, "wait", "save")
        phases.wrap(trainer.train, "export_model", "export")
        config = TrainConfig(
            shards=(str(folder / "shards"),), model=str(folder / "base"), out=folder / "out", objective="ntp", dtype="float32",
            max_steps=1, global_batch_size=settings.processes, sharding=settings.sharding, checkpoint_every=1,
        )  # fmt: skip
        trainer.train.train(config)
    else:
        load_and_export(settings, folder, phases)
    held = {"phases": phases.most, "before": phases.first, "seconds": time.perf_counter() - began}
    (folder / f"{rank}.json").write_text(json.dumps(held))
    dist.barrier()
    os._exit(0)


def load_and_export(settings: Settings, folder: Path, phases: Phases) -> None:
    """Without the training between the two, which needs four times the memory of the weights."""
    from trainer.distributed import connect
    from trainer.export import export
    from trainer.gathered import Gathered
    from trainer.heap import frugal_heap
    from trainer.layout import read_layout
    from trainer.loss_model import LossModel
    from trainer.model import load_base

    with connect(600) as world, frugal_heap():
        with phases.phase("checks"):
            base = load_base(folder / "base", "float32", world.device, "packed", world, settings.sharding)
            layout = base.shares.layout if base.shares else read_layout(folder / "base", base.model)
            base.prepare(False, "off")
            loss_model = LossModel(base)
            base.spread(loss_model, world)
        if settings.phase == "export":
            with phases.phase("export"):
                weights = Gathered(loss_model, world)
                if world.first:
                    export(base.model, layout, weights, folder / "out" / "model")
                else:
                    weights.follow(layout.groups)
                world.meet()


def expected(settings: Settings, size: dict[str, int]) -> dict[str, float]:
    """Bytes of a process by phase: P parameters over S processes, in float32.

    read: its share, 4 P / S, and the largest tensor. checks: its share, and one embedding or two layers gathered, which gloo
    holds twice (as it receives them, and in their own places). train: weights, gradients and moments, and the gathered weights
    twice. save: weights and moments, and a copy of them that is written while the training would go on. export: weights and
    moments, and one tensor as it is received and whole.
    """
    shards = settings.processes if settings.sharding == "full" else 1
    share, tensor = 4 * size["parameters"] / shards, 4 * size["largest"]
    gathered = 4 * (2 * size["largest"] + 2 * size["layer"]) if shards > 1 else 0
    asked = 4 * max(size["largest"], 2 * size["layer"]) if shards > 1 else 0
    moments = 0.0 if settings.phase == "export" else 2 * share
    return {
        "read": share + tensor,
        "checks": share + 2 * asked,
        "train": 4 * share + 2 * gathered,
        "save": 2 * (share + 2 * share) + gathered,
        "export": share + moments + 2 * tensor,
    }


def main(settings: Settings) -> int:
    import torch.multiprocessing as processes

    from benchmarks.random_shards import make_shards

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context = processes.get_context("spawn")
        with context.Pool(1) as pool:  # its memory goes with it
            size = pool.apply(make_base, (folder / "base", settings.gigabytes, settings.vocabulary))
        make_shards(folder / "shards", settings.vocabulary, 1, 64, SEQ_LEN)
        limits = None
        if settings.limit_gb is not None:
            limits = Limits(int(settings.limit_gb * 1e9), settings.processes, settings.limit_by, 4 * size["parameters"])
            print(f"each process is held to {settings.limit_gb:g} GB by {limits.text}")
        ranks = [
            context.Process(target=work, args=(rank, settings, folder, limits)) for rank in range(settings.processes)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if limits:
            limits.remove()
        codes = [process.exitcode for process in ranks]
        held = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(ranks)) if not codes[rank]]
    if any(codes):
        print(f"failed: exit codes {codes}", file=sys.stderr)
        return 1
    print(
        f"{size['parameters']:,} parameters, {4e-9 * size['parameters']:.2f} GB in float32, {settings.processes} processes, "
        f"{settings.sharding}; each held {held[0]['before'] / 1e9:.2f} GB before"
    )
    rows = {}
    for phase, formula in expected(settings, size).items():
        peaks = [entry["phases"][phase] for entry in held if phase in entry["phases"]]
        if peaks:
            rows[phase] = {"peaks": peaks, "formula": formula}
            print(f"{phase:8} {' '.join(f'{peak / 1e9:6.2f}' for peak in peaks)} GB   formula {formula / 1e9:.2f} GB")
    if settings.json is not None:
        settings.json.write_text(json.dumps({"settings": asdict(settings), "size": size, "phases": rows}, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings)))
