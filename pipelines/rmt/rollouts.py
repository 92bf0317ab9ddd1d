"""Rollouts: a thought, then the prediction. Sampled in two halves, so that a thought may end anywhere.

In: prompts. Out: completions with the log-prob of each token, all of them sampled, taken apart by answers.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.rmt.answers import Completion, boxed, match_reward, prefix_reward, read_completion
from pipelines.rmt.engine import Sampled, Sampler, Sampling
from pipelines.rmt.positions import Position
from pipelines.rmt.prompts import CLOSE, Answer


@dataclass(frozen=True)
class Rollout:
    """One completion of a prompt."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    completion: Completion


@dataclass(frozen=True)
class Shape:
    """count: rollouts of each prompt; most_thought: tokens of a thought and its closing tag; answer: what follows it;
    max_answer: tokens of a boxed one; temperature: of the sampling."""

    count: int
    most_thought: int
    answer: Answer
    max_answer: int
    temperature: float


def sample_rollouts(
    sample: Sampler, prompts: Sequence[Sequence[int]], shape: Shape, token_bytes: Sequence[bytes], seed: int
) -> list[list[Rollout]]:
    """`shape.count` rollouts of each prompt."""
    thinking = Sampling(shape.count, shape.most_thought, shape.temperature, CLOSE)
    thoughts = sample([list(prompt) for prompt in prompts], [thinking] * len(prompts), 2 * seed)
    parts = [
        [(thought, read_completion(thought.token_ids, token_bytes, CLOSE.encode())) for thought in group]
        for group in thoughts
    ]
    # a tag that ends inside a token leaves no place for an answer that begins with one
    asked = [
        (number, index, [*prompts[number], *thought.token_ids])
        for number, group in enumerate(parts)
        for index, (thought, read) in enumerate(group)
        if shape.answer != "none" and read.closed and _ends_clean(thought, token_bytes)
    ]
    answering = Sampling(1, 1 if shape.answer == "token" else shape.max_answer, shape.temperature)
    answers = sample([prompt for *_, prompt in asked], [answering] * len(asked), 2 * seed + 1) if asked else []
    found = {(number, index): answer[0] for (number, index, _), answer in zip(asked, answers, strict=True)}
    nothing = Sampled((), ())
    rollouts = []
    for number, group in enumerate(parts):
        of_prompt = []
        for index, (thought, _) in enumerate(group):
            answer = found.get((number, index), nothing)
            ids, logprobs = thought.token_ids + answer.token_ids, thought.logprobs + answer.logprobs
            read = read_completion(ids, token_bytes, CLOSE.encode())
            of_prompt.append(Rollout(tuple(prompts[number]), ids, logprobs, read))
        rollouts.append(of_prompt)
    return rollouts


def _ends_clean(thought: Sampled, token_bytes: Sequence[bytes]) -> bool:
    return b"".join(token_bytes[index] for index in thought.token_ids).endswith(CLOSE.encode())


def outcome(rollout: Rollout, position: Position, answer: Answer, token_bytes: Sequence[bytes]) -> float:
    """Whether a rollout has predicted what stands there: `match_reward` of a token, `prefix_reward` of a box."""
    ids = rollout.completion.answer_ids
    if answer == "token":
        return match_reward(ids, position.target)
    text = b"".join(token_bytes[index] for index in ids)
    return prefix_reward(boxed(text), [token_bytes[index] for index in position.continuation_ids])
