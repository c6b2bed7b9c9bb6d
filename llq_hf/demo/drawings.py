"""Draws small pictures and asks questions about them: the data of the demo vision-language model.

Pictures
    A picture is a board of 4 x 4 cells of 12 pixels with a few marks on it: coloured shapes,
    digits, or the letters of a word. Its description exists before it is drawn, so every question
    has a certain answer. There are four themes:

    scene    one to five shapes, no two alike in both shape and colour
    digits   three different digits in three colours
    sign     a word of three letters in one row, and a shape in another row
    sum      two digits and a plus sign in one row, and a shape in another row

Questions
    They have the two forms of the study's benchmarks, and both forms ask about the same facts:

    MME        "Is the circle red? Please answer yes or no."; two for each fact, one yes and one no
    MMBench    "What colour is the circle?" and four options, answered with a letter from A to D

    An answer says what is in the picture, then the verdict: "blue no", "blue C". A small model can
    look up a fact, and it can find the word that it has just written in the question, but it does
    not learn to do both in one step.

Categories
    They follow the two halves of MME. Perception: existence, count, position, colour, text.
    Cognition, where the content must also be worked with: sum (of two digits), largest (of three
    digits), most (the most frequent shape).

Splits
    The hash of its description decides the split of a picture (`world.of_split`), whatever its
    jitter and background. So no description occurs in two splits.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from .world import of_split, one_of, seeded, shuffled

if TYPE_CHECKING:
    from PIL import Image

CELLS, CELL_PIXELS = 4, 12
SIDE_PIXELS = CELLS * CELL_PIXELS

SHAPES = ("circle", "square", "triangle", "diamond", "cross")
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (60, 100, 250),
    "yellow": (240, 220, 50),
    "pink": (245, 130, 200),
    "white": (245, 245, 245),
}
WORDS = (
    "BED", "CAR", "CUP", "DOG", "FOX", "HAT", "INK", "JAM",
    "KEY", "MAP", "OWL", "PIG", "RUG", "SUN", "TEA", "VAN",
)  # fmt: skip
PERCEPTION = ("existence", "count", "position", "colour", "text")
COGNITION = ("sum", "largest", "most")
YES_NO = "Please answer yes or no."
LETTER = "Answer with a letter."

# Characters as five rows of five pixels; each pixel is a bit, the leftmost the highest.
GLYPHS = {
    "0": (14, 19, 21, 25, 14), "1": (4, 12, 4, 4, 14), "2": (30, 1, 14, 16, 31),
    "3": (30, 1, 14, 1, 30), "4": (18, 18, 31, 2, 2), "5": (31, 16, 30, 1, 30),
    "6": (14, 16, 30, 17, 14), "7": (31, 1, 2, 4, 4), "8": (14, 17, 14, 17, 14),
    "9": (14, 17, 15, 1, 14), "+": (4, 4, 31, 4, 4), "A": (14, 17, 31, 17, 17),
    "B": (30, 17, 30, 17, 30), "C": (15, 16, 16, 16, 15), "D": (30, 17, 17, 17, 30),
    "E": (31, 16, 30, 16, 31), "F": (31, 16, 30, 16, 16), "G": (15, 16, 19, 17, 15),
    "H": (17, 17, 31, 17, 17), "I": (31, 4, 4, 4, 31), "J": (7, 2, 2, 18, 12),
    "K": (17, 18, 28, 18, 17), "L": (16, 16, 16, 16, 31), "M": (17, 27, 21, 17, 17),
    "N": (17, 25, 21, 19, 17), "O": (14, 17, 17, 17, 14), "P": (30, 17, 30, 16, 16),
    "R": (30, 17, 30, 18, 17), "S": (15, 16, 14, 1, 30), "T": (31, 4, 4, 4, 4),
    "U": (17, 17, 17, 17, 14), "V": (17, 17, 10, 10, 4), "W": (17, 17, 21, 27, 17),
    "X": (17, 10, 4, 10, 17), "Y": (17, 10, 4, 4, 4),
}  # fmt: skip
KINDS = (*SHAPES, *GLYPHS)


class Mark(NamedTuple):
    """One thing on the board: a shape or a character, its colour, and its cell."""

    kind: str
    colour: str
    row: int
    column: int

    def __str__(self) -> str:
        return f"{self.colour} {self.kind}"


class Picture(NamedTuple):
    """What is on a board, in reading order.

    seed: decides jitter and background, which no question asks about.
    """

    theme: str
    marks: tuple[Mark, ...]
    seed: int

    @property
    def shapes(self) -> tuple[Mark, ...]:
        return tuple(mark for mark in self.marks if mark.kind in SHAPES)

    @property
    def characters(self) -> tuple[Mark, ...]:
        return tuple(mark for mark in self.marks if mark.kind in GLYPHS)


class Fact(NamedTuple):
    """A fact about a picture: an open question, and a claim with a gap for the answer.

    true, false: the right answer, and wrong ones. marks: those that the fact is about.
    """

    category: str
    question: str
    claim: str
    true: str
    false: tuple[str, ...]
    marks: tuple[Mark, ...]


class Item(NamedTuple):
    """A question as a model gets it, and the answer that it should give.

    said: what is in the picture; it comes before the answer, and is the whole answer to an open
    question. marks: those that the question is about. claimed: of a claim, the question up to the
    word that makes it true or false.
    """

    category: str
    question: str
    answer: str
    said: str = ""
    marks: tuple[Mark, ...] = ()
    claimed: str = ""

    @property
    def full_answer(self) -> str:
        """What a model learns to answer: `said`, then `answer`."""
        # A word keeps the space before it that it has in the question, so that it is one token.
        space = " " if self.said[:1].islower() else ""
        return f"{space}{self.said} {self.answer}".rstrip() if self.said else self.answer


# --- pictures -------------------------------------------------------------------------------------


def _scene(rng: Random) -> list[Mark]:
    looks = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    # One shape tends to occur several times, so that counts above one are not rare.
    frequent = one_of(rng, SHAPES)
    alike = [look for look in shuffled(rng, looks) if look[0] == frequent]
    first = alike[: 1 + int(rng.random() * 3)]
    rest = [look for look in shuffled(rng, looks) if look not in first]
    chosen = (first + rest)[: 1 + int(rng.random() * 5)]
    cells = shuffled(rng, [(row, column) for row in range(CELLS) for column in range(CELLS)])
    return [Mark(*look, *cell) for look, cell in zip(chosen, cells, strict=False)]


def _digits(rng: Random) -> list[Mark]:
    cells = shuffled(rng, [(row, column) for row in range(CELLS) for column in range(CELLS)])
    digits = shuffled(rng, "0123456789")[:3]
    colours = shuffled(rng, list(COLOURS))
    marks = zip(digits, colours, cells, strict=False)
    return [Mark(digit, colour, *cell) for digit, colour, cell in marks]


def _line(rng: Random, text: str) -> list[Mark]:
    """A text in one row and colour, and a shape in another row."""
    row = int(rng.random() * CELLS)
    column = int(rng.random() * (CELLS - len(text) + 1))
    colour = _colour(rng)
    other = (row + 1 + int(rng.random() * (CELLS - 1))) % CELLS
    letters = [Mark(letter, colour, row, column + i) for i, letter in enumerate(text)]
    return [*letters, Mark(one_of(rng, SHAPES), _colour(rng), other, int(rng.random() * CELLS))]


def _colour(rng: Random) -> str:
    return one_of(rng, list(COLOURS))


def _sign(rng: Random) -> list[Mark]:
    return _line(rng, one_of(rng, WORDS))


def _sum(rng: Random) -> list[Mark]:
    first = int(rng.random() * 10)
    return _line(rng, f"{first}+{int(rng.random() * (10 - first))}")


THEMES: dict[str, Callable[[Random], list[Mark]]] = {
    "scene": _scene,
    "digits": _digits,
    "sign": _sign,
    "sum": _sum,
}
THEME_DRAWS = ("scene", "scene", "scene", "digits", "sign", "sum")  # half of them are scenes


def stream(split: str, seed: int = 0) -> Iterator[Picture]:
    """Pictures of a split ("train", "calibration" or "heldout") without end."""
    rng = seeded("pictures", split, seed)
    while True:
        theme = one_of(rng, THEME_DRAWS)
        marks = tuple(sorted(THEMES[theme](rng), key=lambda mark: (mark.row, mark.column)))
        if of_split(f"{theme} {marks}", split):
            yield Picture(theme, marks, int(rng.random() * 2**32))


def draw(picture: Picture) -> Image.Image:
    """The picture in RGB, 48 x 48 pixels.

    Marks have 8 to 10 pixels and lie up to a pixel off the middle of their cell.
    """
    from PIL import Image, ImageDraw

    rng = seeded("draw", picture.seed)
    ground = [int(rng.random() * 48) for _ in range(3)]
    image = Image.new("RGB", (SIDE_PIXELS, SIDE_PIXELS), tuple(ground))
    pen = ImageDraw.Draw(image)
    for mark in picture.marks:
        size = 10 if mark.kind in GLYPHS else 8 + 2 * int(rng.random() * 2)
        left, top = (
            cell * CELL_PIXELS + (CELL_PIXELS - size) // 2 + int(rng.random() * 3) - 1
            for cell in (mark.column, mark.row)
        )
        shade = 0.85 + 0.15 * rng.random()
        fill = tuple(int(shade * channel) for channel in COLOURS[mark.colour])
        _draw_mark(pen, mark.kind, left, top, size, fill)
    return image


def _draw_mark(pen: object, kind: str, x: int, y: int, size: int, fill: tuple[int, ...]) -> None:
    """Draw one mark into the square of `size` pixels whose upper left corner is (x, y)."""
    from PIL import ImageDraw

    assert isinstance(pen, ImageDraw.ImageDraw)
    end, half, third = size - 1, (size - 1) / 2, size // 3
    if kind in GLYPHS:
        for row, bits in enumerate(GLYPHS[kind]):
            for column in range(5):
                if bits >> (4 - column) & 1:
                    pen.rectangle(
                        (x + 2 * column, y + 2 * row, x + 2 * column + 1, y + 2 * row + 1),
                        fill=fill,
                    )
    elif kind == "circle":
        pen.ellipse((x, y, x + end, y + end), fill=fill)
    elif kind == "square":
        pen.rectangle((x, y, x + end, y + end), fill=fill)
    elif kind == "triangle":
        pen.polygon([(x, y + end), (x + end, y + end), (x + half, y)], fill=fill)
    elif kind == "diamond":
        pen.polygon(
            [(x + half, y), (x + end, y + half), (x + half, y + end), (x, y + half)], fill=fill
        )
    else:
        pen.rectangle((x + third, y, x + end - third, y + end), fill=fill)
        pen.rectangle((x, y + third, x + end, y + end - third), fill=fill)


# --- facts ----------------------------------------------------------------------------------------


def facts(picture: Picture, rng: Random) -> list[Fact]:
    """One fact of each category that this picture has one for."""
    makers = {
        "scene": (_existence, _count, _position, _colour_of, _most),
        "digits": (_digit, _largest, _position),
        "sign": (_word, _existence, _position, _colour_of),
        "sum": (_sum_of, _existence, _position),
    }[picture.theme]
    return [fact for make in makers if (fact := make(picture, rng)) is not None]


def _existence(picture: Picture, rng: Random) -> Fact | None:
    here = {(mark.kind, mark.colour) for mark in picture.shapes}
    # Only shapes that occur at most once: the answer says the colour of the one in question.
    asked_for = [shape for shape in SHAPES if sum(kind == shape for kind, _ in here) <= 1]
    single = sorted(look for look in here if look[0] in asked_for)
    if not single:
        return None
    shape, colour = one_of(rng, single)
    absent = [(s, c) for s in asked_for for c in COLOURS if (s, c) not in here]
    # What shares shape or colour with something present is easily mistaken for it: such ones first.
    near = {(s, c) for s, c in absent if any(s == kind or c == hue for kind, hue in here)}
    false = sorted(shuffled(rng, absent), key=lambda look: look not in near)
    question = "Which of these is in the image?"
    claim = "Is there a {} in the image?"
    names = tuple(f"{c} {s}" for s, c in false[:3])
    return Fact("existence", question, claim, f"{colour} {shape}", names, picture.shapes)


def _count(picture: Picture, rng: Random) -> Fact:
    kind = one_of(rng, picture.shapes).kind if rng.random() < 0.8 else one_of(rng, SHAPES)
    marks = tuple(mark for mark in picture.shapes if mark.kind == kind)
    number = len(marks)
    others = sorted(
        (n for n in range(6) if n != number), key=lambda n: (abs(n - number), rng.random())
    )
    question = f"How many {_plural(kind)} are in the image?"
    claim = f"Is the number of {_plural(kind)} in the image {{}}?"
    false = tuple(str(n) for n in others[:3])
    return Fact("count", question, claim, str(number), false, marks)


def _position(picture: Picture, rng: Random) -> Fact:
    mark = one_of(rng, picture.characters if picture.theme == "digits" else picture.shapes)
    places = ["top left", "top right", "bottom left", "bottom right"]
    true = places[2 * (mark.row // 2) + mark.column // 2]
    # One on the other side comes first, so that the second word alone makes a claim true or false.
    wrong = shuffled(rng, [place for place in places if place != true])
    false = tuple(sorted(wrong, key=lambda place: place.split()[1] == true.split()[1]))
    question = f"Where is the {mark} in the image?"
    claim = f"Is the {mark} at the {{}}?"
    return Fact("position", question, claim, true, false, (mark,))


def _colour_of(picture: Picture, rng: Random) -> Fact | None:
    counts = Counter(mark.kind for mark in picture.shapes)
    single = [mark for mark in picture.shapes if counts[mark.kind] == 1]
    if not single:
        return None
    mark = one_of(rng, single)
    present = [m.colour for m in shuffled(rng, picture.marks)]
    false = _distinct([*present, *shuffled(rng, list(COLOURS))], mark.colour)
    question = f"What colour is the {mark.kind}?"
    claim = f"Is the {mark.kind} {{}}?"
    return Fact("colour", question, claim, mark.colour, false, (mark,))


def _most(picture: Picture, rng: Random) -> Fact | None:
    counts = Counter(mark.kind for mark in picture.shapes)
    top, *rest = counts.most_common()
    if rest and rest[0][1] == top[1]:
        return None
    false = _distinct([*shuffled(rng, [kind for kind, _ in rest]), *shuffled(rng, SHAPES)], top[0])
    question = "Which shape is there most often in the image?"
    claim = "Are there more {} than any other shape in the image?"
    plurals = tuple(map(_plural, false))
    marks = tuple(mark for mark in picture.shapes if mark.kind == top[0])
    return Fact("most", question, claim, _plural(top[0]), plurals, marks)


def _word(picture: Picture, rng: Random) -> Fact:
    word = "".join(mark.kind for mark in picture.characters)
    false = tuple(shuffled(rng, [other for other in WORDS if other != word])[:3])
    question = "Which word is in the image?"
    claim = "Is the word in the image {}?"
    return Fact("text", question, claim, word, false, picture.characters)


def _digit(picture: Picture, rng: Random) -> Fact:
    mark = one_of(rng, picture.characters)
    present = shuffled(rng, [other.kind for other in picture.characters])
    false = _distinct([*present, *shuffled(rng, "0123456789")], mark.kind)
    question = f"Which digit is {mark.colour}?"
    claim = f"Is the {mark.colour} digit in the image {{}}?"
    return Fact("text", question, claim, mark.kind, false, (mark,))


def _largest(picture: Picture, rng: Random) -> Fact:
    digits = [mark.kind for mark in picture.characters]
    top = max(picture.characters, key=lambda mark: mark.kind)
    false = _distinct([*shuffled(rng, digits), *shuffled(rng, "0123456789")], top.kind)
    question = "Which digit in the image is the largest?"
    claim = "Is the largest digit in the image {}?"
    return Fact("largest", question, claim, top.kind, false, (top,))


def _sum_of(picture: Picture, rng: Random) -> Fact:
    first, _, second = picture.characters
    total = int(first.kind) + int(second.kind)
    others = sorted(
        (n for n in range(10) if n != total), key=lambda n: (abs(n - total) > 2, rng.random())
    )
    question = "What is the sum in the image?"
    claim = "Is the sum in the image {}?"
    false = tuple(str(n) for n in others[:3])
    return Fact("sum", question, claim, str(total), false, (first, second))


def _distinct(options: Sequence[str], true: str) -> tuple[str, ...]:
    """The first three different options that are not the true one."""
    return tuple(list(dict.fromkeys(option for option in options if option != true))[:3])


def _plural(kind: str) -> str:
    return f"{kind}es" if kind == "cross" else f"{kind}s"


# --- questions ------------------------------------------------------------------------------------


def yes_no(fact: Fact) -> tuple[Item, Item]:
    """The two questions of MME's form, first the one whose answer is yes."""
    return _claim(fact, fact.true, "yes"), _claim(fact, fact.false[0], "no")


def _claim(fact: Fact, value: str, answer: str) -> Item:
    marks, upto, said = fact.marks, value, fact.true
    if fact.category == "existence":  # of "red circle", the circle is looked up and "red" decides
        upto, shape = value.split()
        marks = tuple(mark for mark in fact.marks if mark.kind == shape)
        said = marks[0].colour if marks else "none"
    claimed = fact.claim.split("{}")[0] + upto
    return Item(fact.category, f"{fact.claim.format(value)} {YES_NO}", answer, said, marks, claimed)


def choice(fact: Fact, rng: Random) -> Item:
    """The question of MMBench's form."""
    options = shuffled(rng, [fact.true, *fact.false])
    lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True)]
    question = "\n".join([fact.question, *lines, LETTER])
    letter = "ABCD"[options.index(fact.true)]
    return Item(fact.category, question, letter, fact.true, fact.marks)


def is_right(answer: str, said: str) -> bool:
    """Whether the last verdict in a model's text is the answer.

    A verdict is yes or no in any case, or a letter from A to D.
    """
    if answer in ("yes", "no"):
        verdicts = re.findall(r"\b(?:yes|no)\b", said.lower())
    else:
        verdicts = re.findall(r"\b[A-D]\b", said)
    return bool(verdicts) and verdicts[-1] == answer


def description(picture: Picture) -> Item:
    """Everything on the board in reading order. It teaches a model to find its way in a picture."""
    return Item("description", "Describe the image.", ", ".join(map(str, picture.marks)))


def asked(picture: Picture, rng: Random) -> list[Item]:
    """The questions about a held-out picture: for each fact both of MME's form and MMBench's."""
    return [item for fact in facts(picture, rng) for item in (*yes_no(fact), choice(fact, rng))]


def benchmark(categories: Sequence[str], facts_each: int) -> list[tuple[Picture, list[Item]]]:
    """Held-out pictures with their questions.

    Every category has `facts_each` facts, and every fact three questions.
    """
    rng = seeded("benchmark", *categories)
    missing = dict.fromkeys(categories, facts_each)
    chosen = []
    for picture in stream("heldout"):
        wanted = [fact for fact in facts(picture, rng) if missing.get(fact.category, 0) > 0]
        for fact in wanted:
            missing[fact.category] -= 1
        if wanted:
            items = [item for fact in wanted for item in (*yes_no(fact), choice(fact, rng))]
            chosen.append((picture, items))
        if not any(missing.values()):
            return chosen
    raise AssertionError("the stream has no end")


# --- calibration ----------------------------------------------------------------------------------


def calibration_items(count: int) -> Iterator[tuple[Picture, Item]]:
    """`count` pictures of the calibration split, each with one question of either form."""
    rng = seeded("calibration")
    for picture, _ in zip(stream("calibration"), range(count), strict=False):
        yield picture, one_of(rng, asked(picture, rng))


@cache
def calibration_text() -> str:
    """Questions and answers in the demo VLM's chat template, without pictures.

    They are enough for 128 windows of 256 tokens.
    """
    turns = (
        f"<|user|>{item.question}<|assistant|>{item.full_answer}<|end_of_text|>"
        for _, item in calibration_items(2500)
    )
    return "".join(turns)


def write_pairs(folder: Path, count: int) -> Path:
    """Write `count` calibration pictures as PNG files, and `pairs.jsonl` beside them.

    Each of its lines has `image` (a file name), `question` and `answer`. Returns `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (picture, item) in enumerate(calibration_items(count)):
        name = f"{index:05d}.png"
        draw(picture).save(folder / name)
        lines.append(
            json.dumps({"image": name, "question": item.question, "answer": item.full_answer})
            + "\n"
        )
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder
