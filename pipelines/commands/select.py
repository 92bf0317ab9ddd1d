"""remit select: keep the rows that a teacher predicts best."""

from time import monotonic

from pipelines.terminal import DONE, STOPPED, ShouldStop, note, progress_bar
from scorer.config import SelectConfig
from scorer.stopping import Stopped


def run(config: SelectConfig, should_stop: ShouldStop) -> int:
    from scorer.ranking import describe
    from scorer.select import select

    began, phase = monotonic(), ""
    with progress_bar(desc="select", unit=" tokens", unit_scale=True) as bar:

        def progress(now: str, done: int, total: int) -> None:
            nonlocal phase
            if now != phase:
                phase = now
                bar.reset(total)
                bar.set_description(now)
                bar.initial = bar.n = done
            bar.update(done - bar.n)

        try:
            chosen = select(config, progress, should_stop, note).manifest.selections[-1]
        except Stopped:
            return STOPPED
    what = "selected" if phase else "nothing to do (remit verify checks every byte), selected before:"
    print(f"{what} {describe(chosen)} -> {config.out} ({monotonic() - began:.0f} s)")
    return DONE
