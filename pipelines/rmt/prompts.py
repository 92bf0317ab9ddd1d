"""The prompts of the rollouts: the text so far, the budget, and an opened thought.

Plain, for a base: the tokens of the text, then <24> (the budget in tokens; left out without one), then <think>. Chat, for
a model whose tokenizer has a chat template: an instruction with the budget as the user's turn, in it the tokens of the
text between <text> and </text>, and <think> as the beginning of the answer. A completion goes on with the thought, </think>,
and the answer.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

OPEN, CLOSE = "<think>", "</think>"
Answer = Literal["token", "boxed", "none"]
"""What follows the thought: the next token itself, text in \\boxed{}, or nothing (RLP scores the true token there)."""

INSTRUCTION = (
    "Think about how the text between <text> and </text> goes on{budget}, between <think> and </think>. {answer}\n\n"
    "<text>{text}</text>"
)
PLACE = "REMITPUTSTHETEXTHERE"
"""Stands for the text while a chat template is filled in."""
TODAY = datetime(2025, 1, 1)
"""The date for chat templates that ask for one."""
FIRST = ("\n", "a", "0", ".")
"""What may stand before a text while it is encoded."""
BUDGET = ", in exactly {tokens} tokens"
ANSWERS = {
    "token": "Right after </think> write the next token of the text, and nothing else.",
    "boxed": "After </think> write the text that comes next in \\boxed{}.",
    "none": "Right after </think> go on with the text.",
}


@dataclass(frozen=True)
class Prompter:
    """tokenizer: of the base, a fast one of transformers. max_prefix: of a longer text the last so many tokens are given.
    more_ends: tokens beside its end token that end what the model writes."""

    tokenizer: Any
    chat: bool
    answer: Answer
    max_prefix: int
    more_ends: tuple[int, ...] = ()

    def prompt(self, prefix_ids: Sequence[int], budget: int | None) -> list[int]:
        """Token ids up to the beginning of the thought. prefix_ids: the document's tokens before the position.

        The text keeps its very tokens, in a chat too: as text it might be trimmed by the template, end inside a character,
        or come out as other tokens.
        """
        before, after = self.frame(budget)
        text = self._without_special(prefix_ids) if self.chat else list(prefix_ids)
        return [*before, *text[-self.max_prefix :], *after]

    def frame(self, budget: int | None) -> tuple[list[int], list[int]]:
        """What a prompt has before its text and after it; ValueError where the chat template does not give a text back."""
        if budget not in self._frames:
            self._frames[budget] = self._chat_frame(budget) if self.chat else ([], self.encode(_opening(budget)))
        return self._frames[budget]

    def _chat_frame(self, budget: int | None) -> tuple[list[int], list[int]]:
        rendered = self._rendered(budget)
        before, place, after = rendered.partition(PLACE)
        if not place or PLACE in after:
            raise ValueError(
                f"the chat template of the tokenizer gives what the user says {rendered.count(PLACE)} times, expected once and "
                "unaltered; take --prompt plain"
            )
        return self.tokenizer.encode(before, add_special_tokens=False), self.encode(after)

    def _rendered(self, budget: int | None) -> str:
        asked = "" if budget is None else BUDGET.format(tokens=budget)
        content = INSTRUCTION.format(budget=asked, answer=ANSWERS[self.answer], text=PLACE)
        rendered: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            strftime_now=TODAY.strftime,  # a run has the same prompts on each of its days
        )
        # some templates open the thought themselves
        return rendered if rendered.rstrip().endswith(OPEN) else rendered + OPEN

    def _without_special(self, ids: Sequence[int]) -> list[int]:
        """The tokens of a text with none that has a meaning in a chat: the beginning token is left out, the others are
        spelled in ordinary tokens."""
        special = {*self.tokenizer.all_special_ids}
        rest = ids[1:] if ids and ids[0] == self.tokenizer.bos_token_id else ids
        return [part for index in rest for part in (self._spelled(index) if index in special else [index])]

    def _spelled(self, index: int) -> list[int]:
        return self.encode(self.tokenizer.convert_ids_to_tokens(index), split_special_tokens=True)

    def answer_ids(self, target: int) -> list[int]:
        """The ids of the right answer after the closed thought, for the warm-up."""
        if self.answer == "boxed":
            return [*self.encode("\\boxed{"), target, *self.encode("}"), self.tokenizer.eos_token_id]
        return [target]

    @cached_property
    def _frames(self) -> dict[int | None, tuple[list[int], list[int]]]:
        return {}

    @cached_property
    def close_ids(self) -> list[int]:
        return self.encode(CLOSE)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end what the model writes."""
        return frozenset((self.tokenizer.eos_token_id, *self.more_ends))

    @cached_property
    def overhead(self) -> int:
        """Most tokens of a prompt beside those of the prefix."""
        return sum(map(len, self.frame(99_999))) + 1

    @property
    def fingerprint(self) -> str:
        """sha256 of what surrounds the text in a prompt, with a budget and without, and of the closing tag."""
        frames = [self.frame(None), self.frame(24), self.close_ids]
        return hashlib.sha256(json.dumps(frames).encode()).hexdigest()

    def encode(self, text: str, **options: Any) -> list[int]:
        """Token ids of a text that stands behind another: some tokenizers (SentencePiece) put a space before what they take
        for a beginning."""

        def encoded(text: str) -> list[int]:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, **options)
            return ids

        for first in FIRST:
            before, ids = encoded(first), encoded(first + text)
            if before and ids[: len(before)] == before:
                return ids[len(before) :]
        raise ValueError(
            f"the tokenizer joins {text!r} with whatever stands before it, expected tokens of its own for it: remit rmt cannot "
            "write its tags with it"
        )


def _opening(budget: int | None) -> str:
    return OPEN if budget is None else f"<{budget}>{OPEN}"
