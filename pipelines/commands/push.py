"""remit push: a shard folder or a model, with its card, to the Hugging Face hub."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.push.files import Files, model_files, shard_files, small_file
from pipelines.push.markdown import NO_LICENSE, merge
from pipelines.push.revealing import revealing, told
from pipelines.push.settings import PushConfig
from pipelines.terminal import DONE, STOPPED, ShouldStop, counted, note, progress_bar
from shards.folder import ShardFolder
from shards.manifest import MANIFEST
from shards.store import LocalStore, Store, is_remote

if TYPE_CHECKING:
    from pipelines.push.repository import Card, Repository

FOLDER_FILES = 10_000  # that the hub advises not to exceed


def run(config: PushConfig, should_stop: ShouldStop) -> int:
    shards = _shards(config)
    if shards is None:
        _model(config)
    where = f"hf://{'' if shards is None else 'datasets/'}{config.repo}"
    repository = None if config.dry_run else _repository(config, shards)  # before hours of hashing
    if shards is not None:
        files, card = _of_shards(config, shards)
    else:
        files, card = _of_model(config, _model(config))
    if files.left_out:
        note(
            f"not pushed: {', '.join(files.left_out)}; a model here is config, safetensors, tokenizer and licence files"
        )
    if found := revealing(files):
        note(told(found))
    if repository is None:
        print(card(None))
        print(f"{counted(len(files.all), 'file')}, {files.size:,} bytes; nothing was pushed to {where}")
        return DONE
    is_private = repository.make(config.public)
    card(repository.read_card())  # one that cannot be merged is told now, and not after the upload
    message = f"remit push {Path(config.folder).name}"
    if repository.begin(files, message):
        note(
            f"{repository.url}@{config.revision}: began with another shard folder of main in this place; it was taken out there"
        )
    with progress_bar(desc="push", unit="B", unit_scale=True, total=files.size) as bar:
        done = repository.push(files, card, message, bar.update, should_stop)
    if done is None:
        return STOPPED
    commit, text = done
    at = f"{where}@{commit}" + (f"/{config.path}" if config.path else "")
    print(
        f"pushed {counted(len(files.all), 'file')}, {files.size:,} bytes -> {at} ({'private' if is_private else 'public'})"
    )
    if NO_LICENSE in text:
        note("the card names no licence: fill it in on the repository's page; the next push leaves it as it is")
    return DONE


def _shards(config: PushConfig) -> ShardFolder | None:
    """The shard folder that is pushed, None for a model; ValueError where it is neither, or options are of the other."""
    if not is_remote(config.folder) and not (Path(config.folder) / MANIFEST).exists():
        if config.path:
            raise ValueError(f"--path {config.path} is given and {config.folder} is no shard folder; leave --path out")
        return None
    if config.results:
        raise ValueError(f"--results is given and {config.folder} is a shard folder, expected a model; leave it out")
    folder = ShardFolder(config.folder)
    folder.require_complete()
    for name, reference in folder.manifest.references.items():
        if reference.get("engine") == "fake":
            raise ValueError(
                f"{folder.path}: the log-probs of {name!r} are of the fake engine and mean nothing; score with a model"
            )
    return folder


def _model(config: PushConfig) -> Path:
    """The model folder that is pushed; ValueError where there is none."""
    from pipelines.models import resolve_model
    from shards.modelfolder import require_language_model

    if not Path(config.folder).is_dir():
        raise ValueError(
            f"{config.folder}: no such folder, expected a shard folder, a run whose model is to be pushed, or a model folder"
        )
    model = resolve_model("remit push", config.folder).path
    require_language_model(model)
    return model


def _repository(config: PushConfig, shards: ShardFolder | None) -> "Repository":
    """The repository, which may not exist yet; ValueError where this may not be pushed to it."""
    from huggingface_hub.utils import disable_progress_bars

    from pipelines.push.repository import Repository

    disable_progress_bars()  # ours counts all files together
    warnings.filterwarnings("ignore", message="Warnings while validating metadata in README.md")  # of a missing licence
    repository = Repository(config.repo, "model" if shards is None else "dataset", config.revision)
    repository.require(config.public)
    if shards is not None:
        repository.require_ours(small_file(shards.store, MANIFEST, config.path))
    return repository


def _of_shards(config: PushConfig, folder: ShardFolder) -> tuple[Files, "Card"]:
    from pipelines.push.shard_card import RIGHTS, metadata, text

    total = sum(folder.store.size(plan.name) or 0 for plan in folder.manifest.parts)
    with progress_bar(desc="hash", unit="B", unit_scale=True, total=total) as bar:
        files = shard_files(folder, config.path, bar.update)
    most = len(folder.manifest.parts)
    if most > FOLDER_FILES:
        note(
            f"{most:,} parts are more files than the hub advises in a folder ({FOLDER_FILES:,}); pack with a larger --tokens-per-shard"
        )
    quarantined: dict[str, int] = {}
    for plan in folder.manifest.parts:
        for name, rows in folder.record_alone(plan.name).quarantined.items():
            quarantined[name] = quarantined.get(name, 0) + len(rows)
    own = metadata(folder.manifest, config.path, config.license)
    section = text(folder, config.repo, config.path, quarantined)
    title = config.repo.rpartition("/")[2]
    return files, lambda before: merge(before, title, own, config.path or "rows", section, RIGHTS)


def _of_model(config: PushConfig, model: Path) -> tuple[Files, "Card"]:
    from pipelines.push.model_card import RIGHTS, find_run, metadata, read_evaluations, text

    made_by = find_run(model.absolute())
    evaluations = read_evaluations(config.results, model)
    store: Store = LocalStore(model)
    total = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
    with progress_bar(desc="hash", unit="B", unit_scale=True, total=total) as bar:
        files = model_files(store, bar.update)
    own = metadata(made_by[1] if made_by else None, evaluations, config.repo, config.license)
    section = text(model, made_by, evaluations)
    title = config.repo.rpartition("/")[2]
    return files, lambda before: merge(before, title, own, "model", section, RIGHTS)
