"""Prompts as they are written, plain and through a chat template, and the two halves of a rollout with scripted engines."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pipelines.rmt.answers import read_completion, token_bytes
from pipelines.rmt.engine import Sampled, Sampling
from pipelines.rmt.evaluation import thought_limit
from pipelines.rmt.losses import closed
from pipelines.rmt.positions import Position
from pipelines.rmt.prompts import Prompter
from pipelines.rmt.rollouts import Rollout, Shape, outcome, sample_rollouts
from pipelines.rmt.settings import RmtConfig
from pipelines.rmt.setup import make_prompter
from pipelines.rmt.warmup import format_rows

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tokenizer_folder)


def test_a_plain_prompt_is_text_budget_and_tag(tokenizer: Any) -> None:
    prefix = tokenizer.encode("import os\nimport")
    prompter = Prompter(tokenizer, chat=False, answer="token", max_prefix=64)
    assert tokenizer.decode(prompter.prompt(prefix, 24)) == "import os\nimport<24><think>"
    assert tokenizer.decode(prompter.prompt(prefix, None)) == "import os\nimport<think>"
    assert prompter.prompt(prefix, 24)[: len(prefix)] == prefix  # the very tokens, not the text again
    short = Prompter(tokenizer, chat=False, answer="token", max_prefix=2)
    assert short.prompt(prefix, None)[:2] == prefix[-2:]


def test_a_chat_prompt_asks_for_exactly_the_budget_and_opens_the_thought_once(tokenizer: Any) -> None:
    prefix = tokenizer.encode("import os\nimport")
    tokenizer.chat_template = TEMPLATE
    prompter = Prompter(tokenizer, chat=True, answer="boxed", max_prefix=64)
    text = tokenizer.decode(prompter.prompt(prefix, 24))
    assert text.startswith("[user] ")
    assert "exactly 24 tokens" in text
    assert "\\boxed{}" in text
    assert text.endswith("\n\n<text>import os\nimport</text>\n[assistant] <think>")
    assert "exactly" not in tokenizer.decode(prompter.prompt(prefix, None))
    tokenizer.chat_template = TEMPLATE.replace("[assistant] {%", "[assistant] <think>\n{%")
    prompter = Prompter(tokenizer, chat=True, answer="boxed", max_prefix=64)
    assert tokenizer.decode(prompter.prompt(prefix, 24)).endswith("import</text>\n[assistant] <think>\n")


TRIMS = "{% for m in messages %}<{{m.role}}>\n{{ m.content | trim }}{% endfor %}{% if add_generation_prompt %}\n<a>{% endif %}"


def test_a_chat_prompt_holds_the_very_tokens_of_the_text(tokenizer: Any) -> None:
    tokenizer.chat_template = TRIMS
    prompter = Prompter(tokenizer, chat=True, answer="token", max_prefix=40)
    texts = ["def f(x):", "def f(x):\n", "def f(x):\n        ", "  \n x", "漢字", "a , b . It 's", "", "é" * 30]
    prefixes = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    # some end inside a character, some are tokens that no text comes out as
    prefixes += [prefixes[4][:size] for size in range(1, len(prefixes[4]))] + [[300, 5, 77, 7]]
    found = [prompter.prompt(prefix, 5) for prefix in prefixes]
    for prefix, prompt in zip(prefixes, found, strict=True):
        kept = prefix[-40:]
        assert any(prompt[at : at + len(kept)] == kept for at in range(len(prompt)))
        assert len(prompt) == len(found[6]) + len(kept) <= 40 + prompter.overhead
    assert len(set(map(tuple, found))) == len(prefixes)


def test_special_tokens_of_a_text_have_no_meaning_in_a_chat(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    prompter = Prompter(tokenizer, chat=True, answer="token", max_prefix=64)
    end = tokenizer.eos_token_id
    prompt = prompter.prompt([*tokenizer.encode("a b"), end, *tokenizer.encode(" c")], None)
    assert end not in prompt
    assert "<text>a b<|endoftext|> c</text>" in tokenizer.decode(prompt)
    tokenizer.bos_token = "<|endoftext|>"
    assert "<text>a b</text>" in tokenizer.decode(prompter.prompt([end, *tokenizer.encode("a b")], None))
    assert tokenizer.encode("<|endoftext|>") == [end]  # the tokenizer is as it was


def test_a_template_without_the_text_is_refused_and_dates_stand_still(tokenizer: Any) -> None:
    for template in (
        "fixed",
        "{{ messages[0].content }}{{ messages[0].content }}",
        "{{ messages[0].content | lower }}",
    ):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match="--prompt plain"):
            Prompter(tokenizer, chat=True, answer="token", max_prefix=9).prompt([5], None)
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d %H:%M:%S %f') }} {{ messages[0].content }}"
    prompts = {tuple(Prompter(tokenizer, True, "token", 9).prompt([5], None)) for _ in range(3)}
    assert len(prompts) == 1


def sentencepiece(kind: str) -> Any:
    """As Llama's: a space before what it takes for a beginning, all other characters as bytes."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    space = "\u2581"
    if kind == "prepend":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    inner.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special)
    inner.train_from_iterator(["hello the world <think> and </think> boxed {3} <24> </text>\n"] * 9, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["prepend", "first", "always", "never"])
def test_no_space_comes_before_a_tag_of_a_sentencepiece_tokenizer(kind: str) -> None:
    tokenizer = sentencepiece(kind)
    prompter = Prompter(tokenizer, chat=False, answer="boxed", max_prefix=64)
    prefix = tokenizer.encode("hello", add_special_tokens=False)
    spelled = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)  # noqa: E731
    before = spelled(prefix)
    assert spelled(prompter.prompt(prefix, 24)) == f"{before}<24><think>"
    assert spelled([*prefix, *prompter.close_ids]) == f"{before}</think>"
    target = tokenizer.convert_tokens_to_ids("\u2581the") if kind == "always" else prefix[-1]
    answer = spelled(prompter.answer_ids(target)[:-1])
    assert answer == f"\\boxed{{{spelled([target])}}}"
    thought = [*prefix, *prefix]
    read = read_completion([*thought, *prompter.close_ids, 5], token_bytes(tokenizer, len(tokenizer)), b"</think>")
    assert (read.thought_tokens, read.answer_ids) == (len(thought), (5,))


@pytest.mark.parametrize("reward", ["match", "prefix", "gain"])
@pytest.mark.parametrize("budget", ["on", "off"])
def test_the_longest_sequence_fits_the_models_positions(
    tokenizer: Any, tmp_path: Path, reward: str, budget: str
) -> None:
    """A thought that is cut off just before its tag is whole, and is closed with a whole tag where the gain is asked for."""
    settings = RmtConfig(
        shards="s", model="m", out=tmp_path / "run", first_budget=8, max_answer=9, reward=reward, budget=budget,  # type: ignore[arg-type]
        baseline="rl" if reward == "gain" else None,
    )  # fmt: skip
    prompter = make_prompter(settings, tokenizer, 80)
    asked = 8 if budget == "on" else None
    sampled = prompter.prompt(range(1, 200), asked) + [5] * thought_limit(settings, prompter, asked)
    after = {"match": 1, "prefix": 9, "gain": len(tokenizer.encode("</think>")) + 1}[reward]
    assert 80 - 16 < len(sampled) + after <= 80


def test_a_thought_that_did_not_end_is_closed_for_the_true_token(tokenizer: Any) -> None:
    prompter = Prompter(tokenizer, chat=False, answer="none", max_prefix=64, more_ends=(7,))
    spelled, end = token_bytes(tokenizer, 600), tokenizer.eos_token_id
    so, close = (tokenizer.encode(text, add_special_tokens=False) for text in ("so so", "</think>"))
    for ids in ([*so, *close], so, [*so, end], [*so, 7], [*so, end, end]):
        rollout = Rollout((9,), tuple(ids), (0.0,) * len(ids), read_completion(ids, spelled, b"</think>"))
        assert closed(rollout, prompter) == [*so, *close]


class Scripted:
    """Says what it is told to, one list of texts per call."""

    def __init__(self, tokenizer: Any, *calls: list[list[str]]) -> None:
        self.tokenizer, self.calls = tokenizer, list(calls)
        self.asked: list[tuple[list[list[int]], list[Sampling]]] = []

    def __call__(self, prompts: list[list[int]], samplings: list[Sampling], seed: int) -> list[list[Sampled]]:
        self.asked.append((prompts, samplings))
        said = self.calls.pop(0)
        return [[self._sampled(text) for text in texts] for texts in said]

    def _sampled(self, text: str) -> Sampled:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return Sampled(tuple(ids), tuple(-float(index) for index in range(len(ids))))


def position(tokenizer: Any, prefix: str, rest: str) -> Position:
    return Position(0, 0, 1, 1.0, tuple(tokenizer.encode(prefix)), tuple(tokenizer.encode(rest)), float("nan"))


def test_only_closed_thoughts_are_asked_for_an_answer(tokenizer: Any) -> None:
    here = position(tokenizer, "a = ", "self.x")
    target = tokenizer.decode([here.target])
    engine = Scripted(tokenizer, [["so</think>", "so so so", "</think>"]], [[target], ["zz"]])
    shape = Shape(3, 20, "token", 9, 0.7)
    (rollouts,) = sample_rollouts(engine, [here.prefix_ids], shape, token_bytes(tokenizer, 600), 5)
    thinking, answering = engine.asked
    assert thinking[1] == [Sampling(3, 20, 0.7, "</think>")]
    assert [tokenizer.decode(prompt) for prompt in answering[0]] == ["a = so</think>", "a = </think>"]
    assert answering[1] == [Sampling(1, 1, 0.7)] * 2
    assert [tokenizer.decode(rollout.completion_ids) for rollout in rollouts] == [
        f"so</think>{target}", "so so so", "</think>zz",
    ]  # fmt: skip
    assert [len(rollout.logprobs) == len(rollout.completion_ids) for rollout in rollouts] == [True] * 3
    spelled = token_bytes(tokenizer, 600)
    assert [outcome(rollout, here, "token", spelled) for rollout in rollouts] == [1, 0, 0]
    assert [rollout.completion.closed for rollout in rollouts] == [True, False, True]


def test_a_boxed_answer_is_compared_byte_by_byte(tokenizer: Any) -> None:
    here = position(tokenizer, "a = ", "self.x = x")
    first = tokenizer.decode([here.target])
    said = [f"\\boxed{{{first}}}", "\\boxed{selfish}", "nothing"]
    engine = Scripted(tokenizer, [["t</think>"] * 3], [[text] for text in said])
    spelled = token_bytes(tokenizer, 600)
    (rollouts,) = sample_rollouts(engine, [here.prefix_ids], Shape(3, 20, "boxed", 9, 0.7), spelled, 5)
    assert engine.asked[1][1][0].max_tokens == 9
    assert [outcome(rollout, here, "boxed", spelled) for rollout in rollouts] == [1, 0, 0]


def test_a_warm_up_row_is_a_prompt_an_own_thought_and_the_truth(tokenizer: Any) -> None:
    here = position(tokenizer, "a = ", "self.x = x")
    target = tokenizer.decode([here.target])
    for answer, ending in (("token", target), ("none", target), ("boxed", f"\\boxed{{{target}}}<|endoftext|>")):
        engine = Scripted(tokenizer, [["foo bar<|endoftext|>"]])
        prompter = Prompter(tokenizer, chat=False, answer=answer, max_prefix=64)  # type: ignore[arg-type]
        (row,) = format_rows(engine, [here], [7], prompter, True, 0.8, 0)
        thought = len(tokenizer.encode("foo bar"))
        text = tokenizer.decode(row.input_ids)
        assert text == f"a = <{thought}><think>foo bar</think>{ending}"  # the budget is what the thought has
        assert engine.asked[0][1] == [Sampling(1, 7, 0.8)]
        predicted = tokenizer.decode(row.input_ids[row.predicted])
        assert predicted == f"foo bar</think>{ending}"
