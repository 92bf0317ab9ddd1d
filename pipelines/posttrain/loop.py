"""TRL's trainers under our rules: metrics as they come, checkpoints that count only when whole, signals."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback

from pipelines.posttrain.run import CHECKPOINTS, METRICS
from pipelines.posttrain.settings import PostTrainConfig
from pipelines.terminal import ShouldStop, progress_bar
from shards.lease import Lease
from shards.publish import fsync_folder
from shards.store import temporary_name
from trainer.model import resolve_dtype

COMPLETE = "complete"  # in a checkpoint that is whole
KEPT = 2
SHOWN = {"reward": "reward", "rewards/accuracies": "pairs", "kl": "KL"}


def trainer_arguments(config: PostTrainConfig) -> dict[str, Any]:
    """What all of TRL's config classes take; ValueError where the processes cannot share a step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun and accelerate launch
    share, rest = divmod(config.batch_size, processes)
    micro = min(share, config.micro_batch_size or share)
    if rest or share % micro:
        raise ValueError(
            f"--batch-size is {config.batch_size}, expected a multiple of {processes} processes with "
            f"{config.micro_batch_size or 1} rows each"
        )
    return {
        "output_dir": str(config.out / CHECKPOINTS),
        "max_steps": -1 if config.max_steps is None else config.max_steps,
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": share // micro,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if config.schedule == "constant" else config.schedule,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "bf16": resolve_dtype(config.dtype, device) == torch.bfloat16,
        "use_cpu": device.type == "cpu",
        "gradient_checkpointing": config.gradient_checkpointing,
        "logging_steps": config.log_every,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if config.checkpoint_every else "no",
        "save_steps": config.checkpoint_every or 1,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": device.type == "cuda",
        "ddp_find_unused_parameters": False,
    }


class Watch(TrainerCallback):
    """Writes the metrics, shows progress, marks checkpoints, and stops where a signal asked for it."""

    def __init__(self, trainer: Any, out: Path, bar: tqdm, should_stop: ShouldStop, lease: Lease | None) -> None:
        """lease: of `out`, on the process that writes to it."""
        self.trainer = trainer
        self.lease = lease
        self.metrics = out / METRICS
        self.bar = bar
        self.should_stop = should_stop
        self.stopped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.reset(state.max_steps)
        self.bar.initial = self.bar.n = state.global_step
        # TRL's count of tokens is the one thing that its checkpoints do not bring along
        counts = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        self.trainer._total_train_tokens = int(counts[-1]) if counts else 0
        if not self.lease:
            return
        self.lease.check()
        # a checkpoint brings the log up to its step along; what was logged after it is logged again
        temporary = temporary_name(self.metrics)
        temporary.write_text("".join(line(entry) for entry in state.log_history), encoding="utf-8")
        os.replace(temporary, self.metrics)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "train_runtime" in logs:  # the summary at the end, about time
            return
        if self.lease:
            self.lease.check_often()
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(line({**logs, "step": state.global_step}))
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise FloatingPointError(
                    f"step {state.global_step}: {name} is {logs[name]}, expected a number; a lower --learning-rate or "
                    "--dtype float32 may help"
                )
        shown = [f"loss {logs['loss']:.3f}"] if "loss" in logs else []
        shown += [f"{short} {logs[name]:.3f}" for name, short in SHOWN.items() if name in logs]
        self.bar.set_postfix_str(", ".join(shown), refresh=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)
        # a line of the metrics has the mean over its steps, which a checkpoint does not bring along
        whole_line = state.global_step % args.logging_steps == 0
        if whole_line and self.asked_to_stop() and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
        if self.lease and control.should_save:
            self.lease.check()

    def asked_to_stop(self) -> bool:
        """Whether any of the processes was: they have to stop at the same step."""
        accelerator = self.trainer.accelerator
        asked = self.should_stop()
        if accelerator.num_processes == 1:
            return asked
        return bool(accelerator.reduce(torch.tensor(float(asked), device=accelerator.device), "sum") > 0)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.lease:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            for file in folder.iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            self.lease.check()
            (folder / COMPLETE).touch()
            fsync_folder(folder)
            for old in whole_checkpoints(folder.parent)[:-KEPT]:
                self.lease.check()
                shutil.rmtree(old)


def line(entry: dict[str, Any]) -> str:
    """A line of metrics.jsonl, the step first; what is no number is null."""
    values = {name: None if isinstance(value, float) and not math.isfinite(value) else value
              for name, value in entry.items()}  # fmt: skip
    return json.dumps({"step": values.pop("step"), **values}) + "\n"


def whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that count, oldest first."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / COMPLETE).exists()]
    return sorted(whole, key=lambda path: int(path.name.rpartition("-")[2]))


def run_trainer(config: PostTrainConfig, trainer: Trainer, should_stop: ShouldStop, lease: Lease | None) -> bool:
    """Train, from the newest checkpoint where there is one; whether it came to its end. lease: as of Watch."""
    trainer.remove_callback(PrinterCallback)
    whole = whole_checkpoints(config.out / CHECKPOINTS)
    checkpoint = whole[-1] if whole else None
    if lease:
        for path in set((config.out / CHECKPOINTS).glob("checkpoint-*")) - {*whole}:
            lease.check()
            shutil.rmtree(path)
    with progress_bar(desc="train", unit=" steps", disable=not trainer.is_world_process_zero()) as bar:
        watch = Watch(trainer, config.out, bar, should_stop, lease)
        trainer.add_callback(watch)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return not watch.stopped
