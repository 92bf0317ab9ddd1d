"""Documents of the sample project: arithmetic reasoning with stepwise solutions, and plain text.

Everything follows from a seed; nothing is downloaded. The plain text comes from a small grammar and is
there so that a model has something else to learn than arithmetic.
"""

import random
from collections.abc import Iterator

NAMES = [
    "Ada",
    "Ben",
    "Chen",
    "Dina",
    "Emil",
    "Fatou",
    "Goran",
    "Hana",
    "Ivo",
    "Jun",
    "Kofi",
    "Lena",
    "Mira",
    "Nils",
    "Olga",
    "Pia",
    "Quinn",
    "Rosa",
    "Sami",
    "Tove",
]
THINGS = [
    "apples",
    "books",
    "coins",
    "eggs",
    "kites",
    "marbles",
    "nails",
    "pears",
    "pens",
    "plates",
    "ropes",
    "shells",
    "stamps",
    "stones",
    "tickets",
]
GAINS = ["buys {n} more", "finds {n} more", "gets {n} from a friend", "wins {n} in a game"]
LOSSES = ["gives {n} away", "loses {n} on the way", "sells {n}", "lends {n} to a neighbour"]
PLACES = [
    "bay",
    "bridge",
    "farm",
    "forest",
    "garden",
    "harbour",
    "hill",
    "library",
    "market",
    "meadow",
    "mill",
    "school",
    "shore",
    "station",
    "tower",
]
ADJECTIVES = [
    "old",
    "quiet",
    "small",
    "bright",
    "narrow",
    "green",
    "windy",
    "busy",
    "distant",
    "warm",
    "grey",
    "empty",
    "wooden",
    "crowded",
    "steep",
]
ANIMALS = [
    "heron",
    "fox",
    "goat",
    "cat",
    "owl",
    "horse",
    "beetle",
    "dog",
    "crow",
    "hare",
    "mole",
    "otter",
    "pigeon",
    "swan",
    "toad",
]
TIMES = ["in the morning", "at noon", "after the rain", "before dawn", "on a Sunday", "late in the year", "at night"]
VERBS = [
    "watched",
    "found",
    "followed",
    "painted",
    "remembered",
    "forgot",
    "described",
    "heard",
    "repaired",
    "missed",
    "carried",
    "drew",
]
ENDINGS = [
    "Nobody could say why.",
    "It was much later that {name} understood.",
    "The {animal} had long since gone.",
    "From then on the {place} had another name.",
    "{name} wrote it down {time}.",
    "The people of the {place} still talk about it.",
]
SENTENCES = [
    "{Time} {name} walked to the {adjective} {place} and {verb} a {animal}.",
    "The {place} was {adjective} {time}, and the {animal} slept behind the {adjective2} {place2}.",
    "{name} {verb} the {adjective} {animal} near the {place}.",
    "There was a {adjective} {place} where {name} and {name2} {verb} a {animal} {time}.",
    "{name} asked {name2} about the {adjective} {place}, but {name2} only {verb} the {animal}.",
    "Between the {place} and the {adjective} {place2} lived a {adjective2} {animal}.",
    "No {animal} was ever seen at the {place} {time}.",
]


def plain_text(rng: random.Random) -> str:
    """A short paragraph."""

    def words() -> dict[str, str]:
        time = rng.choice(TIMES)
        name, name2 = rng.sample(NAMES, 2)
        place, place2 = rng.sample(PLACES, 2)
        adjective, adjective2 = rng.sample(ADJECTIVES, 2)
        return {
            "name": name,
            "name2": name2,
            "place": place,
            "place2": place2,
            "adjective": adjective,
            "adjective2": adjective2,
            "animal": rng.choice(ANIMALS),
            "verb": rng.choice(VERBS),
            "time": time,
            "Time": time[0].upper() + time[1:],
        }

    sentences = [rng.choice(SENTENCES).format(**words()) for _ in range(rng.randint(2, 6))]
    return " ".join([*sentences, rng.choice(ENDINGS).format(**words())]) + "\n"


def reasoning(rng: random.Random, wrong_steps: float) -> str:
    """A word problem with its solution. wrong_steps: share of the steps whose result is off by a little."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    value = rng.randint(2, 20)
    story, steps = [f"{name} has {value} {thing}."], []
    for _ in range(rng.randint(1, 3)):
        change = rng.randint(1, 9)
        grows = value - change < 0 or rng.random() < 0.5
        story.append(f"{name} {rng.choice(GAINS if grows else LOSSES).format(n=change)}.")
        result = value + change if grows else value - change
        if rng.random() < wrong_steps:
            result = max(0, result + rng.choice([-3, -2, -1, 1, 2, 3]))
        steps.append(f"{value} {'+' if grows else '-'} {change} = {result}")
        value = result
    return " ".join(story) + f" How many {thing} does {name} have now?\n" + "\n".join(steps) + f"\nAnswer: {value}\n"


def documents(seed: int, count: int, reasoning_share: float, wrong_steps: float) -> Iterator[str]:
    """`count` documents, of which about `reasoning_share` are word problems."""
    rng = random.Random(seed)
    for _ in range(count):
        yield reasoning(rng, wrong_steps) if rng.random() < reasoning_share else plain_text(rng)
