"""Write the quickstart task's data: short notices about boats, museums, recipes, concerts and trains.

    python scripts/make_gazette.py [FOLDER]

Everything here was made up for this project: a grammar of five domains, common English words, invented names. A record
(``kind : boat | name : Silver Swan | type : ferry | harbor : Oakford | price : ten dollars``) becomes one or two short
sentences. Each domain keeps apart, for dev and for test, the pairs of its two leading slots and its names: no such pair
and no name of dev or test occurs in train. The seed is fixed; a test checks that the files in the package are what this
program writes.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SEED = "gazette-1"
SIZES = {"train": 2000, "dev": 200, "test": 200}
SHARES = {"dev": 0.12, "test": 0.12}
FOLDER = Path(__file__).parents[1] / "src" / "softprompts" / "tasks" / "catalog" / "data"

PLACES = [
    f"{a}{b}"
    for a, b in itertools.product(
        ["Oak", "Mill", "Stone", "Green", "West", "Wood"], ["ford", "field", "port", "bridge"]
    )
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
HOURS = ["seven", "eight", "nine", "ten", "noon", "two", "three", "five", "six"]
PRICES = [
    "two dollars",
    "four dollars",
    "five dollars",
    "eight dollars",
    "ten dollars",
    "twelve dollars",
    "twenty dollars",
]
PEOPLE = [
    "Anna",
    "Maria",
    "Peter",
    "Tom",
    "Sarah",
    "Jack",
    "Lucy",
    "Ben",
    "Rosa",
    "Paul",
    "Emma",
    "Sam",
    "Ruth",
    "David",
    "Kate",
    "Max",
]


@dataclass(frozen=True)
class Domain:
    """One kind of notice."""

    name: tuple[str, Sequence[str]]
    """Slot and values of the name, kept apart between the splits."""
    pair: tuple[tuple[str, Sequence[str]], tuple[str, Sequence[str]]]
    """Two slots that every record has; their pairs are kept apart between the splits."""
    options: dict[str, Sequence[str]]
    """Slots of which a record has one, two or three."""
    openers: Sequence[str]
    """First sentences: the name and the pair."""
    clauses: dict[str, Sequence[str]]
    """What is said about an optional slot."""


def _names(first: str, second: str) -> list[str]:
    return [f"{a} {b}" for a, b in itertools.product(first.split(), second.split())]


DOMAINS = {
    "boat": Domain(
        name=(
            "name",
            _names(
                "Silver Blue White Golden Little Happy Brave Lucky Old Red",
                "Swan Star Lady Fish Wind Queen Bird Wave Moon Lion",
            ),
        ),
        pair=(
            (
                "type",
                [
                    "ferry",
                    "fishing boat",
                    "sailing boat",
                    "river boat",
                    "house boat",
                    "tour boat",
                    "night boat",
                    "rescue boat",
                ],
            ),
            ("harbor", PLACES),
        ),
        options={
            "price": PRICES,
            "seats": ["ten", "twenty", "thirty", "forty", "sixty", "one hundred"],
            "leaves": DAYS,
            "color": ["red", "blue", "white", "green", "yellow", "black"],
        },
        openers=[
            "The {name} is {a_type} in the harbor of {harbor}.",
            "In the harbor of {harbor} you can find {a_type} called the {name}.",
            "You can find the {name}, {a_type}, in the harbor of {harbor}.",
        ],
        clauses={
            "price": ["a trip costs {price}", "a ticket costs {price}"],
            "seats": ["it has {seats} seats", "there are seats for {seats} people"],
            "leaves": ["it leaves every {leaves}", "it goes out every {leaves}"],
            "color": ["it is painted {color}", "its color is {color}"],
        },
    ),
    "museum": Domain(
        name=(
            "name",
            _names(
                "North South River Garden Castle Bell Market Lake Hill King's",
                "House Hall Tower Room Gallery Palace Center Court Gate Place",
            ),
        ),
        pair=(
            (
                "type",
                [
                    "art museum",
                    "toy museum",
                    "car museum",
                    "music museum",
                    "science museum",
                    "history museum",
                    "book museum",
                    "film museum",
                ],
            ),
            ("city", PLACES),
        ),
        options={
            "price": ["free", *PRICES],
            "opens": HOURS,
            "closed": DAYS,
            "famous for": [
                "old maps",
                "gold coins",
                "paintings of horses",
                "wooden dolls",
                "stone heads",
                "silver cups",
                "old letters",
            ],
        },
        openers=[
            "{name} is {a_type} in the city of {city}.",
            "In the city of {city} you can visit {name}, {a_type}.",
            "You can visit {name}, {a_type}, in the city of {city}.",
        ],
        clauses={
            "price": ["a ticket is {price}", "you can get in for {price}"],
            "opens": ["it opens at {opens}", "the doors open at {opens}"],
            "closed": ["it is closed on {closed}", "it does not open on {closed}"],
            "famous for": ["it is famous for its {famous for}", "people come to see its {famous for}"],
        },
    ),
    "recipe": Domain(
        name=(
            "cook",
            [f"{a} {b}" for a, b in itertools.product(PEOPLE, ["Brown", "White", "Hill", "King", "Young", "Wood"])],
        ),
        pair=(
            (
                "main",
                [
                    "apple",
                    "lemon",
                    "onion",
                    "potato",
                    "tomato",
                    "chicken",
                    "fish",
                    "rice",
                    "cheese",
                    "honey",
                    "carrot",
                    "bean",
                    "egg",
                    "corn",
                ],
            ),
            ("type", ["soup", "salad", "cake", "bread", "pie", "stew", "sauce", "pudding"]),
        ),
        options={
            "time": ["ten minutes", "twenty minutes", "thirty minutes", "one hour", "two hours"],
            "serves": ["two", "three", "four", "six", "eight", "ten"],
            "level": ["easy", "very easy", "hard", "very hard"],
            "eat with": ["cold milk", "hot tea", "fresh bread", "red wine", "butter", "cream"],
        },
        openers=[
            "This recipe for {main} {type} comes from {cook}.",
            "{cook} gives us a recipe for {main} {type}.",
            "Here is how {cook} makes {main} {type}.",
        ],
        clauses={
            "time": ["it takes {time}", "it is ready in {time}"],
            "serves": ["it is enough for {serves} people", "it feeds {serves} people"],
            "level": ["it is {level} to make", "making it is {level}"],
            "eat with": ["you can eat it with {eat with}", "it is good with {eat with}"],
        },
    ),
    "concert": Domain(
        name=(
            "band",
            _names(
                "Black Wild Sweet Broken Young Quiet Secret Electric Lonely Purple",
                "Horses Flowers Rivers Hearts Brothers Sisters Dogs Roads Roses Stones",
            ),
        ),
        pair=(
            ("music", ["rock", "jazz", "folk", "piano", "dance", "country", "church", "guitar"]),
            ("town", PLACES),
        ),
        options={
            "day": DAYS,
            "price": ["free", *PRICES],
            "starts": HOURS,
            "place": [
                "the old church",
                "the town hall",
                "the city park",
                "the school",
                "the market",
                "the big theater",
            ],
        },
        openers=[
            "The {band} will play {music} music in {town}.",
            "You can hear the {band} play {music} music in {town}.",
            "In {town} there will be {music} music by the {band}.",
        ],
        clauses={
            "day": ["the concert is on {day}", "the band plays on {day}"],
            "price": ["a ticket is {price}", "you can get in for {price}"],
            "starts": ["it starts at {starts}", "the music begins at {starts}"],
            "place": ["the place is {place}", "they will be at {place}"],
        },
    ),
    "train": Domain(
        name=(
            "name",
            _names(
                "Morning Evening Northern Southern Royal Mountain Valley Ocean Summer Winter",
                "Star Arrow Express Flyer Runner Light Line Eagle Rose Sun",
            ),
        ),
        pair=(("from", PLACES), ("to", PLACES)),
        options={
            "leaves": HOURS,
            "platform": ["one", "two", "three", "four", "five", "six", "seven"],
            "price": PRICES,
            "takes": ["twenty minutes", "forty minutes", "one hour", "two hours", "three hours", "five hours"],
        },
        openers=[
            "The {name} is a train from {from} to {to}.",
            "The {name} takes you from {from} to {to}.",
            "You can go from {from} to {to} on the {name}.",
        ],
        clauses={
            "leaves": ["it leaves at {leaves}", "the train goes at {leaves}"],
            "platform": ["it stands on platform {platform}", "the platform is number {platform}"],
            "price": ["a ticket costs {price}", "you pay {price}"],
            "takes": ["the trip takes {takes}", "you get there in {takes}"],
        },
    ),
}


def _apart(items: Sequence[object], generator: random.Random) -> dict[str, list[object]]:
    """Share items out among the splits."""
    items = list(items)
    generator.shuffle(items)
    dev, test = (round(len(items) * SHARES[split]) for split in ("dev", "test"))
    return {"dev": items[:dev], "test": items[dev : dev + test], "train": items[dev + test :]}


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _sentences(domain: Domain, slots: dict[str, str], chosen: list[str], generator: random.Random) -> str:
    """One way to say a record: an opener, then its other slots in one or two sentences."""
    values = {**slots, "a_type": _article(slots.get("type", " "))}
    clauses = [generator.choice(domain.clauses[slot]).format_map(values) for slot in chosen]
    parts = [" and ".join(clauses[:2]), *clauses[2:]]
    return " ".join([generator.choice(domain.openers).format_map(values), *(f"{p[0].upper()}{p[1:]}." for p in parts)])


def _record(
    kind: str, pools: dict[str, list[object]], references: int, generator: random.Random
) -> tuple[str, list[str]]:
    domain = DOMAINS[kind]
    name_slot, (first, second) = domain.name[0], (domain.pair[0][0], domain.pair[1][0])
    values = generator.choice(pools["pair"])
    assert isinstance(values, tuple)
    picked = generator.sample(list(domain.options), generator.choice([1, 2, 2, 3]))
    chosen = [slot for slot in domain.options if slot in picked]
    slots = {name_slot: str(generator.choice(pools["name"])), first: values[0], second: values[1]}
    slots |= {slot: generator.choice(domain.options[slot]) for slot in chosen}
    said: list[str] = []
    while len(said) < references:
        text = _sentences(domain, slots, chosen, generator)
        if text not in said:
            said.append(text)
    return " | ".join(f"{slot} : {value}" for slot, value in {"kind": kind, **slots}.items()), said


def generate() -> dict[str, list[dict[str, object]]]:
    """Return the three splits."""
    generator = random.Random(SEED)
    pools = {}
    for kind, domain in DOMAINS.items():
        pairs = [pair for pair in itertools.product(domain.pair[0][1], domain.pair[1][1]) if pair[0] != pair[1]]
        pools[kind] = {"name": _apart(domain.name[1], generator), "pair": _apart(pairs, generator)}
    splits: dict[str, list[dict[str, object]]] = {}
    seen: set[str] = set()
    for split, size in SIZES.items():
        rows: list[dict[str, object]] = []
        while len(rows) < size:
            kind = list(DOMAINS)[len(rows) % len(DOMAINS)]
            references = 1 if split == "train" else generator.choice([2, 3, 4])
            pool = {what: pools[kind][what][split] for what in ("name", "pair")}
            text, said = _record(kind, pool, references, generator)
            if text not in seen:
                seen.add(text)
                rows.append({"id": f"gazette-{split}-{len(rows)}", "input": text, "references": said})
        splits[split] = rows
    return splits


def main(folder: Path = FOLDER) -> None:
    """Write ``gazette.{train,dev,test}.jsonl.gz`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in generate().items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        # mtime 0 and no file name inside: the same text gives the same bytes.
        (folder / f"gazette.{split}.jsonl.gz").write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
