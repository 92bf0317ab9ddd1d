"""remit pack: tokenise a corpus into a shard folder."""

from dataclasses import replace
from time import monotonic

from pipelines.models import resolve_model
from pipelines.terminal import DONE, STOPPED, ShouldStop, counted, note, progress_bar, quiet_libraries, tokens_summary
from scorer.config import PackConfig
from scorer.sources import require_known_path
from scorer.stopping import Stopped
from shards.folder import ShardFolder


def run(config: PackConfig, should_stop: ShouldStop) -> int:
    began = monotonic()
    for word in config.corpus:
        require_known_path(word)
    tokenizer = resolve_model("--tokenizer", config.tokenizer, weights=False)
    from scorer.pack import pack  # a mistyped path is told before these seconds

    quiet_libraries()
    phase, worked = "", False
    with progress_bar(desc="tokenise", unit="B", unit_scale=True) as bar:

        def progress(now: str, done: int, total: int, tokens: int) -> None:
            nonlocal phase, worked
            worked = True
            if now != phase:
                phase = now
                bar.reset(total)
                bar.set_description(now)
                bar.unit = "B" if now == "tokenise" else " tokens"
            if now == "tokenise":  # else the bar itself counts tokens
                bar.set_postfix_str(f"{tokens / max(1e-9, monotonic() - began) / 1e6:.2f}M tokens/s", refresh=False)
            else:
                bar.set_postfix_str("", refresh=False)
            bar.update(done - bar.n)

        try:
            folder = pack(replace(config, tokenizer=str(tokenizer.path)), progress, should_stop, note)
        except Stopped:
            return STOPPED
    what = "packed" if worked else "nothing to do (remit verify checks every byte), packed before:"
    print(summary(what, folder, config.out, monotonic() - began))
    print(tokens_summary(folder.manifest))
    return DONE


def summary(what: str, folder: ShardFolder, out: str, seconds: float) -> str:
    """One line about a folder that a stage has written."""
    manifest = folder.manifest
    documents = manifest.documents
    line = f"{what} {counted(manifest.tokens, 'token')} in {counted(manifest.rows, 'row')} and {counted(len(manifest.parts), 'part')}"
    line += f"{', a selection' if manifest.selections else ''} from {counted(documents['packed'], 'document')}"
    if documents["empty"] or documents["rejected"]:
        line += f" ({documents['empty']:,} empty, {documents['rejected']:,} rejected)"
    left_out = sum(bool(file.left_out) for file in manifest.corpus)
    line += f", without {counted(left_out, 'bad file')}" if left_out else ""
    took = "" if what.startswith("nothing to do") else f" ({seconds:.0f} s)"  # it is not what the work took
    return f"{line} -> {out}{took}"
