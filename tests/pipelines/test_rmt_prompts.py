"""Prompts as they are written, plain and through a chat template, and the two halves of a rollout with scripted engines."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from pipelines.rmt.answers import token_bytes
from pipelines.rmt.engine import Sampled, Sampling
from pipelines.rmt.positions import Position
from pipelines.rmt.prompts import Prompter
from pipelines.rmt.rollouts import Shape, outcome, sample_rollouts
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
    assert text.endswith("Text:\nimport os\nimport\n[assistant] <think>")
    assert "exactly" not in tokenizer.decode(prompter.prompt(prefix, None))
    tokenizer.chat_template = TEMPLATE.replace("[assistant] {%", "[assistant] <think>\n{%")
    assert tokenizer.decode(prompter.prompt(prefix, 24)).endswith("import\n[assistant] <think>\n")


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
