"""`llq show`: ask several vision-language models about a picture."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.columns import Columns
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from ..common.errors import LLQError
from ..common.words import one_line
from .app import MEASURE, app, console
from .options import Device


@app.command(rich_help_panel=MEASURE)
def show(
    paths: Annotated[
        list[str],
        typer.Argument(help="Folders or Hub ids of vision-language models, dense or packed."),
    ],
    image: Annotated[Path, typer.Option(help="The picture to ask about.")],
    question: Annotated[
        list[str], typer.Option(help="What to ask. Give it again for more questions.")
    ],
    html: Annotated[
        Path | None, typer.Option(help="Also write one self-contained page to this file.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    device: Device = "auto",
) -> None:
    """Ask several models about a picture and print their answers side by side.

    This is how figures 2 to 6 of the study were made.

    Example:

    - `llq show demo-vlm /tmp/vlm-gptq --image picture.png --question "How many circles?"`
    """
    from ..common.files import write_text
    from ..demo import resolve

    picture = _picture(image)
    answers: dict[str, list[str]] = {}
    for path in paths:
        with console.status(f"asking {path}"):
            label, found = _asked(resolve(path), picture, question, max_new_tokens, device)
        answers[f"{Path(path).name}: {label}"] = found
    for index, text in enumerate(question):
        console.print(f"\n[bold]{escape(text)}[/bold]")
        panels = [
            Panel(Text(found[index]), title=escape(label)) for label, found in answers.items()
        ]
        console.print(Columns(panels, equal=True))
    if html is not None:
        write_text(html, _page(picture, question, answers))
        print(f"Written: {html}")


def _picture(file: Path) -> Any:
    from PIL import Image

    from ..models.vision import truncated_images_refused

    try:
        with truncated_images_refused():
            return Image.open(file).convert("RGB")
    except (OSError, ValueError) as error:
        raise LLQError(
            f"{file} is no picture that can be read ({one_line(error)}); give a PNG or JPEG file"
        ) from error


def _asked(
    path: str, picture: Any, questions: list[str], max_new_tokens: int, device: str
) -> tuple[str, list[str]]:
    """(what the model is, its answers). Only one model is in memory at a time."""
    from ..common.machine import auto_device, usable_device
    from ..hosts.hf_quantizer import check_quantized, described
    from ..models.vision import Prompt, VisionModel

    vision = VisionModel.load(path, device=usable_device(auto_device(device)))
    facts = described(vision.model)
    if facts["method"] == "none":
        label = f"full precision ({str(vision.model.dtype).removeprefix('torch.')})"
    else:
        check_quantized(vision.model)
        bits = f"{facts['nominal_bits']:g} bits ({facts['stored_bits']:.3f} stored)"
        label = f"{facts['method']}, {bits}"
    prompts = [
        Prompt(text, [picture], f"question {number}")
        for number, text in enumerate(questions, start=1)
    ]
    return label, [vision.answers([prompt], max_new_tokens)[0].strip() for prompt in prompts]


def _page(picture: Any, questions: list[str], answers: dict[str, list[str]]) -> str:
    """One HTML page with the picture inside it."""
    import jinja2

    encoded = io.BytesIO()
    picture.save(encoded, "png")
    rows = [
        {"text": text, "answers": [(label, found[index]) for label, found in answers.items()]}
        for index, text in enumerate(questions)
    ]
    template = jinja2.Environment(autoescape=True).from_string(
        Path(__file__).with_name("show.html").read_text()
    )
    return template.render(image=base64.b64encode(encoded.getvalue()).decode(), questions=rows)
