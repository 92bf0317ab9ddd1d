"""The ids of packed rows against `tokenizers.Tokenizer.from_file`; which tokenizers may differ, and in what."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pytest
import transformers
from conftest import EOS, make_model, write_corpus
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from shards import ShardFolder
from shards.tokens import decode_token_ids, disagreement, encode_token_ids
from shards.verify import verify_folder
from trainer.data import RowReader

pytestmark = pytest.mark.usefixtures("ray_session")

BOS = "<s>"
TEXTS = [
    "def f(x):\n    return x + 1\n",
    "hello  world, twice:  hello world",
    "Grüße 漢字 😀 e\u0301",
    " ",
    "x",
    "tail \n\n",
] * 3
LONG = "a long document about rows that go on and on. " * 40


def save(tokenizer: Tokenizer, folder: Path, **config: object) -> Path:
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, bos_token=BOS).save_pretrained(
        folder
    )
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def byte_level(bos: bool = False, special: tuple[str, ...] = (EOS, BOS, "<|unused|>")) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=403, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, LONG], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=[EOS, BOS, "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, LONG], trainer)
    return tokenizer


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "c.jsonl", [*TEXTS, LONG, "", *TEXTS])


@pytest.fixture
def packed(tmp_path: Path, corpus: Path, remit: Callable) -> Callable[..., tuple[ShardFolder, str]]:
    def run(tokenizer: Path, *options: str, out: str = "packed") -> tuple[ShardFolder, str]:
        where = tmp_path / out
        code, output, error = remit(
            "pack", "--corpus", corpus, "--tokenizer", tokenizer, "--out", where, "--seq-len", 17, *options
        )
        assert code == 0, error
        return ShardFolder(where), output + error

    return run


def documents(folder: ShardFolder) -> dict[int, list[list[int]]]:
    """The pieces of each document, in order."""
    pieces: dict[int, list[list[int]]] = {}
    for row in pyarrow.dataset.dataset(folder.path, format="arrow").to_table().to_pylist():
        start = 0
        for doc_id, length in zip(row["doc_ids"], row["doc_lengths"]):
            pieces.setdefault(doc_id, []).append(row["input_ids"][start : start + length])
            start += length
        assert start == len(row["input_ids"])
    return pieces


SIZE = byte_level().get_vocab_size()
CLASSES = [
    "LlamaTokenizerFast",
    "LlamaTokenizer",
    "Qwen2TokenizerFast",
    "GemmaTokenizerFast",
    "T5TokenizerFast",
    "NoSuch",
]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_the_file_counts_whatever_class_the_config_names(
    tmp_path: Path, packed: Callable, make: Callable[[], Tokenizer], name: str
) -> None:
    tokenizer = save(make(), tmp_path / "tok", tokenizer_class=name)
    (tokenizer / "config.json").write_text('{"model_type": "llama"}')
    folder, said = packed(tokenizer)
    oracle = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    texts = [*TEXTS, LONG, "", *TEXTS]
    expected = {i: [*oracle.encode(text).ids, 0] for i, text in enumerate(texts) if oracle.encode(text).ids}
    assert {key: [*chain(*pieces)] for key, pieces in documents(folder).items()} == expected
    copy = transformers.AutoTokenizer.from_pretrained(Path(folder.path) / "_tokenizer")
    assert [copy(text)["input_ids"] for text in texts] == [oracle.encode(text).ids for text in texts]
    if (make, name) == (byte_level, "LlamaTokenizerFast"):
        assert "LlamaTokenizer" in said
        assert "the ids are those of the file" in said
    assert verify_folder(folder).problems == []


@pytest.mark.parametrize("option", ["auto", "always", "never", None])
@pytest.mark.parametrize("own", [True, False])
def test_bos(tmp_path: Path, packed: Callable, remit: Callable, option: str | None, own: bool) -> None:
    tokenizer = save(byte_level(bos=own), tmp_path / "tok")
    folder, said = packed(tokenizer, *([] if option is None else ["--bos", option]))
    with_bos = option == "always" or (own and option != "never")
    assert folder.manifest.tokenizer["bos_token_id"] == (1 if with_bos else None)
    bare = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    texts = [*TEXTS, LONG, "", *TEXTS]
    found = documents(folder)
    for index, text in enumerate(texts):
        pieces = found.get(index, [])
        if with_bos:
            assert all(piece[0] == 1 for piece in pieces)
            pieces = [piece[1:] for piece in pieces]
        assert [*chain(*pieces)] == ([*bare.encode(text, add_special_tokens=False).ids, 0] if text else [])
    table = pyarrow.dataset.dataset(folder.path, format="arrow").to_table().to_pylist()
    assert all(len(row["input_ids"]) == 17 for row in table[:-1])
    assert sum(file.bos_tokens for file in folder.manifest.corpus) == with_bos * sum(map(len, found.values()))
    assert verify_folder(folder).problems == []
    assert ("own call" in said) == (with_bos != own)
    assert (f"begin with {BOS} (1)" in said) == with_bos
    output = remit("inspect", "--shards", folder.path)[1]
    assert (f"begin with {BOS} (1)" in output) == with_bos
    assert f"end with {EOS} (0)" in output


def test_bos_that_is_not_there_is_found(tmp_path: Path, packed: Callable, remit: Callable) -> None:
    folder, _ = packed(save(byte_level(bos=True), tmp_path / "tok"), "--bos", "never")
    file = Path(folder.path) / "_manifest.json"
    text = file.read_text().split("\n", 2)[2].replace('"bos_token_id": null', '"bos_token_id": 1')
    file.write_text(f'{{\n "checksum": "{hashlib.sha256(text.encode()).hexdigest()}",\n{text}')
    wrong = ("does not begin with BOS", "metadata", "is not of a part of this manifest")
    assert any(one in line for line in verify_folder(ShardFolder(folder.path)).problems for one in wrong)


def test_always_without_a_bos_token_is_refused(tmp_path: Path, corpus: Path, remit: Callable) -> None:
    tokenizer = save(byte_level(), tmp_path / "tok", bos_token=None)
    code, _, error = remit(
        "pack", "--corpus", corpus, "--tokenizer", tokenizer, "--out", tmp_path / "p", "--bos", "always"
    )
    assert code == 1
    assert "names no BOS token" in error


def test_an_end_token_of_the_config_alone(tmp_path: Path, packed: Callable) -> None:
    tokenizer = save(byte_level(), tmp_path / "tok", eos_token="<|end|>")
    folder, _ = packed(tokenizer)
    assert folder.manifest.tokenizer["eos_token_id"] == SIZE
    copy = transformers.AutoTokenizer.from_pretrained(Path(folder.path) / "_tokenizer")
    assert copy.decode([SIZE]) == "<|end|>"
    assert verify_folder(folder).problems == []


def test_what_the_tokenizer_drops_is_said(tmp_path: Path, corpus: Path, packed: Callable) -> None:
    lossy = Tokenizer(models.BPE())
    lossy.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    lossy.train_from_iterator([LONG], trainers.BpeTrainer(special_tokens=[EOS, BOS], show_progress=False))
    folder, said = packed(save(lossy, tmp_path / "tok"))
    file = folder.manifest.corpus[0]
    assert file.documents_sampled == min(32, sum(bool(text) for text in [*TEXTS, LONG, *TEXTS]))
    assert file.documents_changed > 20
    assert "sampled documents do not decode to what they were" in said
    unknown = Tokenizer(models.WordLevel({"hello": 3, EOS: 0, BOS: 1, "<unk>": 2}, unk_token="<unk>"))
    unknown.pre_tokenizer = pre_tokenizers.Whitespace()
    unknown.add_special_tokens([EOS, BOS, "<unk>"])
    folder, said = packed(save(unknown, tmp_path / "tok2"), out="packed2")
    table = pyarrow.dataset.dataset(folder.path, format="arrow").to_table()
    ids = np.concatenate(table["input_ids"].to_pylist())
    assert folder.manifest.corpus[0].unknown_tokens == (ids == 2).sum() > 0
    assert "the tokenizer cannot spell this text" in said


def test_the_sample_is_a_few_of_many(tmp_path: Path, tokenizer_folder: Path, remit: Callable) -> None:
    texts = [f"document {i}" for i in range(500)]
    corpus = write_corpus(tmp_path / "many.jsonl", ["x " * 100_000, *texts])
    code, output, error = remit(
        "pack", "--corpus", corpus, "--tokenizer", tokenizer_folder, "--out", tmp_path / "p", "--seq-len", 16
    )
    assert (code, "32 of 32 sampled documents decode to what they were" in output) == (0, True), error


def test_ids_that_occur(tmp_path: Path, packed: Callable) -> None:
    folder, _ = packed(save(byte_level(bos=True), tmp_path / "tok"))
    table = pyarrow.dataset.dataset(folder.path, format="arrow").to_table()
    ids = np.concatenate(table["input_ids"].to_pylist())
    assert np.flatnonzero(folder.token_ids()).tolist() == np.unique(ids).tolist()
    counts = {EOS: int((ids == 0).sum()), BOS: int((ids == 1).sum())}
    assert folder.manifest.tokenizer["added_tokens"] == counts
    for name in (Path(folder.path) / "_tokenizer").iterdir():
        data = bytearray(name.read_bytes())
        data[len(data) // 2] ^= 1
        name.write_bytes(bytes(data))
        assert any(name.name in line for line in verify_folder(folder).problems), name
        with pytest.raises(ValueError, match=name.name):
            RowReader(folder, "packed", None, 10**6)
        data[len(data) // 2] ^= 1
        name.write_bytes(bytes(data))
    (Path(folder.path) / "_tokenizer" / "other.json").write_text("{}")
    assert any("other.json" in line for line in verify_folder(folder).problems)


@pytest.mark.parametrize("seed", range(20))
def test_ranges_of_ids_there_and_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    occurs = rng.random(rng.integers(0, 200)) < rng.choice([0, 0.1, 0.9, 1])
    again = decode_token_ids(encode_token_ids(occurs), "x")
    assert np.flatnonzero(again).tolist() == np.flatnonzero(occurs).tolist()


def change_tokenizer(folder: Path, change: Callable[[dict], None]) -> Path:
    """Edit the tokenizer.json of a folder."""
    value = json.loads((folder / "tokenizer.json").read_text())
    change(value)
    (folder / "tokenizer.json").write_text(json.dumps(value))
    return folder


def added(value: dict, content: str, index: int) -> None:
    value["added_tokens"].append(
        {"id": index, "content": content, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
    )  # fmt: skip


def rename(value: dict, old: str, new: str) -> None:
    for token in value["added_tokens"]:
        if token["content"] == old:
            token["content"] = new
    value["model"]["vocab"] = {new if key == old else key: its for key, its in value["model"]["vocab"].items()}


def flip_special(value: dict) -> None:
    value["added_tokens"][2]["special"] = False


HARMLESS = {
    "a pad token more": lambda value: added(value, "<pad>", SIZE),
    "an unused token renamed": lambda value: rename(value, "<|unused|>", "<|tool|>"),
    "a flag": flip_special,
    "spelled otherwise": lambda value: value["pre_tokenizer"].pop("use_regex"),
    "another post-processor": lambda value: value.update(post_processor=None),
}
HARMFUL = {
    "the end token renamed": (lambda value: rename(value, EOS, "<|stop|>"), rf"{EOS[2:-2]}.*where it occurs 37 times"),
    "merges": (lambda value: value["model"]["merges"].pop(), "merges differ"),
    "normalizer": (lambda value: value.update(normalizer={"type": "NFC"}), "normalizer"),
    "pre-tokenizer": (lambda value: value["pre_tokenizer"].update(add_prefix_space=True), "pre_tokenizer"),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_tokenizers_may_differ_in_what_no_row_has(tmp_path: Path, packed: Callable, remit: Callable, kind: str) -> None:
    base = save(byte_level(), make_model(tmp_path / "base", "Llama", vocab_size=SIZE))
    folder, _ = packed(base)
    reference = save(byte_level(), make_model(tmp_path / "rl", "Llama", vocab_size=SIZE + 1))
    change_tokenizer(reference, HARMLESS[kind])
    said = ""
    for number, command in enumerate(
        (
            ("score", "--shards", folder.path, "--model", reference, "--engine", "fake"),
            ("train", "--shards", folder.path, "--model", reference, "--objective", "ntp", "--max-steps", 1,
             "--global-batch-size", 2),
        )
    ):  # fmt: skip
        code, _, error = remit(*command, "--out", tmp_path / f"out{number}")
        assert code == 0, error
        said += error
    differs = kind in ("a pad token more", "an unused token renamed")
    assert said.count("differs in tokens that no row has") == 2 * differs
    entry = ShardFolder(tmp_path / "out0").manifest.references["rl"]
    recorded = json.loads((tmp_path / "out1" / "run.json").read_text())
    assert ("tokenizer_differences" in entry) == differs == ("tokenizer_differences" in recorded)


@pytest.mark.parametrize("kind", HARMFUL)
def test_tokenizers_that_differ_where_it_matters_are_refused(
    tmp_path: Path, packed: Callable, remit: Callable, kind: str
) -> None:
    change, message = HARMFUL[kind]
    base = save(byte_level(), make_model(tmp_path / "base", "Llama", vocab_size=SIZE))
    folder, _ = packed(base)
    other = change_tokenizer(shutil.copytree(base, tmp_path / "other"), change)
    for command in (
        ("score", "--shards", folder.path, "--model", other, "--engine", "fake"),
        ("train", "--shards", folder.path, "--model", other, "--objective", "ntp", "--max-steps", 1),
    ):
        code, _, error = remit(*command, "--out", tmp_path / "out")
        assert code == 1
        line = error.strip().splitlines()[-1]
        assert "is not the one that packed" in line
        assert re.search(message, line), line
        assert not (tmp_path / "out").exists()


def test_embedding_rows_are_compared_with_the_ids_that_occur(
    tmp_path: Path, corpus: Path, packed: Callable, remit: Callable
) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<image>", special=True)])  # one beyond the embedding
    base = save(tokenizer, make_model(tmp_path / "base", "Llama", vocab_size=SIZE))
    folder, _ = packed(base)
    train = ("train", "--model", base, "--objective", "ntp", "--max-steps", 1, "--global-batch-size", 2)
    code, _, error = remit(*train, "--shards", folder.path, "--out", tmp_path / "run")
    assert code == 0, error
    write_corpus(corpus, [*TEXTS, "an <image> here"])
    folder, _ = packed(base, out="with")
    for command in (train, ("score", "--model", base, "--engine", "fake")):
        code, _, error = remit(*command, "--shards", folder.path, "--out", tmp_path / "out")
        assert code == 1
        assert f"has {SIZE} embedding rows" in error
        assert f"'<image>' (id {SIZE})" in error


def test_another_end_token_of_the_base_is_said(tmp_path: Path, packed: Callable, remit: Callable) -> None:
    base = save(byte_level(), make_model(tmp_path / "base", "Llama", vocab_size=SIZE))
    folder, _ = packed(base)
    other = save(byte_level(), shutil.copytree(base, tmp_path / "other"), eos_token=BOS)
    for model, expected in ((base, False), (other, True)):
        code, _, error = remit(
            "train", "--shards", folder.path, "--model", model, "--objective", "ntp", "--max-steps", 1,
            "--global-batch-size", 2, "--out", tmp_path / f"run{expected}",
        )  # fmt: skip
        assert code == 0, error
        assert (
            f"documents in the rows end with '{EOS}' (0), the base's own end token is '{BOS}' (1)" in error
        ) == expected


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "TokenizersBackend"])
def test_the_export_gives_the_ids_of_the_file(tmp_path: Path, packed: Callable, remit: Callable, name: str) -> None:
    base = save(byte_level(), make_model(tmp_path / "base", "Llama", vocab_size=SIZE), tokenizer_class=name)
    folder, _ = packed(base)
    code, _, error = remit(
        "train", "--shards", folder.path, "--model", base, "--objective", "ntp", "--max-steps", 1,
        "--global-batch-size", 2, "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, error
    exported = tmp_path / "run" / "model"
    loaded = transformers.AutoTokenizer.from_pretrained(exported)
    oracle = Tokenizer.from_file(str(base / "tokenizer.json"))
    assert [loaded(text)["input_ids"] for text in TEXTS] == [oracle.encode(text).ids for text in TEXTS]
    assert (exported / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    same = (exported / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()
    assert same == (name == "TokenizersBackend")
    assert ("the exported model will name" in error) != same


def test_a_file_that_adds_nothing_is_left_as_it_is(tmp_path: Path, packed: Callable) -> None:
    tokenizer = save(byte_level(), tmp_path / "tok")
    config = (tokenizer / "tokenizer_config.json").read_bytes()
    folder, said = packed(tokenizer)
    assert "would put others" not in said
    assert (Path(folder.path) / "_tokenizer" / "tokenizer_config.json").read_bytes() == config


@pytest.mark.parametrize("kind", ["WordLevel", "Unigram"])
def test_a_vocabulary_without_an_unknown_token(tmp_path: Path, remit: Callable, kind: str) -> None:
    words = {EOS: 0, BOS: 1, "ACGT": 2, "TTAG": 3}
    made = (
        models.WordLevel(words)
        if kind == "WordLevel"
        else models.Unigram([*((word, -1.0) for word in words), *((letter, -9.0) for letter in "ACGT")])
    )
    tokenizer = Tokenizer(made)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([EOS, BOS])
    corpus = write_corpus(tmp_path / "dna.jsonl", ["ACGT TTAG ACGT", "TTAG"])
    code, _, error = remit(
        "pack", "--corpus", corpus, "--tokenizer", save(tokenizer, tmp_path / "tok"), "--out", tmp_path / "p",
        "--seq-len", 4,
    )  # fmt: skip
    assert code == 0, error
    ids = pyarrow.dataset.dataset(tmp_path / "p", format="arrow").to_table()["input_ids"].to_pylist()
    assert ids == [[2, 3, 2, 0], [3, 0]]
    write_corpus(corpus, ["ACGT x"])
    code, _, error = remit("pack", "--corpus", corpus, "--tokenizer", tmp_path / "tok", "--out", tmp_path / "q")
    assert (code, "the tokenizer cannot encode a document" in error) == (1, True), error


def test_the_end_token_of_the_config_is_the_models_too(tmp_path: Path, packed: Callable, remit: Callable) -> None:
    base = save(byte_level(), make_model(tmp_path / "base", "Llama", vocab_size=SIZE + 1), eos_token="<|end|>")
    folder, _ = packed(base)
    for number, command in enumerate(
        (("score", "--engine", "fake"), ("train", "--objective", "ntp", "--max-steps", 1))
    ):
        code, _, error = remit(*command, "--shards", folder.path, "--model", base, "--out", tmp_path / f"out{number}")
        assert code == 0, error


def test_unigram_scores_are_compared() -> None:
    ours, theirs = (
        {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["ab", score]]}, "added_tokens": []}
        for score in (-2.0, -3.0)
    )
    assert "'ab' has the score -2" in disagreement(ours, theirs, np.ones(2, bool), {})


def test_a_manifest_names_no_file_elsewhere(tmp_path: Path, packed: Callable) -> None:
    folder, _ = packed(save(byte_level(), tmp_path / "tok"))
    tokenizer = folder.manifest.tokenizer
    for name in ("../evil.txt", "a/b", ".hidden", "..", "a\\b"):
        manifest = replace(folder.manifest, tokenizer=tokenizer | {"files": tokenizer["files"] | {name: "0" * 64}})
        target = tmp_path / name.encode().hex()
        manifest.write(target)
        with pytest.raises(ValueError, match="is not a name in _tokenizer"):
            ShardFolder(target)


def test_a_changed_template_does_not_stop_a_resume(tmp_path: Path, corpus: Path, remit: Callable) -> None:
    tokenizer = save(byte_level(), tmp_path / "tok", chat_template="{{ messages }}")
    pack = ("pack", "--corpus", corpus, "--tokenizer", tokenizer, "--out", tmp_path / "p", "--seq-len", 17)
    assert remit(*pack)[0] == 0
    whole = (tmp_path / "p" / "_manifest.json").read_bytes()
    (tmp_path / "p" / "_commits" / "part-00000.json").unlink()
    save(byte_level(), tokenizer, chat_template="{{ other }}")
    code, _, error = remit(*pack)
    assert code == 0, error
    assert (tmp_path / "p" / "_manifest.json").read_bytes() == whole
    assert verify_folder(ShardFolder(tmp_path / "p")).problems == []
