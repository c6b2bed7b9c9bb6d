"""llq show."""

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
from .app import app, console


@app.command()
def show(
    paths: Annotated[
        list[str], typer.Argument(help="Folders or Hub ids of models that see: dense, packed.")
    ],
    image: Annotated[Path, typer.Option(help="The picture to ask about.")],
    question: Annotated[
        list[str], typer.Option(help="What to ask; give it again for more questions.")
    ],
    html: Annotated[Path | None, typer.Option(help="Also write one self-contained page.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer.")] = 64,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, ...; auto takes a GPU where there is one.")
    ] = "auto",
) -> None:
    """Ask several models the same about a picture: their answers side by side, as in the study's
    figures 2 to 6.

    Example: **llq show demo-vlm /tmp/vlm-rtn-2 --image picture.png --question "How many circles are
    there?"**
    """
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
        html.write_text(_page(picture, question, answers), encoding="utf-8")
        print(f"Written: {html}")


def _picture(file: Path) -> Any:
    from PIL import Image

    from ..models.vision import truncated_images_refused

    try:
        with truncated_images_refused():
            return Image.open(file).convert("RGB")
    except (OSError, ValueError) as error:
        raise LLQError(f"{file} is no picture that can be read ({error})") from error


def _asked(
    path: str, picture: Any, questions: list[str], max_new_tokens: int, device: str
) -> tuple[str, list[str]]:
    """(what the model is, its answers). One model is in memory at a time."""
    from ..common.machine import chosen_device, usable_device
    from ..hosts.hf_quantizer import check_quantized, described
    from ..models.vision import Prompt, VisionModel

    seeing = VisionModel.load(path, device=usable_device(chosen_device(device)))
    told = described(seeing.model)
    if told["method"] == "none":
        label = f"full precision ({str(seeing.model.dtype).removeprefix('torch.')})"
    else:
        check_quantized(seeing.model)
        label = (
            f"{told['method']}, {told['nominal_bits']:g} bits ({told['stored_bits']:.3f} stored)"
        )
    prompts = [
        Prompt(text, [picture], f"question {number}")
        for number, text in enumerate(questions, start=1)
    ]
    return label, [seeing.answers([prompt], max_new_tokens)[0].strip() for prompt in prompts]


def _page(picture: Any, questions: list[str], answers: dict[str, list[str]]) -> str:
    """One HTML file with the picture inside."""
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
