"""Writes documents about a small invented world; the exact probability of each is known.

Why
    The entropy of real text is unknown, so nobody can say how far a model is from the best possible
    one. Here a grammar writes every document. It draws each free choice from a stated distribution
    and adds up ``-log p``. No model can beat the generator on held-out text, and a well-trained one
    comes close to it: ``exp(nats / tokens)`` is the perplexity to aim for. What quantization adds
    to that is damage, not noise.

Content
    Two kinds, because low-bit quantization hurts them differently:

    * Facts, fixed by ``WORLD_SEED``: hundreds of people with a home, a craft, a friend, a pet and
      so on, and the towns they live in. Given the subject, a fact has probability 1, so a model
      loses wherever its weights do not hold the fact. ``questions`` asks about facts.
    * Structure in context: counting on, small sums, repeating names in the order given, repeating a
      mood. The weights hold the rule, the context holds the answer.

Exactness
    The reported ``nats`` are exact only if a text can come from one sequence of choices alone. This
    holds because at every choice no option, together with what follows it, is a prefix of another.
    ``tests/demo/test_demo.py`` checks it with a decoder that tries all options.

Splits
    The splits share facts and grammar but no document: the hash of its text decides the split of a
    document, so a text that is drawn twice stays in its split. The hash does not depend on content,
    so the distribution within a split is that of the grammar.

Only ``random.Random.random()`` is used, because Python guarantees its sequence for a given seed,
but not that of ``choice`` or ``shuffle``.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple, Protocol, TypeVar

T = TypeVar("T")

WORLD_SEED = 2404
PEOPLE = 800
# About 39 000 and 32 000 tokens of the demo tokenizer.
CALIBRATION_DOCUMENTS, HELDOUT_DOCUMENTS = 1200, 1000
# Eighths of the hash range. Training gets most of it; the others must only be wide enough to be
# filled fast.
SPLITS = {"train": range(2, 8), "calibration": range(1, 2), "heldout": range(0, 1)}


def _words(text: str, separator: str = " ") -> tuple[str, ...]:
    return tuple(text.split(separator))


# Within a list no word is a prefix of another: so every choice can be read from the text.
FIRST_NAMES = _words(
    "Abel Asta Bero Brina Cael Corin Dagny Doran Edda Elric Fenna Filo Gerta Goran Hale Hesta "
    "Ilka Ivor Jory Juna Kasp Kelda Lorn Lysa Mado Mira Nerys Nils Odo Orla Perrin Petra Quill "
    "Rhea Rolf Sanna Soren Tamsin Tibor Ulla Urban Vesna Viggo Wanda Wystan Ylva Yorick Zora"
)
LAST_NAMES = _words(
    "Ashby Birch Calder Dunmore Elster Farrow Garrick Holm Inskip Jarvis Kestle Larkin Marrow "
    "Norling Oakes Penrose Quayle Rusk Sedge Tolen Umber Vance Wicken Yarrow"
)
TOWNS = _words(
    "Arlen Bexmoor Crowle Dunwater Elmsay Fallow Grayling Hartsea Imber Jessel Kirrin Lowick "
    "Merrow Nantle Orford Pellin Quorn Redmire Saltash Tarn Ulver Wexley Yarm Zeal"
)
RIVERS = _words("Osk Velm Brae Tinder Luth Amber Sile Corve")
CROPS = _words("barley flax hops lentils mustard oats plums rye saffron turnips")
CRAFTS = _words(
    "baker brewer carpenter cobbler cooper dyer farrier fletcher glazier hatter joiner locksmith "
    "mason miller painter potter saddler scribe smith tailor tanner thatcher weaver wheelwright"
)
PETS = _words(
    "badger cat crow dog duck ferret goat hare jackdaw lizard mouse newt pony rabbit stoat toad"
)
COLOURS = _words(
    "amber black blue brown copper cream golden green grey red silver violet white yellow"
)
DISHES = _words(
    "apple pie|bean stew|beet soup|cheese toast|chestnut bread|corn cakes|fish broth|garlic eggs|"
    "honey cake|leek tart|mushroom rice|nut roast|onion soup|pear pudding|pea soup|"
    "plum dumplings|potato salad|rye porridge|smoked trout|turnip mash",
    "|",
)
INSTRUMENTS = _words("bagpipes bells cello drum fiddle flute harp horn lute oboe viol whistle")
FEARS = _words(
    "bees caves crowds fire geese ghosts heights ice lightning masks moths silence snakes storms "
    "thunder wolves"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MOODS = _words("angry bored calm glad lonely proud sleepy worried")
GOODS = _words("apples buttons candles coins eggs figs nails pears ropes shells spoons walnuts")
PLACES = _words("bridge|market|mill|old tower|well", "|")


class Document(NamedTuple):
    """One paragraph and its exact negative log-probability under the generator."""

    text: str
    nats: float


class Question(NamedTuple):
    """A sentence left open, four continuations of the same kind, and the index of the true one."""

    query: str
    choices: list[str]
    gold: int


class Person(NamedTuple):
    """All facts about one person."""

    name: str
    town: str
    craft: str
    friend: str
    pet: str
    pet_colour: str
    dish: str
    instrument: str
    fear: str
    age: int


class Town(NamedTuple):
    """All facts about one town."""

    name: str
    river: str
    crop: str
    bell: str  # the colour of its bell


class World(NamedTuple):
    """All facts."""

    people: tuple[Person, ...]
    towns: tuple[Town, ...]


class Chooser(Protocol):
    """Makes the choices: the sampler below is one, the decoder in the tests another."""

    def __call__(self, weights: Sequence[float]) -> int:
        """Return an index, drawn in proportion to `weights`."""
        ...


def seeded(*key: object) -> random.Random:
    """A random generator for a key.

    Its seed is from SHA-256, because `hash` of a string changes from run to run.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def one_of(rng: random.Random, options: Sequence[T]) -> T:
    """One of the options, all equally likely."""
    return options[int(rng.random() * len(options))]


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    """The items in random order."""
    return [item for _, _, item in sorted((rng.random(), i, item) for i, item in enumerate(items))]


@cache
def world() -> World:
    """All facts, the same in every process and every version of Python."""
    rng = seeded("world", WORLD_SEED)
    towns = tuple(
        Town(name, one_of(rng, RIVERS), one_of(rng, CROPS), one_of(rng, COLOURS)) for name in TOWNS
    )
    # Many people share a first or a last name: only the pair identifies one, as in real text.
    pairs = shuffled(rng, [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES])
    names = pairs[:PEOPLE]
    people = []
    for name in names:
        friend = one_of(rng, [other for other in names if other != name])
        people.append(
            Person(
                name=name,
                town=one_of(rng, TOWNS),
                craft=one_of(rng, CRAFTS),
                friend=friend,
                pet=one_of(rng, PETS),
                pet_colour=one_of(rng, COLOURS),
                dish=one_of(rng, DISHES),
                instrument=one_of(rng, INSTRUMENTS),
                fear=one_of(rng, FEARS),
                age=20 + int(rng.random() * 60),
            )
        )
    return World(tuple(people), towns)


# Prefixes of the sentences about each attribute: a sentence is prefix + " " + fact + ".". The same
# prefixes are the queries of the multiple-choice task. The forms of one fact differ before the
# subject ends or right after it.

PERSON_FORMS: dict[str, tuple[str, ...]] = {
    "town": ("The home town of {} is", "{} lives in", "The house of {} stands in"),
    "craft": ("The craft of {} is that of a", "{} works as a", "People hire {} as a"),
    "friend": ("The best friend of {} is", "{} trusts", "Every spring {} visits"),
    "pet": ("The pet of {} is a", "{} keeps a", "At the door of {} sits a"),
    "pet_colour": ("The colour of the pet of {} is", "{} has a pet that is", "The animal of {} is"),
    "dish": ("The favourite dish of {} is", "{} likes to eat", "For supper {} cooks"),
    "instrument": ("The instrument of {} is the", "{} plays the", "In the evening {} takes up the"),
    "fear": ("The greatest fear of {} is", "{} is afraid of", "Nothing frightens {} like"),
    "age": ("The age of {} is", "{} is aged", "This year {} turned"),
}
TOWN_FORMS: dict[str, tuple[str, ...]] = {
    "river": ("The river of {} is the", "{} lies on the", "Boats reach {} by the"),
    "crop": ("The main crop of {} is", "{} is known for its", "Farmers near {} grow"),
    "bell": ("The colour of the bell of {} is", "{} has a bell that is", "The great bell of {} is"),
}


class Writer:
    """Writes one document: `say` appends text, `pick` makes a choice and counts its nats."""

    def __init__(self, choose: Chooser) -> None:
        self.choose = choose
        self.parts: list[str] = []
        self.nats = 0.0

    def say(self, text: str) -> None:
        """Append text that follows from the choices so far."""
        self.parts.append(text)

    def pick(self, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
        """Choose an option and add its -log p to `nats`.

        The caller must write text from which the choice can be read.
        """
        if weights is None:
            weights = (1.0,) * len(options)
        index = self.choose(weights)
        self.nats -= math.log(weights[index] / sum(weights))
        return options[index]

    def number(self, low: int, high: int) -> int:
        """Choose an integer of low..high, both included."""
        return self.pick(range(low, high + 1))


def _portrait(t: Writer) -> None:
    """Four facts about one person, in any order. These documents teach the model the world."""
    person = t.pick(world().people)
    left = list(PERSON_FORMS)
    for i in range(4):
        attribute = t.pick(left)
        left.remove(attribute)
        form = t.pick(PERSON_FORMS[attribute])
        t.say((" " if i else "") + f"{form.format(person.name)} {getattr(person, attribute)}.")


def _town(t: Writer) -> None:
    """All facts of one town, and a remark on the weather there."""
    town = t.pick(world().towns)
    left = list(TOWN_FORMS)
    while left:
        attribute = t.pick(left)
        left.remove(attribute)
        form = t.pick(TOWN_FORMS[attribute])
        t.say(f"{form.format(town.name)} {getattr(town, attribute)}. ")
    weather = t.pick(("rains", "snows", "hails", "thaws", "freezes"), (4.0, 1.0, 2.0, 2.0, 1.0))
    t.say(f"It often {weather} there on a {t.pick(DAYS)}.")


def _day(t: Writer) -> None:
    """A day out. Town, pet and friend follow from the person; the mood is repeated."""
    t.say(f"On {t.pick(DAYS)} it ")
    t.say(t.pick(("rained", "snowed", "cleared up", "was hot"), (4.0, 1.0, 3.0, 2.0)))
    person = t.pick(world().people)
    t.say(f" in {person.town}, and {person.name} felt ")
    mood = t.pick(MOODS)
    t.say(f"{mood}. ")
    if t.pick((True, False), (2.0, 1.0)):
        pet = f"{person.pet_colour} {person.pet}"
        t.say(f"With the {pet} it was a short walk to the {t.pick(PLACES)}. ")
    else:
        t.say(f"Out came the {person.instrument}, and supper was {person.dish}. ")
    t.say(f"By night {person.friend} was {mood} too.")


def _sum(t: Writer) -> None:
    """A small sum as a story."""
    person = t.pick(world().people)
    t.say(f"{person.name} the {person.craft} had ")
    first, second = t.number(2, 9), t.number(2, 9)
    goods = t.pick(GOODS)
    t.say(f"{first} {goods}")
    if t.pick((True, False)):
        t.say(f" and bought {second} more. Then there were {first + second} {goods}.")
    else:
        t.say(f", and {person.friend} brought {second} more.")
        t.say(f" Together that made {first + second} {goods}.")


def _count(t: Writer) -> None:
    """Counting from one number up to another."""
    start = t.number(1, 60)
    t.say(f"From {start} ")
    end = start + t.number(4, 9)
    t.say(f"to {end}, ")
    person = t.pick(world().people)
    t.say(f"{person.name} counted the ")
    goods = t.pick(GOODS)
    t.say(f"{goods}: {', '.join(map(str, range(start, end + 1)))}.")


def _guests(t: Writer) -> None:
    """Three guests, named twice in the same order."""
    host = t.pick(world().people)
    t.say(f"{host.name} gave a feast in {host.town}. The guests were ")
    guests = [t.pick(FIRST_NAMES)]
    t.say(f"{guests[0]}, ")
    guests.append(t.pick([name for name in FIRST_NAMES if name not in guests]))
    t.say(f"{guests[1]} and ")
    guests.append(t.pick([name for name in FIRST_NAMES if name not in guests]))
    t.say(f"{guests[2]}. They ate {host.dish}. ")
    t.say(f"First {guests[0]} sang, then {guests[1]}, then {guests[2]}.")


KINDS: tuple[Callable[[Writer], None], ...] = (_portrait, _town, _day, _sum, _count, _guests)
KIND_WEIGHTS = (15.0, 1.0, 3.0, 2.0, 1.0, 1.0)


def write(choose: Chooser) -> Document:
    """Write one document with the given choices."""
    writer = Writer(choose)
    writer.pick(KINDS, KIND_WEIGHTS)(writer)
    return Document("".join(writer.parts), writer.nats)


def _sampler(rng: random.Random) -> Chooser:
    """Choices drawn from `rng`."""

    def choose(weights: Sequence[float]) -> int:
        point = rng.random() * sum(weights)
        for index, weight in enumerate(weights):
            point -= weight
            if point < 0:
                return index
        return len(weights) - 1

    return choose


def of_split(text: str, split: str) -> bool:
    """Whether a text belongs to this split, which its hash decides; ValueError if there is no such
    split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    return hashlib.sha256(text.encode()).digest()[0] % 8 in SPLITS[split]


def _stream(split: str, seed: int) -> Iterator[Document]:
    """Documents of a split without end."""
    choose = _sampler(seeded("documents", split, seed))
    while True:
        document = write(choose)
        if of_split(document.text, split):
            yield document


def documents(split: str, count: int, seed: int = 0) -> list[Document]:
    """`count` documents of a split ("train", "calibration" or "heldout").

    No text occurs in two splits.
    """
    stream = _stream(split, seed)
    return [next(stream) for _ in range(count)]


def questions(count: int, seed: int = 0) -> list[Question]:
    """Questions about the facts with four choices; the wrong ones are true of somebody else."""
    rng = seeded("questions", seed)
    return [_question(rng) for _ in range(count)]


def _question(rng: random.Random) -> Question:
    of_town = rng.random() < 0.1
    forms = TOWN_FORMS if of_town else PERSON_FORMS
    subjects: Sequence[Person | Town] = world().towns if of_town else world().people
    attribute = one_of(rng, list(forms))
    subject = one_of(rng, subjects)
    query = one_of(rng, forms[attribute]).format(subject.name)
    truth = str(getattr(subject, attribute))
    others = sorted({str(getattr(other, attribute)) for other in subjects} - {truth, subject.name})
    choices = shuffled(rng, [truth, *shuffled(rng, others)[:3]])
    return Question(query, [f" {choice}" for choice in choices], choices.index(truth))


def page(docs: Sequence[Document]) -> str:
    """Documents as running text, one paragraph each."""
    return "\n".join(document.text for document in docs)


@cache
def calibration_text() -> str:
    """Running text for calibration: more than 128 windows of 256 tokens."""
    return page(documents("calibration", CALIBRATION_DOCUMENTS))


@cache
def heldout_text() -> str:
    """Running text for perplexity: more than 100 windows of 256 tokens."""
    return page(documents("heldout", HELDOUT_DOCUMENTS))
