"""Verifiable rewards for reinforcement learning: one number per completion."""

import hashlib
import importlib
import math
import os
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from shards.part import sha256_file

Reward = Callable[..., list[float]]
MARK = "Answer:"


def final_answer(completion: str) -> str | None:
    """The text after the last "Answer:", up to the end of its line, without space around it; None without one."""
    _, mark, rest = completion.rpartition(MARK)
    return rest.partition("\n")[0].strip() if mark else None


def answer_reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 where the completion's final answer is `answer`, character for character, else 0."""
    return [float(final_answer(text) == expected.strip()) for text, expected in zip(completions, answer, strict=True)]


def reward_source(name: str) -> Path | None:
    """Where the code behind --reward lies: a module's file, or the folder of a package, with all its modules.

    None for the reward of this project and where there is no such module. Looks in this folder first, as load_reward
    does, and imports nothing. What the code imports from elsewhere is not followed.
    """
    if name == "answer":
        return None
    importlib.invalidate_caches()
    package = name.partition(":")[0].partition(".")[0]
    spec = PathFinder.find_spec(package, [os.getcwd(), *sys.path])
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).absolute()
    origin = Path(spec.origin or "").absolute()
    return origin if origin.is_file() else None


def reward_fingerprint(name: str) -> str | None:
    """sha256 over the *.py files behind --reward; None where reward_source finds none."""
    source = reward_source(name)
    if source is None:
        return None
    files = [source] if source.is_file() else sorted(source.rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(source.parent)} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


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
