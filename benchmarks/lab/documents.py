"""Documents of the laboratory. Everything follows from a seed; nothing is downloaded.

Word problems with stepwise solutions (whose answers can be verified), lists of equations, and two kinds of plain text:
stories, which both mixes have, and notes, which the mid-training mix all but lacks. What a problem computes (its start
and its changes, whatever the names and things) decides by a hash whether it may be trained on or is held out; no
held-out computation is in any problem that is trained on, also not as some of its steps.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipelines.sample_corpus import NAMES, PLACES, TIMES, plain_text

Level = Literal["easy", "hard"]
LEVELS: tuple[Level, ...] = ("easy", "hard")
HELD_OUT_SHARE = 0.1  # of all computations
LARGEST = 50  # number in a right solution
THINGS = ["apples", "books", "coins", "eggs", "pens", "shells", "stones", "tickets"]
GAINS = ["buys {n} more", "finds {n} more", "gets {n} from a friend", "wins {n} in a game"]
LOSSES = ["gives {n} away", "loses {n} on the way", "sells {n}", "lends {n} to a neighbour"]
DOUBLES = ["doubles them", "finds as many again"]
WEATHER = ["rain", "fog", "sun", "snow", "wind", "frost"]
GOODS = ["bread", "cloth", "fish", "salt", "timber", "wool"]


@dataclass(frozen=True)
class Problem:
    """start: first number; changes: what happens to it, as ('+', n), ('-', n) or ('*', 2)."""

    name: str
    thing: str
    start: int
    changes: tuple[tuple[str, int], ...]
    sentences: tuple[str, ...]

    @property
    def prompt(self) -> str:
        story = " ".join([f"{self.name} has {self.start} {self.thing}.", *self.sentences])
        return f"{story} How many {self.thing} does {self.name} have now?\n"

    @property
    def answer(self) -> int:
        value = self.start
        for sign, number in self.changes:
            value = _apply(value, sign, number)
        return value

    @property
    def held_out(self) -> bool:
        """Whether the computation belongs to the held-out ones."""
        return _is_held_out(self.start, self.changes)

    @property
    def trainable(self) -> bool:
        """Whether neither the computation nor any two or more of its steps in a row belong to the held-out ones."""
        value = self.start
        for first, (sign, number) in enumerate(self.changes):
            for end in range(first + 2, len(self.changes) + 1):
                if _is_held_out(value, self.changes[first:end]):
                    return False
            value = _apply(value, sign, number)
        return True

    def solution(self, rng: random.Random | None = None, wrong_steps: float = 0.0) -> str:
        """Steps and answer. wrong_steps: share of the steps whose result is off; what follows goes on from it."""
        value, lines = self.start, []
        for sign, number in self.changes:
            result = _apply(value, sign, number)
            if rng is not None and rng.random() < wrong_steps:
                result = _off(rng, result)
            lines.append(f"{value}{sign}{number}={result}")
            value = result
        return "\n".join([*lines, f"Answer: {value}"]) + "\n"


def _is_held_out(start: int, changes: tuple[tuple[str, int], ...]) -> bool:
    text = f"{start}" + "".join(f"{sign}{number}" for sign, number in changes)
    return hashlib.sha256(text.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def _apply(value: int, sign: str, number: int) -> int:
    return {"+": value + number, "-": value - number, "*": value * number}[sign]


def _off(rng: random.Random, result: int) -> int:
    """Another number near by."""
    return result + rng.choice([-1, 1]) * rng.randint(1, 10)


def problem(rng: random.Random, level: Level, held_out: bool) -> Problem:
    """A random problem of a level, among the held-out computations or among those that may be trained on.

    easy: two changes by 1 to 9 from a start of 2 to 20. hard: three or four by up to 12, or doubling, from up to 30;
    no number is above 50.
    """
    while True:
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        value = start = rng.randint(2, 20) if level == "easy" else rng.randint(5, 30)
        changes: list[tuple[str, int]] = []
        sentences: list[str] = []
        for _ in range(2 if level == "easy" else rng.randint(3, 4)):
            number = rng.randint(1, 9 if level == "easy" else 12)
            kind = rng.random()
            if level == "hard" and kind < 0.15 and value <= LARGEST // 2:
                sign, number, sentence = "*", 2, rng.choice(DOUBLES)
            elif value < number or (kind < 0.55 and value + number <= LARGEST):
                sign, sentence = "+", rng.choice(GAINS).format(n=number)
            else:
                sign, sentence = "-", rng.choice(LOSSES).format(n=number)
            changes.append((sign, number))
            sentences.append(f"{name} {sentence}.")
            value = _apply(value, sign, number)
        made = Problem(name, thing, start, tuple(changes), tuple(sentences))
        if made.held_out if held_out else made.trainable:
            return made


def equations(rng: random.Random, wrong_steps: float) -> str:
    """A list of sums, some of them wrong."""
    lines = []
    for _ in range(rng.randint(4, 8)):
        one, other = rng.randint(0, LARGEST), rng.randint(1, 12)
        sign = "-" if one >= other and (one + other > LARGEST or rng.random() < 0.5) else "+"
        if one <= LARGEST // 2 and rng.random() < 0.1:
            sign, other = "*", 2
        result = _apply(one, sign, other)
        if rng.random() < wrong_steps:
            result = _off(rng, result)
        lines.append(f"{one}{sign}{other}={result}")
    return "\n".join(lines) + "\n"


def notes(rng: random.Random) -> str:
    """A log of a harbour or a market: plain text of another kind than the stories."""
    lines = [f"Report of the {rng.choice(PLACES)}, kept by {rng.choice(NAMES)}:"]
    for _ in range(rng.randint(2, 5)):
        weather, later = rng.sample(WEATHER, 2)
        goods = rng.choice(GOODS)
        lines.append(
            rng.choice(
                [
                    f"- {weather} {rng.choice(TIMES)}, then {later}; the {goods} stayed dry",
                    f"- a cart of {goods} for {rng.choice(NAMES)} from the {rng.choice(PLACES)}",
                    f"- no {goods} because of the {weather}; more {rng.choice(TIMES)}",
                ]
            )
        )
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Mix:
    """Shares of the documents; the rest are stories. wrong_steps: of the steps and equations."""

    problems: float
    equations: float
    notes: float
    wrong_steps: float
    hard: float = 0.5


PRETRAINING = Mix(problems=0.02, equations=0.5, notes=0.2, wrong_steps=0.3)
MIDTRAINING = Mix(problems=0.7, equations=0.0, notes=0.02, wrong_steps=0.25)
CURATED = Mix(problems=1.0, equations=0.0, notes=0.0, wrong_steps=0.0)


def mixed(seed: str, count: int, mix: Mix) -> Iterator[str]:
    """`count` documents of a mix."""
    rng = random.Random(seed)
    for _ in range(count):
        kind = rng.random()
        if kind < mix.problems:
            made = problem(rng, "hard" if rng.random() < mix.hard else "easy", held_out=False)
            yield made.prompt + made.solution(rng, mix.wrong_steps)
        elif kind < mix.problems + mix.equations:
            yield equations(rng, mix.wrong_steps)
        elif kind < mix.problems + mix.equations + mix.notes:
            yield notes(rng)
        else:
            yield plain_text(rng)


def problems(seed: str, count: int, held_out: bool, levels: tuple[Level, ...] = LEVELS) -> list[Problem]:
    """`count` different problems, of the levels in turn."""
    rng = random.Random(seed)
    found: dict[Problem, None] = {}
    while len(found) < count:
        found[problem(rng, levels[len(found) % len(levels)], held_out)] = None
    return list(found)
