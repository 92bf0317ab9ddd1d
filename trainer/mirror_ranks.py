"""Each rank copies its share of the files of a checkpoint to the mirror (--mirror), all of which every rank sees in OUT.

The first rank leaves an order in a hidden folder of OUT, and the others leave reports there: no collective.
"""

import contextlib
import json
import shutil
import threading
from pathlib import Path

from shards.part import sha256_file
from shards.store import Store
from shards.store_errors import text_of
from shards.transfer import send
from trainer.checkpoint_files import INDEX
from trainer.distributed import World
from trainer.mirror_store import checkpoint_name
from trainer.rank_reports import leave_report, signs_of_life, wait_for_report

ORDER_SECONDS = 0.5  # between two looks of a rank for what it is to copy


class Shares:
    """The copying of checkpoints of the run in `out`, on each rank. meeting: the hidden folder; ending: set where it is to end."""

    def __init__(self, out: Path, store: Store, world: World, meeting: Path, ending: threading.Event) -> None:
        self.out, self.store, self.world, self.meeting, self.ending = out, store, world, meeting, ending
        self._orders = 0
        if not world.first:
            threading.Thread(target=self._follow, name="mirror", daemon=True).start()

    def go_on(self) -> None:
        if self.ending.is_set():
            raise RuntimeError("the run ends")

    def have_sent(self, step: int) -> None:
        """Have each rank copy its share, on the first; raises the first error once all are done with it."""
        self._orders += 1
        order = self.meeting / f"{self._orders}-{step}"
        order.mkdir(parents=True)
        quiet, task = max(60.0, self.world.timeout.total_seconds()), "copy its share; OUT has the checkpoint"
        problems: list[Exception] = []
        for rank in range(self.world.size):
            try:
                if rank == 0:
                    self._send(step)
                else:
                    wait_for_report(order, rank, quiet, self.ending, "copy", task)
            except Exception as error:
                problems.append(error)
        shutil.rmtree(order, ignore_errors=True)
        if problems:
            raise problems[0]

    def _follow(self) -> None:
        rank, beat, done = self.world.rank, min(5.0, self.world.timeout.total_seconds() / 5), 0
        while not self.ending.wait(ORDER_SECONDS):
            with contextlib.suppress(OSError):  # a folder that is not there yet, or went meanwhile
                for number, step in sorted(
                    [int(word) for word in each.name.split("-")] for each in self.meeting.iterdir()
                ):
                    if number <= done:
                        continue
                    done, order, report = number, self.meeting / f"{number}-{step}", {}
                    with signs_of_life(order, rank, beat):
                        try:
                            self._send(step)
                        except Exception as error:
                            report = {"error": text_of(error)}
                        leave_report(order, rank, report)

    def _send(self, step: int) -> None:
        name = checkpoint_name(step)
        files = json.loads((self.out / name / INDEX).read_text(encoding="utf-8"))["files"]
        for file in sorted(files)[self.world.rank :: self.world.size]:
            self.go_on()
            path = self.out / name / file
            if sha256_file(path) != files[file]:
                raise OSError(f"{path}: sha256 differs from {INDEX}")
            send(self.store, {f"{name}/{file}": path}, self.go_on)
