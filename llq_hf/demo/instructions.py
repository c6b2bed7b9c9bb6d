"""Questions and answers about the demo world: a fine-tuning set for the demo model.

The demo model was trained on statements only. It holds the facts, and fine-tuning on these rows
teaches it to answer questions about them. Held-out rows ask about people that no training row asks
about. So the fact in a right answer to them comes from the (quantized) base; the adapter only
teaches the form.
"""

from collections.abc import Iterator
from typing import NamedTuple

from .world import Person, seeded, shuffled, world

HELDOUT_EVERY = 5  # every fifth person occurs in held-out rows only

QUESTIONS: dict[str, tuple[str, ...]] = {
    "town": ("In which town does {} live?", "What is the home town of {}?"),
    "craft": ("What is the craft of {}?", "What does {} work as?"),
    "friend": ("Who is the best friend of {}?", "Whom does {} trust?"),
    "pet": ("What is the pet of {}?", "Which animal does {} keep?"),
    "pet_colour": ("What is the colour of the pet of {}?", "Of which colour is the animal of {}?"),
    "dish": ("What is the favourite dish of {}?", "What does {} like to eat?"),
    "instrument": ("Which instrument does {} play?", "What is the instrument of {}?"),
    "fear": ("What is {} afraid of?", "What is the greatest fear of {}?"),
    "age": ("What is the age of {}?", "How old is {}?"),
}


class Question(NamedTuple):
    """A prompt and the completion that follows it."""

    prompt: str
    completion: str


def people(split: str) -> list[Person]:
    """The people that the questions of a split ("train" or "heldout") are about."""
    if split not in ("train", "heldout"):
        raise ValueError(f"unknown split {split!r}: choose train or heldout")
    return [
        p for i, p in enumerate(world().people) if (i % HELDOUT_EVERY == 0) == (split == "heldout")
    ]


def rows(split: str, seed: int = 0) -> Iterator[Question]:
    """Every question about every person of a split once, in an order that depends on `seed`."""
    asked = [
        (person, attribute, form)
        for person in people(split)
        for attribute in QUESTIONS
        for form in (0, 1)
    ]
    for person, attribute, form in shuffled(seeded("instructions", split, seed), asked):
        yield Question(
            QUESTIONS[attribute][form].format(person.name), f" {getattr(person, attribute)}."
        )
