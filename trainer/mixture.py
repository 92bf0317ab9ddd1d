"""What a mixture is asked to be: folders with a name and a weight each, and stages that change the weights.

In: --mix FILE, or --shards with one folder or several PATH=WEIGHT. Out: a Mixture, or a ValueError in one line. The file:

    sources:
      code: {shards: scored-code, weight: 0.47}
      math: {shards: scored-math, weight: 0.21, max_epochs: 4}
    stages:                                     # optional
      - {after_step: 9000, weights: {code: 0.3, math: 0.7}}
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from shards.store import is_remote, open_store

EXAMPLE = "for instance `code: {shards: scored-code, weight: 0.47}`"


@dataclass(frozen=True)
class Source:
    """A shard folder of a mixture. weight: of its tokens among those of all sources; max_epochs: None for no limit."""

    name: str
    shards: str
    weight: float
    max_epochs: float | None = None


@dataclass(frozen=True)
class Weights:
    """Weights by source name, from after this many steps on."""

    after_step: int
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Mixture:
    """stages: ascending, the first after step 0; weights of a stage need not sum to anything."""

    sources: tuple[Source, ...]
    stages: tuple[Weights, ...]

    @property
    def is_mixed(self) -> bool:
        return len(self.sources) > 1

    @property
    def folders(self) -> list[str]:
        return [source.shards for source in self.sources]


def given_mixture(shards: Sequence[str], mix: Path | None) -> Mixture:
    """The mixture that --shards and --mix describe together."""
    if mix is not None and shards:
        raise ValueError(f"--mix {mix} and --shards {' '.join(shards)} are both given; leave one of them out")
    if mix is not None:
        return read_mix(mix)
    if not shards:
        raise ValueError(
            "neither --shards nor --mix is given, expected a shard folder, or a file that describes a mixture"
        )
    if len(shards) == 1 and ("=" not in shards[0] or (not is_remote(shards[0]) and Path(shards[0]).exists())):
        return _checked("--shards", (Source(_name_of(shards[0]), shards[0], 1.0),), [])
    sources = list[Source]()
    for text in shards:
        path, equals, weight = text.rpartition("=")
        if not equals or not path:
            raise ValueError(f"--shards {text}: has no weight, expected PATH=WEIGHT for each of several folders")
        source = Source(_name_of(path), path, _number(f"--shards {text}: weight", _as_number(weight)))
        if any(source.name == other.name for other in sources):
            raise ValueError(
                f"--shards {text}: another folder is called {source.name!r} too; name them in a file, --mix FILE"
            )
        sources.append(source)
    return _checked("--shards", tuple(sources), [])


def _name_of(folder: str) -> str:
    return PurePosixPath(folder if is_remote(folder) else Path(folder).absolute()).name or folder


def _as_number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


class _Loader(yaml.SafeLoader):
    """YAML without the last one of equal keys winning in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_mix(path: Path) -> Mixture:
    """The mixture of a file; relative folders are looked for beside the file, then where the command runs."""
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"--mix {path}: cannot be read ({' '.join(str(error).split())})") from None
    where = f"--mix {path}"
    value = _keys(where, value, ("sources", "stages"), "sources: and, where weights change, stages:")
    entries = _mapping(f"{where}: sources", value.get("sources"), f"a mapping of names to folders, {EXAMPLE}")
    sources = tuple(_source(f"{where}: sources.{name}", name, entry, path) for name, entry in entries.items())
    stages = value.get("stages") or []
    if not isinstance(stages, list):
        raise ValueError(f"{where}: stages is {_short(stages)}, expected a list of {{after_step: N, weights: {{...}}}}")
    names = [source.name for source in sources]
    later = [_stage(f"{where}: stages[{index}]", entry, names) for index, entry in enumerate(stages)]
    for before, stage in zip([0, *(stage.after_step for stage in later)], later):
        if stage.after_step <= before:
            raise ValueError(
                f"{where}: a stage begins after step {stage.after_step}, expected more than {before}, in order"
            )
    return _checked(where, sources, later)


def _source(where: str, name: Any, entry: Any, path: Path) -> Source:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where}: is named {name!r}, expected a word; put it in quotes")
    entry = _keys(where, entry, ("shards", "weight", "max_epochs"), EXAMPLE)
    folder = entry.get("shards")
    if not isinstance(folder, str) or not folder:
        raise ValueError(f"{where}.shards: is {_short(folder)}, expected a shard folder, {EXAMPLE}")
    if not is_remote(folder) and not Path(folder).is_absolute():
        beside = path.absolute().parent / folder
        folder = str(beside) if beside.exists() or not Path(folder).exists() else folder
    if "weight" not in entry:
        raise ValueError(f"{where}: has no weight, expected its share of the tokens, {EXAMPLE}")
    most = entry.get("max_epochs")
    if most is not None:
        most = _number(f"{where}.max_epochs", most, lambda number: number > 0, "a number above 0")
    return Source(name, folder, _number(f"{where}.weight", entry["weight"]), most)


def _stage(where: str, entry: Any, names: list[str]) -> Weights:
    entry = _keys(where, entry, ("after_step", "weights"), "after_step: and weights:")
    step = entry.get("after_step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(f"{where}.after_step: is {_short(step)}, expected the number of steps before this stage")
    weights = _keys(f"{where}.weights", entry.get("weights"), names, "a weight for each source")
    missing = [name for name in names if name not in weights]
    if missing:
        raise ValueError(f"{where}.weights: has none for {missing[0]}, expected one for each source; 0 leaves it out")
    return Weights(step, {name: _number(f"{where}.weights.{name}", weights[name]) for name in names})


def _checked(where: str, sources: tuple[Source, ...], later: list[Weights]) -> Mixture:
    stages = [Weights(0, {source.name: source.weight for source in sources}), *later]
    for stage in stages:
        if not sum(stage.weights.values()) > 0:
            raise ValueError(f"{where}: all weights after step {stage.after_step} are 0, expected some above 0")
    for source in sources:
        if not any(stage.weights[source.name] for stage in stages):
            raise ValueError(f"{where}: {source.name} never has a weight above 0; leave it out")
    return Mixture(sources, tuple(stages))


def _mapping(where: str, value: Any, expected: str) -> dict[Any, Any]:
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{where}: is {_short(value)}, expected {expected}")
    return value


def _keys(where: str, value: Any, known: Sequence[str], expected: str) -> dict[str, Any]:
    for key in _mapping(where, value, expected):
        if key not in known:
            raise ValueError(f"{where}: {key!r} is not known, expected one of {', '.join(known)}")
    return value


def _number(
    where: str,
    value: Any,
    holds: Callable[[float], bool] = lambda number: number >= 0,
    expected: str = "a number of 0 or more",
) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not holds(value):
        raise ValueError(f"{where}: is {_short(value)}, expected {expected}")
    return float(value)


def _short(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def require_folders(mixture: Mixture) -> None:
    """ValueError where two sources are one folder."""
    seen: dict[str, str] = {}
    for source in mixture.sources:
        path = open_store(source.shards)
        key = str(path.local.resolve()) if path.local else path.url
        if key in seen:
            raise ValueError(f"{source.name} and {seen[key]} are one folder, {source.shards}; give it once")
        seen[key] = source.name
