"""Turn a --model or --tokenizer option into a local folder: a path as it is, NAME or NAME@REVISION through the hub's
cache."""

import contextlib
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from shards.fingerprint import RUN, model_origin

PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
EXPECTED = "expected a Hugging Face model folder, or NAME or NAME@REVISION of the hub"
# what git allows in no branch or tag
_NO_REVISION = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[-/]|[/.]$|^$")


@dataclass(frozen=True)
class LocalModel:
    """path: folder on this machine; name: hub id or folder name; revision: commit of the hub, else None."""

    path: Path
    name: str
    revision: str | None


def resolve_model(option: str, model: str, weights: bool = True) -> LocalModel:
    """Folder for `model`; ValueError where it is neither a folder nor an id that the hub answers for.

    model: a folder, or NAME[@REVISION] of the hub, where REVISION is a branch (with slashes or without), a tag or a
    commit. option: its name on the command line, for the message. weights: False fetches only config and tokenizer.
    Python files and pickled weights are never fetched.
    """
    path = Path(model)
    if path.is_dir() and (path / RUN).exists() and not (path / "config.json").exists():
        if not (path / "model").is_dir():
            raise ValueError(
                f"{option} {model}: is a run that has not finished, so it has no model yet; finish it first"
            )
        path = path / "model"  # of a run: what it made
    run = next((folder for folder in path.absolute().parents if (folder / RUN).exists()), None)
    if path.is_dir() and run is not None and not (path / "config.json").exists():
        raise ValueError(
            f"{option} {model}: holds no model; those of this run are {run / 'model'} and {run / 'exports'}/*"
        )
    if path.is_dir():
        return LocalModel(path, *model_origin(path))
    if path.suffix.lower() == ".gguf" and path.exists():
        raise ValueError(
            f"{option} {model}: a GGUF file, which is not read, expected a Hugging Face model folder; load it in transformers "
            "(gguf_file=) and write the folder with save_pretrained, or give the one that it was made from"
        )
    if path.exists():
        raise ValueError(f"{option} {model}: is a file, {EXPECTED}")
    name, at, revision = model.partition("@")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        remedy = f"the folder {name} has no revisions, leave @{revision} out" if Path(name).is_dir() else EXPECTED
        raise ValueError(f"{option} {model}: no such folder; {remedy}")
    if at and _NO_REVISION.search(revision):
        raise ValueError(
            f"{option} {model}: its revision is {revision!r}, expected a branch, a tag or a commit, for instance {name}@main"
        )
    local = _fetch(option, model, name, revision or None, weights)
    return LocalModel(local, name, local.name)


def _fetch(option: str, model: str, name: str, revision: str | None, weights: bool) -> Path:
    """The snapshot of a commit in the hub's cache, fetched as far as it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    patterns = [pattern for pattern in PATTERNS if weights or pattern != "*.safetensors"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except RevisionNotFoundError:
        near = _near(name, revision or "main")
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ValueError(
            f"{option} {model}: {name} has no revision {revision or 'main'!r} on the Hugging Face hub, expected a branch, a "
            f"tag or a whole commit of it{hint}"
        ) from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        what = f"neither a folder nor a model that the Hugging Face hub answers for ({reason})"
        if revision is not None:
            what = f"no such folder, and the Hugging Face hub does not answer for revision {revision!r} of {name} ({reason})"
        raise ValueError(f"{option} {model}: {what}") from None


def _near(name: str, revision: str) -> list[str]:
    """The branches and tags of a model that are spelled most like `revision`."""
    from huggingface_hub import HfApi

    with contextlib.suppress(Exception):
        refs = HfApi().list_repo_refs(name)
        return get_close_matches(revision, [ref.name for ref in [*refs.branches, *refs.tags]], 3)
    return []
