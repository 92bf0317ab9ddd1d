"""Real prose and code of whatever machine runs the tests, cut to a size that two cores score in seconds.

Licence texts, READMEs of installed packages and modules of the standard library: none of it made for these tests.
"""

import importlib.metadata
import json
import sysconfig
from pathlib import Path

LICENCES = Path("/usr/share/common-licenses")
STDLIB = Path(sysconfig.get_path("stdlib"))
DOCUMENTS = {
    "prose": [
        ("licence Apache-2.0", 2400),
        ("readme 0", 1200),
        ("licence GPL-2", 1700),
        ("readme 1", 700),
        ("readme 2", 200),
    ],
    "code": [
        ("json/decoder.py", 1800),
        ("bisect.py", 500),
        ("textwrap.py", 1700),
        ("this.py", 700),
        ("keyword.py", 200),
    ],
}  # characters of each at most


def documents() -> dict[str, list[str]]:
    """The texts of each corpus file in their order."""
    readmes = _readmes()
    texts = {}
    for file, wanted in DOCUMENTS.items():
        texts[file] = []
        for name, characters in wanted:
            kind, _, rest = name.partition(" ")
            text = readmes[int(rest)] if kind == "readme" else _licence(rest) if kind == "licence" else _module(name)
            texts[file].append(text[:characters])
    return texts


def write(folder: Path) -> dict[str, list[str]]:
    """FOLDER/prose.jsonl and FOLDER/code.jsonl; the texts as in `documents`."""
    texts = documents()
    folder.mkdir(parents=True, exist_ok=True)
    for file, lines in texts.items():
        (folder / f"{file}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    return texts


def _module(name: str) -> str:
    return (STDLIB / name).read_text(encoding="utf-8")


def _licence(name: str) -> str:
    """A licence text of the system, or where that keeps none, of an installed package."""
    if (LICENCES / name).exists():
        return (LICENCES / name).read_text(encoding="utf-8")
    package = {"Apache-2.0": "transformers", "GPL-2": "numpy"}[name]
    files = importlib.metadata.files(package) or []
    (first, *_) = [file for file in files if "LICENSE" in file.name and ".dist-info" in str(file)]
    return Path(str(first.locate())).read_text(encoding="utf-8")


def _readmes() -> list[str]:
    """READMEs of the packages that remit depends on, those with the most characters beyond ASCII first."""
    texts = []
    for name in ("rich", "tokenizers", "numpy", "tyro", "safetensors", "tqdm", "datasets", "tenacity"):
        _, _, description = (importlib.metadata.distribution(name).read_text("METADATA") or "").partition("\n\n")
        start = next((place for place, character in enumerate(description) if ord(character) > 127), 0)
        texts.append(description[max(0, start - 40) :])  # where they begin, so that the cut text has them
    return sorted(texts, key=lambda text: -sum(ord(character) > 127 for character in text[:2400]))
