"""Tiny tokenizers, models and corpora; a Ray session for the whole run; the command line in this process."""

import gzip
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models of these sizes only wait for a second thread

import outside
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import transformers
import zstandard
from annotated import annotate, by_model
from browser import browser, pytest_terminal_summary  # noqa: F401  # a fixture and a hook
from built_once import BuiltOnce, builder
from inline_ray import pack_inline
from looping import FakeLoop
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from pipelines.cli import main
from scorer.config import PackConfig, ScoreConfig
from scorer.reference import Reference
from scorer.score import score
from shards import ShardFolder

if TYPE_CHECKING:
    from faulty import Faulty

EOS = "<|endoftext|>"
ODD = [
    "",
    "x",
    "null \x00 byte",
    "emoji 😀👩‍👩‍👧",
    "漢字かな交じり文",
    "שלום עולם",
    "tab\tand\r\nnewline\n\n",
    " ",
    "e\u0301",
]
VOCABULARY = 521  # odd on purpose


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What remit remembers of corpora stands in a user's cache; these tests are no user."""
    os.environ["REMIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BuiltOnce]:
    """For folders that many tests read: built_once(NAME, build), by the first process of this run that asks."""
    own = tmp_path_factory.getbasetemp()
    with builder((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "built-once") as get:
        yield get


@pytest.fixture(scope="session")
def ray_session(own_cache: None) -> Iterator[None]:
    """One Ray for all tests that ask for it, by name or through a fixture that packs or scores."""
    from scorer.cluster import ray_cluster

    with outside.allowed(), ray_cluster():
        yield


@pytest.fixture(scope="session")
def engine() -> None:
    """For tests of what real vLLM engines have made: the first test process that asks starts them."""


@pytest.fixture(scope="session")
def starts_processes() -> None:
    """For tests that start processes of their own: commands that are killed, torchrun, a shell."""


@pytest.fixture(scope="session")
def server() -> None:
    """For tests that listen on a port; those with a server of their own have a fixture of this name."""


@pytest.fixture(autouse=True)
def only_what_was_asked_for(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test without a marker of KINDS starts no process and no Ray: `make test-fast` runs it."""
    if any(request.node.get_closest_marker(kind) for kind in KINDS):
        yield
    else:
        with outside.forbidden():
            yield


# the marker that a test gets from a fixture that it asks for; nobody sets these by hand
KINDS = {
    "ray": {"ray_session"},
    "engine": {"engine"},
    "process": {"starts_processes"},
    "server": {"server", "hub"},
    "browser": {"browser"},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        names = set(getattr(item, "fixturenames", ()))
        for kind, fixtures in KINDS.items():
            if names & fixtures:
                item.add_marker(kind)


def make_tokenizer(folder: Path, texts: list[str], vocabulary: int = VOCABULARY) -> Path:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS).save_pretrained(folder)
    return folder


def source_texts(count: int, seed: int = 0) -> list[str]:
    """Source code of installed packages: text that nobody made for these tests, plus odd documents."""
    rng = random.Random(seed)
    files = sorted(Path(transformers.__file__).parent.glob("*.py"))
    texts = list(ODD)
    while len(texts) < count:
        text = rng.choice(files).read_text(encoding="utf-8")
        start = rng.randrange(max(1, len(text) - 10))
        texts.append(text[start : start + rng.choice([1, 7, 60, 400, 900])])
    rng.shuffle(texts)
    return texts[:count]


def write_corpus(path: Path, texts: list[str], field: str = "text") -> Path:
    """One corpus file in the format that its suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts).encode()
    if path.name.endswith(".parquet"):
        pyarrow.parquet.write_table(pa.table({field: texts}), path, row_group_size=7)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif path.name.endswith(".zst"):
        path.write_bytes(zstandard.ZstdCompressor().compress(lines))
    else:
        path.write_bytes(lines)
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(built_once: BuiltOnce) -> Path:
    return built_once("tokenizer", lambda folder: make_tokenizer(folder, source_texts(200, seed=1)))


FAMILIES = {
    "Olmo2": {},
    "SmolLM3": {"tie_word_embeddings": True},
    "Llama": {"num_key_value_heads": 1},
    "Qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "Youtu": {
        "kv_lora_rank": 32,
        "q_lora_rank": 48,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "qk_nope_head_dim": 32,
        "tie_word_embeddings": True,
    },
    "Gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {},
    "Phi3": {},
}


def make_model(
    folder: Path,
    family: str = "Olmo2",
    seed: int = 0,
    positions: int = 64,
    vocabulary: int = VOCABULARY,
    **changes: object,
) -> Path:
    """A tiny random model whose weights are large enough that its predictions differ from token to token."""
    torch.manual_seed(seed)
    settings: dict = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    config = getattr(transformers, f"{family}Config")(**(settings | FAMILIES.get(family, {}) | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus_folder(built_once: BuiltOnce) -> Path:
    def build(folder: Path) -> None:
        write_corpus(folder / "a.jsonl", source_texts(60, seed=2))
        write_corpus(folder / "b.jsonl.gz", source_texts(41, seed=3))
        write_corpus(folder / "sub" / "c.jsonl.zst", source_texts(33, seed=4))
        write_corpus(folder / "d.parquet", source_texts(50, seed=5))

    return built_once("corpus", build)


@pytest.fixture
def remit(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line: remit("pack", "--seq-len", 64) -> (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        output = capfd.readouterr()
        return int(exit_.value.code or 0), output.out, output.err

    return run


@pytest.fixture(scope="session")
def packed(built_once: BuiltOnce, corpus_folder: Path, tokenizer_folder: Path) -> Path:
    """A packed folder of rows of 64 tokens in several parts and record batches."""

    def build(out: Path) -> None:
        pack_inline(PackConfig([str(corpus_folder)], str(tokenizer_folder), out, seq_len=64, tokens_per_shard=64 * 50))

    return built_once("packed", build)


def score_to(out: Path, shards: Path, model: Path, **settings: object) -> ShardFolder:
    """Score in this process, without the canary unless asked: what comes out is compared with transformers anyway."""
    defaults = {"num_engines": 1, "dtype": "float32", "canary": False}
    config = ScoreConfig(shards, str(model), out, **(defaults | settings))
    return score(config, Reference(model, model.name))


@pytest.fixture(scope="session")
def reference_model(built_once: BuiltOnce, tokenizer_folder: Path) -> Path:
    def build(folder: Path) -> None:
        shutil.copytree(tokenizer_folder, make_model(folder, seed=1), dirs_exist_ok=True)

    return built_once("tiny-rl", build)


@pytest.fixture
def fake_loop(tmp_path: Path, reference_model: Path, monkeypatch: pytest.MonkeyPatch) -> FakeLoop:
    """A flywheel whose stages are stand-ins."""
    monkeypatch.setenv("FAKE", str(tmp_path))
    return FakeLoop(tmp_path, reference_model)


@pytest.fixture(scope="session")
def scored_rl(
    built_once: BuiltOnce, packed: Path, reference_model: Path, engine: None, request: pytest.FixtureRequest
) -> Path:
    """The packed folder with a column rl_logprobs in packed context, made by two engines at once."""

    def build(out: Path) -> None:
        request.getfixturevalue("ray_session")
        score_to(out, packed, reference_model, num_engines=2)

    return built_once("scored-rl", build)


@pytest.fixture(scope="session")
def scored(built_once: BuiltOnce, scored_rl: Path, reference_model: Path, request: pytest.FixtureRequest) -> Path:
    """A second column on top of it: sft_logprobs in document context, not rounded."""

    def build(out: Path) -> None:
        request.getfixturevalue("ray_session")
        score_to(out, scored_rl, reference_model, name="sft", context="document", logprob_step=0.0)

    return built_once("scored-both", build)


@pytest.fixture(scope="session")
def exact(
    built_once: BuiltOnce, packed: Path, reference_model: Path, engine: None, request: pytest.FixtureRequest
) -> Path:
    """The packed folder with rl_logprobs the five most probable tokens and the entropies of each place, not rounded."""

    def build(out: Path) -> None:
        request.getfixturevalue("ray_session")
        score_to(out, packed, reference_model, top_k=5, entropy=True, entropy_temperature=2.0, logprob_step=0.0)

    return built_once("exact", build)


@pytest.fixture(scope="session")
def small(built_once: BuiltOnce, tokenizer_folder: Path) -> Path:
    """About a hundred rows of at most 24 tokens, several of them short."""

    def build(folder: Path) -> None:
        for index in range(40):
            texts = [text[:60] for text in source_texts(12, seed=30 + index)[:3]]
            write_corpus(folder / "corpus" / f"{index:02d}.jsonl", [*texts, "e"])
        pack_inline(
            PackConfig([str(folder / "corpus")], str(tokenizer_folder), folder / "packed", 24, tokens_per_shard=24 * 30)
        )

    return built_once("small", build) / "packed"


@pytest.fixture(scope="session")
def models(built_once: BuiltOnce) -> dict[str, Path]:
    return {
        "base": built_once("base", lambda folder: make_model(folder, seed=1)),
        "reference": built_once("reference", lambda folder: make_model(folder, seed=2)),
    }


@pytest.fixture(scope="session")
def annotated(built_once: BuiltOnce, small: Path, models: dict[str, Path]) -> dict[str, Path]:
    def build(out: Path) -> None:
        annotate(small, out, by_model(models["reference"], out.name, 1 / 64), out.name, 1 / 64)

    return {context: built_once(f"annotated/{context}", build) for context in ("packed", "document")}


@pytest.fixture(scope="session")
def faulty(built_once: BuiltOnce, tokenizer_folder: Path, ray_session: None, starts_processes: None) -> "Faulty":
    """Inputs and undisturbed outputs of commands that are made to fail."""
    from faulty import Faulty

    return Faulty(built_once("faulty", lambda folder: Faulty.build(folder, tokenizer_folder)), tokenizer_folder)
