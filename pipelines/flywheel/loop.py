"""The loop as an ordered list of stages: pack; for each round score, train, post-train; evaluate.

Round 0 trains the base with next-token prediction. Round k scores the packed corpus with the post-trained model of the
round before, and trains the original base, not that of the round before, with ReMiT, or by remit rmt where the file says so.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipelines.evaluation.task_folder import task_folder_fingerprint
from pipelines.flywheel.check_model import check_model, tokenizer_difference
from pipelines.flywheel.config import FILES, FlywheelConfig, PostTrain, command_of, fast_options, without_objective
from pipelines.flywheel.stages import At, Given, Stage, Word, digest_of, digest_of_files, given, identity
from pipelines.models import resolve_model
from pipelines.posttrain.rewards import reward_fingerprint, reward_source
from pipelines.terminal import BadUsage
from scorer.hf_datasets import HUB
from scorer.sources import list_word
from shards.modelfolder import max_positions, read_config, require_base, require_language_model, require_one_scaling
from shards.store import is_remote
from trainer.experts import check_experts

REFERENCE = "rl"  # name of the column that every round scores
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class Loop:
    """stages: in the order in which they run; rounds: by number, the mid-trained model of each and the post-trained one,
    which is the same where there is no post-training."""

    def __init__(self, config: FlywheelConfig) -> None:
        self.config, self.stages, self.rounds = config, list[Stage](), dict[int, tuple[Stage, Stage]]()
        self.base = resolve_model("base", config.base).path.absolute()
        self.tokenizer = self.base
        if config.tokenizer is not None:
            self.tokenizer = resolve_model("tokenizer", config.tokenizer, weights=False).path.absolute()
        if not (self.tokenizer / "tokenizer.json").is_file():
            raise ValueError(
                f"{self.tokenizer}: has no tokenizer.json, expected a fast tokenizer; name one as tokenizer"
            )
        if config.out.exists() and not config.out.is_dir():
            raise ValueError(f"out {config.out}: is a file, expected a folder, or a path where none is yet")
        self.require_fit("base", self.base)
        scorer: Stage | Given | None = None
        if config.reference is not None:
            reference = resolve_model("reference", config.reference).path.absolute()
            self.require_fit("reference", reference)
            scorer = given(reference)
        packed = self.pack("pack", "corpus", config.corpus)
        heldout = self.pack("pack-heldout", "heldout", config.heldout) if config.heldout else None
        for number in range(0 if scorer is None else 1, config.rounds + 1):
            shards = packed if scorer is None else self.score(number, packed, scorer)
            if config.rmt is None or scorer is None:
                midtrained = model = self.train(number, shards, heldout)
            else:
                midtrained = model = self.rmt(number, shards, heldout, scorer)
            for entry in config.posttrain:
                model = self.post_train(number, entry, model)
            if config.evaluate is not None:
                self.evaluate(f"round-{number}/evaluate-midtrained", midtrained, config.evaluate)
                if config.posttrain:
                    self.evaluate(f"round-{number}/evaluate-posttrained", model, config.evaluate)
            self.rounds[number] = midtrained, model
            scorer = model

    def require_fit(self, key: str, model: Path) -> None:
        """ValueError where training or scoring would refuse this model, after hours of packing."""
        seq_len = self.config.seq_len
        (require_base if key == "base" else require_language_model)(model)
        if key == "base":
            check_experts(model, self.config.train.get("router_aux_loss"))
        values = read_config(model)
        require_one_scaling(values, seq_len, str(model))
        positions = max_positions(values)
        if positions is not None and seq_len > positions:
            raise ValueError(
                f"seq_len is {seq_len}, expected at most {positions}, the max_position_embeddings of {key} {model}"
            )
        # which added tokens the rows will have is known when they are packed
        if (model / "tokenizer.json").is_file() and (reason := tokenizer_difference(self.tokenizer, model)):
            raise ValueError(
                f"{key} {model}: its tokenizer is not that of {self.tokenizer}, which packs: {reason}; expected the "
                "same in base, reference and tokenizer"
            )

    def add(
        self, section: str, name: str, command: tuple[Word, ...], inputs: dict[str, Stage | Given], options: Mapping[str, Any],
        more: tuple[Word, ...] = (), **settings: Any,
    ) -> Stage:  # fmt: skip
        """A stage that one of this project's own commands runs; more: words that are not in its key."""
        fast = fast_options(section, options)
        for key in FILES & set(options):
            inputs[key] = given(options[key]) if key not in inputs else inputs[key]
            command += (f"--{key.replace('_', '-')}", At(key))
        rest = {key: value for key, value in options.items() if key not in fast and key not in FILES}
        launcher = tuple(self.config.launch.get(section, (sys.executable, "-m")))  # type: ignore[call-overload]
        command = ("pipelines.cli", command_of(section), *command, *words(rest))
        self.stages.append(Stage(name, command, inputs, (*more, *words(fast)), launcher, resumes=True, **settings))
        return self.stages[-1]

    def pack(self, name: str, key: str, corpus: list[str]) -> Stage:
        there = corpus_inputs(key, corpus, self.config)
        inputs: dict[str, Stage | Given] = {f"{key}/{number}": source for number, source in enumerate(there.values())}
        for file in TOKENIZER_FILES:
            if (self.tokenizer / file).is_file():
                inputs[f"tokenizer/{file}"] = given(self.tokenizer / file)
        # what is not on this machine, URLs and names of datasets, enters the key by name
        settings = {"elsewhere": [word for word in corpus if word not in there], "seq_len": self.config.seq_len}
        more = ("--corpus", *corpus, "--tokenizer", str(self.tokenizer), "--seq-len", str(self.config.seq_len))
        return self.add("pack", name, ("--out", At("out")), inputs, self.config.pack, more, settings=settings)

    def score(self, number: int, packed: Stage, model: Stage | Given, name: str = "score") -> Stage:
        line = ("--shards", At("shards"), "--model", At("model"), "--out", At("out"), "--name", REFERENCE)
        options = self.config.score if self.config.rmt is None else {**self.config.score, "entropy": True}
        return self.add("score", f"round-{number}/{name}", line, {"shards": packed, "model": model}, options)

    def train(self, number: int, shards: Stage, heldout: Stage | None) -> Stage:
        inputs: dict[str, Stage | Given] = {"shards": shards, "model": given(self.base)}
        options = self.config.train
        if number == 0:
            objective: tuple[Word, ...] = ("--objective", "ntp")
            context = self.config.score.get("context", "packed")  # that of the rounds that it is compared with
            options = {"context": context, **without_objective(options)}
        else:
            objective = ("--reference", REFERENCE, *(() if "objective" in options else ("--objective", "remit")))
        line = ("--shards", At("shards"), "--model", At("model"), "--out", At("out"), *objective)
        line += ("--seed", str(self.config.seed))
        if heldout is not None:
            inputs["eval_shards"] = heldout
            line += ("--eval-shards", At("eval_shards"))
        return self.add("train", f"round-{number}/train", line, inputs, options, result="model", seed=self.config.seed)

    def rmt(self, number: int, shards: Stage, heldout: Stage | None, scorer: Stage | Given) -> Stage:
        """Reinforcement mid-training in place of `train`; its evaluation reads the entropy of the held-out rows too."""
        inputs: dict[str, Stage | Given] = {"shards": shards, "model": given(self.base)}
        line: tuple[Word, ...] = ("--shards", At("shards"), "--model", At("model"), "--out", At("out"))
        line += ("--reference", REFERENCE, "--seed", str(self.config.seed))
        if heldout is not None:
            inputs["eval_shards"] = self.score(number, heldout, scorer, "score-heldout")
            line += ("--eval-shards", At("eval_shards"))
        options = self.config.rmt or {}
        return self.add("rmt", f"round-{number}/rmt", line, inputs, options, result="model", seed=self.config.seed)

    def post_train(self, number: int, entry: PostTrain, model: Stage) -> Stage:
        name = f"round-{number}/{entry.name}"
        inputs: dict[str, Stage | Given] = {"model": model}
        inputs |= {f"input/{index}": given(path) for index, path in enumerate(entry.inputs)}
        if entry.command:
            return self.own_command(name, number, entry.command, inputs)
        options = getattr(entry, entry.kind)
        line = ("--model", At("model"), "--out", At("out"), "--seed", str(self.config.seed))
        reward = str(options.get("reward", "answer"))
        source = reward_source(reward) if entry.kind == "rl" else None
        if source is not None:
            inputs["reward"] = Given(str(source), lambda: reward_fingerprint(reward) or "")
        return self.add(
            entry.kind, name, line, inputs, options, result="model", seed=self.config.seed, check=check_model
        )

    def own_command(self, name: str, number: int, command: list[str], inputs: dict[str, Stage | Given]) -> Stage:
        """The contract of a command of the user's own: where it reads and writes is in its environment."""
        for place, word in enumerate(command):
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
            name, tuple(command), inputs, environment=environment, settings={"round": number}, seed=self.config.seed,
            check=check_model,
        )  # fmt: skip
        self.stages.append(stage)
        return stage

    def evaluate(self, name: str, model: Stage, options: Mapping[str, Any]) -> Stage:
        inputs: dict[str, Stage | Given] = {"model": model}
        if tasks := options.get("task_dir"):
            inputs["task_dir"] = replace(given(tasks), identity=lambda: task_folder_fingerprint(tasks))
        return self.add("evaluate", name, ("--model", At("model"), "--out", At("out")), inputs, options)


def make_loop(config: FlywheelConfig) -> Loop:
    """Stages of the loop. Fetches models that are hub ids; BadUsage for models and files that are not there."""
    require_packages(config)
    try:
        return Loop(config)
    except ValueError as error:
        raise BadUsage(str(error)) from None


def require_packages(config: FlywheelConfig) -> None:
    """ValueError where a stage would find out after days that something is not installed here."""
    needed = {entry.kind: ("trl", "flywheel") for entry in config.posttrain if not entry.command}
    if config.rmt is not None:
        needed["rmt"] = ("trl", "flywheel")
    if config.evaluate is not None:
        needed["evaluate"] = ("lm_eval", "eval")
    for section, (package, extra) in needed.items():
        if section not in config.launch and find_spec(package) is None:
            raise ValueError(
                f"{section} needs {package}, which is not installed; in your checkout of remit: pip install '.[{extra}]'"
            )


def words(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Options as words of a command line, in the order of their names."""
    line: list[str] = []
    for name, value in sorted(options.items()):
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            line.append(option if value else f"--no-{option[2:]}")
        elif value is not None:
            line += [option, *map(str, value if isinstance(value, list | tuple) else [value])]
    return tuple(line)


def corpus_inputs(key: str, corpus: list[str], config: FlywheelConfig) -> dict[str, Given]:
    """What stands on this machine of a corpus, by its word, judged as remit pack does; ValueError where it refuses it."""
    found: dict[str, Given] = {}
    own = {os.path.realpath(config.out)}  # which a folder of the corpus may hold
    for word in corpus:
        if is_remote(word):
            continue
        try:
            listing = list_word(word, str(config.pack.get("text_field", "text")), own)
        except ValueError as error:
            raise ValueError(f"{key} {error}") from None
        folder, _, rest = word.partition(":")
        if listing is not None:
            shared = os.path.commonpath(map(os.path.dirname, listing.files))
            files = {os.path.relpath(file, shared): Path(file) for file in listing.files}
            found[word] = Given(word, partial(digest_of_files, f"{config.out.absolute()}#{key} {word}", files))
        elif not word.startswith(HUB) and Path(folder).is_dir():  # which `datasets` opens
            found[word] = Given(
                word, partial(lambda folder, rest: digest_of({rest: identity(folder)}), Path(folder), rest)
            )
    return found
