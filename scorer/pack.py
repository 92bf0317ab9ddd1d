"""remit pack: tokenise a corpus, append EOS, cut into rows of seq_len, write a shard folder.

In: corpus files. Out: a shard folder without log-probs. Two passes of Ray tasks: one task per corpus
file tokenises it into a staging file; then the plan is frozen, and one task per part copies its rows out
of the staging files. A rerun does what is missing. Staging stands beside the output folder until the
end, so that the output folder appears with its manifest or not at all.
"""

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from scorer.chat_settings import chat_entry, chat_settings, template_bos
from scorer.cluster import cause, ray_cluster, ray_errors, require_ray
from scorer.config import PackConfig
from scorer.corpus import require_kind
from scorer.known import remember, stamps
from scorer.pack_tasks import stage_source, write_part_from_staging
from scorer.placement import wait_for_nodes
from scorer.plan import (
    packing_entry,
    plan_parts,
    reading,
    refuse_other_plan,
    say_what_changed,
    say_what_was_added,
)
from scorer.rejected import REJECTED, save_rejected
from scorer.side_tables import write_tables
from scorer.sources import Corpus, Source, find_corpus, staged_estimate
from scorer.stopping import StopGuard
from scorer.tokenizer import PackTokenizer, describe_tokenizer, load_tokenizer
from scorer.tokens.bos import bos_of_corpus, own_bos
from scorer.tokens.read import is_token_file, require_side_files
from scorer.vocabulary import Vocabulary, hashes
from shards.crash import crash_point
from shards.fingerprint import model_origin
from shards.folder import TOKEN_IDS, TOKENIZER, ShardFolder
from shards.lease import LEASE, Lease, LeaseLost
from shards.manifest import MANIFEST, PartPlan
from shards.output_folder import SHARD_FOLDERS, instead_of, require_empty, writing
from shards.side_table import FIELDS
from shards.store import Store, absolute, open_store
from shards.tokens import added_tokens, other_beginning

ORIGIN = ("model", "revision")  # what the manifest says of a tokenizer of the hub beside what it is
KEEP_STAGING_BYTES = 1 << 26

Progress = Callable[[str, int, int, int], None]
"""Called as progress(phase, done, total, tokens): bytes of the corpus files while it tokenises, tokens
while it writes parts."""


def pack(
    config: PackConfig,
    progress: Progress = lambda phase, done, total, tokens: None,
    should_stop: Callable[[], bool] = lambda: False,
    note: Callable[[str], None] = lambda line: None,
) -> ShardFolder:
    """Pack `config.corpus` into `config.out`; returns the complete folder.

    Raises ValueError with file, value and remedy for bad input; then the output folder does not exist. Raises
    Stopped where should_stop says so and what ran has ended or the grace period is over. note: told what takes long.
    """
    # Ray workers may have another working directory
    config = replace(config, out=absolute(config.out), tokenizer=str(Path(config.tokenizer).absolute()))
    parent, _, last = config.out.rstrip("/").rpartition("/")
    if parent.endswith(":/"):
        raise ValueError(f"{config.out.rstrip('/')}: is a whole bucket; name a folder in it")
    stages = f"{parent}/.{last}.staging"
    corpus = find_corpus(config.corpus, config.fields.names[0].partition(".")[0], own=(config.out, stages))
    sources = corpus.sources
    tokenizer = load_tokenizer(config.tokenizer)
    chat = chat_settings(config)
    if chat is not None and config.chat_template is not None:  # with the rows goes the template that made them
        template = chat["templates"]["default"].encode()
        tokenizer = replace(tokenizer, files=tokenizer.files | {"chat_template.jinja": template})
    begins = None if chat is None else template_bos(config, chat, tokenizer)
    description = describe_tokenizer(
        tokenizer, config.special_tokens, bos_of_corpus(config, sources, tokenizer), begins
    )
    for line in filter(None, [*tokenizer.notes, other_beginning(tokenizer.encoder, description["bos_token_id"])]):
        note(line)
    model, revision = model_origin(Path(config.tokenizer))
    origin = dict(zip(ORIGIN, (model, revision))) if revision else {}  # folders are called differently everywhere
    settings = {
        "seq_len": config.seq_len,
        "tokenizer": description,
        "text_field": config.text_field,
        "template": config.template,
        "tokens_field": config.tokens_field,
        "tokens_dtype": config.tokens_dtype,
        "on_missing_eos": config.on_missing_eos,
        "keep_fields": list(config.kept_fields),
        "bos": config.bos,
        "own_bos": own_bos(tokenizer),
        "chat": chat,
        "conversation_fields": [config.messages_field, config.tools_field],
        "packing": packing_entry(config),
        "rows_per_batch": config.rows_per_batch,
        "on_bad_document": config.on_bad_document,
        "on_bad_file": config.on_bad_file,
        # more than its fingerprint, which leaves normalisation and the splitting into words out
        "tokenizer_sha256": hashlib.sha256(tokenizer.encoder.to_str().encode()).hexdigest(),
        "unknown_id": tokenizer.unknown_id,
        "added_tokens": added_tokens(tokenizer.json),
    }
    out, staging = open_store(config.out), open_store(stages)
    if out.size(MANIFEST) is not None:
        folder = ShardFolder(out)
        refuse_other_plan(config, folder, sources, description, tokenizer, chat_entry(config, chat))
        # the same tokenizer from elsewhere goes on
        origin = {key: value for key, value in folder.manifest.tokenizer.items() if key in ORIGIN}
        folder.require_sizes()
        if not folder.missing_parts():
            if out.names(LEASE) or staging.names():  # of a driver that died when all was done
                with writing(out, note, SHARD_FOLDERS):
                    staging.remove()
            return folder
    require_empty(out, MANIFEST, "a shard folder")
    if corpus.note:
        note(corpus.note)
    for source in sources:
        if is_token_file(source) and config.kept_fields:
            raise ValueError(
                f"{source.where}: has no fields that --keep-fields could keep; leave it out, or pack it alone"
            )
    for source in sources if config.on_bad_file == "stop" else []:
        require_kind(source)
        if is_token_file(source):
            require_side_files(source)
    out.require_free(int(2 * staged_estimate(sources)), "packing this corpus")
    with writing(out, note, SHARD_FOLDERS) as lease:
        before = stamps(sources)
        try:
            staging.clean()
            stop = StopGuard(should_stop, config.grace_seconds)
            with ray_cluster(config.debug, note), ray_errors(stop.requested):
                wait_for_nodes("CPU", stop.requested, note)
                raw = tokenizer.encoder.to_str()
                vocabulary = Vocabulary(description["vocab_size"])
                staged = _stage_all(config, sources, staging, raw, settings, out, lease, progress, stop, vocabulary)
                crash_point("staging.done")
                say_what_changed(staged, note)
                say_what_was_added(staged, note)
                types = write_tables(config.kept_fields, staging, staged, out, lease)
                more = {"conversations": chat_entry(config, chat), "kept_fields": types}
                folder = _begin(config, corpus, staged, vocabulary, tokenizer, description | origin, more, out, lease)
                out.require_free(staging.used_bytes(), "writing the parts")
                _write_parts(folder, staging, staged, lease, progress, stop)
            files = folder.manifest.corpus
            remember(config.out, sources, before, [file.sha256 for file in files])
            left_out = [f"{file.path}: {file.left_out}" for file in files if file.left_out]
            if left_out:
                count = f"{len(left_out):,} of {len(sources):,} {'file' if len(sources) == 1 else 'files'}"
                note(f"left out {count} ({REJECTED} lists them), such as {left_out[0]}")
            crash_point("driver.finished")
            staging.remove()
        except LeaseLost:  # what stands there is another driver's now
            raise
        except BaseException:
            lease.check()  # LeaseLost: another driver is at work with what we would remove
            # after a failure, staging is kept for the rerun only where it saves time
            if staging.used_bytes() < KEEP_STAGING_BYTES:
                staging.remove()
            if out.size(MANIFEST) is None:
                out.delete(REJECTED)
                out.remove(TOKENIZER)
                out.remove(FIELDS)
            raise
    return folder


def _begin(
    config: PackConfig,
    corpus: Corpus,
    staged: list[dict],
    vocabulary: Vocabulary,
    tokenizer: PackTokenizer,
    description: dict[str, Any],
    more: dict[str, Any],
    out: Store,
    lease: Lease,
) -> ShardFolder:
    """Plan the parts and freeze the plan, with the tokenizer beside it, or see that it is the one which is frozen there."""
    files = tokenizer.files | {TOKEN_IDS: vocabulary.token_ids()}
    known = hashes(files)
    begun = None if out.size(MANIFEST) is None else ShardFolder(out)
    if begun:  # its other files may have changed since: they decide no id
        decisive = {name: known[name] for name in ("tokenizer.json", TOKEN_IDS)}
        known = begun.manifest.tokenizer.get("files", {}) | decisive
    tokens = {"added_tokens": vocabulary.added_tokens(), "files": known}
    manifest = replace(
        plan_parts(config, staged, description | tokens, more["conversations"]),
        passed_over=corpus.passed_over,
        reading=reading(config),
        kept_fields=more["kept_fields"],
    )
    lease.check()
    if begun is None:  # what is there may be half a tokenizer, of a run that died
        out.remove(TOKENIZER)
        for name, data in files.items():
            out.replace(f"{TOKENIZER}/{name}", data)
    else:
        # others of the folder may come and go, and a folder keeps the format that it was begun in
        kept = {name: getattr(begun.manifest, name) for name in ("passed_over", "format_version")}
        manifest = replace(manifest, **kept)
        if begun.manifest.checksum != manifest.checksum:
            raise ValueError(
                f"{out.url}: holds another pack, with other documents or counts; was it begun with another "
                f"--text-field, --on-bad-document or --on-bad-file? {instead_of(begun)}"
            )
    save_rejected(staged, out)
    crash_point("output.begun")
    lease.check()
    manifest.write(out)
    crash_point("driver.planned")
    return ShardFolder(out)


# --- first pass: one task per corpus file ---------------------------------------------------------------


def _stage_all(
    config: PackConfig,
    sources: list[Source],
    staging: Store,
    tokenizer_json: str,
    settings: dict,
    out: Store,
    lease: Lease,
    progress: Progress,
    stop: StopGuard,
    vocabulary: Vocabulary,
) -> list[dict]:
    """Tokenise every source that is not staged yet; returns their records in corpus order."""
    total_cpus = int(ray.cluster_resources().get("CPU", 1))
    workers = min(config.num_workers or total_cpus, len(sources))
    cpus = max(1, total_cpus // workers)
    task: Any = ray.remote(stage_source).options(
        num_returns="streaming",
        num_cpus=cpus,
        max_retries=2,
    )
    records: list[dict] = [{}] * len(sources)
    waiting = list(enumerate(sources))
    running: dict[Any, int] = {}
    total = sum(source.size() or 0 for source in sources)
    done: dict[int, tuple[int, int]] = {}  # bytes and tokens per source
    try:
        while waiting or running:
            while waiting and len(running) < workers and not stop.requested():
                index, source = waiting.pop(0)
                arguments = (source, index, staging, tokenizer_json, settings, cpus, out, lease.fence)
                generator = task.remote(*arguments)
                running[generator] = index
            stop.check(len(running))
            require_ray()
            ready: Any = ray.wait(list(running), num_returns=1, fetch_local=False, timeout=1)[0]
            for generator in ready:
                update: Any = ray.get(next(generator))
                index = running[generator]
                done[index] = update["bytes"], update["tokens"]
                if "record" in update:
                    records[index] = update["record"]
                    vocabulary.add(records[index])
                    del running[generator]
            bytes_done, tokens = np.sum(list(done.values()), axis=0).tolist() if done else (0, 0)
            progress("tokenise", bytes_done, total, tokens)
    except BaseException as error:
        raise cause(error) from None  # what still runs ends by itself when the lease is given back
    return records


# --- second pass: one task per part ------------------------------------------------------------------------


def _write_parts(
    folder: ShardFolder, staging: Store, staged: list[dict], lease: Lease, progress: Progress, stop: StopGuard
) -> None:
    ends = np.cumsum([record["file"]["rows"] for record in staged])
    firsts = np.cumsum([0] + [plan.rows for plan in folder.manifest.parts])
    task: Any = ray.remote(write_part_from_staging).options(max_retries=2)
    missing = set(folder.missing_parts())
    total = folder.manifest.tokens
    done = sum(plan.tokens for plan in folder.manifest.parts if plan.name not in missing)
    todo = deque((index, plan) for index, plan in enumerate(folder.manifest.parts) if plan.name in missing)
    running: dict[Any, PartPlan] = {}
    limit = 2 * int(ray.cluster_resources().get("CPU", 1))
    while todo or running:
        while todo and len(running) < limit and not stop.requested():
            index, plan = todo.popleft()
            slices, row = [], int(firsts[index])
            while row < firsts[index + 1]:
                source = int(np.searchsorted(ends, row, side="right"))
                first_of_source = int(ends[source - 1]) if source else 0
                last = min(int(ends[source]), int(firsts[index + 1]))
                slices.append((f"source-{source:05d}.arrow", row - first_of_source, last - row))
                row = last
            arguments = (str(folder.path), plan.name, staging, slices, folder.manifest.checksum, lease.fence)
            running[task.remote(*arguments)] = plan
            crash_point("driver.assigned")
        stop.check(len(running))
        require_ray()
        ready, _ = ray.wait(list(running), num_returns=1, timeout=1)
        for reference in ready:
            try:
                ray.get(reference)
            except Exception as error:
                raise cause(error) from None
            done += running.pop(reference).tokens
            crash_point("driver.committed")
            progress("write", done, total, done)
