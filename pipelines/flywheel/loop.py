"""The loop as an ordered list of stages: pack; for each round score, train, post-train; evaluate.

Round 0 trains the base with next-token prediction. Round k scores the packed corpus with the post-trained model of the
round before, and trains the original base, not that of the round before, with ReMiT.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipelines.evaluation.task_folder import task_folder_fingerprint
from pipelines.flywheel.check_model import check_model
from pipelines.flywheel.config import FlywheelConfig, PostTrain
from pipelines.flywheel.sections import SECTIONS, is_unkeyed, without_objective, words
from pipelines.flywheel.stages import At, Given, Stage, Word, digest_of, files_of, given, identity
from pipelines.models import resolve_model
from pipelines.posttrain.rewards import reward_fingerprint, reward_source
from pipelines.terminal import BadUsage
from scorer.formats import text_of_path
from scorer.hf_datasets import HUB
from scorer.known import hashes_now, remembered
from scorer.sources import Source, list_word
from shards.modelfolder import max_positions, read_config, require_base, require_language_model, require_one_scaling
from shards.store import is_remote
from shards.tokens import disagreement, ordinary_ids

REFERENCE = "rl"  # name of the column that every round scores
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class Round:
    """The stages of one round that make models. posttrained: the last of post-training, or the mid-trained one."""

    number: int
    midtrained: Stage
    posttrained: Stage
    evaluations: dict[str, Stage]
    """Of `midtrained` and `posttrained`, where they are evaluated."""


@dataclass(frozen=True)
class Loop:
    """All stages in the order in which one driver would run them, and the rounds that they belong to."""

    stages: list[Stage]
    rounds: list[Round]


def make_loop(config: FlywheelConfig) -> Loop:
    """Stages of the loop. Fetches models that are hub ids; BadUsage for models and files that are not there."""
    return _Builder(config).build()


class _Builder:
    def __init__(self, config: FlywheelConfig) -> None:
        self.config = config
        self.stages: list[Stage] = []
        self.base = local_model("base", config.base)
        tokenizer = config.tokenizer
        self.tokenizer = self.base if tokenizer is None else local_model("tokenizer", tokenizer, weights=False)
        if not (self.tokenizer / "tokenizer.json").is_file():
            raise BadUsage(
                f"{'base' if tokenizer is None else 'tokenizer'} {tokenizer or config.base}: has no tokenizer.json, "
                "expected a folder with a fast tokenizer; name one as tokenizer"
            )
        self.reference = None if config.reference is None else local_model("reference", config.reference)
        if config.out.exists() and not config.out.is_dir():
            raise BadUsage(f"out {config.out}: is a file, expected a folder, or a path where none is yet")
        for key, model in (("base", self.base), ("reference", self.reference)):
            if model is not None:
                self.require_fit(key, model)

    def require_fit(self, key: str, model: Path) -> None:
        """BadUsage where training or scoring would refuse this model, after hours of packing."""
        try:
            (require_base if key == "base" else require_language_model)(model)
            if key == "base":
                from trainer.experts import check_experts

                check_experts(model, self.config.train.get("router_aux_loss"))
            values = read_config(model)
            require_one_scaling(values, self.config.seq_len, str(model))
        except ValueError as error:
            raise BadUsage(f"{key} {error}") from None
        positions = max_positions(values)
        if positions is not None and self.config.seq_len > positions:
            raise BadUsage(
                f"seq_len is {self.config.seq_len}, expected at most {positions}, the max_position_embeddings of {key} {model}"
            )
        if model != self.tokenizer and (model / "tokenizer.json").is_file():
            from scorer.tokenizer import tokenizer_json  # transformers, which most loops need not load

            packs, its = tokenizer_json(self.tokenizer), tokenizer_json(model)
            # which added tokens the rows will have is known when they are packed
            reason = disagreement(packs, its, ordinary_ids(packs, its), {})
            if reason:
                raise BadUsage(
                    f"{key} {model}: its tokenizer is not that of {self.tokenizer}, which packs: {reason}; expected the "
                    "same in base, reference and tokenizer"
                )

    def build(self) -> Loop:
        config = self.config
        self.require_packages()
        packed = self.pack("pack", config.corpus)
        heldout = self.pack("pack-heldout", config.heldout) if config.heldout else None
        scorer: Stage | Given | None = None if self.reference is None else self.given_model(self.reference)
        rounds = []
        for number in range(0 if scorer is None else 1, config.rounds + 1):
            name = f"round-{number}"
            shards = packed if scorer is None else self.score(f"{name}/score", packed, scorer)
            midtrained = self.train(f"{name}/train", number, shards, heldout)
            model = midtrained
            for entry in config.posttrain:
                model = self.post_train(f"{name}/{entry.name}", number, entry, model)
            evaluations: dict[str, Stage] = {}
            if config.evaluate is not None:
                evaluations["midtrained"] = self.evaluate(f"{name}/evaluate-midtrained", midtrained)
                if config.posttrain:
                    evaluations["posttrained"] = self.evaluate(f"{name}/evaluate-posttrained", model)
            rounds.append(Round(number, midtrained, model, evaluations))
            scorer = model
        return Loop(self.stages, rounds)

    def require_packages(self) -> None:
        """ValueError where a stage would find out after days that something is not installed here."""
        needed = {entry.kind: ("trl", "flywheel") for entry in self.config.posttrain if entry.kind != "command"}
        if self.config.evaluate is not None:
            needed["evaluate"] = ("lm_eval", "eval")
        for section, (package, extra) in needed.items():
            if section not in self.config.launch and find_spec(package) is None:
                raise ValueError(
                    f"{section} needs {package}, which is not installed; in your checkout of remit: pip install '.[{extra}]'"
                )

    def add(
        self, section: str, name: str, command: tuple[Word, ...], inputs: dict[str, Stage | Given], options: Mapping[str, Any],
        more: tuple[Word, ...] = (), **settings: Any,
    ) -> Stage:  # fmt: skip
        """A stage that one of this project's own commands runs; more: words that are not in its key."""
        known = SECTIONS[section]
        fast = {key: value for key, value in options.items() if is_unkeyed(section, key, options)}
        for key in known.files:
            if options.get(key) is not None:
                inputs.setdefault(key, given(options[key]))
                command += (f"--{key.replace('_', '-')}", At(key))
        rest = {key: value for key, value in options.items() if key not in (*fast, *known.files)}
        launcher = self.config.launch.get(section, (sys.executable, "-m"))
        self.stages.append(
            Stage(
                name,
                (*known.command, *command, *words(rest)),
                inputs,
                (*more, *words(fast)),
                launcher,
                resumes=True,
                **settings,
            )
        )
        return self.stages[-1]

    def given_model(self, folder: Path) -> Given:
        name = f"{self.config.out.absolute()}#{folder}"
        return Given(
            str(folder), lambda: known_identity(name, [str(file) for file in files_of(folder, all_files=True).values()])
        )

    def pack(self, name: str, corpus: tuple[str, ...]) -> Stage:
        key = "heldout" if "heldout" in name else "corpus"
        there = corpus_inputs(key, corpus, self.config)
        elsewhere = [entry for entry in corpus if entry not in there]
        inputs: dict[str, Stage | Given] = {f"{key}/{number}": source for number, source in enumerate(there.values())}
        for file in TOKENIZER_FILES:
            if (self.tokenizer / file).is_file():
                inputs[f"tokenizer/{file}"] = given(self.tokenizer / file)
        # what is not on this machine, URLs and names of datasets, enters the key by name
        settings = {"elsewhere": elsewhere, "seq_len": self.config.seq_len}
        more = ("--corpus", *corpus, "--tokenizer", str(self.tokenizer), "--seq-len", str(self.config.seq_len))
        return self.add("pack", name, ("--out", At("out")), inputs, self.config.pack, more, settings=settings)

    def score(self, name: str, packed: Stage, model: Stage | Given) -> Stage:
        line = ("--shards", At("shards"), "--model", At("model"), "--out", At("out"), "--name", REFERENCE)
        return self.add("score", name, line, {"shards": packed, "model": model}, self.config.score)

    def train(self, name: str, number: int, shards: Stage, heldout: Stage | None) -> Stage:
        inputs: dict[str, Stage | Given] = {"shards": shards, "model": self.given_model(self.base)}
        options = self.config.train
        objective: tuple[Word, ...] = ("--objective", "ntp")
        if number == 0:
            context = self.config.score.get("context", "packed")  # that of the rounds that it is compared with
            options = {"context": context, **without_objective(options)}
        else:
            objective = ("--reference", REFERENCE, *(() if "objective" in options else ("--objective", "remit")))
        line = (
            *("--shards", At("shards"), "--model", At("model"), "--out", At("out"), *objective),
            *("--seed", str(self.config.seed)),
        )
        if heldout is not None:
            inputs["eval_shards"] = heldout
            line = (*line, "--eval-shards", At("eval_shards"))
        return self.add("train", name, line, inputs, options, result="model", seed=self.config.seed)

    def post_train(self, name: str, number: int, entry: PostTrain, model: Stage) -> Stage:
        inputs: dict[str, Stage | Given] = {"model": model}
        for index, path in enumerate(entry.inputs):
            inputs[f"input/{index}"] = given(path)
        if entry.kind == "command":
            return self.own_command(name, number, entry, inputs)
        line = ("--model", At("model"), "--out", At("out"), "--seed", str(self.config.seed))
        reward = str(entry.options.get("reward", "answer"))
        source = reward_source(reward) if entry.kind == "rl" else None
        if source is not None:
            inputs["reward"] = Given(str(source), lambda: reward_fingerprint(reward) or "")
        settings: dict[str, Any] = {"result": "model", "seed": self.config.seed, "check": check_model}
        return self.add(entry.kind, name, line, inputs, entry.options, **settings)

    def own_command(self, name: str, number: int, entry: PostTrain, inputs: dict[str, Stage | Given]) -> Stage:
        """The contract of a command of the user's own: where it reads and writes is in its environment."""
        for place, word in enumerate(entry.command):
            path = word if Path(word).is_file() else word.partition("=")[2]
            # the program itself is looked for in PATH unless it is a path
            if (place > 0 or "/" in word) and path and Path(path).is_file():
                inputs[f"word/{place}"] = given(path)
        environment: dict[str, Word] = {
            "REMIT_MODEL": At("model"),
            "REMIT_OUTPUT": At("out"),
            "REMIT_STATE": At("state"),
            "REMIT_SEED": str(self.config.seed),
            "REMIT_ROUND": str(number),
            "REMIT_TOKENIZER": str(self.tokenizer),
        }
        stage = Stage(
            name, entry.command, inputs, environment=environment, settings={"round": number}, seed=self.config.seed,
            check=check_model,
        )  # fmt: skip
        self.stages.append(stage)
        return stage

    def evaluate(self, name: str, model: Stage) -> Stage:
        assert self.config.evaluate is not None
        inputs: dict[str, Stage | Given] = {"model": model}
        tasks = self.config.evaluate.get("task_dir")
        if tasks is not None:
            inputs["task_dir"] = Given(str(Path(tasks).absolute()), lambda: task_folder_fingerprint(Path(tasks)))
        return self.add("evaluate", name, ("--model", At("model"), "--out", At("out")), inputs, self.config.evaluate)


def local_model(key: str, name: str, weights: bool = True) -> Path:
    """Folder of a model; a hub id is fetched into the hub's cache."""
    try:
        return resolve_model(key, name, weights).path.absolute()
    except ValueError as error:
        raise BadUsage(str(error)) from None


def corpus_inputs(key: str, corpus: tuple[str, ...], config: FlywheelConfig) -> dict[str, Given]:
    """What stands on this machine of a corpus, by its word, which is judged as remit pack judges it; BadUsage where it refuses it."""
    found: dict[str, Given] = {}
    own = {os.path.realpath(config.out)}  # which a folder of the corpus may hold
    for word in corpus:
        if is_remote(word):
            continue
        try:
            listing = list_word(word, str(config.pack.get("text_field", "text")), own)
        except ValueError as error:
            raise BadUsage(f"{key} {error}") from None
        folder = word.partition(":")[0]
        if listing is not None:
            found[word] = Given(word, partial(known_identity, f"{config.out.absolute()}#{key} {word}", listing.files))
        elif not word.startswith(HUB) and Path(folder).is_dir():  # which `datasets` opens
            found[word] = Given(word, partial(folder_identity, word))
    return found


def known_identity(name: str, files: list[str]) -> str:
    """sha256 over the names and contents of files, which are read again where they were written since.

    name: under which their contents are remembered, in the user's cache.
    """
    sources = [Source(text_of_path(file), file) for file in files]
    shared = os.path.dirname(files[0]) if len(files) == 1 else os.path.commonpath(files)
    hashes = hashes_now(name, sources, remembered(name, sources))
    return digest_of({os.path.relpath(file, shared): str(value) for file, value in zip(files, hashes)})


def folder_identity(word: str) -> str:
    """Of FOLDER:[CONFIG][:SPLIT], which `datasets` opens."""
    folder, _, rest = word.partition(":")
    return digest_of({rest: identity(Path(folder))})
