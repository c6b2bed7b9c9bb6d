"""The data of the demo VLM: its pictures, its questions, and the splits.

The central claim is that the stated answer of every question is right. An oracle that shares no
code with the questions reads them and answers from the marks on the board.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from llq_hf.demo import drawings
from llq_hf.demo.drawings import COGNITION, PERCEPTION, Picture
from llq_hf.demo.world import seeded

pytest.importorskip("PIL", reason="Pillow is not installed: uv run --extra dev pytest")

PICTURES = list(islice(drawings.stream("heldout"), 300))
RNG = seeded("test")
QUESTIONS = [(picture, item) for picture in PICTURES for item in drawings.asked(picture, RNG)]


def truth(picture: Picture, question: str) -> str:
    """The right value for a question or claim, from the marks on the board, in the options'
    words.
    """
    shapes = [mark for mark in picture.marks if mark.kind in drawings.SHAPES]
    signs = [mark for mark in picture.marks if mark.kind not in drawings.SHAPES]
    counts = Counter(
        f"{mark.kind}es" if mark.kind == "cross" else f"{mark.kind}s" for mark in shapes
    )
    if found := re.match(r"(?:How many|Is the number of) (\w+)", question):
        return str(counts[found[1]])
    if found := re.match(r"(?:Where is|Is) the (\w+) (\w+) (?:in the image\?|at the)", question):
        (mark,) = [m for m in picture.marks if (m.colour, m.kind) == (found[1], found[2])]
        return f"{'top' if mark.row <= 1 else 'bottom'} {'left' if mark.column <= 1 else 'right'}"
    if "word" in question:
        return "".join(mark.kind for mark in signs)
    if "largest" in question:
        return str(max(int(mark.kind) for mark in signs))
    if "sum" in question:
        return str(sum(int(mark.kind) for mark in signs if mark.kind != "+"))
    if "most often" in question or "more" in question:
        (first, n), *rest = counts.most_common()
        assert all(n > other for _, other in rest)
        return first
    if found := re.search(r"(\w+) digit in|digit is (\w+)\?", question):
        (mark,) = [m for m in signs if m.colour == (found[1] or found[2])]
        return mark.kind
    found = re.search(r"the (\w+)(?: \w+)?\?", question)
    (mark,) = [m for m in shapes if found and m.kind == found[1]]
    return mark.colour


def answer_of(picture: Picture, question: str) -> str:
    """The right answer in the form that the question asks for."""
    here = {f"{mark.colour} {mark.kind}" for mark in picture.marks}
    if options := dict(re.findall(r"^([A-D])\. (.+)$", question, re.MULTILINE)):
        if question.startswith("Which of these"):
            (letter,) = [key for key, name in options.items() if name in here]
            return letter
        return next(key for key, name in options.items() if name == truth(picture, question))
    if found := re.match(r"Is there a (.+) in the image\?", question):
        return "yes" if found[1] in here else "no"
    claim = question.removesuffix(f" {drawings.YES_NO}")
    found = re.search(r"more (\w+) than|(\w+ (?:left|right))\?|(\w+)\?$", claim)
    assert found
    return "yes" if truth(picture, claim) == next(filter(None, found.groups())) else "no"


def test_every_question_has_the_answer_that_is_said() -> None:
    assert {item.category for _, item in QUESTIONS} == {*PERCEPTION, *COGNITION}
    for picture, item in QUESTIONS:
        assert answer_of(picture, item.question) == item.answer, (picture, item)


def test_an_answer_begins_with_what_is_seen() -> None:
    for picture, item in QUESTIONS:
        if item.answer not in ("yes", "no"):
            (option,) = re.findall(rf"^{item.answer}\. (.+)$", item.question, re.MULTILINE)
            assert item.full_answer.strip() == f"{option} {item.answer}"
            continue
        if found := re.match(r"Is there a (\w+) (\w+) in", item.question):
            seen = [mark.colour for mark in picture.marks if mark.kind == found[2]] or ["none"]
        else:
            seen = [truth(picture, item.question.removesuffix(f" {drawings.YES_NO}"))]
        assert [item.full_answer.strip()] == [f"{what} {item.answer}" for what in seen]


@pytest.mark.parametrize(
    ("answer", "said", "right"),
    [
        ("yes", "Yes.", True),
        ("no", "yes", False),
        ("no", "blue no", True),
        ("no", "none no", True),
        ("yes", "no, it is red: yes", True),
        ("no", "nothing", False),
        ("B", "B", True),
        ("B", "(B)", True),
        ("B", "", False),
        ("B", "red circle B", True),
        ("A", "CAR B", False),
    ],
)
def test_the_last_verdict_counts(answer: str, said: str, right: bool) -> None:
    assert drawings.is_right(answer, said) == right


def test_answers_are_balanced_and_options_differ() -> None:
    counts = Counter(item.answer for _, item in QUESTIONS)
    assert counts["yes"] == counts["no"]
    letters = [counts[letter] for letter in "ABCD"]
    assert min(letters) > 0.2 * sum(letters)
    for _, item in QUESTIONS:
        options = re.findall(r"^[A-D]\. (.+)$", item.question, re.MULTILINE)
        assert len(set(options)) == len(options)


def test_splits_share_no_picture_and_hold_what_they_should() -> None:
    boards = {
        split: {p[:2] for p in islice(drawings.stream(split), 2000)}
        for split in ("train", "calibration", "heldout")
    }
    assert all(len(seen) > 1800 for seen in boards.values())
    assert len(set.union(*boards.values())) == sum(map(len, boards.values()))
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        next(drawings.stream("dev"))


def test_pictures_are_the_same_in_another_process() -> None:
    code = (
        "import hashlib; from itertools import islice; from llq_hf.demo.drawings import *; "
        "p = list(islice(stream('heldout'), 20)); "
        "digest = hashlib.sha256(b''.join(draw(x).tobytes() for x in p)).hexdigest(); "
        "print(digest, asked(p[0], Random(3)))"
    )
    command = [sys.executable, "-c", code]
    env = {"PYTHONHASHSEED": "1", "PATH": ""}
    bare = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    usual = subprocess.run(command, capture_output=True, text=True, check=True)
    assert bare.stdout == usual.stdout != ""


def test_marks_lie_in_their_cells_and_show_their_colour() -> None:
    for picture in PICTURES[:60]:
        image = drawings.draw(picture)
        assert image.size == (drawings.SIDE_PIXELS,) * 2
        cells = {(mark.row, mark.column): mark for mark in picture.marks}
        ground = Counter(image.get_flattened_data()).most_common(1)[0][0]
        for row in range(drawings.CELLS):
            for column in range(drawings.CELLS):
                left, top = column * drawings.CELL_PIXELS, row * drawings.CELL_PIXELS
                cell = image.crop(
                    (left, top, left + drawings.CELL_PIXELS, top + drawings.CELL_PIXELS)
                )
                painted = {pixel for pixel in cell.get_flattened_data() if pixel != ground}
                if (row, column) not in cells:
                    assert not painted
                    continue
                (pixel,) = painted
                nearest = min(
                    drawings.COLOURS.items(),
                    key=lambda named: sum(
                        (a - b) ** 2 for a, b in zip(named[1], pixel, strict=True)
                    ),
                )
                assert nearest[0] == cells[row, column].colour


def test_kinds_look_different() -> None:
    looks = set()
    for kind in drawings.KINDS:
        picture = Picture("scene", (drawings.Mark(kind, "red", 1, 1),), seed=5)
        looks.add(drawings.draw(picture).tobytes())
    assert len(looks) == len(drawings.KINDS)


def test_benchmark_asks_three_questions_a_fact() -> None:
    found = drawings.benchmark(COGNITION, 5)
    counts = Counter(item.category for _, items in found for item in items)
    assert counts == dict.fromkeys(COGNITION, 15)
    assert found == drawings.benchmark(COGNITION, 5)


def test_pairs_are_pictures_and_lines(tmp_path: Path) -> None:
    folder = drawings.write_pairs(tmp_path / "pairs", 6)
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"image", "question", "answer"}] * 6
    from PIL import Image

    for line, (picture, item) in zip(lines, drawings.calibration_items(6), strict=True):
        assert Image.open(folder / line["image"]).tobytes() == drawings.draw(picture).tobytes()
        assert (line["question"], line["answer"]) == (item.question, item.full_answer)


def test_world_is_light() -> None:
    code = (
        "import sys, llq_hf.demo.drawings; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
