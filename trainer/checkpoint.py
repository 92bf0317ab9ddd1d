"""Resumable state of a run: written beside the training, hashed, then renamed into place.

OUT/checkpoints/step-000100/ holds a torch.distributed.checkpoint and checkpoint.json: the position in the data,
the world size, a fingerprint of the run's settings, the random state of each rank, what the guard and the average of the
weights go on from, and the sha256 of every file.
A folder that does not match its list is passed over, never loaded.
"""

import base64
import contextlib
import json
import os
import shutil
import sys
import threading
import traceback
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from shards.lease import Lease, LeaseLost
from shards.part import encode_json, publish_json, sha256_file
from shards.publish import fsync_folder
from shards.store import open_store, temporary_name
from trainer.average import Average, local
from trainer.checkpoint_files import INDEX, altered, checksum, read_files_of
from trainer.distributed import PATIENCE, World
from trainer.heap import frugal_heap
from trainer.main_memory import free_main_memory
from trainer.rank_reports import clear_reports, leave_report, signs_of_life, wait_for_report

if TYPE_CHECKING:
    from trainer.mirror import Mirror

COPIED_SHARE = 0.8
"""Of the main memory that is free; a copy of the state that needs more is not made."""


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    if not optimizer.state:
        get_state_dict(model, optimizer)  # makes the state by a step with rate 0, which AdamW counts
        for state in optimizer.state.values():
            state["step"].zero_()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def _own_bytes(state: Any) -> int:
    """Of the tensors in nested dictionaries, those of this process's shares."""
    if isinstance(state, dict):
        return sum(map(_own_bytes, state.values()))
    return local(state).nbytes if isinstance(state, torch.Tensor) else 0


class Checkpoints:
    """The checkpoints of a run under `folder`, which all ranks see; the newest `keep` of them are kept.

    settings: a fingerprint of all that decides the outcome; a checkpoint with another one is not loaded. lease: of the
    run's folder; once another process has taken it over, a save publishes and deletes nothing. average: of the weights,
    saved with them. mirror: where each of them is copied.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: Optimizer,
        world: World,
        settings: str,
        keep: int,
        lease: Lease | None = None,
        average: Average | None = None,
        mirror: "Mirror | None" = None,
    ) -> None:
        self.mirror = mirror
        self.folder, self.model, self.optimizer, self.world = folder, model, optimizer, world
        self.settings, self.keep, self.lease, self.average = settings, keep, lease, average
        self.run_state: dict[str, Any] = {}
        """What `save` was given with the checkpoint that was loaded; empty in those of older versions."""
        self._passed_over: list[Path] = []  # damaged ones, newer than what was loaded; the next save deletes them
        # a save runs beside the training and must not meet its collectives
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if world.size > 1 else None
        self._ending = threading.Event()  # with an error: ranks that are gone are not waited for
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind:
            self._ending.set()
            # a rank that is gone with its connections open would be waited for as long as the group's patience lasts
            limit = self.world.timeout.total_seconds() if self.world.size > 1 else None
            if self._saving is not None and wait([self._saving], limit).not_done:
                traceback.print_exception(rest[0])
                sys.stderr.flush()
                os._exit(1)  # else the end of the process waits for the thread
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():  # the first error is the one to show
            self.wait()

    def save(self, step: int, position: int, run_state: dict[str, Any] | None = None) -> None:
        """Copy the state after `step` steps and begin to save it; raises what went wrong in the save before.

        Where main memory has no room for the copy, the state is written before this returns. run_state: more of the run's state, as
        JSON.
        """
        self.wait()
        self.world.meet()  # the first rank publishes, the others may be here long before it
        final = self.folder / f"step-{step:06d}"
        temporary = Path(self.world.from_first(str(temporary_name(final))))
        self.folder.mkdir(parents=True, exist_ok=True)
        random = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()
        state = _state(self.model, self.optimizer)
        if self.average is not None and self.average.tensors:
            state["average"] = self.average.tensors
        with frugal_heap():
            written = self._write(state, temporary)
        index = {"step": step, "position": position, "world_size": self.world.size, "settings": self.settings}
        index["run"] = (run_state or {}) | ({"average": self.average.state()} if self.average else {})
        self._saving = self._thread.submit(self._publish, written, temporary, final, index, random)
        if self.mirror and self.world.first:
            self.mirror.copy(step, self._saving)

    def _write(self, state: dict[str, Any], folder: Path) -> Future:
        """Begin to write the state; ranks that do so and ranks that wait until it is written may meet."""
        if _own_bytes(state) < COPIED_SHARE * free_main_memory(self.world.local_size):
            begun: Any = dcp.async_save(state, checkpoint_id=folder, process_group=self._group)
            return begun
        dcp.save(state, checkpoint_id=folder, process_group=self._group, no_dist=self._group is None)
        written: Future = Future()
        written.set_result(None)
        return written

    def wait(self) -> None:
        """Until the save in work, if any, is published."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def _publish(self, written: Future, temporary: Path, final: Path, index: dict[str, Any], random: str) -> None:
        """Hash what this rank wrote; on the first rank, publish when all have done so. Nobody waits in a collective here."""
        reports = [self._hash_own(written, temporary, random)]
        if not self.world.first:
            return
        quiet = self.world.timeout.total_seconds()
        reports += [wait_for_report(temporary, rank, quiet, self._ending) for rank in range(1, self.world.size)]
        clear_reports(temporary)
        index["random"] = [report["random"] for report in reports]
        index["files"] = dict(sorted(item for report in reports for item in report["files"].items()))
        publish_json(open_store(temporary), INDEX, encode_json(index | {"checksum": checksum(index)}), "")
        try:
            if final.exists():  # one that did not match its hashes, or the run would have gone on from it
                self._delete(final)
            self._check()
            os.rename(temporary, final)
        except LeaseLost:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_folder(self.folder)
        self._passed_over = [path for path in self._passed_over if path != final]
        for old in self._passed_over:
            self._delete(old)
        self._passed_over = []
        self.prune(index["step"])
        for leftover in self.folder.glob(".step-*.tmp"):
            self._delete(leftover)

    def prune(self, step: int) -> None:
        """Leave the newest checkpoints up to `step`, and one that is being copied, on the first rank."""
        kept = {number: path for number, path in checkpoints_of(self.folder).items() if number <= step}
        in_work = self.mirror.step_in_work if self.mirror else None
        for number in [*kept][: -self.keep]:
            if number != in_work:
                self._delete(kept[number])

    def _hash_own(self, written: Future, temporary: Path, random: str) -> dict[str, Any]:
        """Random state and hashes of this rank's files, which a rank but the first leaves beside them."""
        rank = self.world.rank
        try:
            written.result()
            files = sorted(temporary.glob(f"__{rank}_*"))
            if self.world.first:
                files.append(temporary / ".metadata")
            beat = min(5.0, self.world.timeout.total_seconds() / 5)
            with signs_of_life(temporary, rank, beat), ThreadPoolExecutor(8) as pool:
                hashes = dict(zip([file.name for file in files], pool.map(_sync_and_hash, files)))
        except BaseException as error:
            if not self.world.first and temporary.exists():
                leave_report(temporary, rank, {"error": f"{type(error).__name__}: {error}"})
            raise
        report = {"random": random, "files": hashes}
        if not self.world.first:
            leave_report(temporary, rank, report)
        return report

    def _check(self) -> None:
        if self.lease:
            self.lease.check()

    def _delete(self, checkpoint: Path) -> None:
        self._check()
        shutil.rmtree(checkpoint)

    def _problem(self, checkpoint: Path, settings: str | None) -> str | None:
        """What is wrong with a checkpoint, or None. All ranks take part, and each hashes its share of the files.

        settings: that it must have, None: any.
        """
        found = self.world.from_first(read_files_of(checkpoint, settings) if self.world.first else None)
        if isinstance(found, str):
            return found
        names = sorted(found)[self.world.rank :: self.world.size]
        return self.world.first_problem(altered(checkpoint, {name: found[name] for name in names}))

    def load_newest(self) -> tuple[int, list[str]]:
        """Load the newest valid checkpoint into model and optimizer. All ranks take part.

        Returns the number of steps done (0 without a checkpoint) and what was wrong with newer ones. ValueError where
        there are checkpoints and none is valid: to begin again is the user's decision.
        """
        problems: list[str] = []
        newest_first = [*reversed(checkpoints_of(self.folder).values())] if self.world.first else None
        for checkpoint in self.world.from_first(newest_first):
            problem = self._problem(checkpoint, self.settings)
            if problem is None:
                return self._load(checkpoint), problems
            problems.append(problem)
            self._passed_over.append(checkpoint)
        if problems:
            raise ValueError(
                f"{self.folder}: no checkpoint can be used: {'; '.join(problems)}; delete the run's folder to "
                f"{f'go on from {self.mirror.url}' if self.mirror else 'start over'}"
            )
        return 0, problems

    def load_from(self, checkpoint: Path) -> int:
        """Load a checkpoint of another run, whatever its settings; the steps that it has done. ValueError if it is damaged."""
        problem = self._problem(checkpoint, None)
        if problem is not None:
            raise ValueError(f"--resume-from {problem}; choose another checkpoint")
        return self._load(checkpoint)

    def _load(self, checkpoint: Path) -> int:
        index = json.loads((checkpoint / INDEX).read_text())
        self.run_state = index.get("run", {})
        state = _state(self.model, self.optimizer)
        if self.average is not None and (tensors := self.average.tensors_to_load(self.run_state.get("average"))):
            state["average"] = tensors
        groups = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        dcp.load(state, checkpoint_id=checkpoint, process_group=self._group, no_dist=self._group is None)
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )  # fmt: skip
        for group, ours in zip(self.optimizer.param_groups, groups):
            group.update(ours)  # weight decay and the like are those that were asked for
        if self.world.rank < len(index["random"]):
            random = bytearray(base64.b64decode(index["random"][self.world.rank]))
            torch.set_rng_state(torch.frombuffer(random, dtype=torch.uint8))
        return int(index["step"])


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """The weights of LossModel's model, by the model's own names, whole on rank 0 and empty on the others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def checkpoints_of(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder by step, in order; other names, such as that of a copy, are the user's own."""
    steps = {path: path.name.removeprefix("step-") for path in folder.glob("step-*")}
    return dict(sorted((int(step), path) for path, step in steps.items() if step.isdigit()))


def _sync_and_hash(path: Path) -> str:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return sha256_file(path)
