"""Make all data of one seed of the laboratory, its tokenizer and its untrained model.

    python -m benchmarks.lab.data --size full --seed 0 --out DIR

Out: corpus/ (documents), packed/ (shard folders: pretraining, midtraining, curated, heldout), start/ (a model with random
weights, and the tokenizer), posttrain/ (sft.jsonl, dpo.jsonl, rl.jsonl), heldout/ (problems, stories, notes).
"""

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.lab.command import run_command
from benchmarks.lab.documents import CURATED, LEVELS, MIDTRAINING, PRETRAINING, Problem, mixed, notes, problems
from benchmarks.lab.measure import first_of_each
from benchmarks.lab.recipe import RECIPES, Recipe, Size
from pipelines.sample_corpus import plain_text

EOS, PAD = "<|endoftext|>", "<|pad|>"
TOKENIZER_DOCUMENTS = 4_000  # of each mix
TOKENS_PER_DOCUMENT = {"pretraining": 55, "midtraining": 60, "curated": 62}  # a little below what they have on average


@dataclass(frozen=True)
class DataConfig:
    """Make the data of one seed."""

    out: Path
    """Folder to write; it may be there, and empty."""
    size: Size = "full"
    """Which recipe."""
    seed: int = 0
    """Decides everything."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks and what the workers print."""


def corpora(recipe: Recipe, seed: int) -> dict[str, Iterator[str]]:
    """Documents of each corpus, as many as its steps read."""

    mixes = {
        "pretraining": (recipe.pretraining_steps, PRETRAINING),
        "midtraining": (recipe.midtraining_steps, MIDTRAINING),
        "curated": (recipe.curated_steps, CURATED),
    }
    tokens_per_step = recipe.batch_rows * recipe.seq_len
    return {
        name: mixed(f"{seed}/{name}", 1 + steps * tokens_per_step // TOKENS_PER_DOCUMENT[name], mix)
        for name, (steps, mix) in mixes.items()
    }


def heldout_problems(recipe: Recipe, seed: int) -> list[tuple[str, Problem]]:
    """Held-out problems with their level, level after level."""
    return [
        (level, problem)
        for level in LEVELS
        for problem in problems(f"{seed}/heldout/{level}", recipe.problems, held_out=True, levels=(level,))
    ]


def post_training_data(recipe: Recipe, seed: int) -> dict[str, list[dict[str, str]]]:
    """Examples of each stage of post-training. Rejected solutions have a wrong step."""
    rng = random.Random(f"{seed}/rejected")

    def rejected(problem: Problem) -> str:
        while True:
            solution = problem.solution(rng, wrong_steps=0.5)
            if solution != problem.solution():
                return solution

    return {
        "sft": [
            {"prompt": problem.prompt, "completion": problem.solution()}
            for problem in problems(f"{seed}/sft", recipe.sft_examples, held_out=False)
        ],
        "dpo": [
            {"prompt": problem.prompt, "chosen": problem.solution(), "rejected": rejected(problem)}
            for problem in problems(f"{seed}/dpo", recipe.dpo_examples, held_out=False)
        ],
        "rl": [
            {"prompt": problem.prompt, "answer": str(problem.answer)}
            for problem in problems(f"{seed}/rl", recipe.rl_prompts, held_out=False)
        ],
    }


def heldout_data(recipe: Recipe, seed: int) -> dict[str, list[dict[str, str]]]:
    """What models are measured on."""
    rng = random.Random(f"{seed}/heldout/texts")
    return {
        "problems": [
            {
                "level": level,
                "prompt": problem.prompt,
                "answer": str(problem.answer),
                "solution": problem.solution(),
                "text": problem.prompt + problem.solution(),
            }
            for level, problem in heldout_problems(recipe, seed)
        ],
        "stories": [{"text": plain_text(rng)} for _ in range(recipe.texts)],
        "notes": [{"text": notes(rng)} for _ in range(recipe.texts)],
    }


def write_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int) -> None:
    """Byte-level BPE with single digits; its padding token is not the one that ends a text."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)
    wrapped.save_pretrained(folder)


def write_start(folder: Path, recipe: Recipe, seed: int) -> None:
    """A tiny OLMo-2 with random weights."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.Olmo2Config(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.seq_len,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def run(config: DataConfig) -> int:
    return build(config.out, RECIPES[config.size], config.seed, config.debug)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def build(out: Path, recipe: Recipe, seed: int, debug: bool) -> int:
    """Write everything into `out`; returns 0, the exit code. debug: show what the workers print."""
    from scorer.cluster import ray_cluster
    from scorer.config import PackConfig
    from scorer.pack import pack

    sample: list[str] = []
    for name, documents in corpora(recipe, seed).items():
        texts = list(documents)
        write_lines(out / "corpus" / f"{name}.jsonl", ({"text": text} for text in texts))
        sample += texts[:TOKENIZER_DOCUMENTS] if name != "curated" else []
    heldout = heldout_data(recipe, seed)
    for name, rows in heldout.items():
        write_lines(out / "heldout" / f"{name}.jsonl", rows)
    for name, rows in post_training_data(recipe, seed).items():
        write_lines(out / "posttrain" / f"{name}.jsonl", rows)
    write_start(out / "start", recipe, seed)
    write_tokenizer(out / "start", sample, recipe.vocab_size)
    sources = {name: out / "corpus" / f"{name}.jsonl" for name in ("pretraining", "midtraining", "curated")}
    # the loss is measured within each run, on fewer problems than a finished model is
    some = first_of_each(heldout["problems"], recipe.curve_problems)
    write_lines(out / "corpus" / "heldout.jsonl", some)
    with ray_cluster(debug):  # one Ray session for all packing
        for name, path in (sources | {"heldout": out / "corpus" / "heldout.jsonl"}).items():
            packed = out / "packed" / name
            pack(PackConfig([str(path)], str(out / "start"), str(packed), recipe.seq_len, debug=debug))
    return 0


if __name__ == "__main__":
    run_command("lab.data", DataConfig, lambda config, stop: run(config), __doc__)
