"""The loop as a graph of stages: pack; for each round score, train, post-train; evaluate.

Round 0 trains the base with next-token prediction. Round k scores the packed corpus with the post-trained model of the
round before, and trains the original base, not that of the round before, with ReMiT.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipelines.console import BadUsage
from pipelines.flywheel.fingerprint import Counting
from pipelines.flywheel.model_check import check_model
from pipelines.flywheel.sections import SECTIONS, without_objective, words
from pipelines.flywheel.settings import FlywheelConfig, PostTrain
from pipelines.flywheel.stage import Input, Output, Pattern, Stage, State, Unkeyed, Word
from pipelines.models import resolve_model
from pipelines.posttrain.rewards import reward_source
from scorer.sources import list_word
from shards.modelfolder import max_positions, read_config, require_base, require_language_model, require_one_scaling
from shards.store import is_remote
from shards.tokens import disagreement, ordinary_ids

REFERENCE = "rl"  # name of the column that every round scores
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

MODEL: dict[str, Counting] = {"model": "model"}


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
        scorer: Stage | Path | None = self.reference
        rounds = []
        for number in range(0 if scorer is None else 1, config.rounds + 1):
            name = f"round-{number}"
            shards = packed if number == 0 else self.score(f"{name}/score", packed, scorer)
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

    def add(self, section: str, name: str, line: tuple[Word, ...], inputs: Mapping[str, Any], **settings: Any) -> Stage:
        """A stage that one of this project's own commands runs."""
        known = SECTIONS[section]
        launcher = self.config.launch.get(section, (sys.executable, "-m"))
        command = (known.module, *known.words, *line)
        self.stages.append(Stage(name, command, inputs, launcher=launcher, resumes=True, **settings))
        return self.stages[-1]

    def pack(self, name: str, corpus: tuple[str, ...]) -> Stage:
        entries, inputs = corpus_words(
            "heldout" if "heldout" in name else "corpus", corpus, str(self.config.pack.get("text_field", "text"))
        )
        for file in TOKENIZER_FILES:
            if (self.tokenizer / file).is_file():
                inputs[f"tokenizer/{file}"] = self.tokenizer / file
        line = (
            *("--corpus", *entries, "--tokenizer", Unkeyed(str(self.tokenizer)), "--out", Output()),
            *("--seq-len", str(self.config.seq_len), *words("pack", self.config.pack, inputs)),
        )
        return self.add("pack", name, line, inputs)

    def score(self, name: str, packed: Stage, model: Stage | Path | None) -> Stage:
        inputs: dict[str, Any] = {"shards": packed, "model": model}
        line = (
            *("--shards", Input("shards"), "--model", Input("model"), "--out", Output(), "--name", REFERENCE),
            *words("score", self.config.score, inputs),
        )
        return self.add("score", name, line, inputs, counting=MODEL)

    def train(self, name: str, number: int, shards: Stage, heldout: Stage | None) -> Stage:
        inputs: dict[str, Any] = {"shards": shards, "model": self.base}
        options = self.config.train
        objective: tuple[Word, ...] = ("--objective", "ntp")
        if number == 0:
            context = self.config.score.get("context", "packed")  # that of the rounds that it is compared with
            options = {"context": context, **without_objective(options)}
        else:
            objective = ("--reference", REFERENCE, *(() if "objective" in options else ("--objective", "remit")))
        line = (
            *("--shards", Input("shards"), "--model", Input("model"), "--out", Output(), *objective),
            *("--seed", str(self.config.seed), *words("train", options, inputs)),
        )
        if heldout is not None:
            inputs["eval_shards"] = heldout
            line = (*line, "--eval-shards", Input("eval_shards"))
        return self.add("train", name, line, inputs, result="model", seed=self.config.seed, counting=MODEL)

    def post_train(self, name: str, number: int, entry: PostTrain, model: Stage) -> Stage:
        if entry.kind == "command":
            return self.own_command(name, number, entry, model)
        inputs: dict[str, Any] = {"model": model}
        line = (
            *("--model", Input("model"), "--out", Output(), "--seed", str(self.config.seed)),
            *words(entry.kind, entry.options, inputs),
        )
        counting: dict[str, Counting] = {"reward": "python"}
        reward = reward_source(str(entry.options.get("reward", "answer"))) if entry.kind == "rl" else None
        if reward is not None:
            inputs["reward"] = reward
        more_inputs(entry, inputs, counting)
        settings: dict[str, Any] = {"result": "model", "seed": self.config.seed, "check": check_model}
        return self.add(entry.kind, name, line, inputs, counting=counting, **settings)

    def own_command(self, name: str, number: int, entry: PostTrain, model: Stage) -> Stage:
        """The contract of a command of the user's own: where it reads and writes is in its environment."""
        inputs: dict[str, Any] = {"model": model}
        counting: dict[str, Counting] = {}
        line: list[Word] = []
        for place, word in enumerate(entry.command):
            # the program itself is looked for in PATH unless it is a path
            option, equals, path = word.partition("=")
            is_file = Path(word).is_file() and (place > 0 or "/" in word)
            if is_file or word in entry.inputs:
                option, equals, path = "", "", word
            elif not equals or not (Path(path).is_file() or path in entry.inputs):
                line.append(word)
                continue
            inputs[f"word/{place}"] = Path(path).absolute()
            counting[f"word/{place}"] = "all"
            line.append(Input(f"word/{place}", prefix=option + equals, written=word))
        more_inputs(entry, inputs, counting)
        environment: dict[str, Word] = {
            "REMIT_MODEL": Input("model"),
            "REMIT_OUTPUT": Output(),
            "REMIT_STATE": State(),
            "REMIT_SEED": str(self.config.seed),
            "REMIT_ROUND": str(number),
            "REMIT_TOKENIZER": Unkeyed(str(self.tokenizer)),
        }
        settings: dict[str, Any] = {
            "seed": self.config.seed,
            "check": check_model,
            "counting": counting,
            "zero_may_stop": True,
        }
        stage = Stage(name, tuple(line), inputs, environment=environment, **settings)
        self.stages.append(stage)
        return stage

    def evaluate(self, name: str, model: Stage) -> Stage:
        assert self.config.evaluate is not None
        inputs: dict[str, Any] = {"model": model}
        line = ("--model", Input("model"), "--out", Output(), *words("evaluate", self.config.evaluate, inputs))
        return self.add("evaluate", name, line, inputs, counting={"task_dir": "tasks"})


def more_inputs(entry: PostTrain, inputs: dict[str, Any], counting: dict[str, Counting]) -> None:
    """Add what `inputs` of an entry of posttrain names."""
    for index, path in enumerate(entry.inputs):
        inputs[f"input/{index}"] = Path(path).absolute()
        counting[f"input/{index}"] = "all"


def local_model(key: str, name: str, weights: bool = True) -> Path:
    """Folder of a model; a hub id is fetched into the hub's cache."""
    try:
        return resolve_model(key, name, weights).path.absolute()
    except ValueError as error:
        raise BadUsage(str(error)) from None


def corpus_words(key: str, corpus: tuple[str, ...], text_field: str = "text") -> tuple[list[Word], dict[str, Any]]:
    """The words of --corpus, judged as remit pack judges them, and the files that they stand for as inputs.

    What is not on this machine, URLs and names of datasets, enters by name alone.
    """
    entries: list[Word] = []
    inputs: dict[str, Any] = {}
    for number, entry in enumerate(corpus):
        folder, colon, rest = entry.partition(":")
        try:
            files = None if is_remote(entry) else list_word(entry, text_field, set())
        except ValueError as error:
            raise BadUsage(f"{key} {error}") from None
        if files is None and not is_remote(entry) and Path(folder).is_dir():  # which `datasets` opens
            inputs[f"{key}/{number}"] = Path(folder).absolute()
            entries.append(Input(f"{key}/{number}", suffix=colon + rest))
        elif files is None:
            entries.append(entry)
        elif Path(path := entry.removeprefix("file://")).exists():
            inputs[f"{key}/{number}"] = Path(path).absolute()
            entries.append(Input(f"{key}/{number}"))
        else:
            found = Pattern.expand(entry)
            for index, file in enumerate(found):
                inputs[f"{key}/{number}/{index}"] = Path(file).absolute()
            entries.append(Pattern(entry, found))
    return entries, inputs
