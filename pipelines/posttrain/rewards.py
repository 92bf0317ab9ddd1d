"""Verifiable rewards for reinforcement learning: one number per completion."""

import importlib
import math
import os
import sys
from collections.abc import Callable
from typing import Any

Reward = Callable[..., list[float]]
MARK = "Answer:"


def final_answer(completion: str) -> str | None:
    """The text after the last "Answer:", up to the end of its line, without space around it; None without one."""
    _, mark, rest = completion.rpartition(MARK)
    return rest.partition("\n")[0].strip() if mark else None


def answer_reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 where the completion's final answer is `answer`, character for character, else 0."""
    return [float(final_answer(text) == expected.strip()) for text, expected in zip(completions, answer, strict=True)]


def load_reward(name: str) -> Reward:
    """The function behind --reward; ValueError where there is none. One of the user's own is checked at each call."""
    if name == "answer":
        return answer_reward
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"--reward {name}: {error}; expected a module that Python finds from {os.getcwd()}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"--reward {name}: {module_name} has no function {function_name}")

    def checked(completions: list[str], **columns: Any) -> list[float]:
        rewards = function(completions=completions, **columns)
        if not isinstance(rewards, list | tuple) or len(rewards) != len(completions):
            raise ValueError(
                f"--reward {name} returned {repr(rewards)[:80]}, expected a list of {len(completions)} numbers, one per "
                "completion"
            )
        for reward in rewards:
            if isinstance(reward, str) or not math.isfinite(reward):
                raise ValueError(f"--reward {name} returned {reward!r} for a completion, expected a finite number")
        return [float(reward) for reward in rewards]

    checked.__name__ = function_name  # TRL names metrics after it
    return checked
