"""The prompts of the rollouts: the text so far, the budget, and an opened thought.

Plain, for a base: the tokens of the text, then <24> (the budget in tokens; left out without one), then <think>. Chat, for
a model whose tokenizer has a chat template: an instruction with the text and the budget as the user's turn, and <think>
as the beginning of the answer. A completion goes on with the thought, </think>, and the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

OPEN, CLOSE = "<think>", "</think>"
Answer = Literal["token", "boxed", "none"]
"""What follows the thought: the next token itself, text in \\boxed{}, or nothing (RLP scores the true token there)."""

INSTRUCTION = "Think about how the text below goes on{budget}, between <think> and </think>. {answer}\n\nText:\n{text}"
BUDGET = ", in exactly {tokens} tokens"
ANSWERS = {
    "token": "Right after </think> write the next token of the text, and nothing else.",
    "boxed": "After </think> write the text that comes next in \\boxed{}.",
    "none": "Right after </think> go on with the text.",
}


@dataclass(frozen=True)
class Prompter:
    """tokenizer: of the base, a fast one of transformers. max_prefix: of a longer text the last so many tokens are given."""

    tokenizer: Any
    chat: bool
    answer: Answer
    max_prefix: int

    def prompt(self, prefix_ids: Sequence[int], budget: int | None) -> list[int]:
        """Token ids up to the beginning of the thought. prefix_ids: the document's tokens before the position."""
        prefix = list(prefix_ids[-self.max_prefix :])
        ids, most = self._render(prefix, budget), self.max_prefix + self.overhead
        while len(ids) > most:  # in a chat the text is encoded again, by other tokens perhaps
            prefix = prefix[len(ids) - most :]
            ids = self._render(prefix, budget)
        return ids

    def _render(self, prefix: list[int], budget: int | None) -> list[int]:
        if not self.chat:
            return prefix + self.encode(OPEN if budget is None else f"<{budget}>{OPEN}")
        asked = "" if budget is None else BUDGET.format(tokens=budget)
        text = self.tokenizer.decode(prefix, skip_special_tokens=True)
        content = INSTRUCTION.format(budget=asked, answer=ANSWERS[self.answer], text=text)
        messages = [{"role": "user", "content": content}]
        rendered: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if not rendered.rstrip().endswith(OPEN):  # some templates open the thought themselves
            rendered += OPEN
        return self.encode(rendered)

    def answer_ids(self, target: int) -> list[int]:
        """The ids of the right answer after the closed thought, for the warm-up."""
        if self.answer == "boxed":
            return [*self.encode("\\boxed{"), target, *self.encode("}"), self.tokenizer.eos_token_id]
        return [target]

    @cached_property
    def close_ids(self) -> list[int]:
        return self.encode(CLOSE)

    @cached_property
    def overhead(self) -> int:
        """Most tokens of a prompt beside those of the prefix."""
        return len(self._render([], 99_999)) + 1

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids
