"""The tokenizer that packs a corpus: what stands in tokenizer.json, and nothing else, decides the ids.

transformers builds some tokenizer classes anew from the vocabulary and leaves the file's normaliser, pre-tokenizer or
decoder out: a byte-level tokenizer.json whose config names a Llama class loses every space. So the file is loaded by the
`tokenizers` library. transformers is asked which tokens end and begin a text, and for folders without the file.
"""

import json
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from shards.fingerprint import tokenizer_fingerprint
from shards.tokens import FAITHFUL, differing_components, faithful_config, own_prefix, role_of

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
COPIED = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")


@dataclass
class PackTokenizer:
    """A tokenizer as its file has it. prefix: ids that its own call puts in front of a text.

    files: what the shard folder keeps of it, by name. notes: what a user should know.
    """

    encoder: Tokenizer
    eos_token: str
    eos_token_id: int
    bos_token: str | None
    bos_token_id: int | None
    prefix: list[int]
    files: dict[str, bytes]
    notes: list[str] = field(default_factory=list)

    @property
    def json(self) -> dict[str, Any]:
        """Parsed tokenizer.json, defaults spelled out."""
        return json.loads(self.encoder.to_str())

    @property
    def beginning_id(self) -> int | None:
        """Id that documents begin with if they begin with any: what its own call puts there, else its BOS."""
        return self.prefix[0] if len(self.prefix) == 1 else self.bos_token_id

    @property
    def unknown_id(self) -> int | None:
        """Id that stands for text which the tokenizer cannot spell; None where it has none."""
        model = self.json["model"]
        if model.get("type") == "Unigram":
            return model.get("unk_id")
        unknown = model.get("unk_token")
        return None if unknown is None else self.encoder.token_to_id(unknown)


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder carries a tokenizer."""
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def canonical(tokenizer_json: dict[str, Any]) -> dict[str, Any]:
    """A parsed tokenizer.json as the `tokenizers` library writes it, defaults spelled out."""
    return json.loads(Tokenizer.from_str(json.dumps(tokenizer_json)).to_str())


def tokenizer_json(folder: Path | str) -> dict[str, Any]:
    """Parsed tokenizer.json of a model folder, defaults spelled out; ValueError where there is none that can be read."""
    return json.loads(load_encoder(folder).to_str())


@lru_cache(maxsize=4)
def load_tokenizer(folder: str) -> PackTokenizer:
    """The tokenizer of a folder; ValueError where it cannot be loaded, or has no end-of-sequence token."""
    path = Path(folder)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    encoder, theirs, failure = _encoder(path)
    if theirs is None:
        theirs, failure = transformers_tokenizer(path)
    eos_token, bos_token = (_role(path, encoder, role, theirs) for role in ("eos_token", "bos_token"))
    if eos_token is None:
        raise ValueError(
            f"{folder}: its tokenizer has no EOS token, which ends every document; set eos_token in its "
            "tokenizer_config.json"
        )
    _add(encoder, eos_token)
    eos_token_id = encoder.get_vocab(with_added_tokens=True)[eos_token]
    bos_token_id = None if bos_token is None else encoder.token_to_id(bos_token)
    tokenizer = PackTokenizer(encoder, eos_token, eos_token_id, bos_token, bos_token_id, own_prefix(encoder), {})
    tokenizer.files = _kept_files(path, encoder)
    tokenizer.notes = _notes(path, tokenizer, theirs, failure)
    return tokenizer


def describe_tokenizer(
    tokenizer: PackTokenizer, special_tokens: str, bos: str, begins: bool | None = None
) -> dict[str, Any]:
    """What the manifest records of the tokenizer before a document is read. bos: auto, always or never; begins: whether
    documents begin with BOS under auto, None where the tokenizer's own call decides."""
    bos_token_id = choose_bos(tokenizer, bos, begins)
    return {
        "fingerprint": tokenizer_fingerprint(tokenizer.json),
        "eos_token": tokenizer.eos_token,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token": None if bos_token_id is None else tokenizer.encoder.id_to_token(bos_token_id),
        "bos_token_id": bos_token_id,
        "vocab_size": max(tokenizer.encoder.get_vocab(with_added_tokens=True).values()) + 1,
        "special_tokens": special_tokens,
    }


def choose_bos(tokenizer: PackTokenizer, bos: str, begins: bool | None = None) -> int | None:
    """Id with which each document piece of a row begins, or None. auto: where the tokenizer's own call begins so, or as
    `begins` says."""
    if bos == "never" or (bos == "auto" and begins is False):
        return None
    if bos == "auto" and begins:
        return tokenizer.beginning_id
    if len(tokenizer.prefix) == 1 and (bos == "auto" or tokenizer.bos_token_id is None):
        return tokenizer.prefix[0]
    if bos == "always":
        if tokenizer.bos_token_id is None:
            raise ValueError(
                "--bos always: the tokenizer names no BOS token that it has; set bos_token in its tokenizer_config.json"
            )
        return tokenizer.bos_token_id
    return None


def load_encoder(folder: Path | str) -> Tokenizer:
    """The encoder of a model folder, as its tokenizer.json has it; ValueError where it cannot be loaded."""
    encoder = _encoder(Path(folder))[0]
    eos_token = role_of(Path(folder), "eos_token")
    if eos_token is not None:
        _add(encoder, eos_token)
    return encoder


def _add(encoder: Tokenizer, token: str) -> None:
    """Give a token that only the config knows the next id, as transformers does."""
    if encoder.token_to_id(token) is None:
        encoder.add_special_tokens([AddedToken(token, special=True, normalized=False)])


def _encoder(path: Path) -> tuple[Tokenizer, Any, str]:
    """The encoder of a folder; where there is no tokenizer.json, the transformers tokenizer whose it is too."""
    if not has_tokenizer(path):
        raise ValueError(f"{path}: has no tokenizer; expected a folder with a tokenizer.json")
    if (path / "tokenizer.json").exists():
        try:
            encoder = Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:
            raise ValueError(f"{path}: its tokenizer cannot be loaded ({str(error).splitlines()[0]})") from error
        encoder.no_truncation()  # a tokenizer.json may carry both, and documents must stay whole
        encoder.no_padding()
        return encoder, None, ""
    theirs, failure = transformers_tokenizer(path)
    if theirs is None:
        raise ValueError(f"{path}: its tokenizer cannot be loaded ({failure})")
    if not theirs.is_fast:
        raise ValueError(f"{path}: its tokenizer has no fast version (tokenizer.json), which packing needs; convert it")
    return Tokenizer.from_str(theirs.backend_tokenizer.to_str()), theirs, ""


def transformers_tokenizer(path: Path) -> tuple[Any, str]:
    """What AutoTokenizer makes of a folder, or why it cannot."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True), ""
    except Exception as error:
        return None, (str(error).splitlines() or [type(error).__name__])[0]


def _config(path: Path) -> dict[str, Any]:
    file = path / "tokenizer_config.json"
    value = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return value if isinstance(value, dict) else {}


def _role(path: Path, encoder: Tokenizer, role: str, theirs: Any) -> str | None:
    """The token that has a role: as the folder's files name it, else as the class does if the file has such a token."""
    named = role_of(path, role)
    if named is not None:
        return named
    default = getattr(theirs, role, None)
    return None if default is None or encoder.token_to_id(str(default)) is None else str(default)


def _components_elsewhere(theirs: Any, encoder: Tokenizer) -> list[str]:
    if theirs is None or not theirs.is_fast:
        return []
    return differing_components(json.loads(theirs.backend_tokenizer.to_str()), json.loads(encoder.to_str()))


def _kept_files(path: Path, encoder: Tokenizer) -> dict[str, bytes]:
    """Files of the folder's copy, from which transformers makes the tokenizer of the file and no other."""
    files = {name: (path / name).read_bytes() for name in COPIED if (path / name).is_file()}
    original, ours = path / "tokenizer.json", json.loads(encoder.to_str())
    raw = json.loads(original.read_bytes()) if original.exists() else None
    same = raw is not None and json.loads(Tokenizer.from_file(str(original)).to_str()) == ours
    # the library may give an added token another id than the file says
    same = same and tokenizer_fingerprint(raw or {}) == tokenizer_fingerprint(ours)
    files["tokenizer.json"] = original.read_bytes() if same else encoder.to_str(pretty=True).encode()
    faithful = files | {"tokenizer_config.json": faithful_config(_config(path), FAITHFUL[0])}
    if "auto_map" in _config(path) or (not _gives(files, encoder) and _gives(faithful, encoder)):
        return faithful
    return files


def _gives(files: dict[str, bytes], encoder: Tokenizer) -> bool:
    """Whether transformers makes this encoder of a folder's files."""
    with TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        theirs, _ = transformers_tokenizer(Path(folder))
    return theirs is not None and not _components_elsewhere(theirs, encoder)


def _notes(path: Path, tokenizer: PackTokenizer, theirs: Any, failure: str) -> list[str]:
    notes = []
    name = _config(path).get("tokenizer_class", "the class")
    if theirs is None:
        notes.append(f"{path}: transformers cannot load the tokenizer ({failure}); tokenizer.json is used as it is")
    elif found := _components_elsewhere(theirs, tokenizer.encoder):
        notes.append(
            f"{path}: transformers would put others in the place of the {', '.join(found)} of tokenizer.json, by the class "
            f"{type(theirs).__name__} (tokenizer_config.json says {name}); the ids are those of the file"
        )
    asked = _config(path).get("add_bos_token")
    if asked is True and not tokenizer.prefix:
        notes.append(
            f"{path}: tokenizer_config.json says add_bos_token true, but tokenizer.json adds none, and the file counts; "
            "--bos always puts it in front of documents"
        )
    if len(tokenizer.prefix) > 1:
        notes.append(f"{path}: its own call puts {len(tokenizer.prefix)} tokens in front of a text; --bos can put one")
    return notes
